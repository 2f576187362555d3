"""FedGMM: pooled EM in NumPy, the authors' formulas, reductions and novel samples."""

from __future__ import annotations

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture

from fedgen.aggregators import gaussian, mixture
from fedgen.algorithms import _input_gaussians
from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedem import fedem
from fedgen.algorithms.fedgmm import Server, fedgmm, log_density
from fedgen.core import participation, rounds
from fedgen.core.algorithm import Mean, State, Uploads
from fedgen.core.execution import Execution
from fedgen.core.federation import Cohort, Federation, Pool, Rows
from fedgen.core.fit import Schedule
from fedgen.data import sources

START = _input_gaussians.Gaussians(
    jnp.array([[1.0, 0.0, 1.0], [-1.0, 1.0, -1.0]]),
    jnp.stack([4.0 * jnp.eye(3), 6.0 * jnp.eye(3)]),
)


def rows_of(federation, client):
    """Return `x [s, d]` and `y [s]` that a client trains on, in float64."""
    cohort = federation.cohorts[0]
    start, size = int(cohort.train.start[client]), int(cohort.train.size[client])
    rows = np.asarray(cohort.order)[start : start + size]
    pool = federation.pool
    return np.asarray(pool.x[rows], np.float64), np.asarray(pool.y[rows])


def log_joint(x, pi, mean, cov):
    """Compute `log pi_j + log N_j(x_s)`, `[s, j]`."""
    table = [
        multivariate_normal(m, c).logpdf(x) for m, c in zip(mean, cov, strict=True)
    ]
    return np.stack(table, axis=1) + np.log(pi)


def pooled_em_step(xs, pis, mean, cov):
    """Take a step of EM on the pooled samples, with shares for each client."""
    each = [
        softmax(log_joint(x, pi, mean, cov), 1) for x, pi in zip(xs, pis, strict=True)
    ]
    x, r = np.concatenate(xs), np.concatenate(each)
    count = r.sum(axis=0)
    mean = r.T @ x / count[:, None]
    gap = x[:, None] - mean
    cov = np.einsum("sj,sjd,sje->jde", r, gap, gap) / count[:, None, None]
    return np.stack([one.mean(axis=0) for one in each]), mean, cov


def official_step(xs, pis, mean, cov, eps=0.1):
    """Take the step of the authors' code, client by client."""
    parts = []
    for x, pi in zip(xs, pis, strict=True):
        r = softmax(log_joint(x, pi, mean, cov), 1)
        total = r.sum(axis=0) + eps
        own = r.T @ x / total[:, None]
        gap = x[:, None] - own
        spread = np.einsum("sj,sjd,sje->jde", r, gap, gap) / total[:, None, None]
        parts.append((r.mean(axis=0), own, spread + eps * np.eye(x.shape[1])))
    new, means, covs = map(np.stack, zip(*parts, strict=True))
    g = np.array([[len(x)] for x in xs]) * new
    g = g / g.sum(axis=0)
    return (
        new,
        np.einsum("nj,njd->jd", g, means),
        np.einsum("nj,njde->jde", g, covs),
    )


def still(**hyperparameters):
    """Build FedGMM with one predictor that does not learn."""
    return fedgmm(optax.sgd(0.0), Schedule(8), num_predictors=1, **hyperparameters)


def stepper(algorithm):
    return jax.jit(rounds.make_round(algorithm, participation.full(), Execution()))


@pytest.fixture(scope="module")
def shifted(toy_federation) -> Federation:
    """Three clients, each with other classes, hence other inputs."""
    return toy_federation((14, 21, 17), features=3)


@pytest.fixture(scope="module")
def started(shifted):
    """Return a state of two Gaussians at `START`, for one predictor."""
    server, (pi,) = still(num_gaussians=2).init(jax.random.key(0), shifted)
    server = Server(server.predictors, START, jnp.array(True))
    return State(jnp.int32(0), server, (pi,))


def values_of(state):
    pi = np.asarray(state.clients[0], np.float64)[:, :, 0]
    return pi, *(np.asarray(a, np.float64) for a in state.server.gaussians)


