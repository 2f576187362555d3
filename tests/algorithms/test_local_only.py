"""Local-only training: by hand, and blind to everybody else."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax

from fedgen.algorithms.local_only import local_only
from fedgen.core import rounds
from fedgen.core.federation import Pool
from fedgen.core.fit import Schedule


def test_step_by_hand(train, scalar_federation):
    # w = 0 gives p = 1/2. Client 0: dw = (1/2 - 1) 1 2 = -1. Client 1: dw = 1/2.
    federation = scalar_federation([[2.0], [1.0] * 3], [[1], [0] * 3], w=0.0, v=1.0)
    state = train(local_only(optax.sgd(1.0), Schedule(4)), federation)
    np.testing.assert_allclose(state.clients[0]["body"], [1.0, -0.5], rtol=1e-6)
    np.testing.assert_allclose(state.clients[0]["head"], [1.0, 1.0], rtol=1e-6)


def test_a_client_never_feels_another(train, toy_federation):
    federation = toy_federation()
    row = federation.cohorts[0].order[federation.cohorts[0].train.start[2]]
    changed = dataclasses.replace(
        federation, pool=Pool(federation.pool.x.at[row].add(1.0), federation.pool.y)
    )
    algorithm = local_only(optax.sgd(0.1), Schedule(4))
    a = jax.tree.leaves(train(algorithm, federation, 2).clients)
    b = jax.tree.leaves(train(algorithm, changed, 2).clients)
    differ = np.any(
        [np.any((x != y).reshape(len(x), -1), 1) for x, y in zip(a, b, strict=True)], 0
    )
    assert differ.tolist() == [i == 2 for i in range(9)]


def test_cohorts_start_alike_and_send_nothing(toy_federation):
    federation = toy_federation(models=2)
    algorithm = local_only(optax.sgd(0.1), Schedule(4))
    state = rounds.init_state(algorithm, federation, jax.random.key(3))
    for cohort, clients in zip(federation.cohorts, state.clients, strict=True):
        start = cohort.model.init(jax.random.key(3))
        for leaf, one in zip(
            jax.tree.leaves(clients), jax.tree.leaves(start), strict=True
        ):
            assert leaf.shape == (cohort.num_clients, *one.shape)
            np.testing.assert_allclose(
                leaf, np.broadcast_to(one, leaf.shape), rtol=1e-6
            )
    assert rounds.traffic(algorithm, federation, state) == ((0, 0), (0, 0))
    assert algorithm.predict_global is None
