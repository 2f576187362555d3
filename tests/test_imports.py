"""Which part may know of which."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_the_import_contract_holds():
    linter = shutil.which("lint-imports", path=str(pathlib.Path(sys.executable).parent))
    linter = linter or shutil.which("lint-imports")
    if linter is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [linter, "--config", "setup.cfg", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        ("fedgen.aggregators.gaussian", ["flax", "optax", "orbax", "fedgen.core"]),
        ("fedgen.algorithms", ["flax", "matplotlib", "orbax"]),
        ("fedgen.runs.config", ["matplotlib", "orbax", "tensorboardX"]),
    ],
)
def test_importing_a_part_loads_no_more_than_it_needs(module, foreign):
    foreign = [*foreign, "tensorflow", "tensorflow_datasets"]
    code = (
        f"import sys, {module}; "
        f"found = [m for m in {foreign!r} if m in sys.modules]; sys.exit(str(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.strip() == "[]"
