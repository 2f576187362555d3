"""FedProto: by hand, across architectures, and without its pull."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedproto import Prototypes, fedproto
from fedgen.algorithms.local_only import local_only
from fedgen.core import rounds
from fedgen.core.fit import Schedule


@pytest.mark.parametrize(
    ("weighting", "prototype", "weight"),
    [("count", (2 + 3 * 0.5) / 4, 4.0), ("client", (2 + 0.5) / 2, 2.0)],
)
def test_step_by_hand(train, scalar_federation, weighting, prototype, weight):
    # From w = 0, p = 1/2: client 0 (x = 2) goes to w = 1 and has z = 2, client 1
    # (three times x = 1) goes to w = 1/2 and has z = 1/2. Nobody has class 0.
    federation = scalar_federation([[2.0], [1.0] * 3], [[1], [1] * 3], w=0.0, v=1.0)
    state = train(
        fedproto(optax.sgd(1.0), Schedule(4), weighting=weighting), federation
    )
    np.testing.assert_allclose(state.clients[0]["body"], [1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(state.server.mean[:, 0], [0.0, prototype], rtol=1e-6)
    np.testing.assert_allclose(state.server.weight, [0.0, weight], rtol=1e-6)


def test_pull_by_hand(scalar_federation, client_data):
    # At w = 0 the gap is (0 - C)^2 with derivative -2 C x by w; C = 3, x = 2, and the
    # cross entropy adds -1. Class 0 has no prototype: client 1 moves by -1/2 only.
    federation = scalar_federation([[2.0], [1.0]], [[1], [0]], w=0.0, v=1.0)
    algorithm = fedproto(optax.sgd(1.0), Schedule(4), pull=0.25)
    prototypes = Prototypes(jnp.asarray([[9.0], [3.0]]), jnp.asarray([0.0, 1.0]))
    params = {"body": jnp.float32(0.0), "head": jnp.float32(1.0)}
    for client, expected in ((0, 1 + 0.25 * 12), (1, -0.5)):
        trained, _, _ = algorithm.local(
            federation.context(0),
            jax.random.key(0),
            params,
            prototypes,
            client_data(federation, client),
        )
        np.testing.assert_allclose(trained["body"], expected, rtol=1e-6)


def test_without_pull_it_is_local_only(train, toy_federation):
    federation = toy_federation(models=2)
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    a = train(local_only(optimizer, schedule), federation, 2)
    b = train(fedproto(optimizer, schedule, pull=0.0), federation, 2)
    chex.assert_trees_all_close(a.clients, b.clients, rtol=1e-5, atol=1e-6)


def test_architectures_share_prototypes_of_all_samples(train, toy_federation):
    federation = toy_federation(models=2)
    state = train(fedproto(optax.sgd(0.1), Schedule(4)), federation)
    total, count = np.zeros((4, 5)), np.zeros(4)
    for k, cohort in enumerate(federation.cohorts):
        for i in range(cohort.num_clients):
            start, size = int(cohort.train.start[i]), int(cohort.train.size[i])
            rows = cohort.order[start : start + size]
            params = jax.tree.map(lambda a, i=i: a[i], state.clients[k])
            z = np.asarray(cohort.model.embed(params, federation.pool.x[rows]))
            for feature, label in zip(z, federation.pool.y[rows], strict=True):
                total[label] += feature
                count[label] += 1
    np.testing.assert_array_equal(state.server.weight, count)
    np.testing.assert_allclose(
        state.server.mean, total / count[:, None], rtol=1e-4, atol=1e-5
    )
    sizes = rounds.traffic(fedproto(optax.sgd(0.1), Schedule(4)), federation, state)
    assert sizes == ((4 * 24, 4 * 24),) * 2  # a mean of 5 and a weight for 4 classes


def test_nearest_prototype(scalar_federation):
    federation = scalar_federation([[2.0]], [[1]], w=2.0, v=1.0)
    algorithm = fedproto(optax.sgd(0.1), Schedule(4), predict_by="prototype")
    params = {"body": jnp.float32(2.0), "head": jnp.float32(1.0)}
    server = Prototypes(jnp.asarray([[1.0], [5.0]]), jnp.asarray([1.0, 1.0]))
    x = jnp.asarray([[0.0], [2.0]])  # z = 0 and 4
    logits = algorithm.predict(federation.context(0), server, params, x)
    np.testing.assert_allclose(logits, [[-1.0, -25.0], [-9.0, -1.0]])
    unseen = server._replace(weight=jnp.asarray([0.0, 1.0]))
    logits = algorithm.predict(federation.context(0), unseen, params, x)
    assert np.argmax(logits, 1).tolist() == [1, 1] and np.all(np.isfinite(logits))


def test_widths_must_agree(toy_federation):
    a, b = toy_federation(models=1), toy_federation(models=1, dim=3)
    mixed = dataclasses.replace(a, cohorts=a.cohorts + b.cohorts)
    with pytest.raises(ValueError, match="one width; got toy6 with 5, toy6 with 3"):
        fedproto(optax.sgd(0.1), Schedule(4)).init(jax.random.key(0), mixed)


@pytest.mark.parametrize(
    ("name", "value"), [("pull", -1.0), ("weighting", "size"), ("predict_by", "knn")]
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        fedproto(optax.sgd(0.1), Schedule(4), **{name: value})
