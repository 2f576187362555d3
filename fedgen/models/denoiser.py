"""Noise predictors for diffusion over parameter vectors.

`residual_mlp` is for vectors or codes of up to some thousands of entries: residual
blocks, modulated by the time. `token_transformer` cuts a long vector into tokens and
follows DiT (Peebles and Xie, 2023): attention between the tokens, and layer norms whose
shift, scale and gate come from the time (adaLN-Zero). Times enter as sinusoids
(Vaswani et al., 2017; Ho et al., 2020).

The last layer starts at 0, so that a new network predicts no noise at all. Together
with `bind(..., base=...)` it starts at any known denoiser, for instance the optimal one
of a Gaussian with the population's covariance, and has only the rest to learn.

Neither network is published for pFedGPA; sizes are choices made here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedgen.core.federation import Params


class Denoiser(NamedTuple):
    """A noise predictor for vectors of one size."""

    name: str
    init: Callable[[jax.Array], Params]  # key -> parameters
    apply: Callable[..., jax.Array]  # params, x [p], t [], condition [q] -> eps [p]


def bind(
    denoiser: Denoiser,
    params: Params,
    *,
    base: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    condition: jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Close over weights, `denoise(x [p], t []) -> eps [p]`.

    Args:
      denoiser: Architecture.
      params: Its weights.
      base: Denoiser to which the network is added.
      condition: `[q]` what else the network is told, if it was built for any.
    """

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        eps = denoiser.apply(params, x, t, condition)
        return eps if base is None else base(x, t) + eps

    return denoise


def sinusoids(t: jax.Array, size: int, max_period: float = 1e4) -> jax.Array:
    """Embed a time as cosines and sines of `size / 2` frequencies, `[] -> [size]`.

    Frequencies fall geometrically from 1 to `1 / max_period` (exclusive).

    Raises:
      ValueError: If `size` is not even and positive.
    """
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and >= 2, got {size}")
    frequency = max_period ** (-jnp.arange(size // 2) / (size // 2))
    angle = t * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])


class Context(nn.Module):
    """Time and condition as one vector."""

    width: int
    time_size: int

    @nn.compact
    def __call__(self, t: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Map `[]` and `[q]` to `[width]`."""
        h = nn.Dense(self.width)(sinusoids(t, self.time_size))
        if condition is not None:
            h += nn.Dense(self.width, use_bias=False)(condition)
        return nn.Dense(self.width)(nn.silu(h))


def _modulation(context: jax.Array, count: int, width: int, name: str) -> jax.Array:
    """Map a context to `count` vectors that start at 0, `[count, width]`.

    To be called from within a compact module.
    """
    dense = nn.Dense(count * width, kernel_init=nn.initializers.zeros, name=name)
    return dense(nn.silu(context)).reshape(count, width)


class ResidualMLP(nn.Module):
    """Residual blocks on a vector, each shifted and scaled by the time."""

    size: int
    width: int
    blocks: int
    time_size: int

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, condition: jax.Array | None
    ) -> jax.Array:
        """Map `[p], [], [q] -> [p]`."""
        context = Context(self.width, self.time_size)(t, condition)
        h = nn.Dense(self.width)(x)
        for i in range(self.blocks):
            shift, scale = _modulation(context, 2, self.width, f"modulation{i}")
            y = nn.LayerNorm(use_bias=False, use_scale=False)(h)
            y = nn.Dense(self.width)(nn.silu(shift + (1 + scale) * y))
            h += nn.Dense(self.width)(nn.silu(y))
        h = nn.LayerNorm()(h)
        return nn.Dense(self.size, kernel_init=nn.initializers.zeros)(h)


class Attention(nn.Module):
    """Self-attention between tokens."""

    heads: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Map `[k, width] -> [k, width]`."""
        width = h.shape[-1]
        shape = (3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(nn.DenseGeneral(shape)(h), 1, 0)
        mixed = jax.nn.dot_product_attention(query, key, value)
        return nn.DenseGeneral(width, axis=(-2, -1))(mixed)


class TokenTransformer(nn.Module):
    """Attention and feed-forward blocks on the tokens of a vector."""

    size: int
    token: int
    width: int
    blocks: int
    heads: int
    time_size: int

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, condition: jax.Array | None
    ) -> jax.Array:
        """Map `[p], [], [q] -> [p]`."""
        context = Context(self.width, self.time_size)(t, condition)
        norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False)
        tokens = jnp.pad(x, (0, -self.size % self.token)).reshape(-1, self.token)
        h = nn.Dense(self.width)(tokens)
        h += self.param("position", nn.initializers.normal(0.02), h.shape)
        for i in range(self.blocks):
            modulation = _modulation(context, 6, self.width, f"modulation{i}")
            shift, scale, gate, shift2, scale2, gate2 = modulation[:, None]
            h += gate * Attention(self.heads)(shift + (1 + scale) * norm()(h))
            y = nn.Dense(4 * self.width)(shift2 + (1 + scale2) * norm()(h))
            h += gate2 * nn.Dense(self.width)(nn.gelu(y))
        shift, scale = _modulation(context, 2, self.width, "modulation")[:, None]
        eps = nn.Dense(self.token, kernel_init=nn.initializers.zeros)(
            shift + (1 + scale) * norm()(h)
        )
        return eps.reshape(-1)[: self.size]


