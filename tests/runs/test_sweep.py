"""Sweeps: the numbers of single runs, one program, kills, divergence, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fedgen.core import rounds
from fedgen.core.algorithm import State
from fedgen.core.checkpoint import Checkpoints, digest
from fedgen.runs import build, leg, sweep
from fedgen.runs.sweep import Sweep

ROUNDS, EVERY = 5, 2
COMPILED = "/jax/core/compile/backend_compile_duration"


class Killed(Exception):
    """Stands for a kill."""


def asked(**flags):
    return Sweep(
        **{
            "algorithm": "fedprox",
            "baselines": (),
            "model": "mlp4",
            "num_clients": 5,
            "participation": 0.6,
            "dropout": 0.2,
            "rounds": ROUNDS,
            "batch_size": 16,
            "eval_every": EVERY,
            "checkpoint_every": EVERY,
            "seeds": 2,
            **flags,
        }
    )


def groups_of(request):
    points = sweep.list_points(request)
    return sweep.to_groups(points, sweep.deal(points))


def train(case, folder, group=None):
    return sweep.train(
        group or case.group,
        folder,
        folder / "checkpoints",
        progress=lambda count: None,
        warn=pytest.fail,
    )


def files_of(folder):
    """Read what the runs wrote, apart from the memory that this process took."""
    files = {path: path.read_text() for path in sorted(folder.glob("runs/*/*"))}
    return {
        str(path.relative_to(folder)): "\n".join(
            line for line in text.splitlines() if "peak_memory_bytes" not in line
        )
        for path, text in files.items()
    }


def digest_of(case, folder):
    with Checkpoints((folder / "checkpoints").absolute()) as checkpoints:
        found, _ = checkpoints.restore(
            State(jax.numpy.int32(0), (), (case.group.leg.like,)), pytest.fail
        )
    assert int(found.round) == ROUNDS
    return digest(found)


@pytest.fixture(scope="module")
def case(tiny_data, tmp_path_factory):
    """Five runs on two devices, so one place is padding; the last run diverges."""
    request = asked(
        dataset=tiny_data,
        grid={"learning_rate": "0.05,0.2,1e30", "mu": "0.5"},
    )
    points = sweep.list_points(request)[:5]
    setups = sweep.deal(points)
    names = []

    def listen(event, seconds, **info):
        if event == COMPILED:
            names.append(info["fun_name"])

    (runs,) = sweep.to_groups(points, setups)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        group = sweep.prepare(runs, setups, 2)
        case = SimpleNamespace(points=runs, setups=setups, group=group, names=names)
        case.folder = tmp_path_factory.mktemp("whole")
        case.summaries = train(case, case.folder)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    case.files = files_of(case.folder)
    case.digest = digest_of(case, case.folder)
    return case


def test_seeds_and_numbers_share_three_programs(case):
    mine = [name for name in case.names if "sharded" in name]
    assert len(mine) == 3, case.names  # a first state, a block, an evaluation
    assert case.group.points[0].scalars == {"learning_rate": 0.05, "mu": 0.5}
    assert case.group.num_runs == 6


def test_what_seeds_share_is_held_once(case):
    federations = [case.setups[seed, "mlp4"].federation for seed in (0, 1)]
    stacked, differs = sweep.stack(federations)
    assert not any(jax.tree.leaves(differs.pool)) and not differs.cohorts[0].ids
    assert differs.cohorts[0].order and differs.cohorts[0].train.size
    assert stacked.pool.x.shape == federations[0].pool.x.shape
    np.testing.assert_array_equal(
        stacked.cohorts[0].order[1], federations[1].cohorts[0].order
    )


def assert_close(a, b):
    """Compare two lines or summaries, numbers to rounding and counts exactly."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, float):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        else:
            assert x == y


def test_every_run_equals_the_one_launched_alone(case, tmp_path):
    compiled = None
    for point in case.points[:4]:
        config = point.config
        setup = build.build(dataclasses.replace(config, devices=1))
        algorithm = build.build_algorithm(config, "fedprox")
        if config.seed == 0:
            compiled = leg.prepare("fedprox", algorithm, setup, config)
        key = leg.run_keys(config.seed)[0]
        alone = compiled._replace(
            init=lambda a=algorithm, s=setup, k=key: rounds.init_state(
                a, s.federation, k
            )
        )
        found = leg.train(
            alone,
            setup,
            config,
            tmp_path / point.name,
            progress=lambda line: None,
            warn=pytest.fail,
        )
        text = (case.folder / "runs" / point.name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert_close(lines, found.lines)
        del found.summary["seconds"], found.summary["peak_memory_bytes"]
        ours = dict(case.summaries[point.name])
        del ours["peak_memory_bytes"]
        assert_close(ours, found.summary)
    accuracies = {
        case.summaries[point.name]["personal_accuracy"]["mean"]
        for point in case.points[:4]
    }
    assert len(accuracies) > 2, "settings and seeds should matter"


def test_a_diverged_run_ends_and_the_others_go_on(case):
    last = case.points[4]
    assert last.config.learning_rate == 1e30
    summary = case.summaries[last.name]
    assert "not finite" in summary["diverged"] and summary["round"] < ROUNDS
    rows = sweep.to_rows(case.points, case.summaries)
    assert [bool(row["diverged"]) for row in rows] == [False, False, True]
    assert rows[2]["personal_accuracy"]["mean"] is None
    table = sweep.to_markdown(rows)
    assert "diverged with seed 0" in table.splitlines()[-1]
    assert table.count("best on validation") == 1


@pytest.mark.parametrize("round_", [1, 3, 5])
def test_killed_and_resumed_equals_never_killed(case, tmp_path, round_):
    """The kill comes between the lines of two runs, before the checkpoint."""
    append = sweep.workdir.append_lines

    def half(path, lines):
        append(path, lines)
        if lines[-1]["round"] >= round_ and "seed=1" in path.parent.name:
            path.write_bytes(path.read_bytes()[:-20])
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sweep.workdir, "append_lines", half)
        train(case, tmp_path)
    train(case, tmp_path)
    assert files_of(tmp_path) == case.files
    assert digest_of(case, tmp_path) == case.digest