def test_the_reference_is_that_of_scikit_learn(shifted):
    x, _ = rows_of(shifted, 1)
    start, cov = map(np.float64, START)
    theirs = GaussianMixture(
        2,
        reg_covar=0,
        max_iter=1,
        weights_init=[0.4, 0.6],
        means_init=start,
        precisions_init=np.linalg.inv(cov),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs.fit(x)
    (pi,), mean, cov = pooled_em_step([x], [[0.4, 0.6]], start, cov)
    np.testing.assert_allclose(pi, theirs.weights_, rtol=1e-6)
    np.testing.assert_allclose(mean, theirs.means_, rtol=1e-6)
    np.testing.assert_allclose(cov, theirs.covariances_, rtol=1e-6, atol=1e-9)


def test_exact_is_em_of_the_pooled_samples(shifted, started):
    step = stepper(still(num_gaussians=2, strength=0.0, shrinkage=0.0))
    xs = [rows_of(shifted, client)[0] for client in range(3)]
    state, expected = started, values_of(started)
    likelihood = []
    for _ in range(6):
        pis, mean, cov = values_of(state)
        likelihood.append(
            sum(
                logsumexp(log_joint(x, pi, mean, cov), axis=1).sum()
                for x, pi in zip(xs, pis, strict=True)
            )
        )
        state, report = step(state, shifted, jax.random.key(1))
        expected = pooled_em_step(xs, *expected)
        chex.assert_trees_all_close(values_of(state), expected, rtol=2e-3, atol=2e-4)
    assert np.all(np.diff(likelihood) > -1e-3)
    assert likelihood[-1] > likelihood[0] + 10
    np.testing.assert_allclose(np.sum(values_of(state)[0], axis=1), 1, rtol=1e-6)
    assert 1 < float(report.metrics["server/fewest"]) < 26.0001, "of 52 samples"


def test_official_code_keeps_its_formulas(shifted, started):
    xs = [rows_of(shifted, client)[0] for client in range(3)]
    algorithm = still(num_gaussians=2, mode="official_code")
    state, _ = stepper(algorithm)(started, shifted, jax.random.key(1))
    expected = official_step(xs, *values_of(started))
    chex.assert_trees_all_close(values_of(state), expected, rtol=1e-4, atol=1e-5)
    # Without its eps, what it lacks is the scatter between clients.
    exact = pooled_em_step(xs, *values_of(started))
    lacking = official_step(xs, *values_of(started), eps=0.0)
    np.testing.assert_allclose(lacking[1], exact[1])
    assert np.all(np.linalg.eigvalsh(exact[2] - lacking[2]) > -1e-9)
    variance, whole = (np.einsum("jdd->j", one[2]) for one in (lacking, exact))
    assert np.all(variance < 0.9 * whole)


def test_official_code_starts_as_it_does(shifted):
    algorithm = fedgmm(optax.sgd(0.1), Schedule(8), mode="official_code")
    server, (pi,) = algorithm.init(jax.random.key(0), shifted)
    assert bool(server.started)
    np.testing.assert_array_equal(server.gaussians.cov, [100 * np.eye(3)] * 3)
    assert np.ptp(server.gaussians.mean, axis=0).min() > 0.01
    np.testing.assert_allclose(pi, np.full((3, 3, 3), 1 / 9), rtol=1e-6)


def uploads_of(stats, predictors):
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), predictors)
    message = (Mean(zero, jnp.float32(0.0)),), stats
    return (Uploads(jnp.arange(2), jnp.ones(2), message),)


