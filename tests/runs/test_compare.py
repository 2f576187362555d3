"""Comparisons, with runs that answer at once."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import rich.console
import scipy.stats

from fedgen.runs import compare, experiment
from fedgen.runs.config import Config


@pytest.fixture
def asked(monkeypatch):
    """Replace training by a formula; return the configurations that were run."""
    runs = []

    def run(config, folder, *, resume, console):
        runs.append(config)
        rng = np.random.default_rng(config.seed)
        lift = 0.1 if config.algorithm == "pfedgm" else 0.0
        clients = rng.uniform(0.3, 0.6, 10) + lift + config.learning_rate
        summary = {
            "personal_accuracy": {
                "mean": clients.mean(),
                "worst_decile": clients.min(),
                "per_client": clients.tolist(),
            },
            # The better point on validation is the worse one on test.
            "validation_accuracy": {"mean": 1 - config.learning_rate},
            "global_accuracy": None if config.algorithm == "local_only" else 0.5,
        }
        path = pathlib.Path(folder)
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr(experiment, "run", run)
    return runs


def run(folder, grid=None, names=("pfedgm", "local_only"), seeds=3, seed=0):
    console = rich.console.Console(quiet=True)
    grid = {"learning_rate": ["0.05", "0.1"]} if grid is None else grid
    return compare.compare(Config(seed=seed), names, seeds, grid, folder, console)


def test_validation_of_the_first_seed_chooses(asked, tmp_path):
    rows = run(tmp_path)
    assert [row.chosen for row in rows] == [{"learning_rate": "0.05"}] * 2
    # Two points at the first seed, then two further seeds at the better one.
    assert len(asked) == 2 * (2 + 2)
    later = [config for config in asked if config.seed > 0]
    assert {config.learning_rate for config in later} == {0.05}
    assert sorted({config.seed for config in asked}) == [0, 1, 2]


def test_seeds_count_from_the_one_asked_for(asked, tmp_path):
    run(tmp_path, grid={}, names=("pfedgm",), seed=5)
    assert [config.seed for config in asked] == [5, 6, 7]


def test_finished_runs_are_read_and_not_run_again(asked, tmp_path):
    first = compare.to_markdown(run(tmp_path))
    count = len(asked)
    assert compare.to_markdown(run(tmp_path)) == first
    assert len(asked) == count


def test_a_point_that_diverged_is_left_out_and_not_run_again(
    asked, tmp_path, monkeypatch
):
    sound = experiment.run

    def diverge(folder):
        pathlib.Path(folder).mkdir(parents=True)
        raise FloatingPointError("round 3: loss not finite")

    def run_or_diverge(config, folder, **options):
        if config.learning_rate > 0.07:
            asked.append(config)
            diverge(folder)
        return sound(config, folder, **options)

    monkeypatch.setattr(experiment, "run", run_or_diverge)
    (row,) = run(tmp_path, names=("pfedgm",), seeds=1)
    assert row.chosen == {"learning_rate": "0.05"}
    run(tmp_path, names=("pfedgm",), seeds=1)
    assert [config.learning_rate for config in asked] == [0.05, 0.1]
    monkeypatch.setattr(experiment, "run", lambda config, folder, **_: diverge(folder))
    with pytest.raises(FloatingPointError, match="pfedgm diverged at seed 1"):
        run(tmp_path, {"learning_rate": ["0.05"]}, names=("pfedgm",), seeds=2)
    with pytest.raises(FloatingPointError, match="diverged at every point"):
        run(tmp_path, {"learning_rate": ["0.1"]}, names=("pfedgm",), seeds=1)


def test_a_grid_of_one_algorithm_leaves_the_others_alone(asked, tmp_path):
    run(tmp_path, {"pfedgm.pull": ["0.5", "1.0"]}, seeds=1)
    pulls = [config.hyperparameters for config in asked]
    assert pulls == [{"pull": "0.5"}, {"pull": "1.0"}, {}]


def test_variants_of_an_algorithm_stand_side_by_side(asked, tmp_path):
    names = ("pfedgm", "pfedgm:gain=global:temperature=0.5")
    grid = {"pfedgm.temperature": ["0.7", "1.0"], "pfedgm.pull": ["2.0"]}
    rows = run(tmp_path, grid, names, seeds=1)
    assert [row.name for row in rows] == list(names)
    assert [config.hyperparameters for config in asked] == [
        {"temperature": "0.7", "pull": "2.0"},
        {"temperature": "1.0", "pull": "2.0"},
        {"gain": "global", "temperature": "0.5", "pull": "2.0"},
    ]
    assert rows[1].chosen == {"pull": "2.0"}


def test_the_interval_is_students_of_paired_differences(asked, tmp_path):
    ours, local = run(tmp_path)
    gap = 100 * (ours.per_client - local.per_client)
    half = scipy.stats.t.ppf(0.975, 29) * gap.std(ddof=1) / np.sqrt(30)
    expected = f"{gap.mean():+.1f}"
    assert gap.size == 30
    text = compare.difference(ours, local)
    assert text.startswith(expected)
    if half > 1e-9:
        assert f"{gap.mean() - half:+.1f}" in text


def test_the_table_holds_every_method(asked, tmp_path):
    rows = run(tmp_path)
    table = compare.to_markdown(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert f"{100 * rows[1].per_seed.mean():.1f}" in table[3]
    assert "| 50.0 |" in table[2] and "50.0" not in table[3].split("|")[4]


def test_models_as_received_have_a_column_only_where_some_have_them():
    accuracy = np.array([0.5, 0.7])
    plain = compare.Row("a", {}, accuracy, accuracy[:1], 0.5, None)
    received = plain._replace(name="b", received=0.321)
    header, rule, first, second = (
        line.split("|") for line in compare.to_markdown([plain, received]).splitlines()
    )
    assert header[3].strip() == "as received"
    assert first[3].strip() == "" and second[3].strip() == "32.1"
    assert len(header) == len(rule) == len(first) == len(second)
    assert "received" not in compare.to_markdown([plain])


def test_a_method_may_set_flags_of_its_own(asked, tmp_path):
    names = ("fedavg", "fedavg:model=mlp7:rounds=4", "fedavg:learning_rate=0.3")
    rows = run(tmp_path, names=names, seeds=1)
    assert [row.name for row in rows] == list(names)
    assert {(c.model, c.rounds, c.learning_rate) for c in asked} == {
        *((Config().model, Config().rounds, rate) for rate in (0.05, 0.1, 0.3)),
        *(("mlp7", 4, rate) for rate in (0.05, 0.1)),
    }
    # What a method fixes is not tuned.
    assert rows[2].chosen == {}


def test_clients_without_test_rows_drop_out_of_the_interval():
    a, b = (
        compare.Row("x", {}, np.array(values), np.zeros(1), 0.0, None)
        for values in ([0.5, np.nan, 0.7], [0.4, 0.2, np.nan])
    )
    assert compare.difference(a, b) == "+10.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ()}, "algorithms must be different"),
        ({"names": ("pfedgm", "pfedgm")}, "algorithms must be different"),
        ({"names": ("pfedgn",)}, "did you mean 'pfedgm'"),
        ({"names": ("pfedgm:gai=full",)}, "did you mean 'gain'"),
        ({"names": ("pfedgm:gain",)}, "a method must be"),
        ({"names": ("pfedgm:rounds=few",)}, "rounds must be of type int"),
        ({"names": ("pfedgm:model=mlpp",)}, "did you mean 'mlp'"),
        ({"names": ("pfedgm:pull=1:pull=2",)}, "a method must be"),
        (
            {"names": ("pfedgm:pull=1",), "grid": {"pfedgm.pull": ["1", "2"]}},
            "grid pfedgm.pull varies what every pfedgm here fixes",
        ),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"grid": {"learning_rat": ["1"]}}, "did you mean 'learning_rate'"),
        ({"grid": {"pfedgm.pul": ["1"]}}, "did you mean 'pull'"),
        ({"grid": {"learning_rate": ["fast"]}}, "learning_rate must be of type float"),
        ({"grid": {"learning_rate": ["-1"]}}, "learning_rate must be above 0"),
    ],
)
def test_wrong_requests_run_nothing(asked, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "new", **options)
    assert not asked
    assert not (tmp_path / "new").exists()
