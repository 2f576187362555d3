"""Which chunk and how many devices train a federation fastest, found by trying.

A probe compiles and times a few local steps of a few clients under each candidate,
and keeps what it found in the folder of caches, since it is true of a machine and not
of a run. What is chosen changes how sums are rounded, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedgen.core import evaluate, execution, rounds
from fedgen.core.algorithm import State
from fedgen.core.compiling import compile_ahead
from fedgen.core.execution import Execution
from fedgen.core.federation import Cohort, Federation, Rows
from fedgen.data import sources
from fedgen.runs import build, leg, workdir
from fedgen.runs.config import Config

Chunk = int | str  # as in `Config`, but never "auto"
Measure = Callable[[Chunk, int], float]

_STEPS = 4  # local steps of each client that is timed
_SHARE = 0.1  # of the predicted training time, for a probe at most
_WORTH = 6.0  # seconds below which no probe is begun
# Of floating-point operations in a second; low for an accelerator, whose default suits.
_RATE = {"cpu": 5e10}
_FAST = 1e13


def choose(
    config: Config,
    federation: Federation,
    later: list[Callable[[], None]] | None = None,
) -> tuple[Execution, str]:
    """Lay clients out as the flags say, else as a probe does if that is worth while.

    Args:
      config: What is asked for.
      federation: Whose clients are laid out.
      later: Gets what writes down what a probe found, for a run that may yet be
        refused; None writes it now.

    Returns:
      The layout, and in words who chose it.
    """
    # Several processes would have to agree on what each of them timed.
    if config.chunk != "auto" or jax.process_count() > 1:
        return build.by_platform(config, federation)
    path = sources.cache_dir() / "layouts" / f"{_key(config, federation)}.json"
    found, chosen = _read(path), "an earlier probe"
    if found is None:
        budget = _SHARE * training_seconds(config, federation)
        if budget < _WORTH:
            return build.by_platform(config, federation)
        chunks, devices = candidates(config, federation)
        count = _participants(config, federation)
        if "all" not in chunks:
            count = min(count, max(chunks) * max(devices))
        seconds = search(timer(config, federation, count), chunks, devices, budget)
        found, chosen = min(seconds, key=seconds.get), "a probe"
        write = functools.partial(_write, path, found, seconds)
        if later is None:
            write()
        else:
            later.append(write)
    chunk, devices = found
    mesh = execution.make_mesh(devices)
    return Execution(execution.read_chunk(chunk), mesh), chosen


def candidates(config: Config, federation: Federation) -> tuple[list[Chunk], list[int]]:
    """Return the chunks and the numbers of devices to try, the likeliest first."""
    here = len(jax.devices())
    devices = [config.devices or here]
    n = _participants(config, federation) // devices[0]
    if jax.default_backend() == "cpu":
        if not config.devices and here > 1:
            devices.append(1)
        return [chunk for chunk in (1, 2, 5, 10) if chunk <= max(n, 1)], devices
    return ["all", *(n // 2**i for i in range(1, 7) if n >= 2**i)], devices


def _participants(config: Config, federation: Federation) -> int:
    """Count the participants of a round, in the smallest cohort."""
    counts = [cohort.num_clients for cohort in federation.cohorts]
    return max(1, round(config.participation * min(counts)))


def search(
    measure: Measure, chunks: list[Chunk], devices: list[int], budget: float
) -> dict[tuple[Chunk, int], float]:
    """Time chunks as long as they get faster, then fewer devices with the best one.

    Args:
      measure: Seconds under a chunk and a number of devices; an error
        where that does not fit into memory.
      chunks: In order.
      devices: In order.
      budget: Seconds after which no further candidate is begun.

    Returns:
      Seconds by candidate; infinite where one did not fit.
    """
    start, seconds = time.perf_counter(), {}

    def try_all(candidates):
        best = min(seconds.values(), default=float("inf"))
        for candidate in candidates:
            if seconds and time.perf_counter() - start > budget:
                return
            try:
                seconds[candidate] = measure(*candidate)
            except (ValueError, jax.errors.JaxRuntimeError):
                seconds[candidate] = float("inf")
            if best < seconds[candidate]:
                return
            best = seconds[candidate]

    try_all((chunk, devices[0]) for chunk in chunks)
    best, _ = min(seconds, key=seconds.get)
    try_all((best, count) for count in devices[1:])
    return seconds


def training_seconds(config: Config, federation: Federation) -> float:
    """Estimate from its floating-point operations how long a training will take."""
    total = 0.0
    for cohort in federation.cohorts:
        sizes = np.asarray(cohort.train.size)
        steps = config.local_epochs * np.ceil(sizes / config.batch_size).sum()
        if config.local_steps:
            steps = config.local_steps * len(sizes)
        shape = federation.pool.x.shape[1:]
        total += steps * config.batch_size * _sample_operations(cohort.model, shape)
    # Baselines do much the same work.
    total *= config.rounds * config.participation * len(config.legs)
    return total / _RATE.get(jax.default_backend(), _FAST)


def _sample_operations(model: Any, shape: tuple[int, ...]) -> float:
    """Count the floating-point operations of a gradient; nothing is compiled.

    For one sample, since of loops over a batch only one turn would be counted.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply(params, x))))
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return (gradient.lower(params, x).cost_analysis() or {}).get("flops", 0.0)


