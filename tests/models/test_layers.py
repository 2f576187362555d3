"""Convolution and pooling against flax, outputs and gradients."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.models import convolution, layers

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Choose forms as on a machine whose every core is a device."""
    monkeypatch.setattr(convolution.execution, "num_cores", lambda: 1)


@pytest.fixture(params=["as chosen", "slices", "library", "winograd"])
def form(request, monkeypatch):
    """Test every form, also where it would not be chosen."""

    def wanted(x, kernel, strides, pads):
        form = request.param if tuple(strides) == (1, 1) else "slices"
        square = kernel.shape[:2] in ((3, 3), (5, 5))
        return form if square or form != "winograd" else "slices"

    if request.param != "as chosen":
        monkeypatch.setattr(convolution, "_form", wanted)


def _values_and_gradients(module, params, x, cotangent_key):
    """Outputs, and gradients with respect to parameters and input."""

    @jax.jit
    def both(params, x):
        y, pull = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        # Divided by the positions, so that the kernel's gradient is of order one.
        weight = jax.random.normal(cotangent_key, y.shape) / np.prod(y.shape[:3])
        return y, pull(weight)

    return both(params, x)


def _images(shape, background=0.5):
    """Images on a constant background, which ties most windows of a pooling."""
    x = jax.random.normal(jax.random.key(1), shape)
    return x.at[:, : shape[1] // 2, 2:].set(background)


def _draw(module, x, seed=0):
    """Draw parameters on the host, which is quicker than to compile `init`."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return jax.tree.map(
        lambda like: jnp.asarray(0.2 * rng.normal(size=like.shape), jnp.float32), shapes
    )


def _assert_equal(ours, theirs, x, atol=TOLERANCE, rtol=1e-6):
    """Two modules have the same parameters, outputs and gradients."""
    params = _draw(ours, x)
    chex.assert_trees_all_equal_shapes(params, _draw(theirs, x))
    chex.assert_trees_all_close(
        *(
            _values_and_gradients(module, params, x, jax.random.key(2))
            for module in (ours, theirs)
        ),
        atol=atol,
        rtol=rtol,
    )


class _Reference(nn.Module):
    """A flax convolution and pooling, with the parameters of `layers.ConvPool`."""

    features: int
    kernel_size: tuple[int, int]
    padding: layers.Padding

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(self.features, self.kernel_size, padding=self.padding, name="c")
        return nn.max_pool(conv(x), (2, 2), (2, 2))


@pytest.mark.parametrize(
    ("channels", "features", "kernel", "strides", "padding"),
    [
        (1, 32, (5, 5), (1, 1), "SAME"),
        (3, 16, (5, 5), (1, 1), "VALID"),
        (16, 32, (5, 5), (1, 1), 1),
        (32, 64, (3, 3), (2, 2), "SAME"),
        (64, 8, (1, 1), (2, 2), "VALID"),
        (3, 4, (3, 2), (2, 1), ((0, 2), (1, 0))),
        (16, 3, (4, 4), (3, 2), "SAME"),
        (8, 5, (4, 3), (1, 1), ((0, 5), (3, 1))),
        (1, 3, (3, 4), (1, 1), "VALID"),
        (2, 3, (1, 2), (2, 1), "SAME"),
        (2, 3, (3, 1), (1, 2), "SAME"),
        (4, 3, (3, 5), (2, 3), ((-1, 2), (2, -1))),
        (4, 3, (3, 5), (1, 1), ((-1, 2), (2, -1))),
        (7, 3, (9, 8), (1, 1), "VALID"),
        (7, 3, (1, 3), (1, 1), "SAME"),
    ],
)
@pytest.mark.usefixtures("form")
def test_conv_equals_flax(channels, features, kernel, strides, padding):
    x = _images((3, 9, 8, channels))
    ours = layers.Conv(features, kernel, strides, padding)
    theirs = nn.Conv(features, kernel, strides, padding)
    _assert_equal(ours, theirs, x)


@pytest.mark.parametrize(
    "pads",
    [
        ((6, 3), (6, 3)),  # gradients have ((-2, 1), (-2, 1))
        ((-2, 1), (0, 0)),
        ((0, -1), (-1, 1)),
        ((-1, 1), (-2, 2)),
    ],
)
@pytest.mark.parametrize(("channels", "features"), [(8, 16), (16, 7), (3, 5)])
def test_what_pads_cut_off_does_not_count(channels, features, pads):
    # Not against XLA's own, which is what errs. Two clients with kernels of their own.
    x = jax.random.normal(jax.random.key(0), (2, 3, 9, 8, channels))
    kernel = jax.random.normal(jax.random.key(1), (2, 5, 5, channels, features)) / 10

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(correlate):
        def gradients(x, kernel):
            y, pull = jax.vjp(correlate, x, kernel)
            return y, pull(jnp.cos(y))

        def size(x, kernel):
            return sum(jnp.mean(a**2) for a in jax.tree.leaves(gradients(x, kernel)))

        second = jax.grad(size, (0, 1))
        return jax.vmap(lambda x, k: (gradients(x, k), second(x, k)))(x, kernel)

    chex.assert_trees_all_close(
        all_of(lambda x, k: convolution._correlate(x, k, pads)),
        all_of(lambda x, k: convolution._by_slices(x, k, (1, 1), pads)),
        atol=10 * TOLERANCE,
        rtol=10 * TOLERANCE,
    )


@pytest.mark.parametrize(
    ("size", "channels", "features", "kernel", "padding"),
    [
        ((8, 8), 1, 32, (5, 5), "SAME"),
        ((6, 6), 32, 64, (5, 5), "SAME"),
        ((9, 11), 3, 16, (5, 5), "VALID"),
        ((8, 9), 16, 32, (5, 5), 1),
        ((5, 5), 32, 64, (3, 3), 1),
        ((9, 10), 3, 4, (2, 6), ((0, 2), (3, 0))),
        ((9, 11), 3, 4, (7, 7), "SAME"),
    ],
)
@pytest.mark.usefixtures("form")
def test_conv_pool_equals_flax_with_ties(size, channels, features, kernel, padding):
    # Small whole numbers make the ties exact in every order of summation.
    key_x, key_w = jax.random.split(jax.random.key(1))
    x = jax.random.randint(key_x, (3, *size, channels), -1, 2).astype(jnp.float32)
    x = x.at[:, : size[0] // 2].set(1.0)
    weights = jax.random.randint(key_w, (*kernel, channels, features), -1, 2)
    params = {"kernel": weights.astype(jnp.float32), "bias": jnp.ones(features)}

    ours = _values_and_gradients(
        layers.ConvPool(features, kernel, padding), params, x, jax.random.key(2)
    )
    value, (gradient, towards_x) = _values_and_gradients(
        _Reference(features, kernel, padding), {"c": params}, x, jax.random.key(2)
    )
    chex.assert_trees_all_close(
        ours, (value, (gradient["c"], towards_x)), atol=TOLERANCE
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("kernel", "strides"),
    [((2, 3), (2, 2)), ((5, 4), (3, 2)), ((3, 3), (1, 1)), ((1, 2), (2, 3))],
)
@pytest.mark.usefixtures("form")
def test_transposed_conv_equals_flax(kernel, strides, padding):
    x = _images((3, 5, 4, 6))
    ours = layers.ConvTranspose(3, kernel, strides, padding)
    theirs = nn.ConvTranspose(3, kernel, strides, padding)
    _assert_equal(ours, theirs, x)


def test_transposed_conv_refuses_widths():
    with pytest.raises(ValueError, match=r"SAME or VALID, got 1"):
        convolution.convolve_transposed(
            jnp.ones((1, 4, 4, 1)), jnp.ones((2, 2, 1, 1)), padding=1
        )


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (7, 5)])
def test_max_pool_gives_ties_to_the_same_place_as_flax(size):
    x = jax.random.randint(jax.random.key(0), (4, *size, 3), 0, 3).astype(jnp.float32)

    def pooled(pool):
        y, pull = jax.vjp(pool, x)
        return y, pull(jax.random.normal(jax.random.key(1), y.shape))

    chex.assert_trees_all_close(
        pooled(convolution.max_pool),
        pooled(lambda x: nn.max_pool(x, (2, 2), (2, 2))),
        atol=0,
    )


@pytest.mark.parametrize(
    ("channels", "group_size"), [(16, 16), (12, 4), (6, 1), (6, 2)]
)
def test_group_norm_equals_flax(channels, group_size):
    # Off centre, as after a ReLU, and not of one scale.
    x = (
        3 * jax.nn.relu(_images((3, 9, 8, channels)))
        + 0.1 * jnp.arange(channels)[None, None, None]
    )
    ours = layers.GroupNorm(group_size)
    theirs = nn.GroupNorm(num_groups=None, group_size=group_size)
    _assert_equal(ours, theirs, x, rtol=TOLERANCE)


def test_group_norm_of_constant_images_is_the_bias():
    # Of some of these, rounding makes the mean of squares less than the squared mean.
    constants = 100 + 0.37 * jnp.arange(64)
    x = jnp.broadcast_to(constants[:, None, None, None], (64, 5, 5, 4))
    params = {"scale": jnp.ones(4), "bias": jnp.arange(4.0)}
    values, (_, towards_x) = _values_and_gradients(
        layers.GroupNorm(2), params, x, jax.random.key(2)
    )
    expected = jnp.broadcast_to(params["bias"], x.shape)
    # What rounding leaves of the mean is divided by the root of 1e-6.
    np.testing.assert_allclose(values, expected, atol=0.2)
    assert np.isfinite(towards_x).all()


def test_group_norm_refuses_channels_that_are_left_over():
    with pytest.raises(ValueError, match="multiple of the 4 of a group, got 6"):
        layers.GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_group_norm_of_no_images():
    params = {"scale": jnp.ones(4), "bias": jnp.ones(4)}
    x = jnp.zeros((0, 3, 3, 4))
    assert layers.GroupNorm(2).apply({"params": params}, x).shape == x.shape


def test_max_pool_passes_nan_on():
    x = (
        jnp.zeros((4, 2, 2, 1))
        .at[jnp.arange(4), [0, 0, 1, 1], [0, 1, 0, 1]]
        .set(jnp.nan)
    )
    assert jnp.isnan(convolution.max_pool(x)).all()


@pytest.mark.parametrize(
    ("kernel", "channels"), [((5, 5), 3), ((5, 5), 7), ((3, 3), 3)]
)
def test_kernels_and_gradients_under_vmap_equal_flax_client_by_client(kernel, channels):
    clients = 3
    x = jax.random.normal(jax.random.key(0), (clients, 2, 10, 10, channels))
    ours, theirs = layers.ConvPool(4, kernel), _Reference(4, kernel, "SAME")
    params = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(_draw(ours, x[0], client) for client in range(clients)),
    )

    def loss(module, wrap):
        return lambda p, x: (module.apply({"params": wrap(p)}, x) ** 2).mean()

    stacked = jax.jit(jax.vmap(jax.value_and_grad(loss(ours, lambda p: p), (0, 1))))(
        params, x
    )
    reference = jax.jit(jax.value_and_grad(loss(theirs, lambda p: {"c": p}), (0, 1)))
    for client in range(clients):
        own, images = jax.tree.map(lambda leaf, i=client: leaf[i], (params, x))
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=client: leaf[i], stacked),
            reference(own, images),
            atol=TOLERANCE,
        )


@pytest.mark.parametrize("axes", [(0, None), (None, 0)])
@pytest.mark.usefixtures("form")
def test_images_or_kernels_alone_may_be_stacked(axes):
    x, kernel = (
        _images((3, 2, 6, 6, 7)),
        jax.random.normal(jax.random.key(0), (3, 3, 3, 7, 4)),
    )
    x, kernel = (
        a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True)
    )

    def loss(x, kernel):
        return (convolution.convolve_pool(x, kernel) ** 2).sum()

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    stacked = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), axes))(x, kernel)
    for client in range(3):
        own = (
            a if axis is None else a[client]
            for a, axis in zip((x, kernel), axes, strict=True)
        )
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=client: a[i], stacked),
            gradients(*own),
            rtol=1e-4,
            atol=1e-3,
        )


def _curvature(module, params, x):
    """Differentiate a function of gradients."""

    def loss(p, x):
        return jnp.tanh(module.apply({"params": p}, x)).sum()

    def probe(p, x):
        # Odd in the gradient, so that its sign counts.
        return sum((g**3).sum() for g in jax.tree.leaves(jax.grad(loss, (0, 1))(p, x)))

    return jax.jit(jax.grad(probe, (0, 1)))(params, x)


def test_second_order_gradients_equal_those_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    ours, theirs = layers.Conv(3, (3, 3)), nn.Conv(3, (3, 3))
    params = _draw(ours, x)
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x))
        chex.assert_trees_all_close(
            _curvature(ours, params, x), _curvature(theirs, params, x), rtol=1e-9
        )


def test_second_order_gradients_of_the_library_form_equal_those_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 7))
    ours, theirs = (
        layers.Conv(3, (3, 3), padding="VALID"),
        nn.Conv(3, (3, 3), padding="VALID"),
    )
    params = _draw(ours, x)
    chex.assert_trees_all_close(
        _curvature(ours, params, x), _curvature(theirs, params, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("channels", "features", "images", "parts"),
    [(6, 5, 4, 1), (6, 5, 2, 2), (6, 5, 1, 4), (1, 9, 4, 1), (1, 9, 3, 2)],
)
def test_parts_of_a_batch_give_the_kernels_gradient(
    channels, features, images, parts, monkeypatch
):
    # Rows of the window move cotangents, or images if those have so few channels.
    x = _images((4, 9, 8, channels))
    kernel, cotangent = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(4, 3, channels, features), (4, 7, 9, features)])
    )
    pads = ((2, -1), (1, 2))

    def loss(kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), pads, dimension_numbers=dims
        )
        return jnp.vdot(y, cotangent)

    copied = 9 * 9 * (3 * 6 + 4 * 5) if channels > 1 else 7 * 9 * (12 + 9)
    monkeypatch.setattr(convolution, "_BLOCK", images * copied)
    traced = jax.make_jaxpr(lambda x, c: convolution._towards_kernel(x, c, pads))
    assert f"length={parts}" in str(traced(x, cotangent))
    found, expected = (
        convolution._towards_kernel(x, cotangent, pads),
        jax.grad(loss)(kernel),
    )
    chex.assert_trees_all_close(found, expected, atol=1e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize(
    ("channels", "features", "widened"),
    [
        (16, 16, (17, 16)),
        (12, 16, (12, 17)),
        (12, 9, (12, 17)),
        (16, 8, None),
        (16, 17, None),
    ],
)
def test_few_channels_are_widened_by_zeros(channels, features, widened):
    x = _images((2, 6, 5, channels))
    kernel = jax.random.normal(jax.random.key(0), (3, 3, channels, features))
    pads = ((1, 1), (1, 1))
    traced = str(jax.make_jaxpr(lambda *a: convolution._correlate(*a, pads))(x, kernel))
    for wide in ((17, 16), (12, 17)):
        assert (f"f32[3,3,{wide[0]},{wide[1]}]" in traced) == (widened == wide)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    chex.assert_trees_all_close(
        convolution._correlate(x, kernel, pads), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "operation",
    [
        convolution.convolve,
        convolution.convolve_pool,
        functools.partial(convolution.convolve_transposed, strides=(2, 2)),
    ],
)
@pytest.mark.usefixtures("form")
def test_no_images_have_a_gradient_of_zero(operation):
    kernel = jnp.ones((3, 3, 8, 4))
    gradient = jax.grad(lambda w: jnp.sum(operation(jnp.ones((0, 6, 6, 8)), w)))(kernel)
    assert gradient.shape == kernel.shape
    assert not np.any(gradient)


@pytest.mark.parametrize(
    ("channels", "kernel", "product"),
    [
        (6, (3, 3), (2 * 4 * 2, 2 * 5)),  # of 4 columns two by two
        (7, (3, 3), (2 * 4 * 4, 5)),
        (7, (3, 5), (2 * 4 * 1, 2 * 5)),
        (6, (3, 1), (2 * 4 * 6, 5)),
    ],
)
def test_few_channels_or_wide_kernels_give_two_outputs_a_row(channels, kernel, product):
    x, weight = jnp.ones((2, 6, 6, channels)), jnp.ones((*kernel, channels, 5))
    traced = str(
        jax.make_jaxpr(lambda *a: convolution._by_slices(*a, (1, 1), ((0, 0), (0, 0))))(
            x, weight
        )
    )
    assert f"f32[{product[0]},{product[1]}] = dot_general" in traced


@pytest.mark.parametrize(
    ("rows", "features", "turned"),
    [(32, 256, True), (33, 256, False), (32, 255, False)],
)
def test_dense_equals_flax_and_turns_minibatches(rows, features, turned, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (rows, 512))
    ours, theirs = layers.Dense(features), nn.Dense(features)
    # Outputs are of order ten.
    _assert_equal(ours, theirs, x, atol=20 * TOLERANCE, rtol=TOLERANCE)

    def turns():
        trace = jax.make_jaxpr(lambda p: ours.apply({"params": p}, x))
        return "optimization_barrier" in str(trace(_draw(ours, x)))

    assert turns() == turned
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not turns()


def test_inputs_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match=r"window 5x5.*got 4x7"):
        convolution.convolve(
            jnp.ones((1, 4, 7, 1)), jnp.ones((5, 5, 1, 1)), padding="VALID"
        )
    with pytest.raises(ValueError, match=r"cut off.*\[\(-3, 6\), \(0, 0\)\] for 2x7"):
        convolution.convolve(
            jnp.ones((1, 2, 7, 1)), jnp.ones((1, 1, 1, 1)), padding=((-3, 6), (0, 0))
        )
    with pytest.raises(ValueError, match=r"max-pooling.*got 1x4"):
        convolution.max_pool(jnp.ones((1, 1, 4, 1)))
    with pytest.raises(ValueError, match=r"max-pooling.*got 1x3"):
        convolution.convolve_pool(
            jnp.ones((1, 5, 7, 1)), jnp.ones((5, 5, 1, 1)), "VALID"
        )
