"""Convolution and pooling that stay fast inside loops and for stacked clients.

XLA:CPU runs the gradient of `lax.conv` inside `lax.scan` or `while_loop` 20 to 30
times slower than outside, and `vmap` over per-client kernels turns a convolution
into a grouped one, slow everywhere. So there are three forms, and `_form` is the one
place that chooses:

* On CPU, for 3x3 and 5x5 kernels between many channels, minimal filtering, which takes
  about half of the arithmetic (`fedgen.models.winograd`).
* On CPU, XLA's convolution with gradients that are turned into a plain correlation
  again and into products (`_correlate`). It copies no patches. Inside a loop it runs on
  one thread, so every core should be a device (`fedgen.core.execution.use_cores`);
  where a device has many cores, slices use them all. Stacked clients take turns.
* Elsewhere, and where channels are few, static slices and one matrix product, which
  `vmap` batches (`_by_slices`). Where channels are few or kernels wide, copies cost
  more than products, and two neighbouring outputs are one row of the product, with a
  kernel that holds two shifted copies. That is `(k+1)/k` times the arithmetic and half
  the rows, so fewer copies.

For finite inputs all agree with `flax.linen.Conv`, `ConvTranspose` and `max_pool` in
outputs and in gradients, those of tied maxima included; an infinite pixel may reach
its neighbours, being multiplied by zeros. Gradients are by reverse mode, of any order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedgen.core import execution
from fedgen.models import winograd
from fedgen.models.padding import (
    Padding,
    Pads,
    check_size,
    kept,
    output_size,
    pad,
    to_pads,
    turn,
)

_BLOCK = 2**20  # numbers that are copied at once, which should stay in a cache
_SMALL = 16  # channels and features up to which XLA has a slower convolution
_FEW = 6  # channels up to which slices are faster, by two outputs at once,
_MANY = 32  # but not for so many features
_WIDE = 5  # columns of a kernel, from which two outputs share most of what they read
_CORES = 2  # of a device, up to which XLA's convolution, on one, is faster than slices
# From where on minimal filtering is faster. Smaller images take little time anyhow, and
# its programs take long to compile.
_CHANNELS, _TILES, _TILES_AT_ONCE = 32, 16, 128


@jax.custom_jvp
def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maximum whose gradient goes to `a` alone where both are equal."""
    return jnp.maximum(a, b)


@_first_max.defjvp
def _first_max_jvp(primals, tangents):
    a, b = primals
    return _first_max(a, b), jnp.where(a >= b, *tangents)


