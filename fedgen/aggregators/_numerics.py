"""Products, quotients and loops over matrices that all aggregators share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedgen.aggregators._checks import is_known

_HIGHEST = jax.lax.Precision.HIGHEST  # class means must not be rounded to bfloat16
einsum = functools.partial(jnp.einsum, precision=_HIGHEST)
matmul = functools.partial(jnp.matmul, precision=_HIGHEST)


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divide, with 0 where the denominator is 0, in value and in derivative."""
    positive = denominator > 0
    quotient = numerator / jnp.where(positive, denominator, 1)
    return jnp.where(positive, quotient, 0)


def batches_may_hang() -> bool:
    """Tell whether to factorise a batch of matrices may never end.

    Before 0.11.2, jaxlib deals the matrices of a batch out to the threads of the CPU,
    and the thread that does so waits for them. If all threads wait, as they may where
    each runs a device, or a program has several batches, none is left to work.
    """
    return jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11, 2)


def each(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Map `fn`, which factorises or solves, over the first axis, as `vmap` does.

    Where batches may hang, arrays that are traced are taken one after another.
    """
    if batches_may_hang() and not is_known(*arrays):
        return jax.lax.map(lambda args: fn(*args), arrays)
    return jax.vmap(fn)(*arrays)