def timer(config: Config, federation: Federation, count: int) -> Measure:
    """Return what times a few local steps of `count` clients of every cohort."""
    few = _first_clients(federation, count)
    short = dataclasses.replace(config, local_steps=_STEPS)
    algorithm = build.build_algorithm(short, config.algorithm).prepared(few)
    key = jax.random.key(config.seed)

    def measure(chunk: Chunk, devices: int) -> float:
        mesh = execution.make_mesh(devices)
        layout = Execution(execution.read_chunk(chunk), mesh)
        placed = execution.place(few, mesh)
        state = rounds.make_init(algorithm, layout)(key, placed)
        state = State(state.round, state.server, ())
        adapt = jax.jit(evaluate.make_adapt(algorithm, layout))
        adapt = compile_ahead(adapt, state, placed, key, quick=True)
        leg.check_memory(config.algorithm, adapt, devices)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(adapt(state, placed, key))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return measure


def _first_clients(federation: Federation, count: int) -> Federation:
    """Keep the first clients of every cohort, numbered from 0."""

    def cut(cohort: Cohort) -> Cohort:
        ids = np.arange(len(cohort.ids))[:count]
        parts = {
            name: Rows(*(a[: len(ids)] for a in getattr(cohort, name)))
            for name in ("train", "validation", "test")
        }
        return dataclasses.replace(
            cohort, ids=jnp.asarray(ids, jnp.int32), num_real=len(ids), **parts
        )

    cohorts = tuple(map(cut, federation.cohorts))
    return dataclasses.replace(federation, cohorts=cohorts)


def _key(config: Config, federation: Federation) -> str:
    """Hash all that decides which layout is fastest."""
    decisive = {
        "algorithm": [config.algorithm, config.hyperparameters],
        "batch": [config.batch_size, *federation.pool.x.shape[1:]],
        "models": [(c.model.name, c.num_clients) for c in federation.cohorts],
        "participation": config.participation,
        "devices": [config.devices, len(jax.devices()), jax.devices()[0].device_kind],
        "machine": [platform.node(), platform.machine(), os.cpu_count()],
        "jax": jax.__version__,
    }
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: pathlib.Path) -> tuple[Chunk, int] | None:
    """Read what a probe found; None if there was none, or its file is damaged."""
    try:
        found = json.loads(path.read_text())
        chunk, devices = found["chunk"], found["devices"]
        known = chunk == "all" or type(chunk) is int and chunk >= 1
        if known and type(devices) is int and 1 <= devices <= len(jax.devices()):
            return chunk, devices
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(
    path: pathlib.Path,
    best: tuple[Chunk, int],
    seconds: dict[tuple[Chunk, int], float],
) -> None:
    """Keep what a probe found, if there is a place where that can be kept."""
    tried = [
        {"chunk": chunk, "devices": devices, "seconds": value}
        for (chunk, devices), value in seconds.items()
        if value < float("inf")
    ]
    found = {"chunk": best[0], "devices": best[1], "tried": tried}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(path, found)
    except OSError:
        pass
