"""Proportions of a mixture from geometry: where clients lie between its components.

A mean over a client's samples is linear in the client's proportions. That holds of the
mean log density of client `i`'s samples under client `j`'s model,

    C_ij = sum_k pi_ik M_kj + a_i + b_j,

with `a_i` for how difficult `i`'s samples are under any model and `b_j` for how good
`j`'s model is (`proportions`), and of the mean of any features, `z_i = sum_k pi_ik m_k`
(`unmix`). Without `a` and `b`, and up to sampling noise, clients lie in a simplex of
`k - 1` dimensions whose corners are pure clients, and proportions are barycentric
coordinates. One mean a client is all that is asked for, and no model of any component.

No client need be pure. Among all simplices around the clients the smallest is taken:
it is the true one if every facet is touched often enough, that is, if for every
component there are clients that lack it and mix the others in many ways.
`mixture.farthest_first` looks at pairs of clients instead and is misled where two
components are more alike than others.

>>> import jax.numpy as jnp
>>> share = jnp.array([[1.0, 0], [0.7, 0.3], [0.4, 0.6], [0, 1.0]])  # of two components
>>> corner = jnp.array([[0.0, 2.0, 1.0], [4.0, 2.0, 0.0]])  # their mean features
>>> found = unmix(share @ corner, 5 * jnp.eye(3), 2)
>>> bool(jnp.allclose(found.mean[jnp.argsort(found.mean[:, 0])], corner, atol=0.05))
True

Functions work under `jit` and `vmap`, in float32 and float64; letters in shapes are
those of `mixture`, and so is what becomes of bad input. This is the project's own
remedy for a start of FedGMI (Hou et al., arXiv:2605.08760), of which only the abstract
was available.

References:
  Johnstone, On the distribution of the largest eigenvalue in principal components
    analysis, 2001.
  Ramaswamy et al., Mixture proportion estimation via kernel embeddings, ICML 2016.
  Craig, Minimum-volume transforms for remotely sensed data, 1994.
  Araujo et al., The successive projections algorithm, 2001; robustness: Gillis and
    Vavasis, 2014.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgen._matrices import each
from fedgen.aggregators import gaussian
from fedgen.aggregators._checks import (
    check_covariances,
    check_finite,
    check_number,
    check_shapes,
    check_values,
    is_known,
)
from fedgen.aggregators._numerics import einsum, matmul

_PENALTIES = (10.0, 30.0, 100.0)  # before that which the caller asks for
_DESCENTS = 30  # Newton steps, for each of them
_STEPS = np.append(0.5 ** np.arange(8), 0)  # of Newton's direction
_BOUND = 1e30
_LEAST_WITHIN = 0.05  # of a client's variance; noise may seem to leave less than none
_LARGEST = 2.0234  # 99th percentile of the Tracy-Widom distribution of order 1


class Unmixed(NamedTuple):
    """A mixture of components that differ in the mean of their features."""

    proportions: jax.Array  # [n, k]
    mean: jax.Array  # [k, d] of the features of every component
    cov: jax.Array  # [d, d] within a component, the same for all


def purest_clients(
    cross_density: jax.Array, num_components: int, *, mask: jax.Array | None = None
) -> jax.Array:
    """Choose the clients at the corners, by successive projection.

    Args:
      cross_density: `[n, n]`, or `[n, m]` for `m >= k` models only: mean log density
        of client `i`'s samples under model `j`, or another mean over `i`'s samples.
      num_components: Number of components `k`, at least 1 and at most `n` and `m`.
      mask: `[n]`, true for clients that exist; all of them by default.

    Returns:
      `[k]` distinct clients.

    Raises:
      ValueError: If there are too few clients or models, or entries known to be NaN or
        infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> share = jnp.array([0.5, 0.9, 0.7, 0.1])  # of the first of two components
      >>> cross = -10.0 * (share[:, None] - share[None]) ** 2
      >>> print(sorted(purest_clients(cross, 2).tolist()))
      [1, 3]
    """
    points, mask = _points(cross_density, num_components, mask)
    return _corners(points, mask)


def proportions(
    cross_density: jax.Array,
    num_components: int,
    *,
    mask: jax.Array | None = None,
    penalty: float = 300.0,
) -> jax.Array:
    """Estimate all clients' proportions by the smallest simplex around them.

    Minimises `log volume + penalty * sum_ik min(pi_ik, 0)^2` from the simplex of the
    purest clients, blown up, by Newton's method under penalties that grow.

    Args:
      cross_density: As for `purest_clients`.
      num_components: Number of components `k`.
      mask: `[n]`, true for clients that exist.
      penalty: For clients outside of the simplex, above 0: the less noise, the more.

    Returns:
      `[n, k]`, rows sum to 1; uniform for clients that do not exist. Components are
      those of `purest_clients`, in that order.

    Raises:
      ValueError: As `purest_clients`.
    """
    check_number("penalty", penalty, 0, strict=True)
    points, mask = _points(cross_density, num_components, mask)
    return _smallest(points, mask, penalty)


def unmix(
    mean: jax.Array,
    cov: jax.Array,
    num_components: int,
    *,
    mask: jax.Array | None = None,
    shrinkage: float = 0.1,
    penalty: float = 300.0,
) -> Unmixed:
    """Find components from the mean features of clients that mix them.

    Features are whitened by the covariance within clients, in whose units sampling
    noise is alike in all directions; `proportions` finds the simplex, and least squares
    its corners. What the covariance has too much for the corners is taken out of it.
    `gaussian.plugin_head` makes a classifier of samples out of the result.

    Args:
      mean: `[n, d]` mean features of every client, `d >= k`.
      cov: `[d, d]` positive semi-definite, covariance of the features within a client,
        averaged over clients.
      num_components: Number of components `k`.
      mask: `[n]`, true for clients that exist; all of them by default.
      shrinkage: Share of the isotropic part that `cov` gets, from 0 to 1. Directions of
        little variance are known but roughly, the more so in float32.
      penalty: As for `proportions`.

    Raises:
      ValueError: As `proportions`; if `cov` is known not to be a covariance.
    """
    check_shapes(mean=(mean, "nd"), cov=(cov, "dd"))
    check_number("penalty", penalty, 0, strict=True)
    mean, mask = _features(mean, mask)
    _check_num_components(num_components, mask, mean.shape[1], "features")
    mask = jnp.asarray(mask, bool)
    to, back = _whitening(cov, shrinkage)
    centred, centre = _centred(mean, mask[:, None].astype(mean.dtype), 0)
    white = matmul(centred, to)
    share = _smallest(_place(white, num_components, mask), mask, penalty)
    held = share * mask[:, None]
    # Clients that all mix alike leave the corners open: the ridge puts them together.
    ridge = 1e-6 * jnp.eye(num_components, dtype=held.dtype)
    corner = jnp.linalg.solve(matmul(held.T, held) + ridge, matmul(held.T, white))
    apart = corner[None] - matmul(held, corner)[:, None]  # [n, k, d]
    between = einsum("nk,nkd,nke->de", held, apart, apart)
    between = between / jnp.maximum(jnp.sum(mask), 1)
    value, vector = jnp.linalg.eigh(jnp.eye(len(between), dtype=held.dtype) - between)
    root = matmul(vector * jnp.sqrt(jnp.maximum(value, _LEAST_WITHIN))[None], vector.T)
    root = matmul(root, back)
    found = matmul(corner, back) + centre, matmul(root.T, root)
    known = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in found]))
    spare = jnp.zeros_like(found[0]), jnp.eye(len(root), dtype=root.dtype)
    return Unmixed(
        share,
        *(jnp.where(known, a, b) for a, b in zip(found, spare, strict=True)),
    )


def estimate_num_components(
    mean: jax.Array,
    cov: jax.Array,
    count: jax.Array,
    *,
    mask: jax.Array | None = None,
    shrinkage: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Count the directions in which clients differ by more than sampling noise.

    In whitened features, times the root of its number of samples, every client has
    noise of unit variance, whose largest singular value is known, but for what the
    covariance is off itself: with `N - n` degrees of freedom up to a factor of
    `1 - sqrt(d / (N - n))`. Clients that mix `k` components stand out in `k - 1`
    directions. With few samples in all, `N - n <= d`, nothing ever does.

    Args:
      mean: `[n, d]` mean features of every client.
      cov: `[d, d]` as for `unmix`, pooled without bias: the scatter about clients'
        own means over `N - n`, samples less clients.
      count: `[n]` samples of every client.
      mask: `[n]`, true for clients that exist; all of them by default.
      shrinkage: As for `unmix`.

    Returns:
      `k`, [] int32, at least 1; and the singular values, `[min(n, d)]`, in units of
      what noise alone exceeds once in a hundred times.

    Raises:
      ValueError: If shapes do not fit, or values are known to be NaN or negative.
    """
    check_shapes(mean=(mean, "nd"), cov=(cov, "dd"), count=(count, "n"))
    check_values("count", count, ">= 0", lambda a: a >= 0)
    mean, mask = _features(mean, mask)
    to, _ = _whitening(cov, shrinkage)
    weight = jnp.where(jnp.asarray(mask, bool) & (count > 0), count, 0)
    weight = weight.astype(mean.dtype)
    centred, _ = _centred(mean, weight[:, None], 0)
    scaled = matmul(centred, to) * jnp.sqrt(weight)[:, None]
    free = jnp.sqrt(jnp.maximum(jnp.sum(weight > 0) - 1.0, 1))
    width = jnp.sqrt(1.0 * scaled.shape[1])
    spread = (free + width) * (1 / free + 1 / width) ** (1 / 3)
    freedom = jnp.maximum(jnp.sum(weight) - jnp.sum(weight > 0), 1e-6)
    known = jnp.maximum(1 - width / jnp.sqrt(freedom), 1e-6)
    noise = jnp.sqrt((free + width) ** 2 + _LARGEST * spread) / known
    values = jnp.linalg.svd(scaled, compute_uv=False) / noise
    return 1 + jnp.sum(values > 1, dtype=jnp.int32), values


