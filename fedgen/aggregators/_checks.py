"""Checks of arguments that all aggregators share.

Shapes are checked always; values only where they are known, which is outside of `jit`,
`vmap` and `grad`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def check_shapes(**arrays: tuple[jax.Array, str]) -> None:
    """Check ranks, and that a letter stands for one size in all shapes."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, letters) in arrays.items():
        shape = jnp.shape(array)
        expected = f"[{', '.join(letters)}]"
        if len(shape) != len(letters):
            raise ValueError(f"{name} must have shape {expected}, got {shape}")
        for letter, size in zip(letters, shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if size != known:
                raise ValueError(
                    f"{name} must have shape {expected} with {letter} = {known} as in "
                    f"{owner}, got {shape}"
                )


def check_number(name: str, value, lower: float, *, strict: bool = False) -> None:
    """Check a bound of a Python number; arrays and tracers pass unchecked."""
    if not isinstance(value, (int, float)):
        return
    if not (value > lower if strict else value >= lower):
        sign = ">" if strict else ">="
        raise ValueError(f"{name} must be {sign} {lower}, got {value}")


def is_known(*arrays) -> bool:
    """Tell whether values can be looked at, which tracers' cannot."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_values(name: str, array, rule: str, valid: Callable) -> None:
    """Check `valid(array) -> bool [...]`, entry by entry, where values are known."""
    if not is_known(array):
        return
    array = np.asarray(array)
    wrong = ~valid(array)
    if wrong.any():
        raise ValueError(
            f"{name} must be {rule}, got {array[wrong][0]} "
            f"in {wrong.sum()} of {array.size} entries"
        )


def check_finite(**arrays) -> None:
    """Check that arrays hold neither NaN nor infinity, where values are known."""
    for name, array in arrays.items():
        check_values(name, array, "finite", np.isfinite)


def check_covariances(*, definite: bool, **matrices) -> None:
    """Check matrices `[..., d, d]`, up to rounding, where values are known."""
    for name, matrix in matrices.items():
        if not is_known(matrix):
            continue
        check_finite(**{name: matrix})
        matrix = np.asarray(matrix, np.float64)
        largest = np.max(np.abs(matrix), axis=(-2, -1), initial=0)
        skew = np.max(np.abs(matrix - np.swapaxes(matrix, -2, -1)), initial=0)
        if skew > 1e-3 * np.max(largest, initial=0):
            raise ValueError(f"{name} must be symmetric, got entries {skew:.2g} apart")
        smallest = np.linalg.eigvalsh(matrix)[..., 0]
        wrong = smallest <= 0 if definite else smallest < -1e-3 * largest
        if np.any(wrong):
            kind = "positive definite" if definite else "positive semi-definite"
            raise ValueError(
                f"{name} must be {kind}, got an eigenvalue {np.min(smallest):.2g}"
            )
