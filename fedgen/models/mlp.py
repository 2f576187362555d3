"""Multilayer perceptron with one hidden layer (McMahan et al., 2017: 200 units)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from fedgen.core.federation import Model
from fedgen.models import layers


class Body(nn.Module):
    """Flatten, then one rectified layer."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, ...] -> [b, hidden]`."""
        return nn.relu(layers.Dense(self.hidden)(x.reshape(x.shape[0], -1)))


@functools.cache
def mlp(input_shape: tuple[int, ...], num_classes: int, hidden: int = 200) -> Model:
    """Build the perceptron for inputs of any shape.

    Raises:
      ValueError: If a size is not positive.
    """
    return layers.assemble(f"mlp{hidden}", Body(hidden), input_shape, num_classes)
