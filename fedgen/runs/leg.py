"""One algorithm of a run: compile, train, evaluate, record, survive a kill."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from jax.sharding import SingleDeviceSharding

from fedgen.core import evaluate as evaluate_lib
from fedgen.core import hosts, participation, rounds, simulate
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.checkpoint import Checkpoints
from fedgen.core.compiling import compile_ahead
from fedgen.core.evaluate import Evaluation, Scores
from fedgen.core.execution import Execution, replicated, state_shardings
from fedgen.core.rounds import Report, Traffic
from fedgen.runs import build, workdir
from fedgen.runs.build import Setup
from fedgen.runs.config import Config

Line = dict[str, Any]
SHORT = 8  # rounds, which are over sooner if they are compiled quickly


class Leg(NamedTuple):
    """A compiled algorithm, ready to train."""

    name: str
    algorithm: Algorithm
    init: Callable[[], State]
    like: State  # shapes and shardings
    block: simulate.Block
    evaluate: evaluate_lib.EvaluateFn
    traffic: tuple[Traffic, ...]
    rounds_per_block: int
    compile_seconds: float


class Result(NamedTuple):
    """What an algorithm achieved: an entry of summary.json, and its history."""

    summary: dict[str, Any]
    lines: list[Line]


def prepare(name: str, algorithm: Algorithm, setup: Setup, config: Config) -> Leg:
    """Compile an algorithm; nothing is allocated yet, let alone trained.

    Raises:
      ValueError: If the algorithm does not suit the federation, or its chunk of
        clients does not fit into memory.
    """
    federation, execution = setup.federation, setup.execution
    init_key, round_key, _ = run_keys(config.seed)
    start = time.perf_counter()
    algorithm = algorithm.prepared(federation)
    init = rounds.make_init(algorithm, execution)
    like = _place(jax.eval_shape(init, init_key, federation), execution)
    round_fn = rounds.make_round(algorithm, setup.sampler, execution)
    length = block_length(config)
    block = simulate.make_block(round_fn, length, execution)
    block = compile_ahead(
        block,
        like,
        federation,
        round_key,
        jnp.int32(length),
        quick=config.rounds <= SHORT,
    )
    local_devices = execution.num_devices // jax.process_count()
    check_memory(name, block, local_devices)
    evaluate = jax.jit(
        make_evaluate(algorithm, execution, config),
        out_shardings=replicated(execution.mesh),
    )
    evaluate = compile_ahead(evaluate, like, federation, round_key, quick=True)
    check_memory(name, evaluate, local_devices)
    init = compile_ahead(init, init_key, federation, quick=True)
    return Leg(
        name,
        algorithm,
        functools.partial(init, init_key, federation),
        like,
        block,
        evaluate,
        rounds.traffic(algorithm, federation, like),
        length,
        time.perf_counter() - start,
    )


def make_evaluate(
    algorithm: Algorithm, execution: Execution, config: Config
) -> evaluate_lib.EvaluateFn:
    """Build the evaluation of all clients, or of as many as the flags ask for."""
    sampler = None
    if config.eval_clients:
        sampler = participation.uniform(config.eval_clients / config.num_clients)
    return evaluate_lib.make_evaluate(algorithm, execution, sampler=sampler)


def restore(
    name: str, setup: Setup, config: Config, folder: pathlib.Path
) -> tuple[Algorithm, State]:
    """Read the newest state of an algorithm back from the folder it was trained in.

    Nothing is changed there.

    Raises:
      ValueError: If the folder holds no sound checkpoint of the last round.
    """
    algorithm = build.build_algorithm(config, name).prepared(setup.federation)
    init = rounds.make_init(algorithm, setup.execution)
    like = jax.eval_shape(init, run_keys(config.seed)[0], setup.federation)
    place, reasons = folder.absolute() / "checkpoints", []
    if place.is_dir():
        with Checkpoints(place, _ids(setup)) as checkpoints:
            found = checkpoints.restore(
                _place(like, setup.execution), reasons.append, set_aside=False
            )
        if found is not None and int(found[0].round) == config.rounds:
            return algorithm, found[0]
    raise ValueError(
        f"{folder} must hold a checkpoint of round {config.rounds}, the last one, got "
        + ("; ".join(reasons) or "none")
    )


def train(
    leg: Leg,
    setup: Setup,
    config: Config,
    folder: pathlib.Path,
    *,
    progress: Callable[[Line], None],
    warn: Callable[[str], None],
) -> Result:
    """Train to the last round, from the newest checkpoint if there is one.

    Under `folder`: metrics.jsonl, checkpoints and TensorBoard events. What a round
    writes is a function of the configuration alone, so that a resumed run ends with
    the files of one that was never killed; seconds go to the summary only.

    Raises:
      FloatingPointError: If the training diverged; names the round, the clients and
        the last good checkpoint.
    """
    _, round_key, evaluate_key = run_keys(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "metrics.jsonl"
    evaluation = None
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if config.checkpoint_every:
            checkpoints = stack.enter_context(
                Checkpoints((folder / "checkpoints").absolute(), _ids(setup))
            )
        start = time.perf_counter()
        state, lines, spent = _begin(leg, checkpoints, metrics, warn)
        setup_seconds = time.perf_counter() - start
        board = None
        if hosts.is_first():
            board = stack.enter_context(_write_board(folder / "tensorboard", lines))
        for line in lines:
            progress(line)
        saved = int(state.round)
        hosts.resume_from(f"round {saved} of {leg.name}")

        clock = _Clock(**spent)
        try:
            for new_state, reports in simulate.simulate(
                leg.block,
                state,
                setup.federation,
                round_key,
                num_rounds=config.rounds,
                rounds_per_block=leg.rounds_per_block,
            ):
                state = new_state
                done = int(state.round)
                new = round_lines(leg, reports, done)
                last = done == config.rounds
                if last or done % config.eval_every == 0:
                    clock.lap("steady")
                    evaluation = leg.evaluate(state, setup.federation, evaluate_key)
                    new[-1] |= evaluation_line(leg.algorithm, evaluation, done)
                    clock.lap("evaluation")
                lines += new
                if board:
                    workdir.append_lines(metrics, new)
                for line in new:
                    if board:
                        _write_events(board, line)
                    progress(line)
                if checkpoints and (last or done % config.checkpoint_every == 0):
                    clock.lap("steady")
                    checkpoints.save(state, {"seconds": clock.seconds})
                    saved = done
                    hosts.resume_from(f"round {saved} of {leg.name}")
        except FloatingPointError as error:
            where = (
                f"the last good checkpoint is of round {saved}, in {folder}/checkpoints"
                if checkpoints and saved
                else "there is no checkpoint to go back to"
            )
            raise FloatingPointError(f"{leg.name}, {error}; {where}") from error
        clock.lap("steady")
        if evaluation is None:
            evaluation = leg.evaluate(state, setup.federation, evaluate_key)
            jax.block_until_ready(evaluation)
            clock.lap("evaluation")
    summary = summarise(leg, config, lines, evaluation)
    summary["seconds"] = {
        "compile": leg.compile_seconds + setup_seconds,
        **clock.seconds,
    }
    if setup.newcomers is not None:
        summary["new_clients"] = _newcomers(leg, setup, state, config.seed)
    return Result(summary, lines)


class _Clock:
    """Adds up what training, and what evaluation, took."""

    def __init__(self, steady: float = 0.0, evaluation: float = 0.0) -> None:
        self.seconds = {"steady": steady, "evaluation": evaluation}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last call for a part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def _place(shapes: State, execution: Execution) -> State:
    """Say where the leaves of a state lie."""
    shardings = state_shardings(execution.mesh)
    if shardings is None:
        shardings = State(*[SingleDeviceSharding(jax.devices()[0])] * 3)

    def place(sharding, part):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), part
        )

    return State(*map(place, shardings, shapes))


def _ids(setup: Setup) -> list[np.ndarray]:
    """Return the ids of clients by cohort, in the order of their state."""
    return [hosts.fetch(cohort.ids) for cohort in setup.federation.cohorts]


def _begin(
    leg: Leg,
    checkpoints: Checkpoints | None,
    metrics: pathlib.Path,
    warn: Callable[[str], None],
) -> tuple[State, list[Line], dict[str, float]]:
    """Return the state to train on from, its lines, and the seconds spent on it."""
    # As the first process sees them, which writes them.
    lines = json.loads(hosts.decide(lambda: json.dumps(workdir.read_lines(metrics))))
    found = checkpoints and checkpoints.restore(leg.like, warn, len(lines))
    state, seconds = (found[0], found[1]["seconds"]) if found else (leg.init(), {})
    jax.block_until_ready(state)
    lines = lines[: int(state.round)]
    if hosts.is_first():
        workdir.write_lines(metrics, lines)
    return state, lines, seconds


def block_length(config: Config) -> int:
    """Return the rounds of a block, which ends wherever the host looks in."""
    length = math.gcd(config.eval_every, config.checkpoint_every or config.eval_every)
    return min(length, config.rounds)


def run_keys(seed: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the keys of initialisation, rounds and evaluation."""
    return tuple(jax.random.split(jax.random.key(seed), 3))


