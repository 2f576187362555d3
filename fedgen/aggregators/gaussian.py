"""Gaussian beliefs about classes: statistics, Kalman fusion, Bayesian heads.

Every class of every client has a mean that is drawn around the class's global mean,

    mu_ic ~ N(m_c, B),    zbar_ic | mu_ic ~ N(mu_ic, Sigma / n_ic),

so that the global distribution is a prior, the client's data a likelihood, and the
posterior mean is a Kalman update, `mu = m + K (zbar - m)` with the gain
`K = B (B + Sigma / n)^-1`. The functions here estimate `m`, `Sigma` and `B` from
class statistics, update means and covariances, and turn them into class scores.

They are written for ONE client (`jax.vmap` them for more; a covariance shared by all
clients with `in_axes=None` is then factorised once), hold no state, and work under
`jit`, `vmap` and `grad`, in float32 and float64. Letters in shapes: `m` clients, `s`
samples, `b` rows of a batch, `c` classes, `d` features. Covariances are `[d, d]` and
tied over classes; diagonal and scalar ones are passed as the matrices they are. A
class that a client does not hold has count 0; its mean may then be anything, NaN
included, and the result is the prior.

Differentiation: eigenvectors have no finite derivative where eigenvalues coincide, so
`gain_eigen`, hence `fuse` and `fuse_mean`, and `between_covariance` treat covariances
as constants. Derivatives with respect to means are exact and finite. The direct
`kalman_gain` and the information form are differentiable in everything.

Bad input: wrong shapes raise a `ValueError`, also while tracing. Wrong values do so
where they are known, that is outside of `jit` and `vmap`: NaN and infinities, negative
counts, covariances that are not symmetric or not positive (semi-)definite; `shrink`
one estimated from few samples. Inside, results stay finite:

- A covariance that is not positive definite where it must be counts as the identity.
- A class mean that is not finite counts as that of an absent class.
- Features that are not finite score by the prior of the classes alone.
- Distances between means that are not finite are the exception: they are NaN.

What is a reconstruction: pFedGM (Hu and Ma, 2026) was known from its abstract only,
which speaks of fusion at a global and a local level inspired by the Kalman gain. The
conjugate updates below are the textbook ones and their use for that purpose is a
reconstruction. The between-client moments are those of DerSimonian and Laird, in one
pass over all classes.

References:
  Hu and Ma, pFedGM, arXiv:2603.11620.
  Mclaughlin and Su, Personalized Federated Learning via Feature Distribution
    Adaptation (pFedFDA), NeurIPS 2024.
  DerSimonian and Laird, Meta-analysis in clinical trials, 1986.
  Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing
    sample variances, 1979.
  Murphy, Machine Learning: A Probabilistic Perspective, 2012, section 4.6.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from fedgen._matrices import each
from fedgen.aggregators._checks import (
    check_covariances,
    check_finite,
    check_number,
    check_shapes,
    check_values,
    is_known,
)
from fedgen.aggregators._numerics import divide, einsum, matmul

BETWEEN_FORMS = ("scalar", "diagonal", "full")


class Statistics(NamedTuple):
    """What a set of labelled features says about class-conditional Gaussians."""

    count: jax.Array  # [c] samples, n_c
    mean: jax.Array  # [c, d] class means, 0 where the count is 0
    scatter: jax.Array  # [d, d] sum over samples of (z - mean_y)(z - mean_y)^T


class GainBasis(NamedTuple):
    """Coordinates in which a prior and a noise covariance are both diagonal.

    With `cov = L L^T` and `L^-1 prior_cov L^-T = Q diag(beta) Q^T`, `left` is `L Q` and
    `right` is `Q^T L^-1`, its inverse. Gain and posterior covariance for any count
    then cost no further factorisation.
    """

    left: jax.Array  # [d, d]
    right: jax.Array  # [d, d]
    beta: jax.Array  # [d] prior variances in units of the noise, >= 0

    def gain(self, count: jax.Array) -> jax.Array:
        """Return `K(n) [d, d]`; 0 for `count []` 0."""
        share = count * self.beta / (1 + count * self.beta)
        return matmul(self.left * share[None, :], self.right)

    def covariance(self, count: jax.Array) -> jax.Array:
        """Return the posterior covariance `V(n) [d, d]`; the prior's for count 0."""
        variance = self.beta / (1 + count * self.beta)
        return matmul(self.left * variance[None, :], self.left.T)


