"""Mixtures against scikit-learn, SciPy, closed forms and limits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from sklearn.mixture import GaussianMixture

from fedgen.aggregators import mixture

responsibilities = jax.jit(mixture.responsibilities)
log_evidence = jax.jit(mixture.log_evidence)
log_likelihood = jax.jit(mixture.log_likelihood)
log_posterior = jax.jit(mixture.log_posterior)
fit_proportions = jax.jit(mixture.fit_proportions)
component_statistics = jax.jit(mixture.component_statistics)
stacked_statistics = jax.jit(jax.vmap(mixture.component_statistics))
merge = jax.jit(mixture.merge, static_argnames="between")
maximise = jax.jit(mixture.maximise, static_argnames="form")
gaussian_log_density = jax.jit(mixture.gaussian_log_density)
balanced = jax.jit(mixture.balanced_responsibilities, static_argnames="balance")
farthest_first = jax.jit(mixture.farthest_first, static_argnums=1)
assign = jax.jit(mixture.assign)
estimate = jax.jit(mixture.estimate_num_components)
importance_bound = jax.jit(mixture.importance_bound)

ALL = np.ones(40, bool)
INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


def close(actual, desired, tolerance=1e-10):
    np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)


def gaussians(seed=0, k=3, d=2):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(k, d, d))
    cov = a @ a.transpose(0, 2, 1) / d + 0.3 * np.eye(d)
    return 1.5 * rng.normal(size=(k, d)), cov, rng.dirichlet(np.ones(k))


def data(seed=0, s=40, k=3, d=2):
    """Draw samples, their table of log densities and the proportions behind it."""
    mean, cov, proportions = gaussians(seed, k, d)
    rng = np.random.default_rng(seed)
    z = rng.choice(k, s, p=proportions)
    noise = np.einsum("sde,se->sd", np.linalg.cholesky(cov)[z], rng.normal(size=(s, d)))
    x = mean[z] + noise
    return x, reference_density(x, mean, cov), proportions


def reference_density(x, mean, cov):
    columns = [
        scipy.stats.multivariate_normal(m, c).logpdf(x)
        for m, c in zip(mean, cov, strict=True)
    ]
    return np.stack(columns, axis=1)


def reference_em(table, steps, concentration=1.0):
    """Run EM in a loop; yield the proportions of every step."""
    s, k = table.shape
    proportions = np.full(k, 1 / k)
    for _ in range(steps):
        joint = np.exp(table) * proportions
        r = joint / joint.sum(axis=1, keepdims=True)
        excess = concentration - 1
        proportions = (r.sum(axis=0) + excess) / (s + k * excess)
        yield proportions


# Responsibilities and the likelihood.


def sklearn_mixture(mean, cov, weights):
    model = GaussianMixture(len(mean), reg_covar=0.0)
    model.means_, model.covariances_, model.weights_ = mean, cov, weights
    model.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(cov))
    return model


def test_densities_and_responsibilities_of_scikit_learn():
    mean, cov, proportions = gaussians()
    x, table, _ = data()
    model = sklearn_mixture(mean, cov, proportions)
    density = gaussian_log_density(x, mean, cov)
    close(density, table)
    close(responsibilities(density, proportions, ALL), model.predict_proba(x))
    close(log_evidence(density, proportions, ALL), model.score_samples(x))
    close(log_likelihood(density, proportions, ALL), 40 * model.score(x))


def test_badly_conditioned_covariance():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    cov = q @ np.diag([1e-6, 1e-3, 1, 1e3]) @ q.T
    x = np.random.default_rng(1).multivariate_normal(np.zeros(4), cov, size=5)
    logdet = np.log([1e-6, 1e-3, 1, 1e3]).sum() + 4 * np.log(2 * np.pi)
    white = (x @ q) ** 2 / np.array([1e-6, 1e-3, 1, 1e3])
    density = gaussian_log_density(x, np.zeros([1, 4]), cov[None])
    close(density[:, 0], -(white.sum(1) + logdet) / 2, 1e-5)


TABLES = hnp.arrays(
    np.float64, (6, 3), elements=st.floats(-1e4, 1e3) | st.just(-np.inf)
)


@settings(max_examples=60, deadline=None)
@given(
    table=TABLES,
    proportions=hnp.arrays(np.float64, 3, elements=st.floats(0, 1)),
    mask=hnp.arrays(bool, 6),
    shift=st.floats(-1e3, 1e3),
)
def test_properties(table, proportions, mask, shift):
    proportions = proportions + np.array([1e-3, 0, 0])
    r = responsibilities(table, proportions, mask)
    assert np.isfinite(r).all() and (np.asarray(r) >= 0).all()
    close(np.sum(r, axis=1), mask)
    close(responsibilities(table + shift, proportions, mask), r, 1e-6)
    order = np.array([2, 0, 1])
    close(responsibilities(table[:, order], proportions[order], mask), r[:, order])
    fitted = fit_proportions(table, mask)
    assert (np.asarray(fitted) >= 0).all()
    close(np.sum(fitted), 1)
    close(fit_proportions(table[:, order], mask), fitted[order], 1e-8)


def test_a_sample_that_nothing_explains_tells_nothing():
    table = np.array([[-INF, -INF], [-INF, 0.0], [0.0, 0.0]])
    mask, proportions = np.ones(3, bool), np.array([0.3, 0.7])
    r = mixture.responsibilities(table, proportions, mask)
    close(r, [[0.3, 0.7], [0, 1], [0.3, 0.7]])
    # Only a component of proportion 0 explains the second sample.
    close(mixture.responsibilities(table, np.array([1.0, 0]), mask), [[1, 0]] * 3)
    two = np.array([[-INF, -INF, 0.0]])
    close(
        mixture.responsibilities(two, np.array([0.2, 0.6, 0]), mask[:1]),
        [[0.25, 0.75, 0]],
    )
    assert -2e30 < mixture.log_likelihood(table, proportions, mask) < -0.5e30
    informative = np.concatenate([data()[1], np.full([1, 3], -INF)])
    with_it = mixture.fit_proportions(informative, np.ones(41, bool), tolerance=1e-12)
    close(with_it, fit_proportions(data()[1], ALL, tolerance=1e-12), 1e-6)


def test_low_densities_do_not_drown_the_proportions():
    table = np.full([1, 2], -1e4, np.float32)
    r = responsibilities(table, np.array([0.3, 0.7], np.float32), ALL[:1])
    close(r, [[0.3, 0.7]], 1e-6)


# Proportions.


@pytest.mark.parametrize("concentration", [1.0, 2.5])
def test_em_steps_are_the_textbook_ones_and_monotone(concentration):
    _, table, _ = data()
    before = -INF
    for step, expected in enumerate(reference_em(table, 6, concentration), 1):
        actual = fit_proportions(
            table, ALL, concentration=concentration, tolerance=0, max_steps=step
        )
        close(actual, expected)
        value = log_posterior(table, actual, ALL, concentration=concentration)
        assert value > before
        before = value


@pytest.mark.parametrize("concentration", [1.0, 3.0])
def test_fit_is_the_maximum(concentration):
    _, table, _ = data(1)
    kwargs = {"concentration": concentration}
    fitted = fit_proportions(table, ALL, tolerance=1e-13, max_steps=20_000, **kwargs)

    def loss(logits):
        p = scipy.special.softmax(logits)
        evidence = scipy.special.logsumexp(table + np.log(p), axis=1).sum()
        return -evidence - (concentration - 1) * np.log(p).sum()

    best = scipy.optimize.minimize(loss, np.zeros(3), tol=1e-12)
    value = log_posterior(table, fitted, ALL, **kwargs)
    close(value, -best.fun, 1e-8)
    # The tolerance bounds what is missing, in nats per sample and pseudo-sample.
    for tolerance in (1e-2, 1e-4):
        rough = fit_proportions(table, ALL, tolerance=tolerance, **kwargs)
        missing = value - log_posterior(table, rough, ALL, **kwargs)
        assert 0 <= missing <= tolerance * (40 + 3 * (concentration - 1))
        assert missing > 1e-10


@settings(max_examples=30, deadline=None)
@given(
    p=hnp.arrays(np.float64, (2, 3), elements=st.floats(0.01, 1)),
    t=st.floats(0, 1),
)
def test_the_objective_is_concave(p, t):
    _, table, _ = data()

    def value(q):
        return log_posterior(table, q, ALL, concentration=1.5)

    chord = t * value(p[0]) + (1 - t) * value(p[1])
    assert value(t * p[0] + (1 - t) * p[1]) >= chord - 1e-9


def test_limits_of_proportions():
    close(fit_proportions(np.full([40, 3], -700.0), ALL), np.full(3, 1 / 3))
    close(fit_proportions(np.zeros([40, 1]), ALL), [1])
    label = np.repeat(np.arange(3), [5, 10, 25])
    apart = np.where(np.eye(3, dtype=bool)[label], 0, -900.0)
    close(fit_proportions(apart, ALL), [0.125, 0.25, 0.625])
    close(
        fit_proportions(apart, ALL, concentration=5.0),
        (np.array([5, 10, 25]) + 4) / 52,
    )
    close(fit_proportions(apart, ALL, concentration=INF), np.full(3, 1 / 3))
    never = np.concatenate([apart, np.full([40, 1], -INF)], axis=1)
    close(fit_proportions(never, ALL), [0.125, 0.25, 0.625, 0])


def test_recovers_known_proportions():
    _, table, _ = data(3, s=4000)
    mean, cov, proportions = gaussians(3)
    fitted = fit_proportions(table, np.ones(4000, bool))
    score = np.exp(
        table - np.asarray(log_evidence(table, proportions, np.ones(4000)))[:, None]
    )
    fisher = (score[:, :-1] - score[:, -1:]).T @ (score[:, :-1] - score[:, -1:])
    error = (np.asarray(fitted) - proportions)[:-1]
    # Chi-squared with 2 degrees of freedom: 13.8 is its 0.999 quantile.
    assert error @ fisher @ error < 13.8


def test_padding_never_leaks():
    x, table, proportions = data()
    mask = ALL & (np.arange(40) % 3 > 0)
    dirty = np.where(mask[:, None], table, NAN)
    for f in (
        lambda t, m: mixture.fit_proportions(t, m),
        lambda t, m: mixture.log_likelihood(t, proportions, m),
    ):
        close(f(dirty, mask), f(table[mask], ALL[mask]))
    r = mixture.responsibilities(dirty, proportions, mask)
    close(r[mask], responsibilities(table[mask], proportions, ALL[mask]))
    assert not np.asarray(r)[~mask].any()
    dirty_x = np.where(mask[:, None], x, NAN)
    mean, cov, _ = gaussians()
    density = functools.partial(mixture.gaussian_log_density, mask=mask)
    close(density(dirty_x, mean, cov)[mask], table[mask])
    stats = mixture.component_statistics(dirty_x, r)
    jax.tree.map(close, stats, component_statistics(x[mask], r[mask]))

    def loss(x, mean, cov):
        return mixture.log_likelihood(density(x, mean, cov), proportions, mask)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(dirty_x, mean, cov)
    assert all(np.isfinite(g).all() for g in grads)


def test_gradients():
    _, table, proportions = data(s=5)
    mask = ALL[:5]
    check_grads(
        lambda t, p: mixture.responsibilities(t, p, mask), (table, proportions), 1
    )
    check_grads(lambda t, p: mixture.log_evidence(t, p, mask), (table, proportions), 1)
    edge = np.array([[-INF, -INF, -INF], [0, -INF, NAN], [INF, 1, 0], [0, 0, 0]])
    for f in (mixture.responsibilities, mixture.log_evidence):
        grad = jax.jit(
            jax.grad(lambda t, p, f=f: jnp.sum(f(t, p, mask[:4]) ** 2), argnums=(0, 1))
        )(edge, np.array([0.0, 0.5, 0.5]))
        assert all(np.isfinite(g).all() for g in grad)

    # The envelope theorem: constant proportions give the derivative of the maximum.
    def best(t):
        fitted = mixture.fit_proportions(t, mask, tolerance=1e-13, max_steps=5000)
        return mixture.log_likelihood(t, fitted, mask)

    check_grads(best, (table,), 1, modes="rev", atol=1e-5, rtol=1e-5)


def test_vmap_is_a_loop_and_float32_is_close():
    tables = np.stack([data(seed)[1] for seed in range(4)])
    mask = np.arange(40)[None] < np.array([40, 17, 3, 25])[:, None]
    many = jax.jit(jax.vmap(mixture.fit_proportions))
    stacked = many(tables, mask)
    for one, table, m in zip(stacked, tables, mask, strict=True):
        close(one, fit_proportions(table, m))
    single = many(tables.astype(np.float32), mask)
    assert single.dtype == np.float32
    close(single, stacked, 1e-3)
    r = responsibilities(tables[0].astype(np.float32), single[0], mask[0])
    assert r.dtype == np.float32
    close(r, responsibilities(tables[0], stacked[0], mask[0]), 1e-3)


# The M-step.


@pytest.mark.parametrize(
    ("form", "theirs"),
    [("full", "full"), ("tied", "tied"), ("diagonal", "diag"), ("scalar", "spherical")],
)
def test_one_em_step_of_scikit_learn(form, theirs):
    mean, cov, proportions = gaussians()
    x, table, _ = data()
    r = responsibilities(table, proportions, ALL)
    model = GaussianMixture(3, covariance_type=theirs, reg_covar=0.0)
    model._initialize(x, np.asarray(r))
    means, covs, weights = maximise(component_statistics(x, r), form=form)
    close(means, model.means_)
    close(weights, model.weights_)
    expected = {
        "full": lambda c: c,
        "tied": lambda c: np.broadcast_to(c, (3, 2, 2)),
        "diag": lambda c: c[:, None] * np.eye(2),
        "spherical": lambda c: c[:, None, None] * np.eye(2),
    }
    close(covs, expected[theirs](model.covariances_))


def test_merging_is_pooling():
    x, table, proportions = data(s=60)
    x = x + 1e4  # the scatter must not cancel
    r = np.array(responsibilities(table, proportions, np.ones(60, bool)))
    r[:20, 2] = 0  # the first client has nothing of a component
    parts = stacked_statistics(x.reshape(3, 20, 2), r.reshape(3, 20, 3))
    pooled = component_statistics(x, r)
    absent = parts._replace(mean=parts.mean.at[0, 2].set(NAN))
    jax.tree.map(close, merge(absent), pooled)
    one = merge(jax.tree.map(lambda a: a[:2], parts))
    rest = jax.tree.map(lambda a, b: jnp.stack([a, b[2]]), one, parts)
    jax.tree.map(close, merge(rest), pooled)
    for k in range(3):
        close(
            pooled.scatter[k] / pooled.count[k],
            np.cov(x.T, aweights=r[:, k], ddof=0),
            1e-8,
        )
    # The published code averages covariances.
    average = merge(parts, between=False)
    close(average.mean, pooled.mean)
    close(average.scatter, np.sum(parts.scatter, axis=0))
    lost = np.trace(pooled.scatter - average.scatter, axis1=1, axis2=2)
    assert (lost > 1e-3).all()


def test_maximise_raises_the_likelihood_and_borrows():
    x, table, proportions = data()
    mean, cov, _ = gaussians()
    before = log_likelihood(table, proportions, ALL)
    for _ in range(5):
        r = responsibilities(gaussian_log_density(x, mean, cov), proportions, ALL)
        stats = component_statistics(x, r)
        mean, cov, proportions = maximise(stats)
        after = log_likelihood(gaussian_log_density(x, mean, cov), proportions, ALL)
        assert after > before
        before = after
    pooled = np.sum(stats.scatter, axis=0)[None] / 40
    _, shrunk, _ = maximise(stats, strength=7.0)
    n = np.asarray(stats.count)[:, None, None]
    close(shrunk, (n * np.asarray(cov) + 7 * pooled) / (n + 7))
    close(maximise(stats, strength=1e12)[1], np.broadcast_to(pooled, (3, 2, 2)), 1e-8)


def test_samples_have_the_moments_of_the_mixture():
    mean, cov, proportions = gaussians()
    draw = jax.jit(mixture.sample, static_argnums=4)
    x, component = draw(jax.random.key(0), mean, cov, proportions, 60_000)
    close(np.bincount(component, minlength=3) / 60_000, proportions, 0.01)
    for k in range(3):
        own = np.asarray(x)[np.asarray(component) == k]
        close(own.mean(0), mean[k], 0.05)
        close(np.cov(own.T), cov[k], 0.08)


# VAEs.


def test_decoder_densities():
    rng = np.random.default_rng(0)
    x, logits = rng.uniform(size=(2, 5, 4))
    logits = 20 * logits - 10
    p = 1 / (1 + np.exp(-logits))
    expected = (x * np.log(p) + (1 - x) * np.log1p(-p)).sum(-1)
    close(mixture.bernoulli_log_prob(x, logits), expected)
    assert np.isfinite(mixture.bernoulli_log_prob(np.ones([2]), np.array([-1e4, 1e4])))
    check_grads(mixture.bernoulli_log_prob, (x[0], np.array([0.0, -0.02, 9, -9])), 1)
    for a in (-30.0, -0.0201, -0.0199, 1e-9, 0.0, 0.3, 8.0):

        def density(x, a=a):
            arrays = jnp.array([x]), jnp.array([a])
            return np.exp(mixture.continuous_bernoulli_log_prob(*arrays))

        close(scipy.integrate.quad(density, 0, 1)[0], 1, 1e-8)
    check_grads(
        mixture.continuous_bernoulli_log_prob,
        (x[0], np.array([0.0, 0.019, 0.021, 9])),
        1,
    )
    normal = scipy.stats.norm(logits, np.exp(0.35)).logpdf(x).sum(-1)
    close(mixture.normal_log_prob(x, logits, 0.7), normal)
    close(mixture.normal_log_prob(x, logits, np.full_like(x, 0.7)), normal)


def test_divergence_from_the_prior():
    mean, log_variance = np.random.default_rng(0).normal(size=(2, 3))
    z = np.random.default_rng(1).normal(size=(200_000, 3))
    z = mean + np.exp(log_variance / 2) * z
    ratio = scipy.stats.norm(mean, np.exp(log_variance / 2)).logpdf(z)
    ratio = (ratio - scipy.stats.norm.logpdf(z)).sum(1).mean()
    close(mixture.kl_to_standard_normal(mean, log_variance), ratio, 0.02)
    close(mixture.kl_to_standard_normal(np.zeros(2), np.full(2, 1e-9)), 5e-19, 1e-21)


def linear_vae(scale=1.0, shift=0.0):
    """Build a linear Gaussian VAE; with 1 and 0 its encoder is the exact posterior."""
    rng = np.random.default_rng(0)
    w, _ = np.linalg.qr(rng.normal(size=(3, 2)))
    w = w * np.array([2.0, 0.5])  # orthogonal columns: a diagonal posterior
    noise = 0.3
    precision = 1 + (w**2).sum(0) / noise

    def encode(x):
        mean = x @ w / noise / precision[None] + shift
        return mean, jnp.broadcast_to(jnp.log(scale / precision)[None], mean.shape)

    def log_prob(x, z):
        return mixture.normal_log_prob(x, z @ w.T, np.log(noise))

    x = rng.normal(size=(7, 3))
    evidence = scipy.stats.multivariate_normal(
        np.zeros(3), w @ w.T + noise * np.eye(3)
    ).logpdf(x)
    return x, encode, log_prob, evidence


def test_bounds_of_a_linear_vae():
    key = jax.random.key(0)
    x, encode, log_prob, evidence = linear_vae()
    close(mixture.vae_log_density(key, x, encode, log_prob, num_samples=2), evidence)
    x, encode, log_prob, evidence = linear_vae(scale=2.0, shift=0.1)
    bounds = [
        mixture.vae_log_density(
            key, x, encode, log_prob, num_samples=count, bound=bound
        )
        for count, bound in ((4000, "elbo"), (20_000, "importance"))
    ]
    close(bounds[1], evidence, 0.03)
    # The gap of the ELBO is the divergence of the posterior.
    mean, log_variance = encode(x)
    exact_mean, exact = linear_vae()[1](x)
    gap = np.exp(log_variance - exact) + (mean - exact_mean) ** 2 / np.exp(exact)
    gap = (gap - 1 - log_variance + exact).sum(1) / 2
    close(evidence - bounds[0], gap, 0.15)


def test_importance_bound_rises_from_the_mean_to_the_maximum():
    w = np.random.default_rng(0).normal(size=(6, 5, 2)) * 300
    bound = importance_bound(w)
    close(bound, scipy.special.logsumexp(w, axis=0) - np.log(6))
    assert (np.asarray(bound) >= w.mean(0)).all()
    close(importance_bound(w[:1]), w[0])
    close(importance_bound(np.full([3, 1], -2.5)), [-2.5])
    close(mixture.elbo(w, np.full([5, 2], 3.0)), w.mean(0) - 3)
    some = np.array([[-INF], [0.0]])
    close(mixture.importance_bound(some), [-np.log(2)])


# Starts.


def clients(seed=0, n=6, s=50, k=3, scale=30.0):
    """Draw clients' tables of which one component is ahead everywhere."""
    rng = np.random.default_rng(seed)
    proportions = rng.dirichlet(np.ones(k), size=n)
    z = np.stack([rng.choice(k, s, p=p) for p in proportions])
    table = scale * (np.eye(k)[z] + 0.3 * rng.normal(size=(n, s, k)))
    table = table - 1000 + scale * np.array([3.0, 0, 0])
    return table, proportions, np.arange(s)[None] < rng.integers(20, s + 1, n)[:, None]


