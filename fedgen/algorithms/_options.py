"""Checks of the hyper-parameters that algorithms are built with.

Traced numbers pass: a sweep checks its values before it traces them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Require one of the choices.

    Raises:
      ValueError: If it is not one of the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_at_least(low: float, *, infinite: bool = False, **values: float) -> None:
    """Require values of at least `low`.

    Raises:
      ValueError: If a value is below `low` or NaN, or infinite where that has no
        meaning.
    """
    for name, value in _known(values):
        if not value >= low or (value == math.inf and not infinite):
            wanted = f">= {low}" if infinite else f">= {low} and finite"
            raise ValueError(f"{name} must be {wanted}, got {value}")


def check_positive(**values: float) -> None:
    """Require values above 0.

    Raises:
      ValueError: If a value is not positive, infinite or NaN.
    """
    for name, value in _known(values):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_share(*, zero: bool = True, **values: float) -> None:
    """Require values between 0 and 1.

    Raises:
      ValueError: If a value lies outside [0, 1], or is 0 where `zero` is not allowed.
    """
    for name, value in _known(values):
        if not 0 <= value <= 1 or not (zero or value):
            wanted = "[0, 1]" if zero else "(0, 1]"
            raise ValueError(f"{name} must be in {wanted}, got {value}")


def check_decay(**values: float) -> None:
    """Require values of at least 0 and below 1.

    Raises:
      ValueError: If a value lies outside [0, 1).
    """
    for name, value in _known(values):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


def _known(values: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    """Leave out what is traced."""
    return (item for item in values.items() if not isinstance(item[1], jax.core.Tracer))
