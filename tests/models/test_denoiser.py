"""Noise predictors: what they start at, what they learn, what they keep equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.aggregators import diffusion
from fedgen.models import denoiser

SMALL = {"width": 16, "time_size": 8, "blocks": 2}
SCHEDULE = diffusion.linear_schedule(50, 1e-3, 0.2)


def build(kind, size=10, **kwargs):
    if kind == "mlp":
        return denoiser.residual_mlp(size, **SMALL, **kwargs)
    return denoiser.token_transformer(size, token=4, heads=2, **SMALL, **kwargs)


def draw(model, seed=0, scale=0.3):
    """Draw all weights on the host, those that start at 0 included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda like: jnp.asarray(scale * rng.normal(size=like.shape), like.dtype),
        shapes,
    )


@pytest.fixture(scope="module", params=["mlp", "transformer"])
def kind(request):
    return request.param


def test_a_new_network_predicts_no_noise(kind):
    model = build(kind)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jnp.arange(10.0)
    eps = model.apply(params, x, jnp.array(3))
    np.testing.assert_array_equal(eps, np.zeros(10))
    # With a base it starts there, and everything can still be learnt.
    bound = denoiser.bind(model, params, base=lambda x, t: t * x)
    np.testing.assert_array_equal(bound(x, jnp.array(3)), 3 * x)


def test_output_depends_on_vector_time_and_condition(kind):
    model = build(kind, condition_size=3)
    params = draw(model)
    apply = jax.jit(model.apply)
    x, t, condition = jnp.linspace(-1, 1, 10), jnp.array(7), jnp.ones(3)
    eps = apply(params, x, t, condition)
    assert eps.shape == (10,)
    assert eps.dtype == jnp.float32
    for other in [
        (x[::-1], t, condition),
        (x, jnp.array(8), condition),
        (x, t, 2 * condition),
    ]:
        assert jnp.abs(apply(params, *other) - eps).max() > 1e-3
    bound = denoiser.bind(model, params, condition=condition)
    np.testing.assert_allclose(bound(x, t), eps, atol=1e-5)


def test_every_entry_reaches_every_other(kind):
    model = build(kind)
    params = draw(model)
    jacobian = jax.jit(jax.jacobian(lambda x: model.apply(params, x, jnp.array(2))))
    assert (jnp.abs(jacobian(jnp.linspace(-1, 1, 10))) > 1e-7).all()


def test_vmap_is_a_loop(kind):
    model = build(kind)
    params = draw(model)
    x, t = jax.random.normal(jax.random.key(1), (3, 10)), jnp.array([1, 50, 999])
    single = jax.jit(model.apply)
    together = jax.jit(jax.vmap(model.apply, (None, 0, 0)))(params, x, t)
    for i in range(3):
        np.testing.assert_allclose(together[i], single(params, x[i], t[i]), atol=1e-5)


def test_equal_arguments_give_the_identical_network(kind):
    assert build(kind) is build(kind)
    assert build(kind) is not build(kind, size=11)


def test_networks_follow_float64(kind):
    with jax.enable_x64(True):
        model = build(kind)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), draw(model))
        x = jnp.linspace(-1, 1, 10)
        eps = jax.jit(model.apply)(params, x, jnp.array(5))
        assert eps.dtype == jnp.float64
    coarse = jax.jit(model.apply)(draw(model), x.astype(jnp.float32), jnp.array(5))
    np.testing.assert_allclose(coarse, eps, atol=1e-4)


def test_tokens_without_positions_permute():
    model = build("transformer", size=12)
    params = draw(model)
    params["position"] = jnp.zeros((3, 16))
    x, order = jax.random.normal(jax.random.key(0), (3, 4)), jnp.array([2, 0, 1])
    apply = jax.jit(model.apply)
    eps = apply(params, x.reshape(-1), jnp.array(3)).reshape(3, 4)
    permuted = apply(params, x[order].reshape(-1), jnp.array(3)).reshape(3, 4)
    np.testing.assert_allclose(permuted, eps[order], atol=1e-5)
    params["position"] = draw(model)["position"]
    placed = apply(params, x.reshape(-1), jnp.array(3)).reshape(3, 4)
    moved = apply(params, x[order].reshape(-1), jnp.array(3)).reshape(3, 4)
    assert jnp.abs(moved - placed[order]).max() > 1e-3


