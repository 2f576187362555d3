"""Every notebook runs from top to bottom in a fresh kernel.

Notebooks are kept without outputs: they would go stale unseen, fill every diff, and
this execution already shows that the code and the library agree.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS]
)


def code_cells(path: pathlib.Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_a_quickstart_and_one_for_each_core():
    names = {"quickstart", "gaussian_fusion", "mixture_em", "parameter_diffusion"}
    assert names <= {path.stem for path in NOTEBOOKS}


@each_notebook
def test_a_core_needs_nothing_else_of_the_library(path):
    if path.stem == "quickstart":
        pytest.skip("a tour of the whole library")
    cells = [TransformerManager().transform_cell(c.source) for c in code_cells(path)]
    imported = set()
    for node in ast.walk(ast.parse("\n".join(cells))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
    ours = {name for name in imported if name.startswith(("fedgen", "experiments"))}
    assert ours == {"fedgen.aggregators"}
    assert imported - ours <= {
        "functools",
        "importlib.util",
        "jax",
        "jax.numpy",
        "matplotlib.pyplot",
        "numpy",
        "optax",
    }


@each_notebook
def test_kept_without_outputs(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in code_cells(path):
        assert not cell.outputs
        assert cell.execution_count is None


@each_notebook
@pytest.mark.parametrize("importable", [True, False])
def test_first_cell_installs_only_where_needed(path, importable, monkeypatch):
    calls = []
    find_spec = importlib.util.find_spec

    def pretend(name, *rest):
        if name != "fedgen":
            return find_spec(name, *rest)
        return SimpleNamespace(name=name) if importable else None

    monkeypatch.setattr(importlib.util, "find_spec", pretend)
    shell = SimpleNamespace(run_line_magic=lambda *call: calls.append(call))
    source = TransformerManager().transform_cell(code_cells(path)[0].source)
    exec(compile(source, path.name, "exec"), {"get_ipython": lambda: shell})
    assert calls == ([] if importable else [("pip", "install -q fedgen")])


@each_notebook
def test_runs(path, tmp_path, monkeypatch, quick_flags):
    # A user's kernel, not the settings of this test session, but for compile times.
    monkeypatch.setenv("XLA_FLAGS", quick_flags)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    # Nothing is installed from anywhere, and nothing is left behind.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    folder = tmp_path / "work"
    folder.mkdir()

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()  # Raises what a cell raises.

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not cells[0].outputs  # Nothing was installed.
    for cell in cells:
        assert cell.execution_count
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.text  # No warnings either.
        # What draws, shows.
        if "plt.show()" in cell.source or "Image(" in cell.source:
            assert any("image/png" in o.get("data", {}) for o in cell.outputs)
