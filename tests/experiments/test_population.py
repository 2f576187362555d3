"""The population experiment: its groups, its tables and what it refuses."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from absl.testing import flagsaver

from experiments import population, run
from fedgen.core import execution
from fedgen.data import partition, sources
from fedgen.runs.config import Config


def test_clients_of_a_group_name_the_classes_alike():
    config = Config(num_clients=7, new_clients=2, alpha=1.0, model="mlp32")
    federation = population.build_federation(config, 3, 4)
    (cohort,) = federation.cohorts
    source = sources.load(config.dataset)
    owner = partition.partition(
        "dirichlet", source.y, 9, seed=4, alpha=1.0, min_size=config.min_size
    )
    names = np.full((9, 10), -1)
    for i in range(9):
        mine = np.asarray(cohort.order[int(cohort.train.start[i]) :])
        mine = mine[: int(cohort.train.size[i])]
        assert np.all(owner[mine] == i)
        pairs = {(int(source.y[r]), int(federation.pool.y[r])) for r in mine}
        assert len({a for a, _ in pairs}) == len(pairs), "one name for a class"
        for a, b in pairs:
            names[i, a] = b
    for g in range(3):
        known = [set(column[column >= 0]) for column in names[g::3].T]
        assert all(len(found) <= 1 for found in known)
    first = names[::3]
    np.testing.assert_array_equal(first[first >= 0], np.nonzero(first >= 0)[1])
    assert np.any(names[1::3] != names[::3])


def test_samplers_take_old_clients_and_new_ones_apart():
    old, new = population.samplers(5, 8)
    for sample, slots in ((old, range(5)), (new, range(5, 8))):
        (drawn,) = sample(None, None)
        assert drawn.slot.tolist() == list(slots)
        assert np.all(drawn.mask) and np.all(drawn.work == 1)


def test_gaps_are_paired():
    rng = np.random.default_rng(0)
    a = rng.uniform(size=(2, 30))
    b = a - 0.1 + 0.01 * rng.normal(size=a.shape)
    b[1, 3] = np.nan
    difference = 100 * (a - b)
    known = difference[np.isfinite(difference)]
    interval = scipy.stats.t.interval(
        0.95, known.size - 1, known.mean(), scipy.stats.sem(known)
    )
    by_seed = ", ".join(f"{d:+.1f}" for d in np.nanmean(difference, axis=1))
    assert population.gap(a, b) == (
        f"{known.mean():+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}] ({by_seed})"
    )


def test_the_tables_compare_each_variant_with_its_own_controls():
    def score(received, updated):
        noise = 1e-3 * np.arange(6).reshape(2, 3)
        return population.Score(received and received + noise, updated + noise**2)

    scores = {
        "diffusion ddim:100:1": score(0.7, 0.8),
        "linear ddim:100:1": score(0.6, 0.78),
        "none": score(0.5, 0.75),
        "local_only": score(None, 0.4),
    }
    rows = population.training_table(scores, ["ddim:100:1"]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [len(row) for row in cells] == [7] * 4
    gaps = [cell.split(" ")[0] for cell in cells[0][3:]]
    assert gaps == ["+10.00", "+2.00", "+20.00", "+5.00"]
    assert cells[1][3:5] == ["", ""] and cells[1][5].startswith("+10.00")
    assert cells[3][1] == "" and cells[3][2] == "40.0"

    newcomers = {
        "own start, 10 local rounds": score(None, 0.6),
        "mean, local rounds only": score(0.65, 0.66),
        "mean, denoised": score(0.5, 0.62),
    }
    rows = population.newcomer_table(newcomers).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0][1:] == ["60.0", "", "", ""]
    assert cells[1][3].startswith("+5.2") and cells[1][4] == ""
    assert cells[2][4].startswith("-4.00")


def test_a_denoiser_of_few_clients_knows_the_others_less():
    rng = np.random.default_rng(0)
    centres = rng.choice([-1.0, 1.0], (12, 2))
    codes = jnp.asarray(centres[:, None] + 0.05 * rng.normal(size=(12, 2, 2)))
    crowd = population.Population(
        None, codes.astype(jnp.float32), jnp.ones((12, 2)), None, None
    )
    mask = np.arange(12) < 3
    fit = jax.jit(lambda mask, key: population.fit_denoiser(crowd, mask, 40, key))
    network, linear = fit(mask, jax.random.key(0))
    assert network.shape == linear.shape == (12,)
    assert jnp.mean(network[:3]) < jnp.mean(network[3:])


def test_a_small_run_writes_what_is_promised(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(execution, "use_cores", lambda devices: None)
    monkeypatch.setattr(population, "MEMORY_STEPS", 2)
    monkeypatch.setattr(population, "LOCAL_ROUNDS", (1, 2))
    own = ("warmup=1", "memory=2", "rank=2", "denoiser_steps=2", "denoiser_width=8")
    words = [
        "population",
        f"--workdir={tmp_path}",
        *("--num_clients=12", "--new_clients=2", "--groups=2", "--seeds=1"),
        *("--alpha=1", "--model=mlp4", "--rounds=2", "--local_steps=1"),
        *("--variants=noising:30:1", "--omegas=0"),
        *(f"--set={pair}" for pair in own),
        "--set=steps=2",
    ]
    with flagsaver.flagsaver():
        population.main(run.parse(words))
    text = (tmp_path / "tables.md").read_text()
    assert capsys.readouterr().out == text
    names = [line.split("|")[1].strip() for line in text.splitlines() if line]
    assert names == [
        "method",
        "---",
        "diffusion noising:30:1",
        "linear noising:30:1",
        "none",
        "local_only",
        "fedavg_ft",
        "newcomers",
        "---",
        "own start, 1 local rounds",
        "own start, 2 local rounds",
        "mean, local rounds only",
        "mean, denoised, omega 0",
        "mean, inverted as all others",
    ]
    assert "nan" not in text
    trained, newcomers = json.loads((tmp_path / "results.json").read_text())
    assert set(trained) | set(newcomers) == set(names) - {"method", "newcomers", "---"}
    assert np.shape(trained["none"]) == (2, 1, 12)
    assert np.shape(newcomers["mean, denoised, omega 0"]) == (2, 1, 2)
    assert "| 10 |" in (tmp_path / "memory.md").read_text()
    for name in ("codes.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--variants=ddim:10", "a variant must be version:depth:gamma, got 'ddim:10'"),
        ("--variants=ddim:2000:1", "depth must be in"),
        ("--omegas=-2", "omega must be >= -1"),
        ("--groups=0", "groups must be in [1, 20], got 0"),
        ("--rounds=10", "rounds must be at least 11 for pfedgpa"),
        ("--new_clients=1", "new_clients at least 2"),
        ("--num_clients=10", "num_clients must be above 10, got 10"),
        ("--set=rank=none", "need a number for rank, layers=all and center=true"),
        ("--set=layers=head", "got rank=8, layers=head, center=True"),
        ("--set=center=false", "got rank=8, layers=all, center=False"),
        ("--set=gamma=1", "gamma follows from --variants and --omegas"),
        ("--omegas=", "omegas must hold a number, got none"),
        ("--omegas=0,much", "omegas must be numbers, got 0,much"),
        ("--variants=", "variants must hold a version:depth:gamma, got none"),
        ("--partition=mixture", "partition must not be mixture"),
        ("--model=mlp32,mlp64", "model must be one"),
        ("--algorithm=fedavg", "algorithm must be pfedgpa, got fedavg"),
        ("--samples=500", "samples has no effect here and must be unset: 500"),
        ("--participation=0.5", "participation has no effect here"),
        ("--dropout=0.1", "dropout has no effect here"),
        ("--stragglers=0.1", "stragglers has no effect here"),
        ("--corruption=all", "corruption has no effect here"),
        ("--inherent=class_groups", "inherent has no effect here"),
        ("--baselines=fedavg", "baselines has no effect here"),
        ("--resume", "resume has no effect here"),
    ],
)
def test_wrong_requests_are_refused(flag, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(execution, "use_cores", lambda devices: None)
    folder = tmp_path / "run"
    words = ["--new_clients=2", "--rounds=12", "--model=mlp32", flag]
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
        words = ["population", f"--workdir={folder}", *words]
        population.main(run.parse(words))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error
    assert error.count("\n") == 1
    assert not folder.exists()
