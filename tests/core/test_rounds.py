"""A round: who counts, what it costs, and what a bad client can do."""

from __future__ import annotations

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedavg import fedavg
from fedgen.core import fit, participation, rounds, simulate
from fedgen.core.algorithm import Algorithm, Exchange, Mean, State
from fedgen.core.execution import Execution, make_mesh, place
from fedgen.core.fit import Schedule
from fedgen.core.participation import Participants

SIZES = (7, 0, 12, 3, 5, 9, 1, 6, 10)
KEY = jax.random.key(0)
SERIAL = Execution()


@pytest.fixture(scope="module")
def federation(toy_federation):
    return toy_federation(SIZES)


def recorder(more: int = 0, bad=lambda id_: False) -> Algorithm:
    """Build an algorithm whose messages tell who was asked for what.

    A client's steps are its size; its state counts its visits; client `bad(id)`
    uploads NaN. The server keeps all that it was told.
    """

    def init(key, federation):
        del key
        n = federation.cohorts[0].num_clients
        server = {
            "table": jnp.zeros((9, 4)),
            "mean": jnp.zeros(2),
            "total": jnp.zeros(()),
            "asked": jnp.zeros((), jnp.int32),
        }
        return server, (jnp.zeros(n, jnp.int32),)

    def download(context, server, id_):
        del context
        return server["table"][id_], id_

    def local(context, key, client, message, data):
        del context
        row, id_ = message
        told = jnp.stack([data.size, id_, client, row[3]]).astype(jnp.float32)
        told = jnp.where(bad(id_), jnp.nan, told)
        noise = jax.random.uniform(key)
        mean = Mean(jnp.stack([told[0], noise]), data.size)
        metrics = {"loss": noise, "steps": data.size}
        return client + 1, (told, noise, mean), metrics

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        told, noise, mean = upload.message
        row = jnp.concatenate([told[:, :3], noise[:, None]], axis=1)
        here = upload.weight > 0
        place_ = jnp.where(here, upload.id, 9)
        return {
            "table": server["table"].at[place_].set(row, mode="drop"),
            "mean": mean.value,
            "total": jnp.asarray(mean.weight, jnp.float32),
            "asked": server["asked"] + jnp.sum(upload.id >= 0, dtype=jnp.int32),
        }, {}

    exchange = Exchange(download, local, aggregate)
    return Algorithm(
        init,
        download,
        local,
        aggregate,
        predict=lambda context, server, client, x: x,
        more=(exchange,) * more,
    )


def run(algorithm, federation, sampler, execution=SERIAL, state=None):
    if state is None:
        state = rounds.init_state(algorithm, federation, KEY, execution)
    round_fn = jax.jit(rounds.make_round(algorithm, sampler, execution))
    return round_fn(state, federation, jax.random.key(5))


@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2])
def test_everybody_is_asked_once_for_its_own(federation, chunk, devices):
    mesh = make_mesh(devices)
    placed, execution = place(federation, mesh), Execution(chunk, mesh)
    state, report = run(recorder(), placed, participation.full(), execution)
    table = np.asarray(state.server["table"])
    holders = np.flatnonzero(SIZES)
    np.testing.assert_array_equal(table[holders, 0], np.asarray(SIZES)[holders])
    np.testing.assert_array_equal(table[holders, 1], holders)
    assert len(set(table[holders, 3])) == len(holders), "clients share a key"
    assert not table[1].any()
    assert int(state.server["asked"]) == 9
    assert int(report.participants[0]) == 9
    assert int(report.steps) == sum(SIZES)
    visits = dict(zip(placed.cohorts[0].ids.tolist(), state.clients[0], strict=True))
    assert all(int(visits[i]) == 1 for i in range(9))
    assert int(visits.get(-1, 0)) == 0, "the padding was trained"
    # Sums of a Mean are weighted by the clients themselves.
    weights = np.asarray(SIZES, float)
    np.testing.assert_allclose(
        state.server["mean"][0], np.average(SIZES, weights=weights), rtol=1e-6
    )
    assert float(state.server["total"]) == sum(SIZES)
    np.testing.assert_allclose(
        report.metrics["loss"], np.average(table[:, 3], weights=weights), rtol=1e-6
    )
    np.testing.assert_allclose(state.server["mean"][1], report.metrics["loss"], 1e-6)


