"""Algorithms by name: conversion, and errors that name the remedy."""

from __future__ import annotations

import optax
import pytest

from fedgen import algorithms
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule

OPTIMIZER, SCHEDULE = optax.sgd(0.1), Schedule(8)


@pytest.mark.parametrize("name", algorithms.REGISTRY)
def test_every_default_survives_the_command_line(name):
    defaults = algorithms.hyperparameters(name)
    as_text = {
        key: "none" if value is None else str(value) for key, value in defaults.items()
    }
    for values in (None, defaults, as_text):
        built = algorithms.make(name, OPTIMIZER, SCHEDULE, values)
        assert isinstance(built, Algorithm)


def test_strings_become_what_the_algorithm_declares(monkeypatch):
    seen = {}

    def probe(
        optimizer,
        schedule,
        *,
        rate: float = 0.5,
        count: int = 1,
        flag: bool = False,
        name: str = "a",
        limit: int | None = None,
        transform: optax.GradientTransformation | None = None,
    ):
        del optimizer, schedule, transform
        seen.update(rate=rate, count=count, flag=flag, name=name, limit=limit)

    # Annotations of this module are strings; so are those of the algorithms.
    probe.__annotations__ = {
        "rate": float,
        "count": int,
        "flag": bool,
        "name": str,
        "limit": int | None,
        "transform": optax.GradientTransformation | None,
        "optimizer": object,
        "schedule": Schedule,
    }
    monkeypatch.setitem(algorithms.REGISTRY, "probe", probe)
    assert list(algorithms.hyperparameters("probe")) == [
        "rate",
        "count",
        "flag",
        "name",
        "limit",
    ]
    text = {"rate": "1e-2", "count": "3", "flag": "True", "name": "b", "limit": "4"}
    algorithms.make("probe", OPTIMIZER, SCHEDULE, text)
    assert seen == {"rate": 0.01, "count": 3, "flag": True, "name": "b", "limit": 4}
    algorithms.make("probe", OPTIMIZER, SCHEDULE, {"limit": "none", "rate": 2})
    assert seen["limit"] is None and seen["rate"] == 2.0
    assert type(seen["rate"]) is float
    for key, value in (
        ("rate", "fast"),
        ("rate", True),
        ("count", "1.5"),
        ("count", 1.5),
        ("count", True),
        ("flag", "yes"),
        ("flag", 1),
        ("name", 3),
        ("limit", "few"),
    ):
        with pytest.raises(ValueError, match=f"{key} must be .*got {value!r}"):
            algorithms.make("probe", OPTIMIZER, SCHEDULE, {key: value})


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ValueError, match="'fedpro', did you mean 'fedpro.*; there are"):
        algorithms.make("fedpro", OPTIMIZER, SCHEDULE)
    with pytest.raises(ValueError, match="'shrinkge', did you mean 'shrinkage'.*grid"):
        algorithms.make("pfedfda", OPTIMIZER, SCHEDULE, {"shrinkge": "1"})
    with pytest.raises(ValueError, match="unknown hyper-parameter 'mu'; .* has none"):
        algorithms.make("local_only", OPTIMIZER, SCHEDULE, {"mu": "1"})
    # Objects cannot come from a command line.
    with pytest.raises(ValueError, match="unknown hyper-parameter 'server_optimizer'"):
        algorithms.make("fedavg", OPTIMIZER, SCHEDULE, {"server_optimizer": "adam"})


def test_values_out_of_range_are_refused_by_the_algorithm():
    with pytest.raises(ValueError, match="mu must be >= 0"):
        algorithms.make("fedprox", OPTIMIZER, SCHEDULE, {"mu": "-1"})


def test_description_lists_everything():
    lines = algorithms.describe().splitlines()
    for name in algorithms.REGISTRY:
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
        for key in algorithms.hyperparameters(name):
            assert any(line.startswith(f"    {key}=") for line in lines)
    assert "    covariance_quirk=true" in lines


def test_the_control_has_the_head_of_pfedgm():
    control = algorithms.hyperparameters("fedavg_gaussian")
    method = algorithms.hyperparameters("pfedgm")
    assert control.items() <= method.items()