def accuracy(scores: Scores) -> np.ndarray:
    """Divide hits by rows, `[n]`; NaN for a client without rows."""
    return _share(scores.correct, scores.count)


def _share(correct: np.ndarray, count: np.ndarray) -> np.ndarray:
    correct, count = np.asarray(correct), np.asarray(count)
    return np.where(count > 0, correct / np.maximum(count, 1), np.nan)


def spread(per_client: np.ndarray) -> dict[str, float | None]:
    """Summarise accuracies over clients; the worst decile is a mean as well."""
    known = np.sort(per_client[np.isfinite(per_client)])
    if not known.size:
        return {"mean": None, "std": None, "worst_decile": None}
    worst = known[: max(1, round(known.size / 10))]
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "worst_decile": float(worst.mean()),
    }


def check_memory(name: str, compiled: Any, num_devices: int) -> None:
    """Raise a `ValueError` if a compiled block needs more memory than there is."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return
    needed = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    if jax.default_backend() == "cpu":
        needed *= num_devices
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        stats = jax.local_devices()[0].memory_stats() or {}
        available = stats.get("bytes_limit", needed)
    if needed > available:
        raise ValueError(
            f"{name} would need {needed / 2**30:.1f} GiB for a chunk of clients, and "
            f"there are {available / 2**30:.1f} GiB; choose a smaller --chunk"
        )


def peak_memory_bytes() -> int:
    """Return the most memory that this process, or its busiest device, has held."""
    if jax.default_backend() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(stat.get("peak_bytes_in_use", 0) for stat in stats)


def round_lines(leg: Leg, reports: Report, last: int) -> list[Line]:
    """Turn the reports of a block into one line a round."""
    count = reports.steps.shape[0]
    lines = []
    for i in range(count):
        here = reports.participants[i].tolist()
        lines.append(
            {
                "algorithm": leg.name,
                "round": last - count + i + 1,
                **{k: float(v[i]) for k, v in reports.metrics.items()},
                "participants": sum(here),
                "failed": sorted({int(c) for c in reports.failed[i] if c >= 0}),
                "local_steps": int(reports.steps[i]),
                "executed_steps": int(reports.executed[i]),
                "bytes_down": _dot(here, [t.down for t in leg.traffic]),
                "bytes_up": _dot(here, [t.up for t in leg.traffic]),
            }
        )
    return lines


def _dot(a: list[int], b: list[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _global_accuracy(algorithm: Algorithm, scores: Scores) -> float | None:
    """Return the accuracy of the server's one model, over all clients' rows."""
    rows = int(np.sum(scores.count))
    if algorithm.predict_global is None or not rows:
        return None
    return int(np.sum(scores.global_correct)) / rows


def _received_accuracy(algorithm: Algorithm, scores: Scores) -> np.ndarray | None:
    """Return the accuracies `[n]` of the downloads as they are, if they are models."""
    if algorithm.receive is None:
        return None
    return _share(scores.received_correct, scores.count)


def _with_clients(per_client: np.ndarray) -> dict[str, Any]:
    """Summarise accuracies and list them, null for clients without test rows."""
    listed = [None if math.isnan(a) else float(a) for a in per_client]
    return {**spread(per_client), "per_client": listed}


def evaluation_line(algorithm: Algorithm, evaluation: Evaluation, done: int) -> Line:
    """Turn the evaluation after a round into a part of the round's line.

    Raises:
      FloatingPointError: If the loss of a client's own model is not finite.
    """
    validation, test, ids = jax.device_get(evaluation)
    bad = ids[~np.isfinite(validation.loss + test.loss)]
    if bad.size:
        raise FloatingPointError(
            f"round {done}: loss of the personal models of clients {bad.tolist()} not "
            "finite"
        )
    rows = int(np.sum(test.count))
    received = _received_accuracy(algorithm, test)
    return {
        "personal_accuracy": spread(accuracy(test)),
        "received_accuracy": None if received is None else spread(received)["mean"],
        "validation_accuracy": spread(accuracy(validation))["mean"],
        "personal_loss": float(np.sum(test.loss)) / max(rows, 1),
        "global_accuracy": _global_accuracy(algorithm, test),
    }


def summarise(
    leg: Leg, config: Config, lines: list[Line], evaluation: Evaluation
) -> dict[str, Any]:
    """Sum up the lines of a run and its last evaluation."""
    _, test, ids = jax.device_get(evaluation)
    received = _received_accuracy(leg.algorithm, test)
    evaluated = [line for line in lines if "personal_accuracy" in line]
    scored = [line for line in evaluated if line["validation_accuracy"] is not None]
    # The first of equal rounds: ties must not favour longer training.
    best = max(scored, key=lambda line: line["validation_accuracy"], default=None)
    total = {
        name: sum(line[name] for line in lines)
        for name in ("bytes_up", "bytes_down", "local_steps", "executed_steps")
    }
    return {
        "algorithm": leg.name,
        "rounds": config.rounds,
        "evaluated_clients": ids.tolist() if config.eval_clients else None,
        "personal_accuracy": _with_clients(accuracy(test)),
        "received_accuracy": None if received is None else _with_clients(received),
        "validation_accuracy": {
            "mean": evaluated[-1]["validation_accuracy"] if evaluated else None
        },
        "global_accuracy": _global_accuracy(leg.algorithm, test),
        "best_round": best and best["round"],
        "best": best
        and {
            "personal_accuracy": best["personal_accuracy"],
            "global_accuracy": best["global_accuracy"],
        },
        **total,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _newcomers(leg: Leg, setup: Setup, state: State, seed: int) -> dict[str, Any]:
    """Score clients that were not there in training, after one local round."""
    execution = setup.execution._replace(mesh=None)
    key = run_keys(seed)[2]
    # Unseen clients live on one device, and see nothing of the others' states.
    local = State(*jax.device_get((state.round, state.server)), ())
    adapt = jax.jit(evaluate_lib.make_adapt(leg.algorithm, execution))
    adapted = compile_ahead(adapt, local, setup.newcomers, key, quick=True)(
        local, setup.newcomers, key
    )
    evaluate = jax.jit(evaluate_lib.make_evaluate(leg.algorithm, execution))
    evaluate = compile_ahead(evaluate, adapted, setup.newcomers, key, quick=True)
    test = jax.device_get(evaluate(adapted, setup.newcomers, key)).test
    return {"personal_accuracy": spread(accuracy(test))}


def _write_board(folder: pathlib.Path, lines: list[Line]) -> tensorboardX.SummaryWriter:
    """Begin TensorBoard events anew: a killed run leaves some unwritten."""
    shutil.rmtree(folder, ignore_errors=True)
    board = tensorboardX.SummaryWriter(str(folder))
    for line in lines:
        _write_events(board, line)
    return board


def _write_events(board: tensorboardX.SummaryWriter, line: Line) -> None:
    for name, value in line.items():
        if name == "round" or isinstance(value, str | list) or value is None:
            continue
        each = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in each:
            if number is not None:
                board.add_scalar(f"{name}/{part}".rstrip("/"), number, line["round"])
