"""Ask where pFedGPA's diffusion beats its controls: many clients, in several groups.

Takes the flags of experiments.run. Clients of a group share a permutation of the
labels, so that each group is a mode of the population, with many uploads. Every
variant of the generator stands beside the same pipeline with the best linear map
("linear") and without any generation ("none"); all of a seed share data and warm-up.
Newcomers join after the last round. Writes tables.md, results.json, and of the first
seed memory.md and two pictures. Flags that would have no effect are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from absl import app, flags
from jax.flatten_util import ravel_pytree
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import run
from experiments.seeds import SEEDS
from fedgen import algorithms, models
from fedgen.aggregators import diffusion
from fedgen.algorithms.pfedgpa import fit_codec, init_learner, learn
from fedgen.core import evaluate, execution, rounds, simulate
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Federation
from fedgen.core.participation import Participants
from fedgen.data import federate, partition, shift, sources
from fedgen.models import denoiser
from fedgen.runs import build, leg
from fedgen.runs.config import Config

GROUPS = flags.DEFINE_integer("groups", 4, "Label permutations among the clients.")
VARIANTS = flags.DEFINE_list(
    "variants",
    [
        "noise_maps:100:0.5",
        "noise_maps:300:0.5",
        "noise_maps:100:0",
        "ddim:100:0.9",
        "noising:30:1",
        "noising:100:1",
    ],
    "version:depth:gamma of each variant; the newcomers meet the first.",
)
OMEGAS = flags.DEFINE_list("omegas", ["-1", "0", "4"], "Guidance of the newcomers.")

NEWCOMER_ROUNDS, LOCAL_ROUNDS = 2, (1, 2, 3, 10)
FOLDS, MEMORY_STEPS = 5, 300  # of the picture of what a denoiser remembers
SIZES = (10, 20, 40, 80, 160, 320)
IGNORED = (
    "baselines",
    "samples",
    "samples_per_client",
    "inherent",
    "corruption",
    "severity",
    "participation",
    "dropout",
    "stragglers",
    "eval_every",
    "eval_clients",
    "checkpoint_every",
    "devices",
)
OWN = ("generator", "version", "depth", "gamma", "omega")  # set by the variants
PICTURED = ("rank", "layers", "center")


class Score(NamedTuple):
    """Accuracies `[n]` of a method's clients; of the download, and after an update."""

    received: np.ndarray | None
    updated: np.ndarray


def build_federation(config: Config, groups: int, seed: int) -> Federation:
    """Deal a data set to clients whose groups name the classes differently."""
    source = sources.load(config.dataset, config.data_dir)
    n = config.num_clients + config.new_clients
    owner = partition.partition(
        config.partition,
        source.y,
        n,
        seed=seed,
        alpha=config.alpha,
        classes_per_client=config.classes_per_client,
        min_size=config.min_size,
    )
    renamed = shift.permute_labels(
        source.y, owner % groups, source.num_classes, seed=seed
    )
    split = partition.split(owner, renamed, n, seed=seed)
    model = models.build(config.model, source.x.shape[1:], source.num_classes)
    return federate.federate(source._replace(y=renamed), split, model)


def members(start: int, stop: int):
    """Sample the clients `start..stop - 1`, always and all of them."""

    def sample(key, federation):
        del key, federation
        slot = jnp.arange(start, stop)
        return (Participants(slot, slot >= 0, jnp.ones(slot.shape)),)

    return sample