def _features(mean: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Check clients' mean features, and make them finite."""
    if mask is None:
        mask = np.ones(jnp.shape(mean)[:1], bool)
    check_shapes(mean=(mean, "nd"), mask=(mask, "n"))
    if is_known(mean, mask):
        check_finite(mean=np.asarray(mean)[np.asarray(mask, bool)])
    return jnp.clip(jnp.nan_to_num(mean * 1.0), -_BOUND, _BOUND), mask


def _whitening(cov: jax.Array, shrinkage: float) -> tuple[jax.Array, jax.Array]:
    """Factorise a covariance: what makes it the identity, and the way back."""
    check_covariances(definite=False, cov=cov)
    value, vector = jnp.linalg.eigh(gaussian.shrink(jnp.nan_to_num(cov), shrinkage))
    root = jnp.sqrt(jnp.maximum(value, 1e-6 * value[-1]))
    return vector / root[None], (vector * root[None]).T


def _points(
    cross_density: jax.Array, num_components: int, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Place the clients of a cross-density matrix, `[n, k]`; also the mask."""
    if mask is None:
        mask = np.ones(jnp.shape(cross_density)[:1], bool)
    check_shapes(cross_density=(cross_density, "nm"), mask=(mask, "n"))
    num_models = jnp.shape(cross_density)[1]
    _check_num_components(num_components, mask, num_models, "models")
    # In a square matrix the models are the clients'.
    square = jnp.shape(cross_density)[0] == num_models
    model_mask = mask if square else np.ones(num_models, bool)
    if is_known(cross_density, mask):
        rows = np.asarray(cross_density)[np.asarray(mask, bool)]
        check_finite(cross_density=rows[:, np.asarray(model_mask, bool)])
    mask, model_mask = jnp.asarray(mask, bool), jnp.asarray(model_mask, bool)
    known = mask[:, None] & model_mask[None]
    cross = jnp.clip(jnp.nan_to_num(cross_density * 1.0), -_BOUND, _BOUND)
    # What all models say of a client alike tells nothing.
    for axis in (1, 0):
        cross = _centred(cross, known, axis)[0]
    return _place(cross, num_components, mask), mask


def _check_num_components(
    num_components: int, mask: jax.Array, width: int, what: str
) -> None:
    clients = int(np.sum(np.asarray(mask, bool))) if is_known(mask) else len(mask)
    if not 1 <= num_components <= min(clients, width):
        raise ValueError(
            f"num_components must be from 1 to {min(clients, width)}, the clients and "
            f"{what}, got {num_components}"
        )


def _centred(x: jax.Array, weight: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Take off the weighted mean along an axis; what has no weight becomes 0."""
    x = jnp.where(weight > 0, x, 0)
    total = jnp.maximum(jnp.sum(weight, axis=axis, keepdims=True), 1e-30)
    mean = jnp.sum(weight * x, axis=axis, keepdims=True) / total
    return jnp.where(weight > 0, x - mean, 0), mean


def _place(centred: jax.Array, num_components: int, mask: jax.Array) -> jax.Array:
    """Reduce clients to `k - 1` dimensions, `[n, k]` with a last column of ones.

    Whitened, so that neither the optimiser nor a corner depends on the units.
    """
    place = jnp.linalg.svd(centred, full_matrices=False)[0][:, : num_components - 1]
    place = place * jnp.sqrt(jnp.maximum(jnp.sum(mask), 1))
    return jnp.concatenate([place, jnp.ones_like(centred[:, :1])], axis=1)


def _smallest(points: jax.Array, mask: jax.Array, penalty: float) -> jax.Array:
    """Compute coordinates `[n, k]` in the smallest simplex around points `[n, k]`."""
    num_components = points.shape[1]
    corners = points[_corners(points, mask)]
    centre = jnp.mean(corners, axis=0, keepdims=True)
    start = jnp.linalg.inv(centre + 2 * (corners - centre))  # [k, k]
    # Coordinates `points @ transform` sum to 1 if the transform's rows sum to
    # (0, ..., 0, 1), so its last column is not free.
    last = jnp.zeros(num_components, points.dtype).at[-1].set(1)

    def transform(free: jax.Array) -> jax.Array:
        return jnp.concatenate([free, (last - jnp.sum(free, 1))[:, None]], axis=1)

    def loss(free: jax.Array, penalty: jax.Array) -> jax.Array:
        inverse = transform(free)
        outside = jnp.minimum(matmul(points, inverse), 0) * mask[:, None]
        return penalty * jnp.sum(outside**2) - jnp.linalg.slogdet(inverse)[1]

    def fit(free: jax.Array, penalty: jax.Array) -> tuple[jax.Array, None]:
        def value(x):
            return loss(x.reshape(free.shape), penalty)

        slope = jax.grad(value)

        def newton(x):
            """Return Newton's direction, downhill also where curvature is negative."""
            size, axes = jnp.linalg.eigh(jax.hessian(value)(x))
            size = jnp.maximum(jnp.abs(size), 1e-6 * jnp.max(jnp.abs(size)))
            return -matmul(axes, matmul(axes.T, slope(x)[:, None]) / size[:, None])[
                :, 0
            ]

        def descend(_, x):
            tried = x[None] + _STEPS[:, None] * newton(x)[None]
            values = each(value, tried)
            return tried[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]

        def polish(_, x):
            # Values are equal up to rounding where slopes still are not.
            new = x + newton(x)
            better = jnp.sum(slope(new) ** 2) < jnp.sum(slope(x) ** 2)
            return jnp.where(better, new, x)

        x = jax.lax.fori_loop(0, _DESCENTS, descend, free.reshape(-1))
        return jax.lax.fori_loop(0, 3, polish, x).reshape(free.shape), None

    if num_components == 1:
        return jnp.ones_like(points)
    penalties = jnp.asarray([*_PENALTIES, penalty], points.dtype)
    free, _ = jax.lax.scan(fit, start[:, :-1], penalties)
    share = jnp.maximum(matmul(points, transform(free)), 0)
    share = share / jnp.sum(share, axis=1, keepdims=True)
    return jnp.where(mask[:, None] & jnp.isfinite(share), share, 1 / num_components)


def _corners(points: jax.Array, mask: jax.Array) -> jax.Array:
    """Take the longest row, project all on what is orthogonal to it, `k` times."""

    def choose(carry, _):
        rest, free = carry
        corner = jnp.argmax(jnp.where(free, jnp.sum(rest**2, axis=1), -1))
        row = rest[corner]
        direction = row / jnp.maximum(jnp.linalg.norm(row), 1e-30)
        rest = rest - matmul(rest, direction[:, None]) * direction[None]
        return (rest, free.at[corner].set(False)), corner

    return jax.lax.scan(choose, (points, mask), length=points.shape[1])[1]