# In float32 the sharpest problem is close to a linear programme: whole samples move.
@pytest.mark.parametrize(
    ("temperature", "scale", "rough"), [(1, 3, 1e-3), (1, 300, 0.02), (30, 300, 1e-3)]
)
def test_masses_are_balanced(temperature, scale, rough):
    table, proportions, mask = clients(scale=scale)
    dirty = np.where(mask[..., None], table, NAN)
    r, offset = mixture.balanced_responsibilities(
        dirty, proportions, mask, temperature=temperature, tolerance=1e-6
    )
    close(np.sum(r, axis=(0, 1)), np.full(3, mask.sum() / 3), 2e-6)
    close(np.sum(r, axis=2), mask)
    close(np.sum(offset), 0, 1e-9)
    shifted = np.log(proportions)[:, None] + table - np.asarray(offset)
    expected = scipy.special.softmax(shifted / temperature, axis=-1)
    close(r, np.where(mask[..., None], expected, 0), 1e-8)
    single, _ = balanced(
        table.astype(np.float32),
        proportions.astype(np.float32),
        mask,
        temperature=float(temperature),
    )
    close(np.sum(single, axis=(0, 1)), np.full(3, mask.sum() / 3), rough)


def test_limits_of_annealing():
    table, proportions, mask = clients(scale=3.0)
    r, offset = balanced(table, proportions, mask, balance=False)
    close(r, jax.vmap(mixture.responsibilities)(table, proportions, mask))
    assert not np.asarray(offset).any()
    for balance in (True, False):
        r, _ = balanced(table, proportions, mask, temperature=INF, balance=balance)
        close(r, np.broadcast_to(mask[..., None] / 3, r.shape))
    # Components that nobody has take no part in the balance.
    none = proportions * np.array([1, 1, 0])
    r, _ = balanced(table, none, mask)
    close(np.sum(r, axis=(0, 1)), np.array([0.5, 0.5, 0]) * mask.sum(), 1e-2)
    even = np.broadcast_to(np.log([0.2, 0.3, 0.5]), table.shape)
    r, _ = balanced(even, np.full_like(proportions, 1 / 3), mask, tolerance=1e-9)
    close(r, np.broadcast_to(mask[..., None] / 3, r.shape), 1e-8)