def test_a_last_token_is_filled_with_zeros():
    """Ten entries in tokens of four are twelve of which the last two are 0."""
    short, full = build("transformer"), build("transformer", size=12)
    params = draw(short)
    x = jax.random.normal(jax.random.key(0), (10,))
    eps = short.apply(params, x, jnp.array(3))
    padded = full.apply(params, jnp.pad(x, (0, 2)), jnp.array(3))
    np.testing.assert_allclose(eps, padded[:10], atol=1e-6)


def test_sinusoids():
    embedding = denoiser.sinusoids(jnp.array(3), 4)
    angle = 3 * np.array([1, 1e-2])
    expected = np.concatenate([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(embedding, expected, rtol=1e-6)
    every = jax.vmap(lambda t: denoiser.sinusoids(t, 16))(jnp.arange(1001))
    distance = jnp.linalg.norm(every[1:] - every[:-1], axis=1)
    assert distance.min() > 0.1  # Neighbouring times can be told apart.


def two_groups():
    """Return vectors of two groups, and the best denoiser for them."""
    centre = jnp.where(jnp.arange(256)[:, None] % 2 == 0, 1.0, -1.0)
    x = centre + 0.1 * jax.random.normal(jax.random.key(0), (256, 6))
    centres = jnp.array([[1.0], [-1.0]]) * jnp.ones((2, 6))
    best = diffusion.mixture_denoiser(
        SCHEDULE, centres, jnp.full((2, 6), 0.01), jnp.ones(2)
    )
    return x, best


def mean_loss(predict, x):
    """Average over 8,192 draws, the same for all predictors."""
    keys = jax.random.split(jax.random.key(2), 32)
    return jax.jit(
        jax.vmap(lambda k: diffusion.simple_loss(predict, SCHEDULE, x, key=k))
    )(keys).mean()


def train(model, x, *, base=None, steps=300):
    """Return the bound network before and after training."""
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        predict = denoiser.bind(model, params, base=base)
        return diffusion.simple_loss(predict, SCHEDULE, x, key=key)

    def update(carry, key):
        params, state = carry
        change, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, change), state), None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(1), steps)
        (trained, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), keys)
        return trained

    params = jax.jit(model.init)(jax.random.key(0))
    return (denoiser.bind(model, p, base=base) for p in (params, run(params)))


def test_training_beats_the_best_linear_denoiser_that_it_starts_from():
    x, best = two_groups()
    linear = diffusion.gaussian_denoiser(SCHEDULE, x.mean(0), jnp.cov(x.T))
    before, after = train(build("mlp", size=6), x, base=linear)
    least, straight, start, end = (
        float(mean_loss(predict, x)) for predict in (best, linear, before, after)
    )
    assert start == straight
    assert least - 0.01 < end < straight - 0.7 * (straight - least)


def test_training_a_transformer_from_nothing():
    x, best = two_groups()
    before, after = train(build("transformer", size=6), x)
    least, start, end = (float(mean_loss(p, x)) for p in (best, before, after))
    assert start == pytest.approx(1.0, abs=0.02)
    assert least - 0.01 < end < start - 0.7 * (start - least)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: denoiser.residual_mlp(0), "size must be >= 1, got 0"),
        (lambda: denoiser.residual_mlp(3, width=0), "width must be >= 1"),
        (lambda: denoiser.residual_mlp(3, blocks=0), "blocks must be >= 1"),
        (lambda: denoiser.residual_mlp(3, time_size=7), "time_size must be even"),
        (lambda: denoiser.residual_mlp(3, condition_size=-1), "condition_size"),
        (lambda: denoiser.token_transformer(3, token=0), "token must be >= 1"),
        (lambda: denoiser.token_transformer(3, heads=3), "width must be a multiple"),
        (lambda: denoiser.token_transformer(3, heads=0), "heads must be >= 1"),
        (lambda: denoiser.sinusoids(1.0, 3), "size must be even"),
        (
            lambda: build("mlp").apply({}, jnp.ones((2, 10)), 1),
            r"x must have shape \(10,\), got \(2, 10\)",
        ),
        (
            lambda: build("mlp").apply({}, jnp.ones(10), 1, jnp.ones(2)),
            r"condition must have shape None, got \(2,\)",
        ),
        (
            lambda: build("mlp", condition_size=3).apply({}, jnp.ones(10), 1),
            r"condition must have shape \(3,\), got None",
        ),
    ],
)
def test_bad_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