class Lab:
    """Runs methods, each compiled once for all seeds."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.execution = Execution(execution.read_chunk(config.chunk))
        self._compiled: dict[Any, Any] = {}

    def algorithm(self, **hyperparameters: Any) -> Algorithm:
        """Build pFedGPA, or fedavg_ft or local_only by `name`."""
        key = tuple(sorted(hyperparameters.items()))
        if key not in self._compiled:
            own = {**self.config.hyperparameters, **hyperparameters}
            name = own.pop("name", "pfedgpa")
            if name != "pfedgpa":
                own = {}
            config = dataclasses.replace(
                self.config, algorithm=name, hyperparameters=own
            )
            self._compiled[key] = build.build_algorithm(config, name)
        return self._compiled[key]

    def init(self, algorithm: Algorithm, federation: Federation, seed: int) -> State:
        """Initialise as experiments.run does."""
        key = leg.run_keys(seed)[0]
        return rounds.init_state(algorithm, federation, key, self.execution)

    def train(self, algorithm, sampler, state, federation, seed, count) -> State:
        """Run rounds on a copy of the state."""
        name = id(algorithm), sampler
        if name not in self._compiled:
            round_fn = rounds.make_round(algorithm, sampler, self.execution)
            self._compiled[name] = simulate.make_block(round_fn, self.config.rounds)
        state = jax.tree.map(jnp.copy, state)
        blocks = simulate.simulate(
            self._compiled[name],
            state,
            federation,
            leg.run_keys(seed)[1],
            num_rounds=int(state.round) + count,
            rounds_per_block=self.config.rounds,
        )
        return [state for state, _ in blocks][-1] if count else state

    def score(self, algorithm, state, federation, seed) -> Score:
        """Score the test rows of all clients."""
        shapes = jax.tree.map(jnp.shape, state)
        name = "score", algorithm.receive is None, str(jax.tree.structure(shapes))
        if name not in self._compiled:
            fn = evaluate.make_evaluate(algorithm, self.execution)
            self._compiled[name] = jax.jit(fn)
        key = leg.run_keys(seed)[2]
        test = jax.device_get(self._compiled[name](state, federation, key)).test
        received = None
        if algorithm.receive is not None:
            received = leg.accuracy(test._replace(correct=test.received_correct))
        return Score(received, leg.accuracy(test))


def variant(text: str) -> dict[str, Any]:
    """Read version:depth:gamma.

    Raises:
      ValueError: If it is not of that form.
    """
    try:
        version, depth, gamma = text.split(":")
        return {"version": version, "depth": int(depth), "gamma": float(gamma)}
    except ValueError:
        raise ValueError(
            f"a variant must be version:depth:gamma, got {text!r}"
        ) from None


def one_seed(lab: Lab, variants, omegas, groups: int, seed: int):
    """Train everything of one seed.

    Returns:
      Scores of the training clients by method, those of newcomers, and the end of the
      first variant, for pictures.
    """
    config, say = lab.config, functools.partial(print, file=sys.stderr, flush=True)
    n, total = config.num_clients, config.num_clients + config.new_clients
    federation = build_federation(config, groups, seed)
    old, new = samplers(n, total)
    warmup = int(config.hyperparameters["warmup"])
    trained, newcomers, warm = {}, {}, {}

    def keep(table, name, score, part):
        table[name] = Score(*(None if a is None else a[part] for a in score))
        say(f"seed {seed} {name}: {' / '.join(map(mean, table[name]))}")

    reference = None
    for text in variants:
        for generator in ("diffusion", "linear"):
            algorithm = lab.algorithm(generator=generator, **variant(text))
            if generator not in warm:  # It knows no version, depth or gamma.
                start = lab.init(algorithm, federation, seed)
                warm[generator] = lab.train(
                    algorithm, old, start, federation, seed, warmup
                )
            end = lab.train(
                algorithm,
                old,
                warm[generator],
                federation,
                seed,
                config.rounds - warmup,
            )
            score = lab.score(algorithm, end, federation, seed)
            keep(trained, f"{generator} {text}", score, slice(n))
            reference = end if reference is None else reference
    none = lab.algorithm(generator="none")
    start = lab.init(none, federation, seed)
    end = alone = lab.train(none, old, start, federation, seed, config.rounds)
    keep(trained, "none", lab.score(none, end, federation, seed), slice(n))
    for name in ("local_only", "fedavg_ft"):
        algorithm = lab.algorithm(name=name)
        start = lab.init(algorithm, federation, seed)
        end = lab.train(algorithm, old, start, federation, seed, config.rounds)
        keep(trained, name, lab.score(algorithm, end, federation, seed), slice(n))

    local = lab.algorithm(name="local_only")
    state = lab.init(local, federation, seed)
    for count in LOCAL_ROUNDS:
        state = lab.train(local, new, state, federation, seed, count - int(state.round))
        score = lab.score(local, state, federation, seed)
        keep(newcomers, f"own start, {count} local rounds", score, slice(n, total))
    # The same population mean for all.
    server = alone.server._replace(params=reference.server.params)
    runs = {"mean, local rounds only": (none, alone._replace(server=server))}
    for omega in omegas:
        algorithm = lab.algorithm(
            generator="diffusion", omega=omega, **variant(variants[0])
        )
        runs[f"mean, denoised, omega {omega:g}"] = algorithm, reference
    ordinary = reference.server._replace(guided=0 * reference.server.guided)
    runs["mean, inverted as all others"] = (
        algorithm,
        reference._replace(server=ordinary),
    )
    for name, (algorithm, state) in runs.items():
        end = lab.train(algorithm, new, state, federation, seed, NEWCOMER_ROUNDS)
        score = lab.score(algorithm, end, federation, seed)
        keep(newcomers, name, score, slice(n, total))
    return trained, newcomers, reference


@functools.cache
def samplers(n: int, total: int):
    """Return the samplers of old and of new clients, always the same two."""
    return members(0, n), members(n, total)


def gap(a: np.ndarray, b: np.ndarray) -> str:
    """Describe the paired difference `a - b`, `[seeds, n]`, in points.

    The interval is Student's over clients and seeds; the means by seed stand beside.
    """
    difference = 100 * (a - b)
    by_seed = ", ".join(f"{d:+.1f}" for d in np.nanmean(difference, axis=1))
    flat = difference[np.isfinite(difference)]
    low, high = scipy.stats.ttest_1samp(flat, 0).confidence_interval(0.95)
    return f"{flat.mean():+.2f} [{low:+.2f}, {high:+.2f}] ({by_seed})"


def mean(a: np.ndarray | None) -> str:
    """Write a mean in percent."""
    return "" if a is None else f"{100 * np.nanmean(a):.1f}"


def stack(results: Sequence[dict[str, Score]]) -> dict[str, Score]:
    """Join seeds, `[seeds, n]`."""
    return {
        name: Score(
            *(
                None if part[0] is None else np.stack(part)
                for part in zip(*(seed[name] for seed in results), strict=True)
            )
        )
        for name in results[0]
    }


def training_table(scores: dict[str, Score], variants: Sequence[str]) -> str:
    """Compare every variant with its linear twin and with no generation."""
    lines = [
        "| method | as received | updated | minus linear, received | "
        "minus linear, updated | minus none, received | minus none, updated |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    none = scores["none"]
    for name, score in scores.items():
        cells = [name, mean(score.received), mean(score.updated)]
        generator, _, text = name.partition(" ")
        twin = scores[f"linear {text}"] if generator == "diffusion" else None
        for other in (twin, none if text in variants else None):
            for part in range(2):
                cells.append("" if other is None else gap(score[part], other[part]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def newcomer_table(scores: dict[str, Score]) -> str:
    """Compare two rounds from the population's mean with ten of one's own."""
    ten = scores[f"own start, {LOCAL_ROUNDS[-1]} local rounds"].updated
    plain = scores["mean, local rounds only"]
    lines = [
        "| newcomers | after 2 rounds | after one more update | after 2 minus ten own "
        "| updated minus local rounds only |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, score in scores.items():
        cells = [name, mean(score.received), mean(score.updated), "", ""]
        if score.received is not None:
            cells[3] = gap(score.received, ten)
            if score is not plain:
                cells[4] = gap(score.updated, plain.updated)
        else:
            cells[1:3] = mean(score.updated), ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Pictures.


class Population(NamedTuple):
    """The codes of a server's replay."""

    codec: Any
    codes: jax.Array  # [n, B, r]
    weight: jax.Array  # [n, B]
    newest: jax.Array  # [n, p] deviations of the last uploads
    sent: jax.Array  # [n, p] deviations generated from them


