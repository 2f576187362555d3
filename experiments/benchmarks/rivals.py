"""fedgen beside other simulators, on the same minibatches from the same weights.

    python -m experiments.benchmarks.rivals --workloads=W2 --rivals=all --rounds=6

Every rival lives in a virtual environment of its own, which is made from the package
registry where it is missing, and runs `adapters/run_*.py` in a process of its own. In
each repetition every rival runs once, one after another, so that a busy machine slows
down all of them; believe ratios rather than seconds.

Of a process the first round counts as compilation, as far as it is longer than the
median of the others, which is one measurement. The table has the median over
repetitions and their range. Memory is the proportional set size of all processes of a
rival, sampled. The peak is the highest rate of a float32 matrix product, of any
library, before or after.

With an accelerator fedgen, plain JAX and plain PyTorch compute there, one at a time;
the harness itself and the other rivals stay on the CPU. Memory is then the
accelerator's, as the library counts it, in the first process. Where nothing can be
installed, `--venvs=` runs all rivals in this environment.

All do the same arithmetic, in another order: the check compares the accuracy on samples
that nobody trains on with that of the plain loop in JAX, and fails beyond 0.3 points.
The column `drift` compares the weights themselves, whose rounding training amplifies.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import processes, workloads
from experiments.benchmarks.adapters import common, jax_nets
from experiments.benchmarks.processes import Params, Run
from experiments.benchmarks.workloads import Problem, Workload
from fedgen.core.federation import normalise

FLAGS = flags.FLAGS
REFERENCE = "jax"  # whose accuracy the others must have
POINTS = 0.3


def define_flags() -> None:
    """Define the flags of the command line."""
    flags.DEFINE_list("workloads", ["W2"], f"Out of {', '.join(workloads.WORKLOADS)}.")
    flags.DEFINE_list(
        "rivals", ["all"], f"all, or out of {', '.join(processes.RIVALS)}."
    )
    flags.DEFINE_integer("rounds", 6, "Rounds of a process.", lower_bound=2)
    flags.DEFINE_integer("repeats", 3, "Processes of every rival.", lower_bound=1)
    flags.DEFINE_integer(
        "clients", 0, "If above 0, only so many of a workload's clients exist."
    )
    flags.DEFINE_list(
        "subset",
        [],
        "rival=clients for rivals that are too slow: they run on so many clients, and "
        "their times are scaled.",
    )
    flags.DEFINE_integer("chunk", 0, "fedgen's clients at once; 0: what it chooses.")
    processes.define_precision()
    flags.DEFINE_float(
        "peak", 0, "GFLOP/s of a matrix product if known; 0 measures it.", lower_bound=0
    )
    flags.DEFINE_integer("timeout", 900, "Seconds that a process may take.")
    flags.DEFINE_string("data_dir", None, "Folder of TFDS data sets.")
    flags.DEFINE_string(
        "venvs",
        str(pathlib.Path("~/.cache/fedgen/rivals").expanduser()),
        "Folder of the rivals' environments; empty to run them in this one.",
    )
    flags.DEFINE_string("json", None, "File that gets all measurements.")


# How it is measured.


class Cell(NamedTuple):
    """All of one rival on one workload.

    Attributes:
      rival: Its name.
      seconds: Of a round, per repetition, scaled to all clients.
      start: Seconds until the first round, per repetition.
      compile: Seconds that the first round took longer, per repetition.
      peak_bytes: Most memory of any repetition.
      accuracy: After the last round.
      drift: How far its weights are from the reference's, relative to the way that
        those came; None without a reference.
      versions: Of its packages.
      present: How many clients it was given, 0 for all of them.
      scaled: By how much its times were multiplied to stand for all.
      error: Why there is nothing.
    """

    rival: str
    seconds: tuple[float, ...] = ()
    start: tuple[float, ...] = ()
    compile: tuple[float, ...] = ()
    peak_bytes: int = 0
    accuracy: float | None = None
    drift: float | None = None
    versions: dict[str, str] | None = None
    present: int = 0
    scaled: float = 1.0
    error: str = ""


def score(workload: Workload, problem: Problem, params: dict[str, Any]) -> float:
    """Return the accuracy on the samples kept for the test, in percent."""
    x, y = (np.asarray(array)[problem.test] for array in problem.federation.pool)

    @jax.jit
    def hits(params, x, y):
        logits = jax_nets.forward(workload.model, params, normalise(x))
        return jnp.sum(jnp.argmax(logits, -1) == y)

    parts = range(0, len(y), 500)
    right = sum(int(hits(params, x[i : i + 500], y[i : i + 500])) for i in parts)
    return 100 * right / len(y)


def drift(params: Params, reference: Params, start: Params) -> float:
    """Return how far weights are from the reference's, by the way those came."""

    def distance(a, b):
        parts = [np.sum((a[k].astype(float) - b[k]) ** 2) for k in reference]
        return math.sqrt(sum(parts))

    way = distance(reference, start)
    return distance(params, reference) / way if way else math.nan


