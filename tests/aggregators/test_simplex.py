"""Proportions from geometry: exact corners, offsets, noise, what does not exist."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.aggregators import mixture, simplex

purest = jax.jit(simplex.purest_clients, static_argnums=1)
estimate = jax.jit(simplex.proportions, static_argnums=1)
N, K = 40, 4


def draw(seed, *, n=N, noise=0.0, corners=False):
    """Draw proportions and their cross-density matrix, two components much alike."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(K), n)
    if corners:
        share[[3, 11, 20, 31]] = np.eye(K)
    distance = 30.0 * (1 - np.eye(K))
    distance[0, 1] = distance[1, 0] = 6.0
    cross = -share @ distance @ share.T
    cross += 9 * rng.normal(size=(n, 1)) + 5 * rng.normal(size=(1, n)) - 300
    return jnp.asarray(cross + noise * rng.normal(size=(n, n)), jnp.float32), share


def error(found, share):
    share = jnp.asarray(share, found.dtype)
    order = mixture.match_proportions(found, share)
    return float(jnp.mean(mixture.total_variation(found[:, order], share)))


@pytest.mark.parametrize("seed", range(2))
def test_pure_clients_are_the_corners(seed):
    cross, share = draw(seed, corners=True)
    seeds = purest(cross, K)
    assert sorted(seeds.tolist()) == [3, 11, 20, 31]
    found = estimate(cross, K)
    # Components come in the order of their corners.
    np.testing.assert_allclose(found[seeds], np.eye(K), atol=0.02)
    assert error(found, share) < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_nobody_need_be_pure(seed):
    cross, share = draw(seed)
    found = estimate(cross, K)
    # What is left is that few clients lie on the facets, and it is not noise.
    assert error(found, share) < 0.07
    assert error(estimate(draw(seed, noise=0.2)[0], K), share) < 0.08
    # Corners at clients, none of which is pure, are further off.
    corners = share[np.asarray(purest(cross, K))]
    assert error(jnp.asarray(share @ np.linalg.inv(corners)), share) > 0.09


def test_many_clients_touch_the_facets():
    cross, share = draw(0, n=400)
    assert error(estimate(cross[:, :N], K), share) < 0.02


def test_it_is_the_smallest_simplex():
    cross, share = draw(0)
    found = np.asarray(estimate(cross, K), np.float64)
    # Found coordinates are an affine image of the true ones, which lie in a simplex
    # too; volumes are in the ratio of the determinant.
    image, residual, *_ = np.linalg.lstsq(share, found, rcond=None)
    assert np.sum(residual) < 1e-2
    assert np.linalg.det(image) ** 2 > 1


def test_two_alike_components_do_not_mislead():
    cross, share = draw(1)
    seeds = np.asarray(purest(cross, K))
    assert len(set(share[seeds].argmax(axis=1))) == K
    pairs = np.asarray(mixture.farthest_first(cross, K))
    assert share[seeds].max(axis=1).min() >= share[pairs].max(axis=1).min()


def test_some_models_are_enough():
    cross, share = draw(0)
    np.testing.assert_allclose(
        estimate(cross[:, ::5], K), estimate(cross, K), atol=5e-3
    )


def test_two_components_are_the_ends_of_a_line():
    share = jnp.array([0.2, 1.0, 0.7, 0.0, 0.45])
    cross = jnp.stack([10 * share, -25 * share, 3 * share], axis=1) - 80
    assert sorted(purest(cross, 2).tolist()) == [1, 3]
    found = estimate(cross, 2)
    assert error(found, jnp.stack([share, 1 - share], axis=1)) < 2e-3


def test_one_component_is_all_there_is():
    cross, _ = draw(0)
    np.testing.assert_array_equal(estimate(cross, 1), np.ones((N, 1)))


def test_difficult_clients_and_bad_models_change_nothing():
    cross, _ = draw(2)
    rng = np.random.default_rng(0)
    moved = cross + 20 * rng.normal(size=(N, 1)) + 20 * rng.normal(size=(1, N))
    moved = jnp.asarray(moved, jnp.float32)
    np.testing.assert_array_equal(purest(moved, K), purest(cross, K))
    np.testing.assert_allclose(estimate(moved, K), estimate(cross, K), atol=5e-3)


