"""Mixtures that clients share: proportions, merged M-steps, densities, good starts.

Client `i` draws its samples from components that all clients share, in proportions of
its own,

    p_i(x) = sum_k pi_ik p_k(x),

and all that inference asks of a component is a table of log densities `log p_k(x_s)`,
`[s, k]`, whatever they come from: Gaussians, bounds of VAEs, minus the losses of
predictors (FedEM) or sums of such terms over pairs of components, flattened (FedGMM).
The functions compute responsibilities and proportions from such a table, sufficient
statistics that merge exactly over clients, Gaussian and VAE log densities, and what
keeps a federated mixture from collapsing: farthest-first seeds, annealing with
balanced masses, an estimate of the number of components, matching of components.

They are written for ONE client (`jax.vmap` them for more) unless a shape begins with
`n`, hold no state, and work under `jit`, `vmap` and `grad`, in float32 and float64.
Letters in shapes: `n` clients, `s` samples, `k` components, `d` features, `l`
importance samples, `q` latent variables. Densities are in nats and are summed, never
averaged, over features: a mean over features is a temperature in disguise.

Bad input: wrong shapes raise a `ValueError`, also while tracing; wrong values do so
where they are known, that is outside of `jit` and `vmap`. Inside, results stay finite:

- Log densities are clipped to `+-1e30` nats, and NaN becomes `-1e30`. A density of 0
  is thereby legal everywhere. A sample that no component explains tells nothing, so
  its responsibilities are the proportions.
- Proportions that are negative or NaN count as 0, and uniform if that leaves none. A
  component of proportion 0 takes no part, and its derivative is 0.
- A mask of zeros makes proportions uniform, a concentration below 1 or NaN counts as 1.
- A covariance that is not positive definite gives its component the log density
  `-1e30`, and samples of the standard normal distribution about its mean.
- A component without weight has mean 0 and the pooled covariance.

What is a reconstruction: FedGMI (Hou et al., 2026) was known from its abstract only.
The E-step is the exact coordinate ascent on `sum_s logsumexp_k(log pi_k + ELBO_k)`;
farthest-first seeds, annealing and balance are this project's own remedies, and the
balance is solved as the entropic transport problem that it is. The statistics of
FedGMM (Wu et al., 2023) are those of exact EM; `merge(..., between=False)` leaves out
the scatter between clients, as that paper's published code does.

References:
  Hou, Shi, Fan and Letaief, FedGMI, arXiv:2605.08760.
  Wu et al., Personalized Federated Learning under Mixture of Distributions (FedGMM),
    ICML 2023.
  Marfoq et al., Federated Multi-Task Learning under a Mixture of Distributions
    (FedEM), NeurIPS 2021.
  Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM
    algorithm, 1977. Lindsay, The geometry of mixture likelihoods, 1983.
  Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, ICLR 2016.
  Loaiza-Ganem and Cunningham, The continuous Bernoulli, NeurIPS 2019.
  Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
  Cuturi, Sinkhorn distances, NeurIPS 2013.
  Gavish and Donoho, The optimal hard threshold for singular values is 4/sqrt(3), 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp

from fedgen._matrices import each
from fedgen.aggregators._checks import (
    check_finite,
    check_number,
    check_shapes,
    check_values,
    is_known,
)
from fedgen.aggregators._numerics import divide, einsum, matmul

COVARIANCE_FORMS = ("full", "tied", "diagonal", "scalar")

_STEPS = 0.5 ** np.arange(8)  # of Newton's direction

# Nats, what stands for no density at all; far from both ends of float32, so that sums
# stay finite.
BOUND = 1e30


class Statistics(NamedTuple):
    """What weighted samples say about the Gaussian of each component."""

    count: jax.Array  # [k] sum of responsibilities, S_0
    mean: jax.Array  # [k, d] S_1 / S_0, 0 where the count is 0
    scatter: jax.Array  # [k, d, d] sum of r (x - mean)(x - mean)^T


# Checks of values, which are skipped while tracing.


def _check_table(log_density, mask, prefix: str = "") -> None:
    shapes = {"log_density": (log_density, prefix + "sk"), "mask": (mask, prefix + "s")}
    check_shapes(**shapes)
    if is_known(log_density, mask):
        rows = np.asarray(log_density)[np.asarray(mask, bool)]
        check_values(
            "log_density", rows, "below infinity and not NaN", lambda x: x < np.inf
        )


def _check_proportions(proportions) -> None:
    def valid(x):
        some = x.sum(axis=-1, keepdims=True) > 0
        return np.isfinite(x) & (x >= 0) & some

    rule = "finite, >= 0 and not all 0"
    check_values("proportions", proportions, rule, valid)


def _check_mask(mask) -> None:
    if is_known(mask) and not np.any(mask):
        raise ValueError("mask must hold a sample, got zeros only")


def _check_gaussians(mean, cov) -> None:
    check_finite(mean=mean, cov=cov)
    if is_known(cov):
        # Inside of a trace a known covariance would be factorised by the trace.
        with jax.ensure_compile_time_eval():
            proper = np.asarray(_factorise(jnp.asarray(cov))[1])
        if not proper.all():
            wrong = np.flatnonzero(~proper).tolist()
            raise ValueError(f"cov must be positive definite, got components {wrong}")


# Responsibilities and proportions.


def _float(array) -> jax.Array:
    return jnp.asarray(array, jnp.result_type(array, jnp.float32))


def _bounded(log_density: jax.Array) -> jax.Array:
    log_density = _float(log_density)
    bounded = jnp.clip(log_density, -BOUND, BOUND)
    return jnp.where(jnp.isnan(log_density), -BOUND, bounded)


def _masked_table(log_density: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the table with finite entries, 0 in masked rows."""
    return jnp.where(mask[..., None], _bounded(log_density), 0)