def measure(
    workload: Workload,
    problem: Problem,
    rivals: Sequence[str],
    pythons: dict[str, str],
    errors: dict[str, str],
    subset: dict[str, int],
) -> tuple[list[Cell], dict[int, float]]:
    """Run all rivals on a workload, by turns.

    Returns:
      Their cells, and the reference's accuracy by the number of clients present.
    """
    runs: dict[str, list[Run]] = {name: [] for name in rivals}
    with tempfile.TemporaryDirectory() as folder:
        problems, paths = {FLAGS.clients: problem}, {}
        for count in {subset.get(name, FLAGS.clients) for name in rivals}:
            if count not in problems:
                problems[count] = workloads.load(workload, FLAGS.data_dir, count)
            paths[count] = pathlib.Path(folder, f"{count}.npz")
            workloads.write(paths[count], problems[count], workload, FLAGS.rounds)
        for turn in range(FLAGS.repeats):
            # Nobody is always the first, or always after the same one.
            first = turn % len(rivals)
            for name in (*rivals[first:], *rivals[:first]):
                rival, count = processes.RIVALS[name], subset.get(name, FLAGS.clients)
                if error := errors.get(rival.venv) or (turn and runs[name][0].error):
                    runs[name].append(Run(error=error))
                    continue
                run = processes.run_once(
                    rival,
                    pythons[rival.venv],
                    paths[count],
                    FLAGS.timeout,
                    FLAGS.chunk if name == "fedgen" else 0,
                    FLAGS.precision,
                )
                runs[name].append(run)
                what = run.error or f"{statistics.median(run.rounds[1:]):.4g} s a round"
                print(f"{turn + 1}/{FLAGS.repeats} {name}: {what}", file=sys.stderr)
        # A subset has a reference of its own, which nobody times.
        points, references, starts = {}, {}, {}
        for count, path in paths.items():
            run = (
                runs[REFERENCE][-1]
                if count == FLAGS.clients
                else processes.run_once(
                    processes.RIVALS[REFERENCE],
                    sys.executable,
                    path,
                    FLAGS.timeout,
                    precision=FLAGS.precision,
                )
            )
            if not run.error:
                points[count] = score(workload, problem, run.params)
                references[count] = run.params
                with np.load(path) as arrays:
                    starts[count] = common.weights(arrays)
    everybody = workload.participants or workload.clients
    cells = []
    for name in rivals:
        present = subset.get(name, FLAGS.clients)
        cell = summarise(name, runs[name], present, everybody)
        if not cell.error:
            params = runs[name][-1].params
            cell = cell._replace(accuracy=score(workload, problem, params))
            if present in references:
                off = drift(params, references[present], starts[present])
                cell = cell._replace(drift=off)
        cells.append(cell)
    return cells, points


def summarise(name: str, runs: Sequence[Run], present: int, everybody: int) -> Cell:
    """Turn the runs of a rival into a cell, but for what its weights are worth.

    Args:
      name: The rival.
      runs: One for each repetition.
      present: How many clients it was given, 0 for all of the workload.
      everybody: How many take part in a round.
    """
    if error := next((run.error for run in runs if run.error), ""):
        return Cell(name, error=error)
    seconds = [statistics.median(run.rounds[1:]) for run in runs]
    factor = everybody / min(present or everybody, everybody)
    return Cell(
        name,
        tuple(s * factor for s in seconds),
        tuple(run.start for run in runs),
        tuple(
            max(0.0, run.rounds[0] - s) for run, s in zip(runs, seconds, strict=True)
        ),
        max(run.peak_bytes for run in runs),
        versions=runs[-1].versions,
        present=present,
        scaled=factor,
    )


# What is printed.