def test_keys_depend_on_round_and_client_alone(federation):
    full = run(recorder(), federation, participation.full())[0].server["table"]
    some = run(recorder(more=1), federation, participation.uniform(0.5))[0]
    state = rounds.init_state(recorder(), federation, KEY)
    later = run(
        recorder(),
        federation,
        participation.full(),
        state=state._replace(round=jnp.int32(1)),
    )[0].server["table"]
    assert not np.any(np.asarray(full[2:, 3]) == np.asarray(later[2:, 3]))
    # Another exchange of the same round has keys of its own.
    there = np.flatnonzero(some.server["table"][:, 1])
    assert not np.any(full[there, 3] == some.server["table"][there, 3])


def test_who_is_drawn_does_not_depend_on_the_algorithm(federation):
    sampler = participation.uniform(0.34)
    for seed in range(3):
        round_state = jnp.int32(seed)
        drawn = []
        for more in (0, 1, 2):
            state = rounds.init_state(recorder(more), federation, KEY)
            state, _ = run(
                recorder(more),
                federation,
                sampler,
                state=state._replace(round=round_state),
            )
            drawn.append(np.flatnonzero(state.clients[0]).tolist())
        assert drawn[0] == drawn[1] == drawn[2]


def test_executed_steps_count_waiting(federation):
    # By size: 12 10 9 7 6 5 3 1 0.
    for chunk, executed in ((None, 9 * 12), (1, 53), (2, 2 * (12 + 9 + 6 + 3 + 0))):
        _, report = run(recorder(), federation, participation.full(), Execution(chunk))
        assert int(report.executed) == executed
        assert int(report.steps) == 53


def test_a_client_that_uploads_nan_is_dropped_named_and_kept(federation):
    algorithm = recorder(bad=lambda id_: (id_ == 2) | (id_ == 5))
    for chunk in (None, 2):
        state, report = run(
            algorithm, federation, participation.full(), Execution(chunk)
        )
        assert sorted(report.failed[report.failed >= 0].tolist()) == [2, 5]
        assert int(report.participants[0]) == 7
        chex.assert_tree_all_finite(state)
        assert float(state.server["total"]) == sum(SIZES) - 12 - 9
        assert not np.asarray(state.server["table"])[[2, 5]].any()
        assert state.clients[0].tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 1]


def with_mean(value):
    """Send the average of a value, weighed by samples, and keep it."""
    plain = recorder()

    def local(context, key, client, message, data):
        client, (told, noise, _), metrics = plain.local(
            context, key, client, message, data
        )
        return client, (told, noise, Mean(value(message[1]), data.size)), metrics

    return plain._replace(local=local)


def test_a_client_whose_mean_overflows_once_weighed_is_left_out(federation):
    algorithm = with_mean(lambda id_: jnp.where(id_ == 2, 3e38, 1.0) * jnp.ones(2))
    state, report = run(algorithm, federation, participation.full())
    assert sorted(report.failed[report.failed >= 0].tolist()) == [2]
    np.testing.assert_allclose(state.server["mean"], 1.0, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 1), ("float16", 2**14)])
def test_means_of_16_bits_are_weighed_and_added_in_float32(federation, dtype, scale):
    # Of seven binary digits, which both have; float16 ends at 65,504.
    values = scale * (1 + np.arange(9) / 128)
    algorithm = with_mean(
        lambda id_: jnp.asarray(values, dtype)[id_] * jnp.ones(2, dtype)
    )
    state, _ = run(algorithm, federation, participation.full())
    expected = np.average(values, weights=SIZES)
    np.testing.assert_allclose(state.server["mean"], expected, rtol=1e-6)


def test_dropped_clients_cost_and_change_nothing(federation):
    def sampler(key, federation):
        (drawn,) = participation.full()(key, federation)
        return (drawn._replace(mask=drawn.mask & (drawn.slot != 2)),)

    state, report = run(recorder(), federation, sampler)
    assert state.clients[0].tolist() == [1, 1, 0] + [1] * 6
    assert int(report.participants[0]) == 8
    assert int(report.steps) == 53 - 12
    assert int(report.executed) == 9 * 10
    assert np.all(report.failed == -1)
    assert int(state.server["asked"]) == 8


@pytest.mark.parametrize("devices", [1, 2])
def test_chunks_of_nobody_are_not_run(federation, devices):
    mesh, visits = make_mesh(devices), []
    plain = recorder()

    def local(context, key, client, message, data):
        jax.debug.callback(lambda id_: visits.append(int(id_)), message[1])
        return plain.local(context, key, client, message, data)

    def sample(key, federation):
        del key
        (cohort,) = federation.cohorts
        here = (cohort.ids >= 2) & (cohort.ids < 5)
        slot = jnp.arange(cohort.num_clients)
        return (Participants(slot, here, jnp.ones(slot.shape)),)

    execution = Execution(1, mesh)
    algorithm = plain._replace(local=local)
    placed = place(federation, mesh)
    state = rounds.init_state(algorithm, placed, KEY, execution)
    jax.jit(rounds.make_round(algorithm, sample, execution))(state, placed, KEY)
    jax.effects_barrier()
    assert sorted(visits) == [2, 3, 4]


