"""VAEs against the same networks in NumPy."""

from __future__ import annotations

import functools

import chex
import jax
import numpy as np
import pytest

from fedgen.models.vae import mlp_vae

SHAPE = (3, 2, 1)


def draw(vae):
    """Draw all parameters, biases too, on the host."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(vae.init, jax.random.key(0))
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype("float32"), like)


def perceptron(params, x):
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
    return hidden @ second["kernel"] + second["bias"]


@pytest.mark.parametrize("conditional", [False, True])
def test_it_is_two_perceptrons(conditional):
    vae = mlp_vae(SHAPE, 4, hidden=5, latent=3, conditional=conditional)
    params, rng = draw(vae), np.random.default_rng(1)
    x, z = rng.normal(size=(2, *SHAPE)), rng.normal(size=(2, 3))
    y = np.array([3, 0]) if conditional else None
    label = np.eye(4)[y] if conditional else np.zeros((2, 0))
    args = (params, x.astype("float32"), z.astype("float32"), y)

    @jax.jit
    def both(params, x, z, y):
        return vae.encode(params, x, y), vae.decode(params, z, y)

    (mean, log_variance), out = both(*args)
    code = perceptron(params["encoder"], np.hstack([x.reshape(2, -1), label]))
    np.testing.assert_allclose(mean, code[:, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_variance, code[:, 3:], rtol=1e-4, atol=1e-5)
    expected = perceptron(params["decoder"], np.hstack([z, label]))
    assert out.shape == (2, 6)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_components_on_an_axis():
    vae = mlp_vae(SHAPE, 4, hidden=5, latent=3)
    a, b = draw(vae), jax.tree.map(lambda a: -2 * a, draw(vae))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), a, b)
    z = np.ones((1, 3), np.float32)
    both = jax.vmap(vae.decode, (0, None))(stacked, z)
    np.testing.assert_allclose(both[0], perceptron(a["decoder"], z), rtol=1e-4)
    np.testing.assert_allclose(both[1], perceptron(b["decoder"], z), rtol=1e-4)


def test_only_a_learnt_variance_is_a_parameter():
    plain = jax.eval_shape(mlp_vae(SHAPE, 4).init, jax.random.key(0))
    vae = mlp_vae(SHAPE, 4, learn_variance=True)
    learnt = jax.eval_shape(vae.init, jax.random.key(0))
    assert learnt.pop("log_variance").shape == ()
    chex.assert_trees_all_equal_shapes_and_dtypes(learnt, plain)


def test_equal_arguments_give_the_identical_vae():
    assert mlp_vae(SHAPE, 4, hidden=5) is mlp_vae(SHAPE, 4, hidden=5)
    assert mlp_vae(SHAPE, 4, hidden=5) is not mlp_vae(SHAPE, 4, hidden=6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hidden", {"hidden": 0}),
        ("latent", {"latent": -1}),
        ("num_classes", {"num_classes": 0}),
        ("every axis of a sample", {"input_shape": (0, 3)}),
    ],
)
def test_sizes_must_be_positive(name, settings):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got"):
        mlp_vae(**({"input_shape": SHAPE, "num_classes": 4} | settings))


@pytest.mark.parametrize(
    ("conditional", "y", "wanted"),
    [
        (True, None, "y must be labels"),
        (False, np.zeros(2, int), "y must be no labels"),
    ],
)
def test_labels_are_given_where_they_are_asked_for(conditional, y, wanted):
    vae = mlp_vae(SHAPE, 4, conditional=conditional)
    params = jax.eval_shape(vae.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *SHAPE), np.float32)
    with pytest.raises(ValueError, match=wanted):
        jax.eval_shape(functools.partial(vae.encode, y=y), params, x)
