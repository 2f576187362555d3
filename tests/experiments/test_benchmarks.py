"""Benchmarks at toy sizes: both sides agree, and every figure is there. No times."""

from __future__ import annotations

import itertools
import json
import math

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import aggregators, sweep


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


def test_a_sweep_is_held_against_the_same_runs(tmp_path, monkeypatch):
    accuracies = iter((0.5, 0.6, 0.7, 0.8))

    def launch(module, *args):
        given = dict(arg.lstrip("-").split("=", 1) for arg in args)
        place = tmp_path / given["workdir"]
        place.mkdir()
        if module == "experiments.run":
            mean = {"personal_accuracy": {"mean": next(accuracies)}}
            (place / "summary.json").write_text(json.dumps(mean))
            return np.array([6.0, 9.0])
        assert given["seeds"] == "2" and given["grid"] == "learning_rate=0.1,1"
        found = ([0.5, 0.6], [0.7, 0.9])
        rows = [{"personal_accuracy": {"per_seed": each}} for each in found]
        (place / "sweep.json").write_text(json.dumps({"rows": rows}))
        return np.array([8.0, 9.0])

    monkeypatch.setattr(sweep, "launch", launch)
    alone, together, gap = sweep.measure([], ["0.1", "1"], 2, tmp_path)
    np.testing.assert_array_equal(alone.sum(axis=0) / together, [3, 4])
    np.testing.assert_allclose(gap, 0.1)
    folders = {f"{rate}-{seed}" for rate, seed in itertools.product(("0.1", "1"), "01")}
    assert {path.name for path in tmp_path.iterdir()} == {*folders, "sweep"}
