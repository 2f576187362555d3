"""Minimal filtering against plain sums, and when it is chosen."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from fedgen.models import convolution, padding, winograd


def _plain(x, kernel, pads):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=dims, precision="highest"
    )


def _draw(size, taps, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (4, *size, 3), dtype)
    return x, jax.random.normal(keys[1], (taps, taps, 3, 5), dtype)


@pytest.mark.parametrize("taps", winograd.FILTERS)
def test_filters_are_exact(taps):
    # An identity between bilinear forms holds if it does for a basis.
    filter_ = winograd.FILTERS[taps]
    for d in np.eye(taps + 1):
        for g in np.eye(taps):
            y = filter_.outputs @ ((filter_.kernel @ g) * (filter_.inputs @ d))
            np.testing.assert_array_equal(y, scipy.signal.correlate(d, g, "valid"))


@pytest.mark.parametrize(("taps", "products"), [(3, 4), (5, 7)])
def test_filters_have_few_products_and_harmless_numbers(taps, products):
    filter_ = winograd.FILTERS[taps]
    assert len(filter_.kernel) == products
    for matrix in (filter_.inputs, filter_.outputs):
        assert set(matrix.ravel()) <= {-1, 0, 1}


@pytest.mark.parametrize(
    ("size", "taps", "pads"),
    [
        ((8, 6), 3, ((1, 1), (1, 1))),
        ((7, 9), 3, ((0, 0), (0, 0))),
        ((7, 8), 5, ((2, 2), (2, 2))),
        ((6, 7), 5, ((4, 3), (0, 1))),
        ((9, 8), 3, ((2, -1), (-1, 0))),
        ((5, 5), 5, ((0, 0), (0, 0))),
    ],
)
def test_values_and_gradients_in_float64(size, taps, pads):
    with jax.enable_x64(True):
        x, kernel = _draw(size, taps, jnp.float64)

        def everything(form):
            y, pull = jax.vjp(lambda x, k: form(x, k, pads), x, kernel)
            return y, pull(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

        chex.assert_trees_all_close(
            everything(winograd.correlate), everything(_plain), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("taps", winograd.FILTERS)
def test_rounding_is_not_much_worse_than_that_of_plain_sums(taps):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (4, 12, 12, 64))
    kernel = jax.random.normal(keys[1], (taps, taps, 64, 32)) / (taps * 8)
    pads = ((taps // 2,) * 2,) * 2
    cotangent = jax.random.normal(keys[2], (4, 12, 12, 32)) / 24

    def everything(form, dtype=jnp.float32):
        args = (a.astype(dtype) for a in (x, kernel))
        y, pull = jax.vjp(lambda x, k: form(x, k, pads), *args)
        return y, *pull(cotangent.astype(dtype))  # all numbers of about size one

    with jax.enable_x64(True):
        exact = everything(_plain, jnp.float64)
        for ours, theirs, truth in zip(
            everything(winograd.correlate), everything(_plain), exact, strict=True
        ):
            error, usual = (
                float(jnp.sqrt(jnp.mean((a - truth) ** 2) / jnp.mean(truth**2)))
                for a in (ours, theirs)
            )
            assert error < 1e-6
            assert error < 4 * usual


@pytest.mark.parametrize("taps", winograd.FILTERS)
def test_second_order_gradients(taps):
    with jax.enable_x64(True):
        x, kernel = _draw((6, 6), taps, jnp.float64)

        def curvature(form):
            def loss(x, kernel):
                return jnp.tanh(form(x, kernel, ((1, 1), (1, 1)))).sum()

            def probe(x, kernel):
                gradients = jax.grad(loss, (0, 1))(x, kernel)
                return sum((g**3).sum() for g in gradients)

            return jax.jit(jax.grad(probe, (0, 1)))(x, kernel)

        chex.assert_trees_all_close(
            curvature(winograd.correlate), curvature(_plain), rtol=1e-9
        )


def test_stacked_clients_have_kernels_of_their_own():
    x, kernel = _draw((6, 6), 3)
    kernels = jnp.stack([kernel, -2 * kernel, kernel[::-1]])
    images = jnp.stack([x, x + 1, 2 * x])
    pads = ((1, 1), (1, 1))

    def gradients(form, x, kernel):
        return jax.grad(lambda *args: (form(*args, pads) ** 2).mean(), (0, 1))(
            x, kernel
        )

    stacked = jax.jit(jax.vmap(lambda *args: gradients(winograd.correlate, *args)))(
        images, kernels
    )
    for client in range(3):
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=client: a[i], stacked),
            gradients(_plain, images[client], kernels[client]),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("batch", "tiles", "images"),
    [
        (10, 196, 1),
        (32, 49, 4),
        (50, 49, 5),
        (32, 16, 16),
        (50, 4, 25),
        (7, 4, 1),  # has no other divisor
        (2, 1, 1),
        (3, 1024, 1),
        (1, 4, 1),
        (0, 4, 1),
    ],
)
def test_parts_of_a_batch_are_equal_and_two_or_more_if_it_has_two(batch, tiles, images):
    assert winograd._images_at_once(batch, tiles) == images


@pytest.mark.parametrize(
    ("images", "kernel", "form"),
    [
        ((10, 30, 30, 32), (3, 3, 32, 64), "winograd"),  # pfl-research's network
        ((32, 14, 14, 32), (5, 5, 32, 64), "winograd"),  # LEAF's
        ((26, 9, 9, 32), (3, 3, 32, 32), "library"),  # 25 tiles of 2 images
        ((36, 7, 7, 32), (3, 3, 32, 32), "winograd"),  # 16 tiles of 12 images
        ((1, 32, 32, 64), (3, 3, 64, 64), "library"),  # nothing to loop over
        ((32, 32, 32, 16), (3, 3, 16, 16), "library"),  # few channels
        ((32, 32, 32, 64), (3, 3, 64, 16), "library"),  # few features
        ((50, 6, 6, 32), (3, 3, 32, 64), "library"),  # few tiles
        ((6, 8, 8, 64), (3, 3, 64, 64), "library"),  # few images
        ((32, 16, 16, 64), (4, 4, 64, 64), "library"),  # no such algorithm
        ((32, 16, 16, 64), (1, 1, 64, 64), "slices"),
        ((32, 28, 28, 1), (5, 5, 1, 16), "slices"),
        ((32, 28, 28, 1), (5, 5, 1, 32), "library"),  # few channels, many features
        ((32, 28, 28, 6), (5, 5, 6, 31), "slices"),
        ((32, 28, 28, 7), (5, 5, 7, 16), "library"),
    ],
)
def test_the_form_follows_the_shapes(images, kernel, form, monkeypatch):
    monkeypatch.setattr(convolution.execution, "num_cores", lambda: 1)
    x, kernel = jnp.zeros(images), jnp.zeros(kernel)
    pads = padding.to_pads(x.shape[1:3], kernel.shape[:2], (1, 1), "SAME")
    assert convolution._form(x, kernel, (1, 1), pads) == form
    if form == "winograd":
        strided = convolution._form(x, kernel, (2, 2), pads)
        half = convolution._form(x, kernel.astype(jnp.bfloat16), (1, 1), pads)
        assert strided == half == "slices"
        with monkeypatch.context() as many:
            many.setattr(convolution.execution, "num_cores", lambda: 1000)
            assert convolution._form(x, kernel, (1, 1), pads) == "slices"
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert convolution._form(x, kernel, (1, 1), pads) == "slices"
