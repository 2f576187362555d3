"""The snippets of the README run as they stand."""

from __future__ import annotations

import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet):
    with jax.numpy_rank_promotion("allow"):
        exec(snippet, {})  # noqa: S102


def test_there_are_snippets_of_every_aggregator():
    for name in ("gaussian", "mixture", "diffusion"):
        line = f"from fedgen.aggregators import {name}"
        assert any(line in snippet for snippet in SNIPPETS)
