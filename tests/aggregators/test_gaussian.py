"""Gaussian fusion against closed forms, scikit-learn, SciPy and simulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedgen.aggregators import gaussian

# Compiled as a whole: operation by operation, compiling takes twice as long.
fuse = jax.jit(gaussian.fuse)
fuse_mean = jax.jit(gaussian.fuse_mean)
fuse_information = jax.jit(gaussian.fuse_information)
fuse_covariance = jax.jit(gaussian.fuse_covariance)
fuse_global = jax.jit(gaussian.fuse_global)
normal_inverse_wishart = jax.jit(gaussian.normal_inverse_wishart)
kalman_gain = jax.jit(gaussian.kalman_gain)
joseph_covariance = jax.jit(gaussian.joseph_covariance)
merge = jax.jit(gaussian.merge)
merge_two = jax.jit(gaussian.merge_two)
within_covariance = jax.jit(gaussian.within_covariance)
plugin_logits = jax.jit(gaussian.plugin_logits)
plugin_head = jax.jit(gaussian.plugin_head)
predictive_logits = jax.jit(gaussian.predictive_logits)
class_prior = jax.jit(gaussian.class_prior)
kl = jax.jit(gaussian.kl)
bures_wasserstein = jax.jit(gaussian.bures_wasserstein)
gain_eigen = jax.jit(gaussian.gain_eigen)
between_scale = jax.jit(gaussian.between_scale)
between_covariance = jax.jit(gaussian.between_covariance, static_argnames="form")
class_statistics = jax.jit(gaussian.class_statistics, static_argnums=3)

PRIOR_COV = np.array([[1, 0.3], [0.3, 0.5]])
COV = np.array([[2, -0.4], [-0.4, 1]])
PRIOR_MEAN = np.array([[0.5, -1]])
MEAN = np.array([[1.5, 0.25]])


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


def close(actual, desired, tolerance=1e-10):
    np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)


def random_cov(rng, d, *, floor=0.5):
    a = rng.normal(size=(d, d))
    return a @ a.T / d + floor * np.eye(d)


def belief(seed=0, c=4, d=3, count=(0, 1, 7, 400)):
    """Draw the arguments of `fuse`."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(c, d)),
        random_cov(rng, d, floor=0.1),
        rng.normal(size=(c, d)),
        random_cov(rng, d),
        np.array(count, float),
    )


