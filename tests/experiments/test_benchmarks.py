"""Benchmarks at toy sizes: both sides agree, and every figure is there. No times."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import aggregators


@flagsaver.flagsaver
def test_it_prints_a_row_for_every_way(capsys):
    flags.FLAGS(["aggregators", "--smoke", "--clients=5", "--repeats=1", "--sample=3"])
    with jax.numpy_rank_promotion("allow"):
        aggregators.main(["aggregators"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0].split(",")[0] for row in rows if row[0]] == [
        "`gaussian.fuse_mean`",
        "`gaussian.fuse`",
        "`mixture.fit_proportions` and `responsibilities`",
        "`diffusion.invert` and `generate`",
    ]
    for _, way, seconds, ratio, memory, compiling in rows:
        assert float(seconds.split()[0]) > 0 and float(ratio.split()[0]) > 0
        assert float(memory) > 0
        assert bool(compiling) == way.startswith("fedgen")


def toy(wrong: float = 0.0) -> aggregators.Case:
    return aggregators.Case(
        "doubling",
        (np.float32(2), np.arange(20, dtype=np.float32).reshape(10, 2)),
        (False, True),
        {"ours": lambda two, x: (two * x,)},
        {"loop": lambda two, x: (two * x + wrong,)},
        1e-3,
    )


def test_a_loop_over_some_clients_counts_for_all():
    ours, loop = aggregators.measure(toy(), 2, 4)
    assert (ours.way, loop.way) == ("ours", "loop")
    assert ours.ratio == [1, 1]
    np.testing.assert_allclose(loop.ratio, np.divide(loop.seconds, ours.seconds))
    # Twice 2 of 10 numbers a client, and nothing else to speak of.
    assert ours.bytes == 10 * 2 * 4
    assert 10 * 2 * 4 <= loop.bytes < 10 * 2 * 4 + 4000
    assert loop.compile_seconds is None and math.isfinite(ours.compile_seconds)


def test_sides_that_disagree_are_refused():
    with pytest.raises(AssertionError, match="loop"):
        aggregators.measure(toy(wrong=0.1), 1, 4)