def _form(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    pads: Pads,
) -> str:
    """Choose the fastest form, "winograd", "library" or "slices".

    On CPU XLA's own convolution is up to three times faster than slices, in a form
    without dilation, which `_correlate` keeps its gradients in. It has a kernel for
    float32 only. With few channels and not many features, or one position in the
    kernel, there is little to copy and slices win. Minimal filtering beats both where
    channels are so many that products outweigh sums, and tiles so many that they fill
    a product.
    """
    high, wide, channels, features = kernel.shape
    if (
        jax.default_backend() != "cpu"
        or not x.dtype == kernel.dtype == jnp.float32
        or tuple(strides) != (1, 1)
        or (high, wide) == (1, 1)
        or (channels <= _FEW and features < _MANY)
        or execution.num_cores() > _CORES * jax.local_device_count()
    ):
        return "slices"
    if high == wide and high in winograd.FILTERS:
        even = winograd.make_even(x.shape, (high, wide), pads)
        each, at_once = winograd.num_tiles(x.shape, high, even)
        if (
            min(channels, features) >= _CHANNELS
            and len(x) > 1
            and each >= _TILES
            and at_once >= _TILES_AT_ONCE
        ):
            return "winograd"
    return "library"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Correlate with stride 1 by XLA's convolution, gradients included.

    The gradients that JAX would derive dilate, or contract over the batch, which
    XLA:CPU does by plain loops. Turned as they are here, they are a correlation like
    the first one and a product.
    """
    # With few channels XLA:CPU reads beside images whose low pad is negative, where the
    # high one adds no more (openxla/xla#48713). So what is cut off goes first.
    (top, bottom), (left, right) = kept(x.shape[1:3], pads)
    x = x[:, top:bottom, left:right]
    pads = [(max(low, 0), max(high, 0)) for low, high in pads]
    channels, features = kernel.shape[2:]
    if max(channels, features) <= _SMALL and 2 * features > _SMALL:
        # XLA leaves so few to a slower library, so zeros make either side one more. For
        # half as many features they would cost more than they save.
        more, wider = (1, 0) if channels == _SMALL else (0, _SMALL + 1 - features)
        x = jnp.pad(x, (*((0, 0),) * 3, (0, more)))
        kernel = jnp.pad(kernel, (*((0, 0),) * 2, (0, more), (0, wider)))

    # Kernels of several clients would become groups, which are slow everywhere.
    @jax.custom_batching.sequential_vmap
    def correlate(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return correlate(x, kernel)[..., :features]


def _correlate_forward(x, kernel, pads):
    return _correlate(x, kernel, pads), (x, kernel)


def _correlate_backward(pads, residuals, cotangent):
    x, kernel = residuals
    return (
        _correlate(cotangent, *turn(kernel, pads)),
        _towards_kernel(x, cotangent, pads),
    )


_correlate.defvjp(_correlate_forward, _correlate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _towards_kernel(x: jax.Array, cotangent: jax.Array, pads: Pads) -> jax.Array:
    """Compute the kernel's gradient `[kh, kw, i, o]`, one product for every few images.

    Images are copied once for every column of the window and cotangents once for every
    row, each moved by it, and the product pairs all columns with all rows. Where
    channels are few, patches, a copy of images for every position of the window, are
    less to copy, and cotangents stay as they are.
    """
    window = high, wide = output_size(x.shape, cotangent.shape[1:3], pads)
    rows, columns = cotangent.shape[1:3]
    channels, features = x.shape[-1], cotangent.shape[-1]
    # They count twice, as pieces of few channels are slow to copy.
    patches = 2 * wide * channels * (high - 1) < high * features
    low = pads[0][0]

    def moved(x, y):
        x = pad(x, pads if patches else ((0, 0), pads[1]))
        x = jnp.concatenate([x[:, :, j : j + columns] for j in range(wide)], axis=-1)
        if patches:
            copies = [x[:, i : i + rows] for i in range(high)]
            return jnp.concatenate(copies, axis=-1), y
        spare = x.shape[1] + low - rows
        copies = [pad(y, ((i - low, spare - i), (0, 0))) for i in range(high)]
        return x, jnp.concatenate(copies, axis=-1)

    @jax.custom_batching.sequential_vmap
    def towards_kernel(x, cotangent):
        def add(total, some):
            x, y = (a.reshape(-1, a.shape[-1]) for a in moved(*some))
            return total + x.T @ y, None

        copies = jax.eval_shape(moved, x, cotangent)
        size = sum(copy.size for copy in copies)
        images = winograd.greatest_divisor(len(x), _BLOCK * len(x) // max(1, size))
        shape = [copy.shape[-1] for copy in copies]
        parts = winograd.divide((x, cotangent), images)
        total, _ = lax.scan(add, jnp.zeros(shape, x.dtype), parts)
        if patches:
            return total.reshape(*window, channels, features)
        total = total.reshape(wide, channels, high, features)
        return total.transpose(2, 0, 1, 3)

    return towards_kernel(x, cotangent)


def _towards_kernel_forward(x, cotangent, pads):
    return _towards_kernel(x, cotangent, pads), (x, cotangent)


def _towards_kernel_backward(pads, residuals, kernel):
    # It is linear in both, and what it pairs them with is a kernel.
    x, cotangent = residuals
    return (
        _correlate(cotangent, *turn(kernel, pads)),
        _correlate(x, kernel, pads),
    )


_towards_kernel.defvjp(_towards_kernel_forward, _towards_kernel_backward)


def _by_slices(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    pads: Pads,
) -> jax.Array:
    """Correlate by static slices and one matrix product.

    A row of the product holds one output, or two neighbours `together`, so the next row
    reads `step` columns further on. As many columns are joined to one of more channels,
    and rows are dealt out by their remainders under the stride. So no slice skips
    anything: the gradients of those that do have zeros in between, which a CPU is slow
    to add up.
    """
    (high, wide, channels, features), (down, right) = kernel.shape, strides
    rows, columns = (
        (n - 1) // s + 1
        for n, s in zip(output_size(x.shape, (high, wide), pads), strides, strict=True)
    )
    twins = right == 1 and wide > 1 and (channels <= _FEW or wide >= _WIDE)
    together = 2 if twins else 1
    step, read = together * right, together - 1 + wide
    across, span = -(-columns // together), -(-read // step)
    seen = rows + (high - 1) // down, across + span - 1  # in units of strides and steps
    extra = [
        (low, unit * units - size - low)  # a negative one cuts off what nobody reads
        for unit, units, size, (low, _) in zip(
            (down, step), seen, x.shape[1:3], pads, strict=True
        )
    ]
    x = pad(x, extra).reshape(len(x), seen[0], down, seen[1], step * channels)
    # Split, not indexed: its gradient puts parts together, and adds no zeros up.
    dealt = [part[:, :, 0] for part in jnp.split(x, down, axis=2)]

    def seen_from(row, unit):  # by a row of the window, in one of the joined columns
        top, depth = row // down, min(step, read - unit * step) * channels
        part = dealt[row % down]
        return part[:, top : top + rows, unit : unit + across, :depth]

    patches = jnp.concatenate(
        [seen_from(row, unit) for row, unit in np.ndindex(high, span)], axis=-1
    )
    shifts = [(n, together - 1 - n) for n in range(together)]
    shifted = [jnp.pad(kernel, ((0, 0), shift, (0, 0), (0, 0))) for shift in shifts]
    weight = jnp.stack(shifted, axis=3).reshape(-1, together * features)
    # A product of matrices, as XLA:CPU is slow at the gradients of one with more axes.
    y = patches.reshape(-1, patches.shape[-1]) @ weight
    return y.reshape(len(x), rows, together * across, features)[:, :, :columns]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
) -> jax.Array:
    """Correlate `x [b, h, w, i]` with `kernel [kh, kw, i, o]`.

    Args:
      x: Images, channels last.
      kernel: Weights.
      strides: Steps along height and width.
      padding: "SAME", "VALID", one width for all sides, or `((low, high), ...)`.

    Returns:
      `[b, h', w', o]`.

    Raises:
      ValueError: If the padded input is smaller than the kernel.
    """
    window = kernel.shape[:2]
    pads = to_pads(x.shape[1:3], window, strides, padding)
    check_size("a convolution", x.shape[1:3], window, pads)
    match _form(x, kernel, strides, pads):
        case "winograd":
            return winograd.correlate(x, kernel, pads)
        case "library":
            return _correlate(x, kernel, tuple(pads))
    return _by_slices(x, kernel, strides, pads)


def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum of each 2x2 block, `[b, h, w, c] -> [b, h//2, w//2, c]`.

    An odd last row or column is dropped. Of equal maxima the first, row by row,
    receives the gradient.

    Raises:
      ValueError: If the input is smaller than one block.
    """
    check_size("max-pooling", x.shape[1:3], (2, 2))
    batch, high, wide, channels = x.shape
    high, wide = high // 2, wide // 2
    x = x[:, : 2 * high, : 2 * wide].reshape(batch, high, 2, wide, 2, channels)
    x = _first_max(x[..., 0, :], x[..., 1, :])
    return _first_max(x[:, :, 0], x[:, :, 1])


