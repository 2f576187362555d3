"""From flags to data: what of the sources ends up in the pool."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest

from fedgen.data import sources
from fedgen.runs import build
from fedgen.runs.config import Config

CONFIG = Config(num_clients=4, partition="iid", samples=200)


def test_samples_are_drawn_by_chance_and_keep_their_labels():
    source = sources.load(CONFIG.dataset)
    known = {x.tobytes(): y for x, y in zip(source.x, source.y, strict=True)}
    pools = []
    for seed in (0, 0, 1):
        pool = build.build(dataclasses.replace(CONFIG, seed=seed)).federation.pool
        x, y = np.asarray(pool.x), np.asarray(pool.y)
        assert len(x) == len(y) == 200
        assert all(known[a.tobytes()] == b for a, b in zip(x, y, strict=True))
        assert len(set(y.tolist())) == 10
        pools.append(x)
    assert np.array_equal(pools[0], pools[1])
    assert not np.array_equal(pools[0], pools[2])


@pytest.mark.parametrize("kind", ["dirichlet", "mixture"])
def test_clients_can_draw_more_samples_than_there_are(kind):
    config = dataclasses.replace(
        CONFIG,
        partition=kind,
        samples=1000,
        samples_per_client=300,
        num_clients=3,
        new_clients=2,
    )
    setup = build.build(config)
    roles = [set(), set(), set()]
    drawn = 0
    for federation in (setup.federation, setup.newcomers):
        assert len(federation.pool.y) == 1000
        (cohort,) = federation.cohorts
        parts = (cohort.train, cohort.validation, cohort.test)
        for role, rows in zip(roles, parts, strict=True):
            for start, size in zip(*map(np.asarray, rows), strict=True):
                role.update(np.asarray(cohort.order)[start : start + size].tolist())
                drawn += size
    assert drawn == 5 * 300
    for a, b in itertools.combinations(roles, 2):
        assert not a & b
    (cohort,) = setup.federation.cohorts
    by_id = np.argsort(cohort.ids)[-3:]
    np.testing.assert_array_equal(
        setup.counts.sum(axis=1), np.asarray(cohort.train.size)[by_id]
    )


def test_more_samples_than_there_are_is_refused():
    total = len(sources.load(CONFIG.dataset).y)
    with pytest.raises(ValueError, match=f"samples must be at most the {total} of "):
        build.build(dataclasses.replace(CONFIG, samples=total + 1))


def test_the_learning_rate_decays_by_round():
    params = {"w": np.array([1.0, -2.0], np.float32)}

    def updates(decay, round_):
        config = dataclasses.replace(CONFIG, learning_rate_decay=decay)
        optimizer = optax.with_extra_args_support(build.local_training(config)[0])
        state = optimizer.init(params)
        return optimizer.update(params, state, params, round=round_)[0]["w"]

    constant = updates(1.0, 3)
    np.testing.assert_array_equal(updates(0.9, 0), constant)
    np.testing.assert_allclose(updates(0.9, 3), 0.9**3 * constant, rtol=1e-6)
    swept = jax.jit(jax.vmap(updates, (0, None)))(np.float32([1.0, 0.9]), 3)
    np.testing.assert_allclose(swept[0], constant, rtol=1e-6)
    np.testing.assert_allclose(swept[1], 0.9**3 * constant, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "own", "least"),
    [
        ("fedgmi", {"pretrain_rounds": "3", "guided_rounds": "2"}, 6),
        ("fedgmi", {"num_components": "1"}, 1),
        ("pfedgpa", {"warmup": "4"}, 5),
    ],
)
def test_a_run_outlasts_what_comes_before_the_algorithm(name, own, least):
    config = dataclasses.replace(
        CONFIG, algorithm=name, hyperparameters=own, rounds=least
    )
    build.build_algorithm(config, name)
    short = dataclasses.replace(config, rounds=least - 1)
    with pytest.raises(ValueError, match=f"at least {least} for {name}.* {least - 1}"):
        build.build_algorithm(short, name)
