"""Proportions of a mixture from geometry: where clients lie between its components.

The mean log density of client `i`'s samples under client `j`'s model is linear in `i`'s
proportions, for it is a mean over a mixture:

    C_ij = sum_k pi_ik M_kj + a_i + b_j,

with `a_i` for how difficult `i`'s samples are under any model and `b_j` for how good
`j`'s model is. Without `a` and `b` the rows of `C` lie in a simplex of `k - 1`
dimensions whose corners are pure clients, and proportions are barycentric coordinates.
Nothing is said of densities themselves, so models may be trained too little to tell
single samples apart.

No client need be pure. Among all simplices around the clients the smallest is taken:
it is the true one if every facet is touched often enough, that is, if for every
component some clients lack it. `mixture.farthest_first` looks at pairs of clients
instead and is misled where two components are more alike than others.

Functions work under `jit` and `vmap`, in float32 and float64; letters in shapes are
those of `mixture`, and so is what becomes of bad input. This is the project's own
remedy for a start of FedGMI (Hou et al., arXiv:2605.08760), of which only the abstract
was available.

References:
  Craig, Minimum-volume transforms for remotely sensed data, 1994.
  Araujo et al., The successive projections algorithm, 2001; robustness: Gillis and
    Vavasis, 2014.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedgen.aggregators._checks import (
    check_finite,
    check_number,
    check_shapes,
    is_known,
)
from fedgen.aggregators._numerics import matmul

_PENALTIES = (10.0, 30.0, 100.0)  # before that which the caller asks for
_STEPS = 60  # of L-BFGS, for each of them
_BOUND = 1e30


def purest_clients(
    cross_density: jax.Array, num_components: int, *, mask: jax.Array | None = None
) -> jax.Array:
    """Choose the clients at the corners, by successive projection.

    Args:
      cross_density: `[n, n]`, or `[n, m]` for `m >= k` models only: mean log density
        of client `i`'s samples under model `j`.
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
    purest clients, blown up, by L-BFGS under penalties that grow.

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
        def of_penalty(free):
            return loss(free, penalty)

        optimizer = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(of_penalty)

        def step(_, carry):
            free, state = carry
            value, grad = value_and_grad(free, state=state)
            updates, state = optimizer.update(
                grad, state, free, value=value, grad=grad, value_fn=of_penalty
            )
            return optax.apply_updates(free, updates), state

        free, _ = jax.lax.fori_loop(0, _STEPS, step, (free, optimizer.init(free)))
        return free, None

    if num_components == 1:
        return jnp.ones_like(points)
    penalties = jnp.asarray([*_PENALTIES, penalty], points.dtype)
    free, _ = jax.lax.scan(fit, start[:, :-1], penalties)
    share = jnp.maximum(matmul(points, transform(free)), 0)
    share = share / jnp.sum(share, axis=1, keepdims=True)
    return jnp.where(mask[:, None] & jnp.isfinite(share), share, 1 / num_components)


def _points(
    cross_density: jax.Array, num_components: int, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Place clients in `k - 1` dimensions, `[n, k]` with a last column of ones."""
    if mask is None:
        mask = np.ones(jnp.shape(cross_density)[:1], bool)
    check_shapes(cross_density=(cross_density, "nm"), mask=(mask, "n"))
    clients, models = jnp.shape(cross_density)
    if is_known(mask):
        clients = int(np.sum(np.asarray(mask, bool)))
    if not 1 <= num_components <= min(clients, models):
        raise ValueError(
            f"num_components must be from 1 to {min(clients, models)}, the clients and "
            f"models, got {num_components}"
        )
    # In a square matrix the models are the clients'.
    square = jnp.shape(cross_density)[0] == models
    model_mask = mask if square else np.ones(models, bool)
    if is_known(cross_density, mask):
        rows = np.asarray(cross_density)[np.asarray(mask, bool)]
        check_finite(cross_density=rows[:, np.asarray(model_mask, bool)])
    mask, model_mask = jnp.asarray(mask, bool), jnp.asarray(model_mask, bool)
    count = jnp.maximum(jnp.sum(mask), 1)
    known = mask[:, None] & model_mask[None]
    cross = jnp.clip(jnp.nan_to_num(cross_density * 1.0), -_BOUND, _BOUND)
    cross = jnp.where(known, cross, 0)
    for axis in (1, 0):
        mean = jnp.sum(cross, axis=axis, keepdims=True) / jnp.maximum(
            jnp.sum(known, axis=axis, keepdims=True), 1
        )
        cross = jnp.where(known, cross - mean, 0)
    # Whitened, so that neither the optimiser nor a corner depends on the units.
    place = jnp.linalg.svd(cross, full_matrices=False)[0][:, : num_components - 1]
    place = place * jnp.sqrt(count)
    return jnp.concatenate([place, jnp.ones_like(cross[:, :1])], axis=1), mask


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
