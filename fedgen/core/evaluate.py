"""One evaluation for every algorithm: each client's own model on its own rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.core import execution as execution_lib
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, ByServer, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Context, Data, Federation, Model
from fedgen.core.participation import Sampler

PyTree = Any


class Scores(NamedTuple):
    """Sums over the rows of each client that is scored; `[n]` in the order of ids."""

    count: jax.Array  # [n] int32 rows scored
    correct: jax.Array  # [n] int32 hits of the client's own model
    loss: jax.Array  # [n] float32 summed cross entropy of the client's own model
    global_correct: jax.Array  # [n] int32 hits of the server's one model
    received_correct: jax.Array  # [n] int32 hits of the download, before `personalise`


class Evaluation(NamedTuple):
    """Scores on the rows that may select, and on those that may not."""

    validation: Scores
    test: Scores
    ids: jax.Array  # [n] int32 clients that were scored


EvaluateFn = Callable[[State, Federation, jax.Array], Evaluation]


def make_evaluate(
    algorithm: Algorithm,
    execution: Execution,
    batch_size: int = 100,
    sampler: Sampler | None = None,
) -> EvaluateFn:
    """Build `(state, federation, key) -> Evaluation`, to be jitted by the caller.

    Each client gets the newest download and does what the algorithm's `personalise`
    says with its training rows; nothing of that survives the evaluation. Where there is
    a sampler, it draws the clients that are scored, with one key the same ones in every
    round.
    """

    def evaluate(state, federation, key):
        drawn = sampler and [some.slot for some in sampler(key, federation)]
        key = jax.random.fold_in(key, state.round)
        cohorts = []
        for k, cohort in enumerate(federation.cohorts):
            run = execution_lib.on_shards(
                functools.partial(
                    _score,
                    algorithm,
                    cohort.model,
                    federation.num_classes,
                    execution,
                    batch_size,
                ),
                execution.mesh,
                whole=range(7),
            )
            cohorts.append(
                run(
                    state.round,
                    state.server,
                    federation.pool,
                    federation.public,
                    cohort.order,
                    key,
                    drawn and drawn[k],
                    cohort.ids,
                    cohort.train,
                    cohort.validation,
                    cohort.test,
                    state.clients[k],
                )
            )
        scores = jax.tree.map(lambda *a: jnp.concatenate(a), *cohorts)
        # The padding, id -1, sorts first and is cut off.
        real = [cohort.num_real for cohort in federation.cohorts]
        if drawn:
            real = [min(n, len(slot)) for n, slot in zip(real, drawn, strict=True)]
        place = jnp.argsort(scores.ids)[-sum(real) :]
        return jax.tree.map(lambda a: a[place], scores)

    return evaluate


def make_adapt(algorithm: Algorithm, execution: Execution) -> Callable[..., State]:
    """Build the life of unseen clients: `local` without `aggregate`.

    Returns:
      `(state, federation, key) -> state`: the server of `state`, and fresh clients
      for `federation` that trained locally once from its download.
    """

    def adapt(state, federation, key):
        key = jax.random.fold_in(key, state.round)
        _, clients = algorithm.init(key, federation)
        adapted = []
        for k, cohort in enumerate(federation.cohorts):
            run = execution_lib.on_shards(
                functools.partial(
                    _adapt, algorithm, cohort.model, federation.num_classes, execution
                ),
                execution.mesh,
                whole=range(6),
            )
            adapted.append(
                run(
                    state.round,
                    state.server,
                    federation.pool,
                    federation.public,
                    cohort.order,
                    key,
                    cohort.ids,
                    cohort.train,
                    clients[k],
                )
            )
        return State(state.round, state.server, tuple(adapted))

    return adapt


def _adapt(
    algorithm: Algorithm,
    model: Model,
    num_classes: int,
    execution: Execution,
    round_number: jax.Array,
    server: PyTree,
    pool: PyTree,
    public: PyTree,
    order: jax.Array,
    key: jax.Array,
    ids: jax.Array,
    train: PyTree,
    clients: PyTree,
) -> PyTree:
    """Let the clients that this device holds train once, and keep their states."""
    context = Context(model, num_classes, public)

    def one(id_, rows, client):
        work = jnp.float32(1)
        data = Data(pool, order, rows.start, rows.size, work, round_number)
        for number, exchange in enumerate(algorithm.exchanges):
            message = exchange.download(context, server, id_)
            own_key = jax.random.fold_in(jax.random.fold_in(key, number), id_)
            client = exchange.local(context, own_key, client, message, data)[0]
        return client

    return execution_lib.map_clients(one, execution.chunk)(ids, train, clients)


def _score(
    algorithm: Algorithm,
    model: Model,
    num_classes: int,
    execution: Execution,
    batch_size: int,
    round_number: jax.Array,
    server: PyTree,
    pool: PyTree,
    public: PyTree,
    order: jax.Array,
    key: jax.Array,
    slot: jax.Array | None,
    ids: jax.Array,
    train: PyTree,
    validation: PyTree,
    test: PyTree,
    clients: PyTree,
) -> Evaluation:
    """Score the clients that this device holds, or those of them at `slot [m]`."""
    context = Context(model, num_classes, public)
    if slot is not None:
        n = ids.shape[0]
        slot = slot - execution_lib.first_slot(execution.mesh, n)
        slot = jnp.where((slot >= 0) & (slot < n), slot, n)
        slot = jnp.sort(slot)[: min(n, slot.shape[0])]
        ids = ids.at[slot].get(mode="fill", fill_value=-1)
        # Other devices' clients have no rows here.
        train, validation, test, clients = jax.tree.map(
            lambda a: a.at[slot].get(mode="fill", fill_value=0),
            (train, validation, test, clients),
        )

    def data_of(rows, work=1.0):
        work = jnp.float32(work)
        return Data(pool, order, rows.start, rows.size, work, round_number)

    def one(id_, train, validation, test, client):
        message = algorithm.download(context, server, id_)
        received = algorithm.receive and algorithm.receive(context, client, message)
        client = algorithm.personalise(
            context, jax.random.fold_in(key, id_), client, message, data_of(train)
        )

        def add(scores, batch):
            logits = algorithm.predict(context, server, client, batch.x)
            real = batch.mask > 0

            def hits(logits):
                return jnp.sum(real & (jnp.argmax(logits, -1) == batch.y))

            whole = before = jnp.int32(0)
            if algorithm.predict == ByServer(algorithm.predict_global):
                whole = hits(logits)
            elif algorithm.predict_global is not None:
                whole = hits(algorithm.predict_global(context, server, batch.x))
            if algorithm.receive is not None:
                before = hits(algorithm.predict(context, server, received, batch.x))
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, batch.y
            )
            return Scores(
                scores.count + jnp.sum(real),
                scores.correct + hits(logits),
                scores.loss + jnp.sum(jnp.where(real, loss, 0.0)),
                scores.global_correct + whole,
                scores.received_correct + before,
            )

        none = jnp.int32(0)
        zeros = Scores(none, none, jnp.float32(0.0), none, none)
        return Evaluation(
            *(
                fit.fold(add, zeros, data_of(rows), batch_size)
                for rows in (validation, test)
            ),
            id_,
        )

    return execution_lib.map_clients(one, execution.chunk)(
        ids, train, validation, test, clients
    )
