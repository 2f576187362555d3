"""FedPer: by hand, and FedAvg where there is nothing to keep."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedper import fedper
from fedgen.core import rounds
from fedgen.core.fit import Schedule


def test_step_by_hand(train, scalar_federation):
    # From w = v = 1. Client 0 (x = 2, y = 1): p - 1 = -q with q = sigmoid(-2), so w
    # and v go to 1 + 2 q. Client 1 (x = 1, y = 0): both go to 1 - p, p = sigmoid(1).
    federation = scalar_federation([[2.0], [1.0] * 3], [[1], [0] * 3], w=1.0, v=1.0)
    state = train(fedper(optax.sgd(1.0), Schedule(4)), federation)
    first, second = 1 + 2 / (1 + np.exp(2.0)), 1 - 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(state.server, (first + 3 * second) / 4, rtol=1e-6)
    np.testing.assert_allclose(state.clients[0], [first, second], rtol=1e-6)


def test_with_an_empty_head_it_is_fedavg(train, toy_federation):
    federation = toy_federation()
    model = federation.cohorts[0].model

    def whole(params):
        return params["body"]

    bare = model._replace(
        init=lambda key: {"body": model.init(key), "head": {}},
        embed=lambda params, x: model.embed(whole(params), x),
        head=lambda params, z: model.head(whole(params), z),
    )
    cohort = dataclasses.replace(federation.cohorts[0], model=bare)
    bare_federation = dataclasses.replace(federation, cohorts=(cohort,))
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    a = train(fedavg(optimizer, schedule), federation, 2).server.params
    b = train(fedper(optimizer, schedule), bare_federation, 2).server
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def test_only_the_body_crosses_the_wire(toy_federation):
    federation = toy_federation()
    algorithm = fedper(optax.sgd(0.1), Schedule(4))
    state = rounds.init_state(algorithm, federation, jax.random.key(0))
    # 4 x 6 + 6 and 6 x 5 + 5 weights of 4 bytes; a count of 4 bytes goes up.
    (traffic,) = rounds.traffic(algorithm, federation, state)
    assert traffic == (4 * 65, 4 * 65 + 4)


def test_two_architectures_are_refused(toy_federation):
    with pytest.raises(ValueError, match="FedPer averages weights"):
        fedper(optax.sgd(0.1), Schedule(4)).init(
            jax.random.key(0), toy_federation(models=2)
        )