def look(state: State, hyperparameters: dict[str, Any], n: int) -> Population:
    """Read the population of the training clients off a server."""
    server = state.server
    rows, weight = server.replay.flat()
    codec, codes = fit_codec(
        rows,
        weight,
        rank=server.directions.shape[0],
        scale=hyperparameters.get("scale", "scalar"),
        previous=server.directions,
    )
    clients, size, _ = server.replay.rows.shape
    last = (server.replay.pushes - 1) % size
    newest = server.replay.rows[jnp.arange(clients), last]
    sent = server.sent - ravel_pytree(server.params)[0][None]
    shape = clients, size
    return Population(
        codec,
        codes.reshape(*shape, -1)[:n],
        weight.reshape(shape)[:n],
        newest[:n],
        sent[:n],
    )


def fit_denoiser(population: Population, clients: np.ndarray, steps: int, key):
    """Train a denoiser on some clients' codes.

    Returns:
      Losses `[n]` of the denoiser and of the best linear one, on all clients' codes.
    """
    times = diffusion.linear_schedule()
    n, size, r = population.codes.shape
    codes = population.codes.reshape(n * size, r)
    weight = (population.weight * jnp.asarray(clients, jnp.float32)[:, None]).ravel()
    share = weight / jnp.sum(weight)
    center = share @ codes
    deviation = codes - center[None]
    cov = (share[:, None] * deviation).T @ deviation
    base = diffusion.gaussian_denoiser(times, center, cov)
    network = denoiser.residual_mlp(r)
    adam = optax.adam(1e-3)
    init_key, learn_key, score_key = jax.random.split(key, 3)
    learner, _ = learn(
        network,
        adam,
        times,
        base,
        init_learner(network.init(init_key), adam),
        learn_key,
        codes,
        weight,
        steps=steps,
        batch_size=64,
        jitter=0.02,
        decay=0.99,
    )

    def trained(x, t):
        return base(x, t) + network.apply(learner.average, x, t)

    def losses(denoise):
        def one(row):
            many = jnp.broadcast_to(row, (32, r))
            return diffusion.simple_loss(denoise, times, many, key=score_key)

        each = jax.lax.map(jax.vmap(one), population.codes)  # [n, B]
        return jnp.mean(each, axis=1)

    return losses(trained), losses(base)


