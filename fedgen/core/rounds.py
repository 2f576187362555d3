"""One communication round: who takes part, what they do, what the server makes of it.

`make_round` owns gather, chunks, devices, masks, scatter and keys, so that no
algorithm has to. Keys are functions of (seed, round, client id) alone: block
length and resumption never change a bit, chunk and devices only how sums are rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedgen.core import execution as execution_lib
from fedgen.core import tree
from fedgen.core.algorithm import (
    Algorithm,
    Exchange,
    Mean,
    Metrics,
    State,
    Uploads,
)
from fedgen.core.execution import Execution
from fedgen.core.federation import Context, Data, Federation, Model
from fedgen.core.participation import Sampler

PyTree = Any


class Report(NamedTuple):
    """What a round tells the host; stacked over the rounds of a block.

    Attributes:
      metrics: Averages over participants, and what the server reports.
      participants: `[cohorts]` int32, clients whose upload counted.
      steps: [] int32, local steps of all clients.
      executed: [] int32, steps the hardware went through: everybody in a chunk
        loops for as long as the chunk's largest client.
      failed: `[m]` int32 ids of clients whose upload was not finite, -1 elsewhere.
        They are left out of the aggregate and keep their old state.
    """

    metrics: Metrics
    participants: jax.Array
    steps: jax.Array
    executed: jax.Array
    failed: jax.Array


class Traffic(NamedTuple):
    """Bytes on the wire for one participant of a cohort in one round."""

    down: int
    up: int


InitFn = Callable[[jax.Array, Federation], State]
RoundFn = Callable[[State, Federation, jax.Array], tuple[State, Report]]


def make_init(algorithm: Algorithm, execution: Execution = Execution()) -> InitFn:
    """Build the jitted `(key, federation) -> State` of a first round.

    Under jit no two leaves share a buffer; donation needs that. Equal keys give
    equal initial weights to all algorithms. With a mesh, clients are created on the
    devices that hold them. Tracing it raises a ValueError if the client state is not
    one tree per cohort, leaves `[n, ...]`.
    """

    def init(key, federation):
        server, clients = algorithm.init(key, federation)
        _check_clients(federation, clients)
        return State(jnp.zeros((), jnp.int32), server, clients)

    return jax.jit(init, out_shardings=execution_lib.state_shardings(execution.mesh))


def init_state(
    algorithm: Algorithm,
    federation: Federation,
    key: jax.Array,
    execution: Execution = Execution(),
) -> State:
    """Initialise by `make_init`.

    Raises:
      ValueError: If the client state is not one tree per cohort, leaves `[n, ...]`.
    """
    return make_init(algorithm, execution)(key, federation)


def _check_clients(federation: Federation, clients: tuple[PyTree, ...]) -> None:
    if len(clients) != len(federation.cohorts):
        raise ValueError(
            f"client state must have one entry for each of {len(federation.cohorts)} "
            f"cohorts, got {len(clients)}"
        )
    for cohort, stacked in zip(federation.cohorts, clients, strict=True):
        for leaf in jax.tree.leaves(stacked):
            if jnp.shape(leaf)[:1] != (cohort.num_clients,):
                raise ValueError(
                    f"client state must have a leading axis of {cohort.num_clients} "
                    f"clients, got shape {jnp.shape(leaf)}"
                )


def make_round(algorithm: Algorithm, sampler: Sampler, execution: Execution) -> RoundFn:
    """Build one round as a pure function `(state, federation, key)`."""

    def round_fn(state, federation, key):
        # By number and not by one split, so that algorithms with fewer exchanges get
        # the same keys for those they have.
        round_key = jax.random.fold_in(key, state.round)
        role = functools.partial(jax.random.fold_in, round_key)
        sample_key, *keys = map(role, range(1 + 2 * len(algorithm.exchanges)))
        drawn = sampler(sample_key, federation)
        contexts = tuple(map(federation.context, range(len(federation.cohorts))))
        server, clients = state.server, list(state.clients)
        metrics: Metrics = {}
        works = []

        for exchange, local_key, server_key in zip(
            algorithm.exchanges, keys[::2], keys[1::2], strict=True
        ):
            uploads = []
            for k, cohort in enumerate(federation.cohorts):
                run = execution_lib.on_shards(
                    functools.partial(
                        _visit,
                        exchange,
                        cohort.model,
                        federation.num_classes,
                        execution,
                    ),
                    execution.mesh,
                    whole=range(7),
                )
                clients[k], sent, work = run(
                    state.round,
                    server,
                    federation.pool,
                    federation.public,
                    cohort.order,
                    drawn[k],
                    local_key,
                    cohort.ids,
                    cohort.train,
                    clients[k],
                )
                message, averages = _finish(sent.message)
                uploads.append(sent._replace(message=message))
                works.append(work)
                prefix = "" if len(federation.cohorts) == 1 else f"cohort{k}/"
                for name, value in averages.value.items():
                    metrics[prefix + name] = value
            server, server_metrics = exchange.aggregate(
                contexts, server_key, server, tuple(uploads)
            )
            metrics |= {f"server/{name}": v for name, v in server_metrics.items()}

        first = works[: len(federation.cohorts)]
        report = Report(
            metrics,
            jnp.stack([jnp.sum(work.counted, dtype=jnp.int32) for work in first]),
            sum(jnp.sum(work.steps, dtype=jnp.int32) for work in works),
            sum(jnp.sum(work.executed, dtype=jnp.int32) for work in works),
            jnp.concatenate([work.failed for work in works]),
        )
        return State(state.round + 1, server, tuple(clients)), report

    return round_fn


class _Work(NamedTuple):
    counted: jax.Array  # [m] bool
    steps: jax.Array  # [m] int32
    executed: jax.Array  # [chunks] int32
    failed: jax.Array  # [m] int32


def _visit(
    exchange: Exchange,
    model: Model,
    num_classes: int,
    execution: Execution,
    round_number: jax.Array,
    server: PyTree,
    pool: PyTree,
    public: PyTree,
    order: jax.Array,
    drawn: PyTree,
    key: jax.Array,
    ids: jax.Array,
    rows: PyTree,
    clients: PyTree,
) -> tuple[PyTree, Uploads, _Work]:
    """Run one exchange with the clients that this device holds.

    Chunk after chunk of them is gathered, does its work and is scattered back, so
    only one chunk's states are ever held twice. Metrics are sent with the message,
    as averages that the engine takes.
    """
    context = Context(model, num_classes, public)
    n = ids.shape[0]
    slot = drawn.slot - execution_lib.first_slot(execution.mesh, n)
    mine = (slot >= 0) & (slot < n) & drawn.mask

    # Largest first, so that the clients of a chunk have much the same work. The
    # other devices' clients sort last and fall off, as do those that dropped out.
    size = jnp.where(mine, rows.size.at[slot].get(mode="clip"), -1)
    kept = min(n, slot.shape[0])
    ranked = jnp.argsort(-size, stable=True)[:kept]
    chunk = min(execution.chunk or kept, kept)
    extra = execution_lib.padded(kept, chunk) - kept
    mask = jnp.pad(mine[ranked], (0, extra))
    slot = jnp.where(mask, jnp.pad(slot[ranked], (0, extra)), n)
    work = jnp.where(mask, jnp.pad(drawn.work[ranked], (0, extra)), 0.0)

    @functools.partial(jax.jit, inline=True)  # traced once for its shapes and its use
    def visit(id_, start, size, work, client):
        data = Data(pool, order, start, size, work, round_number)
        message = exchange.download(context, server, id_)
        client, upload, metrics = exchange.local(
            context, jax.random.fold_in(key, id_), client, message, data
        )
        averages = {k: v for k, v in metrics.items() if k != "steps"}
        sent = _weigh((upload, Mean(averages, size.astype(jnp.float32))))
        return client, sent, metrics["steps"], tree.all_finite((client, sent))

    def visit_chunk(carry, drawn):
        clients, sums = carry
        slot, mask, work = drawn
        id_, held, old = jax.tree.map(
            lambda a: a.at[slot].get(mode="clip"), (ids, rows, clients)
        )
        size = jnp.where(mask, held.size, 0)
        new, sent, steps, finite = execution_lib.over_clients(visit, chunk)(
            id_, held.start, size, work, old
        )
        # Whoever is absent, or failed, keeps its state and weighs nothing.
        counted = mask & finite
        new = tree.where(counted, new, old)
        clients = jax.tree.map(
            lambda a, b: a.at[slot].set(b, mode="drop"), clients, new
        )
        sent = tree.where(counted, sent, jax.tree.map(jnp.zeros_like, sent))
        means, rest = _split(sent)
        sums = execution_lib.add_up(sums, means)
        upload = Uploads(
            jnp.where(mask, id_, -1),
            jnp.where(counted, held.size, 0).astype(jnp.float32),
            rest,
        )
        failed = jnp.where(mask & ~finite, id_, -1)
        return (clients, sums), (upload, counted, steps, failed)

    one = (ids, rows.start, rows.size, work, clients)
    like = jax.eval_shape(visit, *jax.tree.map(lambda a: a[0], one))[1]
    sums = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.result_type(a.dtype, jnp.float32)),
        _split(like)[0],
    )
    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk), (slot, mask, work))
    first = jax.tree.map(lambda a: a[0], chunks)
    shapes = jax.eval_shape(visit_chunk, (clients, sums), first)[1]
    num_chunks = chunks[0].shape[0]
    visited = jax.tree.map(lambda a: jnp.zeros((num_chunks, *a.shape), a.dtype), shapes)
    nobody = jnp.full((num_chunks, chunk), -1, jnp.int32)
    visited = (visited[0]._replace(id=nobody), *visited[1:3], nobody)

    def go_on(i, carry):
        *carry, visited = carry
        carry, new = visit_chunk(carry, jax.tree.map(lambda a: a[i], chunks))
        return *carry, jax.tree.map(lambda a, b: a.at[i].set(b), visited, new)

    # Chunks of nobody come last and are left out: a device among many holds only a few
    # of a round's participants.
    count = -(-jnp.sum(mask, dtype=jnp.int32) // chunk)
    clients, sums, visited = jax.lax.fori_loop(
        0, count, go_on, (clients, sums, visited)
    )
    executed = chunk * jnp.max(visited[2], axis=1)
    # The filling of the last chunk goes, or shapes would depend on the chunk.
    upload, counted, steps, failed = jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:])[:kept], visited
    )
    # A device's sums get an axis, over which `_finish` adds the devices up.
    sums = jax.tree.map(lambda a: a[None], sums)
    upload = upload._replace(message=_join(like, sums, upload.message))
    return clients, upload, _Work(counted, steps, executed, failed)


def _is_mean(node: PyTree) -> bool:
    return isinstance(node, Mean)


def _split(message: PyTree) -> tuple[list[Mean], PyTree]:
    """Take the parts marked `Mean` out of a message, leaving None for each."""
    nodes, structure = jax.tree.flatten(message, is_leaf=_is_mean)
    rest = [None if _is_mean(node) else node for node in nodes]
    return [node for node in nodes if _is_mean(node)], structure.unflatten(rest)


def _join(like: PyTree, means: list[Mean], rest: PyTree) -> PyTree:
    """Put means back where `_split` took them from a message `like`."""
    nodes, structure = jax.tree.flatten(like, is_leaf=_is_mean)
    found, left = iter(means), iter(jax.tree.leaves(rest))
    return structure.unflatten(
        [next(found) if _is_mean(node) else next(left) for node in nodes]
    )


def _weigh(message: PyTree) -> PyTree:
    """Multiply the values of means by their weights, to be added up in float32."""

    def weigh(node):
        if not _is_mean(node):
            return node

        def times(value):
            value = jnp.asarray(value, jnp.result_type(value, jnp.float32))
            return node.weight * value

        return Mean(jax.tree.map(times, node.value), node.weight)

    return jax.tree.map(weigh, message, is_leaf=_is_mean)


def _finish(message: PyTree) -> PyTree:
    """Turn the devices' sums, leaves `[devices, ...]`, into means."""

    def divide(node):
        if not _is_mean(node):
            return node
        value, weight = jax.tree.map(lambda a: jnp.sum(a, axis=0), tuple(node))
        share = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return Mean(jax.tree.map(lambda a: a * share, value), weight)

    return jax.tree.map(divide, message, is_leaf=_is_mean)


def traffic(
    algorithm: Algorithm, federation: Federation, state: State
) -> tuple[Traffic, ...]:
    """Read the bytes of a round off the shapes of its messages, per cohort."""

    def messages(exchange, context, server, client, order):
        pool = jax.tree.map(
            lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), federation.pool
        )
        zero = jnp.int32(0)
        data = Data(pool, order, zero, zero, jnp.float32(1))
        down = exchange.download(context, server, zero)
        _, up, _ = exchange.local(context, jax.random.key(0), client, down, data)
        return down, up

    totals = []
    for k, cohort in enumerate(federation.cohorts):
        down = up = 0
        client = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state.clients[k]
        )
        for exchange in algorithm.exchanges:
            sent, received = jax.eval_shape(
                functools.partial(messages, exchange, federation.context(k)),
                state.server,
                client,
                cohort.order,
            )
            down += tree.num_bytes(sent)
            up += tree.num_bytes(received)
        totals.append(Traffic(down, up))
    return tuple(totals)
