"""Convolutional networks with two and three blocks.

`cnn` is the network of LEAF (Caldas et al., 2018) in the width of McMahan et al.
(2017): two 5x5 convolutions of 32 and 64 channels and a layer of 512 units.
`small_cnn` has 16, 32 and 64 channels, a layer of 128 units and leaky rectifiers,
as Gaussian personalisation papers use on CIFAR-10.

Each activation follows its pooling: both are monotone, so the order does not
matter to the result, and a quarter of the activations is left to compute.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from fedgen.core.federation import Model
from fedgen.models import layers


class Leaf(nn.Module):
    """Two blocks of convolution and pooling, then a dense layer."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, channels] -> [b, hidden]`."""
        x = nn.relu(layers.ConvPool(32, (5, 5))(x))
        x = nn.relu(layers.ConvPool(64, (5, 5))(x))
        return nn.relu(layers.Dense(self.hidden)(x.reshape(x.shape[0], -1)))


class Small(nn.Module):
    """Three thin blocks of convolution and pooling, then a dense layer."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, channels] -> [b, hidden]`."""
        x = nn.leaky_relu(layers.ConvPool(16, (5, 5), "VALID")(x))
        x = nn.leaky_relu(layers.ConvPool(32, (5, 5), 1)(x))
        x = nn.leaky_relu(layers.ConvPool(64, (3, 3), 1)(x))
        return nn.leaky_relu(layers.Dense(self.hidden)(x.reshape(x.shape[0], -1)))


@functools.cache
def cnn(input_shape: tuple[int, ...], num_classes: int, hidden: int = 512) -> Model:
    """Build LEAF's network for images `(height, width, channels)`.

    Raises:
      ValueError: If the input is no image or is too small, or a size not positive.
    """
    return layers.assemble(f"cnn{hidden}", Leaf(hidden), input_shape, num_classes, 3)


@functools.cache
def small_cnn(
    input_shape: tuple[int, ...], num_classes: int, hidden: int = 128
) -> Model:
    """Build the thin network for images `(height, width, channels)`.

    Raises:
      ValueError: If the input is no image or is too small, or a size not positive.
    """
    return layers.assemble(
        f"small_cnn{hidden}", Small(hidden), input_shape, num_classes, 3
    )