def picture_codes(population: Population, first: dict[str, Any], groups: int, path):
    """Draw uploads, noised to latent codes, and what was generated, by group."""
    times = diffusion.linear_schedule()
    encode = jax.vmap(population.codec.encode)
    z, generated = encode(population.newest), encode(population.sent)
    keys = jax.random.split(jax.random.key(0), len(z))

    noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
    # Latents of noise maps and of noising; that of DDIM follows the denoiser.
    latent = jax.vmap(diffusion.forward, (None, 0, None, 0))(
        times, z, first["depth"], noise
    )
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    group = np.arange(len(z)) % groups
    for axes, points, title in zip(
        panels,
        (z, latent, generated),
        ("uploads", f"latent codes at depth {first['depth']}", "generated"),
        strict=True,
    ):
        points = np.asarray(points)
        for g in range(groups):
            axes.scatter(*points[group == g, :2].T, s=8, label=f"group {g}")
        axes.set_title(title)
        axes.set_xlabel("code 1")
    panels[0].set_ylabel("code 2")
    panels[0].legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))


def picture_memory(population: Population, steps: int, folds: int, path) -> str:
    """Draw distances to stored uploads against losses, and losses by population."""
    n = len(population.codes)
    fit = jax.jit(
        lambda mask, key: fit_denoiser(population, mask, steps, key),
    )
    key = jax.random.key(0)
    everyone = np.ones(n)
    inside, _ = fit(everyone, key)
    fold = np.random.default_rng(0).permutation(n) % folds
    left_out = np.zeros(n)
    for f in range(folds):
        held, _ = fit(fold != f, key)
        left_out[fold == f] = np.asarray(held)[fold == f]

    encode = jax.vmap(population.codec.encode)
    generated = np.asarray(encode(population.sent))
    stored = np.asarray(population.codes)  # [n, B, r]
    away = np.linalg.norm(generated[:, None, None] - stored[None], axis=-1).min(2)
    own = np.diag(away).copy()
    np.fill_diagonal(away, np.inf)
    other = away.min(1)

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(left_out - np.asarray(inside), own, s=9, label="own stored upload")
    left.scatter(
        left_out - np.asarray(inside), other, s=9, marker="x", label="another client's"
    )
    left.set_xlabel("loss left out minus loss in training")
    left.set_ylabel("distance of generated code to nearest")
    left.legend(fontsize=7)
    lines = ["| clients | loss on theirs | on others | linear, on others |"]
    lines.append("|---:|---:|---:|---:|")
    sizes = [s for s in SIZES if s < n]
    curves = []
    order = np.random.default_rng(1).permutation(n)
    for size in sizes:
        mask = np.isin(np.arange(n), order[:size])
        network, linear = map(np.asarray, fit(mask, key))
        last = order[sizes[-1] :]
        curves.append((network[mask].mean(), network[last].mean(), linear[last].mean()))
        lines.append(f"| {size} | " + " | ".join(f"{c:.3f}" for c in curves[-1]) + " |")
    for values, label in zip(
        np.array(curves).T,
        ("network, its clients", "network, others", "linear, others"),
        strict=True,
    ):
        right.plot(sizes, values, marker="o", label=label)
    right.set_xscale("log")
    right.set_xlabel("clients the denoiser is trained on")
    right.set_ylabel("denoising loss")
    right.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))
    nearer = np.mean(own < other)
    lines.append("")
    lines.append(
        f"Left out by {folds} folds: loss {left_out.mean():.3f}, in training "
        f"{np.asarray(inside).mean():.3f}. Nearest stored upload of a generated code: "
        f"own in {100 * nearer:.0f} % of the clients; distances {own.mean():.2f} (own) "
        f"and {other.mean():.2f} (others'), in units of the codes' standard deviation."
    )
    return "\n".join(lines)


