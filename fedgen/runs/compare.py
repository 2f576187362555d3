"""Several algorithms, tuned alike, over several seeds, in one table.

Every algorithm is tuned on the validation rows of the first seed, over the same grid;
the seeds after it run with what won there. Test rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import scipy.stats

from fedgen import algorithms
from fedgen.core import hosts
from fedgen.runs import build, experiment
from fedgen.runs import config as config_lib
from fedgen.runs.config import Config

Grid = Mapping[str, Sequence[str]]

# What a grid may vary: how clients train, never the problem that they are scored on.
TUNABLE = (
    "learning_rate",
    "learning_rate_decay",
    "momentum",
    "weight_decay",
    "local_epochs",
    "local_steps",
    "batch_size",
    "rounds",
)

OWN = (*TUNABLE, "model")  # flags that a method may set for itself


class Method(NamedTuple):
    """One line of a comparison: an algorithm, with settings of its own."""

    name: str  # as asked for: algorithm[:setting=value...]
    algorithm: str
    fixed: dict[str, str]  # hyper-parameters, and flags of `OWN`


class Row(NamedTuple):
    """What a method achieved; accuracies of clients, in [0, 1]."""

    name: str
    chosen: dict[str, str]  # what of the grid won on validation
    per_client: np.ndarray  # [seeds * n] test accuracies, NaN without test rows
    per_seed: np.ndarray  # [seeds] means over clients
    worst_decile: float  # mean over seeds
    global_accuracy: float | None  # mean over seeds
    received: float | None = None  # mean over seeds, of models not yet personalised


def compare(
    base: Config,
    names: Sequence[str],
    seeds: int,
    grid: Grid,
    folder: pathlib.Path,
    console: rich.console.Console,
) -> list[Row]:
    """Run all that is not finished yet under `folder`, and collect the rows.

    Args:
      base: The flags that all runs share.
      names: Algorithms, the first being the one that the others are compared with;
        `algorithm:name=value:...` fixes hyper-parameters, or flags of `OWN`, so that
        one algorithm can have several lines.
      seeds: Number of seeds, counted from `base.seed`.
      grid: Values to try, by the name of a flag, for all algorithms, or by
        `algorithm.hyperparameter`, for one.
      folder: Keeps one folder a run; finished ones are read and not run again.
      console: Where progress goes.

    Raises:
      ValueError: If a name is unknown or a value is wrong, before anything runs.
      FloatingPointError: If an algorithm diverged all over the grid, or at a seed.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"algorithms must be different names, got {list(names)}")
    methods = [_parse(name) for name in names]
    _check_grid(methods, grid)
    candidates = [list(_candidates(base, method, grid)) for method in methods]
    if base.hyperparameters:
        raise ValueError(
            "a comparison takes hyper-parameters as --grid=algorithm.name=value, "
            f"got {base.hyperparameters}"
        )
    for _, config in itertools.chain(*candidates):
        config.check()
        build.build_algorithm(config, config.algorithm)
    rows = []
    for name, points in zip(names, candidates, strict=True):
        tried = [_try(config, folder, console) for _, config in points]
        scores = [_validation(summary) for summary in tried]
        best = int(np.argmax(scores))
        if tried[best] is None:
            raise FloatingPointError(f"{name} diverged at every point of the grid")
        chosen, config = points[best]
        summaries = [tried[best]]
        for seed in range(base.seed + 1, base.seed + seeds):
            later = dataclasses.replace(config, seed=seed)
            summaries.append(_try(later, folder, console))
            if summaries[-1] is None:
                raise FloatingPointError(f"{name} diverged at seed {seed}")
        rows.append(_row(name, chosen, summaries))
    return rows


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the table; differences are the first row minus each, with 95 % intervals.

    Intervals are Student's, of the differences paired by client and seed. Clients of a
    seed share a partition and a global model, so the means by seed stand beside them.
    """
    lines = [
        "| method | personal accuracy | worst decile | global | "
        f"{rows[0].name} minus it | tuned |",
        "|---|---:|---:|---:|---:|---|",
    ]
    both = any(row.received is not None for row in rows)
    if both:
        lines = [
            lines[0].replace(" worst", " as received | worst"),
            lines[1].replace("|---:", "|---:|---:", 1),
        ]
    for row in rows:
        by_seed = ", ".join(f"{100 * a:+.1f}" for a in rows[0].per_seed - row.per_seed)
        gap = "" if row is rows[0] else f"{difference(rows[0], row)} ({by_seed})"
        lines.append(
            f"| {row.name} | {100 * row.per_seed.mean():.1f} "
            f"({', '.join(f'{100 * a:.1f}' for a in row.per_seed)}) | "
            f"{percent(row.received) + ' | ' if both else ''}"
            f"{100 * row.worst_decile:.1f} | "
            f"{percent(row.global_accuracy)} | {gap} | "
            f"{', '.join(f'{k}={v}' for k, v in row.chosen.items())} |"
        )
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """Write a share in %; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def difference(a: Row, b: Row) -> str:
    """Describe `a - b` over clients and seeds, in points: mean [low, high]."""
    gap = 100 * (a.per_client - b.per_client)
    gap = gap[np.isfinite(gap)]
    if gap.size < 2 or np.ptp(gap) == 0:
        return f"{gap.mean():+.1f}"
    low, high = scipy.stats.ttest_1samp(gap, 0).confidence_interval(0.95)
    return f"{gap.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def _parse(name: str) -> Method:
    algorithm, *settings = name.split(":")
    config_lib.nearest("algorithm", algorithm, algorithms.REGISTRY)
    fixed = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if not key or not value or key in fixed:
            raise ValueError(
                "a method must be algorithm[:setting=value...], each once, "
                f"got {name!r}"
            )
        fixed[key] = value
    return Method(name, algorithm, fixed)