def convolve_pool(
    x: jax.Array, kernel: jax.Array, padding: Padding = "SAME"
) -> jax.Array:
    """Convolve with stride 1, then take the maximum of each 2x2 block.

    Args:
      x: Images `[b, h, w, i]`.
      kernel: Weights `[kh, kw, i, o]`.
      padding: As in `convolve`.

    Returns:
      `[b, h'//2, w'//2, o]`.

    Raises:
      ValueError: If the input is too small for the kernel or for one block.
    """
    window = kernel.shape[:2]
    pads = to_pads(x.shape[1:3], window, (1, 1), padding)
    check_size("a convolution", x.shape[1:3], window, pads)
    check_size("max-pooling", output_size(x.shape, window, pads), (2, 2))
    pads = winograd.make_even(x.shape, window, pads, step=-1)  # less what pooling drops
    if _form(x, kernel, (1, 1), pads) == "winograd":
        top, bottom = winograd.correlate_in_blocks(x, kernel, pads)
        return _first_max(_first_max(*top), _first_max(*bottom))
    return max_pool(convolve(x, kernel, padding=pads))


def convolve_transposed(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: str = "SAME",
) -> jax.Array:
    """Correlate `x [b, h, w, i]`, strides - 1 zeros between its pixels, with a kernel.

    Every output position modulo the strides sees its own part of the kernel, so one
    correlation of `x` itself with all parts gives all outputs, and no zero is ever
    multiplied (sub-pixel convolution; Shi et al., CVPR 2016).

    Args:
      x: Images, channels last.
      kernel: Weights `[kh, kw, i, o]`, not turned around, as in
        `jax.lax.conv_transpose`.
      strides: Outputs per input along height and width.
      padding: "SAME", `[b, sh * h, sw * w, o]`, or "VALID", at least that.

    Raises:
      ValueError: If the padding is neither.
    """
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding must be SAME or VALID, got {padding!r}")
    window, (channels, features) = kernel.shape[:2], kernel.shape[2:]
    spans = [-(-k // s) for k, s in zip(window, strides, strict=True)]
    spare = [
        (0, span * s - k) for span, s, k in zip(spans, strides, window, strict=True)
    ]
    parts = jnp.pad(jnp.flip(kernel, (0, 1)), (*spare, (0, 0), (0, 0)))
    (high, wide), (down, right) = spans, strides
    parts = parts.reshape(high, down, wide, right, channels, features)
    parts = jnp.flip(parts.transpose(0, 2, 4, 1, 3, 5), (0, 1))
    parts = parts.reshape(high, wide, channels, -1)
    y = convolve(x, parts, padding=[(span - 1, span - 1) for span in spans])
    y = y.reshape(*y.shape[:3], down, right, features).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(len(x), y.shape[1] * down, y.shape[3] * right, features)

    for axis, (size, k, s) in enumerate(
        zip(x.shape[1:3], window, strides, strict=True), start=1
    ):
        overlap = max(k - s, 0)
        first = overlap // 2 if padding == "SAME" else 0
        length = s * size + (0 if padding == "SAME" else overlap)
        y = lax.slice_in_dim(y, first, first + length, axis=axis)
    return y
