"""Time a sweep against the same runs launched one by one, and compare what they find.

Each side starts from the command line, as a user would, in turns on the same machine.
Other flags are handed on to both sides.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from experiments.seeds import SEEDS

RATES = flags.DEFINE_list(
    "rates", ["0.02", "0.05", "0.1"], "Values of --learning_rate, the grid."
)
COMMON = flags.DEFINE_string(
    "common",
    "--algorithm=fedavg --model=mlp --num_clients=20",
    "Flags of experiments.run for both sides.",
)


def launch(*args: str) -> np.ndarray:
    """Run a module to its end; return the seconds it took, and those of all cores."""
    start = time.perf_counter(), _busy()
    subprocess.run([sys.executable, "-m", *args], check=True, capture_output=True)
    return np.array([time.perf_counter() - start[0], _busy() - start[1]])


def _busy() -> float:
    """Return the processor seconds of all programs that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(
    common: Sequence[str], rates: Sequence[str], seeds: int, folder: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, float]:
    """Time both sides.

    Returns:
      Seconds as of `launch`, of the runs `[r, 2]` and of the sweep `[2]`, and the
      largest difference of the accuracies that the two sides find, in [0, 1].
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
    return np.array(alone), together, gap


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    with tempfile.TemporaryDirectory() as folder:
        alone, together, gap = measure(
            COMMON.value.split(), RATES.value, SEEDS.value, pathlib.Path(folder)
        )
    one_by_one = alone.sum(axis=0)
    print("| how | seconds | processor seconds |")
    print("|---|---:|---:|")
    print(
        f"| {len(alone)} runs one by one | {one_by_one[0]:.1f} | {one_by_one[1]:.1f} |"
    )
    print(f"| one sweep | {together[0]:.1f} | {together[1]:.1f} |")
    ratio = one_by_one / together
    print(f"| times faster | {ratio[0]:.2f} | {ratio[1]:.2f} |")
    print(f"\nLargest difference of their accuracies: {100 * gap:.2f} points")


if __name__ == "__main__":
    app.run(main)