def cross_matrix(k, n=30, noise=0.3, seed=0):
    """Simulate mean log densities: linear in the proportions of the row's client."""
    rng = np.random.default_rng(seed)
    proportions = rng.dirichlet(np.ones(k), size=n)
    distance = 20 * (1 - np.eye(k)) * rng.uniform(1, 2, size=(k, k))
    cross = -proportions @ distance @ proportions.T
    cross = cross + rng.normal(size=(n, 1)) * 9 + rng.normal(size=(1, n)) * 9 - 300
    return cross + noise * rng.normal(size=(n, n)), proportions


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_number_of_components(k, noise):
    for seed in range(5):
        number, values = estimate(cross_matrix(k, noise=noise, seed=seed)[0])
        assert number == k
        assert values.shape == (29,)


def test_farthest_first_finds_the_purest_clients():
    cross, proportions = cross_matrix(3, noise=0.0)
    proportions[[4, 9, 17]] = np.eye(3) * 0.97 + 0.01
    distance = 20 * (1 - np.eye(3))
    cross = -proportions @ distance @ proportions.T
    seeds = farthest_first(cross, 3)
    assert sorted(np.asarray(seeds).tolist()) == [4, 9, 17]
    order = np.random.default_rng(0).permutation(30)
    permuted = order[farthest_first(cross[order][:, order], 3)]
    assert sorted(permuted.tolist()) == [4, 9, 17]
    mask = np.arange(30) != 9
    dirty = np.where(mask[:, None] & mask, cross, NAN)
    assert 9 not in np.asarray(mixture.farthest_first(dirty, 5, mask=mask))
    assert sorted(np.asarray(farthest_first(0 * cross, 30)).tolist()) == list(range(30))
    line = np.array([0.0, 1, 2.1, 7, 10])
    loss = -np.abs(line[:, None] - line) * 1.0
    np.testing.assert_array_equal(farthest_first(loss, 4), [0, 4, 3, 2])