def test_the_first_round_tells_gaussians_apart(shifted):
    algorithm = still(num_gaussians=2, strength=0.0, shrinkage=0.0)
    server, _ = algorithm.init(jax.random.key(0), shifted)
    halves = [rows_of(shifted, client)[0] for client in (0, 1)]
    x = np.concatenate(halves)
    stats = jax.tree.map(
        lambda *a: jnp.stack(a),
        *(mixture.component_statistics(h, np.full((len(h), 2), 0.5)) for h in halves),
    )
    uploads = uploads_of(stats, server.predictors)
    aggregate = jax.jit(functools.partial(algorithm.aggregate, None))
    first, _ = aggregate(jax.random.key(5), server, uploads)
    mean, cov = first.gaussians
    np.testing.assert_allclose(np.mean(mean, axis=0), x.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(cov[0], np.cov(x.T, ddof=0), rtol=1e-4, atol=1e-5)
    assert np.abs(mean[0] - mean[1]).max() > 0.1
    assert bool(first.started)
    # From then on, nothing is drawn.
    second, _ = aggregate(jax.random.key(6), first, uploads)
    np.testing.assert_allclose(second.gaussians.mean, [x.mean(axis=0)] * 2, atol=1e-5)
    # What hardly a sample is due to stays.
    rare = stats._replace(count=stats.count * jnp.array([[1.0, 0.01]]))
    uploads = uploads_of(rare, server.predictors)
    third, _ = aggregate(jax.random.key(7), first, uploads)
    np.testing.assert_allclose(third.gaussians.mean[0], x.mean(axis=0), atol=1e-5)
    np.testing.assert_array_equal(third.gaussians.mean[1], mean[1])
    np.testing.assert_array_equal(third.gaussians.cov[1], cov[1])


def test_a_floor_under_covariances():
    stats = mixture.Statistics(
        jnp.array([2.0, 6.0]),
        jnp.zeros((2, 2)),
        jnp.stack([jnp.zeros((2, 2)), jnp.diag(jnp.array([8.0, 0.0]))]),
    )
    old = _input_gaussians.Gaussians(jnp.ones((2, 2)), jnp.stack([jnp.eye(2)] * 2))
    _, cov = _input_gaussians.maximise(old, stats, 2.0, 0.5)
    # Pooled diag(1, 0); hence (0 + 2) / (2 + 2) and (8 + 2) / (6 + 2), then shrunk.
    for got, size in zip(cov, (0.5, 1.25), strict=True):
        raw = jnp.diag(jnp.array([size, 0.0]))
        np.testing.assert_allclose(got, gaussian.shrink(raw, 0.5), rtol=1e-6)


def test_one_of_each_is_fedavg(train, toy_federation):
    federation = toy_federation((7, 0, 5, 3))
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    algorithm = fedgmm(
        optimizer, schedule, num_gaussians=1, num_predictors=1, strength=0, shrinkage=0
    )
    ours = train(algorithm, federation, 2)
    theirs = train(fedavg(optimizer, schedule), federation, 2)
    only = jax.tree.map(lambda a: a[0], ours.server.predictors)
    chex.assert_trees_all_close(only, theirs.server.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.clients[0], 1.0)
    x = np.concatenate([rows_of(federation, client)[0] for client in range(4)])
    mean, cov = ours.server.gaussians
    np.testing.assert_allclose(mean[0], x.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cov[0], np.cov(x.T, ddof=0), rtol=1e-4, atol=1e-4)


def test_one_gaussian_is_fedem(train, toy_federation):
    federation = toy_federation((7, 0, 5, 3))
    optimizer, schedule = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
    algorithm = fedgmm(optimizer, schedule, num_gaussians=1, num_predictors=2)
    theirs = fedem(optimizer, schedule, num_components=2, weighting="mass")
    a, b = train(algorithm, federation, 3), train(theirs, federation, 3)
    chex.assert_trees_all_close(a.server.predictors, b.server, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.clients[0][:, 0], b.clients[0], rtol=1e-4, atol=1e-6)
    assert np.ptp(b.clients[0], axis=0).max() > 0.01, "clients differ"
    x, context = federation.pool.x[:5], federation.context(0)
    np.testing.assert_allclose(
        algorithm.predict(context, a.server, a.clients[0][0], x),
        theirs.predict(context, b.server, b.clients[0][0], x),
        rtol=1e-3,
        atol=1e-4,
    )


APART = Server(
    {"body": jnp.array([1.0, -2.0]), "head": jnp.array([1.0, 1.0])},
    _input_gaussians.Gaussians(
        jnp.array([[0.0], [1.0]]), jnp.array([[[1.0]], [[0.25]]])
    ),
    jnp.array(True),
)
PAIRS = jnp.array([[0.4, 0.1], [0.2, 0.3]])


@pytest.fixture(scope="module")
def scalars(scalar_federation):
    rng = np.random.default_rng(1)
    x = np.r_[rng.normal(size=10), rng.normal(1.0, 0.5, size=30)]
    slope = np.r_[np.ones(10), np.full(30, -2.0)]
    y = (rng.random(40) < 1 / (1 + np.exp(-slope * x))).astype(int)
    return scalar_federation([x], [y], w=0.0, v=1.0)


@pytest.mark.parametrize("mode", ["exact", "official_code"])
def test_prediction_by_hand(scalars, mode):
    algorithm = fedgmm(
        optax.sgd(0.1), Schedule(16), num_gaussians=2, num_predictors=2, mode=mode
    )
    x = np.array([[0.3], [2.0]])
    predict = jax.jit(functools.partial(algorithm.predict, scalars.context(0)))
    logits = predict(APART, PAIRS, jnp.asarray(x, jnp.float32))
    inputs = log_joint(x, np.ones(2), *map(np.float64, APART.gaussians))
    pi = np.float64(PAIRS)
    joint = np.exp(inputs)[:, :, None] * (pi if mode == "exact" else np.exp(pi))
    weight = joint.sum(axis=1) / joint.sum(axis=(1, 2))[:, None]
    p = 1 / (1 + np.exp(-x * [1.0, -2.0]))
    expected = (weight * p).sum(axis=1)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1], expected, rtol=1e-5)