def test_a_round_without_anybody_keeps_the_server(federation):
    def nobody(key, federation):
        (drawn,) = participation.full()(key, federation)
        return (drawn._replace(mask=jnp.zeros_like(drawn.mask)),)

    algorithm = fedavg(optax.sgd(0.1), Schedule(4, 1))
    state = rounds.init_state(algorithm, federation, KEY)
    after, report = run(algorithm, federation, nobody, state=state)
    chex.assert_trees_all_equal(after.server.params, state.server.params)
    assert int(report.participants[0]) == int(report.steps) == 0
    assert int(report.executed) == 0


def test_stragglers_do_a_share_of_their_steps(federation):
    def late(key, federation):
        (drawn,) = participation.full()(key, federation)
        return (drawn._replace(work=jnp.where(drawn.slot == 2, 0.5, drawn.work)),)

    algorithm = fedavg(optax.sgd(0.1), Schedule(4, 2))
    _, full = run(algorithm, federation, participation.full())
    _, report = run(algorithm, federation, late)
    assert int(full.steps) == sum(2 * -(-s // 4) for s in SIZES)
    assert int(report.steps) == int(full.steps) - 3


def test_every_exchange_sees_the_last_ones_aggregate(federation):
    state, report = run(recorder(more=1), federation, participation.full())
    table = np.asarray(state.server["table"])
    np.testing.assert_array_equal(table[[0, 2], 2], [1, 1])
    assert int(state.server["asked"]) == 18
    assert int(report.steps) == 2 * 53
    assert report.participants.tolist() == [9]
    assert np.all(state.clients[0] == 2)


def test_fedavg_is_a_weighted_mean_of_gradient_steps(federation):
    # One full batch, one step: the server descends the gradient of all samples.
    algorithm = fedavg(optax.sgd(0.1), Schedule(12, 1))
    state, report = run(algorithm, federation, participation.full())
    start = rounds.init_state(algorithm, federation, KEY).server.params
    cohort = federation.cohorts[0]
    rows = np.concatenate(
        [
            np.asarray(cohort.order)[a : a + n]
            for a, n in zip(*map(np.asarray, cohort.train), strict=True)
        ]
    )

    def loss(params):
        logits = cohort.model.apply(params, federation.pool.x[rows])
        labels = federation.pool.y[rows]
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean()

    value, gradient = jax.value_and_grad(loss)(start)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start, gradient)
    chex.assert_trees_all_close(state.server.params, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(report.metrics["loss"], value, rtol=1e-5)


@pytest.mark.parametrize(("chunk", "devices"), [(None, 1), (2, 1), (1, 2)])
def test_a_rate_that_decays_is_that_of_its_round(federation, chunk, devices):
    mesh = make_mesh(devices) if devices > 1 else None
    federation = place(federation, mesh) if mesh else federation

    def run(state, optimizer):
        algorithm = fedavg(optimizer, Schedule(4, 1))
        layout = Execution(chunk, mesh)
        round_fn = rounds.make_round(algorithm, participation.full(), layout)
        return jax.jit(round_fn)(state, federation, KEY)[0]

    def sgd(rate):
        return optax.chain(
            optax.add_decayed_weights(0.1), optax.sgd(rate, momentum=0.5)
        )

    start = rounds.make_init(fedavg(sgd(1.0), Schedule(4, 1)))(KEY, federation)
    decayed = by_hand = start
    halved = optax.chain(sgd(0.1), fit.scale_by_round(lambda round: 0.5**round))
    for rate in (0.1, 0.05, 0.025):
        decayed, by_hand = run(decayed, halved), run(by_hand, sgd(rate))
    chex.assert_trees_all_close(decayed, by_hand, rtol=1e-6)


@pytest.mark.parametrize("traced", [True, False])
def test_every_exchange_is_told_the_round(federation, traced):
    def local(context, key, client, message, data):
        told = Mean(jnp.float32(data.round), jnp.float32(1))
        return client, told, {"steps": jnp.int32(0)}

    def listen(at):
        return lambda context, key, server, uploads: (
            server.at[at].set(uploads[0].message.value),
            {},
        )

    algorithm = recorder()._replace(local=local, aggregate=listen(0))
    algorithm = algorithm._replace(
        download=lambda context, server, id_: (),
        more=(Exchange(lambda context, server, id_: (), local, listen(1)),),
    )
    clients = (jnp.zeros(len(SIZES), jnp.int32),)
    state = State(jnp.int32(3), jnp.zeros(2), clients)
    round_fn = rounds.make_round(algorithm, participation.full(), Execution(2))
    with contextlib.nullcontext() if traced else jax.disable_jit():
        state, _ = round_fn(state, federation, KEY)
    np.testing.assert_array_equal(state.server, [3, 3])


def test_a_sweep_over_seeds_equals_its_runs(federation):
    algorithm = fedavg(optax.sgd(0.1, momentum=0.5), Schedule(4, 1))
    round_fn = rounds.make_round(algorithm, participation.uniform(0.5), Execution())

    def train(key):
        server, clients = algorithm.init(key, federation)
        state = State(jnp.zeros((), jnp.int32), server, clients)
        return round_fn(state, federation, key)

    keys = jax.random.split(KEY, 2)
    swept = jax.jit(jax.vmap(train))(keys)
    alone = jax.jit(train)
    for i in range(2):
        found = jax.tree.map(lambda a, i=i: a[i], swept)
        chex.assert_trees_all_close(found, alone(keys[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("devices", "clients", "shape"),
    [(1, jnp.zeros(3), r"\(3,\)"), (2, jnp.zeros(3), r"\(3,\)"), (1, 0.0, r"\(\)")],
)
def test_init_state_refuses_client_state_of_the_wrong_length(
    federation, devices, clients, shape
):
    mesh = make_mesh(devices)
    placed = place(federation, mesh)
    n = placed.cohorts[0].num_clients
    algorithm = recorder()

    def init(key, federation):
        return algorithm.init(key, federation)[0], (clients,)

    with pytest.raises(ValueError, match=rf"leading axis of {n} clients.*{shape}"):
        rounds.init_state(
            algorithm._replace(init=init), placed, KEY, Execution(None, mesh)
        )


def test_init_state_refuses_a_missing_cohort(federation):
    algorithm = recorder()._replace(init=lambda key, federation: (jnp.zeros(1), ()))
    with pytest.raises(ValueError, match="one entry for each of 1 cohorts, got 0"):
        rounds.init_state(algorithm, federation, KEY)


def test_weight_averaging_refuses_two_cohorts(toy_federation):
    algorithm = fedavg(optax.sgd(0.1), Schedule(4, 1))
    with pytest.raises(ValueError, match="one architecture; got 2 cohorts: toy6, toy8"):
        rounds.init_state(algorithm, toy_federation(models=2), KEY)


def test_init_state_shares_no_buffer(federation):
    algorithm = recorder()

    def init(key, federation):
        one = jnp.ones(9)
        ids = federation.cohorts[0].ids
        return (algorithm.init(key, federation)[0], one, one), (ids,)

    state = rounds.init_state(algorithm._replace(init=init), federation, KEY)
    given = jax.tree.leaves(federation)
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {a.unsafe_buffer_pointer() for a in given}


def test_traffic_reads_shapes_of_all_exchanges(federation):
    algorithm = recorder(more=1)
    state = rounds.init_state(algorithm, federation, KEY)
    (traffic,) = rounds.traffic(algorithm, federation, state)
    # Down: a row of 4 and an id. Up: 4, the noise, 2 to average and their weight.
    assert traffic == (2 * 4 * (4 + 1), 2 * 4 * (4 + 1 + 2 + 1))


def test_the_order_of_the_draw_does_not_matter(federation):
    order = np.random.default_rng(0).permutation(9)

    def shuffled(key, federation):
        (drawn,) = participation.full()(key, federation)
        return (Participants(*(a[order] for a in drawn)),)

    straight = run(recorder(), federation, participation.full())
    chex.assert_trees_all_equal(run(recorder(), federation, shuffled), straight)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_local_work_is_traced_once(federation, chunk, devices):
    base, traces = recorder(), []
    # One dictionary for all, as an exchange without metrics may return.
    shared = {"steps": jnp.int32(0)}

    def local(*args):
        traces.append(args)
        return *base.local(*args)[:2], shared

    algorithm = base._replace(local=local)
    execution = Execution(chunk, make_mesh(devices))
    federation = place(federation, execution.mesh)
    state = rounds.init_state(algorithm, federation, KEY, execution)
    round_fn = rounds.make_round(algorithm, participation.full(), execution)
    block = simulate.make_block(round_fn, 2, execution)
    block.lower(state, federation, KEY, jnp.int32(2))
    assert len(traces) == 1
    assert set(shared) == {"steps"}
