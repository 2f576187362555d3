"""From a configuration to the objects of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedgen import algorithms, models
from fedgen.core import execution, participation
from fedgen.core.algorithm import Algorithm
from fedgen.core.execution import Execution
from fedgen.core.federation import Federation
from fedgen.core.fit import Schedule, is_given, scale_by_round
from fedgen.core.participation import Sampler
from fedgen.data import federate, partition, shift, sources
from fedgen.data.partition import Split
from fedgen.data.sources import Source
from fedgen.runs.config import INHERENT, Config


class Setup(NamedTuple):
    """All that the algorithms of a run share."""

    federation: Federation
    newcomers: Federation | None
    counts: np.ndarray  # [n, c] training samples of the clients that train
    domain: np.ndarray | None  # [rows] inherent distribution of every pool row
    sampler: Sampler
    execution: Execution
    layout: str  # who chose the execution, for the record


Choose = Callable[[Config, Federation], tuple[Execution, str]]


def by_platform(config: Config, federation: Federation) -> tuple[Execution, str]:
    """Lay clients out as the flags say, and where they do not, as the platform is."""
    del federation
    mesh = execution.make_mesh(config.devices or len(jax.devices()))
    given = config.chunk != "auto" and config.devices
    return (
        Execution(execution.read_chunk(config.chunk), mesh),
        "as given" if given else "platform's default",
    )


def build(config: Config, choose: Choose = by_platform) -> Setup:
    """Read the data, deal it out and lay the clients out over the devices.

    Args:
      config: What is asked for.
      choose: Chooses the layout for a federation that lies on one device.

    Raises:
      ValueError: If the data, or what is asked of it, does not fit.
    """
    execution.make_mesh(config.devices or len(jax.devices()))  # or refused
    sampler = participation.unreliable(
        participation.uniform(config.participation),
        dropout=config.dropout,
        stragglers=config.stragglers,
    )

    total = config.num_clients + config.new_clients
    source, owner, split, domain = _deal(config, total)
    if config.corruptions:
        source = source._replace(
            x=shift.corrupt_clients(
                source.x,
                owner,
                kinds=config.corruptions,
                severity=config.severity,
                seed=config.seed,
                num_clients=total,
            )
        )
    shape = source.x.shape[1:]
    architectures = [
        models.build(name, shape, source.num_classes)
        for name in config.model.split(",")
    ]
    newcomers = np.arange(total) >= config.num_clients
    federation = federate.federate(
        source, split, architectures, clients=np.flatnonzero(~newcomers)
    )
    held = np.repeat(np.arange(total), sum(part.size for part in split[1:]))
    trains = np.arange(held.size) - split.train.start[held] < split.train.size[held]
    counts = partition.counts(
        held[trains], source.y[split.order[trains]], total, source.num_classes
    )
    layout, chosen = choose(config, federation)
    return Setup(
        execution.place(federation, layout.mesh),
        federate.federate(
            source, split, architectures, clients=np.flatnonzero(newcomers)
        )
        if config.new_clients
        else None,
        counts[: config.num_clients],
        domain,
        sampler,
        layout,
        chosen,
    )


def fingerprint(setup: Setup) -> str:
    """Hash what several processes must have read and dealt alike."""
    federation, sha = setup.federation, hashlib.sha256()
    order = [cohort.order for cohort in federation.cohorts]
    for array in (*federation.pool, *order, setup.counts):
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()


def build_algorithm(config: Config, name: str) -> Algorithm:
    """Build an algorithm with the run's local optimiser and schedule.

    Raises:
      ValueError: If a hyper-parameter is unknown or out of range, or the run is too
        short for what the algorithm does after its first rounds.
    """
    own = config.hyperparameters if name == config.algorithm else {}
    algorithm = algorithms.make(name, *local_training(config), own)
    if config.rounds < algorithm.min_rounds:
        raise ValueError(
            f"rounds must be at least {algorithm.min_rounds} for {name}, whose first "
            f"rounds its hyper-parameters make a warm-up, got {config.rounds}"
        )
    return algorithm


def local_training(config: Config) -> tuple[optax.GradientTransformation, Schedule]:
    """Return the run's local optimiser and schedule."""
    momentum = config.momentum if is_given(config.momentum) else None
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(config.learning_rate, momentum=momentum),
        scale_by_round(lambda count: jnp.power(config.learning_rate_decay, count)),
    )
    return optimizer, Schedule(
        config.batch_size, config.local_epochs, config.local_steps or None
    )


def _deal(
    config: Config, num_clients: int
) -> tuple[Source, np.ndarray, Split, np.ndarray | None]:
    """Load the samples and deal them out.

    Returns:
      The samples; the client of each, or of each draw if clients draw them; the rows of
      every client; the inherent distribution of every sample, if there are any.
    """
    source = sources.load(config.dataset, config.data_dir)
    domain = None
    if config.partition == "mixture":
        source, domain = _inherent(config, source)
    if config.samples:
        source, domain = _some(config, source, domain)
    # What is dealt out: every row once, or draws with the label and domain of some row.
    count, dealt = config.samples_per_client * num_clients, slice(None)
    if count:
        rng = np.random.default_rng((config.seed, 1))  # partitions draw from the seed
        dealt = rng.integers(len(source.y), size=count, dtype=np.int32)
    labels = source.y[dealt]
    owner = partition.partition(
        config.partition,
        labels,
        num_clients,
        seed=config.seed,
        alpha=config.alpha,
        classes_per_client=config.classes_per_client,
        min_size=config.min_size,
        domain=None if domain is None else domain[dealt],
    )
    split = partition.split(owner, labels, num_clients, seed=config.seed)
    if count:
        kind = source.y if domain is None else source.y + source.num_classes * domain
        split = partition.redraw(split, kind[dealt], kind, seed=config.seed)
    return source, owner, split, domain


def _some(
    config: Config, source: Source, domain: np.ndarray | None
) -> tuple[Source, np.ndarray | None]:
    """Draw as many samples as the flags ask for."""
    total = len(source.y)
    if config.samples > total:
        raise ValueError(
            f"samples must be at most the {total} of {source.name}, "
            f"got {config.samples}"
        )
    rows = np.random.default_rng(config.seed).permutation(total)[: config.samples]
    some = source._replace(
        x=source.x[rows],
        y=source.y[rows],
        users=None if source.users is None else source.users[rows],
    )
    return some, None if domain is None else domain[rows]


def _inherent(config: Config, source: Source) -> tuple[Source, np.ndarray]:
    """Turn a source into samples of several inherent distributions."""
    if config.inherent == "rotation":
        rng = np.random.default_rng(config.seed)
        domain = rng.integers(0, 4, len(source.y))
        return source._replace(x=shift.rotations(source.x, domain)), domain
    if config.inherent == "class_groups":
        return source, shift.class_groups(source.y, config.classes_per_client)
    try:
        other = sources.load(config.inherent, config.data_dir)
    except ValueError as error:
        raise ValueError(
            f"inherent must be one of {', '.join(INHERENT)} or a second data set, "
            f"got {config.inherent!r}: {error}"
        ) from error
    return shift.two_sources(source, other)
