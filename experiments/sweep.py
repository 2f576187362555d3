"""Train one algorithm with several seeds and settings at once, and print one table.

Takes the flags of experiments.run, for all runs; --baselines are not trained. Seeds
and numbers share one compiled program; other settings have a program each. The
best point of the grid is chosen on validation rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags

from experiments import run
from experiments.seeds import SEEDS
from fedgen import algorithms
from fedgen.runs import sweep

GRID = flags.DEFINE_multi_string(
    "grid",
    [],
    f"name=a,b,c: values of {', '.join(sweep.SWEPT)} or of a hyper-parameter of "
    "--algorithm; repeatable, for all combinations.",
)


def main(argv: Sequence[str]) -> None:
    """Sweep over what the flags say."""

    def work() -> None:
        asked = sweep.Sweep(
            **vars(run.read_config()),
            seeds=SEEDS.value,
            grid=run.read_grid(GRID.value),
        )
        result = sweep.sweep(asked, run.WORKDIR.value, resume=run.RESUME.value)
        sys.stdout.write(sweep.to_markdown(result["rows"]))
        print(f"Runs: {result['workdir']}")

    run.guard(argv, work, alone=True)


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = f"{__doc__}\n{algorithms.describe()}"
    app.run(main, flags_parser=run.parse)
