"""The one abstraction: a federated algorithm as pure functions of one client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

if TYPE_CHECKING:
    from fedgen.core.federation import Context, Federation

PyTree = Any
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """Everything that survives a round, hence everything a checkpoint holds."""

    round: jax.Array  # [] int32
    server: PyTree  # replicated on every device
    clients: tuple[PyTree, ...]  # per cohort, leaves [n, ...], sharded


class Mean(NamedTuple):
    """Marks a part of an upload of which the server only sees the mean over clients.

    It is summed as clients finish, so a round holds one copy instead of `m` of them,
    and nothing of a single client reaches the server (secure aggregation).

    Attributes:
      value: What a client sends; for the server, the weighted mean, 0 if all weights
        are 0.
      weight: The client's weight, broadcastable against every leaf of `value`; for
        the server, the sum of the weights.
    """

    value: PyTree
    weight: jax.Array


class Uploads(NamedTuple):
    """What the server sees of one cohort: the messages and nothing else.

    Participants come in no order that means anything.
    """

    id: jax.Array  # [m] client numbers, -1 for absent clients
    weight: jax.Array  # [m] float32 training samples held; 0 for absent clients
    message: PyTree  # leaves [m, ...], zeros for absent clients; [...] in a `Mean`


class Exchange(NamedTuple):
    """A download, some local work and an aggregation; fields as in `Algorithm`."""

    download: Callable[..., PyTree]
    local: Callable[..., tuple[PyTree, PyTree, Metrics]]
    aggregate: Callable[..., tuple[PyTree, Metrics]]


def keep_client(context, key, client, message, data) -> PyTree:
    """Return the client as it is: the default of `Algorithm.personalise`."""
    del context, key, message, data
    return client


@dataclasses.dataclass(frozen=True)
class ByServer:
    """A `predict` by the server's model alone, which evaluation then computes once.

    Attributes:
      predict_global: That of the algorithm.
    """

    predict_global: Callable[..., jax.Array]

    def __call__(
        self, context: Context, server: PyTree, client: PyTree, x: jax.Array
    ) -> jax.Array:
        """Compute logits, `[b, ...] -> [b, c]`, whoever the client is."""
        del client
        return self.predict_global(context, server, x)


class Algorithm(NamedTuple):
    """A federated algorithm: five pure functions, written for ONE client.

    The engine owns the rest: who takes part, vmap, chunks, devices, masks, keys,
    bytes, checkpoints. The optional fields serve papers that need more.

    Attributes:
      init: `(key, federation) -> (server, clients)`, with one entry of `clients`
        per cohort, leaves `[n, ...]`.
      download: `(context, server, id) -> message`, what client `id` is sent.
      local: `(context, key, client, message, data) -> (client, message, metrics)`,
        what a client does. The message is all the server ever sees of it. The
        metrics are scalars, of which `steps` counts local steps. A client whose
        state, message or metrics are not all finite, a `Mean` also times its weight,
        is left out of the round.
      aggregate: `(context, key, server, uploads) -> (server, metrics)`, with one
        `Context` and one `Uploads` per cohort.
      predict: `(context, server, client, x) -> logits` of a client's own model;
        `ByServer` if it has none.
      personalise: `(context, key, client, message, data) -> client`, what a client
        does with the newest download before its model is used (fine-tune, fit a
        head); nothing of it flows back into training. Unseen clients do the same.
      more: Further exchanges of the same round with the same participants, for
        papers that ask the clients again after averaging.
      predict_global: `(context, server, x) -> logits` of the one model that the
        server would hand to anybody, or None if there is no such model.
      receive: `(context, client, message) -> client`, the same client without what
        `personalise` does to the download, to be scored beside it; or None.
      prepare: `federation -> algorithm`, called once before anything is traced, by
        algorithms with sizes that only clients' data tell, as a number of clusters.
      min_rounds: Fewest rounds that get beyond the algorithm's own warm-up; runs of
        `fedgen.runs` refuse fewer.
    """

    init: Callable[..., tuple[PyTree, tuple[PyTree, ...]]]
    download: Callable[..., PyTree]
    local: Callable[..., tuple[PyTree, PyTree, Metrics]]
    aggregate: Callable[..., tuple[PyTree, Metrics]]
    predict: Callable[..., jax.Array]
    personalise: Callable[..., PyTree] = keep_client
    more: tuple[Exchange, ...] = ()
    predict_global: Callable[..., jax.Array] | None = None
    receive: Callable[..., PyTree] | None = None
    prepare: Callable[..., Algorithm] | None = None
    min_rounds: int = 1

    def prepared(self, federation: Federation) -> Algorithm:
        """Return the algorithm with its sizes settled, itself if they are already."""
        return self if self.prepare is None else self.prepare(federation)

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All exchanges of a round, in order."""
        return (Exchange(self.download, self.local, self.aggregate), *self.more)
