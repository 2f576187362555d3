"""pFedGM: the limits in which it is another method, and its pieces by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.aggregators import gaussian
from fedgen.algorithms import _gaussian_head, make
from fedgen.core import evaluate, participation, rounds, simulate
from fedgen.core.algorithm import Algorithm, Mean
from fedgen.core.execution import Execution
from fedgen.core.federation import Data
from fedgen.core.fit import Schedule

KEY = jax.random.key(3)
ROUNDS = 3


@pytest.fixture(scope="module")
def federation(toy_federation):
    return toy_federation()


TRAINED = {}


def train(name, federation, schedule=Schedule(4, 1), num_rounds=ROUNDS, **options):
    """Run some rounds, once; return the algorithm, its final state and reports."""
    point = (name, schedule, num_rounds, *sorted(options.items()))
    if point not in TRAINED:
        TRAINED[point] = _train(name, federation, schedule, num_rounds, options)
    return TRAINED[point]


def _train(name, federation, schedule, num_rounds, options):
    optimizer = optax.sgd(0.05, momentum=0.5)
    algorithm = make(name, optimizer, schedule, options)
    round_fn = rounds.make_round(algorithm, participation.full(), Execution(1))
    block = simulate.make_block(round_fn, ROUNDS)
    state = rounds.init_state(algorithm, federation, KEY)
    state, reports = block(state, federation, KEY, jnp.int32(num_rounds))
    return algorithm, state, reports


@pytest.fixture(scope="module")
def trained(federation):
    return train("pfedgm", federation)


def measured(federation, trained, **options):
    """Let the clients of a trained extractor measure and fuse under other options."""
    algorithm = make("pfedgm", optax.sgd(0.05), Schedule(4, 1), options)
    second = Algorithm(algorithm.init, *algorithm.more[0], algorithm.predict)
    round_fn = rounds.make_round(second, participation.full(), Execution())
    _, state, _ = trained
    shape = state.server.belief.mean.shape
    fresh = state.server._replace(belief=_gaussian_head.no_belief(*shape))
    state = state._replace(server=fresh)
    return algorithm, jax.jit(round_fn)(state, federation, KEY)[0]


def own_statistics(federation, body, client):
    """Compute a client's statistics from its raw rows, in NumPy float64."""
    (cohort,) = federation.cohorts
    start, size = int(cohort.train.start[client]), int(cohort.train.size[client])
    row = np.asarray(cohort.order)[start : start + size]
    z = np.asarray(
        cohort.model.embed({"body": body}, federation.pool.x[row]), np.float64
    )
    y = np.asarray(federation.pool.y)[row]
    c = federation.num_classes
    count = np.bincount(y, minlength=c)
    mean = np.zeros((c, z.shape[1]))
    for label in np.unique(y):
        mean[label] = z[y == label].mean(0)
    residual = z - mean[y]
    return count, mean, residual.T @ residual


def all_statistics(federation, body):
    clients = range(federation.cohorts[0].num_clients)
    stats = [own_statistics(federation, body, client) for client in clients]
    return tuple(np.stack(part) for part in zip(*stats, strict=True))


def head_of(algorithm, federation, state, client):
    (cohort,) = federation.cohorts
    data = Data(
        federation.pool,
        cohort.order,
        cohort.train.start[client],
        cohort.train.size[client],
        jnp.float32(1),
    )
    context = federation.context(0)
    message = algorithm.download(context, state.server, jnp.int32(client))
    return algorithm.personalise(context, KEY, (), message, data)


def test_a_linear_navigator_without_pull_is_fedavg_step_for_step(federation):
    # Invariant j of the card: gamma = 1, lambda = 0, the model's own head.
    _, fedavg, _ = train("fedavg", federation)
    for name, options in (
        ("pfedgm", {"navigator": "linear", "pull": 0.0}),
        ("fedavg_gaussian", {}),
    ):
        _, ours, _ = train(name, federation, **options)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            {"body": ours.server.body, "head": ours.server.navigator},
            fedavg.server.params,
        )


