"""pFedFDA: its head against scikit-learn, its shares against enumeration."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedgen.algorithms import _statistics
from fedgen.algorithms.pfedfda import Gaussians, Server, pfedfda
from fedgen.core.federation import Model
from fedgen.core.fit import Schedule

OPTIMIZER = optax.sgd(0.1)
CLASSES, DIM = 3, 2


@pytest.fixture(scope="module")
def problem(scalar_federation, client_data):
    """Return the context and the data of a client whose features are its inputs."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, CLASSES, 61).astype(np.int32)
    centres = np.asarray([[0.0, 0.0], [2.0, 1.0], [-1.0, 2.0]])
    x = centres[y] + rng.normal(size=(61, DIM)) @ np.asarray([[1.0, 0.6], [0.0, 0.7]])
    federation = scalar_federation([x[:, 0]], [y], w=1.0, v=1.0)
    identity = Model(
        "identity", lambda key: {"body": (), "head": ()}, _same, _same, DIM
    )
    data = client_data(federation, 0)
    data = data._replace(pool=data.pool._replace(x=jnp.asarray(x, jnp.float32)))
    context = federation.context(0)._replace(model=identity, num_classes=CLASSES)
    return context, data, x, y


def _same(params, x):
    del params
    return x


def _server(mean, cov):
    gaussians = Gaussians(jnp.asarray(mean, jnp.float32), jnp.asarray(cov, jnp.float32))
    return Server((), gaussians, jnp.ones(CLASSES))


def build(**options):
    """Build pFedFDA with the covariance as it is."""
    return pfedfda(OPTIMIZER, Schedule(8), covariance_quirk=False, **options)


def _shares(algorithm, context, server, data):
    _, _, metrics = algorithm.more[0].local(
        context, jax.random.key(0), (), server, data
    )
    return float(metrics["beta_mean"]), float(metrics["beta_cov"])


def _logits(algorithm, context, server, data, x):
    head = algorithm.personalise(context, jax.random.key(0), (), server, data)
    return algorithm.predict(context, server, head, jnp.asarray(x, jnp.float32))


