"""The command line of sweeps: what it refuses, what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import shlex

import jax
import pytest
from absl.testing import flagsaver

from experiments import run
from experiments import sweep as command
from fedgen.core import execution
from fedgen.runs import sweep, workdir
from fedgen.runs.config import Config
from fedgen.runs.sweep import RECORD, Group

TINY = (
    "--algorithm=fedavg --model=mlp4 --num_clients=3 --rounds=1 --eval_every=1 "
    "--checkpoint_every=0 --seeds=2 --samples=300"
)


def invoke(text):
    """Run the command line in this process; return the exit code, stdout, stderr."""
    out, error = io.StringIO(), io.StringIO()
    with (
        flagsaver.flagsaver(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(execution, "use_cores", lambda devices: None)
        try:
            command.main(run.parse(["sweep", *shlex.split(text)]))
        except SystemExit as exit_:
            return exit_.code, out.getvalue(), error.getvalue()
    return 0, out.getvalue(), error.getvalue()


BAD = [
    ("--grid learning_rate", "--grid must be name=a,b,c", "'learning_rate'"),
    ("--grid =1,2", "--grid must be name=a,b,c", "'=1,2'"),
    ("--grid learning_rate=", "--grid must be name=a,b,c", "'learning_rate='"),
    ("--grid learning_rate=0.1,,1", "--grid must be name=a,b,c", "0.1,,1"),
    ("--grid momentum=0 --grid momentum=1", "each name once", "momentum twice"),
    ("--grid learningrate=1,2", "unknown grid name", "mean 'learning_rate'?"),
    ("--algorithm=fedprox --grid nu=1,2", "unknown grid name", "mean 'mu'?"),
    ("--grid workdir=a,b", "unknown grid name 'workdir'"),
    ("--grid seed=1,2", "seed is the same for all runs", "learning_rate"),
    ("--grid rounds=1,2", "rounds is the same for all runs", "learning_rate"),
    ("--grid eval_every=1,2", "eval_every is the same for all runs"),
    ("--grid alpha=0.1,1", "alpha is the same for all runs"),
    ("--grid seeds=1,2", "seeds is the same for all runs"),
    ("--grid learning_rate=0.1,fast", "learning_rate must be of type", "'fast'"),
    ("--grid learning_rate=0.1,-1", "learning_rate must be above 0", "got -1.0"),
    ("--grid learning_rate=0.1,nan", "learning_rate must be above 0", "got nan"),
    ("--grid learning_rate=0.1,0.10", "must be different values", "'0.1,0.10'"),
    ("--grid local_epochs=1,1.5", "local_epochs must be of type int", "'1.5'"),
    ("--grid model=mlp,mpl", "unknown model 'mpl'"),
    ("--algorithm=fedprox --grid mu=0.1,-1", "mu must be >= 0", "got -1.0"),
    ("--algorithm=fedprox --grid mu=0.1,x", "mu must be a number", "'x'"),
    ("--algorithm=fedprox --set=mu=1 --grid mu=0.1", "either set or in the grid"),
    ("--algorithm=fedpro", "unknown algorithm 'fedpro'", "mean 'fedprox'?"),
    ("--seeds=0", "seeds must be at least 1", "got 0"),
    ("--seed=2147483647 --seeds=2", "seed must be below 2^31"),
    ("--new_clients=3", "new_clients must be 0 in a sweep", "got 3"),
    ("--devices=9", "devices must be between 1 and", "got 9"),
    ("sideways", "flags begin with --, got sideways"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_bad_input_is_refused_in_one_line_before_any_work(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "train", pytest.fail)
    text, *words = case
    code, _, error = invoke(text)
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def test_it_prints_a_table_and_keeps_its_folder(tmp_path, monkeypatch):
    """One sweep after another in one folder: refused, resumed, refused."""
    place = tmp_path / "sweep"
    text = f"{TINY} --grid learning_rate=0.1,1e30 --workdir={place}"
    groups, prepare = [], sweep.prepare

    def prepare_once(points, **rest):
        if not groups:
            groups.append(prepare(points, **rest))
        return groups[0]

    monkeypatch.setattr(sweep, "prepare", prepare_once)
    code, out, error = invoke(text)
    assert code == 0, error
    lines = out.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "best on validation" in lines[2] and "diverged with seed 0, 1" in lines[3]
    assert (place / "sweep.md").read_text() in out
    record = json.loads((place / "sweep.json").read_text())
    assert record["best"] == 0 and record["programs"] == 1
    assert record["environment"]["devices"] == len(jax.devices())
    (per_run,) = record["rows"][0]["personal_accuracy"]["per_seed"][:1]
    alone = place / "runs" / "learning_rate=0.1-seed=0"
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["personal_accuracy"]["mean"] == per_run
    assert len((alone / "metrics.jsonl").read_text().splitlines()) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "prepare", pytest.fail)
        code, _, error = invoke(text)
        assert code == 2 and "already holds this run" in error and "--resume" in error
        code, _, error = invoke(text.replace("0.1,", "0.2,") + " --resume")
        assert code == 2 and "--grid was learning_rate=0.1,1e30, is" in error
    code, again, error = invoke(f"{text} --resume")
    assert code == 0 and again == out, error


def test_runs_and_sweeps_stay_out_of_one_anothers_folders(tmp_path):
    for record, claimed in (("sweep.json", "config.json"), ("config.json", RECORD)):
        place = tmp_path / record
        place.mkdir()
        (place / record).write_text("{}")
        with pytest.raises(ValueError, match=f"holds files but no {claimed}"):
            workdir.claim(Config(), str(place), True, claimed)


def test_a_sweep_that_diverges_everywhere_fails_and_says_where(tmp_path, monkeypatch):
    def diverge(group, *_, **__):
        return {point.name: {"diverged": "round 1"} for point in group.points}

    monkeypatch.setattr(
        sweep, "prepare", lambda points, **_: Group(points, *[None] * 3)
    )
    monkeypatch.setattr(sweep, "train", diverge)
    text = f"{TINY} --seeds=1 --grid learning_rate=1e30 --workdir={tmp_path}"
    code, _, error = invoke(text)
    assert code == 1 and error.splitlines()[-1].startswith("error: every point")
    assert "diverged with seed 0" in (tmp_path / "sweep.md").read_text()