def _log_proportions(proportions: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return logarithms, `-inf` for components that take no part."""
    proportions = jnp.asarray(proportions, dtype)
    positive = proportions > 0
    log = jnp.log(jnp.where(positive, proportions, 1))
    some = jnp.any(positive, axis=-1, keepdims=True)
    uniform = -math.log(proportions.shape[-1])
    return jnp.where(some, jnp.where(positive, log, -jnp.inf), uniform)


def _relative(table: jax.Array) -> jax.Array:
    return table - jax.lax.stop_gradient(jnp.max(table, axis=-1, keepdims=True))


def _logits(table: jax.Array, proportions: jax.Array) -> jax.Array:
    """Add log proportions to densities relative to the largest that takes part.

    The proportions are thus not lost to rounding, however low the densities are.
    """
    log = _log_proportions(proportions, table.dtype)[..., None, :]
    return _relative(jnp.where(jnp.isfinite(log), table, -BOUND)) + log


def responsibilities(
    log_density: jax.Array, proportions: jax.Array, mask: jax.Array
) -> jax.Array:
    """Compute how much of every sample is due to every component: the E-step.

    `r_sk = softmax_k(log pi_k + log p_k(x_s))`. Unchanged if a constant is added to a
    row, so that densities need a common normaliser only.

    Args:
      log_density: `[s, k]`; `-inf` for a density of 0.
      proportions: `[k]`, at least 0; their scale does not matter.
      mask: `[s]`, true for samples that exist. Rows of others may hold NaN.

    Returns:
      `[s, k]`, rows summing to 1; masked rows are 0.

    Raises:
      ValueError: If NaN or infinite densities, or proportions that are negative, NaN
        or all 0, are known when the function is called.

    Example:
      >>> import jax.numpy as jnp
      >>> table = jnp.log(jnp.array([[0.8, 0.2], [0.3, 0.3]]))
      >>> r = responsibilities(table, jnp.array([0.5, 0.5]), jnp.array([True, True]))
      >>> print(np.asarray(r).round(2))
      [[0.8 0.2]
       [0.5 0.5]]
    """
    _check_table(log_density, mask)
    check_shapes(log_density=(log_density, "sk"), proportions=(proportions, "k"))
    _check_proportions(proportions)
    mask = jnp.asarray(mask, bool)
    logits = _logits(_masked_table(log_density, mask), proportions)
    return jnp.where(mask[:, None], jax.nn.softmax(logits, axis=-1), 0)


def log_evidence(
    log_density: jax.Array, proportions: jax.Array, mask: jax.Array
) -> jax.Array:
    """Compute the log density of the mixture, `logsumexp_k(log pi_k + log p_k(x_s))`.

    The score of FedGMM for samples unlike all that the client holds.

    Args:
      log_density: `[s, k]`.
      proportions: `[k]`, which sum to 1 for a density.
      mask: `[s]`.

    Returns:
      `[s]` nats, 0 in masked rows; at least about `-1e30`, for a density of 0.
    """
    _check_table(log_density, mask)
    check_shapes(log_density=(log_density, "sk"), proportions=(proportions, "k"))
    _check_proportions(proportions)
    mask = jnp.asarray(mask, bool)
    table = _masked_table(log_density, mask)
    log = _log_proportions(proportions, table.dtype)
    return jnp.where(mask, logsumexp(table + log[None], axis=-1), 0)


def log_likelihood(
    log_density: jax.Array, proportions: jax.Array, mask: jax.Array
) -> jax.Array:
    """Sum the log density of the mixture over samples; concave in the proportions.

    Arguments are those of `log_evidence`. Returns `[]` nats.
    """
    return jnp.sum(log_evidence(log_density, proportions, mask))


def log_posterior(
    log_density: jax.Array,
    proportions: jax.Array,
    mask: jax.Array,
    *,
    concentration: float = 1.0,
) -> jax.Array:
    """Add to the log likelihood the log Dirichlet prior, up to its constant.

    What `fit_proportions` maximises, `sum_s log p(x_s) + (a - 1) sum_k log pi_k`.

    Args:
      log_density: `[s, k]`.
      proportions: `[k]`.
      mask: `[s]`.
      concentration: `a` of the symmetric Dirichlet prior, at least 1.

    Returns:
      `[]` nats.
    """
    excess = _concentration(concentration) - 1
    likelihood = log_likelihood(log_density, proportions, mask)
    log = _log_proportions(proportions, likelihood.dtype)
    return likelihood + jnp.sum(excess * jnp.maximum(log, -BOUND))


def _concentration(concentration) -> jax.Array:
    check_shapes(concentration=(concentration, ""))
    check_values("concentration", concentration, ">= 1", lambda x: x >= 1)
    return jnp.where(concentration >= 1, concentration, 1.0)


def fit_proportions(
    log_density: jax.Array,
    mask: jax.Array,
    *,
    concentration: float = 1.0,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> jax.Array:
    """Fit a client's proportions to fixed components by EM, from a uniform start.

    `pi_k <- (sum_s r_sk + a - 1) / (s + k (a - 1))`, whose every step raises
    `log_posterior`, a concave function. The growth `pi_k' / pi_k` of a step is that
    function's derivative, so by concavity `max_k pi_k' / pi_k - 1` bounds how far the
    objective is below its maximum, in nats per sample, the prior's `k (a - 1)` samples
    included. EM stops when that bound is below the tolerance.

    Numerics: densities relative to the largest of their row are exponentiated once,
    outside of the loop, so a step is two products of matrix and vector. What is
    more than 87 nats (745 in float64) below a row's maximum counts as 0. The bound has
    rounding errors itself and is not asked to be below 16 units of rounding.

    Differentiation: the result is a constant under `grad`, which by the envelope
    theorem leaves the derivative of the maximised `log_posterior` exact.

    Args:
      log_density: `[s, k]`; `-inf` for a density of 0.
      mask: `[s]`, true for samples that exist. Rows of others may hold NaN.
      concentration: `a` of a symmetric Dirichlet prior, at least 1; 1 is maximum
        likelihood, infinity gives uniform proportions.
      tolerance: Nats per sample, at least 0.
      max_steps: Steps after which to stop anyway, at least 1.

    Returns:
      `[k]`, summing to 1. Components that explain samples equally well stay equal.

    Raises:
      ValueError: For a mask of zeros, a concentration below 1 and densities that are
        NaN or infinite, if they are known when the function is called.

    Example:
      >>> import jax.numpy as jnp
      >>> apart = -900 * jnp.array([[0, 1], [0, 1], [0, 1], [1, 0]])
      >>> print(fit_proportions(apart, jnp.ones(4)))
      [0.75 0.25]
      >>> print(fit_proportions(apart, jnp.ones(4), concentration=3.0))
      [0.625 0.375]
    """
    _check_table(log_density, mask)
    _check_mask(mask)
    check_number("tolerance", tolerance, 0)
    check_number("max_steps", max_steps, 1)
    mask = jnp.asarray(mask, bool)
    table = jax.lax.stop_gradient(_relative(_masked_table(log_density, mask)))
    density = jnp.where(mask[:, None], jnp.exp(table), 0).T  # [k, s]
    num_components, dtype = density.shape[0], density.dtype

    count = jnp.sum(mask).astype(dtype)
    excess = (_concentration(concentration) - 1).astype(dtype)
    share = divide(count, count + num_components * excess)  # of the data
    tolerance = jnp.maximum(tolerance, 16 * jnp.finfo(dtype).eps).astype(dtype)

    def unfinished(state):
        step, _, bound = state
        return (step < max_steps) & (bound > tolerance)

    def improve(state):
        step, proportions, _ = state
        evidence = matmul(proportions, density)
        weight = divide(mask.astype(dtype), evidence)
        total = proportions * matmul(density, weight)  # sum_s r_sk
        updated = share * divide(total, count) + (1 - share) / num_components
        return step + 1, updated, jnp.max(divide(updated, proportions)) - 1

    start = jnp.full([num_components], 1 / num_components, dtype)
    state = jnp.zeros([], jnp.int32), start, jnp.full([], jnp.inf, dtype)
    return jax.lax.while_loop(unfinished, improve, state)[1]


# Weighted M-step of Gaussian components.


def component_statistics(x: jax.Array, responsibility: jax.Array) -> Statistics:
    """Compute the sufficient statistics of one client's weighted samples.

    Two passes: the scatter is taken of features already centred on the component's
    mean, since `S_2 - S_1 S_1^T / S_0` cancels where means exceed deviations.

    Args:
      x: `[s, d]`. Rows without responsibility may hold NaN.
      responsibility: `[s, k]`, as of `responsibilities`, 0 in masked rows.

    Returns:
      Statistics in the dtype of `x` but at least float32. While tracing, rows of
      `x` that are not finite and responsibilities that are not positive count as 0.
    """
    check_shapes(x=(x, "sd"), responsibility=(responsibility, "sk"))
    check_values(
        "responsibility",
        responsibility,
        "finite and >= 0",
        lambda r: np.isfinite(r) & (r >= 0),
    )
    if is_known(x, responsibility):
        check_finite(x=np.asarray(x)[np.any(np.asarray(responsibility) > 0, axis=1)])
    x = _float(x)
    usable = jnp.all(jnp.isfinite(x), axis=1)[:, None]
    weight = jnp.where(usable & (responsibility > 0), responsibility, 0).astype(x.dtype)
    x = jnp.where(usable & jnp.any(weight > 0, axis=1, keepdims=True), x, 0)
    count = jnp.sum(weight, axis=0)
    mean = divide(matmul(weight.T, x), count[:, None])
    delta = x[:, None] - mean[None]
    scatter = einsum("skd,ske->kde", weight[..., None] * delta, delta)
    return Statistics(count, mean, scatter)


def merge(stats: Statistics, *, between: bool = True) -> Statistics:
    """Merge the statistics of `n` clients into those of their pooled samples.

    Exact: to the clients' scatters it adds the scatter between their means,
    `sum_i n_ik (mean_ik - mean_k)(mean_ik - mean_k)^T`.

    Args:
      stats: Leaves `[n, ...]`.
      between: Whether to add the scatter between clients. False averages covariances,
        as the published code of FedGMM does, and makes them too small.

    Returns:
      Statistics with leaves `[...]`. A client's mean of a component of which it has
      nothing may be anything.
    """
    _check_statistics(stats, "n")
    present = stats.count > 0
    total = jnp.sum(stats.count, axis=0)
    local = jnp.where(present[..., None], stats.mean, 0)
    mean = einsum("nk,nkd->kd", divide(stats.count, total[None]), local)
    scatter = jnp.sum(stats.scatter, axis=0)
    if between:
        delta = jnp.where(present[..., None], local - mean[None], 0)
        weighted = stats.count[..., None] * delta
        scatter = scatter + einsum("nkd,nke->kde", weighted, delta)
    return Statistics(total, mean, scatter)


def _check_statistics(stats: Statistics, prefix: str) -> None:
    check_shapes(
        **{
            "stats.count": (stats.count, prefix + "k"),
            "stats.mean": (stats.mean, prefix + "kd"),
            "stats.scatter": (stats.scatter, prefix + "kdd"),
        }
    )


def maximise(
    stats: Statistics, *, form: str = "full", strength: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turn statistics into means, covariances and weights: the M-step.

    Covariances are `(S_k + strength * S / N) / (N_k + strength)` with the scatter `S`
    and count `N` of all components: those with few samples borrow from the rest.
    `vmap(gaussian.shrink, (0, None))` puts a floor under eigenvalues that remain 0.

    Args:
      stats: Leaves `[k, ...]`.
      form: "full"; "tied", one covariance for all components; "diagonal"; or
        "scalar", a multiple of the identity each.
      strength: Samples that the pooled covariance is worth, at least 0.

    Returns:
      Means `[k, d]`, covariances `[k, d, d]` and weights `[k]`, which sum to 1. A
      component without weight has mean 0 and the pooled covariance, and weights
      are uniform if there is no sample at all, while covariances are the identity.

    Raises:
      ValueError: If a component is known to be empty.
    """
    _check_statistics(stats, "")
    check_number("strength", strength, 0)
    if form not in COVARIANCE_FORMS:
        expected = ", ".join(COVARIANCE_FORMS)
        raise ValueError(f"form must be one of {expected}, got {form!r}")
    check_values("stats.count", stats.count, "> 0", lambda x: x > 0)
    num_components, dim = jnp.shape(stats.mean)
    identity = jnp.eye(dim, dtype=stats.mean.dtype)[None]
    present = (stats.count > 0)[:, None]

    count = jnp.where(present[:, 0], stats.count, 0)
    scatter = jnp.where(present[..., None], stats.scatter, 0)
    total = jnp.sum(count)
    pooled = divide(jnp.sum(scatter, axis=0, keepdims=True), total)
    pooled = jnp.where(total > 0, pooled, identity)
    size = (count + strength)[:, None, None]
    cov = divide(scatter + strength * pooled, size)
    cov = jnp.where(size > 0, cov, pooled)
    if form == "tied":
        cov = jnp.broadcast_to(pooled, cov.shape)
    elif form == "diagonal":
        cov = cov * identity
    elif form == "scalar":
        cov = jnp.trace(cov, axis1=1, axis2=2)[:, None, None] / dim * identity
    weight = jnp.where(total > 0, divide(count, total), 1 / num_components)
    return jnp.where(present, stats.mean, 0), cov, weight


# Gaussian components.


def _factorise(cov: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return Cholesky factors `[k, d, d]` and which `[k]` covariances have one."""
    factor = each(jnp.linalg.cholesky, jax.lax.stop_gradient(cov))
    proper = jnp.all(jnp.isfinite(factor), axis=(1, 2))
    identity = jnp.eye(cov.shape[-1], dtype=cov.dtype)[None]
    # Replaced before it is factorised: NaN would enter derivatives otherwise.
    sound = jnp.where(proper[:, None, None], cov, identity)
    return each(jnp.linalg.cholesky, sound), proper


def gaussian_log_density(
    x: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute the log density of every sample under every Gaussian component.

    By Cholesky factors and their inverses; no determinant and no covariance's inverse
    is formed.

    Args:
      x: `[s, d]`.
      mean: `[k, d]`.
      cov: `[k, d, d]` positive definite; diagonal ones as the matrices they are.
      mask: `[s]`, true for samples that exist; all of them by default. Rows of others
        may hold NaN.

    Returns:
      `[s, k]` nats, 0 in masked rows. While tracing, samples that are not finite and
      components whose covariance is not positive definite have `-1e30`.

    Raises:
      ValueError: If samples, means or covariances are known not to be finite, or
        covariances not to be positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> x, mean, cov = jnp.zeros([1, 2]), jnp.zeros([1, 2]), jnp.eye(2)[None]
      >>> print(np.asarray(gaussian_log_density(x, mean, cov)).round(4))
      [[-1.8379]]
    """
    if mask is None:
        mask = np.ones(jnp.shape(x)[:1], bool)
    check_shapes(x=(x, "sd"), mean=(mean, "kd"), cov=(cov, "kdd"), mask=(mask, "s"))
    _check_gaussians(mean, cov)
    if is_known(x, mask):
        check_finite(x=np.asarray(x)[np.asarray(mask, bool)])
    x, mask = _float(x), jnp.asarray(mask, bool)
    finite = jnp.all(jnp.isfinite(x), axis=1)
    x = jnp.where((mask & finite)[:, None], x, 0)
    factor, proper = _factorise(cov)
    proper = proper & jnp.all(jnp.isfinite(mean), axis=1)
    mean = jnp.where(proper[:, None], mean, 0)

    def density(center: jax.Array, factor: jax.Array) -> jax.Array:
        # As accurate as to solve for all samples, and 40 times faster for few features.
        inverse = solve_triangular(
            factor, jnp.eye(len(factor), dtype=x.dtype), lower=True
        )
        white = matmul(x - center[None], inverse.T)
        scale = jnp.sum(jnp.log(2 * jnp.pi * jnp.diag(factor) ** 2))
        return -(jnp.sum(white**2, axis=1) + scale) / 2

    table = each(density, mean, factor).T
    table = jnp.where(finite[:, None] & proper[None], table, -BOUND)
    return jnp.where(mask[:, None], table, 0)


def sample(
    key: jax.Array,
    mean: jax.Array,
    cov: jax.Array,
    proportions: jax.Array,
    num_samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Draw from a Gaussian mixture.

    Args:
      key: Consumed.
      mean: `[k, d]`.
      cov: `[k, d, d]` positive definite.
      proportions: `[k]`.
      num_samples: Number of samples `s`, at least 1.

    Returns:
      Samples `[s, d]` and the components `[s]` that they were drawn from.
    """
    check_shapes(mean=(mean, "kd"), cov=(cov, "kdd"), proportions=(proportions, "k"))
    _check_gaussians(mean, cov)
    _check_proportions(proportions)
    check_number("num_samples", num_samples, 1)
    key_component, key_noise = jax.random.split(key)
    log = _log_proportions(proportions, mean.dtype)
    component = jax.random.categorical(key_component, log, shape=(num_samples,))
    noise = jax.random.normal(key_noise, (num_samples, mean.shape[1]), mean.dtype)
    factor, _ = _factorise(cov)
    return mean[component] + einsum("sde,se->sd", factor[component], noise), component


# Variational auto-encoders as components. No network here: arrays and callables.


def bernoulli_log_prob(x: jax.Array, logits: jax.Array) -> jax.Array:
    """Compute `log p(x | z)` of a Bernoulli decoder, `[..., d] -> [...]`.

    Soft targets in `[0, 1]` are allowed, though the density then has no normaliser:
    it serves to compare components, not to report bits per feature.

    Numerics: `x a - log(1 + exp(a))` for logits `a`, arranged to be exact for large
    ones, with the right slope at 0. `optax.losses.sigmoid_binary_cross_entropy` takes
    two `logaddexp` for an entry, several times as long on a CPU, and these tables are
    most of what an E-step costs.
    """
    _check_same_shape(x=x, logits=logits)
    size = jnp.abs(logits)
    log_prob = (x - 0.5) * logits - size / 2 - jnp.log1p(jnp.exp(-size))
    return jnp.sum(log_prob, axis=-1)


def continuous_bernoulli_log_prob(x: jax.Array, logits: jax.Array) -> jax.Array:
    """Compute `log p(x | z)` of a continuous Bernoulli decoder, `[..., d] -> [...]`.

    Adds to the Bernoulli density its normaliser on `[0, 1]`, `a / tanh(a / 2)` for
    logits `a`, by its series near 0.
    """
    _check_same_shape(x=x, logits=logits)
    near = jnp.abs(logits) < 0.02
    safe = jnp.where(near, 1, logits)
    square = jnp.where(near, logits, 0) ** 2
    series = square / 12 - 7 * square**2 / 1440
    scale = jnp.where(near, series, jnp.log(safe / (2 * jnp.tanh(safe / 2))))
    return bernoulli_log_prob(x, logits) + jnp.sum(jnp.log(2.0) + scale, axis=-1)


def normal_log_prob(
    x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
    """Compute the log density of independent normals, `[..., d] -> [...]`.

    Args:
      x: `[..., d]`.
      mean: `[..., d]`.
      log_variance: `[..., d]`, or `[]` for one variance, as a decoder learns. Its term
        is part of the density: components with variances of their own need it.

    Returns:
      `[...]` nats.
    """
    _check_same_shape(x=x, mean=mean)
    if jnp.ndim(log_variance):
        _check_same_shape(x=x, log_variance=log_variance)
    square = (x - mean) ** 2 * jnp.exp(-log_variance)
    return -jnp.sum(square + log_variance + math.log(2 * math.pi), axis=-1) / 2


def kl_to_standard_normal(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Compute the divergence of N(0, I) from N(mean, exp(log_variance)).

    `(mean^2 + exp(log_variance) - 1 - log_variance) / 2`, summed, `[..., q] -> [...]`.
    """
    _check_same_shape(mean=mean, log_variance=log_variance)
    # expm1: the difference cancels for codes close to the prior.
    excess = jnp.expm1(log_variance) - log_variance
    return jnp.sum(mean**2 + excess, axis=-1) / 2


def elbo(log_prob: jax.Array, kl: jax.Array) -> jax.Array:
    """Compute the evidence lower bound with a divergence in closed form.

    Args:
      log_prob: `[l, ...]` `log p(x | z)` for `z` drawn from `q(z | x)`.
      kl: `[...]` divergence of the prior from `q(z | x)`.

    Returns:
      `[...]` nats, within `+-1e30`; `-1e30` for NaN while tracing.
    """
    _check_same_shape(log_prob=log_prob[0], kl=kl)
    check_values("log_prob", log_prob, "not NaN", lambda x: ~np.isnan(x))
    check_values("kl", kl, "not NaN", lambda x: ~np.isnan(x))
    return _bounded(jnp.mean(_bounded(log_prob), axis=0) - kl)


def importance_bound(log_weight: jax.Array) -> jax.Array:
    """Compute the importance-weighted bound, the log of the mean weight.

    `log (1/l) sum_j exp(w_j)` with `w = log p(x | z) + log p(z) - log q(z | x)`. It
    rises to `log p(x)` with `l`, so that differences in how tight components' bounds
    are distort proportions less than with the ELBO, which is its mean for `l = 1`.

    Args:
      log_weight: `[l, ...]`, such as `[l, s, k]` for a table of log densities `[s, k]`.

    Returns:
      `[...]` nats, within `+-1e30`. While tracing, NaN counts as a weight of 0.

    Raises:
      ValueError: If weights are known to be NaN or infinite; a weight of 0 is legal.

    Example:
      >>> import jax.numpy as jnp
      >>> bound = importance_bound(jnp.log(jnp.array([[0.1], [0.3]])))
      >>> print(np.exp(bound).round(3))
      [0.2]
    """
    check_values(
        "log_weight", log_weight, "below infinity and not NaN", lambda x: x < np.inf
    )
    num_samples = jnp.shape(log_weight)[0]
    return logsumexp(_bounded(log_weight), axis=0) - math.log(num_samples)


def vae_log_density(
    key: jax.Array,
    x: jax.Array,
    encode: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    num_samples: int,
    bound: str = "importance",
) -> jax.Array:
    """Bound the log density of samples under a VAE with a standard normal prior.

    For the table of several components, `vmap` over their parameters with
    `out_axes=1` and the same key: common noise makes a row's entries comparable.

    Args:
      key: Consumed.
      x: `[s, ...]`.
      encode: From `x` to the mean and log variance `[s, q]` of `q(z | x)`.
      log_prob: From `x` and `z [s, q]` to `log p(x | z) [s]`.
      num_samples: Importance samples `l`, at least 1.
      bound: "importance" or "elbo", see `importance_bound` and `elbo`.

    Returns:
      `[s]` nats, within `+-1e30`; `-1e30` for NaN while tracing.
    """
    check_number("num_samples", num_samples, 1)
    if bound not in ("importance", "elbo"):
        raise ValueError(f"bound must be one of importance, elbo, got {bound!r}")
    mean, log_variance = encode(x)
    _check_same_shape(mean=mean, log_variance=log_variance)
    noise = jax.random.normal(key, (num_samples, *mean.shape), mean.dtype)
    z = mean[None] + jnp.exp(log_variance / 2)[None] * noise
    likelihood = jax.vmap(log_prob, in_axes=(None, 0))(x, z)
    if bound == "elbo":
        return elbo(likelihood, kl_to_standard_normal(mean, log_variance))
    # log p(z) - log q(z | x), whose normalisers cancel.
    ratio = jnp.sum(noise**2 - z**2 + log_variance[None], axis=-1) / 2
    return importance_bound(likelihood + ratio)


def _check_same_shape(**arrays) -> None:
    (first, array), *others = arrays.items()
    shape = jnp.shape(array)
    for name, other in others:
        if jnp.shape(other) != shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {shape}, "
                f"got {jnp.shape(other)}"
            )


# Starts that do not collapse.


def farthest_first(
    cross_density: jax.Array, num_seeds: int, *, mask: jax.Array | None = None
) -> jax.Array:
    """Choose clients whose models start the components, far from one another.

    The distance of two clients is what each loses under the other's model,
    `d_ij = (C_ii - C_ij) + (C_jj - C_ji)`. The first seed is of the pair farthest
    apart, which are the purest clients, and the next is always the client farthest
    from its nearest seed. Ties go to the lower index.

    Args:
      cross_density: `[n, n]` `C`, mean log density of client `i` under `j`'s model.
      num_seeds: Number of components `k`, at least 1 and at most `n`.
      mask: `[n]`, true for clients that exist; all of them by default. Rows and
        columns of others may hold NaN, and they are chosen last.

    Returns:
      `[k]` distinct clients. While tracing, NaN is a distance of 0, and infinities
      are clipped to `+-1e30`.

    Raises:
      ValueError: If there are fewer clients than seeds, or entries known to be NaN or
        infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> own = jnp.array([0.0, 0.1, 5.0])
      >>> print(farthest_first(-jnp.abs(own[:, None] - own[None]), 2))
      [0 2]
    """
    if mask is None:
        mask = np.ones(jnp.shape(cross_density)[:1], bool)
    check_shapes(cross_density=(cross_density, "nn"), mask=(mask, "n"))
    _check_seeds(num_seeds, jnp.shape(cross_density)[0], "the clients")
    if is_known(mask):
        _check_seeds(num_seeds, int(np.sum(np.asarray(mask, bool))), "unmasked clients")
    if is_known(cross_density, mask):
        exists = np.asarray(mask, bool)
        check_finite(cross_density=np.asarray(cross_density)[exists][:, exists])
    mask = jnp.asarray(mask, bool)
    cross = jnp.clip(_float(cross_density), -BOUND, BOUND)
    loss = jnp.diag(cross)[:, None] - cross
    distance = jnp.nan_to_num(loss + loss.T, nan=0.0)
    distance = jnp.where(mask[:, None] & mask[None], distance, -4 * BOUND)

    def choose(nearest, _):
        seed = jnp.argmax(nearest)
        nearest = jnp.minimum(nearest, distance[seed]).at[seed].set(-jnp.inf)
        return nearest, seed

    return jax.lax.scan(choose, jnp.max(distance, axis=1), length=num_seeds)[1]


def _check_seeds(num_seeds: int, available: int, what: str) -> None:
    if not 1 <= num_seeds <= available:
        raise ValueError(
            f"num_seeds must be from 1 to {available}, {what}, got {num_seeds}"
        )


def balanced_responsibilities(
    log_density: jax.Array,
    proportions: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    balance: bool = True,
    tolerance: float = 1e-3,
    max_steps: int = 100,
) -> tuple[jax.Array, jax.Array]:
    """Compute annealed responsibilities that give every component equal total mass.

    `r_isk = softmax_k((log pi_ik + log p_k(x_is) - b_k) / tau)` with offsets `b` such
    that `sum_is r_isk` is the same for all `k`. For the first rounds of training, when
    the component that is ahead would take every sample; with temperatures that fall
    geometrically to 1, as `optax.exponential_decay` does. Proportions fitted at a
    temperature are biased: they must not outlive the annealing.

    The offsets minimise `sum_is logsumexp_k(logit - b / tau) + mass * sum_k b_k / tau`,
    the convex semi-dual of entropic transport. Each step takes the best one of
    Newton's, whole or halved a few times, and Sinkhorn's, which always descends.

    Args:
      log_density: `[n, s, k]`.
      proportions: `[n, k]`.
      mask: `[n, s]`.
      temperature: `tau`, greater than 0; infinity makes responsibilities uniform.
      balance: Whether to equalise masses; if not, offsets are 0, and temperature 1
        is the plain E-step.
      tolerance: Largest relative deviation of a component's mass.
      max_steps: Steps after which to stop anyway, at least 1.

    Returns:
      Responsibilities `[n, s, k]`, 0 in masked rows, and offsets `[k]` in nats, of
      mean 0 over components, constants under `grad`. A component whose proportion is
      0 for all clients takes no part. While tracing, a temperature that is not
      positive counts as 1.

    Raises:
      ValueError: As `responsibilities`, and for a mask of zeros if it is known.
    """
    _check_table(log_density, mask, "n")
    check_shapes(log_density=(log_density, "nsk"), proportions=(proportions, "nk"))
    check_shapes(temperature=(temperature, ""))
    _check_proportions(proportions)
    _check_mask(mask)
    check_values("temperature", temperature, "> 0", lambda x: x > 0)
    check_number("tolerance", tolerance, 0)
    check_number("max_steps", max_steps, 1)
    mask = jnp.asarray(mask, bool)
    table = _masked_table(log_density, mask)
    dtype, num_components = table.dtype, table.shape[-1]
    temperature = jnp.where(temperature > 0, temperature, 1.0).astype(dtype)
    logits = _logits(table, proportions)
    active = jnp.any(jnp.isfinite(logits), axis=(0, 1))
    # Infinity times 0 is kept out: components of proportion 0 stay so at any tau.
    logits = jnp.where(jnp.isfinite(logits), logits, 0) / temperature + jnp.where(
        jnp.isfinite(logits), 0, -jnp.inf
    )

    fixed = jax.lax.stop_gradient(logits)
    mass = jnp.sum(mask) / jnp.sum(active).astype(dtype)

    def log_shares(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        shifted = fixed - offset[None, None]
        total = logsumexp(shifted, axis=-1, keepdims=True)
        value = jnp.sum(jnp.where(mask[..., None], total, 0)) + mass * jnp.sum(offset)
        return jnp.where(mask[..., None], shifted - total, -jnp.inf), value

    def unfinished(state):
        step, _, error = state
        return (step < max_steps) & (error > tolerance)

    def improve(state):
        step, offset, _ = state
        log_share, _ = log_shares(offset)
        share = jnp.exp(log_share).reshape(-1, num_components)
        excess = jnp.sum(share, axis=0) - mass
        hessian = jnp.diag(jnp.sum(share, axis=0)) - matmul(share.T, share)
        # Adding a constant to all offsets changes nothing; this fixes it.
        hessian = hessian + mass * (
            1 / num_components + 1e-6 * jnp.eye(num_components, dtype=dtype)
        )
        newton = jnp.linalg.solve(hessian, jnp.where(active, excess, 0))
        sinkhorn = logsumexp(log_share, axis=(0, 1)) - jnp.log(mass)
        sinkhorn = jnp.clip(sinkhorn, -1e4, 1e4)
        moves = jnp.concatenate([_STEPS[:, None] * newton[None], sinkhorn[None]])
        offsets = jax.vmap(move, (None, 0))(offset, moves.astype(dtype))
        values = jax.vmap(lambda offset: log_shares(offset)[1])(offsets)
        offset = offsets[jnp.argmin(values)]
        return step + 1, offset, deviation(offset)

    def move(offset: jax.Array, by: jax.Array) -> jax.Array:
        moved = jnp.where(active, offset + by, 0)
        return jnp.where(active, moved - jnp.sum(moved) / jnp.sum(active), 0)

    def deviation(offset: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.exp(log_shares(offset)[0]), axis=(0, 1))
        return jnp.max(jnp.where(active & (mass > 0), jnp.abs(total / mass - 1), 0))

    offset = jnp.zeros([num_components], dtype)
    if balance:
        state = jnp.zeros([], jnp.int32), offset, deviation(offset)
        offset = jax.lax.while_loop(unfinished, improve, state)[1]
    share = jax.nn.softmax(logits - offset[None, None], axis=-1)
    return jnp.where(mask[..., None], share, 0), offset * temperature


# Comparing mixtures.


def total_variation(p: jax.Array, q: jax.Array) -> jax.Array:
    """Compute half the sum of absolute differences, `[..., k] -> [...]`.

    From 0 to 1 for proportions; the error of an estimate is its mean over clients.
    """
    _check_same_shape(p=p, q=q)
    return jnp.sum(jnp.abs(p - q), axis=-1) / 2


def assign(cost: jax.Array) -> jax.Array:
    """Match rows to columns one to one at the least total cost (Hungarian).

    Args:
      cost: `[k, k]`.

    Returns:
      `[k]` the row of every column. While tracing, entries that are not finite cost
      more than any assignment without them.

    Raises:
      ValueError: If entries are known not to be finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(assign(jnp.array([[4.0, 1.0], [2.0, 0.0]])))
      [1 0]
    """
    check_shapes(cost=(cost, "kk"))
    check_finite(cost=cost)
    cost = _float(cost)
    finite = jnp.isfinite(cost)
    largest = jnp.max(jnp.where(finite, jnp.abs(cost), 0))
    cost = jnp.where(finite, cost, 2 * cost.shape[0] * largest + 1)
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(rows).at[columns].set(rows)


def match_proportions(estimate: jax.Array, truth: jax.Array) -> jax.Array:
    """Find the order of components in which an estimate is closest to the truth.

    Args:
      estimate: `[n, k]`. Instead of proportions it may be anything that describes
        components by columns, such as transposed means.
      truth: `[n, k]`.

    Returns:
      Permutation `[k]`; `estimate[:, permutation]` has the least sum of absolute
      differences from the truth, hence the least mean total variation.
    """
    check_shapes(estimate=(estimate, "nk"), truth=(truth, "nk"))
    return assign(jnp.sum(jnp.abs(estimate[:, :, None] - truth[:, None]), axis=0))


def estimate_num_components(
    cross_density: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Estimate the number of components from the rank of the cross-density matrix.

    Row `i` is linear in the proportions of client `i`, so the matrix has rank `k - 1`
    once rows and columns are centred; a difficulty of a client's samples and a quality
    of its model, the same for all partners, drop out as well. Singular values count if
    they exceed 2.858 times their median, the optimal threshold for square matrices
    with noise of unknown level; the estimate is their number plus 1. It needs several
    clients per component, and errs low if own samples are far better explained than
    others': measure the diagonal on samples that the model was not trained on.

    Args:
      cross_density: `[n, n]` mean log density of client `i` under `j`'s model.

    Returns:
      The estimate `[]`, from 1, and the singular values `[n - 1]`, falling, for the eye
      to find the gap. While tracing, entries that are not finite count as 0.

    Raises:
      ValueError: If entries are known not to be finite, or for fewer than 2 clients.
    """
    check_shapes(cross_density=(cross_density, "nn"))
    num_clients = jnp.shape(cross_density)[0]
    if num_clients < 2:
        raise ValueError(
            f"cross_density must have 2 clients or more, got {num_clients}"
        )
    check_finite(cross_density=cross_density)
    cross = _float(cross_density)
    cross = jnp.where(jnp.isfinite(cross), cross, 0)
    scale = jnp.max(jnp.abs(cross))
    cross = cross - jnp.mean(cross, axis=0, keepdims=True)
    cross = cross - jnp.mean(cross, axis=1, keepdims=True)
    values = jnp.linalg.svd(cross, compute_uv=False)[:-1]
    rounding = num_clients * jnp.finfo(cross.dtype).eps * scale
    threshold = jnp.maximum(2.858 * jnp.median(values), rounding)
    return 1 + jnp.sum(values > threshold), values
