"""Products and quotients that all aggregators share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST  # class means must not be rounded to bfloat16
einsum = functools.partial(jnp.einsum, precision=_HIGHEST)
matmul = functools.partial(jnp.matmul, precision=_HIGHEST)


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divide, with 0 where the denominator is 0, in value and in derivative."""
    positive = denominator > 0
    quotient = numerator / jnp.where(positive, denominator, 1)
    return jnp.where(positive, quotient, 0)