def test_the_belief_is_that_of_the_averaged_extractor(federation, trained):
    _, state, _ = trained
    belief = state.server.belief
    count, mean, scatter = all_statistics(federation, state.server.body)
    total = count.sum(0)
    pooled = np.einsum("ic,icd->cd", count, mean) / np.maximum(total, 1)[:, None]
    freedom = np.maximum(count - 1, 0).sum()
    within = scatter.sum(0) / freedom
    d = within.shape[0]
    shrunk = 0.99 * within + 0.01 * np.trace(within) / d * np.eye(d)
    np.testing.assert_array_equal(np.isfinite(belief.variance), total > 0)
    np.testing.assert_allclose(belief.mean, pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(belief.within, shrunk, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gain", gaussian.BETWEEN_FORMS)
def test_between_covariance_is_the_moment_estimate(federation, trained, gain):
    _, state = measured(federation, trained, gain=gain)
    count, mean, scatter = all_statistics(federation, state.server.body)
    stats = gaussian.Statistics(
        *(jnp.asarray(a, jnp.float32) for a in (count, mean, scatter))
    )
    expected = gaussian.between_covariance(
        stats, None, state.server.belief.within, form=gain
    )
    np.testing.assert_allclose(
        state.server.belief.between, expected, rtol=2e-3, atol=2e-4
    )


@pytest.mark.parametrize("gain", ["scalar", "full", "global", "local"])
def test_the_personal_head_fuses_prior_and_likelihood(federation, trained, gain):
    algorithm, state = measured(federation, trained, gain=gain)
    belief, client = state.server.belief, 2
    head = head_of(algorithm, federation, state, client)
    count, mean, scatter = own_statistics(federation, state.server.body, client)
    m, sigma, b = (
        np.asarray(a, np.float64) for a in (belief.mean, belief.within, belief.between)
    )
    d = sigma.shape[0]
    for c, n in enumerate(count):
        if gain == "global" or n == 0:
            expected = m[c]
        elif gain == "local":
            expected = mean[c]
        else:
            k = b @ np.linalg.inv(b + sigma / n)
            expected = m[c] + k @ (mean[c] - m[c])
        np.testing.assert_allclose(head.mean[c], expected, rtol=2e-3, atol=2e-3)
    tau, freedom = 4.0 * d, np.maximum(count - 1, 0).sum()
    expected = (tau * sigma + scatter) / (tau + freedom)
    np.testing.assert_allclose(head.cov, expected, rtol=1e-3, atol=1e-4)
    prior = (count + 0.1) / (count.sum() + 0.1 * len(count))
    np.testing.assert_allclose(head.log_prior, np.log(prior), rtol=1e-5)


def test_prediction_is_bayes_rule(federation, trained):
    algorithm, state, _ = trained
    context = federation.context(0)
    head = head_of(algorithm, federation, state, 2)
    x = federation.pool.x[:6]
    logits = algorithm.predict(context, state.server, head, x)
    z = np.asarray(context.model.embed({"body": state.server.body}, x), np.float64)
    gap = z[:, None] - np.asarray(head.mean, np.float64)[None]
    metric = np.linalg.inv(np.asarray(head.cov, np.float64))
    score = -0.7 * np.einsum("bcd,de,bce->bc", gap, metric, gap) / 2
    score += np.asarray(head.log_prior)[None]
    expected = jax.nn.softmax(jnp.asarray(score, jnp.float32))
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=2e-4)


def test_plugin_and_predictive_agree_without_spread_between_clients(
    federation, trained
):
    # With K = 0 the posterior covariance V is 0 and both are the same classifier.
    scores = []
    for inference in ("plugin", "predictive"):
        algorithm, state = measured(
            federation, trained, gain="global", inference=inference
        )
        head = head_of(algorithm, federation, state, 5)
        context = federation.context(0)
        logits = algorithm.predict(context, state.server, head, federation.pool.x[:8])
        scores.append(jax.nn.softmax(logits))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_the_pull_makes_classes_compact(federation):
    _, _, without = train("pfedgm", federation, pull=0.0)
    _, _, strong = train("pfedgm", federation, pull=5.0)
    assert (
        strong.metrics["server/within"][-1] < 0.8 * without.metrics["server/within"][-1]
    )


def first_loss(federation, server=None, client=2, **options):
    """Return the loss of a client's first step on all its data, and what it saw."""
    algorithm = make("pfedgm", optax.sgd(0.1), Schedule(64, 1), {"pull": 0.0} | options)
    context, (cohort,) = federation.context(0), federation.cohorts
    data = Data(
        federation.pool,
        cohort.order,
        cohort.train.start[client],
        cohort.train.size[client],
        jnp.float32(1),
    )
    server = server or algorithm.init(KEY, federation)[0]
    metrics = jax.jit(lambda s: algorithm.local(context, KEY, (), s, data)[2])(server)
    row = np.asarray(cohort.order)[int(data.start) : int(data.start + data.size)]
    z = context.model.embed({"body": server.body}, federation.pool.x[row])
    return (
        float(metrics["loss"]),
        np.asarray(z),
        np.asarray(federation.pool.y[row]),
        server,
    )


def nll(logits, y):
    return -np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))[np.arange(len(y)), y]