def samples(seed=0, m=5, s=30, c=4, d=3):
    """Draw ragged clients, some without some classes, of shifted features."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, size=(m, s))
    y[0] = np.minimum(y[0], 1)
    y[-1] = np.maximum(y[-1], 3)
    shift = rng.normal(size=(m, c, d))
    z = rng.normal(size=(m, s, d)) @ random_cov(rng, d)
    z += rng.normal(size=(c, d))[y] + np.take_along_axis(shift, y[..., None], 1)
    mask = np.arange(s)[None] < rng.integers(s // 2, s + 1, size=m)[:, None]
    return z, y, mask


@functools.partial(jax.jit, static_argnums=3)
def stacked_statistics(z, y, mask, num_classes):
    return jax.vmap(gaussian.class_statistics, in_axes=(0, 0, 0, None))(
        z, y, mask, num_classes
    )


def pooled(z, y, mask, c=4):
    return class_statistics(
        z.reshape(-1, z.shape[-1]), y.reshape(-1), mask.reshape(-1), c
    )


def assert_statistics(a, b, tolerance=1e-10):
    jax.tree.map(lambda x, y: close(x, y, tolerance), a, b)


def probabilities(logits):
    return jax.nn.softmax(logits, axis=-1)


# Reference vectors.


@pytest.mark.parametrize(
    ("count", "gain", "mean", "cov"),
    [
        (
            1,
            [[0.3407572383, 0.2227171492], [0.1113585746, 0.3407572383]],
            [1.1191536748, -0.4626948776],
            [[0.5924276169, 0.0864142539], [0.0864142539, 0.2962138085]],
        ),
        (
            4,
            [[0.6359447005, 0.2304147465], [0.1152073733, 0.6359447005]],
            [1.4239631335, -0.0898617512],
            [[0.2949308756, -0.0059907834], [-0.0059907834, 0.1474654378]],
        ),
    ],
)
def test_reference_update(count, gain, mean, cov):
    n = jnp.array([float(count)])
    close(kalman_gain(PRIOR_COV, COV, n[0]), gain)
    fused, spread = fuse(PRIOR_MEAN, PRIOR_COV, MEAN, COV, n)
    close(fused[0], mean)
    close(spread[0], cov)
    close(fuse_mean(PRIOR_MEAN, PRIOR_COV, MEAN, COV, n)[0], mean)


def test_reference_normal_inverse_wishart():
    scatter = jnp.array([[3, 0.5], [0.5, 2]])
    mean, cov = normal_inverse_wishart(
        PRIOR_MEAN, COV, MEAN, scatter, jnp.array([4.0]), kappa=2, nu=6
    )
    close(mean, [[1.1666666667, -0.1666666667]])
    close(cov, [[1.4761904762, 0.1380952381], [0.1380952381, 1.0119047619]])


CLASS_MEANS = np.array([[0.0, 0], [1, 1], [-1, 2]])
CLASS_COV = np.array([[1, 0.2], [0.2, 0.5]])
LOG_PRIOR = np.log([0.5, 0.3, 0.2])
POINT = np.array([[0.4, 0.9]])


def test_reference_plugin():
    logits = plugin_logits(POINT, CLASS_MEANS, CLASS_COV, LOG_PRIOR)
    close(logits, [[-0.6931471806, -0.5735380217, -3.8485683472]])
    close(probabilities(logits), [[0.4608981578, 0.5194581566, 0.0196436855]])


def test_reference_predictive():
    spread = np.array([0.1, 0.5, 2])[:, None, None] * np.eye(2)
    logits = predictive_logits(POINT, CLASS_MEANS, CLASS_COV, spread, LOG_PRIOR)
    close(probabilities(logits), [[0.5532386822, 0.3785548626, 0.0682064552]])


# The invariants of the method, by letter.


@pytest.mark.parametrize("seed", range(3))
def test_a_gain_information_and_joseph_forms_agree(seed):
    args = prior_mean, prior_cov, mean, cov, count = belief(seed)
    fused, spread = fuse(*args)
    by_precision = fuse_information(*args)
    close(fused, by_precision[0])
    close(spread, by_precision[1])
    for c, n in enumerate(count):
        gain = kalman_gain(prior_cov, cov, n)
        close(fused[c], prior_mean[c] + gain @ (mean[c] - prior_mean[c]))
        close(spread[c], (np.eye(3) - gain) @ prior_cov)
        close(spread[c], joseph_covariance(gain, prior_cov, cov, n))


def test_joseph_is_the_error_of_any_gain():
    _, prior_cov, _, cov, _ = belief()
    gain = np.full([3, 3], 0.2)
    rng = np.random.default_rng(0)
    mu = rng.multivariate_normal(np.zeros(3), prior_cov, size=200_000)
    seen = mu + rng.multivariate_normal(np.zeros(3), cov / 5, size=200_000)
    error = np.cov((seen @ gain.T - mu).T)
    close(joseph_covariance(gain, prior_cov, cov, 5.0), error, 0.02)


def test_b_one_sample_at_a_time_equals_one_batch():
    prior_mean, prior_cov, _, cov, _ = belief()
    z = np.random.default_rng(1).normal(size=(6, 4, 3))
    batch, batch_cov = fuse(prior_mean, prior_cov, z.mean(0), cov, jnp.full([4], 6.0))
    one = jnp.ones([1])
    for c in range(4):
        mean, spread = prior_mean[c : c + 1], prior_cov
        for row in z[:, c]:
            mean, spread = fuse(mean, spread, row[None], cov, one)
            spread = spread[0]
        close(mean[0], batch[c])
        close(spread, batch_cov[c])


def test_c_prior_in_units_of_the_noise_gives_a_scalar_gain():
    _, _, _, cov, count = belief()
    kappa = 3.0
    basis = gain_eigen(cov / kappa, cov)
    for n in count:
        expected = n / (n + kappa) * np.eye(3)
        close(kalman_gain(cov / kappa, cov, n), expected)
        close(basis.gain(n), expected)


def test_d_limits():
    prior_mean, prior_cov, mean, cov, _ = belief()
    count = jnp.full([4], 5.0)
    fused, spread = fuse(prior_mean, 1e14 * prior_cov, mean, cov, count)
    close(fused, mean)
    close(spread, np.broadcast_to(cov / 5, [4, 3, 3]))
    fused, spread = fuse(prior_mean, 0 * prior_cov, mean, cov, count)
    np.testing.assert_array_equal(fused, prior_mean)
    np.testing.assert_array_equal(spread, 0)
    fused, spread = fuse(prior_mean, prior_cov, mean, cov, 1e14 * count)
    close(fused, mean)
    close(spread, np.zeros([4, 3, 3]))
    fused, spread = fuse(prior_mean, prior_cov, mean * np.nan, cov, 0 * count)
    np.testing.assert_array_equal(fused, prior_mean)
    close(spread, np.broadcast_to(prior_cov, [4, 3, 3]))


@pytest.mark.parametrize("seed", range(3))
def test_e_posterior_is_below_prior_and_likelihood(seed):
    args = _, prior_cov, _, cov, count = belief(seed, count=(0, 1, 7, 1e6))
    _, spread = fuse(*args)
    for v, n in zip(np.asarray(spread), count, strict=True):
        close(v, v.T)
        assert np.linalg.eigvalsh(v).min() >= -1e-12
        assert np.linalg.eigvalsh(prior_cov - v).min() >= -1e-12
        if n > 0:
            assert np.linalg.eigvalsh(cov / n - v).min() >= -1e-12
        gain = np.linalg.eigvals(kalman_gain(prior_cov, cov, n))
        close(gain.imag, np.zeros(3))
        assert gain.real.min() >= 0 and gain.real.max() < 1


def test_f_total_covariance_is_within_plus_between():
    z, _, _ = samples()
    sizes = np.array([30, 11, 2, 1, 0])
    mask = np.arange(30)[None] < sizes[:, None]
    local = stacked_statistics(z, 0 * mask, mask, 1)
    total = merge(local)
    flat = z[mask]
    close(total.mean[0], flat.mean(0))
    close(total.scatter / total.count[0], np.cov(flat.T, bias=True))
    share = sizes / sizes.sum()
    within = np.sum(local.scatter, 0) / sizes.sum()
    delta = np.asarray(local.mean)[:, 0] - flat.mean(0)
    between = np.einsum("m,md,me->de", share, delta, delta)
    close(total.scatter / total.count[0], within + between)


def test_g_linear_maps_of_the_features_carry_through():
    prior_mean, prior_cov, mean, cov, count = belief()
    rng = np.random.default_rng(5)
    h = rng.normal(size=(3, 3)) + 2 * np.eye(3)
    shift = rng.normal(size=3)
    z = rng.normal(size=(6, 3))
    log_prior = np.log([0.1, 0.2, 0.3, 0.4])

    def congruence(x):
        return h @ x @ h.T

    fused, spread = fuse(prior_mean, prior_cov, mean, cov, count)
    mapped, mapped_spread = fuse(
        prior_mean @ h.T + shift,
        congruence(prior_cov),
        mean @ h.T + shift,
        congruence(cov),
        count,
    )
    close(mapped, np.asarray(fused) @ h.T + shift)
    close(mapped_spread, congruence(np.asarray(spread)))
    close(
        probabilities(
            plugin_logits(z @ h.T + shift, mapped, congruence(cov), log_prior)
        ),
        probabilities(plugin_logits(z, fused, cov, log_prior)),
    )
    close(
        probabilities(
            predictive_logits(
                z @ h.T + shift, mapped, congruence(cov), mapped_spread, log_prior
            )
        ),
        probabilities(predictive_logits(z, fused, cov, spread, log_prior)),
    )


@pytest.mark.parametrize("form", ["scalar", "full"])
def test_g_linear_maps_carry_through_the_moment_estimate(form):
    z, y, mask = samples(s=60)
    h = np.random.default_rng(5).normal(size=(3, 3)) + 2 * np.eye(3)

    def estimate(z):
        stats = stacked_statistics(z, y, mask, 4)
        within = within_covariance(stats)
        return np.asarray(between_covariance(stats, None, within, form=form))

    plain = estimate(z)
    assert np.linalg.eigvalsh(plain).min() > 0  # a clipped one would not carry
    close(estimate(z @ h.T), h @ plain @ h.T)


def test_h_permutation_of_clients_and_classes():
    z, y, mask = samples()
    stats = stacked_statistics(z, y, mask, 4)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = jax.tree.map(lambda a: a[order], stats)
    assert_statistics(merge(shuffled), merge(stats))
    within = within_covariance(stats)
    close(within_covariance(shuffled), within)
    for form in gaussian.BETWEEN_FORMS:
        close(
            between_covariance(shuffled, None, within, form=form),
            between_covariance(stats, None, within, form=form),
        )
    prior_mean, prior_cov, mean, cov, count = belief()
    relabel = np.array([2, 0, 3, 1])
    fused = fuse(prior_mean, prior_cov, mean, cov, count)
    mapped = fuse(prior_mean[relabel], prior_cov, mean[relabel], cov, count[relabel])
    close(mapped[0], fused[0][relabel])
    close(mapped[1], fused[1][relabel])


def test_h_duplicated_clients_leave_the_global_estimates():
    stats = stacked_statistics(*samples(), 4)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), stats)
    close(merge(twice).mean, merge(stats).mean)
    close(within_covariance(twice), within_covariance(stats))


def test_i_one_client_without_prior_is_linear_discriminant_analysis():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, size=80)
    z = rng.normal(size=(80, 3)) @ random_cov(rng, 3) + rng.normal(size=(4, 3))[y]
    stats = class_statistics(z, y, jnp.ones(80), 4)
    freedom = gaussian.degrees_of_freedom(stats.count)
    assert freedom == 76
    cov = fuse_covariance(np.eye(3), stats.scatter, freedom, strength=1e-13)
    mean = fuse_mean(np.zeros([4, 3]), 1e14 * np.eye(3), stats.mean, cov, stats.count)
    log_prior = class_prior(stats.count, 1e-13)
    # scikit-learn divides the scatter by n where the unbiased estimate has n - c.
    cov = cov * 76 / 80
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=None).fit(z, y)
    kernel, bias = plugin_head(mean, cov, log_prior)
    close(kernel, oracle.coef_.T)
    close(bias, oracle.intercept_)
    logits = plugin_logits(z, mean, cov, log_prior)
    close(probabilities(logits), oracle.predict_proba(z))


@pytest.mark.parametrize("count", [0, 1, 7, 1e6])
def test_k_eigen_form_equals_direct_form(count):
    _, prior_cov, _, cov, _ = belief()
    basis = gain_eigen(prior_cov, cov)
    gain = basis.gain(count)
    close(gain, kalman_gain(prior_cov, cov, count))
    close(basis.covariance(count), prior_cov - gain @ prior_cov)
    if count == 0:
        np.testing.assert_array_equal(gain, 0)
        close(basis.covariance(count), prior_cov)
    else:
        close(gain, prior_cov @ np.linalg.inv(prior_cov + cov / count))


# Statistics.


def test_statistics_equal_a_loop_over_samples():
    z, y, mask = (a[2] for a in samples())
    stats = class_statistics(z, y, mask, 4)
    scatter = np.zeros([3, 3])
    for c in range(4):
        members = z[mask & (y == c)]
        assert stats.count[c] == len(members)
        close(stats.mean[c], members.mean(0))
        scatter += (members - members.mean(0)).T @ (members - members.mean(0))
    close(stats.scatter, scatter)


def test_padding_and_foreign_labels_are_left_out():
    z, y, mask = (a[2].copy() for a in samples())
    y[3] = 4
    y[5] = -1
    keep = mask & (y >= 0) & (y < 4)
    expected = class_statistics(z[keep], y[keep], np.ones(keep.sum()), 4)
    z[~mask] = np.nan
    y[~mask] = 99
    padded = class_statistics(z, y, mask, 4)
    assert_statistics(padded, expected)
    gradient = jax.grad(lambda z: jnp.sum(class_statistics(z, y, mask, 4).scatter))(z)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[~keep], 0)


def test_no_samples_give_zeros():
    stats = class_statistics(
        np.full([5, 3], np.nan), np.zeros(5, int), np.zeros(5, bool), 4
    )
    assert_statistics(stats, gaussian.empty_statistics(4, 3), 0)


def test_scatter_does_not_cancel_in_float32():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(500, 3)) + 1000).astype(np.float32)
    y = rng.integers(0, 4, size=500)
    single = class_statistics(z, y, np.ones(500), 4)
    double = class_statistics(z.astype(np.float64), y, np.ones(500), 4)
    assert single.scatter.dtype == jnp.float32
    np.testing.assert_allclose(single.scatter, double.scatter, rtol=1e-5, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    sizes=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    num_labels=st.integers(1, 4),
)
def test_merging_equals_pooling(seed, offset, sizes, num_labels):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(4, 12, 2)) + offset
    y = rng.integers(0, num_labels, size=(4, 12))
    mask = np.arange(12)[None] < np.array(sizes)[:, None]
    stats = stacked_statistics(z, y, mask, 4)
    expected = pooled(z, y, mask)
    # A scatter of features near 1e3 is exact to 1e-10 of their squares, not of itself.
    tolerance = 1e-10 * (1 + offset)
    assert_statistics(merge(stats), expected, tolerance)
    total = gaussian.empty_statistics(4, 2, jnp.float64)
    for i in range(4):
        total = merge_two(total, jax.tree.map(lambda a, i=i: a[i], stats))
    assert_statistics(total, expected, tolerance)


def test_empty_statistics_are_neutral():
    stats = jax.tree.map(lambda a: a[0], stacked_statistics(*samples(), 4))
    empty = gaussian.empty_statistics(4, 3, jnp.float64)
    assert_statistics(merge_two(stats, empty), stats, 0)
    assert_statistics(merge_two(empty, stats), stats, 0)
    unknown = empty._replace(mean=jnp.full([4, 3], jnp.nan))
    assert_statistics(merge_two(unknown, stats), stats, 0)
    assert_statistics(
        merge(jax.tree.map(lambda *a: jnp.stack(a), stats, unknown)), stats
    )


def test_batches_accumulate_in_a_loop_of_dynamic_length():
    z, y, mask = samples(m=1, s=48)

    @jax.jit
    def accumulate(num_batches):
        def step(i, total):
            batch = [jax.lax.dynamic_slice_in_dim(a[0], 8 * i, 8) for a in (z, y, mask)]
            return merge_two(total, class_statistics(*batch, 4))

        empty = gaussian.empty_statistics(4, 3, jnp.float64)
        return jax.lax.fori_loop(0, num_batches, step, empty)

    assert_statistics(accumulate(6), pooled(z, y, mask))
    assert_statistics(accumulate(3), pooled(z[:, :24], y[:, :24], mask[:, :24]))


def test_within_covariance_divides_by_degrees_of_freedom():
    z, y, mask = samples()
    stats = stacked_statistics(z, y, mask, 4)
    scatter, freedom = np.zeros([3, 3]), 0
    for i in range(5):
        for c in range(4):
            members = z[i][mask[i] & (y[i] == c)]
            if len(members) > 1:
                scatter += np.cov(members.T) * (len(members) - 1)
                freedom += len(members) - 1
    close(within_covariance(stats), scatter / freedom)


def test_within_covariance_of_single_samples_is_the_identity():
    z, y, mask = np.ones([2, 4, 3]), np.tile(np.arange(4), (2, 1)), np.ones([2, 4])
    stats = stacked_statistics(z, y, mask, 4)
    np.testing.assert_array_equal(within_covariance(stats), np.eye(3))


def test_shrinkage_keeps_the_trace_and_makes_definite():
    cov = np.diag([3.0, 0, 0])
    close(gaussian.shrink(cov, 0.1), np.diag([2.8, 0.1, 0.1]))
    close(gaussian.shrink(cov, 0.0), cov)
    close(gaussian.shrink(0 * cov, 0.1), 0.1 * np.eye(3))


# The covariance between clients.


def draw_statistics(rng, reps, between, cov, counts):
    """Draw true class means and sufficient statistics from the hierarchical model."""
    m, c = counts.shape
    d = len(cov)
    center = rng.normal(size=(c, d)) * 3
    truth = center + rng.normal(size=(reps, m, c, d)) @ np.linalg.cholesky(between).T
    noise = rng.normal(size=(reps, m, c, d)) @ np.linalg.cholesky(cov).T
    mean = truth + noise / np.sqrt(np.maximum(counts, 1))[..., None]
    mean = np.where(counts[..., None] > 0, mean, 0)
    freedom = np.maximum(counts - 1, 0).sum(1).astype(int)
    rows = rng.normal(size=(reps, m, freedom.max(), d)) @ np.linalg.cholesky(cov).T
    rows *= (np.arange(freedom.max()) < freedom[:, None])[..., None]
    scatter = np.einsum("rmsd,rmse->rmde", rows, rows)
    stats = gaussian.Statistics(
        *(jnp.asarray(a) for a in (np.tile(counts, (reps, 1, 1)), mean, scatter))
    )
    return center, truth, stats


COUNTS = np.array(
    [
        [8, 2, 0, 5],
        [1, 9, 4, 0],
        [12, 0, 3, 0],
        [0, 6, 6, 0],
        [5, 5, 1, 0],
        [20, 1, 9, 0],
    ],
    float,
)


def assert_unbiased(draws, truth):
    draws = np.asarray(draws)
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - truth) < 4 * error + 1e-12)
    assert np.all(error < 0.05 * np.abs(truth).max())


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_between_covariance_is_unbiased(form):
    rng = np.random.default_rng(0)
    between, cov = 4 * random_cov(rng, 3, floor=1), random_cov(rng, 3)
    _, _, stats = draw_statistics(rng, 1500, between, cov, COUNTS)

    @jax.jit
    @jax.vmap
    def estimate(stats):
        mean = merge(stats).mean
        within = gaussian.shrink(within_covariance(stats), 0.3)
        return between_covariance(stats, mean, within, form=form)

    truth = between if form == "full" else np.diag(np.diag(between))
    assert_unbiased(estimate(stats), truth)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_between_scale_is_unbiased_also_in_a_shrunken_metric(rho):
    rng = np.random.default_rng(1)
    cov = np.diag([4, 1, 0.05])
    _, _, stats = draw_statistics(rng, 1500, 0.7 * cov, cov, COUNTS * 6)

    @jax.jit
    @jax.vmap
    def estimate(stats):
        within = gaussian.shrink(within_covariance(stats), rho)
        beta = between_scale(stats, None, within)
        scaled = between_covariance(stats, None, within)
        return beta, jnp.max(jnp.abs(scaled - beta * within))

    beta, error = estimate(stats)
    assert_unbiased(beta, 0.7)
    assert error.max() < 1e-12


def test_without_shift_the_estimate_is_often_exactly_zero():
    rng = np.random.default_rng(2)
    cov = random_cov(rng, 3)
    _, _, stats = draw_statistics(rng, 400, 1e-12 * np.eye(3), cov, COUNTS)
    within = jax.vmap(within_covariance)(stats)
    estimate = jax.jit(jax.vmap(lambda s, w: between_scale(s, None, w)))
    beta = np.asarray(estimate(stats, within))
    assert 0.3 < np.mean(beta == 0) < 0.7
    assert beta.min() == 0
    full = jax.jit(jax.vmap(lambda s, w: between_covariance(s, None, w, form="full")))(
        stats, within
    )
    assert np.linalg.eigvalsh(full).min() > -1e-12


@pytest.mark.parametrize("form", gaussian.BETWEEN_FORMS)
def test_classes_of_one_holder_use_the_fallback(form):
    z, _, mask = samples(m=4)
    y = np.tile(np.arange(4)[:, None], 30)
    stats = stacked_statistics(z, y, mask, 4)
    within = within_covariance(stats)
    between = between_covariance(stats, None, within, form=form, fallback=0.2)
    expected = 0.2 * np.asarray(within)
    close(between, np.diag(np.diag(expected)) if form == "diagonal" else expected)


def test_classes_of_one_holder_add_nothing():
    z, y, mask = samples()
    alone = (y == 0) & (np.arange(5)[:, None] != 2)
    stats = stacked_statistics(z, y, mask & ~alone, 4)
    assert np.sum(stats.count[:, 0] > 0) == 1
    center = merge(stats).mean
    within = within_covariance(stats)
    for form in gaussian.BETWEEN_FORMS:
        close(
            between_covariance(stats, center.at[0].add(9), within, form=form),
            between_covariance(stats, center, within, form=form),
        )


def test_between_covariance_needs_no_two_samples_of_a_class():
    z, _, _ = samples(m=6, s=4)
    y = np.tile(np.arange(4), (6, 1))
    stats = stacked_statistics(z, y, np.ones([6, 4]), 4)
    unit = np.eye(3)
    between = between_covariance(stats, None, unit, form="full")
    delta = z - z.mean(0)
    raw = (np.einsum("mcd,mce->de", delta, delta) - 20 * unit) / (24 - 4)
    value, vector = np.linalg.eigh(raw)
    close(between, vector * np.maximum(value, 0) @ vector.T)


# What the model promises of its posterior.


def test_posterior_is_calibrated_and_beats_local_and_global_means():
    rng = np.random.default_rng(4)
    between, cov = random_cov(rng, 3), 4 * random_cov(rng, 3)
    center, truth, stats = draw_statistics(rng, 1000, between, cov, COUNTS)
    axes = (None, None, 0, None, 0)
    fuse_all = jax.jit(jax.vmap(jax.vmap(gaussian.fuse, axes), axes))
    mean, spread = fuse_all(center, between, stats.mean, cov, stats.count)
    error = truth - np.asarray(mean)
    white = np.linalg.solve(np.linalg.cholesky(spread), error[..., None])[..., 0]
    close(np.var(white, axis=0), np.ones([6, 4, 3]), 0.25)
    close(np.var(white), 1, 0.02)
    present = COUNTS > 0
    fused = np.mean(error[:, present] ** 2)
    local = np.mean((truth - np.asarray(stats.mean))[:, present] ** 2)
    prior = np.mean((truth - center)[:, present] ** 2)
    assert fused < 0.9 * min(local, prior)


def test_fused_head_is_at_least_as_accurate_as_local_and_global_heads():
    rng = np.random.default_rng(6)
    m, c, d, kappa = 200, 4, 3, 3.0
    counts = rng.integers(0, 7, size=(m, c)).astype(float)
    center, truth, stats = draw_statistics(rng, 1, np.eye(d), kappa * np.eye(d), counts)
    stats = jax.tree.map(lambda a: a[0], stats)
    y = np.tile(np.repeat(np.arange(c), 50), (m, 1))
    z = np.take_along_axis(truth[0], y[..., None], 1)
    z = z + np.sqrt(kappa) * rng.normal(size=z.shape)
    cov, uniform = kappa * np.eye(d), np.zeros(c)

    def accuracy(prior_cov):
        mean = jax.vmap(fuse_mean, in_axes=(None, None, 0, None, 0))(
            center, prior_cov, stats.mean, cov, stats.count
        )
        logits = jax.vmap(plugin_logits, in_axes=(0, 0, None, None))(
            z, mean, cov, uniform
        )
        return np.mean(np.argmax(logits, -1) == y)

    fused = accuracy(np.eye(d))
    assert fused > max(accuracy(0 * np.eye(d)), accuracy(1e9 * np.eye(d))) + 0.01


# Covariances and the global filter.


def test_covariance_fusion_interpolates_by_degrees_of_freedom():
    rng = np.random.default_rng(0)
    cov, scatter = random_cov(rng, 3), 20 * random_cov(rng, 3)
    fused = fuse_covariance(cov, scatter, 17.0, strength=5.0)
    close(fused, (5 * cov + scatter) / 22)
    close(fused, 5 / 22 * cov + 17 / 22 * (scatter / 17))
    none = np.zeros([3, 3])
    close(fuse_covariance(cov, scatter, 17.0, strength=jnp.inf), cov)
    close(fuse_covariance(cov, scatter, 17.0, strength=0), scatter / 17)
    close(fuse_covariance(cov, none, 0.0, strength=5), cov)
    close(fuse_covariance(cov, none, -3.0, strength=5), cov)
    close(fuse_covariance(cov, none, 0.0, strength=0), cov)


def test_normal_inverse_wishart_in_two_steps_equals_one():
    z, y, mask = samples(m=2)
    halves = stacked_statistics(z, y, mask, 4)
    one = pooled(z, y, mask)
    prior_mean, cov = np.zeros([4, 3]), np.eye(3)
    expected = normal_inverse_wishart(
        prior_mean, cov, one.mean, one.scatter, one.count, kappa=2, nu=7
    )
    # Between the steps every class has its own kappa, so the sums are taken by hand.
    first, second = (jax.tree.map(lambda a, i=i: a[i], halves) for i in range(2))
    n1, n2 = np.asarray(first.count), np.asarray(second.count)
    mean1, cov1 = normal_inverse_wishart(
        prior_mean, cov, first.mean, first.scatter, first.count, kappa=2, nu=7
    )
    kappa1, strength1 = 2 + n1, 3 + n1.sum()
    delta = np.asarray(second.mean - mean1)
    share = n2 / (kappa1 + n2)
    surprise = np.einsum("c,cd,ce->de", kappa1 * share, delta, delta)
    close(mean1 + share[:, None] * delta, expected[0])
    total = strength1 * cov1 + second.scatter + surprise
    close(total / (strength1 + n2.sum()), expected[1])


def test_normal_inverse_wishart_without_data_is_the_prior():
    prior_mean, cov, mean, _, count = belief()
    fused, spread = normal_inverse_wishart(
        prior_mean, cov, mean * np.nan, np.zeros([3, 3]), 0 * count, kappa=0, nu=7
    )
    np.testing.assert_array_equal(fused, prior_mean)
    close(spread, cov)


def test_global_filter_with_infinite_drift_is_plain_averaging():
    stats = stacked_statistics(*samples(), 4)
    measured = merge(stats).mean
    count = stats.count.at[:, 2].set(0)
    old = np.full([4, 3], 9.0)
    for start in (0.0, 0.5, np.inf):
        mean, variance = fuse_global(
            old, np.full(4, start), measured, count, between=0.2
        )
        expected = np.where(np.arange(4)[:, None] == 2, old, measured)
        close(mean, expected)
        total, square = count.sum(0), (count**2).sum(0)
        seen = np.array([0, 1, 3])
        close(variance[seen], (1 / total + 0.2 * square / total**2)[seen])
        assert variance[2] == np.inf


def test_global_filter_without_drift_is_a_running_average():
    z, y, mask = samples(m=6)
    mean, variance = jnp.zeros([4, 3]), jnp.full([4], jnp.inf)
    for i in range(0, 6, 2):
        stats = stacked_statistics(z[i : i + 2], y[i : i + 2], mask[i : i + 2], 4)
        mean, variance = fuse_global(
            mean, variance, merge(stats).mean, stats.count, process_noise=0
        )
    total = pooled(z, y, mask)
    close(mean, total.mean)
    close(variance, 1 / total.count)


def test_global_filter_equals_the_matrix_kalman_filter():
    mean, _, measured, cov, _ = belief()
    count = np.array([[3.0, 1, 0, 8], [2, 0, 0, 1]])
    variance = np.array([0.4, 0.01, 0.3, 0])
    beta, drift = 0.3, 0.02
    got, spread = fuse_global(
        mean, variance, measured, count, between=beta, process_noise=drift
    )
    for c in (0, 1, 3):
        total = count[:, c].sum()
        prior = (variance[c] + drift) * cov
        noise = cov / total + beta * cov * (count[:, c] ** 2).sum() / total**2
        gain = prior @ np.linalg.inv(prior + noise)
        close(got[c], mean[c] + gain @ (measured[c] - mean[c]))
        close(spread[c] * cov, (np.eye(3) - gain) @ prior)
    np.testing.assert_array_equal(got[2], mean[2])
    close(spread[2], 0.32)


def test_certain_global_means_do_not_move():
    mean, _, measured, _, count = belief()
    got, spread = fuse_global(mean, np.zeros(4), measured, count[None], process_noise=0)
    np.testing.assert_array_equal(got, mean)
    np.testing.assert_array_equal(spread, 0)


def test_equal_counts_make_the_interpolation_of_pfedfda():
    prior_mean, _, mean, cov, _ = belief()
    n, kappa = 6.0, 4.0
    fused = fuse_mean(prior_mean, cov / kappa, mean, cov, jnp.full([4], n))
    share = n / (n + kappa)
    log_prior = np.log(np.full(4, 0.25))
    interpolated = share * mean + (1 - share) * prior_mean
    ours = plugin_head(fused, cov, log_prior)
    theirs = plugin_head(interpolated, cov, log_prior)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


# Heads.


def test_class_prior():
    close(
        np.exp(class_prior(np.array([3.0, 0, 1]), 0.5)),
        [3.5 / 5.5, 1 / 11, 3 / 11],
    )
    close(np.exp(class_prior(np.zeros(4), 0.1)), np.full(4, 0.25))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
def test_scores_are_tempered_log_densities_plus_log_priors(temperature):
    mean, _, _, cov, _ = belief()
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 3))
    spread = np.stack([0.3 * random_cov(rng, 3) for _ in range(4)])
    log_prior = np.log([0.1, 0.2, 0.3, 0.4])

    def oracle(covs):
        density = [
            scipy.stats.multivariate_normal(mu, s).logpdf(z)
            for mu, s in zip(mean, covs, strict=True)
        ]
        return probabilities(temperature * np.stack(density, 1) + log_prior)

    plugin = plugin_logits(z, mean, cov, log_prior, temperature=temperature)
    close(probabilities(plugin), oracle([cov] * 4))
    predictive = predictive_logits(
        z, mean, cov, spread, log_prior, temperature=temperature
    )
    close(probabilities(predictive), oracle(cov + spread))
    certain = predictive_logits(
        z, mean, cov, 0 * spread, log_prior, temperature=temperature
    )
    close(probabilities(certain), probabilities(plugin))
    kernel, bias = plugin_head(mean, cov, log_prior, temperature=temperature)
    close(z @ np.asarray(kernel) + np.asarray(bias), plugin)


# Distances.


def test_kl_equals_the_textbook_formula():
    rng = np.random.default_rng(0)
    (m0, m1), (s0, s1) = rng.normal(size=(2, 3)), [random_cov(rng, 3) for _ in "01"]
    delta = m1 - m0
    inverse = np.linalg.inv(s1)
    logdet = np.linalg.slogdet(s1)[1] - np.linalg.slogdet(s0)[1]
    expected = (np.trace(inverse @ s0) + delta @ inverse @ delta - 3 + logdet) / 2
    close(kl(m0, s0, m1, s1), expected)
    close(kl(m0, s0, m0, s0), 0)
    check_grads(kl, (m0, s0, m1, s1), order=1, modes=["rev"])


def test_bures_wasserstein_equals_the_matrix_square_root_formula():
    rng = np.random.default_rng(0)
    (m0, m1), (s0, s1) = rng.normal(size=(2, 3)), [random_cov(rng, 3) for _ in "01"]
    root = scipy.linalg.sqrtm(s0)
    cross = scipy.linalg.sqrtm(root @ s1 @ root)
    expected = np.sum((m0 - m1) ** 2) + np.trace(s0 + s1 - 2 * cross)
    close(bures_wasserstein(m0, s0, m1, s1), expected)
    close(bures_wasserstein(m1, s1, m0, s0), expected)
    close(bures_wasserstein(m0, s0, m0, s0), 0)
    check_grads(bures_wasserstein, (m0, s0, m1, s1), order=1, modes=["rev"])
    repeated = jax.grad(bures_wasserstein, (0, 1))
    for gradient in repeated(m0, np.eye(3), m1, 4 * np.eye(3)):
        assert np.all(np.isfinite(gradient))


# Transformations.


def test_gradients_are_exact_and_finite_at_count_zero():
    prior_mean, _, mean, _, count = belief()
    identity = np.eye(3)  # eigenvalues coincide

    def loss(prior_mean, mean):
        fused, spread = fuse(prior_mean, identity, mean, identity, count)
        return jnp.sum(fused**2) + jnp.sum(spread)

    check_grads(loss, (prior_mean, mean), order=1, modes=["rev"])
    mean[0] = np.nan
    for gradient in jax.grad(loss, (0, 1))(prior_mean, mean):
        assert np.all(np.isfinite(gradient))


def test_covariances_are_constants_of_the_eigen_form():
    prior_mean, prior_cov, mean, cov, count = belief()

    def loss(prior_cov, cov):
        fused, spread = fuse(prior_mean, prior_cov, mean, cov, count)
        return jnp.sum(fused) + jnp.sum(spread)

    for gradient in jax.grad(loss, (0, 1))(prior_cov, cov):
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_flow_through_the_direct_form():
    _, prior_cov, _, cov, _ = belief()
    for n in (0.0, 7.0):
        check_grads(
            lambda b, s, n=n: kalman_gain(b @ b.T, s @ s.T, n),
            (prior_cov, cov),
            order=1,
            modes=["rev"],
        )


def test_moment_estimates_are_constants_under_grad():
    stats = stacked_statistics(*samples(), 4)
    for form in gaussian.BETWEEN_FORMS:
        gradient = jax.grad(
            lambda mean, form=form: jnp.sum(
                between_covariance(
                    stats._replace(mean=mean), None, np.eye(3), form=form
                )
            )
        )(stats.mean)
        np.testing.assert_array_equal(gradient, 0)


def test_vmap_over_clients_equals_a_loop():
    beliefs = [belief(seed) for seed in range(3)]
    args = [np.stack(x) for x in zip(*beliefs, strict=True)]
    fused, spread = jax.jit(jax.vmap(fuse))(*args)
    stats = stacked_statistics(*samples(), 4)
    for i, one in enumerate(beliefs):
        mean, cov = fuse(*one)
        close(fused[i], mean)
        close(spread[i], cov)
        z, y, mask = (a[i] for a in samples())
        assert_statistics(
            jax.tree.map(lambda a, i=i: a[i], stats),
            class_statistics(z, y, mask, 4),
        )


def test_float32_agrees_with_float64():
    def pipeline(z, y, mask):
        stats = jax.vmap(class_statistics, in_axes=(0, 0, 0, None))(z, y, mask, 4)
        total = merge(stats)
        within = gaussian.shrink(within_covariance(stats), 0.01)
        between = between_covariance(stats, total.mean, within, form="full")

        def head(stats, z):
            mean, spread = fuse(total.mean, between, stats.mean, within, stats.count)
            cov = fuse_covariance(
                within,
                stats.scatter,
                gaussian.degrees_of_freedom(stats.count),
                strength=12.0,
            )
            log_prior = class_prior(stats.count, 0.1)
            return (
                plugin_logits(z, mean, cov, log_prior),
                predictive_logits(z, mean, cov, spread, log_prior),
            )

        return probabilities(jnp.stack(jax.vmap(head)(stats, z)))

    z, y, mask = samples()
    double = jax.jit(pipeline)(z, y, mask)
    single = jax.jit(pipeline)(z.astype(np.float32), y, mask)
    assert double.dtype == jnp.float64 and single.dtype == jnp.float32
    close(single, double, 1e-4)


# Bad input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gaussian.fuse(MEAN[0], COV, MEAN, COV, np.ones(1)),
            r"prior_mean must have shape \[c, d\], got \(2,\)",
        ),
        (
            lambda: gaussian.fuse(MEAN, COV, MEAN, np.eye(3), np.ones(1)),
            r"cov must have shape \[d, d\] with d = 2 as in prior_mean, got \(3, 3\)",
        ),
        (
            lambda: gaussian.fuse_mean(MEAN, COV, MEAN, COV, np.ones(2)),
            r"count must have shape \[c\] with c = 1",
        ),
        (
            lambda: gaussian.class_statistics(
                np.ones([3, 2]), np.zeros(4), np.ones(3), 2
            ),
            r"y must have shape \[s\] with s = 3",
        ),
        (
            lambda: gaussian.class_statistics(MEAN, np.zeros(1, int), np.ones(1), 0),
            "num_classes must be >= 1, got 0",
        ),
        (
            lambda: gaussian.merge(gaussian.empty_statistics(4, 3)),
            r"stats.count must have shape \[m, c\]",
        ),
        (
            lambda: gaussian.merge_two(
                gaussian.empty_statistics(4, 3), gaussian.empty_statistics(3, 3)
            ),
            "a and b must agree",
        ),
        (
            lambda: gaussian.between_covariance(None, None, COV, form="diag"),
            "form must be one of scalar, diagonal, full, got 'diag'",
        ),
        (lambda: gaussian.shrink(COV, 1.5), "rho must be <= 1, got 1.5"),
        (lambda: gaussian.shrink(COV, -0.1), "rho must be >= 0, got -0.1"),
        (
            lambda: gaussian.class_prior(np.ones(3), 0),
            "concentration must be > 0, got 0",
        ),
        (
            lambda: gaussian.fuse_covariance(COV, COV, np.ones(()), strength=-1),
            "strength must be >= 0, got -1",
        ),
        (
            lambda: gaussian.normal_inverse_wishart(
                MEAN, COV, MEAN, COV, np.ones(1), kappa=1, nu=3
            ),
            "nu must be > 3, got 3",
        ),
        (
            lambda: gaussian.plugin_logits(POINT[0], CLASS_MEANS, COV, LOG_PRIOR),
            r"z must have shape \[b, d\]",
        ),
        (
            lambda: gaussian.plugin_head(MEAN, COV, np.zeros(1), temperature=-1),
            "temperature must be >= 0, got -1",
        ),
        (
            lambda: gaussian.kl(MEAN[0], COV, MEAN[0], np.eye(3)),
            r"cov1 must have shape \[d, d\] with d = 2 as in mean0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NAN_MEAN = np.array([[np.nan, 0.25]])
INDEFINITE = np.array([[1.0, 2.0], [2.0, 1.0]])
SKEW = np.array([[1.0, 0.5], [0.0, 1.0]])
ONE = np.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gaussian.fuse(PRIOR_MEAN, PRIOR_COV, MEAN, INDEFINITE, ONE),
            "cov must be positive definite, got an eigenvalue -1",
        ),
        (
            lambda: gaussian.fuse(PRIOR_MEAN, INDEFINITE, MEAN, COV, ONE),
            "prior_cov must be positive semi-definite, got an eigenvalue -1",
        ),
        (
            lambda: gaussian.fuse_mean(PRIOR_MEAN, SKEW, MEAN, COV, ONE),
            "prior_cov must be symmetric, got entries 0.5 apart",
        ),
        (
            lambda: gaussian.fuse(PRIOR_MEAN, PRIOR_COV, NAN_MEAN, COV, ONE),
            "mean must be finite, got nan in 1 of 2",
        ),
        (
            lambda: gaussian.fuse(NAN_MEAN, PRIOR_COV, MEAN, COV, ONE),
            "prior_mean must be finite",
        ),
        (
            lambda: gaussian.fuse(PRIOR_MEAN, PRIOR_COV, MEAN, COV, -ONE),
            "count must be finite and >= 0, got -1.0",
        ),
        (
            lambda: gaussian.kalman_gain(PRIOR_COV, np.zeros((2, 2)), np.ones(())),
            "cov must be positive definite, got an eigenvalue 0",
        ),
        (lambda: gaussian.gain_eigen(PRIOR_COV, np.nan * COV), "cov must be finite"),
        (
            lambda: gaussian.fuse_covariance(COV, INDEFINITE, ONE[0], strength=1),
            "scatter must be positive semi-definite",
        ),
        (lambda: gaussian.class_prior(-ONE, 0.1), "count must be"),
        (
            lambda: gaussian.plugin_logits(NAN_MEAN, MEAN, COV, np.zeros(1)),
            "z must be finite",
        ),
        (
            lambda: gaussian.plugin_head(MEAN, INDEFINITE, np.zeros(1)),
            "cov must be positive definite",
        ),
        (
            lambda: gaussian.predictive_logits(
                MEAN, MEAN, COV, INDEFINITE[None], np.zeros(1)
            ),
            "mean_cov must be positive semi-definite",
        ),
        (
            lambda: gaussian.kl(MEAN[0], COV, MEAN[0], INDEFINITE),
            "cov1 must be positive definite",
        ),
        (
            lambda: gaussian.bures_wasserstein(NAN_MEAN[0], COV, MEAN[0], COV),
            "mean0 must be finite",
        ),
        (
            lambda: gaussian.class_statistics(NAN_MEAN, np.zeros(1, int), ONE, 2),
            "z must be finite",
        ),
        (
            lambda: gaussian.class_statistics(MEAN, np.full(1, 2), ONE, 2),
            r"y must be in \[0, 2\), got 2",
        ),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_under_jit_an_indefinite_covariance_counts_as_the_identity():
    identity = np.eye(2)
    for prior, cov in ((PRIOR_COV, INDEFINITE), (PRIOR_COV, np.nan * COV)):
        found = jax.jit(gaussian.fuse)(PRIOR_MEAN, prior, MEAN, cov, 3 * ONE)
        expected = gaussian.fuse(PRIOR_MEAN, prior, MEAN, identity, 3 * ONE)
        jax.tree.map(close, found, expected)
    head = jax.jit(gaussian.plugin_head)(MEAN, INDEFINITE, np.zeros(1))
    jax.tree.map(close, head, gaussian.plugin_head(MEAN, identity, np.zeros(1)))
    found = jax.jit(gaussian.kl)(MEAN[0], COV, PRIOR_MEAN[0], INDEFINITE)
    close(found, gaussian.kl(MEAN[0], COV, PRIOR_MEAN[0], identity))


def test_under_jit_a_mean_that_is_not_finite_is_an_absent_class():
    for fuse in (gaussian.fuse, gaussian.fuse_information):
        found = jax.jit(fuse)(PRIOR_MEAN, PRIOR_COV, NAN_MEAN, COV, 3 * ONE)
        jax.tree.map(close, found, (PRIOR_MEAN, PRIOR_COV[None]))


def test_under_jit_features_that_are_not_finite_score_by_the_prior():
    z = np.concatenate([POINT, np.full((1, 2), np.nan)])
    plugin = jax.jit(gaussian.plugin_logits)(z, CLASS_MEANS, CLASS_COV, LOG_PRIOR)
    close(plugin[1], LOG_PRIOR)
    close(
        plugin[:1],
        gaussian.plugin_logits(POINT, CLASS_MEANS, CLASS_COV, LOG_PRIOR),
    )
    spread = np.stack([0.1 * np.eye(2)] * 3)
    predictive = jax.jit(gaussian.predictive_logits)(
        z, CLASS_MEANS, CLASS_COV, spread, LOG_PRIOR
    )
    close(predictive[1], LOG_PRIOR)