def to_markdown(
    cells: Sequence[Cell], round_flops: float, steps: int, peak: float, points: dict
) -> str:
    """Write the table of a workload.

    Args:
      cells: First that of fedgen, to which ratios are.
      round_flops: Arithmetic of a round.
      steps: Local steps of all clients of a round.
      peak: Highest GFLOP/s of a matrix product.
      points: Accuracy of the reference, by the number of clients present.
    """
    lines = [
        "| simulator | s a round | times fedgen's | steps/s | GFLOP/s | of peak | "
        "MiB | accuracy, % | drift | start, s | compile, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        label = processes.RIVALS[cell.rival].label
        if cell.error:
            lines.append(f"| {label} | {cell.error} |" + " |" * 9)
            continue
        middle = statistics.median(cell.seconds)
        rate = round_flops / middle / 1e9
        if cell.scaled > 1:
            label += f" (SCALED from {cell.present} clients)"
        columns = [
            label,
            spread(cell.seconds),
            _versus(cell, cells[0]),
            f"{steps / middle:,.0f}",
            f"{rate:,.0f}",
            f"{100 * rate / peak:.0f} %",
            f"{cell.peak_bytes / 2**20:,.0f}",
            _accuracy(cell, points),
            "" if cell.drift is None else f"{cell.drift:.0e}",
            f"{statistics.median(cell.start):.1f}",
            f"{statistics.median(cell.compile):.1f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def ratios(cell: Cell, other: Cell) -> list[float]:
    """Divide the seconds of each repetition by those of another rival."""
    return [a / b for a, b in zip(cell.seconds, other.seconds, strict=True)]


def _versus(cell: Cell, fedgen: Cell) -> str:
    if fedgen.error:
        return ""
    each = ratios(cell, fedgen)
    return spread(each) + (" **wins**" if statistics.median(each) < 1 else "")


def _accuracy(cell: Cell, points: dict[int, float]) -> str:
    if cell.present not in points:
        return f"{cell.accuracy:.2f}, no reference"
    return f"{cell.accuracy:.2f} {'**differs**' if _differs(cell, points) else 'ok'}"


def _differs(cell: Cell, points: dict[int, float]) -> bool:
    reference = points.get(cell.present, cell.accuracy)
    return not cell.error and abs(cell.accuracy - reference) > POINTS


def spread(values: Sequence[float]) -> str:
    """Write the median and the range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    subset = {k: int(v) for k, _, v in (x.partition("=") for x in FLAGS.subset)}
    chosen = processes.all_rivals() if FLAGS.rivals == ["all"] else FLAGS.rivals
    chosen = list(dict.fromkeys(["fedgen", REFERENCE, *chosen]))
    for name, known in (
        *((name, processes.RIVALS) for name in (*chosen, *subset)),
        *((name, workloads.WORKLOADS) for name in FLAGS.workloads),
    ):
        if name not in known:
            raise app.UsageError(f"unknown {name!r}, known: {', '.join(known)}")
    jax.config.update("jax_platforms", "cpu")  # an accelerator is left to the rivals
    venvs = {processes.RIVALS[name].venv for name in chosen}
    folder = pathlib.Path(FLAGS.venvs) if FLAGS.venvs else None
    found = {venv: processes.install(venv, folder) for venv in venvs}
    pythons, errors = ({v: pair[i] for v, pair in found.items()} for i in (0, 1))

    everything = {**processes.describe_machine("rivals"), "workloads": {}}
    print(json.dumps(everything, indent=1), file=sys.stderr)
    differ = []
    after = FLAGS.peak or processes.measure_peak(pythons, FLAGS.precision)
    for name in FLAGS.workloads:
        workload = workloads.WORKLOADS[name]
        problem = workloads.load(workload, FLAGS.data_dir, FLAGS.clients)
        cells, points = measure(workload, problem, chosen, pythons, errors, subset)
        before = after
        with contextlib.suppress(subprocess.SubprocessError):
            after = FLAGS.peak or processes.measure_peak(pythons, FLAGS.precision)
        peak = max(before, after)
        flops = workloads.round_flops(workload, problem)
        steps = (workload.participants or workload.clients) * workload.steps
        print(
            f"\n{name}: {workload}\n{flops / 1e9:,.1f} GFLOP a round, peak {peak:.0f}"
        )
        print(to_markdown(cells, flops, steps, peak, points), flush=True)
        everything["workloads"][name] = {
            "definition": workload._asdict(),
            "round_flops": flops,
            "peak_gflops": peak,
            "cells": [cell._asdict() for cell in cells],
        }
        if FLAGS.json:
            pathlib.Path(FLAGS.json).write_text(json.dumps(everything, indent=1))
        differ += [cell.rival for cell in cells if _differs(cell, points)]
    if differ:
        sys.exit(f"other accuracies than the reference: {', '.join(differ)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
