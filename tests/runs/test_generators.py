"""Generators against Gaussians, whose densities and distances are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from fedgen.runs import generators

MEANS = np.array([[-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])


def draw(rng, size, components=(0, 1)):
    """Draw as many samples of each component, one component after the other."""
    return np.concatenate([rng.normal(MEANS[k], 1.0, (size, 3)) for k in components])


def log_density(x):
    return np.stack([stats.multivariate_normal(mean).logpdf(x) for mean in MEANS], 1)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    fresh = np.stack([draw(rng, 400, [k]) for k in (0, 1)])
    return fresh, draw(rng, 500), draw(rng, 300)


def test_densities_are_those_of_the_components(data):
    fresh, train, held_out = data
    report = generators.density_report(log_density, fresh, train, held_out)
    exact = log_density(held_out)
    np.testing.assert_allclose(report.log_density, exact.mean(0))
    np.testing.assert_allclose(report.train_log_density, log_density(train).mean(0))
    np.testing.assert_allclose(report.best, exact.max(1).mean())
    # One half of the samples each; of its own half a component has minus the entropy,
    # of the other half the squared distance of the means, 16, halved, less.
    entropy = 1.5 * np.log(2 * np.pi * np.e)
    np.testing.assert_allclose(report.log_density, -entropy - 4, atol=0.3)
    np.testing.assert_allclose(report.share, 0.5, atol=0.05)


def test_as_good_as_the_data_is_no_copying(data):
    report = generators.density_report(log_density, *data)
    np.testing.assert_allclose(report.copying, 0.5, atol=0.06)
    np.testing.assert_allclose(report.ratio, 1, atol=0.15)


def test_a_component_is_compared_with_what_it_explains():
    # Two components of very different width: near and far from the training samples.
    rng = np.random.default_rng(3)
    means, width = np.array([[-9.0] * 3, [9.0] * 3]), (0.1, 2.0)

    def both(size):
        return [rng.normal(m, w, (size, 3)) for m, w in zip(means, width, strict=True)]

    def densities(x):
        return np.stack(
            [
                stats.multivariate_normal(m, w**2).logpdf(x)
                for m, w in zip(means, width, strict=True)
            ],
            1,
        )

    fresh, train = np.stack(both(400)), np.concatenate(both(500))
    held_out = both(300)
    report = generators.density_report(
        densities, fresh, train, np.concatenate(held_out)
    )
    np.testing.assert_allclose(report.copying, 0.5, atol=0.06)
    np.testing.assert_allclose(report.ratio, 1, atol=0.15)

    report = generators.density_report(densities, fresh, train, held_out[0])
    assert np.isnan(report.copying[1]) and np.isnan(report.ratio[1])
    summary = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert summary["copying"] == [report.copying[0], None]


def test_a_copier_is_found_out(data):
    fresh, train, held_out = data
    copies = np.stack([train[[7, 3, 90]], fresh[1][:3]])
    report = generators.density_report(log_density, copies, train, held_out)
    assert report.distance[0].tolist() == [0, 0, 0]
    assert report.nearest[0].tolist() == [7, 3, 90]
    assert report.ratio[0] == 0
    assert report.copying[0] == 1
    assert report.ratio[1] > 0 and report.copying[1] < 1


def test_what_is_far_from_everything_is_found_out(data):
    fresh, train, held_out = data
    report = generators.density_report(log_density, fresh + 50, train, held_out)
    assert np.all(report.copying == 0) and np.all(report.ratio > 20)


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_nearest_is_that_of_a_library(dtype):
    rng = np.random.default_rng(1)
    # More rows than are compared at once, and bytes that would wrap around.
    x = rng.uniform(0, 255, (300, 3, 2)).astype(dtype)
    train = rng.uniform(0, 255, (70, 3, 2)).astype(dtype)
    index, distance = generators.nearest(x, train)
    flat = [np.float64(a).reshape(len(a), -1) for a in (x, train)]
    by_library = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(flat[1])
    expected, which = by_library.kneighbors(flat[0])
    np.testing.assert_array_equal(index, which[:, 0])
    np.testing.assert_allclose(distance, expected[:, 0], rtol=1e-5)


def test_a_copy_far_from_the_origin_is_at_distance_0():
    train = 1e4 + np.random.default_rng(2).normal(size=(20, 50)).astype("float32")
    index, distance = generators.nearest(train[::-1], train)
    assert index.tolist() == list(range(20))[::-1]
    assert np.all(distance == 0)


def test_densities_are_asked_for_in_batches_of_one_size(data):
    fresh, train, held_out = data
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return log_density(x)

    report = generators.density_report(
        counted, fresh, train[:90], held_out[:41], batch_size=40
    )
    assert sizes == [40] * 5
    np.testing.assert_allclose(report.log_density, log_density(held_out[:41]).mean(0))


def test_the_summary_is_json(data):
    fresh, train, _ = data
    report = generators.density_report(log_density, fresh, train, train)
    assert np.all(np.isnan(report.ratio))
    summary = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert summary["ratio"] == [None, None]
    assert summary["best"] == report.best
    assert summary["share"] == report.share.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(samples=np.ones((2, 3))), r"samples must be a filled \[k, g, ...\]"),
        (dict(samples=np.ones((2, 0, 3))), "samples must be a filled"),
        (dict(train=np.ones((5, 4))), r"train must hold samples of shape \(3,\), got"),
        (dict(held_out=np.ones((0, 3))), "held_out must be a filled array"),
        (dict(held_out=np.full((2, 3), np.nan)), "held_out must be finite"),
        (dict(batch_size=0), "batch_size must be >= 1, got 0"),
        (dict(log_density=lambda x: np.ones((len(x), 3))), r"must return \(500, 2\)"),
        (dict(log_density=lambda x: np.full((len(x), 2), np.nan)), "NaN"),
    ],
)
def test_what_is_wrong_is_named(data, change, message):
    names = ("samples", "train", "held_out")
    arguments = {"log_density": log_density, **dict(zip(names, data, strict=True))}
    with pytest.raises(ValueError, match=message):
        generators.density_report(**(arguments | change))
