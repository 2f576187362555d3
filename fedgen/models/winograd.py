"""Convolutions by minimal filtering: fewer products, for more sums.

Two neighbouring outputs of a filter with r taps depend on r + 1 inputs. In transformed
coordinates they take fewer than 2r products (Winograd, 1980):

    y = A^T [(G g) * (B^T d)]

In two dimensions, with every transform applied to rows and to columns, and with the
sum over channels before the last one, a convolution becomes one matrix product for
every pair of coordinates (Lavin and Gray, CVPR 2016). It takes 1 / 2.25 of the
arithmetic for 3x3 kernels and 1 / 2.04 for 5x5. The latter join the algorithms for
three and for two taps, so that A and B hold nothing but 0, 1 and -1, and rounding is
hardly worse than that of plain sums; fewer products still would make it much worse.

Images are worked on a few at a time, which keeps small what lies between transforms.
The loop has a second use: XLA fuses sums with whatever reads them, and would compute
them again for every one of 16 or 49 readers, but not across a loop of several turns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax

from fedgen.models import padding
from fedgen.models.padding import Pads

Grid = list[list[jax.Array]]  # by coordinates, or by places in a 2x2 block

_TILES = 256  # at once, unless an image alone has more


class Filter(NamedTuple):
    """An algorithm for two outputs of a filter of r taps, with p products."""

    inputs: np.ndarray  # B^T [p, r + 1]
    kernel: np.ndarray  # G [p, r]
    outputs: np.ndarray  # A^T [2, p]


_TWO = Filter(
    np.array([[1, -1, 0], [0, 1, 0], [0, 1, -1]]),
    np.array([[1, 0], [1, 1], [0, 1]]),
    np.array([[1, 1, 0], [0, 1, -1]]),
)
_THREE = Filter(
    np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
)
# Taps 0 to 2 read inputs 0 to 3, taps 3 and 4 read inputs 3 to 5.
_FIVE = Filter(
    np.vstack(
        [np.pad(f.inputs, ((0, 0), at)) for f, at in ((_THREE, (0, 2)), (_TWO, (3, 0)))]
    ),
    scipy.linalg.block_diag(_THREE.kernel, _TWO.kernel),
    np.hstack([_THREE.outputs, _TWO.outputs]),
)
FILTERS = {3: _THREE, 5: _FIVE}  # by taps


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiply a matrix of 0, 1 and -1 by a column of arrays."""

    def combine(coefficients):
        total = None
        for c, part in zip(coefficients, parts, strict=True):
            if c and total is None:
                total = part if c > 0 else -part
            elif c:
                total = total + part if c > 0 else total - part
        return total

    return [combine(coefficients) for coefficients in matrix]