@functools.cache
def residual_mlp(
    size: int,
    *,
    width: int = 256,
    blocks: int = 3,
    time_size: int = 128,
    condition_size: int = 0,
) -> Denoiser:
    """Build the residual perceptron for vectors `[size]`.

    Args:
      size: Number of entries p.
      width: Hidden units.
      blocks: Residual blocks of two layers each.
      time_size: Size of the embedding of the time, even.
      condition_size: Size q of the condition, 0 for none.

    Raises:
      ValueError: If a size is out of range.
    """
    _check_sizes(size=size, width=width, blocks=blocks, time_size=time_size)
    module = ResidualMLP(size, width, blocks, time_size)
    return _assemble(f"residual_mlp{width}x{blocks}", module, condition_size)


@functools.cache
def token_transformer(
    size: int,
    *,
    token: int = 256,
    width: int = 256,
    blocks: int = 4,
    heads: int = 4,
    time_size: int = 128,
    condition_size: int = 0,
) -> Denoiser:
    """Build the transformer on the tokens of vectors `[size]`.

    Args:
      size: Number of entries p.
      token: Entries of a token; the last token is filled up with 0.
      width: Hidden units, a multiple of `heads`.
      blocks: Blocks of attention and two dense layers.
      heads: Heads of attention.
      time_size: Size of the embedding of the time, even.
      condition_size: Size q of the condition, 0 for none.

    Raises:
      ValueError: If a size is out of range, or `heads` does not divide `width`.
    """
    _check_sizes(
        size=size,
        token=token,
        width=width,
        blocks=blocks,
        heads=heads,
        time_size=time_size,
    )
    if width % heads:
        raise ValueError(f"width must be a multiple of heads {heads}, got {width}")
    module = TokenTransformer(size, token, width, blocks, heads, time_size)
    name = f"token_transformer{width}x{blocks}"
    return _assemble(name, module, condition_size)


def _check_sizes(*, time_size: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    if time_size < 2 or time_size % 2:
        raise ValueError(f"time_size must be even and >= 2, got {time_size}")


def _assemble(name: str, module: nn.Module, condition_size: int) -> Denoiser:
    if condition_size < 0:
        raise ValueError(f"condition_size must be >= 0, got {condition_size}")
    expected = (condition_size,) if condition_size else None

    def init(key: jax.Array) -> Params:
        x = jax.ShapeDtypeStruct((module.size,), jnp.float32)
        t = jax.ShapeDtypeStruct((), jnp.int32)
        condition = expected and jax.ShapeDtypeStruct(expected, jnp.float32)
        return module.lazy_init(key, x, t, condition)["params"]

    def apply(
        params: Params, x: jax.Array, t: jax.Array, condition: jax.Array | None = None
    ) -> jax.Array:
        if jnp.shape(x) != (module.size,):
            raise ValueError(
                f"x must have shape ({module.size},), got {jnp.shape(x)}; "
                "vmap the denoiser for more vectors"
            )
        given = None if condition is None else jnp.shape(condition)
        if given != expected:
            raise ValueError(f"condition must have shape {expected}, got {given}")
        return module.apply({"params": params}, x, t, condition)

    return Denoiser(name, init, apply)
