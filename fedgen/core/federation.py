"""The problem: who the clients are, what they hold and which model they train.

Axis letters, here and everywhere: `n` clients of a cohort, `m` participants of a
round, `s` samples of a client, `b` minibatch, `t` local steps, `c` classes,
`d` features, `k` mixture components, `p` parameters.

Samples are held once, in a pool, as they lie on disk. A client is a run of the
`order` array, which lists pool rows client after client (compressed sparse rows):
client `i` holds `order[start[i] : start[i] + size[i]]`. No client is padded to
the size of another, so memory and work follow real samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Params = PyTree


class Model(NamedTuple):
    """An architecture as pure functions, with the head split off.

    `init(key) -> {"body": ..., "head": ...}`; `embed` reads the body and `head`
    the head, each from the whole dictionary, so that either can be replaced.

    Attributes:
      name: Name and width, for messages and reports.
      init: `key -> params`.
      embed: `(params, x [b, ...]) -> z [b, d]`.
      head: `(params, z [b, d]) -> logits [b, c]`.
      dim: Width `d` of the representation.
    """

    name: str
    init: Callable[[jax.Array], Params]
    embed: Callable[[Params, jax.Array], jax.Array]
    head: Callable[[Params, jax.Array], jax.Array]
    dim: int

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        """Compute logits, `[b, ...] -> [b, c]`."""
        return self.head(params, self.embed(params, x))


class Pool(NamedTuple):
    """All samples of a federation, once."""

    x: jax.Array  # [rows, ...] uint8 images or float features
    y: jax.Array  # [rows] int32 labels


class Rows(NamedTuple):
    """Which pool rows the clients of a cohort hold, or one client when mapped."""

    start: jax.Array  # [n] int32, where a client's run of `order` begins
    size: jax.Array  # [n] int32, how many samples it holds


class Batch(NamedTuple):
    """A minibatch; rows with mask 0 hold zeros and count for nothing."""

    x: jax.Array  # [b, ...] float32
    y: jax.Array  # [b] int32
    mask: jax.Array  # [b] float32, 1 for a sample and 0 for padding


class Data(NamedTuple):
    """One client's samples, as the client functions of an algorithm see them.

    `work` is the share of its local steps that a client gets done this round:
    1, less for a straggler, 0 for a client that is only padding. `round` counts the
    rounds before this one, for rates that decay; in evaluation, all rounds so far.
    """

    pool: Pool
    order: jax.Array  # [all samples] int32, shared by all clients
    start: jax.Array  # []
    size: jax.Array  # []
    work: jax.Array  # [] float32
    round: jax.Array | int = 0  # [] int32

    def take(self, position: jax.Array, mask: jax.Array) -> Batch:
        """Gather the samples at `position [b]` of this client, where `mask [b]`."""
        row = self.order[jnp.where(mask, self.start + position, 0)]
        x = normalise(self.pool.x[row])
        x = jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, 0.0)
        y = jnp.where(mask, self.pool.y[row], 0)
        return Batch(x, y, mask.astype(jnp.float32))


class Context(NamedTuple):
    """What an algorithm's functions know beside their arguments.

    Attributes:
      model: The architecture of the client's cohort.
      num_classes: Number of classes `c`.
      public: Data that everybody may read, or None.
    """

    model: Model
    num_classes: int
    public: Pool | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "order", "train", "validation", "test", "by_id"],
    meta_fields=["model", "num_real"],
)
@dataclasses.dataclass(frozen=True)
class Cohort:
    """The clients that share one architecture.

    Attributes:
      model: The architecture (static under jit).
      ids: `[n]` client numbers over the whole federation; they seed a client's
        randomness. -1 marks padding, which makes `n` divide by the devices.
      order: `[samples]` pool rows, client after client.
      train: Rows to train on.
      validation: Rows that may choose hyper-parameters, rounds and epochs.
      test: Rows that are only ever scored.
      num_real: Number of clients without the padding (static under jit).
      by_id: `[num_real]` positions of the clients in the order of their ids; None
        where they lie in that order, without padding.
    """

    model: Model
    ids: jax.Array
    order: jax.Array
    train: Rows
    validation: Rows
    test: Rows
    num_real: int
    by_id: jax.Array | None = None

    @property
    def num_clients(self) -> int:
        """Number of clients `n`, padding included."""
        return self.ids.shape[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pool", "cohorts", "public"],
    meta_fields=["num_classes"],
)
@dataclasses.dataclass(frozen=True)
class Federation:
    """Clients in cohorts, over one pool of samples.

    Attributes:
      pool: All samples.
      cohorts: One entry per architecture.
      num_classes: Number of classes `c` (static under jit).
      public: Public or proxy samples, or None.
    """

    pool: Pool
    cohorts: tuple[Cohort, ...]
    num_classes: int
    public: Pool | None = None

    def context(self, cohort: int) -> Context:
        """Return what the functions of an algorithm know in this cohort."""
        return Context(self.cohorts[cohort].model, self.num_classes, self.public)

    def only_model(self, name: str) -> Model:
        """Return the single architecture, for algorithms that average weights.

        Raises:
          ValueError: If there are several cohorts.
        """
        if len(self.cohorts) != 1:
            raise ValueError(
                f"{name} averages weights, so all clients must share one "
                f"architecture; got {len(self.cohorts)} cohorts: "
                + ", ".join(cohort.model.name for cohort in self.cohorts)
            )
        return self.cohorts[0].model


def normalise(x: jax.Array) -> jax.Array:
    """Map uint8 images from [0, 255] to [-1, 1]; leave float features alone."""
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 127.5 - 1.0
    return x.astype(jnp.float32)
