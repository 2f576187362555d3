"""What the server of pFedGPA remembers of its clients, and the denoiser it trains."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.aggregators import diffusion
from fedgen.core import tree
from fedgen.core.federation import Params

VERSIONS = ("noise_maps", "ddim", "noising")


class Replay(NamedTuple):
    """The last B uploads of every client, the oldest overwritten first."""

    rows: jax.Array  # [n, B, p], 0 where nothing was stored yet
    pushes: jax.Array  # [n] int32 uploads ever stored

    def push(self, x: jax.Array, mask: jax.Array) -> Replay:
        """Store `x [n, p]` for the clients of `mask [n]`."""
        n, size, _ = self.rows.shape
        place = self.pushes % size
        old = self.rows[jnp.arange(n), place]
        rows = self.rows.at[jnp.arange(n), place].set(tree.where(mask, x, old))
        return Replay(rows, self.pushes + mask)

    def flat(self) -> tuple[jax.Array, jax.Array]:
        """Return all rows `[n B, p]`, and weights `[n B]` that are 0 for empty ones."""
        n, size, p = self.rows.shape
        stored = jnp.arange(size)[None] < self.pushes[:, None]
        return self.rows.reshape(n * size, p), stored.reshape(-1).astype(jnp.float32)


class Codec(NamedTuple):
    """Parameters to normalised codes and back; without a basis, codes are parameters.

    `cov` is that of the codes: `[r, r]`, or variances `[p]` without a basis.
    """

    basis: diffusion.Basis | None
    normalizer: diffusion.Normalizer  # of codes
    cov: jax.Array

    def encode(self, x: jax.Array) -> jax.Array:
        """Map `[p] -> [r]`."""
        code = x if self.basis is None else diffusion.encode(self.basis, x)
        return diffusion.normalize(self.normalizer, code)

    def decode(self, x: jax.Array, code: jax.Array, rho: float) -> jax.Array:
        """Give `x [p]` another code `[r]`, and keep rho of what codes leave out."""
        code = diffusion.denormalize(self.normalizer, code)
        if self.basis is None:
            return code
        return diffusion.reconstruct(self.basis, x, code, rho=rho)


def fit_codec(
    x: jax.Array,
    weight: jax.Array,
    *,
    rank: int | None,
    scale: str,
    previous: jax.Array | None = None,
) -> tuple[Codec, jax.Array]:
    """Fit codes to a population.

    Args:
      x: `[m, p]` parameters.
      weight: `[m]`, 0 for rows that do not count.
      rank: Principal components r, or None for no basis.
      scale: "scalar" or "coordinate", what the normaliser divides codes by.
      previous: `[r, p]` directions to follow; None leaves the principal axes.

    Returns:
      The codec, and the codes `[m, r]` of x.
    """
    basis = None
    if rank is not None:
        basis = diffusion.fit_basis(x, rank, weight=weight)
        if previous is not None:
            basis = diffusion.align(basis, basis._replace(directions=previous))
        x = jax.vmap(diffusion.encode, (None, 0))(basis, x)
    normalizer = diffusion.fit_normalizer(x, weight=weight, scale=scale)
    codes = jax.vmap(diffusion.normalize, (None, 0))(normalizer, x)
    codes = jnp.where(weight[:, None] > 0, codes, 0.0)
    share = weight / jnp.maximum(jnp.sum(weight), 1.0)
    weighted = share[:, None] * codes
    cov = jnp.sum(weighted * codes, axis=0) if basis is None else weighted.T @ codes
    return Codec(basis, normalizer, cov), codes


class Learner(NamedTuple):
    """A denoiser in training."""

    params: Params  # phi
    average: Params  # of phi over its last steps; what generates
    opt_state: optax.OptState


def init_learner(params: Params, optimizer: optax.GradientTransformation) -> Learner:
    """Begin to train from `params`."""
    return Learner(params, params, optimizer.init(params))


def learn(
    network,
    optimizer: optax.GradientTransformation,
    schedule: diffusion.Schedule,
    base: diffusion.Denoise,
    learner: Learner,
    key: jax.Array,
    codes: jax.Array,
    weight: jax.Array,
    *,
    steps: int,
    batch_size: int,
    jitter: float,
    decay: float,
) -> tuple[Learner, jax.Array]:
    """Take optimiser steps on minibatches of codes (Algorithm 1, L_ddpm).

    Args:
      network: A `fedgen.models.denoiser.Denoiser`, added to `base`.
      optimizer: Of the denoiser.
      schedule: Levels of signal and noise.
      base: Denoiser in closed form.
      learner: Where to go on from.
      key: Random key.
      codes: `[m, r]` normalised codes.
      weight: `[m]` how often each is drawn; if all are 0, nothing is learnt.
      steps: Number of steps.
      batch_size: Codes of a step, drawn with replacement.
      jitter: Standard deviation of the noise added to them.
      decay: Of the moving average.

    Returns:
      The learner, and the mean loss over the steps; 0 without steps.
    """
    if not steps:
        return learner, jnp.float32(0.0)
    total = jnp.sum(weight)
    chance = jnp.where(total > 0, weight, 1.0)
    chance = chance / jnp.sum(chance)

    def step(learner, key):
        draw_key, jitter_key, loss_key = jax.random.split(key, 3)
        row = jax.random.choice(draw_key, len(codes), (batch_size,), p=chance)
        x = codes[row]
        x = x + jitter * jax.random.normal(jitter_key, x.shape)

        def loss(params):
            def denoise(x, t):
                return base(x, t) + network.apply(params, x, t)

            return diffusion.simple_loss(denoise, schedule, x, key=loss_key)

        value, grads = jax.value_and_grad(loss)(learner.params)
        updates, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
        params = optax.apply_updates(learner.params, updates)
        average = optax.incremental_update(params, learner.average, 1 - decay)
        return Learner(params, average, opt_state), value

    trained, losses = jax.lax.scan(step, learner, jax.random.split(key, steps))
    trained = jax.tree.map(lambda a, b: jnp.where(total > 0, a, b), trained, learner)
    return trained, jnp.mean(losses)


def regenerate(
    denoise: diffusion.Denoise,
    schedule: diffusion.Schedule,
    z: jax.Array,
    code_key: jax.Array,
    path_key: jax.Array,
    *,
    version: str,
    depth: int,
    steps: int,
    gamma: float,
    eta: float,
) -> jax.Array:
    """Turn a code `z [r]` into a latent by one of `VERSIONS`, and generate from it."""
    if version == "noise_maps":
        code = diffusion.invert_noise_maps(
            denoise, schedule, z, depth=depth, steps=steps, key=code_key
        )
        return diffusion.generate(denoise, schedule, code, gamma=gamma)
    if version == "ddim":
        code = diffusion.invert(denoise, schedule, z, depth=depth, steps=steps)
    else:
        code = diffusion.diffuse(schedule, z, depth=depth, steps=steps, key=code_key)
    return diffusion.generate(
        denoise, schedule, code, gamma=gamma, eta=eta, key=path_key
    )


def linear_factor(
    schedule: diffusion.Schedule,
    variance: jax.Array,
    *,
    version: str,
    depth: int,
    gamma: float,
    eta: float,
) -> jax.Array:
    """Average what `regenerate` multiplies codes by under the best linear denoiser.

    With k = `diffusion.shrinkage_factor` of the variances `[r]`: the maps of version A
    hold what the mean path, which ends at k, leaves out; B comes back whole without
    fresh noise and ends at sqrt(k) with all of it; C at sqrt(k) and at k.

    Returns:
      `[r]`, for infinitely short steps.
    """
    k = diffusion.shrinkage_factor(schedule, variance, depth)
    if version == "noise_maps":
        return gamma + (1 - gamma) * k
    if version == "ddim":
        return gamma * k ** (eta**2 / 2)
    return gamma * k ** ((1 + eta**2) / 2)


def within(
    x: jax.Array, new: jax.Array, rows: jax.Array, weight: jax.Array, limit: float
) -> tuple[jax.Array, jax.Array]:
    """Tell who moved to a finite place no further than `limit`.

    Args:
      x: `[n, p]` uploads.
      new: `[n, p]` what is to be sent instead.
      rows: `[m, p]` the population.
      weight: `[m]`, 0 for rows that do not count.
      limit: Longest move, in standard deviations of the population.

    Returns:
      `[n]` bool, and the moves `[n]` in standard deviations.
    """
    share = weight / jnp.maximum(jnp.sum(weight), 1.0)
    mean = share @ rows
    spread = jnp.sqrt(share @ jnp.mean((rows - mean[None]) ** 2, axis=1))
    move = jnp.sqrt(jnp.mean((new - x) ** 2, axis=1))
    fits = jnp.isfinite(move) & (move <= limit * spread)
    return fits, move / jnp.maximum(spread, jnp.finfo(spread.dtype).tiny)
