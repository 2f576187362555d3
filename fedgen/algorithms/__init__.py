"""The algorithms by name, with their hyper-parameters read off their signatures."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from fedgen.algorithms.ccvr import ccvr
from fedgen.algorithms.fedavg import fedadam, fedavg, fedyogi
from fedgen.algorithms.fedavg_ft import fedavg_ft
from fedgen.algorithms.fedavg_gaussian import fedavg_gaussian
from fedgen.algorithms.fedem import fedem
from fedgen.algorithms.fedgmi import fedgmi
from fedgen.algorithms.fedgmm import fedgmm
from fedgen.algorithms.fedper import fedper
from fedgen.algorithms.fedproto import fedproto
from fedgen.algorithms.fedprox import fedprox
from fedgen.algorithms.ifca import ifca
from fedgen.algorithms.local_only import local_only
from fedgen.algorithms.pfedfda import pfedfda
from fedgen.algorithms.pfedgm import pfedgm
from fedgen.algorithms.pfedgpa import pfedgpa
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule

Factory = Callable[..., Algorithm]  # (optimizer, schedule, *, hyper-parameters)

REGISTRY: dict[str, Factory] = {
    factory.__name__: factory
    for factory in (
        ccvr,
        fedadam,
        fedavg,
        fedavg_ft,
        fedavg_gaussian,
        fedem,
        fedgmi,
        fedgmm,
        fedper,
        fedprox,
        fedproto,
        fedyogi,
        ifca,
        local_only,
        pfedfda,
        pfedgm,
        pfedgpa,
    )
}

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a name"}


def make(
    name: str,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Algorithm:
    """Build an algorithm by name.

    Args:
      name: A key of `REGISTRY`.
      optimizer: Local optimiser.
      schedule: Local epochs or steps, and minibatch.
      hyperparameters: Values by name; strings, as from a command line, are
        converted to the type that the algorithm declares.

    Raises:
      ValueError: If the algorithm or a hyper-parameter is unknown, a value is of the
        wrong type, or the algorithm refuses it.
    """
    values = settings(name, hyperparameters)
    return REGISTRY[name](optimizer, schedule, **values)


def hyperparameters(name: str) -> dict[str, Any]:
    """Return the hyper-parameters of an algorithm and their defaults.

    Raises:
      ValueError: If the algorithm is unknown.
    """
    return settings(name)


def settings(name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all hyper-parameters of an algorithm, given or by default.

    Raises:
      ValueError: If one is unknown or of the wrong type.
    """
    known = _declared(name)
    values = {key: default for key, (_, default) in known.items()}
    for key, value in (given or {}).items():
        if key not in known:
            owned = f"{name} has {', '.join(known)}" if known else f"{name} has none"
            raise ValueError(
                f"unknown hyper-parameter {key!r}{_nearest(key, known)}; {owned}"
            )
        values[key] = _convert(key, value, known[key][0])
    return values


def describe() -> str:
    """List all algorithms, each with its hyper-parameters and their defaults."""
    lines = []
    for name, factory in REGISTRY.items():
        summary = inspect.getdoc(factory).splitlines()[0].removeprefix("Build ")
        lines.append(f"{name}: {summary}")
        lines += [
            f"    {key}={_show(default)}"
            for key, default in hyperparameters(name).items()
        ]
    return "\n".join(lines)


def _declared(name: str) -> dict[str, tuple[tuple[type, ...], Any]]:
    """Return types and default of everything that a command line could set."""
    if name not in REGISTRY:
        raise ValueError(
            f"unknown algorithm {name!r}{_nearest(name, REGISTRY)}; "
            f"there are {', '.join(REGISTRY)}"
        )
    factory = REGISTRY[name]
    hints = typing.get_type_hints(factory)
    declared = {}
    for key, parameter in inspect.signature(factory).parameters.items():
        hint = hints[key]
        union = isinstance(hint, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        if parameter.kind is parameter.KEYWORD_ONLY and set(kinds) <= {
            *_SCALARS,
            type(None),
        }:
            declared[key] = (kinds, parameter.default)
    return declared


def _convert(key: str, value: Any, kinds: tuple[type, ...]) -> Any:
    if float in kinds and isinstance(value, jax.core.Tracer):
        return value  # one of a sweep's, which were converted before
    if type(None) in kinds and value in (None, "none"):
        return None
    (kind,) = (kind for kind in kinds if kind is not type(None))
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(value, str) or (kind is float and type(value) is int):
            return kind(value)
    except (KeyError, ValueError):
        pass
    else:
        if type(value) is kind:
            return value
    wanted = _SCALARS[kind] + (" or none" if type(None) in kinds else "")
    raise ValueError(f"{key} must be {wanted}, got {value!r}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _show(value: Any) -> str:
    return str(value) if isinstance(value, str) else repr(value).lower()