def test_clients_that_do_not_exist():
    cross, _ = draw(3)
    mask = np.arange(N) % 7 != 0
    real = np.flatnonzero(mask)
    dirty = jnp.where(mask[:, None] & mask[None], cross, jnp.nan)
    seeds = purest(dirty, K, mask=mask)
    expected = cross[real][:, real]
    np.testing.assert_array_equal(seeds, real[np.asarray(purest(expected, K))])
    found = estimate(dirty, K, mask=mask)
    np.testing.assert_allclose(found[real], estimate(expected, K), atol=5e-3)
    np.testing.assert_array_equal(found[~mask], np.full((N - real.size, K), 1 / K))


def test_precision_and_vmap():
    crosses = [draw(seed)[0] for seed in (0, 1)]
    stacked = jnp.stack(crosses)
    both = jax.vmap(functools.partial(simplex.proportions, num_components=K))(stacked)
    assert both.dtype == jnp.float32
    for found, cross in zip(both, crosses, strict=True):
        np.testing.assert_allclose(found, estimate(cross, K), atol=5e-3)
    with jax.enable_x64(True):
        exact = simplex.proportions(np.asarray(crosses[0], np.float64), K)
        assert exact.dtype == jnp.float64
    np.testing.assert_allclose(both[0], exact, atol=0.02)