def test_a_misleading_global_gives_the_local_discriminant(problem):
    context, data, x, y = problem
    server = _server(np.full((CLASSES, DIM), 40.0), 1e4 * np.eye(DIM))
    algorithm = build(shrinkage=1e-7, prior_floor=1e-7)
    assert _shares(algorithm, context, server, data) == (1.0, 1.0)
    # scikit-learn divides the scatter by n, the authors' code by n - 1.
    lda = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(x, y)
    n = len(y)
    scale = lda.covariance_ * n / (n - 1)
    kernel = np.linalg.solve(scale, lda.means_.T)
    bias = np.log(lda.priors_) - np.sum(lda.means_ * kernel.T, 1) / 2
    got = _logits(algorithm, context, server, data, x)
    np.testing.assert_allclose(got, x @ kernel + bias, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(  # up to that factor and a constant per row
        jax.nn.softmax(got), lda.predict_proba(x), atol=0.02
    )


def test_a_perfect_global_and_little_data_give_the_global_discriminant(problem):
    context, data, x, _ = problem
    data = data._replace(size=jnp.int32(1))  # one sample: nothing to validate on
    mean, cov = np.asarray([[0.0, 0.0], [2.0, 1.0], [-1.0, 2.0]]), 0.5 * np.eye(DIM)
    server = _server(mean, cov)
    algorithm = build(shrinkage=1e-7, prior_floor=0.1)
    assert _shares(algorithm, context, server, data) == (0.0, 0.0)
    label = int(data.take(jnp.arange(1), jnp.arange(1) < 1).y[0])
    prior = (np.arange(CLASSES) == label) + 0.1
    kernel = np.linalg.solve(cov, mean.T)
    bias = np.log(prior / prior.sum()) - np.sum(mean * kernel.T, 1) / 2
    got = _logits(algorithm, context, server, data, x)
    np.testing.assert_allclose(got, x @ kernel + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("single", [False, True])
def test_shares_minimise_the_cross_validated_loss(problem, single):
    context, data, x, y = problem
    data, x, y = data._replace(size=jnp.int32(40)), x[:40], y[:40]
    mean = np.asarray([[0.0, 0.5], [2.5, 1.0], [-1.0, 2.5]])
    cov = np.asarray([[2.0, 0.5], [0.5, 1.0]])
    ticks, best = np.linspace(0, 1, 6), (np.inf, None)
    rank = np.asarray([np.sum(y[:i] == y[i]) for i in range(len(y))])
    prior = np.bincount(y, minlength=CLASSES) / len(y) + 1e-4
    for bm in ticks:
        for bc in [bm] if single else ticks:
            loss = 0.0
            for fold in (0, 1):
                a, b = x[rank % 2 == fold], y[rank % 2 == fold]
                own = np.stack([a[b == c].mean(0) for c in range(CLASSES)])
                centred = a - own[b]
                m = bm * own + (1 - bm) * mean
                s = bc * centred.T @ centred / (len(a) - 1) + (1 - bc) * cov
                kernel = np.linalg.solve(s, m.T)
                bias = np.log(prior / prior.sum()) - np.sum(m * kernel.T, 1) / 2
                z, label = x[rank % 2 != fold], y[rank % 2 != fold]
                logits = z @ kernel + bias
                top = logits.max(1, keepdims=True)
                lse = top[:, 0] + np.log(np.exp(logits - top).sum(1))
                loss += np.sum(lse - logits[np.arange(len(label)), label])
            if loss < best[0]:
                best = (loss, (bm, bc))
    algorithm = build(shrinkage=1e-6, single_beta=single)
    got = _shares(algorithm, context, _server(mean, cov), data)
    assert 0 < best[1][0] < 1  # else the test could not tell
    np.testing.assert_allclose(got, best[1], atol=1e-6)


LARGE = """
import jax, optax
import jax.numpy as jnp
from fedgen.algorithms.pfedfda import Gaussians, Server, pfedfda
from fedgen.core.federation import Context, Data, Model, Pool
from fedgen.core.fit import Schedule

def same(params, x):
    return x

d = 200
model = Model("identity", lambda key: {"body": (), "head": ()}, same, same, d)
pool = Pool(jax.random.normal(jax.random.key(0), (61, d)), jnp.arange(61) % 3)
data = Data(pool, jnp.arange(61), jnp.int32(0), jnp.int32(61), jnp.float32(1))
server = Server((), Gaussians(jnp.zeros((3, d)), jnp.eye(d)), ())
algorithm = pfedfda(optax.sgd(0.1), Schedule(8))

@jax.jit
def personalise(key):
    return algorithm.personalise(Context(model, 3), key, (), server, data)

for i in range(5):
    jax.block_until_ready(personalise(jax.random.key(i)))
"""


def test_large_heads_do_not_wait_for_each_other():
    # In a process, or what waits for ever would take this one with it.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "2"}
    subprocess.run([sys.executable, "-c", LARGE], env=env, check=True, timeout=120)


def test_quirk_adds_the_identity(problem):
    context, data, _, _ = problem
    server = _server(np.full((CLASSES, DIM), 40.0), 1e6 * np.eye(DIM))
    covs = []
    for quirk in (False, True):
        algorithm = pfedfda(OPTIMIZER, Schedule(8), covariance_quirk=quirk)
        _, (_, cov), metrics = algorithm.more[0].local(
            context, jax.random.key(0), (), server, data
        )
        assert metrics["beta_cov"] == 1.0
        covs.append(cov.value)
    np.testing.assert_allclose(covs[1] - covs[0], np.eye(DIM) + 1e-4, atol=1e-5)


def test_halves_are_stratified_and_complete(problem):
    context, data, _, y = problem
    first, second = _statistics.measure_folds(context, {}, data, 8)
    whole = _statistics.measure(context, {}, data, 8)
    np.testing.assert_array_equal(first.count + second.count, whole.count)
    assert np.all((first.count - second.count) == np.bincount(y) % 2)


def test_round_by_hand(train, scalar_federation):
    # Under w the features are w x; both shares come out as 0 where fewer than two
    # samples leave nothing to validate on, so clients send the global Gaussians
    # back, and the class means that nobody holds stay as they are.
    federation = scalar_federation([[2.0], [1.0]], [[1], [1]], w=0.5, v=1.0)
    algorithm = pfedfda(optax.sgd(1.0), Schedule(4), covariance_quirk=False)
    old = algorithm.init(jax.random.key(0), federation)[0]
    new = train(algorithm, federation).server
    np.testing.assert_allclose(new.gaussians.mean, old.gaussians.mean, rtol=1e-6)
    np.testing.assert_allclose(new.gaussians.cov, [[1.0]], rtol=1e-6)
    np.testing.assert_allclose(new.count, [0.0, 2.0])
    # The frozen head is W_c = m_c (covariance 1) with the prior's log odds of class 1,
    # log(1.0001 / 0.0001): dw = (p - 1) (m_1 - m_0) x.
    m = np.asarray(old.gaussians.mean[:, 0], np.float64)
    step = []
    for x in (2.0, 1.0):
        odds = np.log(1.0001 / 1e-4) - (m[1] ** 2 - m[0] ** 2) / 2
        p = 1 / (1 + np.exp(-(0.5 * x * (m[1] - m[0]) + odds)))
        step.append(-(p - 1) * (m[1] - m[0]) * x)
    np.testing.assert_allclose(new.body - 0.5, np.mean(step), rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("shrinkage", 0.0), ("shrinkage", 2.0), ("prior_floor", 0.0), ("grid", 1)],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        pfedfda(OPTIMIZER, Schedule(8), **{name: value})
