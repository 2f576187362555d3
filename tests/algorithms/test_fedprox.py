"""FedProx: by hand, and FedAvg without its term."""

from __future__ import annotations

import chex
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedprox import fedprox
from fedgen.core.fit import Schedule


def test_without_the_term_it_is_fedavg_bit_for_bit(train, toy_federation):
    federation = toy_federation()
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    a = train(fedavg(optimizer, schedule), federation, 2)
    b = train(fedprox(optimizer, schedule, mu=0.0), federation, 2)
    chex.assert_trees_all_equal(a, b)


def test_two_steps_by_hand(train, scalar_federation):
    # From w = 0, v = 1 on x = 2, y = 1 the first step has no gap yet: w = 1, v = 1.
    # There p = sigmoid(2), so both derivatives are -2 (1 - p), and the term adds
    # mu (1 - 0) to that by w and mu (1 - 1) to that by v.
    federation = scalar_federation([[2.0], [1.0]], [[1], [0]], w=0.0, v=1.0)
    mu, q = 0.3, 1 / (1 + np.exp(2.0))
    algorithm = fedprox(optax.sgd(1.0), Schedule(1, 2), mu=mu)
    # Client 1 mirrors it on x = 1, y = 0: w = -1/2, then p = sigmoid(-1/2),
    # dw = p + mu (-1/2), dv = -p / 2.
    p = 1 / (1 + np.exp(0.5))
    w = np.mean([1 + 2 * q - mu, -0.5 - p + mu / 2])
    v = np.mean([1 + 2 * q, 1 + p / 2])
    params = train(algorithm, federation).server.params
    np.testing.assert_allclose(params["body"], w, rtol=1e-5)
    np.testing.assert_allclose(params["head"], v, rtol=1e-5)


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_out_of_range(mu):
    with pytest.raises(ValueError, match="mu must be >= 0"):
        fedprox(optax.sgd(0.1), Schedule(4), mu=mu)
