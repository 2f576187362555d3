"""Seconds and memory of a round as the clients grow and the participants do not.

Every number of clients has a process of its own, so that no peak of memory is that of
another. The processes take turns with a block of rounds each, so that a busy machine
slows all of them down; believe ratios rather than seconds. Clients draw their samples
with replacement from the embedded excerpt of Fashion-MNIST, which does for any number,
and all take the same number of local steps.

Seconds are medians over turns, with the range in brackets; the first turn warms up.
"partition" is from reading the data to clients laid out over the devices. "state" is
what clients keep from round to round, "index" says which rows are whose. "round" is by
how much the process grows, at its peak, once rounds begin. "peak" is its highest of
all, with data, partition and compiler. Memory is read as Linux tells it.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedgen.core import execution, tree
from fedgen.runs import build, leg
from fedgen.runs.config import Config

CLIENTS = flags.DEFINE_list(
    "clients", ["100", "1000", "10000", "100000", "1000000"], "Numbers of clients."
)
ALGORITHMS = flags.DEFINE_list("algorithms", ["fedavg", "fedper"], "What to train.")
PARTICIPANTS = flags.DEFINE_integer("participants", 100, "Clients of a round.")
MODEL = flags.DEFINE_string("model", "mlp32", "Architecture.")
DEVICES = flags.DEFINE_integer("devices", 0, "Devices; 0 takes all, a core each.")
ROUNDS = flags.DEFINE_integer("rounds", 50, "Rounds of a turn.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 9, "Timed turns.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to draw the curve, if anywhere.")

REFERENCE = 1000  # clients that the others are compared with, if they are measured
MIB = 2**20


class Start(NamedTuple):
    """What happens once, before the first round."""

    partition_seconds: float
    compile_seconds: float
    state_bytes: int
    index_bytes: int


class Row(NamedTuple):
    """One number of clients."""

    clients: int
    start: Start
    seconds: list[float]  # of a round, by turn
    round_bytes: int
    peak_bytes: int


def serve(connection: Connection, config: Config) -> None:
    """Prepare a run, then train a block whenever asked, until told to stop."""
    execution.use_cores(config.devices)
    begin = time.perf_counter()
    setup = build.build(config)
    jax.block_until_ready(setup.federation)
    partition_seconds = time.perf_counter() - begin
    algorithm = build.build_algorithm(config, config.algorithm)
    ready = leg.prepare(config.algorithm, algorithm, setup, config)
    key, rounds = leg.run_keys(config.seed)[1], np.int32(config.rounds)
    state = jax.block_until_ready(ready.init())
    index = [
        (cohort.order, cohort.ids, cohort.train, cohort.validation, cohort.test)
        for cohort in setup.federation.cohorts
    ]
    start = Start(
        partition_seconds,
        ready.compile_seconds,
        tree.num_bytes(state.clients),
        tree.num_bytes(index),
    )
    connection.send(start)
    highest, before = _resident("VmHWM"), _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    while connection.recv():
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(
            ready.block(state, setup.federation, key, rounds)
        )
        connection.send((time.perf_counter() - begin) / config.rounds)
    peak = _resident("VmHWM")
    connection.send((peak - before, max(peak, highest)))


def _resident(name: str) -> int:
    """Read a line of what Linux says of this process's memory, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status must have a line {name}, got none")


def measure(configs: Sequence[Config], repeats: int) -> list[Row]:
    """Start a process for each configuration and let them take turns."""
    spawn = multiprocessing.get_context("spawn")
    ends, starts = [], []
    for config in configs:
        end, other = spawn.Pipe()
        spawn.Process(target=serve, args=(other, config), daemon=True).start()
        other.close()
        ends.append(end)
        starts.append(end.recv())
        print(f"{config.algorithm}: {config.num_clients:,} ready", file=sys.stderr)
    turns = []
    for _ in range(repeats + 1):
        turn = []
        for end in ends:
            end.send(True)
            turn.append(end.recv())
        turns.append(turn)
    rows = []
    for config, end, start, seconds in zip(
        configs, ends, starts, zip(*turns[1:], strict=True), strict=True
    ):
        end.send(False)
        rows.append(Row(config.num_clients, start, list(seconds), *end.recv()))
    return rows


def ratios(row: Row, rows: Sequence[Row]) -> list[float]:
    """Compare a row's seconds with the reference's of the same turn."""
    reference = next((r for r in rows if r.clients == REFERENCE), rows[0])
    return [a / b for a, b in zip(row.seconds, reference.seconds, strict=True)]


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the table."""
    lines = [
        "| clients | partition, s | compile, s | ms a round | times the reference "
        "| state, MiB | index, MiB | round, MiB | peak, MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = (
            row.start.state_bytes,
            row.start.index_bytes,
            row.round_bytes,
            row.peak_bytes,
        )
        cells = [
            f"{row.clients:,}",
            f"{row.start.partition_seconds:.1f}",
            f"{row.start.compile_seconds:.1f}",
            _spread([1000 * s for s in row.seconds]),
            _spread(ratios(row, rows)),
            *(f"{size / MIB:,.1f}" for size in sizes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def draw(curves: dict[str, list[Row]], path: pathlib.Path) -> None:
    """Draw seconds of a round, and memory, against the number of clients."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, rows) in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), curves.items(), strict=False
    ):
        n = [row.clients for row in rows]
        times = np.array([[1000 * s for s in row.seconds] for row in rows])
        middle = np.median(times, axis=1)
        spread = np.abs(np.stack([times.min(1), times.max(1)]) - middle[None])
        left.errorbar(
            n, middle, spread, color=colour, marker="o", capsize=3, label=name
        )
        for what, style, sizes in (
            ("peak", "-", [row.peak_bytes for row in rows]),
            ("state", "--", [row.start.state_bytes for row in rows]),
            ("round", ":", [row.round_bytes for row in rows]),
        ):
            held = [(m, size / MIB) for m, size in zip(n, sizes, strict=True) if size]
            if held:
                label = f"{name}: {what}"
                right.plot(*zip(*held, strict=True), style, color=colour, label=label)
    left.set(ylabel="milliseconds a round", xscale="log", xlabel="clients")
    left.set_ylim(bottom=0)
    right.set(ylabel="MiB", xscale="log", yscale="log", xlabel="clients")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    curves = {}
    for name in ALGORITHMS.value:
        configs = [
            Config(
                algorithm=name,
                baselines=(),
                num_clients=n,
                participation=min(1.0, PARTICIPANTS.value / n),
                samples_per_client=10,
                alpha=0.5,
                min_size=3,
                local_steps=5,
                batch_size=10,
                model=MODEL.value,
                devices=DEVICES.value,
                rounds=ROUNDS.value,
                eval_every=ROUNDS.value,
                eval_clients=min(n, PARTICIPANTS.value),
                checkpoint_every=0,
            )
            for n in map(int, CLIENTS.value)
        ]
        for config in configs:
            config.check()
        curves[name] = measure(configs, REPEATS.value)
        sys.stdout.write(f"{name}\n\n{to_markdown(curves[name])}\n")
        sys.stdout.flush()
    if WORKDIR.value is not None:
        folder = pathlib.Path(WORKDIR.value)
        folder.mkdir(parents=True, exist_ok=True)
        draw(curves, folder / "scale.png")


if __name__ == "__main__":
    app.run(main)
