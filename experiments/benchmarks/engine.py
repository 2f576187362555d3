"""fedgen's engine alone: rounds by model, clients and chunk, evaluation, start-up.

    python -m experiments.benchmarks.engine --models=mlp,cnn --clients=20,100

A round is timed with every chunk of `--chunks` that is not above the clients of a
device. The row of the chunk that the engine takes by itself says how much slower that
is than the best. The chunks take turns; seconds are medians, with their range.

On an accelerator a chunk of 1 is a loop over clients, `lax.map`, and the engine's own
trains all of them at once; a chunk that does not fit into memory is left out.

Start-up is that of processes which import, compile and train one round.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks import processes, rivals, workloads
from experiments.benchmarks.adapters import jax_nets
from experiments.benchmarks.workloads import Problem, Workload
from fedgen.core import evaluate, execution, rounds, simulate
from fedgen.core.execution import Execution

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of the command line."""
    flags.DEFINE_list(
        "models",
        ["mlp", "cnn", "small_cnn", "resnet8"],
        "Models, or FedGMI's vae, of which rounds alone are timed.",
    )
    flags.DEFINE_list("clients", ["100"], "Numbers of clients.")
    flags.DEFINE_list("chunks", ["1", "2", "5", "10", "25", "50"], "Chunks to try.")
    flags.DEFINE_integer("steps", 5, "Local steps of a round.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Samples of a step.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Timed rounds of a chunk.", lower_bound=1)
    flags.DEFINE_bool("evaluation", True, "Whether evaluations are timed, too.")
    flags.DEFINE_integer(
        "starts",
        3,
        "Timed start-ups of a model; 0 where this process holds all of an accelerator.",
        lower_bound=0,
    )
    processes.define_precision()
    flags.DEFINE_string("dataset", "fashion_mnist_mini", "Data set.")
    flags.DEFINE_string("data_dir", None, "Folder of TFDS data sets.")
    flags.DEFINE_string("json", None, "File that gets all measurements.")


class Row(NamedTuple):
    """One round, or evaluation, with one chunk.

    Attributes:
      model: Name of the model.
      clients: Number of clients.
      what: "round" or "evaluation".
      chunk: Clients at once on a device.
      own: Whether the engine takes this chunk by itself.
      seconds: Of each turn.
      flops: Arithmetic of it, 0 if not counted.
    """

    model: str
    clients: int
    what: str
    chunk: int
    own: bool
    seconds: tuple[float, ...]
    flops: int


def measure(
    workload: Workload,
    problem: Problem,
    chunks: Sequence[int],
    turns: int,
    evaluation: bool = True,
) -> list[Row]:
    """Time rounds, and evaluations if wanted, with several chunks, by turns."""
    mesh = execution.make_mesh(len(jax.devices()))
    federation = execution.place(problem.federation, mesh)
    width = federation.cohorts[0].num_clients // len(jax.devices())
    own = execution.default_chunk() or width
    ways: dict[tuple[str, int], Callable[[], Any]] = {}
    for chunk in sorted({own, *(c for c in chunks if c <= width)}):
        layout = Execution(chunk, mesh)
        ways["round", chunk] = _a_round(problem, federation, layout)
        if evaluation:
            ways["evaluation", chunk] = _an_evaluation(problem, federation, layout)
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, run in list(ways.items()):
            start = time.perf_counter()
            try:
                jax.block_until_ready(run())
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                what, chunk = way
                print(f"{what}, chunk {chunk}: does not fit", file=sys.stderr)
                del ways[way], seconds[way]
                continue
            if turn:  # the first compiles
                seconds[way].append(time.perf_counter() - start)
    flops = {"round": workloads.round_flops(workload, problem), "evaluation": 0}
    return [
        Row(
            workload.model,
            workload.clients,
            what,
            chunk,
            chunk == own,
            tuple(taken),
            flops[what],
        )
        for (what, chunk), taken in sorted(seconds.items(), reverse=True)
    ]


def _a_round(problem, federation, layout):
    round_fn = rounds.make_round(problem.algorithm, problem.sampler, layout)
    block = simulate.make_block(round_fn, 1, layout)
    state = rounds.init_state(problem.algorithm, federation, problem.init_key, layout)
    held = [state]

    def run():
        held[0], _ = block(held[0], federation, problem.round_key, np.int32(1))
        return held[0]

    return run


def _an_evaluation(problem, federation, layout):
    state = rounds.init_state(problem.algorithm, federation, problem.init_key, layout)
    score = jax.jit(evaluate.make_evaluate(problem.algorithm, layout))
    # What clients train on stands for test rows, of which a benchmark deals none.
    (cohort,) = federation.cohorts
    tested = dataclasses.replace(cohort, test=cohort.train)
    scored = dataclasses.replace(federation, cohorts=(tested,))
    return lambda: score(state, scored, problem.round_key)


def to_markdown(rows: Sequence[Row], peak: float) -> str:
    """Write the table; a slowdown is to the best chunk of the same work."""
    best: dict[tuple[str, int, str], float] = {}
    for row in rows:
        group, middle = row[:3], statistics.median(row.seconds)
        best[group] = min(best.get(group, middle), middle)
    lines = [
        "| model | clients | what | chunk | seconds | GFLOP/s | of peak | times best |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        middle = statistics.median(row.seconds)
        rate = row.flops / middle / 1e9
        columns = [
            row.model,
            str(row.clients),
            row.what,
            f"{row.chunk}{' (own)' if row.own else ''}",
            rivals.spread(row.seconds),
            f"{rate:,.0f}" if rate else "",
            f"{100 * rate / peak:.0f} %" if rate else "",
            f"{middle / best[row[:3]]:.2f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def measure_start(model: str, turns: int) -> list[float]:
    """Time whole runs of one round, each in a folder of its own."""
    seconds = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "experiments.run", f"--model={model}"]
            command += ["--algorithm=fedavg", "--baselines=", "--rounds=1"]
            command += ["--local_steps=1", f"--workdir={folder}/run"]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return seconds


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    execution.use_cores()
    jax_nets.set_precision(FLAGS.precision)
    peak = processes.measure_peak({}, FLAGS.precision)
    print(f"peak {peak:.0f} GFLOP/s", flush=True)
    rows, starts, chunks = [], {}, list(map(int, FLAGS.chunks))
    for model in FLAGS.models:
        for clients in map(int, FLAGS.clients):
            workload = Workload(
                FLAGS.dataset, model, clients, FLAGS.steps, FLAGS.batch_size
            )
            problem = workloads.load(workload, FLAGS.data_dir)
            evaluation = FLAGS.evaluation and model != "vae"
            measured = measure(workload, problem, chunks, FLAGS.rounds, evaluation)
            print(f"\n{to_markdown(measured, peak)}", flush=True)
            rows += measured
        if FLAGS.starts and model != "vae":
            starts[model] = measure_start(model, FLAGS.starts)
            seconds = rivals.spread(starts[model])
            print(f"start to end of one round, {model}: {seconds} s", flush=True)
    if FLAGS.json:
        everything = {
            **processes.describe_machine("engine"),
            "peak_gflops": peak,
            "rows": [row._asdict() for row in rows],
            "starts": starts,
        }
        pathlib.Path(FLAGS.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    define_flags()
    app.run(main)
