"""IFCA: a step by hand, what nobody chose, and FedAvg as its special case."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.ifca import ifca
from fedgen.core import participation, rounds
from fedgen.core.algorithm import State
from fedgen.core.execution import Execution
from fedgen.core.fit import Schedule

# Predictors sigmoid(v w x) of label 1: by sign of x, against it, and undecided.
COMPONENTS = {"body": jnp.array([1.0, -1.0, 2.0]), "head": jnp.array([1.0, 1.0, 0.0])}


@pytest.fixture(scope="module")
def trio(scalar_federation):
    """Clients 0 and 2 follow the sign of x; client 1 goes against it."""
    x, y = [[2.0], [1.0] * 3, [1.0] * 2], [[1], [0] * 3, [1] * 2]
    return scalar_federation(x, y, w=0.0, v=1.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("averaging", ["model", "gradient"])
def test_step_by_hand(trio, averaging):
    algorithm = ifca(optax.sgd(1.0), Schedule(4), averaging=averaging)
    round_fn = rounds.make_round(algorithm, participation.full(), Execution())
    state = State(jnp.int32(0), COMPONENTS, ((),))
    state, report = jax.jit(round_fn)(state, trio, jax.random.key(0))
    # With w = v = 1, both derivatives of client 0 are (p - 1) 2 at p = sigmoid(2), and
    # those of client 2 are p - 1 at p = sigmoid(1). The weights are 1 and 2. Client 1
    # has p = sigmoid(-1) under w = -1: dw = p and dv = -p.
    first = 2 * (1 - sigmoid(2)) + 2 * (1 - sigmoid(1))
    second = 3 * sigmoid(-1)
    over = (3, 3) if averaging == "model" else (6, 6)
    body = [1 + first / over[0], -1 - second / over[1], 2]
    head = [1 + first / over[0], 1 + second / over[1], 0]
    np.testing.assert_allclose(state.server["body"], body, rtol=1e-6)
    np.testing.assert_allclose(state.server["head"], head, rtol=1e-6)
    assert float(state.server["body"][2]) == 2.0, "nobody chose it"
    assert float(report.metrics["server/clusters"]) == 2
    assert float(report.metrics["server/largest_cluster"]) == 0.5


def test_a_client_uses_the_model_of_least_loss(trio, client_data):
    algorithm = ifca(optax.sgd(1.0), Schedule(2))
    context, x = trio.context(0), jnp.array([[3.0]])
    personalise = jax.jit(functools.partial(algorithm.personalise, context))
    for client, best in ((0, 0), (1, 1), (2, 0)):
        data = client_data(trio, client)
        chosen = personalise(jax.random.key(0), (), COMPONENTS, data)
        assert int(chosen) == best
        logits = algorithm.predict(context, COMPONENTS, chosen, x)
        np.testing.assert_allclose(logits, [[0, 3 if best == 0 else -3]])


def test_all_samples_count_in_the_choice(scalar_federation, client_data):
    # The first batch of two speaks for model 0, the whole for model 1.
    federation = scalar_federation([[1.0] * 5], [[1, 1, 0, 0, 0]], w=0.0, v=1.0)
    algorithm = ifca(optax.sgd(1.0), Schedule(2), num_components=2)
    decided = jax.tree.map(lambda a: a[:2], COMPONENTS)
    data = client_data(federation, 0)
    personalise = jax.jit(
        functools.partial(algorithm.personalise, federation.context(0))
    )
    chosen = personalise(jax.random.key(0), (), decided, data)
    assert int(chosen) == 1
    # Equally good models: the first of them.
    equal = {"body": jnp.ones(2), "head": jnp.ones(2)}
    chosen = personalise(jax.random.key(0), (), equal, data)
    assert int(chosen) == 0


def test_one_model_is_fedavg(train, toy_federation):
    federation = toy_federation((7, 0, 5, 3))
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    ours = train(ifca(optimizer, schedule, num_components=1), federation, 2)
    theirs = train(fedavg(optimizer, schedule), federation, 2)
    only = jax.tree.map(lambda a: a[0], ours.server)
    chex.assert_trees_all_close(only, theirs.server.params, rtol=1e-5, atol=1e-6)


def test_models_start_apart(toy_federation):
    federation = toy_federation()
    key = jax.random.key(3)
    server, _ = ifca(optax.sgd(0.1), Schedule(4)).init(key, federation)
    first = jax.tree.map(lambda a: a[0], server)
    model = federation.cohorts[0].model
    chex.assert_trees_all_close(first, model.init(key), rtol=1e-6)
    kernels = np.asarray(server["head"]["kernel"])
    for i in range(3):
        for j in range(i):
            assert np.abs(kernels[i] - kernels[j]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "value"), [("num_components", 0), ("averaging", "mean")]
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        ifca(optax.sgd(0.1), Schedule(4), **{name: value})
