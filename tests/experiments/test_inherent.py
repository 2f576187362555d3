"""A tiny run of FedGMI on inherent distributions, and a look at what it found."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments import inherent
from fedgen import algorithms
from fedgen.algorithms import fedgmi_estimates
from fedgen.algorithms.fedgmi import density_of
from fedgen.core import federation as federation_lib
from fedgen.runs import build, experiment
from fedgen.runs.config import Config

CONFIG = Config(
    algorithm="fedgmi",
    baselines=(),
    hyperparameters={
        "num_components": "2",
        "pretrain_rounds": "1",
        "hidden": "8",
        "latent": "2",
        "vae_epochs": "1",
        "max_samples": "32",
    },
    partition="mixture",
    inherent="class_groups",
    alpha=1.0,
    samples=400,
    num_clients=5,
    new_clients=2,
    model="mlp4",
    rounds=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inherent") / "run"
    quiet = rich.console.Console(quiet=True)
    experiment.run(CONFIG, str(path), console=quiet)
    return path


@pytest.fixture(scope="module")
def found(folder):
    inherent.check(str(folder))
    return inherent.look(str(folder), 6)


def test_a_finished_run_is_read_back(folder):
    config, setup, algorithm, state = experiment.load(folder)
    assert config == CONFIG
    assert int(state.round) == 3 and algorithm.prepare is None
    assert setup.federation.cohorts[0].num_real == 5
    assert len(setup.domain) == len(setup.federation.pool.y) == 400
    # The classes of a domain are neighbours, so the domain of a row can be checked.
    classes = [
        set(np.asarray(setup.federation.pool.y)[setup.domain == d]) for d in (0, 1)
    ]
    assert classes[0] == {0, 1, 2, 3, 4} and classes[1] == {5, 6, 7, 8, 9}


def test_what_was_found_is_measured_and_drawn(folder, found):
    assert found == json.loads((folder / "inherent.json").read_text())
    assert found["num_components"] == 2
    assert 0 <= found["total_variation"] <= 1
    # Uniform proportions of the same clients, by hand.
    setup = build.build(CONFIG)
    (cohort,) = setup.federation.cohorts
    share = []
    real = np.asarray(cohort.ids) >= 0  # the rest is padding for the devices
    for start, size in zip(
        cohort.train.start[real], cohort.train.size[real], strict=True
    ):
        rows = np.asarray(cohort.order)[int(start) : int(start + size)]
        share.append(np.mean(setup.domain[rows] == 0))
    uniform = np.mean(np.abs(np.array(share) - 0.5))
    np.testing.assert_allclose(found["total_variation_uniform"], uniform, rtol=1e-6)
    assert len(found["density"]["log_density"]) == 2
    for name in ("proportions.png", "components.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_the_gate_is_told_from_the_classifiers_behind_it(folder, found):
    _, setup, algorithm, state = experiment.load(folder)
    federation, components = setup.federation, state.server.shared.components
    (cohort,) = federation.cohorts
    settings = algorithms.settings("fedgmi", CONFIG.hyperparameters)
    kind = density_of((28, 28, 1), 10, settings)
    estimate = jax.jit(fedgmi_estimates.make_proportions(algorithm, setup.execution))
    pi = np.asarray(estimate(state, federation, jax.random.key(CONFIG.seed)))

    @jax.jit
    def score(row):
        x = federation_lib.normalise(federation.pool.x[row])[None]
        key = jax.random.fold_in(jax.random.key(0), row)
        apply = jax.vmap(cohort.model.apply, (0, None))
        label = jnp.argmax(apply(components.classifiers, x), axis=2)[:, 0]
        return kind.marginal(components, key, x, 2)[0], label

    # Of the two orders of two components, the one that fits proportions better.
    truth = fedgmi_estimates.true_proportions(setup.domain, federation, 2)
    swap = np.abs(pi[:, ::-1] - truth).sum() < np.abs(pi - truth).sum()
    clients = []
    for own, start, size in zip(pi, *cohort.test, strict=True):
        right = []
        for row in cohort.order[int(start) : int(start + size)]:
            log_density, label = score(row)
            true = int(setup.domain[row]) ^ int(swap)
            likeliest = np.argmax(np.log(np.maximum(own, 1e-12)) + log_density)
            right.append((likeliest == true, label[true] == federation.pool.y[row]))
        clients += [np.mean(right, axis=0)] if right else []
    gate, accuracy = np.mean(clients, axis=0)
    np.testing.assert_allclose(found["gate_accuracy"], gate, rtol=1e-6)
    np.testing.assert_allclose(found["accuracy_true_gate"], accuracy, rtol=1e-6)


def test_the_gate_does_not_depend_on_the_order_of_components(
    folder, found, tmp_path, monkeypatch
):
    config, setup, algorithm, state = experiment.load(folder)
    shared = state.server.shared
    swapped = jax.tree.map(lambda a: a[::-1], shared.components)
    server = state.server._replace(shared=shared._replace(components=swapped))
    loaded = config, setup, algorithm, state._replace(server=server)
    monkeypatch.setattr(experiment, "load", lambda _: loaded)
    other = inherent.look(str(tmp_path), 6)
    for name in ("gate_accuracy", "accuracy_true_gate"):
        np.testing.assert_allclose(other[name], found[name], rtol=1e-6)


def test_a_distribution_is_left_to_its_own_component(monkeypatch):
    setup = build.build(CONFIG)._replace(domain=np.arange(400) % 3)
    order = np.array([1, 2, 0])  # another permutation than its inverse

    def which(kind, model, num_samples, components, pool, row, proportions, component):
        return component == 1, component == 2

    monkeypatch.setattr(fedgmi_estimates, "score_gate", which)
    (cohort,) = setup.federation.cohorts
    proportions = np.zeros((len(cohort.ids), 3))
    shares = inherent.score_gate(setup, None, (), proportions, order, 1)
    tested = [
        setup.domain[np.asarray(cohort.order)[s : s + t]]
        for s, t in zip(*map(np.asarray, cohort.test), strict=True)
        if t
    ]
    for domain, share in enumerate(shares):
        expected = np.mean([np.mean(rows == domain) for rows in tested])
        np.testing.assert_allclose(share, expected, rtol=1e-6)
    assert shares[0] != shares[1]


@pytest.mark.parametrize(
    ("scores", "end"), [((0.75, 0.5), "75.0 | 50.0"), ((None, None), " | ")]
)
def test_a_run_has_a_line(tmp_path, scores, end):
    summary = {"personal_accuracy": {"mean": 0.625}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    measured = {
        "num_components": 2,
        "total_variation": 0.1,
        "total_variation_uniform": 0.2,
        "total_variation_new": None,
        "gate_accuracy": scores[0],
        "accuracy_true_gate": scores[1],
    }
    line = inherent.to_line(str(tmp_path), measured)
    assert line == f"| {tmp_path} | 2 | 0.1000 | 0.2000 |  | 62.5 | {end} |\n"


def test_densities_are_of_samples_as_models_see_them(folder):
    setup = build.build(CONFIG)
    train = inherent.held(setup.federation, "train")
    x = np.asarray(federation_lib.normalise(setup.federation.pool.x))
    (cohort,) = setup.federation.cohorts
    assert train.shape == (int(cohort.train.size.sum()), *x.shape[1:])
    pool = {row.tobytes() for row in x}
    assert all(row.tobytes() in pool for row in train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "fedavg"}, "runs must have --algorithm=fedgmi, got fedavg"),
        ({"partition": "iid"}, "runs must have --partition=mixture, got iid"),
        ({"rounds": 2}, "runs must have at least 3 rounds, or EM never begins, got 2"),
    ],
)
def test_other_runs_are_refused(folder, tmp_path, change, message):
    stored = json.loads((folder / "config.json").read_text())
    stored["flags"] |= change
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for name in ("summary.json", "checkpoints"):
        with pytest.raises(ValueError, match="runs must be folders of finished runs"):
            inherent.check(str(tmp_path))
        if name == "summary.json":
            (tmp_path / name).write_text("{}")
        else:
            (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=message):
        inherent.check(str(tmp_path))


def test_a_run_without_checkpoints_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a finished run"):
        experiment.load(tmp_path)
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(ValueError, match="a checkpoint of round 3, the last"):
        experiment.load(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_reading_a_run_changes_nothing_there(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    stored = json.loads((copy / "config.json").read_text())
    stored["flags"]["model"] = "mlp5"  # another shape than that of the checkpoints
    (copy / "config.json").write_text(json.dumps(stored))
    files = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match="a checkpoint of round 3.*cannot be used"):
        experiment.load(copy)
    assert sorted(copy.rglob("*")) == files
    stored["flags"]["colour"] = "red"
    (copy / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="of another version, with flags .*colour"):
        experiment.load(copy)


def test_em_is_run_from_the_truth(folder, monkeypatch):
    told = {}
    real = inherent.fedgmi

    def spy(*args, **settings):
        told.update(settings)
        return real(*args, **settings)

    monkeypatch.setattr(inherent, "fedgmi", spy)
    first, last = inherent.diagnose(str(folder))
    assert told["num_components"] == 2 and len(told["truth"]) == 400
    assert 0 <= first <= 1 and 0 <= last <= 1
