"""A whole run: the algorithm, its baselines, and the report that compares them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import rich.console
import rich.progress

from fedgen.core import compiling, hosts
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Federation
from fedgen.runs import budget, build, leg, probe, tables, workdir
from fedgen.runs import config as config_lib
from fedgen.runs.config import Config
from fedgen.runs.leg import Line


def run(
    config: Config,
    folder: str | None = None,
    *,
    resume: bool = False,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Train, compare and write everything under the run's folder.

    Args:
      config: What to do.
      folder: Where to; None chooses a new folder under `runs/`.
      resume: Continue what the folder holds instead of refusing it.
      console: Where progress and the table go.

    Returns:
      The content of summary.json, and `workdir`.

    Raises:
      ValueError: Before anything is written, if something asked for cannot be done.
      FloatingPointError: If a training diverged.
    """
    console = console or rich.console.Console(quiet=not hosts.is_first())
    place = os.path.abspath(folder or "runs")
    hosts.require_same("flags and workdir", f"{config} {place} {resume}")
    config.check()
    path = pathlib.Path(
        hosts.decide(lambda: str(workdir.claim(config, folder, resume)))
    )
    with compiling.cached(workdir.programs(path)) as keep:
        setup, legs = _prepare(config, path, console, found := [])
        keep()
        for write in found:
            write()
        summary = _train(config, path, setup, legs, console)
        keep()
    return summary


def dry_run(
    config: Config,
    folder: str | None = None,
    *,
    console: rich.console.Console | None = None,
) -> budget.Budget:
    """Tell what a run will take, from its shapes and one round; nothing is written.

    Args:
      config: What the run would do.
      folder: Where the run would go.
      console: Where the table goes.

    Raises:
      ValueError: If the run would be refused.
    """
    console = console or rich.console.Console()
    config.check()
    path = workdir.claim(config, folder, resume=False)
    with compiling.cached(workdir.programs(path)):
        setup, legs = _prepare(config, path, console, [])
        told = budget.tell(legs, setup, config)
    console.print(budget.to_table(told))
    return told


