"""Train a federated algorithm and compare it with its baselines.

With no flag: pFedGM on an embedded excerpt of Fashion-MNIST, 20 clients,
Dirichlet(0.1), beside local-only training and FedAvg.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags

from fedgen import algorithms
from fedgen.core import execution, hosts
from fedgen.runs import experiment
from fedgen.runs.config import Config

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default a new one under runs/."
)
RESUME = flags.DEFINE_bool("resume", False, "Continue the run that the folder holds.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print what the run would take of memory, seconds and bytes; write nothing.",
)
COMPILATION_CACHE = flags.DEFINE_bool(
    "compilation_cache",
    True,
    "Reuse compiled programs, in .jax_cache beside the folder of the run.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, for a run on several hosts; auto if SLURM, Kubernetes, "
    "Open MPI or a TPU pod tells of it and of the other processes.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes that --coordinator waits for, one a host."
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of --num_processes this one is, from 0."
)
SET = flags.DEFINE_multi_string(
    "set", [], "name=value, a hyper-parameter of --algorithm; repeatable."
)

_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    type(None): flags.DEFINE_string,
}
for field in dataclasses.fields(Config):
    if field.name != "hyperparameters":
        default = getattr(Config(), field.name)
        text = field.metadata["help"]
        if isinstance(default, tuple):
            flags.DEFINE_list(field.name, list(default), text)
        else:
            _DEFINE[type(default)](field.name, default, text)


def read_config() -> Config:
    """Collect the flags.

    Raises:
      ValueError: If a `--set` is not of the form name=value.
    """
    pairs = [text.partition("=") for text in SET.value]
    for text, (name, equals, _) in zip(SET.value, pairs, strict=True):
        if not (name and equals):
            raise ValueError(f"--set must be name=value, got {text!r}")
    values = {
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(Config)
        if field.name != "hyperparameters"
    }
    values["baselines"] = tuple(name for name in values["baselines"] if name)
    own = {name: value for name, _, value in pairs}
    return Config(**values, hyperparameters=own)


def read_grid(texts: Sequence[str]) -> dict[str, str]:
    """Read what follows each `--grid`, name=a,b,c.

    Raises:
      ValueError: If one is not of that form, or a name comes twice.
    """
    grid = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not name or "" in values.split(","):
            raise ValueError(f"--grid must be name=a,b,c, got {text!r}")
        if name in grid:
            raise ValueError(f"--grid must have each name once, got {name} twice")
        grid[name] = values
    return grid


def main(argv: Sequence[str]) -> None:
    """Run what the flags say."""

    def work() -> None:
        if DRY_RUN.value:
            experiment.dry_run(read_config(), WORKDIR.value)
        else:
            experiment.run(read_config(), WORKDIR.value, resume=RESUME.value)

    guard(argv, work, alone=DRY_RUN.value, can_dry_run=True)


def guard(
    argv: Sequence[str],
    work: Callable[[], object],
    *,
    alone: bool = False,
    can_dry_run: bool = False,
    devices: int = 0,
) -> None:
    """Do the work; exit with 2 for a wrong request, 1 for a failed training.

    With `alone`, the work is none for several processes. It takes as many `devices`, or
    those of the flag.
    """
    try:
        if len(argv) > 1:
            raise ValueError(f"flags begin with --, got {' '.join(argv[1:])}")
        if DRY_RUN.value and not can_dry_run:
            raise ValueError("dry_run is for one run, of experiments.run")
        if not COMPILATION_CACHE.value:
            jax.config.update("jax_enable_compilation_cache", False)
        # Where no accelerator is, JAX tells of every one that it looked for.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
        if alone and COORDINATOR.value is not None:
            raise ValueError("coordinator must not be given here: one process does it")
        execution.use_cores(devices or flags.FLAGS.devices)
        hosts.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        work()
    except (ValueError, FloatingPointError) as error:
        _fail(error, 2 if isinstance(error, ValueError) else 1)
    except Exception as error:
        if hosts.several():
            hosts.leave(error)
        raise


def parse(argv: Sequence[str]) -> list[str]:
    """Read the command line; exit with 2 if a flag is unknown or ill-typed."""
    try:
        return flags.FLAGS(argv, known_only=False)
    except flags.Error as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> NoReturn:
    """Exit with the error on one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def cli() -> None:
    """Enter from the command line."""
    sys.modules["__main__"].__doc__ = f"{__doc__}\n{algorithms.describe()}"
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
