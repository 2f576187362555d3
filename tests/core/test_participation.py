"""Who takes part: fixed counts, fair chances, no trace of the devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fedgen.core import participation
from fedgen.core.execution import make_mesh, place

DRAWS = 2000
KEYS = jax.vmap(jax.random.key)(jnp.arange(DRAWS))


@pytest.fixture(scope="module")
def federation(toy_federation):
    return toy_federation()


def draw(sampler, federation, keys=KEYS):
    """Draw for every key; participants' ids, mask and work of the first cohort."""

    @jax.jit
    @jax.vmap
    def sample(key):
        drawn = sampler(key, federation)[0]
        return federation.cohorts[0].ids[drawn.slot], drawn.mask, drawn.work

    return tuple(map(np.asarray, sample(keys)))


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.3, 3), (0.5, 4)])
def test_uniform_draws_distinct_real_clients(federation, fraction, count):
    ids, mask, work = draw(participation.uniform(fraction), federation)
    assert ids.shape == (DRAWS, count)
    assert mask.all()
    assert (work == 1).all()
    ordered = np.sort(ids, axis=1)
    assert (np.diff(ordered, axis=1) > 0).all()
    assert ids.min() == 0
    assert ids.max() == 8


def test_uniform_is_uniform(federation):
    ids, _, _ = draw(participation.uniform(0.34), federation)
    assert ids.shape[1] == 3
    assert scipy.stats.chisquare(np.bincount(ids.ravel())).pvalue > 1e-4
    # So are pairs: being drawn together is nobody's privilege.
    pairs = np.zeros((9, 9))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        np.add.at(pairs, (ids[:, a], ids[:, b]), 1)
    assert scipy.stats.chisquare(pairs[~np.eye(9, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize(("count", "total"), [(2, 33), (2, 32), (3, 5), (1, 40)])
def test_any_set_of_numbers_is_as_likely_as_any_other(count, total):
    keys = jax.vmap(jax.random.key)(jnp.arange(20_000))
    draw = jax.jit(jax.vmap(lambda key: participation.distinct(key, count, total)))
    drawn = np.sort(draw(keys), axis=1)
    assert drawn.min() == 0 and drawn.max() == total - 1
    assert (np.diff(drawn, axis=1) > 0).all()
    sets, times = np.unique(drawn, axis=0, return_counts=True)
    assert len(sets) == math.comb(total, count)
    assert scipy.stats.chisquare(times).pvalue > 1e-4


def test_few_of_many_are_drawn_by_id_wherever_they_lie(toy_federation):
    sizes = np.random.default_rng(0).integers(1, 9, 70)
    plain = toy_federation(sizes)
    placed = place(plain, make_mesh(2))
    sampler = participation.uniform(0.05)
    ids = draw(sampler, plain, KEYS[:50])[0]
    assert ids.shape == (50, 4)
    np.testing.assert_array_equal(draw(sampler, placed, KEYS[:50])[0], ids)


@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("unreliable", [False, True])
def test_the_draw_does_not_depend_on_the_devices(federation, fraction, unreliable):
    sampler = participation.uniform(fraction)
    if unreliable:
        sampler = participation.unreliable(sampler, dropout=0.3, stragglers=0.5)
    # Nine clients on two devices: dealt by size, and one place is padding.
    placed = place(federation, make_mesh(2))
    alone = draw(sampler, federation, KEYS[:5])
    shared = draw(sampler, placed, KEYS[:5])
    for a, b in zip(zip(*alone, strict=True), zip(*shared, strict=True), strict=True):
        tables = []
        for ids, mask, work in (a, b):
            assert not mask[ids < 0].any()
            tables.append({i: w for i, m, w in zip(ids, mask, work, strict=True) if m})
        assert tables[0] == tables[1]
        assert tables[0]


def test_full_draws_everybody(federation):
    ids, mask, work = draw(participation.full(), federation, KEYS[:1])
    assert sorted(ids[0]) == list(range(9))
    assert mask.all()
    assert (work == 1).all()


def test_cohorts_are_drawn_apart(toy_federation):
    federation = toy_federation((1,) * 16, models=2)
    for key in KEYS[:4]:
        first, second = participation.uniform(0.5)(key, federation)
        assert first.slot.shape == second.slot.shape == (4,)
    drawn = [participation.uniform(0.5)(key, federation) for key in KEYS[:8]]
    assert any(set(a.slot.tolist()) != set(b.slot.tolist()) for a, b in drawn)


def test_dropout_and_stragglers_have_their_chances(federation):
    sampler = participation.unreliable(
        participation.full(), dropout=0.2, stragglers=0.3
    )
    _, mask, work = draw(sampler, federation)
    total = mask.size
    late = work < 1
    assert scipy.stats.binomtest(int((~mask).sum()), total, 0.2).pvalue > 1e-4
    assert scipy.stats.binomtest(int(late.sum()), total, 0.3).pvalue > 1e-4
    # Dropping out and being late are independent; no client is luckier.
    both = int((late & ~mask).sum())
    assert scipy.stats.binomtest(both, total, 0.06).pvalue > 1e-4
    assert scipy.stats.chisquare((~mask).sum(0)).pvalue > 1e-4
    assert scipy.stats.kstest(work[late], "uniform").pvalue > 1e-4
    assert work.min() > 0


def test_a_clients_fate_does_not_depend_on_who_else_was_drawn(federation):
    fate = {"dropout": 0.4, "stragglers": 0.4}
    everybody = participation.unreliable(participation.full(), **fate)
    some = participation.unreliable(participation.uniform(0.5), **fate)
    all_ids, all_mask, all_work = draw(everybody, federation, KEYS[:20])
    ids, mask, work = draw(some, federation, KEYS[:20])
    order = np.argsort(all_ids, axis=1)
    at = np.take_along_axis(order, ids, axis=1)
    np.testing.assert_array_equal(mask, np.take_along_axis(all_mask, at, axis=1))
    np.testing.assert_array_equal(work, np.take_along_axis(all_work, at, axis=1))
    assert not mask.all()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_uniform_refuses(fraction):
    with pytest.raises(ValueError, match=r"participation must be in \(0, 1\], got"):
        participation.uniform(fraction)


@pytest.mark.parametrize("chance", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("name", ["dropout", "stragglers"])
def test_unreliable_refuses(name, chance):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got"):
        participation.unreliable(participation.full(), **{name: chance})
