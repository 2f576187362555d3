"""Zeros around images, and the sizes of what windows make of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | int | Sequence[tuple[int, int]]  # as a user says it
Pads = Sequence[tuple[int, int]]  # of rows and of columns; a negative one cuts off


def to_pads(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Padding
) -> list[tuple[int, int]]:
    """Return the zeros around images of a height and width."""
    if isinstance(padding, str):
        return list(lax.padtype_to_pads(size, kernel, strides, padding))
    if isinstance(padding, int):
        return [(padding, padding)] * 2
    return list(padding)


def check_size(
    what: str,
    size: Sequence[int],
    window: Sequence[int],
    pads: Pads = ((0, 0),) * 2,
) -> None:
    """Raise a `ValueError` if a window does not fit, or pads cut off too much."""
    if any(start > stop for start, stop in kept(size, pads)):
        raise ValueError(
            f"{what} must not cut off more rows or columns than there are, got pads "
            f"{[tuple(p) for p in pads]} for {size[0]}x{size[1]}"
        )
    if any(n + sum(p) < k for n, k, p in zip(size, window, pads, strict=True)):
        raise ValueError(
            f"{what} needs an input of at least its window "
            f"{window[0]}x{window[1]}, padding included, got {size[0]}x{size[1]}"
        )


def kept(size: Sequence[int], pads: Pads) -> list[tuple[int, int]]:
    """Say from where to where negative pads leave the rows and columns of images."""
    return [
        (max(-low, 0), n - max(-high, 0))
        for n, (low, high) in zip(size, pads, strict=True)
    ]


def pad(x: jax.Array, pads: Pads) -> jax.Array:
    """Put zeros around images."""
    edges = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def output_size(shape: Sequence[int], taps: Sequence[int], pads: Pads) -> list[int]:
    """Count the rows and columns that come of images `[b, h, w, i]` with stride 1."""
    return [
        size + low + high - k + 1
        for size, (low, high), k in zip(shape[1:3], pads, taps, strict=True)
    ]


def turn(kernel: jax.Array, pads: Pads) -> tuple[jax.Array, tuple]:
    """Return the kernel and the pads by which the gradient of images is correlated."""
    opposite = tuple(
        (k - 1 - low, k - 1 - high)
        for k, (low, high) in zip(kernel.shape[:2], pads, strict=True)
    )
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3), opposite