def gaussian_logits(z, anchors):
    return z @ anchors.T - (anchors**2).sum(-1)[None] / 2


def test_resampling_balances_classes(federation):
    """With gamma = 0 the first step weighs the classes of a client alike."""
    loss, z, y, server = first_loss(federation, resampling=0.0)
    each = nll(gaussian_logits(z, np.asarray(server.navigator)), y)
    by_class = [each[y == c].mean() for c in np.unique(y)]
    np.testing.assert_allclose(loss, np.mean(by_class), rtol=1e-4)
    assert abs(np.mean(by_class) - each.mean()) > 1e-4


def test_readings_of_the_shared_objective(federation, trained):
    """Each option against its formula in NumPy, on one full batch."""
    _, state, _ = trained
    server = state.server
    anchors, means = np.asarray(server.navigator), np.asarray(server.belief.mean)

    loss, z, y, _ = first_loss(federation, server)
    plain = nll(gaussian_logits(z, anchors), y).mean()
    np.testing.assert_allclose(loss, plain, rtol=1e-4)

    loss, *_ = first_loss(federation, server, navigator="frozen")
    np.testing.assert_allclose(
        loss, nll(gaussian_logits(z, means), y).mean(), rtol=1e-3
    )

    loss, *_ = first_loss(federation, server, navigator="cosine")
    unit = [a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (z, anchors)]
    expected = nll(16 * unit[0] @ unit[1].T, y).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-3)

    loss, *_ = first_loss(federation, server, prior_in_training=True)
    prior = np.log(np.bincount(y, minlength=4) + 0.1)[None]
    expected = nll(gaussian_logits(z, anchors) + prior, y).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)

    loss, *_ = first_loss(federation, server, separation=0.5)
    gap = ((anchors[:, None] - anchors[None]) ** 2).sum(-1) / anchors.shape[1]
    expected = plain - 0.5 * np.minimum(gap, 4.0).sum() / (4 * 3)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)

    # The generator is random, but its loss is linear in its weight, and none before
    # there are statistics to draw from.
    once, *_ = first_loss(federation, server, generator=1.0)
    twice, *_ = first_loss(federation, server, generator=2.0)
    assert once > plain
    np.testing.assert_allclose(twice - plain, 2 * (once - plain), rtol=1e-3)
    fresh, *_ = first_loss(federation)
    drawn, *_ = first_loss(federation, generator=1.0)
    np.testing.assert_allclose(drawn, fresh, rtol=1e-6)


@pytest.mark.parametrize("pull_metric", ["identity", "precision"])
def test_the_pull_by_hand(federation, trained, pull_metric):
    _, state, _ = trained
    server, belief = state.server, state.server.belief
    plain, z, y, _ = first_loss(federation, server)
    loss, *_ = first_loss(federation, server, pull=2.0, pull_metric=pull_metric)
    count, mean, scatter = own_statistics(federation, server.body, 2)
    m, sigma, b = (
        np.asarray(a, np.float64) for a in (belief.mean, belief.within, belief.between)
    )
    d, freedom = sigma.shape[0], np.maximum(count - 1, 0).sum()
    target = [
        m[c] + b @ np.linalg.solve(b + sigma / n, mean[c] - m[c]) if n else m[c]
        for c, n in enumerate(count)
    ]
    cov = (4.0 * d * sigma + scatter) / (4.0 * d + freedom)
    metric = np.eye(d) if pull_metric == "identity" else np.linalg.inv(cov)
    gap = z - np.stack(target)[y]
    each = np.einsum("bd,de,be->b", gap, metric * d / np.trace(metric), gap) / (2 * d)
    np.testing.assert_allclose(loss, plain + 2.0 * each.mean(), rtol=1e-3)


