"""What is compiled quickly computes the same, with any release of the compiler."""

from __future__ import annotations

import logging
import os
import warnings

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


def compile_again():
    """Compile as a process does that has compiled nothing yet."""
    jax.clear_caches()
    fn = jax.jit(lambda x: jnp.tanh(x) @ x.T)
    compiled = compiling.compile_ahead(fn, X, quick=True)
    assert compiled.memory_analysis().argument_size_in_bytes == X.nbytes
    np.testing.assert_allclose(compiled(X), np.tanh(X) @ np.asarray(X).T, rtol=1e-5)


def test_a_second_run_compiles_nothing(cache_events, tmp_path, caplog):
    folder = tmp_path / "runs" / "cache"
    caplog.set_level(logging.INFO)
    with compiling.cached(folder) as keep:
        compile_again()
        assert list(tmp_path.iterdir()) == []  # It could still be refused.
        keep()
        kept = sorted(path.name for path in folder.iterdir())
        assert len(kept) == cache_events["cache_misses"] > 0
        keep()
    assert not cache_events["cache_hits"] and not jax.config.jax_compilation_cache_dir
    misses = cache_events["cache_misses"]
    with compiling.cached(folder) as keep:
        compile_again()
        keep()
    assert cache_events["cache_misses"] == misses and cache_events["cache_hits"] >= 1
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert not caplog.records, "a run says nothing on stderr"


def test_a_refused_run_leaves_nothing(cache_events, tmp_path):
    with pytest.raises(ValueError), compiling.cached(tmp_path / "cache"):
        compile_again()
        raise ValueError("refused")
    assert cache_events["cache_misses"] and list(tmp_path.iterdir()) == []
    assert not jax.config.jax_compilation_cache_dir


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_program_is_compiled_anew(cache_events, tmp_path, size):
    with compiling.cached(tmp_path) as keep:
        compile_again()
        keep()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:size])
    with warnings.catch_warnings(), compiling.cached(tmp_path) as keep:
        warnings.simplefilter("ignore")
        compile_again()
        keep()
    assert not cache_events["cache_hits"]


def test_a_full_cache_drops_what_was_not_used_for_longest(tmp_path, monkeypatch):
    waiting, folder = tmp_path / "waiting", tmp_path / "cache"
    waiting.mkdir()
    folder.mkdir()
    for age, name in enumerate(("new", "old", "older")):
        (folder / f"{name}-cache").write_bytes(bytes(100))
        os.utime(folder / f"{name}-cache", (1e9 - age, 1e9 - 5))
    (waiting / "fresh-cache").write_bytes(bytes(100))
    monkeypatch.setattr(compiling, "_LIMIT", 250)
    compiling._add(waiting, folder)
    assert {p.name for p in folder.iterdir()} == {"fresh-cache", "new-cache"}
    monkeypatch.setattr(compiling, "_LIMIT", 0)
    compiling._add(waiting, folder)
    assert not list(folder.iterdir())


def test_a_program_that_a_kill_cut_short_is_none(tmp_path, monkeypatch):
    waiting, folder = tmp_path / "waiting", tmp_path / "cache"
    waiting.mkdir()
    (waiting / "new-cache").write_bytes(bytes(100))

    def cut_short(source, target):
        target.write_bytes(bytes(50))
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling.shutil, "copyfile", cut_short)
    with pytest.raises(KeyboardInterrupt):
        compiling._add(waiting, folder)
    assert not list(folder.glob("*-cache"))


def test_a_cache_of_the_users_own_is_left_alone(cache_events, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        with compiling.cached(tmp_path / "cache") as keep:
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
            keep()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not (tmp_path / "cache").exists()
