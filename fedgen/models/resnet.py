"""Residual networks for small images, with group normalisation.

After He et al. (2016): `resnet18` has four stages of two blocks, `resnet8` three
stages of one, and both start with a 3x3 convolution because images are small.
Batch normalisation is replaced by group normalisation (Wu and He, 2018) of 16
channels a group, which keeps no statistics that clients would have to share.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax

from fedgen.core.federation import Model
from fedgen.models import layers


def _norm(features: int) -> layers.GroupNorm:
    return layers.GroupNorm(math.gcd(features, 16))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, channels] -> [b, h', w', features]`."""
        strides = (self.stride, self.stride)
        y = layers.Conv(self.features, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(_norm(self.features)(y))
        y = layers.Conv(self.features, (3, 3), use_bias=False)(y)
        y = _norm(self.features)(y)
        if x.shape != y.shape:
            x = layers.Conv(self.features, (1, 1), strides, use_bias=False)(x)
            x = _norm(self.features)(x)
        return nn.relu(x + y)


class Body(nn.Module):
    """Stem, stages of residual blocks and the mean over positions."""

    stages: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, channels] -> [b, width * 2^(stages - 1)]`."""
        x = layers.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(_norm(self.width)(x))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, stride)(x)
        return x.mean((1, 2))


@functools.cache
def resnet8(input_shape: tuple[int, ...], num_classes: int, width: int = 16) -> Model:
    """Build three stages of one block, which train on a CPU.

    Raises:
      ValueError: If the input is no image or a size is not positive.
    """
    body = Body((1, 1, 1), width)
    return layers.assemble(f"resnet8-{width}", body, input_shape, num_classes, 3)


@functools.cache
def resnet18(input_shape: tuple[int, ...], num_classes: int, width: int = 64) -> Model:
    """Build four stages of two blocks.

    Raises:
      ValueError: If the input is no image or a size is not positive.
    """
    body = Body((2, 2, 2, 2), width)
    return layers.assemble(f"resnet18-{width}", body, input_shape, num_classes, 3)
