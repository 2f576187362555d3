"""One algorithm of a run: its numbers, its files, and being killed at any block."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fedgen.core import checkpoint
from fedgen.core.checkpoint import Checkpoints, digest
from fedgen.core.evaluate import Evaluation, Scores
from fedgen.runs import build, leg
from fedgen.runs.config import Config

ROUNDS, EVERY = 9, 2


class Killed(Exception):
    """Stands for a kill."""


class Case(SimpleNamespace):
    """A compiled leg that several tests train."""

    def train(self, folder, progress=lambda line: None, warn=pytest.fail):
        return leg.train(
            self.leg, self.setup, self.config, folder, progress=progress, warn=warn
        )

    def final_digest(self, folder):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            state, _ = checkpoints.restore(self.leg.like, pytest.fail)
        assert int(state.round) == ROUNDS
        return digest(state)


def lasting(summary):
    """Leave out what differs from one run of the same configuration to the next."""
    return {
        k: v for k, v in summary.items() if k not in ("seconds", "peak_memory_bytes")
    }


@pytest.fixture(scope="module")
def case(tiny_data, tmp_path_factory):
    """FedPer: state at the server and at the clients; half of them in a round."""
    config = Config(
        algorithm="fedper",
        baselines=(),
        dataset=tiny_data,
        model="mlp",
        num_clients=5,
        participation=0.6,
        dropout=0.2,
        rounds=ROUNDS,
        batch_size=8,
        eval_every=EVERY,
        checkpoint_every=EVERY,
    )
    setup = build.build(config)
    algorithm = build.build_algorithm(config, "fedper")
    case = Case(config=config, setup=setup, leg=None)
    case.leg = leg.prepare("fedper", algorithm, setup, config)
    case.folder = tmp_path_factory.mktemp("whole")
    case.result = case.train(case.folder)
    case.metrics = (case.folder / "metrics.jsonl").read_bytes()
    case.digest = case.final_digest(case.folder)
    return case


def assert_same(case, folder, result):
    assert (folder / "metrics.jsonl").read_bytes() == case.metrics
    assert case.final_digest(folder) == case.digest
    assert lasting(result.summary) == lasting(case.result.summary)
    assert result.lines == case.result.lines


def kill_at(case, folder, round_, before="metrics"):
    """Train until a round was reported, or until its checkpoint should be saved."""

    def progress(line):
        if before == "checkpoint" and line["round"] == round_:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if before == "metrics":
            append = leg.workdir.append_lines

            def half(path, lines):
                if lines[-1]["round"] >= round_:
                    append(path, lines)
                    path.write_bytes(path.read_bytes()[:-20])
                    raise Killed
                append(path, lines)

            patch.setattr(leg.workdir, "append_lines", half)
        case.train(folder, progress)


def test_setup_covers_what_resuming_could_break(case):
    assert case.setup.execution.num_devices == 2
    assert len(case.result.lines) == ROUNDS
    drawn = {line["participants"] for line in case.result.lines}
    assert len(drawn) > 1, "some client should drop out in some round"


@pytest.mark.parametrize("before", ["metrics", "checkpoint"])
@pytest.mark.parametrize("round_", [2, 4, 9])
def test_killed_and_resumed_equals_never_killed(case, tmp_path, round_, before):
    kill_at(case, tmp_path, round_, before)
    left = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert left >= round_ - 1
    assert_same(case, tmp_path, case.train(tmp_path))


def test_killed_again_and_again(case, tmp_path):
    for round_ in (2, 4, 4, 6, 8):
        kill_at(case, tmp_path, round_, "checkpoint")
    assert_same(case, tmp_path, case.train(tmp_path))


def test_a_finished_run_is_only_evaluated_again(case, tmp_path):
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    called = []
    again = Case(**vars(case))
    again.leg = case.leg._replace(block=lambda *args: called.append(args))
    assert_same(case, tmp_path, again.train(tmp_path))
    assert not called


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(case, tmp_path):
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "9" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])
    warnings = []
    assert_same(case, tmp_path, case.train(tmp_path, warn=warnings.append))
    assert len(warnings) == 1 and "round 9" in warnings[0]


def test_without_a_sound_checkpoint_the_run_starts_over(case, tmp_path):
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").rglob("d/*"):
        path.write_bytes(b"")
    warnings = []
    assert_same(case, tmp_path, case.train(tmp_path, warn=warnings.append))
    assert len(warnings) == 2


def test_metrics_that_end_before_the_checkpoint_are_not_skipped(case, tmp_path):
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(True)[:8]))
    warnings = []
    assert_same(case, tmp_path, case.train(tmp_path, warn=warnings.append))
    assert len(warnings) == 1 and "the metrics end at round 8" in warnings[0]


def test_blocks_end_where_something_is_due(case):
    assert case.leg.rounds_per_block == 2
    evaluated = [x["round"] for x in case.result.lines if "personal_accuracy" in x]
    assert evaluated == [2, 4, 6, 8, 9]
    kept = sorted(p.name for p in (case.folder / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["8", "9"]


def test_totals_equal_hand_computation(case):
    body = 4 * (64 * 200 + 200)  # FedPer sends the body of the MLP and a weight.
    counts = case.setup.counts.sum(axis=1)
    for line in case.result.lines:
        assert line["bytes_down"] == line["participants"] * body
        assert line["bytes_up"] == line["participants"] * (body + 4)
        assert line["participants"] <= 3 and line["failed"] == []
        assert line["executed_steps"] >= line["local_steps"] > 0
    summary = case.result.summary
    for name in ("bytes_up", "bytes_down", "local_steps", "executed_steps"):
        assert summary[name] == sum(line[name] for line in case.result.lines)
    train = np.concatenate(
        [np.asarray(c.train.size) for c in case.setup.federation.cohorts]
    )
    assert sorted(train[train > 0]) == sorted(counts)


def test_the_best_round_is_chosen_on_validation_and_ties_go_to_the_first(case):
    lines = [dict(line) for line in case.result.lines]
    due = [line for line in lines if "personal_accuracy" in line]
    for line, validation, test in zip(
        due, (0.3, 0.8, 0.5, 0.8, None), (0.9, 0.2, 0.95, 0.99, 1.0), strict=True
    ):
        line["validation_accuracy"] = validation
        line["personal_accuracy"] = {"mean": test}
    summary = leg.summarise(case.leg, case.config, lines, some_scores())
    assert summary["best_round"] == 4
    assert summary["best"]["personal_accuracy"] == {"mean": 0.2}


def test_a_subset_of_the_clients_is_scored_as_among_all(case):
    config = dataclasses.replace(case.config, eval_clients=2)
    some = leg.prepare("fedper", case.leg.algorithm, case.setup, config)
    arguments = case.leg.init(), case.setup.federation, leg.run_keys(config.seed)[2]
    whole, part = (
        leg.summarise(each, setting, [], each.evaluate(*arguments))
        for each, setting in ((case.leg, case.config), (some, config))
    )
    assert whole["evaluated_clients"] is None
    ids = part["evaluated_clients"]
    assert len(ids) == 2 and ids == sorted(set(ids))
    expected = [whole["personal_accuracy"]["per_client"][i] for i in ids]
    assert part["personal_accuracy"]["per_client"] == expected


def some_scores():
    count = np.array([10, 0, 20])
    scores = Scores(
        count,
        np.array([5, 0, 20]),
        np.zeros(3),
        np.array([2, 0, 1]),
        np.array([1, 0, 10]),
    )
    return Evaluation(scores, scores, np.arange(3))


def test_clients_without_test_rows_are_null_and_do_not_count(case):
    summary = leg.summarise(case.leg, case.config, case.result.lines, some_scores())
    accuracy = summary["personal_accuracy"]
    assert accuracy["per_client"] == [0.5, None, 1.0]
    assert accuracy["mean"] == 0.75 and accuracy["worst_decile"] == 0.5
    json.dumps(summary, allow_nan=False)


def test_models_as_received_are_summed_up_where_an_algorithm_has_them(case):
    without = case.leg._replace(algorithm=case.leg.algorithm._replace(receive=None))
    summary = leg.summarise(without, case.config, case.result.lines, some_scores())
    assert summary["received_accuracy"] is None
    assert (
        leg.evaluation_line(without.algorithm, some_scores(), 1)["received_accuracy"]
        is None
    )

    algorithm = case.leg.algorithm._replace(receive=lambda *args: None)
    with_one = case.leg._replace(algorithm=algorithm)
    summary = leg.summarise(with_one, case.config, case.result.lines, some_scores())
    assert summary["received_accuracy"]["per_client"] == [0.1, None, 0.5]
    assert summary["received_accuracy"]["mean"] == pytest.approx(0.3)
    line = leg.evaluation_line(algorithm, some_scores(), 1)
    assert line["received_accuracy"] == pytest.approx(0.3)


def test_spread():
    per_client = np.append(np.arange(20) / 20, np.nan)
    spread = leg.spread(per_client)
    assert spread["worst_decile"] == pytest.approx((0 + 1 / 20) / 2)
    assert spread["mean"] == pytest.approx(np.nanmean(per_client))
    assert spread["std"] == pytest.approx(np.nanstd(per_client))
    assert leg.spread(np.array([0.4]))["worst_decile"] == 0.4
    nobody = leg.spread(np.array([np.nan]))
    assert nobody == {"mean": None, "std": None, "worst_decile": None}


def test_an_algorithm_without_a_global_model_has_no_global_accuracy(case):
    scores = some_scores().test
    without = case.leg.algorithm._replace(predict_global=None)
    assert leg._global_accuracy(without, scores) is None
    with_one = without._replace(predict_global=lambda *args: None)
    assert leg._global_accuracy(with_one, scores) == 0.1


@pytest.mark.parametrize("after", [0, 4])
def test_a_state_gone_wrong_names_round_clients_and_last_good_checkpoint(
    case, tmp_path, after
):
    wrong = case.leg.evaluate

    def evaluate(state, federation, key):
        found = wrong(state, federation, key)
        loss = np.asarray(found.test.loss).copy()
        if int(state.round) > after:
            loss[[1, 3]] = np.inf, np.nan
        return found._replace(test=found.test._replace(loss=loss))

    diverging = Case(**vars(case))
    diverging.leg = case.leg._replace(evaluate=evaluate)
    with pytest.raises(FloatingPointError) as caught:
        diverging.train(tmp_path)
    text = str(caught.value)
    assert f"round {after + 2}" in text and "[1, 3]" in text and "fedper" in text
    if after:
        assert "last good checkpoint is of round 4" in text and str(tmp_path) in text
    else:
        assert "no checkpoint" in text
    # The lines of a diverged run never hold what JSON cannot say.
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_no_checkpoints_if_none_are_wanted(case, tmp_path):
    silent = Case(**vars(case))
    silent.config = Config(**{**vars(case.config), "checkpoint_every": 0})
    result = silent.train(tmp_path)
    assert lasting(result.summary) == lasting(case.result.summary)
    assert not (tmp_path / "checkpoints").exists()


def test_tensorboard_holds_every_round_once_after_a_kill(case, tmp_path):
    kill_at(case, tmp_path, 6, "checkpoint")
    case.train(tmp_path)
    scalars = read_scalars(tmp_path / "tensorboard")
    rounds = list(range(1, ROUNDS + 1))
    assert [step for step, _ in scalars["loss"]] == rounds
    for (step, value), line in zip(scalars["loss"], case.result.lines, strict=True):
        assert step == line["round"] and value == pytest.approx(line["loss"])
    assert [s for s, _ in scalars["personal_accuracy/mean"]] == [2, 4, 6, 8, 9]
    assert {"bytes_up", "bytes_down", "local_steps", "validation_accuracy"} <= set(
        scalars
    )


def read_scalars(folder):
    """Read event files: records of length, checksum, protocol buffer, checksum."""
    from tensorboardX.proto import event_pb2

    scalars = {}
    for path in folder.iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
            for value in event.summary.value:
                point = (event.step, value.simple_value)
                scalars.setdefault(value.tag, []).append(point)
            at += size + 16
    return scalars


class Compiled(SimpleNamespace):
    """Stands for a compiled block."""

    def memory_analysis(self):
        return self.analysis


def test_memory_is_predicted_before_anything_is_allocated(case, monkeypatch):
    analysis = SimpleNamespace(
        argument_size_in_bytes=3 * 2**30,
        output_size_in_bytes=2 * 2**30,
        temp_size_in_bytes=1 * 2**30,
        alias_size_in_bytes=2 * 2**30,
    )
    pages = {"SC_PHYS_PAGES": 8, "SC_PAGE_SIZE": 2**30}
    monkeypatch.setattr(leg.os, "sysconf", pages.get)
    leg.check_memory("fedavg", Compiled(analysis=analysis), 2)  # 8 GiB of 8.
    leg.check_memory("fedavg", Compiled(analysis=None), 2)
    pages["SC_PHYS_PAGES"] = 7
    with pytest.raises(ValueError, match=r"fedavg .* 8\.0 GiB .* 7\.0 GiB.*--chunk"):
        leg.check_memory("fedavg", Compiled(analysis=analysis), 2)


def test_preparing_allocates_no_state(case):
    before = {id(a) for a in jax.live_arrays()}
    algorithm = build.build_algorithm(case.config, "fedper")
    prepared = leg.prepare("fedper", algorithm, case.setup, case.config)
    new = sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)
    state = sum(
        math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(prepared.like)
    )
    assert new < state / 10


def test_shapes_and_places_are_those_of_the_state(case):
    state = case.leg.init()
    assert jax.tree.structure(state) == jax.tree.structure(case.leg.like)
    for a, b in zip(
        jax.tree.leaves(state), jax.tree.leaves(case.leg.like), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert checkpoint.digest(state) == checkpoint.digest(case.leg.init())
