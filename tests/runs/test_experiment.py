"""A whole run: what lies in its folder, what the summary says, and comparability."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import re

import jax
import numpy as np
import pytest
import rich.console

from fedgen.runs import build, experiment, leg
from fedgen.runs.config import Config

KEYS = {
    "algorithm": str,
    "rounds": int,
    "bytes_up": int,
    "bytes_down": int,
    "local_steps": int,
    "executed_steps": int,
    "peak_memory_bytes": int,
}


def quiet():
    return rich.console.Console(file=io.StringIO(), width=100)


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def config(tiny_data):
    return Config(
        algorithm="fedavg",
        baselines=("local_only", "fedavg"),
        dataset=tiny_data,
        model="mlp",
        num_clients=4,
        new_clients=2,
        alpha=0.5,
        rounds=3,
        eval_every=2,
        checkpoint_every=2,
        batch_size=10,
        learning_rate=0.02,
    )


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """Run once; return the folder, the result and the printed text."""
    folder = tmp_path_factory.mktemp("runs") / "it"
    console = quiet()
    result = experiment.run(config, str(folder), console=console)
    return folder, result, console.file.getvalue()


def entries(summary):
    return [summary, *summary["baselines"].values()]


def test_every_promised_file_is_there(done):
    folder, result, printed = done
    assert result["workdir"] == str(folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "baselines",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "plots",
        "report.html",
        "summary.json",
        "tensorboard",
    }
    assert len(list((folder / "plots").glob("*.png"))) == 4
    assert {p.name for p in (folder / "baselines").iterdir()} == {"local_only"}
    for part in (folder, folder / "baselines" / "local_only"):
        assert len((part / "metrics.jsonl").read_text().splitlines()) == 3
        assert list((part / "tensorboard").glob("events*"))
        assert (part / "checkpoints" / "3").is_dir()
    assert "Report:" in printed and "local_only" in printed


def test_the_summary_has_every_promised_key(done):
    folder, result, _ = done
    summary = json.loads((folder / "summary.json").read_text())
    assert {**summary, "workdir": str(folder)} == json.loads(json.dumps(result))
    assert set(summary["baselines"]) == {"local_only", "fedavg"}
    for entry in entries(summary):
        for name, kind in KEYS.items():
            assert type(entry[name]) is kind, name
        accuracy = entry["personal_accuracy"]
        known = np.array(accuracy["per_client"], float)
        assert known.shape == (4,)
        assert accuracy["mean"] == pytest.approx(known.mean())
        assert accuracy["std"] == pytest.approx(known.std())
        assert accuracy["worst_decile"] == pytest.approx(known.min())
        assert set(entry["seconds"]) == {"compile", "steady", "evaluation"}
        assert min(entry["seconds"].values()) > 0
        assert entry["peak_memory_bytes"] > 1e6
        assert entry["rounds"] == 3 and entry["best_round"] in (2, 3)
        assert 0 <= entry["new_clients"]["personal_accuracy"]["mean"] <= 1
    assert 0 <= summary["global_accuracy"] <= 1
    assert summary["baselines"]["local_only"]["global_accuracy"] is None
    assert summary["baselines"]["local_only"]["algorithm"] == "local_only"


def test_bytes_and_steps_equal_hand_computation(done, config):
    _, summary, _ = done
    weights = 4 * (64 * 200 + 200 + 200 * 4 + 4)
    assert summary["bytes_down"] == 3 * 4 * weights
    assert summary["bytes_up"] == 3 * 4 * (weights + 4)  # And the sample count.
    local = summary["baselines"]["local_only"]
    assert local["bytes_up"] == local["bytes_down"] == 0
    sizes = np.concatenate(
        [np.asarray(c.train.size) for c in build.build(config).federation.cohorts]
    )
    for entry in entries(summary):
        assert entry["local_steps"] == 3 * np.ceil(sizes / 10).sum()
        assert entry["executed_steps"] >= entry["local_steps"]


def test_an_algorithm_that_is_its_own_baseline_is_trained_once(done):
    _, summary, _ = done
    mine = {k: v for k, v in summary.items() if k not in ("baselines", "workdir")}
    again = summary["baselines"]["fedavg"]
    assert mine == {k: v for k, v in again.items() if k != "baselines"}


def test_the_record_repeats_the_run(done, config):
    folder, _, _ = done
    record = json.loads((folder / "config.json").read_text())
    flags = dict(record["flags"])
    flags["baselines"] = tuple(flags["baselines"])
    assert Config(**flags) == config
    assert record["command"].startswith("python -m experiments.run --algorithm=fedavg")
    assert record["environment"]["jax"] == jax.__version__
    assert record["environment"]["devices"] == len(jax.devices())


def test_a_checkout_that_is_not_installed_is_recorded(monkeypatch, config):
    installed = importlib.metadata.version

    def version(package):
        if package == "fedgen":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    recorded = experiment.environment(build.build(config))
    assert recorded["fedgen"] == "not installed"
    assert recorded["jax"] == jax.__version__


def test_the_report_needs_nothing_beside_it(done):
    page = (done[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]+)"', page)
    assert not links


def test_algorithms_share_data_initial_weights_and_draws(config):
    setup = build.build(config)
    weights = []
    for name in config.legs:
        algorithm = build.build_algorithm(config, name)
        state = leg.prepare(name, algorithm, setup, config).init()
        clients = jax.tree.leaves(state.clients[0])
        held = jax.tree.leaves(state.server) or [a[0] for a in clients]
        weights.append(held)
    assert len(weights) == 2
    # To rounding: each compiles an initialisation of its own.
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-6)


def test_running_it_again_needs_resume_and_then_changes_nothing(done, config):
    folder, result, _ = done
    before = files_of(folder)
    with pytest.raises(ValueError, match="--resume"):
        experiment.run(config, str(folder), console=quiet())
    changed = dataclasses.replace(config, rounds=4)
    with pytest.raises(ValueError, match="--rounds was 3, is 4"):
        experiment.run(changed, str(folder), resume=True, console=quiet())
    assert files_of(folder) == before


def test_an_interrupted_run_resumes_to_the_same_end(
    done, config, tmp_path, cache_events
):
    folder, result, _ = done
    train = leg.train

    def kill_the_second(each, *args, **kwargs):
        if each.name == "local_only":

            def progress(line):
                if line["round"] == 2:
                    raise KeyboardInterrupt

            kwargs["progress"] = progress
        return train(each, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(leg, "train", kill_the_second)
        experiment.run(config, str(tmp_path / "it"), console=quiet())
    assert not (tmp_path / "it" / "summary.json").exists()
    # A block, an evaluation and an initialisation of either algorithm.
    assert len(list((tmp_path / ".jax_cache").iterdir())) >= 6
    assert not cache_events["cache_hits"]
    again = experiment.run(config, str(tmp_path / "it"), resume=True, console=quiet())

    assert cache_events["cache_hits"] >= 6

    def lasting(summary):
        left = ("seconds", "peak_memory_bytes", "workdir", "baselines")
        return {k: v for k, v in summary.items() if k not in left}

    for a, b in zip(entries(again), entries(result), strict=True):
        assert lasting(a) == lasting(b)
    old, new = files_of(folder), files_of(tmp_path / "it")
    for name in ("metrics.jsonl", "baselines/local_only/metrics.jsonl"):
        assert new[name] == old[name]


def test_a_diverging_run_names_algorithm_round_and_checkpoint(config, tmp_path):
    wild = dataclasses.replace(config, learning_rate=1e9, baselines=(), new_clients=0)
    with pytest.raises(FloatingPointError, match=r"fedavg, round \d: .*not finite"):
        experiment.run(wild, str(tmp_path / "it"), console=quiet())
    # The record stays, so that one can see what diverged.
    assert (tmp_path / "it" / "config.json").exists()
    assert not (tmp_path / "it" / "summary.json").exists()


def test_brackets_in_a_warning_are_no_markup(config, tmp_path, monkeypatch):
    def train(*args, warn, **kwargs):
        warn("file [/oops] is [bold]damaged")
        raise KeyboardInterrupt

    monkeypatch.setattr(leg, "train", train)
    monkeypatch.setattr(leg, "prepare", lambda name, *args: leg.Leg(name, *[None] * 8))
    console = quiet()
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, str(tmp_path / "it"), console=console)
    assert "warning: file [/oops] is [bold]damaged" in console.file.getvalue()


def test_history_counts_bytes_both_ways_since_the_start():
    silent = {"round": 1, "bytes_up": 1, "bytes_down": 10}
    scored = {
        "round": 2,
        "bytes_up": 2,
        "bytes_down": 20,
        "personal_accuracy": {"mean": 0.5},
        "validation_accuracy": 0.4,
        "global_accuracy": None,
    }
    (entry,) = experiment._history([silent, scored])
    assert (entry["round"], entry["bytes"]) == (2, 33)
