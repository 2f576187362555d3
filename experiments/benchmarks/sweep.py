"""Time a sweep against the same runs launched one by one, and compare what they find.

Each side starts from the command line, as a user would, in turns on the same machine.
Other flags are handed on to both sides.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app, flags

RATES = flags.DEFINE_list(
    "rates", ["0.02", "0.05", "0.1"], "Values of --learning_rate, the grid."
)
RUNS_SEEDS = flags.DEFINE_integer("run_seeds", 2, "Number of seeds.", lower_bound=1)
COMMON = flags.DEFINE_string(
    "common",
    "--algorithm=fedavg --model=mlp --num_clients=20",
    "Flags of experiments.run for both sides.",
)


def launch(*args: str) -> float:
    """Run a module of experiments to its end; return the seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *args], check=True, capture_output=True)
    return time.perf_counter() - start


def measure(
    common: Sequence[str], rates: Sequence[str], seeds: int, folder: pathlib.Path
) -> tuple[list[float], float, float]:
    """Time both sides.

    Returns:
      Seconds of each run, of the sweep, and the largest difference of the accuracies
      that the two sides find, in [0, 1].
    """
    alone, accuracy = [], []
    for rate, seed in itertools.product(rates, range(seeds)):
        place = folder / f"{rate}-{seed}"
        alone.append(
            launch(
                "experiments.run",
                *common,
                "--baselines=",
                f"--learning_rate={rate}",
                f"--seed={seed}",
                f"--workdir={place}",
            )
        )
        summary = json.loads((place / "summary.json").read_text())
        accuracy.append(summary["personal_accuracy"]["mean"])
    together = launch(
        "experiments.sweep",
        *common,
        f"--seeds={seeds}",
        f"--grid=learning_rate={','.join(rates)}",
        f"--workdir={folder / 'sweep'}",
    )
    rows = json.loads((folder / "sweep" / "sweep.json").read_text())["rows"]
    found = [a for row in rows for a in row["personal_accuracy"]["per_seed"]]
    gap = max(abs(a - b) for a, b in zip(found, accuracy, strict=True))
    return alone, together, gap


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    with tempfile.TemporaryDirectory() as folder:
        alone, together, gap = measure(
            COMMON.value.split(), RATES.value, RUNS_SEEDS.value, pathlib.Path(folder)
        )
    each = f"{len(alone)} runs of {min(alone):.1f} to {max(alone):.1f} s"
    print("| how | seconds | times the sweep |")
    print("|---|---:|---:|")
    print(f"| one by one, {each} | {sum(alone):.1f} | {sum(alone) / together:.2f} |")
    print(f"| one sweep | {together:.1f} | 1 |")
    print(f"\nLargest difference of their accuracies: {100 * gap:.2f} points")


if __name__ == "__main__":
    app.run(main)