def test_in_turn_the_navigator_learns_before_the_extractor_moves(federation):
    """One step each on all data: the extractor's gradient is at the new anchors."""
    options = {"pull": 0.0, "alternate": True}
    algorithm = make("pfedgm", optax.sgd(0.1), Schedule(64, 1), options)
    context, (cohort,) = federation.context(0), federation.cohorts
    rows = cohort.train.start[2], cohort.train.size[2]
    data = Data(federation.pool, cohort.order, *rows, jnp.float32(1))
    server = algorithm.init(KEY, federation)[0]
    _, message, metrics = algorithm.local(context, KEY, (), server, data)
    row = np.asarray(cohort.order)[int(rows[0]) : int(sum(rows))]
    x, y = federation.pool.x[row], federation.pool.y[row]

    def loss(body, anchors):
        z = context.model.embed({"body": body}, x)
        logits = z @ anchors.T - jnp.sum(anchors**2, -1)[None] / 2
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
        return each.mean()

    step = -0.1 * jax.grad(loss, argnums=1)(server.body, server.navigator)
    body = jax.grad(loss)(server.body, server.navigator + step)
    np.testing.assert_allclose(message[1].value, step, rtol=1e-3, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, -0.1 * b, rtol=1e-3, atol=1e-6),
        message[0].value,
        body,
    )
    assert int(metrics["steps"]) == 2


def test_a_class_new_to_the_server_has_no_prior(federation, trained):
    algorithm, state, _ = trained
    belief = state.server.belief
    count, mean, _ = own_statistics(federation, state.server.body, 2)
    (held, *_) = np.flatnonzero(count)
    forgotten = belief._replace(
        mean=belief.mean.at[held].set(0.0),
        variance=belief.variance.at[held].set(jnp.inf),
    )
    state = state._replace(server=state.server._replace(belief=forgotten))
    head = head_of(algorithm, federation, state, 2)
    np.testing.assert_allclose(head.mean[held], mean[held], rtol=1e-3, atol=1e-4)


def test_a_round_that_says_nothing_leaves_the_belief(trained):
    _, state, _ = trained
    belief = state.server.belief
    c, d = belief.mean.shape
    silent = _gaussian_head.Message(
        jnp.zeros((3, c)),
        jnp.zeros((3, c, d)),
        Mean(jnp.zeros((d, d)), jnp.float32(0)),
    )
    for process_noise in (0.0, jnp.inf):
        after = _gaussian_head.fuse_globally(
            belief, silent, "scalar", 0.01, process_noise
        )
        jax.tree.map(np.testing.assert_array_equal, after, belief)
    drifted = _gaussian_head.fuse_globally(belief, silent, "scalar", 0.01, 0.5)
    np.testing.assert_allclose(drifted.variance, belief.variance + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(drifted.mean, belief.mean)


def test_it_beats_fedavg_under_label_skew(federation):
    accuracy = {}
    for name in ("pfedgm", "fedavg"):
        algorithm, state, _ = train(name, federation)
        score = evaluate.make_evaluate(algorithm, Execution())
        test = jax.jit(score)(state, federation, KEY).test
        accuracy[name] = float(jnp.sum(test.correct) / jnp.sum(test.count))
    assert accuracy["pfedgm"] > accuracy["fedavg"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("navigator", "cubic", "navigator must be one of"),
        ("gain", "huge", "gain must be one of"),
        ("pull_metric", "city", "pull_metric must be one of"),
        ("inference", "guess", "inference must be one of"),
        ("pull", -1.0, "pull must be"),
        ("pull", float("inf"), "pull must be >= 0 and finite"),
        ("separation", float("nan"), "separation must be >= 0 and finite"),
        ("resampling", 1.5, "resampling must be"),
        ("covariance_strength", -1.0, "covariance_strength must be"),
        ("shrinkage", 2.0, "shrinkage must be"),
        ("prior_concentration", 0.0, "prior_concentration must be"),
        ("temperature", 0.0, "temperature must be"),
        ("generator", -1.0, "generator must be"),
        ("process_noise", -1.0, "process_noise must be"),
        ("process_noise", float("nan"), "process_noise must be >= 0, got nan"),
    ],
)
def test_options_out_of_range_are_named(option, value, message):
    with pytest.raises(ValueError, match=message):
        make("pfedgm", optax.sgd(0.1), Schedule(), {option: value})


def test_a_frozen_navigator_cannot_take_turns():
    options = {"alternate": True, "navigator": "frozen"}
    with pytest.raises(ValueError, match="alternate must be false"):
        make("pfedgm", optax.sgd(0.1), Schedule(), options)
