"""The curve over clients at toy sizes: every figure is there. No times."""

from __future__ import annotations

import os
import subprocess
import sys


def test_it_prints_a_row_for_every_number_of_clients_and_draws_it(
    tmp_path, quick_flags
):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.benchmarks.scale", "--clients=20"),
            *("--algorithms=fedper", "--participants=4", "--rounds=2", "--repeats=1"),
            *("--devices=1", f"--workdir={tmp_path / 'curve'}"),
        ],
        env={**os.environ, "XLA_FLAGS": quick_flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    name, _, heading, _, line, _ = done.stdout.splitlines()
    assert name == "fedper"
    row = [cell.strip() for cell in line.split("|")[1:-1]]
    assert len(row) == heading.count("|") - 1
    assert all(float(cell.split()[0]) >= 0 for cell in row)
    assert row[0] == "20" and row[4] == "1 [1, 1]"
    assert float(row[3].split()[0]) > 0  # a round
    # Heads of 10 x (32 + 1) float32 are 1,320 bytes a client.
    assert float(row[5]) == round(20 * 1320 / 2**20, 1)
    assert (tmp_path / "curve" / "scale.png").read_bytes().startswith(b"\x89PNG")
