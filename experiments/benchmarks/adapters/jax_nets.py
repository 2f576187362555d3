"""The benchmarks' networks in plain JAX, on weights by path. Runs on old JAX too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]
STAGES = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2)}


def set_precision(precision: str) -> None:
    """Set the precision of float32 products; an empty one leaves it as it is."""
    if precision:
        jax.config.update("jax_default_matmul_precision", precision)


def device_bytes() -> int:
    """Return the most memory of an accelerator that was in use, 0 on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """Convolve by XLA's own operation."""
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=dims
    )


def convolve_slices(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """Convolve by static slices and one matrix product: faster in loops on a CPU."""
    high, wide, channels, features = kernel.shape
    pads = padding
    if isinstance(padding, str):
        size, strides = x.shape[1:3], (stride, stride)
        pads = lax.padtype_to_pads(size, (high, wide), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows = (x.shape[1] - high) // stride + 1
    columns = (x.shape[2] - wide) // stride + 1
    patches = [
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(high)
        for j in range(wide)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, features)


def forward(
    model: str,
    params: dict[str, jax.Array],
    x: jax.Array,
    convolution: Callable[..., jax.Array] = convolve,
) -> jax.Array:
    """Compute logits of classes, or for `vae` of pixels, `[b, h, w, c] -> [b, out]`."""

    def conv(x, at, stride=1, padding="SAME", bias=True):
        y = convolution(x, params[f"{at}/kernel"], stride, padding)
        return y + params[f"{at}/bias"].reshape(1, 1, 1, -1) if bias else y

    def dense(x, at):
        return x @ params[f"{at}/kernel"] + params[f"{at}/bias"].reshape(1, -1)

    def hidden(x, activation=jax.nn.relu, at="body/Dense_0"):
        return activation(dense(x.reshape(x.shape[0], -1), at))

    if model == "vae":  # The mean of the code is decoded.
        code = dense(hidden(x, at="encoder/Dense_0"), "encoder/Dense_1")
        mean = code[:, : code.shape[1] // 2]
        return dense(hidden(mean, at="decoder/Dense_0"), "decoder/Dense_1")
    if model == "mlp":
        z = hidden(x)
    elif model == "cnn":
        for i in range(2):
            x = _pool(conv(x, f"body/ConvPool_{i}"), jax.nn.relu)
        z = hidden(x)
    elif model == "small_cnn":
        for i, padding in enumerate(("VALID", ((1, 1), (1, 1)), ((1, 1), (1, 1)))):
            y = conv(x, f"body/ConvPool_{i}", padding=padding)
            x = _pool(y, jax.nn.leaky_relu)
        z = hidden(x, jax.nn.leaky_relu)
    elif model == "pfl_cnn":
        x = jax.nn.relu(conv(x, "body/Conv_0", padding="VALID"))
        z = hidden(_pool(conv(x, "body/ConvPool_0", padding="VALID"), jax.nn.relu))
    else:
        z = _resnet(STAGES[model], params, conv, x)
    return dense(z, "head")


def loss(
    model: str, params: Any, x: jax.Array, y: jax.Array, convolution: Any = convolve
) -> jax.Array:
    """Average the cross entropy over a minibatch."""
    logits = jax.nn.log_softmax(forward(model, params, x, convolution))
    return -jnp.take_along_axis(logits, y[:, None], 1).mean()


def _pool(x, activation):
    """Take maxima of 2x2 blocks, then the activation, which commutes."""
    return activation(
        lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    )


def _resnet(stages, params, conv, x):
    def norm(x, at):
        b, h, w, c = x.shape
        grouped = x.reshape(b, h, w, c // 16, 16)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        centred = grouped - mean
        scale = lax.rsqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
        y = (centred * scale).reshape(x.shape)
        scale, bias = (params[f"{at}/{n}"].reshape(1, 1, 1, -1) for n in _NORM)
        return y * scale + bias

    def unit(x, at, number, stride=1):
        x = conv(x, f"{at}Conv_{number}", stride, bias=False)
        return norm(x, f"{at}GroupNorm_{number}")

    x = jax.nn.relu(unit(x, "body/", 0))
    count = 0
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            at = f"body/Block_{count}/"
            stride = 2 if stage and not block else 1
            y = unit(jax.nn.relu(unit(x, at, 0, stride)), at, 1)
            if x.shape != y.shape:
                x = unit(x, at, 2, stride)
            x = jax.nn.relu(x + y)
            count += 1
    return x.mean((1, 2))


_NORM = ("scale", "bias")