def features(seed, *, k=3, d=6, n=30, size=400, corners=True):
    """Draw mean features of clients that mix `k` normal distributions of one shape."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(k), n)
    if corners:
        share[:k] = np.eye(k)
    root = rng.normal(size=(d, d)) + 2 * np.eye(d)
    centre = 4 * rng.normal(size=(k, d))
    mean, cov = np.zeros((n, d)), np.zeros((d, d))
    for i in range(n):
        own = np.repeat(np.arange(k), np.round(size * share[i]).astype(int))
        x = centre[own] + rng.normal(size=(len(own), d)) @ root
        mean[i], share[i] = x.mean(0), np.bincount(own, minlength=k) / len(own)
        cov += np.cov(x.T) / n
    return jnp.float32(mean), jnp.float32(cov), share, centre, root.T @ root


unmix = jax.jit(simplex.unmix, static_argnums=2)


@pytest.mark.parametrize("seed", range(3))
def test_components_are_found_from_mean_features(seed):
    mean, cov, share, centre, within = features(seed)
    found = unmix(mean, cov, 3)
    order = mixture.match_proportions(found.proportions, jnp.float32(share))
    assert error(found.proportions, share) < 0.03
    scale = np.sqrt(np.trace(within) / 6)
    np.testing.assert_allclose(found.mean[order], centre, atol=0.35 * scale)
    # The covariance within a client is much larger than that within a component.
    gap = [np.linalg.norm(c - within) for c in (np.asarray(found.cov), np.asarray(cov))]
    assert gap[0] < 0.4 * gap[1]
    np.testing.assert_allclose(found.cov, found.cov.T, rtol=1e-4, atol=1e-4)
    assert np.linalg.eigvalsh(found.cov)[0] > 0


def test_units_of_features_change_nothing():
    mean, cov, share, *_ = features(0)
    rng = np.random.default_rng(1)
    turn = rng.normal(size=(6, 6)) + 3 * np.eye(6)
    shift = rng.normal(size=(1, 6))
    before = unmix(mean, cov, 3)
    after = unmix(jnp.float32(mean @ turn + shift), jnp.float32(turn.T @ cov @ turn), 3)
    # Up to the shrinkage, which knows units.
    assert (
        abs(error(before.proportions, share) - error(after.proportions, share)) < 0.01
    )
    order = mixture.match_proportions(after.proportions, before.proportions)
    np.testing.assert_allclose(
        after.mean[order], before.mean @ turn + shift, atol=0.15 * np.std(mean @ turn)
    )


def test_as_many_features_as_clients_are_no_cross_density_matrix():
    mean, cov, share, *_ = features(2, n=12, d=12)
    mask = np.arange(12) < 11  # the last feature does not go with the last client
    found = unmix(mean, cov, 3, mask=mask)
    assert error(found.proportions[:11], share[:11]) < 0.05
    np.testing.assert_allclose(found.proportions[11], 1 / 3, rtol=1e-5)
    with_nan = unmix(mean.at[11].set(jnp.nan), cov, 3, mask=mask)
    np.testing.assert_allclose(with_nan.proportions, found.proportions, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_number_of_components_stands_out_of_the_noise(k):
    rng = np.random.default_rng(k)
    estimate_k = jax.jit(simplex.estimate_num_components)
    for seed in range(3):
        mean, cov, *_ = features(10 * k + seed, k=k, d=20)
        found, values = estimate_k(mean, cov, jnp.full(30, 400.0))
        assert int(found) == k
        assert np.all(np.asarray(values[k - 1 :]) <= 1)
    # Absent clients add nothing, whatever is said of them.
    mean = mean.at[5].set(jnp.float32(100 * rng.normal(size=20)))
    for mask, count in ((np.arange(30) != 5, 400.0), (None, 0.0)):
        count = jnp.full(30, 400.0).at[5].set(count)
        assert int(estimate_k(mean, cov, count, mask=mask)[0]) == k


@pytest.mark.parametrize("size", [5, 20, 100])
def test_noise_alone_is_one_component(size):
    # Once in a hundred times it may seem more. The covariance is estimated, too.
    n, d = 40, 30

    def largest(key):
        x = jax.random.normal(key, (n, size, d))
        mean = jnp.mean(x, axis=1)
        apart = (x - mean[:, None]).reshape(-1, d)
        cov = apart.T @ apart / (n * (size - 1))
        return simplex.estimate_num_components(
            mean, cov, jnp.full(n, size), shrinkage=0.0
        )[1][0]

    found = jax.jit(jax.vmap(largest))(jax.random.split(jax.random.key(0), 200))
    assert np.mean(np.asarray(found) > 1) < 0.02
    # The bound is not idle either.
    assert np.max(found) > 0.6


def test_too_few_samples_tell_nothing():
    mean = jax.random.normal(jax.random.key(0), (6, 30))
    k, _ = simplex.estimate_num_components(mean, jnp.eye(30), jnp.full(6, 3.0))
    assert int(k) == 1


def test_nonsense_features_stay_finite():
    for mean, cov in (
        (jnp.full((5, 4), jnp.nan), jnp.eye(4)),
        (jnp.ones((5, 4)), jnp.zeros((4, 4))),
        (jnp.full((5, 4), 1e38), jnp.full((4, 4), jnp.nan)),
    ):
        found = unmix(mean, cov, 3)
        assert all(np.all(np.isfinite(leaf)) for leaf in found)
        np.testing.assert_allclose(found.proportions.sum(axis=1), 1, rtol=1e-5)
        k, _ = jax.jit(simplex.estimate_num_components)(mean, cov, jnp.ones(5))
        assert int(k) >= 1


def test_nonsense_stays_finite():
    for bad in (jnp.nan, jnp.inf, 0.0):
        cross = jnp.full((5, 5), bad)
        found = estimate(cross, 3)
        assert np.all(np.isfinite(found))
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
        assert len(set(purest(cross, 3).tolist())) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simplex.proportions(jnp.eye(3), 4), "from 1 to 3.*got 4"),
        (lambda: simplex.purest_clients(jnp.eye(3), 0), "from 1 to 3.*got 0"),
        (lambda: simplex.proportions(jnp.ones((4, 2)), 3), "from 1 to 2.*got 3"),
        (
            lambda: simplex.purest_clients(
                jnp.eye(3), 3, mask=np.array([True, True, False])
            ),
            "from 1 to 2.*got 3",
        ),
        (lambda: simplex.proportions(jnp.ones(3), 1), "cross_density"),
        (lambda: simplex.proportions(jnp.full((3, 3), jnp.nan), 2), "finite"),
        (lambda: simplex.proportions(jnp.eye(3), 2, penalty=0.0), "penalty"),
        (
            lambda: simplex.unmix(jnp.eye(3), jnp.eye(3), 4),
            "from 1 to 3.*features, got",
        ),
        (lambda: simplex.unmix(jnp.eye(3), jnp.eye(2), 2), "cov must have shape"),
        (lambda: simplex.unmix(jnp.eye(3), -jnp.eye(3), 2), "cov must be positive"),
        (lambda: simplex.unmix(jnp.eye(3) / 0, jnp.eye(3), 2), "mean must be finite"),
        (
            lambda: simplex.unmix(jnp.eye(3), jnp.eye(3), 2, shrinkage=2.0),
            "rho must be <= 1",
        ),
        (
            lambda: simplex.estimate_num_components(
                jnp.eye(3), jnp.eye(3), jnp.array([1.0, -1.0, 2.0])
            ),
            "count must be >= 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
