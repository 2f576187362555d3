"""CCVR: pooled moments, calibration, and FedAvg beneath it."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

from fedgen.algorithms.ccvr import Server, ccvr, pool
from fedgen.algorithms.fedavg import fedavg
from fedgen.core.algorithm import Mean, Uploads
from fedgen.core.fit import Schedule

OPTIMIZER = optax.sgd(0.1, momentum=0.5)


@pytest.fixture(scope="module")
def pooled(toy_federation, client_data):
    """Send moments from all clients, and keep the features they come from."""
    federation = toy_federation()
    (exchange,) = ccvr(OPTIMIZER, Schedule(4)).more
    context, cohort = federation.context(0), federation.cohorts[0]
    params = context.model.init(jax.random.key(5))
    send = jax.jit(
        lambda data: exchange.local(context, jax.random.key(0), (), params, data)[1]
    )
    messages = [send(client_data(federation, i)) for i in range(cohort.num_clients)]

    def mean(*parts):
        weight = sum(part.weight for part in parts)
        total = sum(part.weight * part.value for part in parts)
        return Mean(total / jnp.maximum(weight, 1.0), weight)

    first, second = (mean(*parts) for parts in zip(*messages, strict=True))
    rows = np.concatenate(
        [
            np.asarray(cohort.order)[start : start + size]
            for start, size in zip(*map(np.asarray, cohort.train), strict=True)
        ]
    )
    z = np.asarray(context.model.embed(params, federation.pool.x[rows]), np.float64)
    return context, params, first, second, z, np.asarray(federation.pool.y)[rows]


def test_pooled_moments_are_those_of_pooled_features(pooled):
    _, _, first, second, z, y = pooled
    count, mean, cov = pool(first, second)
    for label in range(4):
        own = z[y == label]
        assert count[label] == len(own)
        np.testing.assert_allclose(mean[label], own.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cov[label], np.cov(own.T), rtol=1e-3, atol=1e-4)


def test_pooling_by_hand():
    # Class 0 holds 1 and 3: mean 2, E z^2 = 5, variance (5 - 4) 2 / 1 = 2. Class 1
    # holds 4 alone and has no variance.
    first = Mean(jnp.asarray([[2.0], [4.0]]), jnp.asarray([[2.0], [1.0]]))
    second = Mean(jnp.asarray([[[5.0]], [[16.0]]]), jnp.asarray([[[2.0]], [[1.0]]]))
    count, mean, cov = pool(first, second)
    np.testing.assert_allclose(count, [2.0, 1.0])
    np.testing.assert_allclose(mean[:, 0], [2.0, 4.0])
    np.testing.assert_allclose(cov[:, 0, 0], [2.0, 0.0])


def test_a_broken_head_is_repaired_and_fedavg_left_alone(pooled):
    context, params, first, second, z, y = pooled
    broken = {**params, "head": jax.tree.map(lambda a: -3 * a, params["head"])}
    algorithm = ccvr(OPTIMIZER, Schedule(20), calibration_epochs=10)
    base = fedavg(OPTIMIZER, Schedule(20)).init(
        jax.random.key(0), _Only(context.model)
    )[0]
    server = Server(base._replace(params=broken), broken["head"])
    upload = Uploads(jnp.zeros(1), jnp.ones(1), (first, second))
    (exchange,) = algorithm.more
    after, _ = jax.jit(
        lambda key: exchange.aggregate((context,), key, server, (upload,))
    )(jax.random.key(1))
    chex.assert_trees_all_equal(after.fedavg.params, broken)

    def accuracy(head):
        logits = context.model.head({"head": head}, jnp.asarray(z, jnp.float32))
        return np.mean(np.argmax(logits, 1) == y)

    # A head trained on the real features bounds what virtual ones can do.
    best = LogisticRegression().fit(z, y).score(z, y)
    assert accuracy(after.head) > max(best - 0.1, accuracy(broken["head"]) + 0.3)


class _Only:
    """A federation as far as `init` of FedAvg looks."""

    def __init__(self, model):
        self._model = model

    def only_model(self, name):
        del name
        return self._model


def test_without_calibration_it_is_fedavg(train, toy_federation):
    federation = toy_federation((7, 0, 5))
    a = train(fedavg(OPTIMIZER, Schedule(4)), federation, 2).server
    b = train(ccvr(OPTIMIZER, Schedule(4), calibration_epochs=0), federation, 2).server
    chex.assert_trees_all_equal(a, b.fedavg)
    chex.assert_trees_all_equal(b.head, a.params["head"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("virtual_per_class", 0),
        ("calibration_epochs", -1),
        ("shrinkage", 0.0),
        ("shrinkage", 1.5),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        ccvr(OPTIMIZER, Schedule(4), **{name: value})