def read_config() -> Config:
    """Collect and check the flags.

    Raises:
      ValueError: If a flag is out of range, or would be ignored.
    """
    asked, usual = run.read_config(), Config()
    for name in IGNORED:
        value, default = getattr(asked, name), getattr(usual, name)
        if value != default:
            raise ValueError(f"{name} has no effect here and must be unset: {value!r}")
    if run.RESUME.value:
        raise ValueError("resume has no effect here and must be unset")
    if asked.algorithm not in (usual.algorithm, "pfedgpa"):
        raise ValueError(f"algorithm must be pfedgpa, got {asked.algorithm}")
    for name in OWN:
        if name in asked.hyperparameters:
            raise ValueError(
                f"{name} follows from --variants and --omegas, got --set={name}="
                f"{asked.hyperparameters[name]}"
            )
    own = {"warmup": "10", "newcomer_rounds": str(NEWCOMER_ROUNDS)}
    config = dataclasses.replace(
        asked,
        algorithm="pfedgpa",
        baselines=(),
        hyperparameters={**own, **asked.hyperparameters},
    )
    config.check()
    if config.num_clients <= SIZES[0]:
        raise ValueError(
            f"num_clients must be above {SIZES[0]}, got {config.num_clients}"
        )
    if config.partition == "mixture" or "," in config.model:
        raise ValueError(
            "partition must not be mixture and model must be one, got "
            f"{config.partition} and {config.model}"
        )
    values = algorithms.settings("pfedgpa", config.hyperparameters)
    if values["rank"] is None or values["layers"] != "all" or not values["center"]:
        raise ValueError(
            "the pictures need a number for rank, layers=all and center=true, got "
            + ", ".join(f"{name}={values[name]}" for name in PICTURED)
        )
    return config


def read_omegas() -> list[float]:
    """Read --omegas.

    Raises:
      ValueError: If there are none, or one is not a number.
    """
    try:
        omegas = [float(omega) for omega in OMEGAS.value]
    except ValueError:
        raise ValueError(
            f"omegas must be numbers, got {','.join(OMEGAS.value)}"
        ) from None
    if not omegas:
        raise ValueError("omegas must hold a number, got none")
    return omegas


def work() -> None:
    """Do what the flags say."""
    config = read_config()
    variants, omegas = VARIANTS.value, read_omegas()
    if not variants:
        raise ValueError("variants must hold a version:depth:gamma, got none")
    lab = Lab(config)
    for text in variants:
        lab.algorithm(generator="diffusion", **variant(text))
        lab.algorithm(generator="linear", **variant(text))
    for omega in omegas:
        lab.algorithm(generator="diffusion", omega=omega, **variant(variants[0]))
    if not 1 <= GROUPS.value <= config.num_clients:
        raise ValueError(
            f"groups must be in [1, {config.num_clients}], got {GROUPS.value}"
        )
    if SEEDS.value < 1 or config.new_clients < 2:
        raise ValueError(
            "seeds must be at least 1 and new_clients at least 2, got "
            f"{SEEDS.value} and {config.new_clients}"
        )
    folder = pathlib.Path(run.WORKDIR.value or "runs/population")
    folder.mkdir(parents=True, exist_ok=True)
    everything = []
    for seed in range(config.seed, config.seed + SEEDS.value):
        *scores, reference = one_seed(lab, variants, omegas, GROUPS.value, seed)
        everything.append(scores)
        trained, newcomers = (stack(part) for part in zip(*everything, strict=True))
        tables = [training_table(trained, variants), newcomer_table(newcomers)]
        (folder / "tables.md").write_text("\n\n".join(tables) + "\n")
        record = jax.tree.map(lambda a: a.tolist(), (trained, newcomers))
        (folder / "results.json").write_text(json.dumps(record))
        if seed == config.seed:
            population = look(reference, config.hyperparameters, config.num_clients)
            first = variant(variants[0])
            picture_codes(population, first, GROUPS.value, folder / "codes.png")
            text = picture_memory(
                population, MEMORY_STEPS, FOLDS, folder / "memory.png"
            )
            (folder / "memory.md").write_text(text + "\n")
    sys.stdout.write((folder / "tables.md").read_text())


def main(argv: Sequence[str]) -> None:
    """Compare what the flags say."""
    run.guard(argv, work, alone=True, devices=1)


if __name__ == "__main__":
    app.run(main, flags_parser=run.parse)
