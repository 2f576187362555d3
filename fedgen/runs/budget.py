"""What a run will take: memory, seconds and bytes, told before it begins.

Sizes are those of the arrays and of the compiled programs; seconds are those of one
round and one evaluation, whose results are thrown away.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box, table

from fedgen.core import tree
from fedgen.runs import leg as leg_lib
from fedgen.runs.build import Setup
from fedgen.runs.config import Config
from fedgen.runs.leg import Leg
from fedgen.runs.tables import quantity

_MIB = 2**20
# What the pictures and the files load, and the allocator does not reuse.
_FILES = 60 * _MIB
_ROWS = (
    ("MiB of the pool, shared", "pool", _MIB),
    ("MiB of clients' states", "clients", _MIB),
    ("MiB of the server's state", "server", _MIB),
    ("MiB to train a chunk", "chunk", _MIB),
    ("MiB to evaluate a chunk", "evaluation", _MIB),
    ("MiB to write a checkpoint", "checkpoint", _MIB),
    ("s to compile", "compile_seconds", 1),
    ("s a round", "round_seconds", 1),
    ("s an evaluation", "evaluation_seconds", 1),
    ("s of all rounds and evaluations", "training_seconds", 1),
    ("MiB down a round", "bytes_down", _MIB),
    ("MiB up a round", "bytes_up", _MIB),
)


class Estimate(NamedTuple):
    """What one algorithm of a run will take.

    Attributes:
      pool: Bytes of samples and of lists of them, which all algorithms share.
      clients: Bytes of all clients' states.
      server: Bytes of the server's state.
      chunk: Bytes of working memory of a round, on all devices.
      evaluation: The same of an evaluation.
      checkpoint: Bytes of the copy of all states that is written.
      compile_seconds: As measured.
      round_seconds: As measured.
      evaluation_seconds: As measured.
      training_seconds: For as many rounds and evaluations as there are.
      bytes_down: Bytes that the participants of a round receive.
      bytes_up: Bytes that they send.
    """

    pool: int
    clients: int
    server: int
    chunk: int
    evaluation: int
    checkpoint: int
    compile_seconds: float
    round_seconds: float
    evaluation_seconds: float
    training_seconds: float
    bytes_down: int
    bytes_up: int

    @property
    def working(self) -> int:
        """Bytes that training needs beside the pool."""
        parts = (self.chunk, self.evaluation, self.checkpoint)
        return self.clients + self.server + max(parts)


class Budget(NamedTuple):
    """What a run will take.

    Attributes:
      estimates: By algorithm.
      compiled: Most bytes that the process has held up to the end of compiling.
      held: Bytes that it holds then, the pool among them.
      files: Bytes for what writes files and draws pictures.
    """

    estimates: dict[str, Estimate]
    compiled: int
    held: int
    files: int

    @property
    def peak(self) -> int:
        """Most bytes that the run will hold.

        Algorithms train one after another, each in what is held after all are
        compiled; compiling may have taken more.
        """
        working = max(each.working for each in self.estimates.values())
        return max(self.compiled, self.held + working) + self.files

    @property
    def seconds(self) -> float:
        """Seconds of the run, whose algorithms are compiled at the same time."""
        each = self.estimates.values()
        return max(e.compile_seconds for e in each) + sum(
            e.training_seconds for e in each
        )


def estimate(leg: Leg, setup: Setup, config: Config) -> Estimate:
    """Measure one round and one evaluation, and read off the sizes."""
    _, round_key, evaluate_key = leg_lib.run_keys(config.seed)
    federation = setup.federation
    # The devices of a CPU share one memory; of others, one is told of.
    shared = jax.default_backend() == "cpu"
    devices = setup.execution.num_devices if shared else 1
    parts = 1 if shared else setup.execution.num_devices
    state = jax.block_until_ready(leg.init())
    start = time.perf_counter()
    jax.block_until_ready(leg.evaluate(state, federation, evaluate_key))
    evaluated = time.perf_counter()
    _, reports = jax.block_until_ready(
        leg.block(state, federation, round_key, np.int32(1))
    )
    round_seconds = time.perf_counter() - evaluated
    evaluation_seconds = evaluated - start
    (line,) = leg_lib.round_lines(leg, jax.tree.map(lambda a: a[:1], reports), 1)
    evaluations = -(-config.rounds // config.eval_every)
    copied = config.checkpoint_every and shared
    return Estimate(
        pool=tree.num_bytes((federation.pool, federation.cohorts)),
        clients=tree.num_bytes(leg.like.clients) // parts,
        server=tree.num_bytes(leg.like.server),
        chunk=devices * _working_bytes(leg.block),
        evaluation=devices * _working_bytes(leg.evaluate),
        checkpoint=tree.num_bytes(leg.like) if copied else 0,
        compile_seconds=leg.compile_seconds,
        round_seconds=round_seconds,
        evaluation_seconds=evaluation_seconds,
        training_seconds=(
            config.rounds * round_seconds + evaluations * evaluation_seconds
        ),
        bytes_down=line["bytes_down"],
        bytes_up=line["bytes_up"],
    )


def tell(legs: Sequence[Leg], setup: Setup, config: Config) -> Budget:
    """Tell what compiled algorithms will take, one after another."""
    compiled, held = leg_lib.peak_memory_bytes(), held_bytes()
    estimates = {leg.name: estimate(leg, setup, config) for leg in legs}
    # Checkpoints and pictures take the memory of the host.
    files = _FILES if jax.default_backend() == "cpu" else 0
    return Budget(estimates, compiled, held, files)


def held_bytes() -> int:
    """Return the memory that this process, or its busiest device, holds now."""
    if jax.default_backend() == "cpu":
        pages = pathlib.Path("/proc/self/statm")
        if not pages.exists():  # as on macOS
            return leg_lib.peak_memory_bytes()
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(stat.get("bytes_in_use", 0) for stat in stats)


def to_table(budget: Budget) -> table.Table:
    """Lay the estimates of a run's algorithms out, one column each."""
    estimates = budget.estimates
    out = table.Table(
        box=box.SIMPLE_HEAD,
        caption=f"peak memory {quantity(budget.peak / _MIB)} MiB, of which "
        f"{quantity(budget.held / _MIB)} once compiled; "
        f"{quantity(budget.seconds)} s in all",
    )
    out.add_column("")
    for name in estimates:
        out.add_column(name, justify="right")
    for title, field, unit in _ROWS:
        values = (getattr(each, field) / unit for each in estimates.values())
        out.add_row(title, *map(quantity, values))
    return out


def _working_bytes(compiled: Any) -> int:
    """Return what a compiled program allocates beside its arguments, on a device."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    return (
        sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
