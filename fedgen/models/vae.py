"""Variational auto-encoders (Kingma and Welling, 2014) for densities of inputs.

Networks only: what their outputs mean as a likelihood, and bounds of densities, is the
business of `fedgen.aggregators.mixture`. There is no batch norm, whose statistics would
couple samples of different components and average badly over clients.

FedGMI does not publish its networks; the default size of the perceptron is one that
was found to serve on 28 x 28 images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedgen.core.federation import Params


class Vae(NamedTuple):
    """An encoder and a decoder as pure functions; the prior of codes is N(0, I).

    Attributes:
      name: Name and sizes.
      init: `key -> params`. They hold a scalar `log_variance` if that is learnt.
      encode: `(params, x [b, ...], y [b] or None)` to mean and log variance `[b, q]`.
      decode: `(params, z [b, q], y [b] or None)` to one output per entry of a sample,
        `[b, d]`: logits or means.
      conditional: Whether labels are asked for.
    """

    name: str
    init: Callable[[jax.Array], Params]
    encode: Callable[..., tuple[jax.Array, jax.Array]]
    decode: Callable[..., jax.Array]
    conditional: bool


class Perceptron(nn.Module):
    """One hidden rectified layer on flat inputs."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, i] -> [b, out]`."""
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.out)(x)


@functools.cache
def mlp_vae(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    hidden: int = 128,
    latent: int = 16,
    conditional: bool = False,
    learn_variance: bool = False,
) -> Vae:
    """Build a perceptron VAE for samples of any shape.

    Args:
      input_shape: Shape of one sample.
      num_classes: Number of classes; only a conditional VAE depends on it.
      hidden: Hidden units of encoder and decoder.
      latent: Size q of the code.
      conditional: Whether encoder and decoder are told the label.
      learn_variance: Whether the parameters hold the log variance of a normal decoder.

    Raises:
      ValueError: If a size is not positive.
    """
    sizes = {
        "every axis of a sample": min(input_shape),
        "num_classes": num_classes,
        "hidden": hidden,
        "latent": latent,
    }
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"{what} must be >= 1, got {size}")
    dim = math.prod(input_shape)
    extra = num_classes if conditional else 0
    encoder, decoder = Perceptron(hidden, 2 * latent), Perceptron(hidden, dim)

    def told(x: jax.Array, y: jax.Array | None) -> jax.Array:
        if conditional != (y is not None):
            wanted = "labels" if conditional else "no labels"
            raise ValueError(f"y must be {wanted} for {name}, got {type(y).__name__}")
        if y is None:
            return x
        return jnp.concatenate([x, jax.nn.one_hot(y, num_classes, dtype=x.dtype)], 1)

    def init(key: jax.Array) -> Params:
        encoder_key, decoder_key = jax.random.split(key)
        params = {
            "encoder": _init(encoder, encoder_key, dim + extra),
            "decoder": _init(decoder, decoder_key, latent + extra),
        }
        if learn_variance:
            params["log_variance"] = jnp.zeros([])
        return params

    def encode(
        params: Params, x: jax.Array, y: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        flat = told(x.reshape(x.shape[0], -1), y)
        return jnp.split(encoder.apply({"params": params["encoder"]}, flat), 2, axis=-1)

    def decode(params: Params, z: jax.Array, y: jax.Array | None = None) -> jax.Array:
        return decoder.apply({"params": params["decoder"]}, told(z, y))

    name = f"{'c' * conditional}vae{hidden}x{latent}"
    return Vae(name, init, encode, decode, conditional)


def _init(module: nn.Module, key: jax.Array, features: int) -> Params:
    x = jax.ShapeDtypeStruct((1, features), jnp.float32)
    return module.lazy_init(key, x)["params"]
