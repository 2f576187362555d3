"""Diffusion over parameters against closed forms, NumPy loops and known orders."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from fedgen.aggregators import diffusion

# Compiled as a whole: operation by operation, compiling takes far longer.
step = jax.jit(diffusion.step)
invert = jax.jit(
    diffusion.invert, static_argnums=0, static_argnames=("steps", "refinements")
)
invert_noise_maps = jax.jit(
    diffusion.invert_noise_maps, static_argnums=0, static_argnames="steps"
)
generate = jax.jit(
    diffusion.generate, static_argnums=0, static_argnames=("eta", "steps")
)
sample = jax.jit(diffusion.sample, static_argnums=0, static_argnames=("eta", "steps"))
simple_loss = jax.jit(diffusion.simple_loss, static_argnums=0)
fit_basis = jax.jit(diffusion.fit_basis, static_argnums=1)
fit_normalizer = jax.jit(diffusion.fit_normalizer, static_argnames=("scale", "floor"))
align = jax.jit(diffusion.align)

KEY = jax.random.key(0)
MEAN = np.array([0.5, -1.0, 0.2])
VARIANCE = np.array([0.5, 1.5, 1.0])
X = np.array([1.3, 0.4, -0.8])


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


def close(actual, desired, tolerance=1e-10):
    np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)


def tables(schedule):
    """Return alpha_bar and beta, indexed by time, as the papers write them."""
    alpha_bar = np.asarray(schedule.alpha_bar)
    return alpha_bar, np.concatenate([[np.nan], 1 - alpha_bar[1:] / alpha_bar[:-1]])


# Built once and in float64, so that what depends on them is compiled once.


@functools.cache
def linear():
    return diffusion.linear_schedule()


@functools.cache
def fine():
    """Build a schedule with the path of the linear one in more, smaller times."""
    factor = 1000 / 2048
    return diffusion.linear_schedule(2048, 1e-4 * factor, 2e-2 * factor)


@functools.cache
def gaussian(schedule=linear):
    return diffusion.gaussian_denoiser(schedule(), jnp.array(MEAN), jnp.array(VARIANCE))


@functools.cache
def groups(*, spread=0.04, p=3, schedule=linear):
    """Build the denoiser of two groups, about (1, ..., 1) and (-1, ..., -1)."""
    centres = jnp.array([[1.0], [-1.0]]) * jnp.ones((2, p))
    variance = jnp.full((2, p), spread)
    return diffusion.mixture_denoiser(schedule(), centres, variance, jnp.ones(2))


# Schedules.


def test_linear_schedule_is_that_of_ho():
    schedule = diffusion.linear_schedule()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    close(schedule.alpha_bar, np.concatenate([[1], alpha_bar]), 1e-13)
    close(schedule.signal**2 + schedule.noise**2, np.ones(1001), 1e-14)
    assert schedule.num_times == 1000
    assert float(schedule.alpha_bar[-1]) == pytest.approx(4e-5, rel=0.02)


def test_cosine_schedule_is_that_of_nichol():
    schedule = diffusion.cosine_schedule(100)
    alpha_bar, beta = tables(schedule)
    time = np.arange(101) / 100
    level = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    close(alpha_bar[:-1], (level / level[0])[:-1], 1e-12)
    assert beta[-1] == pytest.approx(0.999)  # 1 before it is cut
    assert (np.diff(alpha_bar) < 0).all()


def test_small_noise_levels_are_exact_in_float32():
    exact = np.asarray(diffusion.linear_schedule().noise)
    with jax.enable_x64(False):
        noise = diffusion.linear_schedule().noise
        assert noise.dtype == jnp.float32
        np.testing.assert_allclose(noise, exact, rtol=1e-7)


# The forward process and conversions.


def test_forward_has_the_moments_of_the_process():
    schedule = diffusion.linear_schedule(100)
    eps = jax.random.normal(KEY, (40000, 3))
    x = jax.jit(jax.vmap(lambda e: diffusion.forward(schedule, X, 40, e)))(eps)
    alpha_bar = schedule.alpha_bar[40]
    close(x.mean(0), np.sqrt(alpha_bar) * X, 0.02)
    close(np.cov(x.T), (1 - alpha_bar) * np.eye(3), 0.02)


def test_forward_ends_at_the_vector_and_at_noise():
    schedule = linear()
    eps = jnp.ones(3)
    close(diffusion.forward(schedule, X, 0, eps), X, 0)
    close(diffusion.forward(schedule, X, 1000, eps), eps, 0.02)


@pytest.mark.parametrize("t", [1, 30, 100])
def test_predictions_convert_into_each_other(t):
    schedule = diffusion.linear_schedule(100)
    eps = jax.random.normal(KEY, 3)
    x = diffusion.forward(schedule, X, t, eps)
    close(diffusion.x0_from_eps(schedule, x, t, eps), X)
    close(diffusion.eps_from_x0(schedule, x, t, X), eps)
    v = schedule.signal[t] * eps - schedule.noise[t] * X
    close(diffusion.eps_from_v(schedule, x, t, v), eps)


def test_there_is_no_noise_at_time_zero():
    schedule = diffusion.linear_schedule(10)
    close(diffusion.eps_from_x0(schedule, X + 1, 0, X), np.zeros(3), 0)


# Denoisers in closed form.


@functools.partial(jax.jit, static_argnums=0)
def predict(denoise, x, t):
    return denoise(x, t)


@pytest.mark.parametrize("t", [1, 200, 900])
def test_gaussian_denoiser_is_minus_the_score(t):
    schedule = linear()
    root = np.random.default_rng(0).normal(size=(3, 3))
    cov = root @ root.T
    denoise = diffusion.gaussian_denoiser(schedule, jnp.array(MEAN), jnp.array(cov))
    signal, noise = float(schedule.signal[t]), float(schedule.noise[t])
    marginal = signal**2 * cov + noise**2 * np.eye(3)
    close(
        predict(denoise, jnp.array(X), t),
        noise * np.linalg.solve(marginal, X - signal * MEAN),
    )


def test_gaussian_denoiser_takes_variances_for_a_covariance():
    schedule = linear()
    full = diffusion.gaussian_denoiser(
        schedule, jnp.array(MEAN), jnp.diag(jnp.array(VARIANCE))
    )
    close(predict(full, X, 300), predict(gaussian(), X, 300))


@pytest.mark.parametrize("t", [1, 100, 900])
def test_mixture_denoiser_is_minus_the_score(t):
    schedule = linear()
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=(4, 3)), rng.uniform(0.1, 1, size=(4, 3))
    weight = jnp.array([1.0, 0.0, 3.0, 0.5])
    signal, noise = schedule.signal[t], schedule.noise[t]

    def log_density(x):
        total = signal**2 * variance + noise**2
        quadratic = (x[None] - signal * mean) ** 2 / total + jnp.log(total)
        return jax.nn.logsumexp(-quadratic.sum(1) / 2, b=weight)

    denoise = diffusion.mixture_denoiser(
        schedule, jnp.array(mean), jnp.array(variance), weight
    )
    close(predict(denoise, X, t), -noise * jax.grad(log_density)(jnp.array(X)))


def test_one_component_is_a_gaussian():
    schedule = linear()
    denoise = diffusion.mixture_denoiser(
        schedule, jnp.array(MEAN)[None], jnp.array(VARIANCE)[None], jnp.ones(1)
    )
    close(predict(denoise, X, 500), predict(gaussian(), X, 500))


def test_a_denoiser_of_points_generates_one_of_them():
    schedule = diffusion.linear_schedule(200, 1e-3, 1e-1)
    points = jax.random.normal(jax.random.key(3), (6, 3))
    denoise = diffusion.mixture_denoiser(
        schedule, points, jnp.zeros((6, 3)), jnp.ones(6)
    )

    def draw(key):
        x = jax.random.normal(key, 3)
        return sample(denoise, schedule, x, depth=200, steps=200, key=key)

    draws = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 200))
    distance = jnp.linalg.norm(draws[:, None] - points[None], axis=-1)
    assert distance.min(1).max() < 1e-2
    assert len(np.unique(distance.argmin(1))) > 3


# Steps.


@pytest.mark.parametrize(("t", "u"), [(1, 0), (2, 1), (400, 399), (1000, 999)])
def test_an_ancestral_step_is_equation_7_of_ho(t, u):
    schedule = linear()
    alpha_bar, beta = tables(schedule)
    eps = np.array([0.3, -1.2, 0.7])
    mean, sigma = step(schedule, jnp.array(X), jnp.array(eps), t, u, eta=1)
    expected = (X - beta[t] / np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(1 - beta[t])
    close(mean, expected)
    close(sigma**2, beta[t] * (1 - alpha_bar[u]) / (1 - alpha_bar[t]))


@pytest.mark.parametrize("eta", [0, 0.3, 1])
@pytest.mark.parametrize(("t", "u"), [(1, 0), (40, 17), (1000, 500)])
def test_a_strided_step_is_equation_12_of_song(t, u, eta):
    schedule = linear()
    a, _ = tables(schedule)
    eps = np.array([0.3, -1.2, 0.7])
    x0 = (X - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t])
    s = eta * np.sqrt((1 - a[u]) / (1 - a[t])) * np.sqrt(1 - a[t] / a[u])
    expected = np.sqrt(a[u]) * x0 + np.sqrt(max(1 - a[u] - s**2, 0)) * eps
    mean, sigma = step(schedule, jnp.array(X), jnp.array(eps), t, u, eta=eta)
    close(mean, expected, 1e-9)
    close(sigma, s)


def test_full_steps_with_eta_1_are_ancestral_sampling():
    schedule = diffusion.linear_schedule(30, 1e-3, 0.2)
    alpha_bar, beta = tables(schedule)
    denoise = groups()
    x, key = np.array([0.2, -0.4, 1.7]), jax.random.key(5)
    drawn = sample(denoise, schedule, x, depth=30, steps=30, key=key)
    for t, step_key in zip(range(30, 0, -1), jax.random.split(key, 30), strict=True):
        eps = predict(denoise, x, t)
        x = x - beta[t] / np.sqrt(1 - alpha_bar[t]) * eps
        x = x / np.sqrt(1 - beta[t])
        variance = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        x = np.asarray(x + np.sqrt(variance) * jax.random.normal(step_key, 3))
    close(drawn, x)


def linear_map(schedule, times, variance, eta):
    """Return the slope of the sampler about the mean, and the variance it adds."""
    a, slope, added = np.asarray(schedule.alpha_bar), 1.0, 0.0
    for t, u in zip(times[:0:-1], times[-2::-1], strict=True):
        gain = np.sqrt(1 - a[t]) / (a[t] * variance + 1 - a[t])
        s = eta * np.sqrt((1 - a[u]) / (1 - a[t])) * np.sqrt(1 - a[t] / a[u])
        factor = np.sqrt(a[u] / a[t]) * (1 - np.sqrt(1 - a[t]) * gain)
        factor = factor + np.sqrt(np.maximum(1 - a[u] - s**2, 0)) * gain
        slope, added = slope * factor, added * factor**2 + s**2
    return slope, added


def test_ddim_on_gaussian_data_is_the_closed_linear_map():
    schedule = linear()
    code = diffusion.Code(jnp.array(X), None, jnp.arange(0, 601, 20))
    generated = generate(gaussian(), schedule, code)
    slope, _ = linear_map(schedule, np.arange(0, 601, 20), VARIANCE, 0)
    close(generated, MEAN + slope * (X - np.sqrt(schedule.alpha_bar[600]) * MEAN))


def test_ddim_tends_to_the_flow_with_order_one():
    schedule = fine()
    denoise, depth, steps = gaussian(fine), 1024, np.array([16, 32, 64])
    a = float(schedule.alpha_bar[depth])
    flow = MEAN + np.sqrt(VARIANCE / (a * VARIANCE + 1 - a)) * (X - np.sqrt(a) * MEAN)
    code = diffusion.Code(jnp.array(X), None, jnp.arange(depth + 1))
    errors = [
        np.linalg.norm(generate(denoise, schedule, code, steps=s) - flow)
        for s in map(int, steps)
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.15 < slope < -0.85
    assert errors[-1] < 0.03


def test_ancestral_sampling_has_the_variance_of_gaussian_data():
    schedule = linear()
    slope, added = linear_map(schedule, np.arange(1001), VARIANCE, 1)
    close(slope**2 + added, VARIANCE, 0.02)  # Of order 1 / T, by theory.

    def draw(key):
        start, steps = jax.random.split(key)
        x = jax.random.normal(start, 3)
        return sample(gaussian(), schedule, x, depth=1000, steps=100, key=steps)

    draws = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20000))
    slope, added = linear_map(schedule, np.arange(0, 1001, 10), VARIANCE, 1)
    close(draws.mean(0), MEAN, 0.03)
    np.testing.assert_allclose(draws.var(0), slope**2 + added, rtol=0.05)


# Inversion.


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("depth", "steps", "refinements")
)
def round_trip_error(denoise, schedule, *, depth, steps, refinements):
    code = invert(
        denoise, schedule, X, depth=depth, steps=steps, refinements=refinements
    )
    return jnp.linalg.norm(generate(denoise, schedule, code) - X)


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_each_refinement_raises_the_order_of_the_round_trip(refinements):
    steps = [16, 32, 64]
    errors = [
        round_trip_error(
            gaussian(fine), fine(), depth=1024, steps=s, refinements=refinements
        )
        for s in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(1 + refinements, abs=0.2)


def test_the_fixed_point_inverts_a_step_exactly():
    schedule = linear()
    error = round_trip_error(gaussian(), schedule, depth=300, steps=10, refinements=60)
    assert error < 1e-12


def test_plain_inversion_is_a_loop_over_the_cards_equation():
    schedule = linear()
    a, denoise, x = np.asarray(schedule.alpha_bar), groups(), X
    for u, t in [(0, 33), (33, 66), (66, 100)]:
        eps = np.asarray(predict(denoise, x, max(u, 1)))
        x0 = (x - np.sqrt(1 - a[u]) * eps) / np.sqrt(a[u])
        x = np.sqrt(a[t]) * x0 + np.sqrt(1 - a[t]) * eps
    code = invert(denoise, schedule, X, depth=100, steps=3, refinements=0)
    close(code.times, [0, 33, 66, 100], 0)
    close(code.latent, x)


def test_round_trips_on_a_mixture_get_better_with_steps():
    schedule = linear()
    denoise = groups(spread=0.25)
    errors = [
        round_trip_error(denoise, schedule, depth=300, steps=s, refinements=0)
        for s in (10, 30, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.04
    assert (
        round_trip_error(denoise, schedule, depth=300, steps=100, refinements=3)
        < 0.01 * errors[-1]
    )


def noise_maps(denoise, schedule, *, depth=300, steps=10, x=X):
    return invert_noise_maps(
        denoise, schedule, x, depth=depth, steps=steps, key=jax.random.key(7)
    )


@pytest.mark.parametrize("depth", [10, 300, 1000])
def test_noise_maps_give_the_vector_back(depth):
    schedule = linear()
    denoise = groups()
    code = noise_maps(denoise, schedule, depth=depth)
    close(generate(denoise, schedule, code), X)


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
def test_noise_maps_are_a_loop_over_the_cards_equations(gamma):
    schedule = linear()
    a, denoise = np.asarray(schedule.alpha_bar), groups()
    code = noise_maps(denoise, schedule)

    def posterior(x, t, u):
        eps = np.asarray(predict(denoise, x, t))
        s = np.sqrt((1 - a[u]) / (1 - a[t]) * (1 - a[t] / a[u]))
        x0 = (x - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t])
        return np.sqrt(a[u]) * x0 + np.sqrt(max(1 - a[u] - s**2, 0)) * eps, s

    # The path x_tau of the inversion, from the code alone, ends at the vector.
    x, path = np.asarray(code.latent), np.asarray(code.latent)
    for z, t, u in zip(
        np.asarray(code.noise), range(300, 0, -30), range(270, -1, -30), strict=True
    ):
        mean, s = posterior(path, t, u)
        path = mean + (s if u else 1) * z
        mean, s = posterior(x, t, u)
        x = mean + gamma * s * z  # The card's form: nothing is added at sigma = 0.
    close(path, X)
    published = code._replace(noise=code.noise.at[-1].set(0))
    close(generate(denoise, schedule, published, gamma=gamma), x)


def test_latents_of_noise_maps_are_independent_draws_of_the_forward_process():
    schedule = linear()
    denoise = gaussian()

    def draw(key):
        code = invert_noise_maps(denoise, schedule, X, depth=400, steps=2, key=key)
        mean, sigma = step(
            schedule, code.latent, denoise(code.latent, 400), 400, 200, eta=1
        )
        return code.latent, mean + sigma * code.noise[0]

    latent, middle = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20000))
    signal, noise = schedule.signal, schedule.noise
    e_deep = (latent - signal[400] * X[None]) / noise[400]
    e_middle = (middle - signal[200] * X[None]) / noise[200]
    close(np.cov(np.hstack([e_deep, e_middle]).T), np.eye(6), 0.03)


def test_noise_maps_interpolate_linearly_in_gamma_on_gaussian_data():
    schedule = linear()
    denoise = gaussian()
    code = noise_maps(denoise, schedule)
    none, half, all_ = (generate(denoise, schedule, code, gamma=g) for g in (0, 0.5, 1))
    close(half, (none + all_) / 2)
    close(all_, X)
    slope, _ = linear_map(schedule, np.arange(0, 301, 30), VARIANCE, 1)
    start = code.latent - schedule.signal[300] * MEAN
    close(none, MEAN + slope * start)
    derivative = jax.grad(lambda g: generate(denoise, schedule, code, gamma=g)[0])
    close(derivative(1.0), all_[0] - none[0])  # Also at the end of the range.


def test_gamma_multiplies_the_latent_of_a_code_without_maps():
    schedule = linear()
    denoise = groups()
    code = invert(denoise, schedule, X, depth=300, steps=10)
    for gamma in (0, 0.7):
        close(
            generate(denoise, schedule, code, gamma=gamma),
            sample(denoise, schedule, gamma * code.latent, depth=300, steps=10, eta=0),
        )


def test_a_shallow_code_is_nearly_the_vector():
    schedule = linear()
    denoise = gaussian()
    code = diffusion.diffuse(schedule, X, depth=1, steps=1, key=KEY)
    close(generate(denoise, schedule, code), X, 0.03)


def test_codes_generate_on_another_grid():
    schedule = linear()
    denoise = groups()
    code = invert(denoise, schedule, X, depth=300, steps=10)
    expected = sample(denoise, schedule, code.latent, depth=300, steps=4, eta=0)
    close(generate(denoise, schedule, code, steps=4), expected)
    assert np.linalg.norm(expected - X) > 0.01


# The closed-form controls: shrinkage, modes.


@pytest.mark.parametrize(("eta", "factor"), [(0, 0.3288), (1, 0.1081)])
def test_the_cards_shrink_factors(eta, factor):
    schedule = linear()
    denoise = diffusion.gaussian_denoiser(schedule, jnp.zeros(1), jnp.full(1, 0.5))
    k = diffusion.shrinkage_factor(schedule, 0.5, 400)
    assert float(jnp.where(eta == 0, jnp.sqrt(k), k)) == pytest.approx(factor, abs=5e-5)
    mean = diffusion.forward(schedule, jnp.ones(1), 400, jnp.zeros(1))
    maps = jnp.zeros((400, 1)) if eta else None
    code = diffusion.Code(mean, maps, jnp.arange(401))
    shrunk = float(generate(denoise, schedule, code)[0])
    assert shrunk == pytest.approx(factor, abs=2e-3)


@pytest.mark.parametrize("eta", [0, 1])
def test_noising_and_denoising_shrinks_gaussian_data(eta):
    schedule = linear()
    a = float(schedule.alpha_bar[300])
    k = np.asarray(diffusion.shrinkage_factor(schedule, jnp.array(VARIANCE), 300))
    close(k, a * VARIANCE / (a * VARIANCE + 1 - a))

    def draw(key):
        first, second = jax.random.split(key)
        code = diffusion.diffuse(schedule, X, depth=300, steps=100, key=first)
        return generate(gaussian(), schedule, code, eta=eta, key=second)

    draws = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20000))
    factor = k if eta else np.sqrt(k)
    close(draws.mean(0), MEAN + factor * (X - MEAN), 0.03)
    noise = VARIANCE * (1 - a) / (a * VARIANCE + 1 - a)
    if eta:
        noise = VARIANCE * (1 - k) + k**2 * (1 - a) / a
    np.testing.assert_allclose(draws.var(0), noise, rtol=0.06)


def generated_groups(depth, gamma=None):
    """Send two opposite groups through the diffusion, with noise maps or without."""
    schedule = linear()
    p = 8
    denoise = groups(p=p)
    key_x, key_code = jax.random.split(jax.random.key(2))
    own = jnp.repeat(jnp.array([1.0, -1.0]), 100)
    x = own[:, None] + 0.3 * jax.random.normal(key_x, (200, p))

    def one(key, x):
        if gamma is None:
            code = diffusion.diffuse(schedule, x, depth=depth, steps=20, key=key)
            return generate(denoise, schedule, code)
        code = invert_noise_maps(denoise, schedule, x, depth=depth, steps=20, key=key)
        return generate(denoise, schedule, code, gamma=gamma)

    return own, x, jax.jit(jax.vmap(one))(jax.random.split(key_code, 200), x)


@pytest.mark.parametrize("gamma", [0, 0.5, None])
def test_opposite_groups_keep_their_mode_at_shallow_depth(gamma):
    own, x, generated = generated_groups(100, gamma)
    assert (jnp.sign(generated.mean(1)) == own).all()

    def within(x):
        return jnp.mean((x - own[:, None]) ** 2)

    assert within(generated) < 0.8 * within(x)


def test_opposite_groups_lose_their_mode_at_full_depth():
    own, _, generated = generated_groups(1000)
    kept = (jnp.sign(generated.mean(1)) == own).mean()
    assert 0.3 < kept < 0.8  # Without a code, chance decides.


# Changes to a denoiser.


def quadratic(x):
    return jnp.sum(jnp.array([1.0, 0.2, 3.0]) * (x - 2.0) ** 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_guided_step_lowers_the_clients_loss(sign):
    schedule = linear()
    before = jnp.array(X)
    after = before - 0.05 * jax.grad(quadratic)(before)

    def silent(x, t):
        return jnp.zeros_like(x)

    guided = diffusion.guide(silent, schedule, before, after, omega=2.0, sign=sign)
    close(guided(after, 50), sign * 3 * schedule.noise[50] * (before - after))
    plain, moved = (
        sample(d, schedule, after, depth=50, steps=1, eta=0) for d in (silent, guided)
    )
    assert (quadratic(moved) < quadratic(plain)) == (sign == 1)
    assert (quadratic(moved) < quadratic(after)) == (sign == 1)


def test_omega_minus_one_is_no_guidance():
    schedule = linear()
    denoise = groups()
    off = diffusion.guide(denoise, schedule, X + 1, X, omega=-1)
    close(predict(off, X, 70), predict(denoise, X, 70), 0)


def test_clipping_bounds_the_clean_vector():
    schedule = linear()

    def poor(x, t):
        return jnp.array([-3.0, 0.1, 0.2])

    def clean(denoise, t):
        return diffusion.x0_from_eps(schedule, X, t, denoise(X, t))

    clipped = diffusion.clip_denoiser(poor, schedule, 2.0)
    assert clean(poor, 800)[0] > 100
    close(clean(clipped, 800), np.clip(clean(poor, 800), -2, 2), 1e-8)
    close(clipped(X, 2)[1:], poor(X, 2)[1:])
    # The same change on both sides of a code keeps it exact.
    clipped = diffusion.clip_denoiser(groups(), schedule, 0.7)
    code = noise_maps(clipped, schedule)
    close(generate(clipped, schedule, code), X)


# The loss.


def test_the_loss_is_least_for_the_closed_form():
    num_times, p = 4, 2
    schedule = diffusion.linear_schedule(num_times, 0.1, 0.4)
    variance = 0.7
    x = np.sqrt(variance) * jax.random.normal(jax.random.key(3), (100000, p))

    def loss(slope):
        return simple_loss(lambda x, t: slope[t] * x, schedule, x, key=KEY)

    # Quadratic in each slope, and no slope meets another.
    slope = jax.grad(jax.jit(loss))
    at_zero = slope(jnp.zeros(num_times + 1))
    at_one = slope(jnp.ones(num_times + 1))
    best = -at_zero[1:] / (at_one - at_zero)[1:]
    signal, noise = schedule.signal[1:], schedule.noise[1:]
    np.testing.assert_allclose(best, noise / (signal**2 * variance + noise**2), 0.02)
    least = loss(jnp.concatenate([jnp.zeros(1), best]))
    share = signal**2 * variance / (signal**2 * variance + noise**2)
    assert float(least) == pytest.approx(float(share.mean()), rel=0.02)
    # Every time counts alike: curvatures are means of x_t^2 over a fourth of the rows.
    curvature = (at_one - at_zero)[1:]
    np.testing.assert_allclose(
        curvature, 2 * (signal**2 * variance + noise**2) / num_times, rtol=0.03
    )


def test_weights_and_masks_of_the_loss():
    schedule = diffusion.linear_schedule(50)
    x = jax.random.normal(jax.random.key(4), (4, 3))
    denoise = groups()

    def loss(x=x, **kwargs):
        return simple_loss(denoise, schedule, x, key=KEY, **kwargs)

    rows = [loss(weight=row) for row in jnp.eye(4)]
    weight = jnp.array([1.0, 0.0, 2.5, 0.5])
    close(loss(weight=weight), np.dot(weight, rows) / 4)
    close(loss(), np.mean(rows))
    columns = [loss(mask=column > 0) for column in jnp.eye(3)]
    close(loss(mask=jnp.array([True, False, True])), (columns[0] + columns[2]) / 2)
    absent = x.at[1].set(jnp.nan)
    close(loss(absent, weight=weight), loss(weight=weight), 0)
    # An upload that is not finite is left out where it cannot be refused.
    jitted = jax.jit(lambda x: loss(x))(absent)
    close(jitted, loss(weight=jnp.array([1.0, 0, 1, 1])))


# Parameter vectors.


def uploads(m=12, p=40, rank=12, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.geomspace(3, 0.1, rank)
    return rng.normal(size=(m, rank)) @ (spread[:, None] * rng.normal(size=(rank, p)))


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_a_basis_is_numpys_singular_value_decomposition(rank):
    x = uploads() + 5
    basis = fit_basis(x, rank)
    _, values, right = np.linalg.svd(x - x.mean(0), full_matrices=False)
    close(basis.mean, x.mean(0))
    close(basis.cov, np.diag(values[:rank] ** 2 / 12))
    close(np.abs(basis.directions @ right[:rank].T), np.eye(rank))
    codes = jax.vmap(diffusion.encode, (None, 0))(basis, x)
    close(np.cov(codes.T, bias=True).reshape(rank, rank), basis.cov)


def test_weights_of_a_basis_are_repetitions():
    x = uploads()
    weight = np.array([2, 1, 0, 3] + [1] * 8)
    repeated = fit_basis(np.repeat(x, weight, axis=0), 5)
    x[2] = np.nan
    weighted = fit_basis(x, 5, weight=weight)
    close(weighted.mean, repeated.mean)
    close(weighted.cov, repeated.cov)
    close(np.abs(weighted.directions @ repeated.directions.T), np.eye(5))


def test_codes_reconstruct_when_the_rank_allows():
    x = uploads(rank=4)
    basis = fit_basis(x, 4)
    for row in x:
        close(diffusion.decode(basis, diffusion.encode(basis, row)), row)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_directions_beyond_the_rank_of_the_data_are_zero(dtype):
    x = uploads(rank=4).astype(dtype)
    basis = fit_basis(x, 7)
    tolerance = 20 * np.finfo(dtype).eps
    close(
        basis.directions @ basis.directions.T,
        np.diag([1, 1, 1, 1, 0, 0, 0]),
        tolerance,
    )
    close(np.diag(basis.cov)[4:], np.zeros(3), 0)
    alone = fit_basis(np.ones((3, 5)), 2)
    close(alone.directions, np.zeros((2, 5)), 0)


def test_a_basis_of_long_vectors_in_float32():
    x = uploads(16, 100_000, rank=8).astype(np.float32)
    basis = fit_basis(x, 8)
    assert basis.directions.dtype == jnp.float32
    close(basis.directions @ basis.directions.T, np.eye(8), 1e-6)
    values = np.linalg.svd((x - x.mean(0)).astype(float), compute_uv=False)[:8]
    np.testing.assert_allclose(np.diag(basis.cov), values**2 / 16, rtol=1e-4)


def test_reconstruction_replaces_the_code_and_keeps_a_share_of_the_rest():
    x = uploads()
    basis = fit_basis(x, 4)
    own, code = diffusion.encode(basis, x[3]), jnp.arange(4.0)
    rest = x[3] - diffusion.decode(basis, own)
    for rho in (0, 0.3, 1):
        close(
            diffusion.reconstruct(basis, x[3], code, rho=rho),
            diffusion.decode(basis, code) + rho * rest,
        )
    close(diffusion.reconstruct(basis, x[3], own), x[3])


def test_alignment_is_orthogonal_procrustes():
    basis = fit_basis(uploads(seed=1), 4)
    previous = fit_basis(uploads(seed=2), 4)
    aligned = align(basis, previous)
    turn, _ = scipy.linalg.orthogonal_procrustes(
        np.asarray(basis.directions).T, np.asarray(previous.directions).T
    )
    close(aligned.directions, turn.T @ basis.directions)
    close(aligned.cov, turn.T @ basis.cov @ turn)
    close(
        aligned.directions.T @ aligned.directions,
        basis.directions.T @ basis.directions,
    )


def test_alignment_undoes_a_rotation():
    basis = fit_basis(uploads(), 4)
    turn = scipy.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    turned = basis._replace(
        directions=turn @ basis.directions, cov=turn @ basis.cov @ turn.T
    )
    jax.tree.map(close, align(turned, basis), basis)


def test_shrinkage_is_the_linear_control():
    x = uploads()
    basis = fit_basis(x, 3)
    factor = np.array([0.9, 0.5, 0.1])
    v = np.asarray(basis.directions)
    deviation = x[0] - x.mean(0)
    inside = v.T @ (factor * (v @ deviation))
    outside = deviation - v.T @ (v @ deviation)
    close(
        diffusion.shrink(basis, x[0], factor, rho=0.4),
        x.mean(0) + inside + 0.4 * outside,
    )
    close(diffusion.shrink(basis, x[0], 1.0), x[0])
    close(diffusion.shrink(basis, x[0], 0.0, rho=0), x.mean(0))


def test_shrinkage_is_what_diffusion_does_to_a_gaussian_population():
    x = uploads() / 4
    schedule, depth = fine(), 512
    basis = fit_basis(x, 3)
    factor = jnp.sqrt(diffusion.shrinkage_factor(schedule, jnp.diag(basis.cov), depth))
    # Codes that follow another basis have a covariance with all entries.
    turned = align(basis, fit_basis(uploads(seed=3), 3))
    denoise = diffusion.gaussian_denoiser(schedule, jnp.zeros(3), turned.cov)
    code = diffusion.encode(turned, x[0])
    mean = diffusion.forward(schedule, code, depth, jnp.zeros(3))
    generated = sample(denoise, schedule, mean, depth=depth, steps=512, eta=0)
    close(
        diffusion.reconstruct(turned, x[0], generated),
        diffusion.shrink(basis, x[0], factor),
        3e-3,
    )


@pytest.mark.parametrize("scale", diffusion.SCALES)
def test_a_normalizer_is_numpys_mean_and_deviation(scale):
    x = uploads() * np.geomspace(0.1, 10, 40) + 3
    weight = np.array([2, 1, 0, 3] + [1] * 8)
    rows = np.repeat(x, weight, axis=0)
    x[2] = np.nan
    normalizer = fit_normalizer(x, weight=weight, scale=scale)
    close(normalizer.mean, rows.mean(0))
    std = rows.std(0)
    close(normalizer.scale, np.sqrt((std**2).mean()) if scale == "scalar" else std)


def test_the_scale_of_a_normalizer_has_a_floor():
    x = uploads()
    x[:, 5] = 2.0
    normalizer = fit_normalizer(x, scale="coordinate", floor=0.01)
    close(normalizer.scale[5], 0.01 * np.sqrt(x.var(0).mean()))
    for scale in diffusion.SCALES:
        alone = fit_normalizer(x[:1], scale=scale, floor=1.0)
        close(alone.scale * np.ones(40), np.ones(40))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 5]), st.sampled_from([1, 7]), st.integers(0, 10**6))
def test_normalizing_is_undone(m, p, seed):
    x = np.random.default_rng(seed).normal(size=(m, p)) * 10.0 ** (seed % 7 - 3)
    with jax.enable_x64(True):
        for scale in diffusion.SCALES:
            normalizer = fit_normalizer(x, scale=scale)
            z = diffusion.normalize(normalizer, jnp.array(x[0]))
            assert np.isfinite(z).all()
            back = diffusion.denormalize(normalizer, z)
            np.testing.assert_allclose(
                back, x[0], rtol=1e-12, atol=1e-12 * abs(x).max()
            )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60))
def test_tokens_hold_the_vector_and_zeros(p, width):
    x = np.arange(1.0, p + 1)
    tokens = np.asarray(diffusion.to_tokens(x, width))
    assert tokens.shape == (-(-p // width), width)
    flat = tokens.reshape(-1)
    np.testing.assert_array_equal(flat[:p], x)
    assert not flat[p:].any()
    np.testing.assert_array_equal(diffusion.from_tokens(tokens, p), x)


# Transformations.


def pipeline(denoise, schedule, x, key, depth=200, gamma=0.6, eta=0.5):
    """Return what the three versions make of a vector, stacked."""
    first, second, third = jax.random.split(key, 3)
    grid = {"depth": depth, "steps": 8}
    plain = diffusion.invert(denoise, schedule, x, **grid)
    maps = diffusion.invert_noise_maps(denoise, schedule, x, **grid, key=first)
    noised = diffusion.diffuse(schedule, x, **grid, key=second)
    return jnp.stack(
        [
            diffusion.generate(denoise, schedule, plain, gamma=gamma),
            diffusion.generate(denoise, schedule, maps, gamma=gamma),
            diffusion.generate(denoise, schedule, noised, eta=eta, key=third),
        ]
    )


@pytest.fixture(scope="module")
def jitted():
    with jax.enable_x64(True):
        schedule = linear()
        denoise = groups(spread=0.3)
        return jax.jit(functools.partial(pipeline, denoise, schedule))


def test_jit_changes_nothing_and_takes_traced_numbers(jitted):
    schedule = linear()
    denoise = groups(spread=0.3)
    close(
        jitted(jnp.array(X), KEY, 150, 0.3, 1.0),
        pipeline(denoise, schedule, jnp.array(X), KEY, 150, 0.3, 1.0),
    )


def test_clients_do_not_meet_under_vmap(jitted):
    x = jax.random.normal(jax.random.key(8), (4, 3))
    keys = jax.random.split(KEY, 4)
    together = jax.jit(jax.vmap(jitted))(x, keys)
    for i in range(4):
        close(together[i], jitted(x[i], keys[i]))


def test_gradients_agree_with_differences(jitted):
    check_grads(
        lambda x, gamma: jitted(x, KEY, 200, gamma, 0.5),
        (jnp.array(X), 0.6),
        order=1,
        modes=["fwd", "rev"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_gradients_are_finite_at_the_ends(jitted):
    gradient = jax.jacrev(lambda *args: jitted(args[0], KEY, 200, *args[1:]), (0, 1, 2))
    for gamma, eta in [(0.0, 0.0), (1.0, 1.0)]:
        for jacobian in gradient(jnp.array(X), gamma, eta):
            assert jnp.isfinite(jacobian).all()


def test_everything_stays_float32():
    schedule = diffusion.linear_schedule()  # In float64.
    x = uploads().astype(np.float32)
    basis = align(fit_basis(x, 3), fit_basis(x, 3))
    normalizer = fit_normalizer(x, scale="coordinate")
    denoise = diffusion.gaussian_denoiser(schedule, jnp.zeros(3), basis.cov)
    points = diffusion.mixture_denoiser(
        schedule, jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.ones(2)
    )
    clipped = diffusion.clip_denoiser(points, schedule, 3.0)
    code = diffusion.encode(basis, x[0])
    outputs = [
        basis,
        normalizer,
        diffusion.normalize(normalizer, x[0]),
        diffusion.denormalize(normalizer, x[0]),
        pipeline(denoise, schedule, code, KEY),
        pipeline(diffusion.guide(clipped, schedule, code, code), schedule, code, KEY),
        simple_loss(denoise, schedule, x[:, :3], key=KEY),
        diffusion.shrink(basis, x[0], jnp.ones(3, jnp.float32), rho=0.5),
        diffusion.forward(schedule, code, 5, code),
    ]
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype == jnp.float32


def test_float32_agrees_with_float64():
    x = jnp.array(X)
    schedule = linear()
    code = noise_maps(groups(), schedule, depth=100, steps=50)
    exact = generate(groups(), schedule, code, gamma=0.5)
    with jax.enable_x64(False):
        coarse = diffusion.linear_schedule()
        denoise = groups(schedule=diffusion.linear_schedule)
        single = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), np.float32 if a.ndim == 2 else None),
            code._replace(latent=np.asarray(code.latent, np.float32)),
        )
        generated = generate(denoise, coarse, single, gamma=0.5)
        assert generated.dtype == jnp.float32
        close(generated, exact, 3e-5)
        own = noise_maps(denoise, coarse, x=np.float32(x))
        close(generate(denoise, coarse, own), x, 3e-5)


# Bad input.


def call(name, *args, **kwargs):
    return lambda s: getattr(diffusion, name)(*args, **kwargs)


def with_schedule(name, *args, **kwargs):
    return lambda s: getattr(diffusion, name)(s, *args, **kwargs)


def with_denoiser(name, *args, **kwargs):
    return lambda s: getattr(diffusion, name)(groups(), s, *args, **kwargs)


def code_of(latent=X, noise=None, steps=2):
    return diffusion.Code(jnp.array(latent), noise, 10 * jnp.arange(steps + 1))


NAN = np.array([1.0, np.nan, 0.0])
GRID = {"depth": 50, "steps": 5}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (call("linear_schedule", 0), "num_times must be >= 1, got 0"),
        (call("linear_schedule", 10, 0.0), "beta_min"),
        (call("linear_schedule", 10, 0.2, 0.1), "beta_min"),
        (call("linear_schedule", 10, 0.1, np.nan), "beta_max"),
        (call("cosine_schedule", 10, -1.0), "offset"),
        (call("cosine_schedule", 10, 0.1, 1.0), "beta_max"),
        (with_schedule("forward", X[None], 3, X), r"x0 must have shape \[p\]"),
        (with_schedule("forward", X, 3, X[:2]), "eps must have shape"),
        (with_schedule("forward", NAN, 3, X), "x0 must be finite"),
        (with_schedule("forward", X, 101, X), r"t must be in \[0, 100\], got 101"),
        (with_schedule("forward", X, 3.5, X), "t must be an integer, got 3.5"),
        (with_schedule("step", X, X, 3, 3), "u must be < t = 3, got 3"),
        (with_schedule("step", X, X, 3, 1, eta=1.5), r"eta must be in \[0, 1\]"),
        (with_schedule("step", X, X, 3, 1, eta=np.nan), "eta"),
        (with_denoiser("invert", X, depth=101, steps=5), r"depth .* \[5, 100\]"),
        (with_denoiser("invert", X, depth=4, steps=5), r"depth .*got 4"),
        (with_denoiser("invert", X, depth=5.5, steps=5), "depth must be an integer"),
        (with_denoiser("invert", X, depth=5, steps=0), "steps must be in"),
        (with_denoiser("invert", X, depth=100, steps=101), "steps must be in"),
        (with_denoiser("invert", X, **GRID, refinements=-1), "refinements"),
        (with_denoiser("invert", NAN, **GRID), "x must be finite"),
        (with_denoiser("invert", X[None], **GRID), r"x must have shape \[p\]"),
        (with_denoiser("invert_noise_maps", NAN, **GRID, key=KEY), "x must be finite"),
        (with_schedule("diffuse", NAN, **GRID, key=KEY), "x must be finite"),
        (with_schedule("diffuse", X, depth=0, steps=1, key=KEY), "depth"),
        (
            lambda s: invert(lambda x, t: x[:1], s, X, **GRID),
            r"denoise must return the shape of its input \(3,\), got \(1,\)",
        ),
        (with_denoiser("generate", code_of(), gamma=1.1), r"gamma must be in \[0, 1\]"),
        (with_denoiser("generate", code_of(), gamma=-0.1), "gamma"),
        (with_denoiser("generate", code_of(), gamma=np.nan), "gamma"),
        (with_denoiser("generate", code_of(), eta=1.1, key=KEY), "eta"),
        (with_denoiser("generate", code_of(), eta=0.5), "key must be given"),
        (with_denoiser("generate", code_of(), steps=21), "depth"),
        (with_denoiser("generate", code_of(NAN)), "code.latent must be finite"),
        (with_denoiser("generate", code_of(noise=np.ones((2, 4)))), "code.noise"),
        (with_denoiser("generate", code_of(noise=np.ones((3, 3)))), "code.times"),
        (with_denoiser("generate", code_of(noise=np.stack([X, NAN]))), "code.noise"),
        (with_denoiser("generate", code_of(noise=np.ones((2, 3))), eta=1.0), "fixes"),
        (with_denoiser("generate", code_of(noise=np.ones((2, 3))), steps=2), "fixes"),
        (with_denoiser("sample", X, **GRID), "key must be given"),
        (with_denoiser("simple_loss", X, key=KEY), r"x must have shape \[m, p\]"),
        (
            with_denoiser("simple_loss", np.ones((2, 3)), key=KEY, weight=np.ones(3)),
            "weight must have shape",
        ),
        (
            with_denoiser("simple_loss", np.ones((2, 3)), key=KEY, weight=np.zeros(2)),
            "weight must be >= 0 and not all 0",
        ),
        (
            with_denoiser("simple_loss", np.ones((2, 3)), key=KEY, mask=np.zeros(3)),
            "mask must hold",
        ),
        (with_denoiser("simple_loss", NAN[None], key=KEY), "x must be finite"),
        (with_schedule("gaussian_denoiser", X, np.ones(2)), "cov must have shape"),
        (with_schedule("gaussian_denoiser", X, -np.ones(3)), "semi-definite"),
        (with_schedule("gaussian_denoiser", X, 1 - 2 * np.eye(3)), "semi-definite"),
        (with_schedule("gaussian_denoiser", NAN, np.ones(3)), "mean must be finite"),
        (
            with_schedule("mixture_denoiser", X[None], -np.ones((1, 3)), np.ones(1)),
            "variance must be in",
        ),
        (
            with_schedule("mixture_denoiser", X[None], np.ones((1, 3)), np.zeros(1)),
            "weight must be positive",
        ),
        (with_denoiser("guide", X, X, sign=0), "sign must be 1 or -1, got 0"),
        (with_denoiser("guide", X, X, omega=-1.5), "omega"),
        (with_denoiser("guide", X, NAN), "after must be finite"),
        (lambda s: diffusion.clip_denoiser(groups(), s, -1.0), "limit must be in"),
        (call("fit_normalizer", X), "x must have shape"),
        (call("fit_normalizer", NAN[None]), "x must be finite"),
        (call("fit_normalizer", X[None], weight=-np.ones(1)), "weight"),
        (call("fit_normalizer", X[None], scale="layer"), "scale must be one of"),
        (call("fit_normalizer", X[None], floor=0.0), "floor must be > 0"),
        (call("fit_basis", np.ones((4, 3)), 4), r"rank must be in \[1, 3\], got 4"),
        (call("fit_basis", np.ones((4, 3)), 0), "rank must be in"),
        (call("fit_basis", NAN[None], 1), "x must be finite"),
        (call("to_tokens", X, 0), "width must be >= 1"),
        (call("from_tokens", np.ones((2, 3)), 7), r"size must be in \[4, 6\]"),
        (call("from_tokens", np.ones((2, 3)), 3), r"size must be in \[4, 6\]"),
        (with_schedule("shrinkage_factor", -1.0, 5), "variance must be in"),
        (with_schedule("shrinkage_factor", 1.0, 0), "depth must be in"),
    ],
)
def test_bad_input_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad(diffusion.linear_schedule(100))


def test_bad_parameters_of_a_basis_are_refused():
    basis = fit_basis(uploads(), 3)
    other = fit_basis(uploads(), 2)
    for bad, message in [
        (lambda: align(basis, other), "previous must have shape"),
        (lambda: diffusion.encode(basis, X), "directions must have shape"),
        (lambda: diffusion.decode(basis, X[:2]), "directions must have shape"),
        (lambda: diffusion.shrink(basis, uploads()[0], 1.0, rho=1.5), "rho must be in"),
        (lambda: diffusion.shrink(basis, uploads()[0], np.ones(2)), "directions must"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize(
    ("depth", "gamma", "eta", "same_as"),
    [
        (10**6, 0.6, 0.5, (1000, 0.6, 0.5)),
        (-3, 0.6, 0.5, (8, 0.6, 0.5)),
        (200, 7.0, -1.0, (200, 1.0, 0.0)),
        (200, -1.0, 9.0, (200, 0.0, 1.0)),
        (200, np.nan, np.nan, (200, 0.0, 0.0)),
        (200, np.inf, 0.5, (200, 1.0, 0.5)),
    ],
)
def test_numbers_out_of_range_move_to_its_end_under_jit(
    jitted, depth, gamma, eta, same_as
):
    x = jnp.array(X)
    close(jitted(x, KEY, depth, gamma, eta), jitted(x, KEY, *same_as), 1e-12)


def test_coordinates_that_are_not_finite_count_as_zero_under_jit(jitted):
    bad = jnp.array([np.nan, 0.3, np.inf])
    close(jitted(bad, KEY), jitted(jnp.array([0, 0.3, 0]), KEY), 0)


def test_rows_that_are_not_finite_are_left_out_under_jit():
    x = uploads()
    x[4, 7] = np.nan
    kept = np.delete(x, 4, axis=0)
    close(jax.jit(diffusion.fit_normalizer)(x).scale, fit_normalizer(kept).scale)
    fit = jax.jit(diffusion.fit_basis, static_argnums=1)
    close(fit(x, 3).cov, fit_basis(kept, 3).cov)
    weight = np.ones(12)
    weight[4], weight[5] = np.nan, -2
    fewer = fit_basis(np.delete(kept, 4, axis=0), 3)
    close(fit(x, 3, weight=weight).cov, fewer.cov)
    nothing = fit(np.full_like(x, np.nan), 3)
    for leaf in jax.tree.leaves(nothing):
        close(leaf, np.zeros(leaf.shape), 0)


def test_closed_forms_stay_finite_under_jit():
    schedule = linear()

    @jax.jit
    def predicted(mean, variance, cov, weight, omega):
        mixture = diffusion.mixture_denoiser(schedule, mean, variance, weight)
        denoise = diffusion.gaussian_denoiser(schedule, mean[0], cov)
        guided = diffusion.guide(denoise, schedule, mean[0], mean[1], omega=omega)
        return mixture(X, 100), denoise(X, 100), guided(X, 100)

    mean = jnp.array([X, NAN])
    outputs = predicted(mean, -jnp.ones((2, 3)), -jnp.eye(3), jnp.zeros(2), -4.0)
    chosen = predicted(
        jnp.nan_to_num(mean), jnp.zeros((2, 3)), jnp.zeros((3, 3)), jnp.ones(2), -1.0
    )
    jax.tree.map(close, outputs, chosen)
    assert all(jnp.isfinite(eps).all() for eps in outputs)
    loss = jax.jit(
        lambda mask: simple_loss(groups(), schedule, X[None], key=KEY, mask=mask)
    )
    close(loss(jnp.zeros(3)), 0, 0)
