"""How much the compiler is asked for, and what it need not do twice."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# JAX reports when a cache is opened and closed; nobody needs to know.
logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)

# XLA's newer emitters of fused loops make training of auto-encoders a third faster,
# but take up to twice the time, and twice the memory, to compile.
_QUICK = {"xla_cpu_use_fusion_emitters": False}
_LIMIT = 2**30  # bytes of a cache, some thousand configurations


def compile_ahead(fn: Callable, *args: Any, quick: bool) -> Callable:
    """Compile a jitted function for these arguments, or shapes of them.

    Args:
      fn: What `jax.jit` returned.
      *args: Its arguments.
      quick: Whether to compile in half the time, for what is called a few times only.
        That makes a difference on a CPU.
    """
    quick = quick and jax.default_backend() == "cpu" and _known(**_QUICK)
    return fn.lower(*args).compile(compiler_options=_QUICK if quick else None)


@functools.cache
def _known(**options: Any) -> bool:
    """Tell whether this release of the compiler has the options."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def cached(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Have JAX reuse the compiled programs in a folder; yield what adds the new ones.

    New programs wait in a temporary folder, so that nothing is left of a run that is
    refused. They are added by renames, since JAX itself writes in place and never
    replaces what a kill cut short. If JAX was given a cache of its own, or none, by
    its settings, it keeps that.
    """
    given = jax.config.jax_compilation_cache_dir
    if given or not jax.config.jax_enable_compilation_cache:
        yield lambda: None
        return
    with tempfile.TemporaryDirectory() as name:
        waiting = pathlib.Path(name)
        for entry in folder.glob("*-cache"):
            (waiting / entry.name).symlink_to(entry.absolute())
        settings = {
            "jax_compilation_cache_dir": name,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            # They would make the name of the temporary folder a part of every key.
            "jax_persistent_cache_enable_xla_caches": "none",
        }
        before = {key: getattr(jax.config, key) for key in settings}
        try:
            _configure(settings)
            yield functools.partial(_add, waiting, folder)
        finally:
            _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def _add(waiting: pathlib.Path, folder: pathlib.Path) -> None:
    """Add what is new to a cache, and drop what was not used for longest."""
    # A full disk, or another run that tidies up: neither is worth a run.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for new in waiting.glob("*-cache"):
            if not new.is_symlink():
                partial = folder / f"{new.name}.{os.getpid()}"
                shutil.copyfile(new, partial)
                os.replace(partial, folder / new.name)
                new.unlink()
                new.symlink_to((folder / new.name).absolute())
        sizes = {entry: entry.stat() for entry in folder.iterdir()}
        excess = sum(size.st_size for size in sizes.values()) - _LIMIT
        for entry in sorted(sizes, key=lambda entry: sizes[entry].st_atime):
            if excess <= 0:
                break
            entry.unlink()
            excess -= sizes[entry].st_size