def test_unseen_clients_fit_pairs_only(scalars, client_data):
    algorithm = fedgmm(
        optax.sgd(0.1), Schedule(16), num_gaussians=2, num_predictors=2, adapt_steps=200
    )
    personalise = jax.jit(functools.partial(algorithm.personalise, scalars.context(0)))
    uniform, data = jnp.full((2, 2), 0.25), client_data(scalars, 0)
    fitted = personalise(jax.random.key(0), uniform, APART, data)
    x, y = rows_of(scalars, 0)
    inputs = log_joint(x, np.ones(2), *map(np.float64, APART.gaussians))
    sign = np.where(y == 1, -1, 1)[:, None]
    labels = -np.logaddexp(0, sign * x * [1.0, -2.0])
    table = (inputs[:, :, None] + labels[:, None]).reshape(40, 4)

    def likelihood(pairs):
        return logsumexp(table + np.log(np.ravel(pairs)), axis=1).mean()

    best = mixture.fit_proportions(jnp.asarray(table), jnp.ones(40, bool))
    np.testing.assert_allclose(np.sum(fitted), 1, rtol=1e-5)
    assert likelihood(fitted) > likelihood(np.maximum(best, 1e-12)) - 1e-3
    assert likelihood(fitted) > likelihood(np.full(4, 0.25)) + 0.01


def test_projection():
    embed = _input_gaussians.random_projection(5)
    directions = np.asarray(embed(jnp.eye(12).reshape(12, 3, 4)))
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-6)
    again = _input_gaussians.random_projection(5)(jnp.eye(12))
    np.testing.assert_array_equal(again, directions)
    few = jnp.arange(8.0).reshape(2, 2, 2)
    np.testing.assert_array_equal(embed(few), few.reshape(2, 4))


def test_an_embedding_of_ones_own(shifted):
    algorithm = fedgmm(optax.sgd(0.1), Schedule(8), embedding=lambda x: x[:, :2])
    server, _ = algorithm.init(jax.random.key(0), shifted)
    assert server.gaussians.mean.shape == (3, 2)


def test_a_class_that_nobody_trained_on_is_novel(toy_model):
    source = sources.load(sources.EMBEDDED)
    x = np.asarray(source.x, np.float32).reshape(len(source.x), -1) / 255
    y, rng = np.asarray(source.y), np.random.default_rng(0)
    # T-shirts, trousers and pullovers at five clients; ankle boots nowhere.
    known = rng.permutation(np.flatnonzero(y <= 2))[:1050]
    novel = rng.permutation(np.flatnonzero(y == 9))[:300]
    start = jnp.arange(5, dtype=jnp.int32) * 150
    rows = Rows(start, jnp.full(5, 150, jnp.int32))
    cohort = Cohort(
        toy_model(features=784, num_classes=10),
        jnp.arange(5, dtype=jnp.int32),
        jnp.asarray(known, jnp.int32),
        *(rows, rows, rows),
        num_real=5,
    )
    pool = Pool(jnp.asarray(x), jnp.asarray(y, jnp.int32))
    federation = Federation(pool, (cohort,), 10)
    algorithm = still(num_gaussians=3, dim=16)
    state = rounds.init_state(algorithm, federation, jax.random.key(0))
    step = stepper(algorithm)
    for _ in range(15):
        state, _ = step(state, federation, jax.random.key(1))

    embed = _input_gaussians.random_projection(16)
    inside, outside = (
        np.asarray(
            log_density(state.server.gaussians, state.clients[0][0], embed(x[rows]))
        )
        for rows in (known[750:], novel)
    )
    label = np.repeat([1, 0], [300, 300])
    assert roc_auc_score(label, np.r_[inside, outside]) > 0.95
    # Of no use on samples like those of training: the standard error is 0.033.
    assert 0.4 < roc_auc_score(label[150:450], inside) < 0.6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "em"),
        ("num_gaussians", 0),
        ("num_predictors", 0),
        ("dim", 0),
        ("strength", -1.0),
        ("shrinkage", 1.5),
        ("adapt_steps", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        fedgmm(optax.sgd(0.1), Schedule(4), **{name: value})