def _prepare(
    config: Config,
    path: pathlib.Path,
    console: rich.console.Console,
    later: list[Callable[[], None]],
) -> tuple[build.Setup, list[leg.Leg]]:
    """Read the data, choose the layout and compile all algorithms.

    What a probe found is written down by what `later` gets.
    """
    recipes = {name: build.build_algorithm(config, name) for name in config.legs}
    choose = functools.partial(probe.choose, later=later)
    if (path / "config.json").exists():
        choose = _as_before
    setup = hosts.together(lambda: build.build(workdir.recorded(config, path), choose))
    if hosts.several():
        hosts.require_same("data", build.fingerprint(setup))
    # Not in the threads below: it may compute with all processes.
    recipes = {name: each.prepared(setup.federation) for name, each in recipes.items()}
    chunk, devices = setup.execution.chunk or "all", setup.execution.num_devices
    count = f"{devices} device{'s' if devices > 1 else ''}"
    console.print(f"chunk {chunk} on {count} ({setup.layout})", style="dim")
    # The compiler is single-threaded for the most part; the machine is not.
    with (
        console.status("compiling"),
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        legs = hosts.together(
            lambda: list(
                pool.map(
                    lambda item: leg.prepare(*item, setup, config), recipes.items()
                )
            )
        )
    return setup, legs


def _as_before(config: Config, federation: Federation) -> tuple[Execution, str]:
    """Lay clients out as the run that is resumed did."""
    return build.by_platform(config, federation)[0], "as before"


def _train(
    config: Config,
    path: pathlib.Path,
    setup: build.Setup,
    legs: list[leg.Leg],
    console: rich.console.Console,
) -> dict[str, Any]:
    """Train one algorithm after another, and report."""
    hosts.decide(lambda: _write_config(path, config, setup))
    hosts.together(lambda: _check_shared(path))
    results = {}
    with _Progress(console, config) as progress:
        for each in legs:
            main = each.name == config.algorithm
            results[each.name] = leg.train(
                each,
                setup,
                config,
                path if main else path / "baselines" / each.name,
                progress=progress.update,
                warn=lambda text: console.print(
                    f"warning: {text}", style="yellow", markup=False, soft_wrap=True
                ),
            )
    summary = {
        **results[config.algorithm].summary,
        "baselines": {name: results[name].summary for name in config.baselines},
    }
    page = hosts.decide(lambda: _write_results(path, config, summary, results, setup))
    console.print(tables.comparison(summary))
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    return {**summary, "workdir": str(path)}


class Finished(NamedTuple):
    """A run as it ended, to look at or to go on from."""

    config: Config
    setup: build.Setup
    algorithm: Algorithm
    state: State


def load(folder: str | pathlib.Path) -> Finished:
    """Read a run back: its data, its algorithm and the state of its last round.

    Raises:
      ValueError: If the folder holds no finished run with a checkpoint.
    """
    path = pathlib.Path(folder)
    for name in ("summary.json", "config.json"):
        if not (path / name).exists():
            raise ValueError(f"{path} must be the folder of a finished run, no {name}")
    stored = json.loads((path / "config.json").read_text())["flags"]
    known = {field.name for field in dataclasses.fields(Config)}
    if foreign := set(stored) - known:
        raise ValueError(f"{path} is of another version, with flags {sorted(foreign)}")
    config = Config(**{**stored, "baselines": tuple(stored["baselines"])})
    # On the devices of the record if they are here, and on those that are if not.
    anywhere = dataclasses.replace(config, devices=0)
    setup = build.build(workdir.recorded(anywhere, path))
    return Finished(config, setup, *leg.restore(config.algorithm, setup, config, path))


def environment(setup: build.Setup) -> dict[str, Any]:
    """Describe versions and devices, for the record."""
    return {
        "python": platform.python_version(),
        **{n: _version(n) for n in ("fedgen", "jax", "flax", "optax", "numpy")},
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": setup.execution.num_devices,
        "processes": jax.process_count(),
        "chunk": setup.execution.chunk or "all",
        "layout": setup.layout,
    }


def _version(package: str) -> str:
    """Name the installed version; a checkout that is only in the path has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write_config(path: pathlib.Path, config: Config, setup: build.Setup) -> str:
    path.mkdir(parents=True, exist_ok=True)
    workdir.write_json(
        path / "config.json",
        {
            "flags": config_lib.to_json(config),
            "command": config_lib.command(config),
            "environment": environment(setup),
        },
    )
    return str(path)


def _check_shared(path: pathlib.Path) -> None:
    """Raise a `ValueError` if this process does not see what the first one wrote."""
    if not (path / "config.json").exists():
        raise ValueError(
            f"workdir {path} must lie on a file system that all processes share, got "
            f"one that process {jax.process_index()} does not see"
        )


def _write_results(
    path: pathlib.Path,
    config: Config,
    summary: dict[str, Any],
    results: dict[str, leg.Result],
    setup: build.Setup,
) -> str:
    """Write the summary and the report, and return where that is."""
    # Matplotlib takes a second to load, which no training should wait for.
    from fedgen.runs import plots, report

    workdir.write_json(path / "summary.json", summary)
    folder = path / "plots"
    folder.mkdir(exist_ok=True)
    history = {name: _history(result.lines) for name, result in results.items()}
    figures = {
        "Accuracy by round": plots.accuracy_by_round(
            history, folder / "accuracy_by_round.png"
        ),
        "Accuracy of each client": plots.client_gains(
            summary, folder / "accuracy_by_client.png"
        ),
        "Accuracy by communication": plots.accuracy_by_bytes(
            history, folder / "accuracy_by_bytes.png"
        ),
        "Partition": plots.partition(setup.counts, folder / "partition.png"),
    }
    described = {
        **config_lib.to_json(config),
        "command": config_lib.command(config),
        "environment": environment(setup),
    }
    page = path / "report.html"
    return str(report.write_report(page, described, summary, history, figures))


def _history(lines: list[Line]) -> list[Line]:
    """Keep the evaluated rounds, with the bytes up to each."""
    history, sent = [], 0
    for line in lines:
        sent += line["bytes_up"] + line["bytes_down"]
        if "personal_accuracy" in line:
            history.append(
                {
                    "round": line["round"],
                    "bytes": sent,
                    "personal_accuracy": line["personal_accuracy"]["mean"],
                    "validation_accuracy": line["validation_accuracy"],
                    "global_accuracy": line["global_accuracy"],
                    "loss": line.get("loss"),
                }
            )
    return history


class _Progress:
    """A live bar per algorithm: round, accuracy, bytes, time left."""

    def __init__(self, console: rich.console.Console, config: Config) -> None:
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:>16}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[accuracy]:>12}"),
            rich.progress.TextColumn("{task.fields[sent]:>11}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
        )
        self._tasks = {
            name: self._bars.add_task(
                name, total=config.rounds, start=False, accuracy="", sent=""
            )
            for name in config.legs
        }
        self._sent = dict.fromkeys(config.legs, 0)

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bars.stop()

    def update(self, line: Line) -> None:
        """Advance a bar to a round's line."""
        name = line["algorithm"]
        task = self._tasks[name]
        self._sent[name] += line["bytes_up"] + line["bytes_down"]
        fields = {"sent": f"{self._sent[name] / 2**20:.1f} MiB"}
        mean = line.get("personal_accuracy", {}).get("mean")
        if mean is not None:
            fields["accuracy"] = f"{100 * mean:.1f} %"
        self._bars.start_task(task)
        self._bars.update(task, completed=line["round"], **fields)