# Comparing.


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float64, (4, 4), elements=st.floats(-100, 100)))
def test_assignment_of_scipy(cost):
    rows = np.asarray(assign(cost))
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    close(cost[rows, np.arange(4)].sum(), best, 1e-9)


def test_matching_undoes_a_permutation():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(5), size=8)
    order = rng.permutation(5)
    noisy = 0.9 * truth[:, order] + 0.1 * rng.dirichlet(np.ones(5), size=8)
    permutation = jax.jit(mixture.match_proportions)(noisy, truth)
    np.testing.assert_array_equal(order[permutation], np.arange(5))
    error = mixture.total_variation(noisy[:, permutation], truth)
    assert error.shape == (8,) and (np.asarray(error) <= 0.1).all()
    close(mixture.total_variation(np.array([1.0, 0]), np.array([0, 1.0])), 1)
    close(mixture.total_variation(np.array([0.5, 0.5]), np.array([0.2, 0.8])), 0.3)


# Bad input.

TABLE, MEAN, COV = np.zeros([2, 2]), np.zeros([2, 2]), np.stack([np.eye(2)] * 2)
HALF, TWO = np.full(2, 0.5), np.ones(2, bool)
BAD_TABLE = np.array([[NAN, 0.0], [INF, 0.0]])
NOT_PSD = np.stack([np.eye(2), np.array([[1, 2], [2, 1.0]])])
EMPTY = mixture.Statistics(np.array([0.0, 2]), MEAN, 3 * COV)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture.responsibilities(TABLE[0], HALF, TWO), r"\[s, k\]"),
        (lambda: mixture.responsibilities(TABLE, np.ones(3), TWO), "with k = 2"),
        (lambda: mixture.responsibilities(BAD_TABLE, HALF, TWO), "log_density must be"),
        (lambda: mixture.responsibilities(TABLE, -HALF, TWO), "proportions must be"),
        (lambda: mixture.responsibilities(TABLE, 0 * HALF, TWO), "not all 0"),
        (lambda: mixture.log_likelihood(TABLE, HALF * NAN, TWO), "got nan in 2 of 2"),
        (lambda: mixture.fit_proportions(BAD_TABLE, TWO), "below infinity"),
        (lambda: mixture.fit_proportions(TABLE, TWO & False), "mask must hold"),
        (
            lambda: mixture.fit_proportions(TABLE, TWO, concentration=0.9),
            "concentration must be >= 1, got 0.9",
        ),
        (
            lambda: mixture.fit_proportions(TABLE, TWO, concentration=jnp.array(NAN)),
            "concentration must be >= 1, got nan",
        ),
        (lambda: mixture.fit_proportions(TABLE, TWO, tolerance=-1), "tolerance must"),
        (lambda: mixture.fit_proportions(TABLE, TWO, max_steps=0), "max_steps must"),
        (lambda: mixture.component_statistics(MEAN * NAN, TABLE + 1), "x must be"),
        (lambda: mixture.component_statistics(MEAN, TABLE - 1), "responsibility must"),
        (lambda: mixture.maximise(EMPTY), r"stats.count must be > 0, got 0.0"),
        (lambda: mixture.maximise(EMPTY, form="diag"), "form must be one of"),
        (
            lambda: mixture.gaussian_log_density(MEAN, MEAN, NOT_PSD),
            r"components \[1\]",
        ),
        (lambda: mixture.gaussian_log_density(MEAN * NAN, MEAN, COV), "x must be"),
        (
            lambda: mixture.sample(jax.random.key(0), MEAN, COV, HALF, 0),
            "num_samples must be >= 1",
        ),
        (lambda: mixture.importance_bound(BAD_TABLE), "log_weight must be"),
        (lambda: mixture.elbo(BAD_TABLE, HALF), "log_prob must be not NaN"),
        (lambda: mixture.bernoulli_log_prob(TABLE, HALF), "logits must have the shape"),
        (lambda: mixture.farthest_first(TABLE, 3), "num_seeds must be from 1 to 2"),
        (
            lambda: mixture.farthest_first(TABLE, 2, mask=TWO & [True, False]),
            "from 1 to 1",
        ),
        (lambda: mixture.farthest_first(BAD_TABLE, 1), "cross_density must be finite"),
        (
            lambda: mixture.balanced_responsibilities(
                TABLE[None], HALF[None], TWO[None], temperature=0
            ),
            "temperature must be > 0",
        ),
        (lambda: mixture.assign(BAD_TABLE), "cost must be finite"),
        (lambda: mixture.estimate_num_components(BAD_TABLE), "must be finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_under_jit_is_finite():
    both = np.array([[0, 1.0], [1, 0]])
    close(responsibilities(BAD_TABLE, HALF, TWO), both)
    close(responsibilities(TABLE, np.array([-1.0, NAN]), TWO), both * 0 + 0.5)
    close(responsibilities(TABLE, np.array([-1.0, 0.2]), TWO), [[0, 1], [0, 1]])
    close(fit_proportions(BAD_TABLE, TWO), HALF)
    assert np.isfinite(log_likelihood(BAD_TABLE, HALF, TWO))
    _, table, _ = data()
    uniform = np.full(3, 1 / 3)
    close(fit_proportions(table, ~ALL), uniform)
    close(fit_proportions(table, ~ALL, concentration=4.0), uniform)
    for concentration in (0.2, NAN):
        fitted = fit_proportions(table, ALL, concentration=concentration)
        close(fitted, fit_proportions(table, ALL))
    density = np.asarray(gaussian_log_density(MEAN, MEAN, NOT_PSD))
    close(density, np.array([[-np.log(2 * np.pi), -1e30]] * 2))
    assert (np.asarray(gaussian_log_density(MEAN * NAN, MEAN, COV)) == -1e30).all()
    stats = component_statistics(
        np.array([[NAN, 1], [2, 3]]), np.array([[1, 0], [-1, 2.0]])
    )
    close(stats.count, [0, 2])
    mean, cov, weight = maximise(EMPTY)
    close(weight, [0, 1])
    close(mean, MEAN)
    close(cov, np.stack([1.5 * np.eye(2)] * 2))
    cov, weight = maximise(EMPTY._replace(count=np.zeros(2)))[1:]
    close(cov, COV)
    close(weight, HALF)
    draws, _ = jax.jit(mixture.sample, static_argnums=4)(
        jax.random.key(0), MEAN, NOT_PSD, HALF, 5
    )
    assert np.isfinite(draws).all()
    close(importance_bound(np.full([3, 2], NAN)), np.full(2, -1e30))
    assert np.isfinite(jax.jit(mixture.elbo)(BAD_TABLE, HALF)).all()
    tables = BAD_TABLE[None], HALF[None]
    for mask, temperature in ((TWO, 1.0), (~TWO, 1.0), (TWO, -1.0), (TWO, NAN)):
        shares, offset = balanced(*tables, mask[None], temperature=temperature)
        close(np.sum(shares, axis=-1), mask[None])
        assert np.isfinite(offset).all()
    assert sorted(np.asarray(farthest_first(BAD_TABLE, 2)).tolist()) == [0, 1]
    assert sorted(np.asarray(assign(BAD_TABLE)).tolist()) == [0, 1]
    assert sorted(np.asarray(assign(BAD_TABLE * NAN)).tolist()) == [0, 1]
    assert estimate(BAD_TABLE)[0] == 1


def test_known_covariances_are_checked_within_a_trace_too():
    draw = jax.jit(lambda x: mixture.gaussian_log_density(x, MEAN, NOT_PSD))
    with pytest.raises(ValueError, match="positive definite"):
        draw(MEAN)
    known = jax.jit(lambda x: mixture.gaussian_log_density(x, MEAN, COV))
    close(known(MEAN), gaussian_log_density(MEAN, MEAN, COV))