def _candidates(
    base: Config, method: Method, grid: Grid
) -> Iterator[tuple[dict[str, str], Config]]:
    """Yield what is chosen and the configuration, for each point of the grid."""
    axes = {}
    for key, values in grid.items():
        algorithm, _, own = key.rpartition(".")
        if algorithm in ("", method.algorithm) and own not in method.fixed:
            axes[own] = values
    for point in itertools.product(*axes.values()):
        chosen = dict(zip(axes, point, strict=True))
        settings = method.fixed | chosen
        flags = {k: config_lib.typed(k, v) for k, v in settings.items() if k in OWN}
        own = {k: v for k, v in settings.items() if k not in OWN}
        yield (
            chosen,
            dataclasses.replace(
                base,
                algorithm=method.algorithm,
                baselines=(),
                hyperparameters=own,
                **flags,
            ),
        )


def _check_grid(methods: Sequence[Method], grid: Grid) -> None:
    names = {method.algorithm for method in methods}
    for key in grid:
        name, _, own = key.rpartition(".")
        if name in names:
            config_lib.nearest(
                f"hyper-parameter of {name}", own, algorithms.hyperparameters(name)
            )
            if all(own in m.fixed for m in methods if m.algorithm == name):
                raise ValueError(f"grid {key} varies what every {name} here fixes")
        else:
            known = [*TUNABLE, *(f"{name}." for name in sorted(names))]
            config_lib.nearest("grid name", key, known)


def _path(config: Config, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{config.algorithm}-{config_lib.short_hash(config)}"


def _run(
    config: Config, folder: pathlib.Path, console: rich.console.Console
) -> dict[str, Any]:
    """Run a configuration, or read what it gave before."""
    path = _path(config, folder)
    summary = hosts.decide(lambda: _text(path / "summary.json"))
    if summary:
        return json.loads(summary)
    resume = bool(hosts.decide(lambda: "resume" if path.exists() else ""))
    return experiment.run(config, str(path), resume=resume, console=console)


def _text(path: pathlib.Path) -> str:
    """Read a file, or nothing if there is none."""
    return path.read_text() if path.exists() else ""


def _validation(summary: dict[str, Any] | None) -> float:
    """Return what chooses: accuracy on validation rows, below all others if none."""
    mean = summary and summary["validation_accuracy"]["mean"]
    return -1.0 if mean is None else mean


def _try(
    config: Config, folder: pathlib.Path, console: rich.console.Console
) -> dict[str, Any] | None:
    """Run a configuration; None if it diverged, which is an answer too."""
    record = _path(config, folder) / "diverged.txt"
    reason = hosts.decide(lambda: _text(record)).strip()
    if not reason:
        try:
            return _run(config, folder, console)
        except FloatingPointError as error:
            reason = str(error)
            if hosts.is_first():
                record.write_text(f"{reason}\n")
    console.print(
        f"{config_lib.command(config)} diverged: {reason}; to try again, delete "
        f"{record.parent}",
        markup=False,
        soft_wrap=True,
    )
    return None


def _row(name: str, chosen: dict[str, str], summaries: list[dict[str, Any]]) -> Row:
    accuracy = [s["personal_accuracy"] for s in summaries]
    whole = [s["global_accuracy"] for s in summaries]
    # None, or not there in runs of earlier versions.
    received = [(s.get("received_accuracy") or {}).get("mean") for s in summaries]
    return Row(
        name,
        chosen,
        np.array([c for a in accuracy for c in a["per_client"]], float),
        np.array([a["mean"] for a in accuracy]),
        float(np.mean([a["worst_decile"] for a in accuracy])),
        None if None in whole else float(np.mean(whole)),
        None if None in received else float(np.mean(received)),
    )
