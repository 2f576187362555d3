"""What is compiled quickly computes the same, with any release of the compiler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.core import compiling

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("options", [compiling._QUICK, {"xla_no_such_option": False}])
def test_compile_ahead(options, quick, monkeypatch):
    monkeypatch.setattr(compiling, "_QUICK", options)
    fn = jax.jit(lambda x, y: jnp.tanh(x) @ y.T)
    shape = jax.ShapeDtypeStruct((3, 4), X.dtype)
    compiled = compiling.compile_ahead(fn, X, shape, quick=quick)
    expected = np.tanh(np.asarray(X, np.float64)) @ np.asarray(X, np.float64).T
    np.testing.assert_allclose(compiled(X, X), expected, rtol=1e-5, atol=1e-6)


def test_unknown_options_are_told_from_known_ones():
    assert compiling._known(xla_cpu_enable_fast_math=False)
    assert not compiling._known(xla_no_such_option=False)
