"""Tune several algorithms alike, run them over several seeds, print one table.

Takes the flags of experiments.run, for all algorithms, and keeps every run under
--workdir: finished ones are not run again, so a killed comparison just continues.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import rich.console
from absl import app, flags

from experiments import run
from experiments.seeds import SEEDS
from fedgen.core import hosts
from fedgen.runs import compare

ALGORITHMS = flags.DEFINE_list(
    "algorithms",
    ["pfedgm", "fedavg_gaussian", "local_only", "fedavg"],
    "Algorithms to compare, the one of interest first; name:hyperparameter=value:... "
    "fixes some, so that variants of one algorithm can stand side by side.",
)
GRID = flags.DEFINE_multi_string(
    "grid",
    [],
    "name=a,b,c: values to choose from on validation rows of the first seed, of a flag "
    "or, as algorithm.hyperparameter, of one algorithm; repeatable.",
)


def main(argv: Sequence[str]) -> None:
    """Compare what the flags say."""

    def work() -> None:
        folder = pathlib.Path(run.WORKDIR.value or "runs/compare")
        rows = compare.compare(
            run.read_config(),
            ALGORITHMS.value,
            SEEDS.value,
            {
                name: values.split(",")
                for name, values in run.read_grid(GRID.value).items()
            },
            folder,
            rich.console.Console(stderr=True, quiet=not hosts.is_first()),
        )
        table = compare.to_markdown(rows)
        if hosts.is_first():
            (folder / "comparison.md").write_text(table + "\n")
            sys.stdout.write(table + "\n")

    run.guard(argv, work)


if __name__ == "__main__":
    app.run(main, flags_parser=run.parse)
