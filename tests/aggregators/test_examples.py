"""Examples of docstrings, run as a reader would run them."""

from __future__ import annotations

import doctest

import jax
import pytest

from fedgen.aggregators import diffusion, gaussian, mixture, simplex


@pytest.mark.parametrize("module", [diffusion, gaussian, mixture, simplex])
def test_examples_run(module):
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        results = doctest.testmod(module)
    assert results.attempted and not results.failed
