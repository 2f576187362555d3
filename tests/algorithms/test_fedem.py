"""FedEM: a step against NumPy, fixed points of its proportions, and its limits."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.aggregators import mixture
from fedgen.algorithms import _components
from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedem import fedem
from fedgen.core import evaluate, participation, rounds
from fedgen.core.algorithm import State
from fedgen.core.execution import Execution
from fedgen.core.federation import Data
from fedgen.core.fit import Schedule

X = [[2.0, 1.0, -1.0], [1.0, -0.5]]
Y = [[1, 1, 0], [0, 1]]
COMPONENTS = {"body": jnp.array([1.0, -0.5]), "head": jnp.array([1.0, 2.0])}
PROPORTIONS = jnp.array([[0.3, 0.7], [0.6, 0.4]])


def log_likelihood(x, y, body, head):
    """Compute log p_k(y | x) of the scalar model, `[s, k]`."""
    margin = np.outer(x, np.float64(body) * np.float64(head))
    return -np.logaddexp(0, np.where(np.asarray(y)[:, None] == 1, -margin, margin))


def e_step(table, proportions):
    joint = np.exp(table) * np.float64(proportions)
    return joint / joint.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("weighting", "counting"), [("size", "soft"), ("mass", "soft"), ("mass", "hard")]
)
def test_step_by_hand(scalar_federation, weighting, counting):
    federation = scalar_federation(X, Y, w=0.0, v=1.0)
    algorithm = fedem(
        optax.sgd(0.5),
        Schedule(4),
        num_components=2,
        weighting=weighting,
        counting=counting,
    )
    round_fn = rounds.make_round(algorithm, participation.full(), Execution())
    state = State(jnp.int32(0), COMPONENTS, (PROPORTIONS,))
    state, report = jax.jit(round_fn)(state, federation, jax.random.key(0))

    w, v = np.float64(COMPONENTS["body"]), np.float64(COMPONENTS["head"])
    moves, weights, losses = [], [], []
    for client in range(2):
        x, y = np.array(X[client]), np.array(Y[client])
        table = log_likelihood(x, y, w, v)
        q = e_step(table, PROPORTIONS[client])
        if counting == "hard":
            q = np.eye(2)[np.argmax(table, axis=1)]
        np.testing.assert_allclose(
            state.clients[0][client], q.mean(axis=0), rtol=1e-5, err_msg="pi"
        )
        gap = 1 / (1 + np.exp(-np.outer(x, w * v))) - y[:, None]
        slope = (q * gap * x[:, None]).mean(axis=0)
        moves.append(-0.5 * np.stack([slope * v, slope * w]))
        weights.append(q.sum(axis=0) if weighting == "mass" else np.full(2, len(x)))
        losses.append(-(q * table).sum(axis=1).mean())
    total = np.maximum(np.sum(weights, axis=0), 1e-9)
    moved = np.einsum("ik,iak->ak", weights, moves) / total
    np.testing.assert_allclose(state.server["body"], w + moved[0], rtol=1e-5)
    np.testing.assert_allclose(state.server["head"], v + moved[1], rtol=1e-5)
    np.testing.assert_allclose(
        report.metrics["loss"], np.dot([3, 2], losses) / 5, rtol=1e-5
    )
    assert int(report.steps) == 4, "one for each model of each client"


@pytest.mark.parametrize("weighting", ["size", "mass"])
def test_one_predictor_is_fedavg(train, toy_federation, weighting):
    federation = toy_federation((7, 0, 5, 3))
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    algorithm = fedem(optimizer, schedule, num_components=1, weighting=weighting)
    ours = train(algorithm, federation, 2)
    theirs = train(fedavg(optimizer, schedule), federation, 2)
    only = jax.tree.map(lambda a: a[0], ours.server)
    chex.assert_trees_all_close(only, theirs.server.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.clients[0], 1.0)

    x = federation.pool.x[:5]
    context = federation.context(0)
    expected = jax.nn.log_softmax(context.model.apply(theirs.server.params, x))
    for logits in (
        algorithm.predict(context, ours.server, ours.clients[0][0], x),
        algorithm.predict_global(context, ours.server, x),
    ):
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_equal_predictors_stay_equal(train, scalar_federation):
    # The scalar model starts every component at the same weights.
    federation = scalar_federation(X, Y, w=0.5, v=1.0)
    state = train(fedem(optax.sgd(0.5), Schedule(4), num_components=2), federation, 3)
    for leaf in jax.tree.leaves(state.server):
        assert leaf[0] == leaf[1]
    assert float(state.server["body"][0]) != 0.5
    np.testing.assert_array_equal(state.clients[0], 0.5)


@pytest.fixture(scope="module")
def newcomers(scalar_federation):
    """Two clients that mix the predictors 7 : 3 and 1 : 9, and one without samples."""
    rng = np.random.default_rng(0)
    xs, ys = [], []
    for share in (0.7, 0.1):
        x = rng.normal(size=600)
        slope = np.where(rng.random(600) < share, 4.0, -4.0)
        xs.append(x)
        ys.append((rng.random(600) < 1 / (1 + np.exp(-slope * x))).astype(int))
    return scalar_federation([*xs, []], [*ys, []], w=0.0, v=1.0)


SHARP = {"body": jnp.array([4.0, -4.0]), "head": jnp.array([1.0, 1.0])}


@pytest.mark.parametrize("table_rows", [4096, 600, 599])
def test_unseen_clients_find_their_proportions(
    newcomers, client_data, monkeypatch, table_rows
):
    monkeypatch.setattr(_components, "_TABLE_ROWS", table_rows)
    algorithm = fedem(optax.sgd(0.5), Schedule(64), num_components=2, adapt_steps=60)
    personalise = jax.jit(
        functools.partial(
            algorithm.personalise, newcomers.context(0), jax.random.key(0)
        )
    )
    uniform = jnp.full(2, 0.5)
    for client, share in ((0, 0.7), (1, 0.1)):
        data = client_data(newcomers, client)
        fitted = personalise(uniform, SHARP, data)
        rows = slice(600 * client, 600 * (client + 1))
        x = np.asarray(newcomers.pool.x[rows, 0])
        table = log_likelihood(x, newcomers.pool.y[rows], *SHARP.values())
        best = mixture.fit_proportions(jnp.asarray(table), jnp.ones(600, bool))
        np.testing.assert_allclose(fitted, best, atol=1e-3)
        # Its standard error is about 1 / sqrt(600), and a half more for overlap.
        assert abs(float(fitted[0]) - share) < 0.1
    # A proportion that was lost comes back.
    fitted = personalise(jnp.array([1.0, 0.0]), SHARP, data)
    assert float(fitted[1]) > 0.8
    nobody = personalise(PROPORTIONS[0], SHARP, client_data(newcomers, 2))
    np.testing.assert_array_equal(nobody, PROPORTIONS[0])


def test_proportions_do_not_depend_on_who_has_a_table(scalar_federation, monkeypatch):
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=size) for size in (5, 70, 0, 33)]
    ys = [(rng.random(x.shape) < 0.5).astype(int) for x in xs]
    federation = scalar_federation(xs, ys, w=0.0, v=1.0)
    algorithm = fedem(optax.sgd(0.5), Schedule(8), num_components=2)
    (cohort,) = federation.cohorts

    def fit(start, size):
        data = Data(federation.pool, cohort.order, start, size, jnp.float32(1))
        context, key = federation.context(0), jax.random.key(0)
        uniform = jnp.full(2, 0.5)
        return algorithm.personalise(context, key, uniform, SHARP, data)

    fitted = []
    for table_rows in (4096, 33, 1):  # for all, some, and none
        monkeypatch.setattr(_components, "_TABLE_ROWS", table_rows)
        fitted.append(jax.vmap(fit)(*cohort.train))
    np.testing.assert_allclose(fitted[0], fitted[2], rtol=1e-5)
    np.testing.assert_allclose(fitted[1], fitted[2], rtol=1e-5)
    assert len(np.unique(np.round(fitted[0][:, 0], 3))) == 4


def test_unseen_clients_train_no_model(newcomers):
    algorithm = fedem(optax.sgd(0.5), Schedule(64), num_components=2)
    state = State(jnp.int32(3), SHARP, (jnp.full((3, 2), 0.5),))
    adapt = jax.jit(evaluate.make_adapt(algorithm, Execution()))
    after = adapt(state, newcomers, jax.random.key(0))
    chex.assert_trees_all_equal(after.server, SHARP)
    rows = slice(0, 600)
    x = np.asarray(newcomers.pool.x[rows, 0])
    table = log_likelihood(x, newcomers.pool.y[rows], *SHARP.values())
    once = e_step(table, [0.5, 0.5]).mean(axis=0)
    np.testing.assert_allclose(after.clients[0][0], once, rtol=1e-4)


def test_prediction_mixes_probabilities(newcomers):
    algorithm = fedem(optax.sgd(0.5), Schedule(4), num_components=2)
    x = jnp.array([[1.0], [0.2]])
    logits = algorithm.predict(newcomers.context(0), SHARP, PROPORTIONS[0], x)
    p = 1 / (1 + np.exp(-4 * np.array([1.0, 0.2])))
    expected = 0.3 * p + 0.7 * (1 - p)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_components", 0),
        ("weighting", "equal"),
        ("counting", "half"),
        ("adapt_steps", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        fedem(optax.sgd(0.1), Schedule(4), **{name: value})