def _check_statistics(stats: Statistics, prefix: str, name: str) -> None:
    check_shapes(
        **{
            f"{name}.count": (stats.count, prefix + "c"),
            f"{name}.mean": (stats.mean, prefix + "cd"),
            f"{name}.scatter": (stats.scatter, prefix + "dd"),
        }
    )


def _check_count(count) -> None:
    check_values("count", count, "finite and >= 0", lambda n: (n >= 0) & (n < np.inf))


def _check_means(name: str, mean, count) -> None:
    """Check the means of classes that are there."""
    if is_known(mean, count):
        check_finite(**{name: np.asarray(mean)[np.asarray(count) > 0]})


def _cholesky(cov: jax.Array) -> jax.Array:
    """Factorise `[d, d]`, by the identity if it is not positive definite."""
    factor = jnp.linalg.cholesky(cov)
    proper = jnp.all(jnp.isfinite(factor))
    return jnp.where(proper, factor, jnp.eye(cov.shape[-1], dtype=factor.dtype))


def _symmetrise(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2


# Statistics.


def class_statistics(
    z: jax.Array, y: jax.Array, mask: jax.Array, num_classes: int
) -> Statistics:
    """Compute counts, class means and the tied within-class scatter of one client.

    Two passes: the scatter is taken of features already centred on their class mean,
    since `Z^T Z - n zbar zbar^T` cancels in float32 when means exceed deviations.

    Args:
      z: `[s, d]` features.
      y: `[s]` integer labels.
      mask: `[s]`, true for samples that exist. Rows of others may hold NaN.
      num_classes: Number of classes `c`. Labels outside `0..c-1` are left out.

    Returns:
      Statistics of the samples, in the dtype of `z` but at least float32.
    """
    check_shapes(z=(z, "sd"), y=(y, "s"), mask=(mask, "s"))
    if num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    if is_known(z, y, mask):
        held = np.asarray(mask) > 0
        check_finite(z=np.asarray(z)[held])
        check_values(
            "y",
            np.asarray(y)[held],
            f"in [0, {num_classes})",
            lambda label: (label >= 0) & (label < num_classes),
        )
    dtype = jnp.result_type(z, jnp.float32)
    mask = mask.astype(bool) & (y >= 0) & (y < num_classes)
    z = jnp.where(mask[:, None], z, 0).astype(dtype)
    y = jnp.clip(y, 0, num_classes - 1)
    member = jax.nn.one_hot(y, num_classes, dtype=dtype) * mask[:, None]
    count = jnp.sum(member, axis=0)
    mean = divide(matmul(member.T, z), count[:, None])
    residual = jnp.where(mask[:, None], z - mean[y], 0)
    return Statistics(count, mean, matmul(residual.T, residual))


def empty_statistics(
    num_classes: int, num_features: int, dtype: jnp.dtype = jnp.float32
) -> Statistics:
    """Return the statistics of no samples, the neutral element of `merge_two`."""
    return Statistics(
        jnp.zeros([num_classes], dtype),
        jnp.zeros([num_classes, num_features], dtype),
        jnp.zeros([num_features, num_features], dtype),
    )


def merge(stats: Statistics) -> Statistics:
    """Merge the statistics of `m` clients into those of their pooled features.

    Exact: to the clients' scatters it adds the scatter between their class means.

    Args:
      stats: Leaves `[m, ...]`.

    Returns:
      Statistics with leaves `[...]`.
    """
    _check_statistics(stats, "m", "stats")
    count = jnp.sum(stats.count, axis=0)
    present = stats.count > 0
    share = divide(stats.count, count[None])
    local = jnp.where(present[..., None], stats.mean, 0)
    mean = einsum("mc,mcd->cd", share, local)
    scatter = jnp.sum(stats.scatter, axis=0)
    scatter = scatter + _mean_scatter(stats.count, local, mean)
    return Statistics(count, mean, scatter)


def merge_two(a: Statistics, b: Statistics) -> Statistics:
    """Merge two sets of statistics exactly, either of which may be empty.

    The parallel update of Chan, Golub and LeVeque per class; meant for accumulating
    over batches in a loop, from `empty_statistics`.
    """
    _check_statistics(a, "", "a")
    _check_statistics(b, "", "b")
    if jnp.shape(a.mean) != jnp.shape(b.mean):
        raise ValueError(
            "a and b must agree in classes and features, got means of shape "
            f"{jnp.shape(a.mean)} and {jnp.shape(b.mean)}"
        )
    count = a.count + b.count
    mean_a = jnp.where(a.count[:, None] > 0, a.mean, 0)
    delta = jnp.where(b.count[:, None] > 0, b.mean, 0) - mean_a
    share = divide(b.count, count)
    mean = mean_a + share[:, None] * delta
    between = matmul((delta * (a.count * share)[:, None]).T, delta)
    return Statistics(count, mean, a.scatter + b.scatter + between)


def _mean_scatter(count: jax.Array, mean: jax.Array, center: jax.Array) -> jax.Array:
    """Sum `n_ic (zbar_ic - m_c)(zbar_ic - m_c)^T` over clients and classes, [d, d]."""
    delta = jnp.where(count[..., None] > 0, mean - center[None], 0)
    return einsum("mcd,mce->de", count[..., None] * delta, delta)


def degrees_of_freedom(count: jax.Array) -> jax.Array:
    """Count the samples left after a mean per class present, `[..., c] -> [...]`."""
    return jnp.sum(jnp.maximum(count - 1, 0), axis=-1)


def within_covariance(stats: Statistics) -> jax.Array:
    """Estimate the covariance within clients and classes, without bias.

    `sum_i S_i / sum_i (n_i - C_i)`, where client i has `n_i` samples of `C_i` classes.
    Its rank is at most the denominator: `shrink` it before it is inverted.

    Args:
      stats: Leaves `[m, ...]`.

    Returns:
      `[d, d]`; the identity, which makes a nearest-mean classifier, if no client holds
      two samples of a class.
    """
    _check_statistics(stats, "m", "stats")
    freedom = jnp.sum(degrees_of_freedom(stats.count))
    scatter = jnp.sum(stats.scatter, axis=0)
    identity = jnp.eye(scatter.shape[-1], dtype=scatter.dtype)
    return jnp.where(freedom > 0, divide(scatter, freedom), identity)


def shrink(cov: jax.Array, rho: float) -> jax.Array:
    """Move a covariance towards the isotropic one of equal trace.

    Args:
      cov: `[d, d]`.
      rho: Share of the isotropic part, from 0 to 1.

    Returns:
      `(1 - rho) cov + rho tr(cov)/d I`; a covariance of trace 0 moves towards the
      identity instead, so that the result is positive definite whenever `rho > 0`.
    """
    check_shapes(cov=(cov, "dd"))
    check_number("rho", rho, 0)
    if isinstance(rho, (int, float)) and rho > 1:
        raise ValueError(f"rho must be <= 1, got {rho}")
    scale = jnp.trace(cov) / cov.shape[-1]
    scale = jnp.where(scale > 0, scale, 1)
    return (1 - rho) * cov + rho * scale * jnp.eye(cov.shape[-1], dtype=cov.dtype)


class _Moments(NamedTuple):
    """Ingredients of the moment estimate of the covariance between clients."""

    excess: jax.Array  # [d, d] scatter of class means beyond sampling noise
    noise: jax.Array  # [d, d] unbiased covariance within
    size: jax.Array  # [] samples the excess is worth; 0 if no class is shared


def _between_moments(
    stats: Statistics,
    global_mean: jax.Array | None,
    within: jax.Array,
    noise: jax.Array | None,
) -> _Moments:
    if noise is None:
        _check_statistics(stats, "m", "stats")
        freedom = jnp.sum(degrees_of_freedom(stats.count))
        noise = jnp.where(freedom > 0, within_covariance(stats), within)
    count = stats.count
    total = jnp.sum(count, axis=0)
    local = jnp.where(count[..., None] > 0, stats.mean, 0)
    if global_mean is None:
        global_mean = einsum("mc,mcd->cd", divide(count, total[None]), local)
    check_shapes(
        **{"stats.count": (count, "mc"), "stats.mean": (stats.mean, "mcd")},
        global_mean=(global_mean, "cd"),
        within=(within, "dd"),
        noise=(noise, "dd"),
    )
    holders = jnp.sum(count > 0, axis=0)
    contrasts = jnp.sum(jnp.maximum(holders - 1, 0)).astype(noise.dtype)
    size = jnp.sum(total - divide(jnp.sum(count**2, axis=0), total))
    # A class with a single holder has no contrast: rounding must not give it one.
    shared = jnp.where(holders[None] > 1, count, 0)
    excess = _mean_scatter(shared, local, global_mean) - contrasts * noise
    return _Moments(excess, noise, jnp.where(contrasts > 0, size, 0))


def between_scale(
    stats: Statistics,
    global_mean: jax.Array | None,
    within: jax.Array,
    *,
    noise: jax.Array | None = None,
    fallback: float = 0.1,
) -> jax.Array:
    """Estimate beta in `B = beta Sigma`, the spread of class means between clients.

    `1 / beta` is the number of samples kappa that the prior is worth, as the gain is
    `K = n / (n + kappa) I`. Spread is measured in the Mahalanobis metric of `within`,
    which linear maps of the features leave as it is. The same metric is applied to
    the noise that is subtracted, so shrinking `within` does not bias the estimate.

    Args:
      stats: Leaves `[m, ...]`.
      global_mean: `[c, d]`, as in `between_covariance`.
      within: `[d, d]`, positive definite.
      noise: `[d, d]`, as in `between_covariance`.
      fallback: Result if no class has two holders.

    Returns:
      `[]`, at least 0; a negative estimate, which is ordinary if there is no shift
      between clients, becomes 0 and the gain with it.
    """
    moments = _between_moments(stats, global_mean, within, noise)
    factor = jnp.linalg.cholesky(within)
    excess, unit = (
        jnp.trace(cho_solve((factor, True), x)) for x in (moments.excess, moments.noise)
    )
    beta = jnp.maximum(divide(excess, moments.size * unit), 0)
    return jax.lax.stop_gradient(jnp.where(moments.size > 0, beta, fallback))


def between_covariance(
    stats: Statistics,
    global_mean: jax.Array | None,
    within: jax.Array,
    *,
    form: str = "scalar",
    noise: jax.Array | None = None,
    fallback: float = 0.1,
) -> jax.Array:
    """Estimate the covariance B of class means between clients from moments.

    The estimate of DerSimonian and Laird, summed over classes,

        B = [T - sum_c (I_c - 1) Sigma] / sum_c (N_c - sum_i n_ic^2 / N_c),
        T = sum_ic n_ic (zbar_ic - m_c)(zbar_ic - m_c)^T,

    where `I_c` clients hold class c. It is unbiased before negative eigenvalues are
    clipped. Classes with one holder carry no information and are left out.

    Args:
      stats: Leaves `[m, ...]`. The noise `Sigma` that is subtracted is their own
        `within_covariance`, so that a shrunken `within` does not bias the result.
      global_mean: `[c, d]`, the pooled means of the same clients (`merge(stats).mean`,
        also meant by None). About another centre the result is too large.
      within: `[d, d]`, positive definite; the unit of the scalar form, and the noise if
        no client holds two samples of a class.
      form: "scalar" for `beta within` with one non-negative `beta`, see
        `between_scale`; "diagonal", negative entries clipped; "full", projected to
        the positive semi-definite matrices.
      noise: `[d, d]`, the covariance within where it is known already; then the
        scatters are not read and `stats.scatter` may be anything.
      fallback: The result is `fallback * within`, or its diagonal, if no class has two
        holders.

    Returns:
      `[d, d]` positive semi-definite in every form, a constant under `grad`.
    """
    if form not in BETWEEN_FORMS:
        raise ValueError(
            f"form must be one of {', '.join(BETWEEN_FORMS)}, got {form!r}"
        )
    check_number("fallback", fallback, 0)
    if form == "scalar":
        beta = between_scale(stats, global_mean, within, noise=noise, fallback=fallback)
        return jax.lax.stop_gradient(beta * within)
    moments = _between_moments(stats, global_mean, within, noise)
    known = moments.size > 0
    raw = jnp.where(known, divide(moments.excess, moments.size), fallback * within)
    raw = jax.lax.stop_gradient(raw)
    if form == "diagonal":
        return jnp.diag(jnp.maximum(jnp.diag(raw), 0))
    value, vector = jnp.linalg.eigh(_symmetrise(raw))
    return matmul(vector * jnp.maximum(value, 0)[None, :], vector.T)


# Fusion of a prior and a likelihood.


def kalman_gain(prior_cov: jax.Array, cov: jax.Array, count: jax.Array) -> jax.Array:
    """Compute the gain `K = B (B + Sigma / n)^-1` by one Cholesky factorisation.

    It is taken as `n B (n B + Sigma)^-1`, so that a count of 0 gives a gain of 0.

    Args:
      prior_cov: `[d, d]` B, positive semi-definite.
      cov: `[d, d]` Sigma, positive definite.
      count: `[]` n.

    Returns:
      `[d, d]`.
    """
    check_shapes(prior_cov=(prior_cov, "dd"), cov=(cov, "dd"), count=(count, ""))
    check_covariances(definite=False, prior_cov=prior_cov)
    check_covariances(definite=True, cov=cov)
    _check_count(count)
    scaled = count * prior_cov
    return cho_solve((_cholesky(scaled + cov), True), scaled).T


def gain_eigen(prior_cov: jax.Array, cov: jax.Array) -> GainBasis:
    """Diagonalise a prior and a noise covariance together, once for all counts.

    Args:
      prior_cov: `[d, d]` positive semi-definite; negative eigenvalues count as 0.
      cov: `[d, d]` positive definite.

    Returns:
      The basis, whose methods give `K(n)` and `V(n)`; a constant under `grad`.
    """
    check_shapes(prior_cov=(prior_cov, "dd"), cov=(cov, "dd"))
    check_covariances(definite=False, prior_cov=prior_cov)
    check_covariances(definite=True, cov=cov)
    prior_cov, cov = jax.lax.stop_gradient((prior_cov, cov))
    factor = _cholesky(cov)
    half = solve_triangular(factor, prior_cov, lower=True)
    whitened = solve_triangular(factor, half.T, lower=True)
    beta, vector = jnp.linalg.eigh(_symmetrise(whitened))
    return GainBasis(
        left=matmul(factor, vector),
        right=solve_triangular(factor, vector, lower=True, trans="T").T,
        beta=jnp.maximum(beta, 0),
    )


def joseph_covariance(
    gain: jax.Array, prior_cov: jax.Array, cov: jax.Array, count: jax.Array
) -> jax.Array:
    """Compute the error covariance of an update with any gain, the optimal or not.

    Joseph's form `(I - K) B (I - K)^T + K (Sigma / n) K^T` is positive semi-definite
    whatever the rounding. With the Kalman gain it is the posterior covariance.

    Args:
      gain: `[d, d]`; must be 0 where the count is 0.
      prior_cov: `[d, d]`.
      cov: `[d, d]`.
      count: `[]`.

    Returns:
      `[d, d]`.
    """
    check_shapes(
        gain=(gain, "dd"),
        prior_cov=(prior_cov, "dd"),
        cov=(cov, "dd"),
        count=(count, ""),
    )
    rest = jnp.eye(gain.shape[-1], dtype=gain.dtype) - gain
    noise = divide(cov, jnp.asarray(count, cov.dtype))
    return einsum("ij,jk,lk->il", rest, prior_cov, rest) + einsum(
        "ij,jk,lk->il", gain, noise, gain
    )


def _check_fuse(prior_mean, prior_cov, mean, cov, count) -> None:
    check_shapes(
        prior_mean=(prior_mean, "cd"),
        prior_cov=(prior_cov, "dd"),
        mean=(mean, "cd"),
        cov=(cov, "dd"),
        count=(count, "c"),
    )
    check_finite(prior_mean=prior_mean)
    check_covariances(definite=False, prior_cov=prior_cov)
    check_covariances(definite=True, cov=cov)
    _check_count(count)
    _check_means("mean", mean, count)


def _innovation(
    prior_mean: jax.Array, mean: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return `mean - prior_mean [c, d]`, 0 for absent classes, and float counts [c]."""
    # Selecting before subtracting keeps a NaN of an absent class out of gradients.
    present = (count > 0) & jnp.all(jnp.isfinite(mean), axis=1)
    delta = jnp.where(present[:, None], mean, prior_mean) - prior_mean
    return delta, jnp.where(present, count, 0).astype(delta.dtype)


def _posterior_mean(
    basis: GainBasis, prior_mean: jax.Array, delta: jax.Array, count: jax.Array
) -> jax.Array:
    scaled = count[:, None] * basis.beta[None, :]
    step = matmul(delta, basis.right.T) * (scaled / (1 + scaled))
    return prior_mean + matmul(step, basis.left.T)


def fuse(
    prior_mean: jax.Array,
    prior_cov: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fuse prior class means with a client's own, by the Kalman gain of each class.

    Numerics: one Cholesky factorisation and one eigendecomposition for all classes; no
    division by a count and no inverse of the prior, so count 0 returns the prior and
    `prior_cov` may be singular, or 0. Covariances are constants under `grad`.

    Args:
      prior_mean: `[c, d]` global class means.
      prior_cov: `[d, d]` covariance of class means between clients.
      mean: `[c, d]` the client's class means, ignored where the count is 0.
      cov: `[d, d]` covariance of features within a class, positive definite.
      count: `[c]` the client's samples.

    Returns:
      Posterior means `[c, d]` and their covariances `[c, d, d]`.

    Example:
      >>> import jax.numpy as jnp
      >>> prior_mean, mean = jnp.zeros((2, 1)), jnp.array([[2.0], [jnp.nan]])
      >>> count = jnp.array([4, 0])  # of the second class there are no samples
      >>> fused, cov = fuse(prior_mean, jnp.eye(1), mean, 4 * jnp.eye(1), count)
      >>> print(fused.ravel().round(3), cov.ravel().round(3))
      [1. 0.] [0.5 1. ]
    """
    _check_fuse(prior_mean, prior_cov, mean, cov, count)
    basis = gain_eigen(prior_cov, cov)
    delta, count = _innovation(prior_mean, mean, count)
    fused = _posterior_mean(basis, prior_mean, delta, count)
    return fused, jax.vmap(basis.covariance)(count)


def fuse_mean(
    prior_mean: jax.Array,
    prior_cov: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Return the means `[c, d]` of `fuse` without making covariances `[c, d, d]`."""
    _check_fuse(prior_mean, prior_cov, mean, cov, count)
    delta, count = _innovation(prior_mean, mean, count)
    return _posterior_mean(gain_eigen(prior_cov, cov), prior_mean, delta, count)


def fuse_information(
    prior_mean: jax.Array,
    prior_cov: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Compute `fuse` by adding precisions, `V^-1 = B^-1 + n Sigma^-1`.

    Costs a factorisation per class and needs a positive definite prior; unlike `fuse`
    it is differentiable in the covariances. Arguments and results are those of `fuse`.
    """
    _check_fuse(prior_mean, prior_cov, mean, cov, count)
    identity = jnp.eye(cov.shape[-1], dtype=cov.dtype)

    def invert(matrix: jax.Array) -> jax.Array:
        inverse = cho_solve((_cholesky(matrix), True), identity)
        return _symmetrise(inverse)

    prior_precision, precision = invert(prior_cov), invert(cov)

    def update(prior, delta, n):
        posterior = invert(prior_precision + n * precision)
        return prior + matmul(posterior, matmul(n * precision, delta)), posterior

    return each(update, prior_mean, *_innovation(prior_mean, mean, count))


def fuse_covariance(
    prior_cov: jax.Array, scatter: jax.Array, dof: jax.Array, *, strength: float
) -> jax.Array:
    """Fuse the global covariance within classes with a client's scatter.

    The posterior mean under an inverse Wishart prior,
    `(strength * prior_cov + scatter) / (strength + dof)`.

    Args:
      prior_cov: `[d, d]`.
      scatter: `[d, d]` scatter about the client's class means.
      dof: `[]` degrees of freedom of the scatter, samples minus classes present;
        counted as 0 if negative.
      strength: Degrees of freedom that the prior is worth, at least 0; infinity
        returns the prior.

    Returns:
      `[d, d]`; the prior if both weights are 0.
    """
    check_shapes(prior_cov=(prior_cov, "dd"), scatter=(scatter, "dd"), dof=(dof, ""))
    check_number("strength", strength, 0)
    check_covariances(definite=False, prior_cov=prior_cov, scatter=scatter)
    dof = jnp.maximum(jnp.asarray(dof, prior_cov.dtype), 0)
    total = dof + strength
    return (1 - divide(dof, total)) * prior_cov + divide(scatter, total)


def normal_inverse_wishart(
    prior_mean: jax.Array,
    prior_cov: jax.Array,
    mean: jax.Array,
    scatter: jax.Array,
    count: jax.Array,
    *,
    kappa: float,
    nu: float,
) -> tuple[jax.Array, jax.Array]:
    """Update class means and their tied covariance together.

    The conjugate update of `Sigma ~ IW`, `mu_c | Sigma ~ N(m_c, Sigma / kappa)`; the
    distance of each class mean from its prior counts as evidence on the covariance.

    Args:
      prior_mean: `[c, d]`.
      prior_cov: `[d, d]` prior mean of the covariance.
      mean: `[c, d]` class means, ignored where the count is 0.
      scatter: `[d, d]` scatter about the class means.
      count: `[c]`.
      kappa: Samples per class that the prior means are worth, at least 0.
      nu: Degrees of freedom of the prior covariance, greater than `d + 1`.

    Returns:
      Posterior means `[c, d]` and the posterior mean of the covariance `[d, d]`.
    """
    check_shapes(
        prior_mean=(prior_mean, "cd"),
        prior_cov=(prior_cov, "dd"),
        mean=(mean, "cd"),
        scatter=(scatter, "dd"),
        count=(count, "c"),
    )
    check_number("kappa", kappa, 0)
    check_finite(prior_mean=prior_mean)
    check_covariances(definite=False, prior_cov=prior_cov, scatter=scatter)
    _check_count(count)
    _check_means("mean", mean, count)
    dim = jnp.shape(prior_mean)[-1]
    check_number("nu", nu, dim + 1, strict=True)
    delta, count = _innovation(prior_mean, mean, count)
    gain = divide(count, count + kappa)
    strength = nu - dim - 1
    surprise = matmul((delta * (kappa * gain)[:, None]).T, delta)
    cov = (strength * prior_cov + scatter + surprise) / (strength + jnp.sum(count))
    return prior_mean + gain[:, None] * delta, cov


def fuse_global(
    mean: jax.Array,
    variance: jax.Array,
    measured: jax.Array,
    count: jax.Array,
    *,
    between: float = 0.0,
    process_noise: float = jnp.inf,
) -> tuple[jax.Array, jax.Array]:
    """Update the global class means by a round's pooled means, as a Kalman filter.

    Features move while the extractor learns, so old means are a prediction and the
    round's are a measurement. All covariances are multiples of the covariance within:
    `variance` of the prediction, `1 / N + between * sum_i n_i^2 / N^2` of the
    measurement.

    Args:
      mean: `[c, d]` global means so far.
      variance: `[c]` their variance, in units of the covariance within; infinite for
        means about which nothing is known, as before the first round.
      measured: `[c, d]` pooled means of the round's participants.
      count: `[m, c]` the participants' samples.
      between: The scale of the covariance between clients, see `between_scale`.
      process_noise: Variance added per round, at least 0. Infinity, the default,
        forgets the past: plain averaging. 0 is a running average.

    Returns:
      Means `[c, d]` and variances `[c]`. A class that nobody holds keeps its mean and
      gains the process noise.
    """
    check_shapes(
        mean=(mean, "cd"),
        variance=(variance, "c"),
        measured=(measured, "cd"),
        count=(count, "mc"),
    )
    check_number("between", between, 0)
    check_number("process_noise", process_noise, 0)
    count = count.astype(mean.dtype)
    total = jnp.sum(count, axis=0)
    seen = total > 0
    predicted = variance + process_noise
    noise = divide(1 + between * divide(jnp.sum(count**2, axis=0), total), total)
    # noise / predicted, not predicted / (predicted + noise): infinity gives gain 1.
    certain = predicted <= 0
    ratio = noise / jnp.where(certain, 1, predicted)
    gain = jnp.where(certain | ~seen, 0, 1 / (1 + ratio))
    delta = jnp.where(seen[:, None], measured, mean) - mean
    updated = mean + gain[:, None] * delta
    return updated, jnp.where(seen, gain * noise, predicted)


# Class probabilities.


def class_prior(count: jax.Array, concentration: float) -> jax.Array:
    """Estimate log class frequencies under a symmetric Dirichlet prior.

    Args:
      count: `[c]` the client's samples.
      concentration: Samples added to every class, greater than 0, since an absent
        class must keep some probability.

    Returns:
      `[c]` log probabilities; uniform for a client without samples.
    """
    check_shapes(count=(count, "c"))
    check_number("concentration", concentration, 0, strict=True)
    _check_count(count)
    smooth = count + concentration
    return jnp.log(smooth) - jnp.log(jnp.sum(smooth))


def plugin_head(
    mean: jax.Array,
    cov: jax.Array,
    log_prior: jax.Array,
    *,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Write the Gaussian classifier with a tied covariance as a linear layer.

    Args:
      mean: `[c, d]`.
      cov: `[d, d]` positive definite.
      log_prior: `[c]`.
      temperature: Multiplies the log-likelihood and not the prior; below 1 it tempers
        features that are more compact in training than in testing.

    Returns:
      Kernel `[d, c]` and bias `[c]`, so that `z @ kernel + bias` are the scores of
      `plugin_logits`.
    """
    check_shapes(mean=(mean, "cd"), cov=(cov, "dd"), log_prior=(log_prior, "c"))
    check_number("temperature", temperature, 0)
    check_finite(mean=mean, log_prior=log_prior)
    check_covariances(definite=True, cov=cov)
    kernel = cho_solve((_cholesky(cov), True), mean.T)
    bias = log_prior - temperature / 2 * einsum("cd,dc->c", mean, kernel)
    return temperature * kernel, bias


def plugin_logits(
    z: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    log_prior: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Score features by class Gaussians with known means, linearly in `z`.

    Args:
      z: `[b, d]`.
      mean: `[c, d]`.
      cov: `[d, d]` positive definite.
      log_prior: `[c]`.
      temperature: As in `plugin_head`.

    Returns:
      `[b, c]` log posterior class probabilities up to a constant per row.
    """
    check_shapes(z=(z, "bd"), mean=(mean, "cd"))
    check_finite(z=z)
    kernel, bias = plugin_head(mean, cov, log_prior, temperature=temperature)
    return _or_prior(matmul(z, kernel) + bias[None, :], log_prior)


def _or_prior(logits: jax.Array, log_prior: jax.Array) -> jax.Array:
    """Replace rows `[b, c]` that are not finite."""
    finite = jnp.all(jnp.isfinite(logits), axis=1, keepdims=True)
    return jnp.where(finite, logits, log_prior[None, :])


def predictive_logits(
    z: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    mean_cov: jax.Array,
    log_prior: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Score features by class Gaussians with the means' uncertainty integrated out.

    `p(z | c) = N(z; mean_c, cov + mean_cov_c)`, quadratic in `z`, and the determinant
    counts: without it classes with an uncertain mean would be preferred.

    Args:
      z: `[b, d]`.
      mean: `[c, d]` posterior means.
      cov: `[d, d]` positive definite.
      mean_cov: `[c, d, d]` posterior covariances of the means, as of `fuse`.
      log_prior: `[c]`.
      temperature: As in `plugin_head`.

    Returns:
      `[b, c]` log posterior class probabilities up to a constant per row.
    """
    check_shapes(
        z=(z, "bd"),
        mean=(mean, "cd"),
        cov=(cov, "dd"),
        mean_cov=(mean_cov, "cdd"),
        log_prior=(log_prior, "c"),
    )
    check_number("temperature", temperature, 0)
    check_finite(z=z, mean=mean, log_prior=log_prior)
    check_covariances(definite=True, cov=cov)
    check_covariances(definite=False, mean_cov=mean_cov)

    def score(center: jax.Array, spread: jax.Array) -> jax.Array:
        factor = _cholesky(cov + spread)
        white = solve_triangular(factor, (z - center[None, :]).T, lower=True)
        return -jnp.sum(white**2, axis=0) / 2 - jnp.sum(jnp.log(jnp.diag(factor)))

    likelihood = each(score, mean, mean_cov).T
    return _or_prior(temperature * likelihood + log_prior[None, :], log_prior)


# Distances.


def kl(
    mean0: jax.Array, cov0: jax.Array, mean1: jax.Array, cov1: jax.Array
) -> jax.Array:
    """Compute the Kullback-Leibler divergence of N(mean1, cov1) from N(mean0, cov0).

    Args:
      mean0: `[d]`, of the distribution that the expectation is taken over.
      cov0: `[d, d]` positive definite.
      mean1: `[d]`.
      cov1: `[d, d]` positive definite.

    Returns:
      `[]` nats.
    """
    _check_pair(mean0, cov0, mean1, cov1)
    factor0, factor1 = _cholesky(cov0), _cholesky(cov1)
    ratio = solve_triangular(factor1, factor0, lower=True)
    shift = solve_triangular(factor1, mean1 - mean0, lower=True)
    # The ratio is triangular with diagonal r_k: log-determinants need no difference.
    logdet = 2 * jnp.sum(jnp.log(jnp.diag(ratio)))
    return (jnp.sum(ratio**2) + jnp.sum(shift**2) - mean0.shape[-1] - logdet) / 2


def bures_wasserstein(
    mean0: jax.Array, cov0: jax.Array, mean1: jax.Array, cov1: jax.Array
) -> jax.Array:
    """Compute the squared 2-Wasserstein distance between two Gaussians.

    The trace of `(cov0^1/2 cov1 cov0^1/2)^1/2` is the sum of the singular values of
    `L0^T L1` for Cholesky factors, whose derivative is finite for repeated values.

    Args:
      mean0: `[d]`.
      cov0: `[d, d]` positive definite.
      mean1: `[d]`.
      cov1: `[d, d]` positive definite.

    Returns:
      `[]`, at least 0.
    """
    _check_pair(mean0, cov0, mean1, cov1)
    factor0, factor1 = _cholesky(cov0), _cholesky(cov1)
    overlap = jnp.linalg.svd(matmul(factor0.T, factor1), compute_uv=False)
    shape = jnp.trace(cov0) + jnp.trace(cov1) - 2 * jnp.sum(overlap)
    return jnp.sum((mean0 - mean1) ** 2) + jnp.maximum(shape, 0)


def _check_pair(mean0, cov0, mean1, cov1) -> None:
    check_shapes(
        mean0=(mean0, "d"), cov0=(cov0, "dd"), mean1=(mean1, "d"), cov1=(cov1, "dd")
    )
    check_finite(mean0=mean0, mean1=mean1)
    check_covariances(definite=True, cov0=cov0, cov1=cov1)
