"""Convolution and pooling that stay fast inside loops and for stacked clients.

XLA:CPU runs the gradient of `lax.conv` inside `lax.scan` or `while_loop` 20 to 30
times slower than outside, and `vmap` over per-client kernels turns a convolution
into a grouped one, slow everywhere. Here a convolution is static slices and one
matrix product, which `vmap` batches. Two measures bring a training step of thin
layers close to the speed of the matrix products alone:

* `_product` fixes the orientation of the product that gives the kernel's gradient;
* `convolve_pool` computes two neighbouring columns of a wide kernel as one row of
  the product, with a kernel that holds two shifted copies. That is `(k+1)/k` times
  the arithmetic and half the rows, so fewer copies and a wider product.

All agree with `flax.linen.Conv` and `flax.linen.max_pool` in outputs and in
gradients, those of tied maxima included. Because of `_product`, gradients are by
reverse mode, of any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedgen.core.federation import Model, Params

Padding = str | int | Sequence[tuple[int, int]]


@jax.custom_jvp
def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maximum whose gradient goes to `a` alone where both are equal."""
    return jnp.maximum(a, b)


@_first_max.defjvp
def _first_max_jvp(primals, tangents):
    a, b = primals
    return _first_max(a, b), jnp.where(a >= b, *tangents)


@jax.custom_vjp
def _product(patches: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply `patches [..., k]` and `kernel [k, o]`.

    The gradient of the kernel is computed as `[o, k]` and turned afterwards. The
    barrier keeps XLA from folding the turn into the product, whose result would have
    only `o` columns and which is up to three times slower on CPU where `o` is small.
    """
    return patches @ kernel


def _product_forward(patches, kernel):
    return patches @ kernel, (patches, kernel)


def _product_backward(residuals, cotangent):
    patches, kernel = residuals
    rows = tuple(range(patches.ndim - 1))
    turned = lax.dot_general(cotangent, patches, ((rows, rows), ((), ())))
    return cotangent @ kernel.T, lax.optimization_barrier(turned).T


_product.defvjp(_product_forward, _product_backward)


def _pads(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Padding
) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        return list(lax.padtype_to_pads(size, kernel, strides, padding))
    if isinstance(padding, int):
        return [(padding, padding)] * 2
    return list(padding)


def _check_size(
    what: str,
    size: Sequence[int],
    window: Sequence[int],
    pads: Sequence = ((0, 0),) * 2,
) -> None:
    if any(n + sum(p) < k for n, k, p in zip(size, window, pads, strict=True)):
        raise ValueError(
            f"{what} needs an input of at least its window "
            f"{window[0]}x{window[1]}, padding included, got {size[0]}x{size[1]}"
        )


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
    window, features = kernel.shape[:2], kernel.shape[-1]
    pads = _pads(x.shape[1:3], window, strides, padding)
    _check_size("a convolution", x.shape[1:3], window, pads)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    high, wide = (
        (n - k) // s + 1 for n, k, s in zip(x.shape[1:3], window, strides, strict=True)
    )
    patches = jnp.concatenate(
        [
            x[
                :,
                row : row + (high - 1) * strides[0] + 1 : strides[0],
                col : col + (wide - 1) * strides[1] + 1 : strides[1],
            ]
            for row in range(window[0])
            for col in range(window[1])
        ],
        axis=-1,
    )
    return _product(patches, kernel.reshape(-1, features))


def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum of each 2x2 block, `[b, h, w, c] -> [b, h//2, w//2, c]`.

    An odd last row or column is dropped. Of equal maxima the first, row by row,
    receives the gradient.

    Raises:
      ValueError: If the input is smaller than one block.
    """
    _check_size("max-pooling", x.shape[1:3], (2, 2))
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
    high, wide, channels, features = kernel.shape
    pads = _pads(x.shape[1:3], (high, wide), (1, 1), padding)
    _check_size("a convolution", x.shape[1:3], (high, wide), pads)
    # For narrower kernels the extra arithmetic outweighs the copies saved.
    if wide < 5:
        return max_pool(convolve(x, kernel, padding=pads))

    width = x.shape[2] + sum(pads[1]) - wide + 1
    _check_size("max-pooling", (x.shape[1] + sum(pads[0]) - high + 1, width), (2, 2))
    pairs, span = width // 2, (wide + 2) // 2  # of outputs; under the wider kernel
    columns = 2 * (pairs + span - 1)
    # A negative high padding drops the columns that only a dropped output reads.
    right = columns - x.shape[2] - pads[1][0]
    edges = ((0, 0), pads[0], (pads[1][0], right), (0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [(*edge, 0) for edge in edges])
    x = x.reshape(*x.shape[:2], -1, 2 * channels)
    spare = 2 * span - wide
    twins = [
        jnp.pad(kernel, ((0, 0), (shift, spare - shift), (0, 0), (0, 0)))
        for shift in (0, 1)
    ]
    twin = jnp.stack(twins, axis=3).reshape(high, span, 2 * channels, 2 * features)
    y = convolve(x, twin, padding="VALID")
    return max_pool(y.reshape(*y.shape[:2], 2 * pairs, features))


class Conv(nn.Module):
    """`flax.linen.Conv` for images, as slices and one matrix product.

    Attributes:
      features: Number of output channels.
      kernel_size: Height and width of the kernel.
      strides: Steps along height and width.
      padding: "SAME", "VALID", one width for all sides, or `((low, high), ...)`.
      use_bias: Whether to add a bias.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, i] -> [b, h', w', features]`."""
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel_size, x.shape[-1], self.features),
        )
        y = convolve(x, kernel, self.strides, self.padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += jnp.expand_dims(bias, (0, 1, 2))
        return y


class ConvPool(nn.Module):
    """A convolution with bias, then 2x2 max-pooling.

    A monotone activation may follow the pooling in place of preceding it; the
    result is the same and it costs a quarter.

    Attributes:
      features: Number of output channels.
      kernel_size: Height and width of the kernel.
      padding: "SAME", "VALID", one width for all sides, or `((low, high), ...)`.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: Padding = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, i] -> [b, h'//2, w'//2, features]`."""
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel_size, x.shape[-1], self.features),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = convolve_pool(x, kernel, self.padding)
        return y + jnp.expand_dims(bias, (0, 1, 2))


