"""Look at what FedGMI found: proportions of clients, densities, generated samples.

Takes the folders of finished runs of `fedgmi` with --partition=mixture, those of
experiments.run or experiments.compare. Prints one line a run (TV is the total variation
between estimated and true proportions, mean over clients), and writes into each folder
inherent.json, proportions.png and, of images, components.png.

Are predictions wrong because of the gate, or of the classifiers behind it? Where as
many components were found as there are distributions, and the gate is "posterior", the
line ends, for clients that trained, with the mean accuracy of those that were scored,
the share of all test samples whose likeliest component is the true one, and the
accuracy if every sample were left to the classifier of its true one. Components are
assigned to distributions so that proportions fit best.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import run
from fedgen import algorithms
from fedgen.aggregators import mixture
from fedgen.algorithms import fedgmi_estimates
from fedgen.algorithms.fedgmi import density_of, fedgmi
from fedgen.core import federation as federation_lib
from fedgen.core import rounds, simulate
from fedgen.core.federation import Federation
from fedgen.runs import build, experiment, generators, leg, plots, workdir

RUNS = flags.DEFINE_list("runs", [], "Folders of the runs to look at.")
SAMPLES = flags.DEFINE_integer("samples_each", 200, "Samples that components generate.")

DIAGNOSE = flags.DEFINE_bool(
    "diagnose",
    False,
    "Train again from the true responsibilities instead: EM must stay there, or VAEs "
    "are trained too little.",
)

_ROWS = 2000  # of the training, and of the test rows, that densities are averaged over


def check(folder: str) -> None:
    """Refuse what is no finished run of `fedgmi` on inherent distributions.

    Raises:
      ValueError: If it is none.
    """
    path = pathlib.Path(folder)
    if not (path / "summary.json").exists() or not (path / "checkpoints").is_dir():
        raise ValueError(
            f"runs must be folders of finished runs with checkpoints, got {folder}"
        )
    stored = json.loads((path / "config.json").read_text())["flags"]
    for name, wanted in (("algorithm", "fedgmi"), ("partition", "mixture")):
        if stored[name] != wanted:
            raise ValueError(
                f"runs must have --{name}={wanted}, got {stored[name]} in {folder}"
            )
    settings = algorithms.settings("fedgmi", stored["hyperparameters"])
    least = settings["pretrain_rounds"] + settings["guided_rounds"] + 1
    if stored["rounds"] < least:
        raise ValueError(
            f"runs must have at least {least} rounds, or EM never begins, got "
            f"{stored['rounds']} in {folder}"
        )


def held(federation: Federation, part: str) -> np.ndarray:
    """Collect up to `_ROWS` samples `[s, ...]` of all clients, as models see them."""
    index, _ = fedgmi_estimates.owned(federation, part)
    index = np.random.default_rng(0).permutation(index)[:_ROWS]
    return np.asarray(federation_lib.normalise(federation.pool.x[index]))


def score_gate(
    setup: build.Setup,
    kind: fedgmi_estimates.Density,
    components: fedgmi_estimates.Components,
    proportions: np.ndarray,
    order: np.ndarray,
    num_samples: int,
) -> tuple[float, float]:
    """Score gate and classifiers as `fedgmi_estimates.score_gate`, means over clients.

    Args:
      setup: Of the run.
      kind: How components give densities.
      components: Of the server, as many as there are distributions.
      proportions: `[n, k]` of the clients.
      order: `[k]` the component of every distribution.
      num_samples: Importance samples of the densities.
    """
    index, owner = fedgmi_estimates.owned(setup.federation, "test")
    model = setup.federation.cohorts[0].model
    score = functools.partial(fedgmi_estimates.score_gate, kind, model, num_samples)
    component = order[setup.domain[index]]
    scores = jax.jit(score)(
        components, setup.federation.pool, index, proportions[owner], component
    )
    size = np.bincount(owner)
    found, correct = (np.bincount(owner, np.asarray(each)) for each in scores)
    tested = size > 0
    return tuple(float(np.mean(a[tested] / size[tested])) for a in (found, correct))


def look(folder: str, count: int) -> dict[str, Any]:
    """Measure one run, and draw its pictures."""
    config, setup, algorithm, state = experiment.load(folder)
    path, key = pathlib.Path(folder), jax.random.key(config.seed)
    components = state.server.shared.components
    k = jax.tree.leaves(components)[0].shape[0]
    estimate = jax.jit(fedgmi_estimates.make_proportions(algorithm, setup.execution))
    domains = int(setup.domain.max()) + 1
    known = max(k, domains)  # more may have been found than there are, or fewer
    federations = [f for f in (setup.federation, setup.newcomers) if f is not None]
    fitted = [np.asarray(estimate(state, each, key)) for each in federations]
    pairs = []
    for federation, found in zip(federations, fitted, strict=True):
        real = np.asarray(federation.cohorts[0].train.size) > 0
        found = np.pad(found, ((0, 0), (0, known - k)))[real]
        truth = fedgmi_estimates.true_proportions(setup.domain, federation, known)
        pairs.append((truth[real], found))
    # Newcomers are scored by the order that fits those who trained.
    truth, found = pairs[0]
    order = np.asarray(
        mixture.match_proportions(jnp.asarray(found), jnp.asarray(truth))
    )
    pairs = [(truth, found[:, order]) for truth, found in pairs]
    error = [
        np.asarray(mixture.total_variation(jnp.asarray(a), jnp.asarray(b)))
        for a, b in pairs
    ]
    plots.proportions(
        *pairs[0], path / "proportions.png", newcomers=pairs[1] if pairs[1:] else None
    )

    settings = algorithms.settings("fedgmi", config.hyperparameters)
    shape = setup.federation.pool.x.shape[1:]
    kind = density_of(shape, setup.federation.num_classes, settings)
    generated = fedgmi_estimates.generate(kind, components, key, count, shape)
    train, test = held(setup.federation, "train"), held(setup.federation, "test")
    num_samples = settings["num_samples"]

    @jax.jit
    def log_density(x):
        return kind.marginal(components, key, jnp.asarray(x), num_samples)

    report = generators.density_report(log_density, generated, train, test)
    scores = None, None
    if k == domains and settings["gate"] == "posterior":
        scores = score_gate(setup, kind, components, fitted[0], order, num_samples)
    if len(shape) == 3 and shape[2] in (1, 3):
        plots.samples(
            np.asarray(generated[:, :8]),
            train[report.nearest[:, :8]],
            path / "components.png",
        )
    guess = np.arange(known) < domains
    uniform = 0.5 * np.abs(truth - guess / domains).sum(axis=1)
    measured = {
        "num_components": k,
        "total_variation": float(np.mean(error[0])),
        "total_variation_uniform": float(np.mean(uniform)),
        "total_variation_new": float(np.mean(error[1])) if error[1:] else None,
        "gate_accuracy": scores[0],
        "accuracy_true_gate": scores[1],
        "density": report.summary(),
    }
    workdir.write_json(path / "inherent.json", measured)
    return measured


def to_line(folder: str, measured: dict[str, Any]) -> str:
    """Write the line of one run, shares in %."""
    summary = json.loads((pathlib.Path(folder) / "summary.json").read_text())
    shares = (
        summary["personal_accuracy"]["mean"],
        measured["gate_accuracy"],
        measured["accuracy_true_gate"],
    )
    new = measured["total_variation_new"]
    cells = [
        folder,
        str(measured["num_components"]),
        f"{measured['total_variation']:.4f}",
        f"{measured['total_variation_uniform']:.4f}",
        "" if new is None else f"{new:.4f}",
        *("" if share is None else f"{100 * share:.1f}" for share in shares),
    ]
    return f"| {' | '.join(cells)} |\n"


def diagnose(folder: str) -> tuple[float, float]:
    """Train from the true responsibilities, and see whether EM stays there.

    Returns:
      The error of the proportions as EM begins, and that after the last round.
    """
    config, setup, _, _ = experiment.load(folder)
    settings = algorithms.settings("fedgmi", config.hyperparameters)
    domains = int(setup.domain.max()) + 1
    algorithm = fedgmi(
        *build.local_training(config),
        **{**settings, "num_components": domains, "truth": setup.domain},
    )
    init_key, key, _ = leg.run_keys(config.seed)
    state = rounds.init_state(algorithm, setup.federation, init_key, setup.execution)
    round_fn = rounds.make_round(algorithm, setup.sampler, setup.execution)
    block = simulate.make_block(round_fn, config.rounds, setup.execution)
    estimate = jax.jit(fedgmi_estimates.make_proportions(algorithm, setup.execution))
    real = np.asarray(setup.federation.cohorts[0].train.size) > 0
    truth = fedgmi_estimates.true_proportions(setup.domain, setup.federation, domains)
    errors = []
    begin = settings["pretrain_rounds"] + settings["guided_rounds"]
    for count in (begin, config.rounds - begin):
        state, _ = block(state, setup.federation, key, jnp.int32(count))
        found = np.asarray(estimate(state, setup.federation, key))
        error = fedgmi_estimates.proportion_error(
            jnp.asarray(found[real]), jnp.asarray(truth[real], jnp.float32)
        )
        errors.append(float(error))
    return tuple(errors)


def main(argv: Sequence[str]) -> None:
    """Look at all runs."""

    def work() -> None:
        if not RUNS.value or SAMPLES.value < 1:
            raise ValueError(
                "runs must name a folder and samples_each be at least 1, got "
                f"{RUNS.value} and {SAMPLES.value}"
            )
        for folder in RUNS.value:
            check(folder)
        if DIAGNOSE.value:
            sys.stdout.write("| run | TV where EM begins | TV at the end |\n")
            sys.stdout.write("|---|---:|---:|\n")
            for folder in RUNS.value:
                first, last = diagnose(folder)
                sys.stdout.write(f"| {folder} | {first:.4f} | {last:.4f} |\n")
            return
        sys.stdout.write(
            "| run | k | TV | TV of a uniform guess | TV of new clients "
            "| accuracy, % | gate, % | with a true gate, % |\n"
        )
        sys.stdout.write("|---|---:|---:|---:|---:|---:|---:|---:|\n")
        for folder in RUNS.value:
            found = look(folder, SAMPLES.value)
            sys.stdout.write(to_line(folder, found))

    run.guard(argv, work, alone=True)


if __name__ == "__main__":
    app.run(main, flags_parser=run.parse)
