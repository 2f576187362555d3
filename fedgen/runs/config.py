"""What a run is asked to do: one flat record, one field a flag."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shlex
from typing import Any

from fedgen import algorithms, models
from fedgen.data import partition, shift

INHERENT = ("rotation", "class_groups")
# How the work is laid out over time and devices; it only changes how sums are rounded.
LAYOUT = ("chunk", "devices")
_FLAGS = {"hyperparameters": "set"}  # Where a flag has another name than its field.


def _flag(default: Any, text: str) -> Any:
    if isinstance(default, (dict, tuple)):
        return dataclasses.field(
            default_factory=lambda: default, metadata={"help": text}
        )
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run; the help of each is its documentation."""

    algorithm: str = _flag("pfedgm", "Algorithm to train; --help lists them all.")
    baselines: tuple[str, ...] = _flag(
        ("local_only", "fedavg"),
        "Algorithms to compare with, on the same data, initial weights and seed; "
        "may be empty.",
    )
    hyperparameters: dict[str, str] = _flag(
        {}, "name=value, a hyper-parameter of --algorithm; repeatable."
    )
    dataset: str = _flag(
        "fashion_mnist_mini",
        "fashion_mnist_mini (embedded), a TFDS image classification data set by name, "
        "or a folder of IDX or .npz files.",
    )
    data_dir: str | None = _flag(None, "Folder of prepared TFDS data sets.")
    samples: int = _flag(0, "Samples of the data set to use, drawn by chance; 0: all.")
    samples_per_client: int = _flag(
        0,
        "Samples that a client draws from the data set, with replacement, on average; "
        "0 gives every sample to one client.",
    )
    partition: str = _flag(
        "dirichlet", f"How clients differ: {', '.join(partition.PARTITIONS)}."
    )
    alpha: float = _flag(0.1, "Concentration of Dirichlet partitions, above 0.")
    classes_per_client: int = _flag(2, "Classes of a client, if pathological.")
    min_size: int = _flag(10, "Fewest samples of a client that a draw may leave.")
    inherent: str = _flag(
        "rotation",
        "Inherent distributions of --partition=mixture: rotation, class_groups, or the "
        "name of a second data set.",
    )
    corruption: str = _flag(
        "",
        "Corrupt half of the clients: all, or kinds separated by commas out of "
        f"{', '.join(shift.CORRUPTIONS)}.",
    )
    severity: int = _flag(3, "Level of --corruption, 1 to 5.")
    num_clients: int = _flag(20, "Clients that train.")
    new_clients: int = _flag(0, "Further clients that only come after training.")
    participation: float = _flag(1.0, "Share of the clients in a round, (0, 1].")
    dropout: float = _flag(0.0, "Chance that a drawn client never reports, [0, 1).")
    stragglers: float = _flag(
        0.0, "Chance that a drawn client finishes only part of its steps, [0, 1)."
    )
    rounds: int = _flag(8, "Communication rounds.")
    local_epochs: int = _flag(1, "Passes over a client's data in a round.")
    local_steps: int = _flag(
        0, "If above 0, that many steps for every client instead of --local_epochs."
    )
    batch_size: int = _flag(50, "Samples of a local step.")
    learning_rate: float = _flag(0.05, "Local learning rate, above 0.")
    learning_rate_decay: float = _flag(
        1.0,
        "Factor of --learning_rate from one round to the next, (0, 1]; rates that an "
        "algorithm has of its own stay.",
    )
    momentum: float = _flag(0.5, "Local momentum, [0, 1).")
    weight_decay: float = _flag(5e-4, "Local weight decay, at least 0.")
    model: str = _flag(
        "small_cnn",
        f"Architecture: {', '.join(models.MODELS)}; several, separated by commas, "
        "make one cohort each.",
    )
    seed: int = _flag(0, "Seed of the data, the weights and the training.")
    eval_every: int = _flag(2, "Rounds between evaluations.")
    eval_clients: int = _flag(
        0,
        "Clients to evaluate, drawn once for the whole run, the same share of every "
        "model's; 0: all.",
    )
    checkpoint_every: int = _flag(2, "Rounds between checkpoints; 0 writes none.")
    chunk: int | str = _flag(
        "auto",
        "Clients trained at once on a device: a number, all, or auto, which is 1 on a "
        "CPU and all elsewhere, but before a training of more than a minute or so the "
        "fastest of a few that a short probe times, once for this machine.",
    )
    devices: int = _flag(
        0,
        "Devices that share the clients; 0 takes all (on a CPU one per core, unless "
        "the probe of --chunk=auto finds one alone to be faster).",
    )

    def __post_init__(self) -> None:
        """Read a number that came as text, as from a command line."""
        if isinstance(self.chunk, str) and self.chunk.lstrip("-").isdecimal():
            object.__setattr__(self, "chunk", int(self.chunk))

    def check(self) -> None:
        """Raise a `ValueError` for whatever can be told without reading data.

        Hyper-parameters and baselines are checked by building their algorithms.
        """
        positive = (
            "num_clients",
            "rounds",
            "local_epochs",
            "batch_size",
            "eval_every",
            "classes_per_client",
        )
        for name in positive:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        natural = (
            "local_steps",
            "checkpoint_every",
            "devices",
            "new_clients",
            "min_size",
            "samples",
            "samples_per_client",
            "eval_clients",
            "seed",
        )
        for name in natural:
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for field in dataclasses.fields(self):
            if isinstance(field.default, int):
                value = getattr(self, field.name)
                self._require(field.name, value < 2**31, "below 2^31")
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            self._require(name, 0 < value < float("inf"), "above 0 and finite")
        for name in ("participation", "learning_rate_decay"):
            self._require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        for name in ("momentum", "dropout", "stragglers"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        decay = self.weight_decay
        self._require(
            "weight_decay", 0 <= decay < float("inf"), "at least 0 and finite"
        )
        self._require("severity", 1 <= self.severity <= 5, "between 1 and 5")
        everybody = f"at most the {self.num_clients} clients"
        self._require("eval_clients", self.eval_clients <= self.num_clients, everybody)
        clients = self.num_clients + self.new_clients
        most = (2**31 - 1) // clients
        expected = f"at most {most} for {clients} clients"
        self._require("samples_per_client", self.samples_per_client <= most, expected)
        if isinstance(self.chunk, str):
            known = self.chunk in ("auto", "all")
            self._require("chunk", known, "a number, all or auto")
        else:
            self._require("chunk", self.chunk >= 1, "at least 1")
            self._require("chunk", self.chunk <= self.num_clients, everybody)
        nearest("algorithm", self.algorithm, algorithms.REGISTRY)
        for name in self.baselines:
            nearest("baseline", name, algorithms.REGISTRY)
        nearest("partition", self.partition, partition.PARTITIONS)
        for name in self.model.split(","):
            models.find(name)
        for kind in self.corruptions:
            nearest("corruption", kind, shift.CORRUPTIONS)
        if self.corruption and self.samples_per_client:
            raise ValueError(
                "corruption must be empty with samples_per_client, since clients share "
                f"samples then, got {self.corruption!r}"
            )
        repeated = {n for n in self.baselines if self.baselines.count(n) > 1}
        if repeated:
            raise ValueError(f"baselines must differ, got {sorted(repeated)} twice")
        if self.algorithm in self.baselines and self.hyperparameters:
            raise ValueError(
                f"{self.algorithm} is both the algorithm and a baseline; with "
                "hyper-parameters of its own the two could not be told apart"
            )

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Return the kinds of corruption, none if there is no corruption."""
        if self.corruption == "all":
            return tuple(shift.CORRUPTIONS)
        return tuple(kind for kind in self.corruption.split(",") if kind)

    @property
    def legs(self) -> tuple[str, ...]:
        """Return the names of all algorithms to train, the main one first."""
        others = tuple(name for name in self.baselines if name != self.algorithm)
        return (self.algorithm, *others)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


def typed(name: str, text: str) -> Any:
    """Read the value of a flag.

    Raises:
      ValueError: If it is not of the flag's type.
    """
    kind = type(getattr(Config(), name))
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be of type {kind.__name__}, got {text!r}"
        ) from None


def nearest(what: str, name: str, known: Any) -> None:
    """Raise a `ValueError` that proposes the nearest known name, unless it is one."""
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
        raise ValueError(
            f"unknown {what} {name!r}; did you mean {near[0]!r}? "
            f"Known: {', '.join(known)}"
        )


def to_json(config: Config) -> dict[str, Any]:
    """Return the configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def short_hash(config: Config) -> str:
    """Hash a configuration, whatever its layout, to eight hexadecimal digits."""
    layout = {name: getattr(Config(), name) for name in LAYOUT}
    text = json.dumps(to_json(config) | layout, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(config: Config, stored: dict[str, Any]) -> list[str]:
    """List `--flag was A, is B` for every flag that differs from a stored run's.

    The layout does not count: a run goes on under any.
    """
    # A flag that is younger than the run had its default.
    stored = to_json(type(config)()) | stored
    return [
        f"--{_FLAGS.get(name, name)} was {_show(stored[name]) or 'empty'}, "
        f"is {_show(value) or 'empty'}"
        for name, value in to_json(config).items()
        if name not in LAYOUT and stored[name] != value
    ]


def command(config: Config) -> str:
    """Write the command line that repeats a run, without the defaults."""
    words = ["python", "-m", "experiments.run"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = getattr(Config(), field.name)
        if value == default:
            continue
        if isinstance(value, dict):
            words += [f"--set={key}={each}" for key, each in value.items()]
        else:
            words.append(f"--{field.name}={_show(value)}")
    return shlex.join(words)


def _show(value: Any) -> str:
    """Write a value as on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{key}={each}" for key, each in value.items())
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