def _both_ways(matrix: np.ndarray, grid: Grid) -> Grid:
    """Compute `M X M^T` for a grid `X` of arrays."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [_combine(matrix, row) for row in zip(*columns, strict=True)]


def _transform_kernel(kernel: jax.Array) -> jax.Array:
    """Compute `G g G^T`, `[r, r, i, o] -> [p, p, i, o]`.

    One product by the Kronecker product of `G` with itself, which XLA:CPU computes
    several times faster than one for either side.
    """
    g = FILTERS[len(kernel)].kernel
    p, r = g.shape
    both = jnp.asarray(np.kron(g, g), kernel.dtype)
    weight = jnp.matmul(both, kernel.reshape(r * r, -1), precision="highest")
    return weight.reshape(p, p, *kernel.shape[2:])


def make_even(
    shape: Sequence[int], window: Sequence[int], pads: Pads, step: int = 1
) -> tuple[tuple[int, int], ...]:
    """Pad so that 2x2 blocks fit, with one row or column more, or less with step -1."""
    sizes = padding.output_size(shape, window, pads)
    return tuple(
        (low, high + step * (size % 2))
        for size, (low, high) in zip(sizes, pads, strict=True)
    )


def _transform_tiles(x: jax.Array, taps: int, pads: Pads) -> Grid:
    """Compute `B^T d B` of all tiles of images, `[tiles, i]` each."""
    x = padding.pad(x, pads)
    batch, high, wide, channels = x.shape
    x = x.reshape(batch, high // 2, 2, wide // 2, 2, channels)
    down, right = (high - taps + 1) // 2, (wide - taps + 1) // 2

    def pixel(row, column):  # of all tiles
        top, left = row // 2, column // 2
        return x[:, top : top + down, row % 2, left : left + right, column % 2]

    span = range(taps + 1)
    tiles = _both_ways(
        FILTERS[taps].inputs, [[pixel(u, v) for v in span] for u in span]
    )
    return [[part.reshape(-1, channels) for part in row] for row in tiles]


def _tiles(shape: Sequence[int], taps: int, pads: Pads) -> tuple[int, int]:
    """Count the tiles of an image, downwards and to the right."""
    down, right = (n // 2 for n in padding.output_size(shape, (taps, taps), pads))
    return down, right


def num_tiles(shape: Sequence[int], taps: int, pads: Pads) -> tuple[int, int]:
    """Count the tiles of one of the images `[b, h, w, i]`, and those at once."""
    down, right = _tiles(shape, taps, pads)
    return down * right, down * right * _images_at_once(shape[0], down * right)


def _images_at_once(batch: int, tiles: int) -> int:
    """Return the size of equal parts of up to `_TILES` tiles, of two parts or more."""
    return greatest_divisor(batch, min(batch // 2, _TILES // max(1, tiles)))


def greatest_divisor(batch: int, most: int) -> int:
    """Return the largest divisor of a batch up to `most`, or 1."""
    return next(n for n in range(max(1, most), 0, -1) if batch % n == 0)


def divide(arrays: Any, size: int) -> Any:
    """Divide arrays `[b, ...]` into parts `[b / size, size, ...]`."""
    return jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def correlate_in_blocks(x: jax.Array, kernel: jax.Array, pads: Pads) -> Grid:
    """Correlate with stride 1; outputs are apart by their places in 2x2 blocks.

    Gradients are by reverse mode, of any order.

    Args:
      x: Images `[b, h, w, i]`.
      kernel: `[r, r, i, o]`, with r out of `FILTERS`.
      pads: As `make_even` returns them.

    Returns:
      `y[p][q] [b, h' / 2, w' / 2, o]`, the rows `2n + p` and columns `2m + q` of the
      result `[b, h', w', o]`.
    """
    taps = len(kernel)
    down, right = _tiles(x.shape, taps, pads)
    images = _images_at_once(len(x), down * right)

    # Batches of small products are slow on a CPU, so stacked clients take turns.
    @jax.custom_batching.sequential_vmap
    def correlate(x, kernel):
        weight = _transform_kernel(kernel)

        def of_some(x):
            products = [
                [part @ weight[u, v] for v, part in enumerate(row)]
                for u, row in enumerate(_transform_tiles(x, taps, pads))
            ]
            blocks = _both_ways(FILTERS[taps].outputs, products)
            return jax.tree.map(
                lambda y: y.reshape(-1, down, right, y.shape[-1]), blocks
            )

        blocks = lax.map(of_some, divide(x, images))
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), blocks)

    return correlate(x, kernel)


def _forward(x, kernel, pads):
    return correlate_in_blocks(x, kernel, pads), (x, kernel)


def _backward(pads, residuals, cotangent):
    x, kernel = residuals
    return (
        correlate(interleave(cotangent), *padding.turn(kernel, pads)),
        _towards_kernel(x, cotangent, len(kernel), pads),
    )


correlate_in_blocks.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _towards_kernel(x: jax.Array, cotangent: Grid, taps: int, pads: Pads) -> jax.Array:
    """Compute the gradient `[r, r, i, o]`, in transformed coordinates until the end."""
    down, right = _tiles(x.shape, taps, pads)
    images = _images_at_once(len(x), down * right)
    channels, features = x.shape[-1], cotangent[0][0].shape[-1]

    @jax.custom_batching.sequential_vmap
    def towards_kernel(x, cotangent):
        def of_some(total, some):
            x, cotangent = some
            towards = _both_ways(FILTERS[taps].outputs.T, cotangent)  # products
            weight = [
                [part.T @ y.reshape(-1, features) for part, y in zip(*row, strict=True)]
                for row in zip(_transform_tiles(x, taps, pads), towards, strict=True)
            ]
            return jax.tree.map(jnp.add, total, weight), None

        p = len(FILTERS[taps].kernel)
        zeros = [[jnp.zeros((channels, features), x.dtype)] * p] * p
        weight, _ = lax.scan(of_some, zeros, divide((x, cotangent), images))
        weight = jnp.stack([jnp.stack(row) for row in weight])
        kernel = jax.ShapeDtypeStruct((taps, taps, channels, features), x.dtype)
        (gradient,) = jax.linear_transpose(_transform_kernel, kernel)(weight)
        return gradient

    return towards_kernel(x, cotangent)


def _towards_kernel_forward(x, cotangent, taps, pads):
    return _towards_kernel(x, cotangent, taps, pads), (x, cotangent)


def _towards_kernel_backward(taps, pads, residuals, kernel):
    # It is linear in both, and what it pairs them with is a kernel.
    x, cotangent = residuals
    return (
        correlate(interleave(cotangent), *padding.turn(kernel, pads)),
        correlate_in_blocks(x, kernel, pads),
    )


_towards_kernel.defvjp(_towards_kernel_forward, _towards_kernel_backward)


def interleave(blocks: Grid) -> jax.Array:
    """Put blocks together, `2 x 2` times `[b, h, w, o]` to `[b, 2h, 2w, o]`."""
    y = jnp.stack([jnp.stack(row, axis=3) for row in blocks], axis=2)
    batch, down, _, right, _, features = y.shape
    return y.reshape(batch, 2 * down, 2 * right, features)


def correlate(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Correlate `x [b, h, w, i]` and `kernel [r, r, i, o]` with stride 1."""
    rows, columns = padding.output_size(x.shape, kernel.shape[:2], pads)
    even = make_even(x.shape, kernel.shape[:2], pads)
    return interleave(correlate_in_blocks(x, kernel, even))[:, :rows, :columns]