def test_a_sweep_goes_on_under_any_devices(case, tmp_path):
    """Two devices hold a sixth run, as padding; one device does not."""
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    alone = sweep.prepare(case.points, case.setups, 1)
    assert alone.num_runs == 5 and case.group.num_runs == 6
    idle = alone._replace(leg=alone.leg._replace(block=pytest.fail))
    train(case, tmp_path, idle)
    assert files_of(tmp_path) == case.files


def test_a_finished_group_is_only_evaluated_again(case, tmp_path):
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    idle = case.group._replace(leg=case.group.leg._replace(block=pytest.fail))
    train(case, tmp_path, idle)
    assert files_of(tmp_path) == case.files


GROUPS = [
    ({"learning_rate": "0.1,0.2", "weight_decay": "1e-3,1e-4"}, {}, 1),
    ({"momentum": "0.1,0.9", "server_learning_rate": "0.1,0.01"}, "fedadam", 1),
    ({"b1": "0.5,0.9", "b2": "0.9,0.99", "eps": "1e-3,1e-2"}, "fedyogi", 1),
    ({"pull": "0.5,1", "temperature": "0.7,1", "separation": "0.1,0.2"}, "pfedgm", 1),
    ({"learning_rate_decay": "1,0.99,0.9"}, {}, 1),
    # Terms that a 0 leaves out, limits, sizes and names.
    ({"momentum": "0,0.5,0.9"}, {}, 2),
    ({"mu": "0,0.1,1"}, {}, 2),
    ({"process_noise": "inf,1,2"}, "pfedgm", 2),
    ({"local_epochs": "1,2", "learning_rate": "0.1,0.2"}, {}, 2),
    ({"batch_size": "8,16", "model": "mlp4,mlp5"}, {}, 4),
    ({"gain": "scalar,diagonal"}, "pfedgm", 2),
]


@pytest.mark.parametrize("case_", GROUPS, ids=lambda case: "-".join(case[0]))
def test_only_numbers_share_a_program(tiny_data, case_):
    grid, algorithm, programs = case_
    request = asked(dataset=tiny_data, algorithm=algorithm or "fedprox", grid=grid)
    groups = groups_of(request)
    assert len(groups) == programs
    assert sum(map(len, groups)) == len(sweep.list_points(request))


def test_a_number_that_python_needs_has_programs_of_its_own(tiny_data, monkeypatch):
    make = build.build_algorithm

    def picky(config, name):
        if config.hyperparameters["mu"] > "0.3":
            pass
        return make(config, name)

    monkeypatch.setattr(build, "build_algorithm", picky)
    request = asked(
        dataset=tiny_data, grid={"mu": "0.1,0.5", "learning_rate": "0.1,0.2"}
    )
    groups = groups_of(request)
    assert [list(group[0].scalars) for group in groups] == [["learning_rate"]] * 2


def test_seeds_whose_shapes_differ_have_programs_of_their_own(tiny_data):
    points = sweep.list_points(asked(dataset=tiny_data))
    setups = sweep.deal(points)
    cut = setups[1, "mlp4"].federation
    (cohort,) = cut.cohorts
    cohort = dataclasses.replace(cohort, order=cohort.order[:-1])
    setups[1, "mlp4"] = setups[1, "mlp4"]._replace(
        federation=dataclasses.replace(cut, cohorts=(cohort,))
    )
    assert len(sweep.to_groups(points, setups)) == 2


def test_the_best_is_chosen_on_validation_and_the_first_of_equals():
    def row(validation, test):
        return {"validation_accuracy": validation, "personal_accuracy": {"mean": test}}

    rows = [row(None, None), row(0.5, 0.2), row(0.6, 0.3), row(0.6, 0.9)]
    assert sweep.best(rows) == 2
    assert sweep.best(rows[:1]) is None