def assemble(
    name: str,
    body: nn.Module,
    input_shape: tuple[int, ...],
    num_classes: int,
    rank: int | None = None,
) -> Model:
    """Join a body and a linear head into a model.

    Args:
      name: The model's name.
      body: Module that maps `[b, ...] -> [b, d]`.
      input_shape: Shape of one sample.
      num_classes: Number of logits.
      rank: Number of axes a sample must have, if it matters.

    Raises:
      ValueError: If a size is not positive or the input does not suit the body.
    """
    if rank is not None and len(input_shape) != rank:
        raise ValueError(
            f"{name} takes samples with {rank} axes, height, width and channels, "
            f"got shape {input_shape}"
        )
    sizes = {"num_classes": num_classes, "every axis of a sample": min(input_shape)}
    for field in ("hidden", "width"):
        if hasattr(body, field):
            sizes[field] = getattr(body, field)
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {what} must be >= 1, got {size}")

    dense = nn.Dense(num_classes)
    sample = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    try:
        embedding, _ = jax.eval_shape(body.init_with_output, jax.random.key(0), sample)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot read samples of shape {input_shape}: {error}"
        ) from error

    def init(key: jax.Array) -> Params:
        body_key, head_key = jax.random.split(key)
        return {
            "body": body.lazy_init(body_key, sample)["params"],
            "head": dense.lazy_init(head_key, embedding)["params"],
        }

    def embed(params: Params, x: jax.Array) -> jax.Array:
        return body.apply({"params": params["body"]}, x)

    def head(params: Params, z: jax.Array) -> jax.Array:
        return dense.apply({"params": params["head"]}, z)

    return Model(name, init, embed, head, embedding.shape[-1])
