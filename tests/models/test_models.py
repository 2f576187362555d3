"""The registry, and the architectures against the same ones written in flax."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen import models
from fedgen.models import layers

SHAPE = (28, 28, 1)


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _draw(model, seed=0):
    """Draw parameters on the host, which is quicker than to compile `model.init`."""
    rng = np.random.default_rng(seed)

    def leaf(like):
        scale = np.sqrt(np.prod(like.shape[:-1])) if like.ndim > 1 else 2.0
        return jnp.asarray(rng.normal(size=like.shape) / scale, jnp.float32)

    return jax.tree.map(leaf, jax.eval_shape(model.init, jax.random.key(0)))


def _value_and_gradient(embed, body):
    @jax.jit
    def both(body):
        z, pull = jax.vjp(embed, body)
        return z, pull(jnp.cos(z) / z.size)[0]

    return both(body)


class _Plain(nn.Module):
    """Convolution, activation, pooling: the order that papers write down."""

    blocks: tuple
    hidden: int
    slope: float

    @nn.compact
    def __call__(self, x):
        for features, kernel, padding in self.blocks:
            x = nn.Conv(features, (kernel, kernel), padding=padding)(x)
            x = nn.max_pool(nn.leaky_relu(x, self.slope), (2, 2), (2, 2))
        x = nn.Dense(self.hidden)(x.reshape(x.shape[0], -1))
        return nn.leaky_relu(x, self.slope)


@pytest.mark.parametrize(
    ("name", "shape", "plain"),
    [
        ("cnn", (8, 8, 1), _Plain(((32, 5, "SAME"), (64, 5, "SAME")), 512, 0.0)),
        (
            "small_cnn",
            (28, 28, 1),  # An odd size before the last pooling.
            _Plain(((16, 5, 0), (32, 5, 1), (64, 3, 1)), 128, 0.01),
        ),
    ],
)
def test_cnns_equal_the_networks_written_in_flax(name, shape, plain):
    model = models.build(name, shape, 10)
    body = _draw(model)["body"]
    x = jax.random.normal(jax.random.key(1), (2, *shape))

    def reference(body):
        renamed = {key.replace("ConvPool", "Conv"): body[key] for key in body}
        return plain.apply({"params": renamed}, x)

    def own(body):
        return model.embed({"body": body}, x)

    chex.assert_trees_all_close(
        _value_and_gradient(own, body), _value_and_gradient(reference, body), atol=1e-5
    )


def test_resnet_equals_the_one_with_flax_convolutions(monkeypatch):
    model = models.build("resnet8", (6, 5, 2), 3)
    body = _draw(model)["body"]
    x = jax.random.normal(jax.random.key(1), (2, 6, 5, 2))

    def embed(body):
        return model.embed({"body": body}, x)

    own = _value_and_gradient(embed, body)
    monkeypatch.setattr(layers, "Conv", nn.Conv)
    jax.clear_caches()
    chex.assert_trees_all_close(own, _value_and_gradient(embed, body), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "dim", "body"),
    [
        ("mlp", SHAPE, 200, 784 * 200 + 200),
        ("mlp32", SHAPE, 32, 784 * 32 + 32),
        ("cnn", SHAPE, 512, 832 + 51264 + 3136 * 512 + 512),
        ("small_cnn", SHAPE, 128, 416 + 12832 + 18496 + 256 * 128 + 128),
        ("small_cnn", (32, 32, 3), 128, 1216 + 12832 + 18496 + 576 * 128 + 128),
        ("resnet8", (32, 32, 3), 64, 77_392),
        ("resnet18", (32, 32, 3), 512, 11_168_832),
    ],
)
def test_sizes(name, shape, dim, body):
    model = models.build(name, shape, 10)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert set(params) == {"body", "head"}
    assert model.dim == dim
    assert _size(params["body"]) == body
    assert _size(params["head"]) == (dim + 1) * 10


@pytest.mark.parametrize("name", models.MODELS)
def test_equal_configurations_are_the_same_object(name):
    assert models.build(name, list(SHAPE), 10) is models.build(name, SHAPE, 10)
    assert models.build(name, SHAPE, 10) != models.build(name, SHAPE, 9)
    assert hash(models.build(name, SHAPE, 10))


def test_a_model_is_a_static_argument_that_compiles_once():
    @chex.assert_max_traces(n=1)
    def apply(model, params, x):
        return model.apply(params, x)

    apply = jax.jit(apply, static_argnums=0)
    for _ in range(2):
        model = models.build("mlp", (4,), 2)
        apply(model, _draw(model), jnp.ones((3, 4)))


def test_stacked_clients_equal_clients_one_by_one():
    model = models.build("small_cnn", (20, 20, 1), 3)
    params = [_draw(model, seed) for seed in range(2)]
    x = jax.random.normal(jax.random.key(1), (2, 2, 20, 20, 1))
    apply = jax.jit(model.apply)
    stacked = jax.jit(jax.vmap(model.apply))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *params), x
    )
    for client in range(2):
        chex.assert_trees_all_close(
            stacked[client], apply(params[client], x[client]), atol=1e-5
        )


def test_initial_weights_keep_the_scale_and_follow_the_key():
    model = models.build("mlp", (64,), 10)
    init = jax.jit(model.init)
    params = init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (500, 64))
    first = params["body"]["Dense_0"]
    np.testing.assert_allclose((x @ first["kernel"]).std(), 1.0, rtol=0.05)
    assert not first["bias"].any()
    chex.assert_trees_all_equal(params, init(jax.random.key(0)))
    other = init(jax.random.key(2))
    assert (
        params["body"]["Dense_0"]["kernel"] != other["body"]["Dense_0"]["kernel"]
    ).any()


@pytest.mark.parametrize("name", ["mlp", "small_cnn"])
def test_a_few_steps_fit_a_few_samples(name):
    model = models.build(name, (20, 20, 1), 4)
    x = jax.random.normal(jax.random.key(1), (4, 20, 20, 1))
    y = jnp.arange(4)

    def loss(params):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, _):
        gradient = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), loss(params)

    _, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=40))(_draw(model))
    assert losses[-1] < 0.05 < losses[0]


def test_embedding_does_not_read_the_head_nor_the_head_the_body():
    model = models.build("mlp", (4,), 2)
    params = _draw(model)
    z = model.embed({"body": params["body"]}, jnp.ones((3, 4)))
    assert model.head({"head": params["head"]}, z).shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smal_cnn", SHAPE, 10), "did you mean 'small_cnn'"),
        (("small_cnn", (6, 6, 1), 10), r"\(6, 6, 1\).*window 5x5"),
        (("cnn", (3, 3, 1), 10), r"\(3, 3, 1\).*max-pooling"),
        (("cnn", (784,), 10), "3 axes"),
        (("resnet8", (28, 28), 10), "3 axes"),
        (("mlp", SHAPE, 0), "num_classes must be >= 1, got 0"),
        (("mlp", (0,), 2), "every axis of a sample must be >= 1, got 0"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments)


def test_widths_must_be_positive():
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        models.mlp((4,), 2, hidden=0)
    with pytest.raises(ValueError, match="width must be >= 1, got -1"):
        models.resnet8(SHAPE, 10, width=-1)


def test_only_the_perceptron_comes_in_any_width():
    assert models.build("mlp7", SHAPE, 10).name == "mlp7"
    for name in ("mlp-1", "cnn7", "mlp7.5", "mlp0", "mlp07"):
        with pytest.raises(ValueError, match=f"unknown model '{name}', did you mean"):
            models.find(name)
