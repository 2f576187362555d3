"""From flags to data: what of the sources ends up in the pool."""

from __future__ import annotations

import dataclasses

import numpy as np
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


def test_more_samples_than_there_are_is_refused():
    total = len(sources.load(CONFIG.dataset).y)
    with pytest.raises(ValueError, match=f"samples must be at most the {total} of "):
        build.build(dataclasses.replace(CONFIG, samples=total + 1))
