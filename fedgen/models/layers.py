"""Flax modules for images, and models made of a body and a linear head.

The modules have the parameters of `flax.linen`'s and agree with them to rounding;
`fedgen.models.convolution` has what convolutions and pooling compute.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedgen.core.federation import Model, Params
from fedgen.models import convolution
from fedgen.models.padding import Padding

_ROWS, _FEATURES = 32, 256  # up to and from which products with columns are faster


def _multiply(x: jax.Array, kernel: jax.Array, *args, **kwargs) -> jax.Array:
    """Compute what `lax.dot_general` does for `flax.linen.Dense`, samples as columns.

    With few samples and a wide kernel XLA:CPU is faster so, gradients included. The
    barrier keeps it from turning columns back.
    """
    few = x.ndim == 2 and len(x) <= _ROWS
    many = kernel.shape[-1] >= _FEATURES
    if jax.default_backend() != "cpu" or not few or not many:
        return lax.dot_general(x, kernel, *args, **kwargs)
    columns = lax.optimization_barrier(x.T)
    return lax.dot_general(columns, kernel, (((0,), (0,)), ((), ())), **kwargs)


Dense = functools.partial(nn.Dense, dot_general=_multiply)


def _kernel(module: nn.Module, x: jax.Array) -> jax.Array:
    """Return weights `[kh, kw, i, o]`; to be called from within a compact module."""
    shape = (*module.kernel_size, x.shape[-1], module.features)
    return module.param("kernel", nn.initializers.lecun_normal(), shape)


def _bias(module: nn.Module) -> jax.Array:
    """Return the bias `[1, 1, 1, o]`; to be called from within a compact module."""
    bias = module.param("bias", nn.initializers.zeros, (module.features,))
    return jnp.expand_dims(bias, (0, 1, 2))


class Conv(nn.Module):
    """`flax.linen.Conv` for images, in whichever form is fast.

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
        kernel = _kernel(self, x)
        y = convolution.convolve(x, kernel, self.strides, self.padding)
        if self.use_bias:
            y += _bias(self)
        return y


class ConvTranspose(nn.Module):
    """`flax.linen.ConvTranspose` for images, as a convolution of the small image.

    Attributes:
      features: Number of output channels.
      kernel_size: Height and width of the kernel.
      strides: Outputs per input along height and width.
      padding: "SAME" or "VALID".
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, i] -> [b, h', w', features]`."""
        kernel = _kernel(self, x)
        return convolution.convolve_transposed(
            x, kernel, self.strides, self.padding
        ) + _bias(self)


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
        kernel = _kernel(self, x)
        return convolution.convolve_pool(x, kernel, self.padding) + _bias(self)


class GroupNorm(nn.Module):
    """`flax.linen.GroupNorm` for images, which adds up channels as vectors.

    XLA:CPU sums a group one number after the other if its channels are summed with its
    positions. Here positions come first, which leaves little to the rest, and a pixel
    is then multiplied by one number and added to another.

    Attributes:
      group_size: Channels that share mean and variance.
      epsilon: Added to the variance.
    """

    group_size: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, c] -> [b, h, w, c]`.

        Raises:
          ValueError: If `c` is no multiple of the size of a group.
        """
        batch, high, wide, channels = x.shape
        if channels % self.group_size:
            raise ValueError(
                f"channels must be a multiple of the {self.group_size} of a group, "
                f"got {channels}"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def mean(x: jax.Array) -> jax.Array:  # of the group of every channel, [b, c]
            # Two sums, as one over both axes is a fifth slower.
            total = x.astype(jnp.promote_types(x.dtype, jnp.float32)).sum(1).sum(1)
            groups = channels // self.group_size
            total = total.reshape(batch, groups, self.group_size).sum(2)
            each = total / (high * wide * self.group_size)
            return jnp.repeat(each, self.group_size, axis=1)

        center = mean(x)
        variance = jnp.maximum(mean(x**2) - center**2, 0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale[None]
        offset = bias[None] - center * factor
        return x * factor[:, None, None] + offset[:, None, None]


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
