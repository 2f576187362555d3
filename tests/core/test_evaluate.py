"""Evaluation against a loop in NumPy, and the life of unseen clients."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedavg import fedavg
from fedgen.core import evaluate, fit, participation, rounds
from fedgen.core.algorithm import Algorithm, ByServer
from fedgen.core.execution import Execution, make_mesh, place
from fedgen.core.fit import Schedule

KEY = jax.random.key(0)
SIZES = (7, 0, 5, 3, 8)
SCHEDULE = Schedule(4, 1)


def shifted() -> Algorithm:
    """Build FedAvg whose clients own a bias, moved once more before prediction."""
    base = fedavg(optax.sgd(0.1), SCHEDULE)

    def init(key, federation):
        server, _ = base.init(key, federation)
        (cohort,) = federation.cohorts
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(cohort.ids)
        return server, (jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys),)

    def local(context, key, client, message, data):
        _, delta, metrics = base.local(context, key, (), message, data)
        return client + metrics["loss"] + data.size, delta, metrics

    def personalise(context, key, client, message, data):
        del context, key, message
        total = fit.fold(lambda s, b: s + b.x.sum(), jnp.float32(0), data, 4)
        return client + total / 8 * jnp.arange(4.0)

    def predict(context, server, client, x):
        return context.model.apply(server.params, x) + client[None]

    def receive(context, client, message):
        del context, message
        return client

    return base._replace(
        init=init,
        local=local,
        personalise=personalise,
        predict=predict,
        receive=receive,
    )


def by_id(federation, leaf):
    (cohort,) = federation.cohorts
    found = dict(zip(cohort.ids.tolist(), np.asarray(leaf), strict=True))
    return np.stack([found[i] for i in range(cohort.num_real)])


@pytest.mark.parametrize(
    ("chunk", "devices", "batch_size"), [(None, 1, 100), (2, 1, 2), (2, 2, 3)]
)
def test_scores_are_those_of_a_plain_loop(toy_federation, chunk, devices, batch_size):
    mesh = make_mesh(devices)
    plain, execution, algorithm = (
        toy_federation(SIZES),
        Execution(chunk, mesh),
        shifted(),
    )
    federation = place(plain, mesh)
    state = rounds.init_state(algorithm, federation, KEY, execution)
    found = jax.jit(evaluate.make_evaluate(algorithm, execution, batch_size))(
        state, federation, KEY
    )

    bias = by_id(federation, state.clients[0])
    (cohort,) = plain.cohorts
    x, y, order = (np.asarray(a) for a in (*plain.pool, cohort.order))
    for part in ("validation", "test"):
        scores = getattr(found, part)
        for i in range(len(SIZES)):
            train, own = (
                order[int(rows.start[i]) : int(rows.start[i] + rows.size[i])]
                for rows in (cohort.train, getattr(cohort, part))
            )
            whole = np.asarray(
                cohort.model.apply(jax.device_get(state.server.params), x[own])
            )
            logits = whole + bias[i] + x[train].sum() / 8 * np.arange(4)
            label = y[own]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert int(scores.count[i]) == len(own)
            assert int(scores.correct[i]) == np.sum(logits.argmax(-1) == label)
            assert int(scores.global_correct[i]) == np.sum(whole.argmax(-1) == label)
            before = np.sum((whole + bias[i]).argmax(-1) == label)
            assert int(scores.received_correct[i]) == before
            np.testing.assert_allclose(
                scores.loss[i], -log_p[np.arange(len(own)), label].sum(), rtol=1e-4
            )
    # Validation and test are other rows, here of other numbers.
    assert found.validation.count.tolist() == [2 + i % 3 for i in range(5)]
    assert found.test.count.tolist() == [3 + i % 2 for i in range(5)]


def test_what_the_server_predicts_for_everybody_is_computed_once(toy_federation):
    federation, calls = toy_federation(SIZES), []
    base = fedavg(optax.sgd(0.1), SCHEDULE)

    def predict_global(context, server, x):
        calls.append(x.shape)
        return base.predict_global(context, server, x)

    once = base._replace(
        predict=ByServer(predict_global), predict_global=predict_global
    )
    twice = base._replace(
        predict=lambda *given: ByServer(predict_global)(*given),
        predict_global=predict_global,
    )
    alone = once._replace(predict_global=None)
    state = rounds.init_state(base, federation, KEY)
    found, number = [], []
    for algorithm in (once, twice, alone):
        calls.clear()
        score = evaluate.make_evaluate(algorithm, Execution())
        found.append(score(state, federation, KEY))
        number.append(len(calls))
    assert number[1] == 2 * number[0] == 2 * number[2] > 0
    chex.assert_trees_all_equal(found[0], found[1])
    assert found[0].test.global_correct.sum() > 0
    assert not found[2].test.global_correct.any()


def test_scores_never_read_other_rows(toy_federation):
    plain, algorithm, execution = toy_federation(SIZES), shifted(), Execution()
    state = rounds.init_state(algorithm, plain, KEY)
    score = jax.jit(evaluate.make_evaluate(algorithm, execution, 4))
    (cohort,) = plain.cohorts
    test = np.concatenate(
        [
            np.asarray(cohort.order)[a : a + n]
            for a, n in zip(*map(np.asarray, cohort.test), strict=True)
        ]
    )
    poisoned = plain.pool.x.at[test].set(jnp.nan)
    before = score(state, plain, KEY)
    after = score(
        state, type(plain)(plain.pool._replace(x=poisoned), plain.cohorts, 4), KEY
    )
    chex.assert_trees_all_equal(after.validation, before.validation)
    assert not np.any(np.isfinite(after.test.loss))


@pytest.mark.parametrize(
    ("chunk", "devices", "count"),
    [(None, 1, 3), (2, 2, 3), (2, 2, 4)],  # of five; a device holds three
)
def test_the_clients_that_a_sampler_draws_are_scored_alone(
    toy_federation, chunk, devices, count
):
    mesh, sampler = make_mesh(devices), participation.uniform(count / 5)
    plain, algorithm, execution = (
        toy_federation(SIZES),
        shifted(),
        Execution(chunk, mesh),
    )
    federation = place(plain, mesh)
    state = rounds.init_state(algorithm, federation, KEY, execution)
    everybody = jax.jit(evaluate.make_evaluate(algorithm, execution))
    some = jax.jit(evaluate.make_evaluate(algorithm, execution, sampler=sampler))
    whole, part = everybody(state, federation, KEY), some(state, federation, KEY)
    assert whole.ids.tolist() == list(range(5))
    assert part.ids.shape == (count,) and np.all(np.diff(part.ids) > 0)
    (slot,) = sampler(KEY, plain)
    assert part.ids.tolist() == sorted(slot.slot.tolist())
    expected = jax.tree.map(lambda a: a[part.ids], whole)
    chex.assert_trees_all_close(part, expected, rtol=1e-5)
    later = some(state._replace(round=jnp.int32(7)), federation, KEY)
    np.testing.assert_array_equal(later.ids, part.ids)


def test_two_cohorts_are_scored_in_the_order_of_ids(toy_federation):
    federation = toy_federation(SIZES, models=2)
    algorithm = Algorithm(
        init=lambda key, f: ((), tuple(c.ids * 1.0 for c in f.cohorts)),
        download=lambda context, server, id_: (),
        local=lambda context, key, client, message, data: (client, (), {}),
        aggregate=lambda context, key, server, uploads: (server, {}),
        # The logit of class `id % 4` wins.
        predict=lambda context, server, client, x: jnp.broadcast_to(
            jax.nn.one_hot(client.astype(jnp.int32) % 4, 4), (x.shape[0], 4)
        ),
    )
    state = rounds.init_state(algorithm, federation, KEY)
    scores = jax.jit(evaluate.make_evaluate(algorithm, Execution()))(
        state, federation, KEY
    ).test
    for i in range(len(SIZES)):
        cohort = federation.cohorts[i % 2]
        start, size = (int(a[i // 2]) for a in cohort.test)
        labels = federation.pool.y[cohort.order[start : start + size]]
        assert int(scores.correct[i]) == int(np.sum(np.asarray(labels) == i % 4))
        assert int(scores.count[i]) == size


def test_unseen_clients_train_from_the_given_server(toy_federation):
    algorithm = shifted()
    federation = toy_federation(SIZES)
    seen = rounds.init_state(algorithm, toy_federation((3, 3), seed=1), KEY)
    seen = seen._replace(round=jnp.int32(4))
    key = jax.random.key(9)
    results = []
    for chunk, devices in ((None, 1), (2, 1), (2, 2)):
        mesh = make_mesh(devices)
        placed = place(federation, mesh)
        adapt = jax.jit(evaluate.make_adapt(algorithm, Execution(chunk, mesh)))
        state = adapt(seen, placed, key)
        chex.assert_trees_all_equal(state.server, seen.server)
        assert int(state.round) == 4
        if mesh is not None:
            assert state.clients[0].sharding.spec[0] == "clients"
        results.append(by_id(placed, state.clients[0]))

    # The same by hand, for one client.
    round_key = jax.random.fold_in(key, 4)
    start = algorithm.init(round_key, federation)[1][0]
    (cohort,) = federation.cohorts
    for i in (0, 1):
        data = fit.Data(
            federation.pool,
            cohort.order,
            cohort.train.start[i],
            cohort.train.size[i],
            jnp.float32(1),
        )
        expected, _, _ = algorithm.local(
            federation.context(0),
            jax.random.fold_in(jax.random.fold_in(round_key, 0), i),
            start[i],
            seen.server.params,
            data,
        )
        np.testing.assert_allclose(results[0][i], expected, rtol=1e-5)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5)


def test_clients_are_told_how_many_rounds_there_were(toy_federation):
    federation = toy_federation(SIZES)
    (cohort,) = federation.cohorts

    def tell(context, key, client, message, data):
        del context, key, client, message
        return jnp.asarray(data.round, jnp.int32)

    algorithm = shifted()._replace(
        init=lambda key, federation: ((), (jnp.zeros(len(SIZES), jnp.int32),)),
        download=lambda context, server, id_: (),
        local=lambda *args: (tell(*args), (), {"steps": jnp.int32(0)}),
        personalise=tell,
        predict=lambda context, server, client, x: jnp.broadcast_to(
            jax.nn.one_hot(client, 4), (x.shape[0], 4)
        ),
        predict_global=None,
        receive=None,
    )
    state = rounds.init_state(algorithm, federation, KEY)
    state = state._replace(round=jnp.int32(2))
    scores = jax.jit(evaluate.make_evaluate(algorithm, Execution()))(
        state, federation, KEY
    )
    y, order = np.asarray(federation.pool.y), np.asarray(cohort.order)
    rows = zip(np.asarray(cohort.test.start), np.asarray(cohort.test.size), strict=True)
    twos = [int((y[order[start : start + size]] == 2).sum()) for start, size in rows]
    assert scores.test.correct.tolist() == twos and sum(twos) > 0
    adapted = evaluate.make_adapt(algorithm, Execution())(state, federation, KEY)
    assert adapted.clients[0].tolist() == [2] * len(SIZES)
