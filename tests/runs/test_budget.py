"""What a dry run tells, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import io

import jax
import pytest
import rich.console

from fedgen.core import tree
from fedgen.runs import build, experiment, leg
from fedgen.runs.config import Config

MIB = 2**20


@pytest.fixture(scope="module")
def told(tiny_data, tmp_path_factory):
    """Make a dry run; return the configuration, its result and what it printed."""
    config = Config(
        algorithm="fedper",
        baselines=("local_only",),
        dataset=tiny_data,
        model="mlp",
        num_clients=5,
        rounds=3,
        batch_size=8,
        participation=0.6,
    )
    folder = tmp_path_factory.mktemp("dry")
    console = rich.console.Console(file=io.StringIO(), width=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(leg, "train", pytest.fail)
        found = experiment.dry_run(config, console=console)
    assert list(folder.iterdir()) == []
    return config, found, console.file.getvalue()


def test_sizes_are_those_of_the_arrays(told):
    config, found, _ = told
    setup = build.build(config)
    body, head = 4 * (64 * 200 + 200), 4 * (200 * 4 + 4)
    # The padding that makes clients divide by the devices holds a state too.
    clients = setup.federation.cohorts[0].num_clients
    assert found.estimates["local_only"].clients == clients * (body + head)
    assert found.estimates["fedper"].clients == clients * head
    assert found.estimates["fedper"].server == body
    for each in found.estimates.values():
        pool = tree.num_bytes(setup.federation.pool)
        assert pool <= each.pool <= pool + 4 * (480 + 8 * clients)
        assert each.chunk > body and each.evaluation > 0
    assert found.estimates["fedper"].bytes_down == 3 * body
    assert found.estimates["fedper"].bytes_up == 3 * (body + 4)


def test_the_parts_add_up(told):
    config, found, printed = told
    for each in found.estimates.values():
        assert each.round_seconds > 0 and each.evaluation_seconds > 0
        # Rounds 2 and 3 are evaluated.
        expected = 3 * each.round_seconds + 2 * each.evaluation_seconds
        assert each.training_seconds == pytest.approx(expected)
        state = each.clients + each.server
        assert state <= each.checkpoint <= state + 100
        largest = max(each.chunk, each.evaluation, each.checkpoint)
        assert each.working == state + largest
    fedper, local = found.estimates.values()
    assert found.seconds == pytest.approx(
        max(fedper.compile_seconds, local.compile_seconds)
        + fedper.training_seconds
        + local.training_seconds
    )
    assert min(found.compiled, found.held) >= 100 * MIB
    run = found.held + local.working
    assert found.peak == max(found.compiled, run) + found.files
    assert local.working > fedper.working and 0 < found.files < 100 * MIB
    for name in ("fedper", "local_only", "peak memory", "a round", "MiB up"):
        assert name in printed


def test_a_dry_run_refuses_what_a_run_would(told, monkeypatch):
    config = dataclasses.replace(told[0], baselines=())
    monkeypatch.setattr(leg.os, "sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="smaller --chunk"):
        experiment.dry_run(config)
    assert not jax.config.jax_compilation_cache_dir
