"""How much the compiler is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# XLA's newer emitters of fused loops make training of auto-encoders a third faster,
# but take up to twice the time, and twice the memory, to compile.
_QUICK = {"xla_cpu_use_fusion_emitters": False}


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
