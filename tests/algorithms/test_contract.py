"""What every registered algorithm must do, whatever its paper.

All algorithms meet the same nine clients: ragged, one with a single sample, one with
none, one that is never drawn and one that is drawn but drops out. One compiled block
per algorithm serves nearly all tests: they change what is in the arrays, not shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.algorithms import REGISTRY, make
from fedgen.algorithms.fedgmi import Server as FedGmiServer
from fedgen.core import rounds, simulate
from fedgen.core.algorithm import Algorithm, ByServer, State
from fedgen.core.execution import AXIS, Execution, make_mesh, place
from fedgen.core.federation import Data, Federation
from fedgen.core.fit import Schedule
from fedgen.core.participation import Participants
from fedgen.core.rounds import Report

# The first leaves in some tests. As the smallest it does so without moving others to
# another place in their chunk, which would round differently.
SIZES = (1, 12, 3, 5, 9, 7, 6, 10, 0)
UNDRAWN, DROPPED, EMPTY = 3, 4, 8
KEY, INIT_KEY = jax.random.key(7), jax.random.key(11)
ROUNDS = 3

# Bytes (down, up) of a participant: 4 features, 6 hidden, d = 5, c = 4, float32.
BODY, HEAD = 4 * 6 + 6 + 6 * 5 + 5, 5 * 4 + 4
WEIGHTS = BODY + HEAD
VAE = (4 * 8 + 8 + 8 * 4 + 4) + (2 * 8 + 8 + 8 * 4 + 4)
# A `Mean` also carries its weight.
AVERAGED = 4 * WEIGHTS, 4 * WEIGHTS + 4


def gaussian(navigator: int, weights: int) -> tuple[int, int]:
    """Count a round of pFedGM, given the numbers of a navigator and of its weight.

    Down the body, the navigator and the belief (m, U, Sigma, B), then the new body; up
    body and navigator, then n_ic, zbar_ic and a covariance, with their weights.
    """
    down = BODY + navigator + (20 + 4 + 25 + 25) + BODY
    up = BODY + 1 + navigator + weights + 4 + 20 + 25 + 1
    return 4 * down, 4 * up


TRAFFIC = {
    # Weights down twice; up, then first and second moments [c, d], [c, d, d] with c
    # weights each.
    "ccvr": (8 * WEIGHTS, 4 * (WEIGHTS + 1 + 20 + 4 + 100 + 4)),
    "fedadam": AVERAGED,
    "fedavg": AVERAGED,
    "fedavg_ft": AVERAGED,
    "fedavg_gaussian": gaussian(HEAD, 1),
    # Three models; up, each with its weight.
    "fedem": (12 * WEIGHTS, 12 * (WEIGHTS + 1)),
    # Two VAEs 4-8-2-8-4 and models, the guide [128, k] and [k], the round; up, each
    # with its weight, then mean and weighted covariance of 128 features.
    "fedgmi": (
        8 * (VAE + WEIGHTS + 128 + 1) + 4,
        8 * (VAE + 1 + WEIGHTS + 1) + 4 * (128 + 128**2 + 1),
    ),
    # Besides three models, three Gaussians of the 4 features; up, each with its count.
    "fedgmm": (12 * (WEIGHTS + 4 + 16), 12 * (WEIGHTS + 1 + 1 + 4 + 16)),
    "fedper": (4 * BODY, 4 * BODY + 4),
    # Prototypes [c, d] and their counts [c].
    "fedproto": (4 * (20 + 4), 4 * (20 + 4)),
    "fedprox": AVERAGED,
    "fedyogi": AVERAGED,
    # Three models down; up, one and its number.
    "ifca": (12 * WEIGHTS, 4 * (WEIGHTS + 1)),
    "local_only": (0, 0),
    # Body and Gaussians (means [c, d], covariance [d, d]) twice down; up the body,
    # then the Gaussians, whose means are weighted class by class.
    "pfedfda": (8 * (BODY + 20 + 25), 4 * (BODY + 1 + 20 + 4 + 25 + 1)),
    "pfedgm": gaussian(5 * 4, 4),
    # Up without a weight: the server sees whose parameters they are.
    "pfedgpa": (4 * WEIGHTS, 4 * WEIGHTS),
}
LEARNING_RATE = {"pfedfda": 0.002}
# Of three rounds each is of another stage, and two generate; few codes, for the last
# of many are all but rounding.

HYPERPARAMETERS = {
    "fedgmi": {
        "num_components": 2,
        "hidden": 8,
        "latent": 2,
        "vae_epochs": 1,
        "pretrain_rounds": 1,
        "max_samples": 16,
    },
    "pfedgpa": {
        "warmup": 1,
        "rank": 2,
        "denoiser_steps": 3,
        "denoiser_width": 8,
        "newcomer_rounds": 1,
    },
}
# Algorithms that serve several architectures; the rest average weights.
ANY_ARCHITECTURE = {"local_only", "fedproto"}
# Algorithms whose clients keep to themselves.
ALONE = {"local_only"}


class Case(NamedTuple):
    """An algorithm, its compiled block, and what three rounds of it gave."""

    name: str
    algorithm: Algorithm
    federation: Federation
    block: simulate.Block
    start: State
    end: State
    reports: Report

    def run(self, federation: Federation, state: State | None = None, count=ROUNDS):
        """Run the block on copies, since it eats its state."""
        state = jax.tree.map(jnp.copy, self.start if state is None else state)
        return self.block(state, federation, KEY, jnp.int32(count))


def sampler(key: jax.Array, federation: Federation) -> tuple[Participants, ...]:
    """Draw all clients of an only cohort but one, by their ids, not their places."""
    del key

    def draw(cohort):
        last = np.iinfo(np.int32).max
        rank = jnp.where(cohort.ids == UNDRAWN, last - 1, cohort.ids)
        slot = jnp.argsort(jnp.where(cohort.ids < 0, last, rank))
        slot = slot[: cohort.num_real - (len(federation.cohorts) == 1)]
        ids = cohort.ids[slot]
        here = (ids >= 0) & (ids != UNDRAWN) & (ids != DROPPED)
        return Participants(slot, here, jnp.ones(slot.shape))

    return tuple(draw(cohort) for cohort in federation.cohorts)


def build(name: str) -> Algorithm:
    return make(
        name,
        optax.sgd(LEARNING_RATE.get(name, 0.05), momentum=0.5),
        Schedule(4, 2),
        HYPERPARAMETERS.get(name),
    )


def make_block(algorithm: Algorithm, execution: Execution) -> simulate.Block:
    round_fn = rounds.make_round(algorithm, sampler, execution)
    return simulate.make_block(round_fn, ROUNDS, execution)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.xdist_group(f"contract-{name}"))
        for name in sorted(REGISTRY)
    ],
)
def case(request, toy_federation) -> Case:
    algorithm = build(request.param)
    federation = toy_federation(SIZES, models=2 if request.param == "fedproto" else 1)
    block = make_block(algorithm, Execution())
    start = rounds.init_state(algorithm, federation, INIT_KEY)
    copied = jax.tree.map(jnp.copy, start)
    end, reports = block(copied, federation, KEY, jnp.int32(ROUNDS))
    return Case(request.param, algorithm, federation, block, start, end, reports)


def change(federation: Federation, fn: Callable[[Any], Any]) -> Federation:
    """Apply `fn` to every cohort."""
    return dataclasses.replace(federation, cohorts=tuple(map(fn, federation.cohorts)))


def without(federation: Federation, client: int) -> Federation:
    """Turn a client into padding, which keeps all shapes."""
    return change(
        federation,
        lambda cohort: dataclasses.replace(
            cohort, ids=jnp.where(cohort.ids == client, -1, cohort.ids)
        ),
    )


def training_rows(federation: Federation, client: int) -> np.ndarray:
    """List the pool rows that a client trains on."""
    for cohort in federation.cohorts:
        ids, start, size = map(np.asarray, (cohort.ids, *cohort.train))
        for i in np.flatnonzero(ids == client):
            return np.asarray(cohort.order)[start[i] : start[i] + size[i]]
    raise AssertionError(client)


def poison(federation: Federation, rows: np.ndarray) -> Federation:
    """Put NaN in these rows of the pool."""
    x = federation.pool.x.at[rows].set(jnp.nan)
    return dataclasses.replace(federation, pool=federation.pool._replace(x=x))


def of_client(federation: Federation, state: State, client: int) -> Any:
    """Pick one client's state."""
    for cohort, clients in zip(federation.cohorts, state.clients, strict=True):
        for i in np.flatnonzero(np.asarray(cohort.ids) == client):
            return jax.tree.map(lambda a, i=i: a[i], clients)
    raise AssertionError(client)


def losses(reports: Report) -> np.ndarray:
    """Average the training losses of all cohorts and exchanges, by round."""
    values = [v for k, v in reports.metrics.items() if k.split("/")[-1] == "loss"]
    return np.mean(jax.device_get(values), axis=0)


def assert_close(a: Any, b: Any) -> None:
    chex.assert_trees_all_close(a, b, rtol=2e-4, atol=2e-5)


def without_guide(server: Any) -> Any:
    """Leave out FedGMI's guide: that of clients who mix nothing is amplified noise."""
    if not isinstance(server, FedGmiServer):
        return server
    return server._replace(shared=server.shared._replace(guide=()))


def test_a_round_keeps_the_form_of_the_state(case):
    round_fn = rounds.make_round(case.algorithm, sampler, Execution())
    after, _ = jax.eval_shape(round_fn, case.start, case.federation, KEY)

    def form(state):
        return jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state)

    assert form(after) == form(case.start)


def test_rounds_do_something_and_stay_finite(case):
    chex.assert_tree_all_finite(case.end)
    assert int(case.end.round) == ROUNDS
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), case.start[1:], case.end[1:]
    )
    assert any(jax.tree.leaves(moved))
    here = len(SIZES) - len({UNDRAWN, DROPPED})
    assert np.sum(case.reports.participants, axis=1).tolist() == [here] * ROUNDS
    assert np.all(np.asarray(case.reports.failed) == -1)


def test_rounds_one_by_one_and_resumed_from_the_host_are_the_same(case):
    state, reports = case.start, []
    for _ in range(ROUNDS):
        state, report = case.run(case.federation, state, 1)
        reports.append(jax.tree.map(lambda a: a[:1], report))
        state = jax.tree.map(jnp.array, jax.tree.map(np.array, state))
    chex.assert_trees_all_equal(state, case.end)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *reports)
    chex.assert_trees_all_equal(joined, case.reports)
    assert case.block._cache_size() == 1, "another block compiled again"


def test_the_chunk_changes_only_roundings(case):
    # Of nine clients, so the last chunk is filled up; two devices take them one by one.
    block = make_block(case.algorithm, Execution(2))
    copied = jax.tree.map(jnp.copy, case.start)
    end, reports = block(copied, case.federation, KEY, jnp.int32(ROUNDS))
    # The compiler orders the sums of a matrix product by its shape, so not bit for bit.
    found, expected = (
        s._replace(server=without_guide(s.server)) for s in (end, case.end)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=5e-6)
    chex.assert_trees_all_equal(
        (reports.participants, reports.steps),
        (case.reports.participants, case.reports.steps),
    )
    assert_close(reports.metrics, case.reports.metrics)
    assert np.all(reports.executed >= reports.steps)
    assert np.all(reports.executed <= case.reports.executed)


def test_two_devices_change_only_the_order_of_sums(case):
    mesh = make_mesh(2)
    execution, federation = Execution(1, mesh), place(case.federation, mesh)
    state = rounds.init_state(case.algorithm, federation, INIT_KEY, execution)
    end, reports = make_block(case.algorithm, execution)(
        state, federation, KEY, jnp.int32(ROUNDS)
    )
    assert_close(*map(without_guide, (end.server, case.end.server)))
    assert_close(reports.metrics, case.reports.metrics)
    chex.assert_trees_all_equal(reports.steps, case.reports.steps)
    for client in range(len(SIZES)):
        assert_close(
            of_client(federation, end, client),
            of_client(case.federation, case.end, client),
        )
    for leaf in jax.tree.leaves(end.clients):
        assert leaf.sharding.spec[0] == AXIS


def test_a_sweep_over_seeds_is_one_vmap(case):
    # Traced only, for the time it takes; `test_rounds.py` looks at the numbers.
    round_fn = rounds.make_round(case.algorithm, sampler, Execution())

    def train(key):
        server, clients = case.algorithm.init(key, case.federation)
        state = State(jnp.zeros((), jnp.int32), server, clients)
        return round_fn(state, case.federation, key)[0]

    ends = jax.eval_shape(jax.vmap(train), jax.random.split(KEY, 2))
    chex.assert_tree_shape_prefix(ends, (2,))
    alone = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), ends)
    chex.assert_trees_all_equal_shapes_and_dtypes(alone, case.start)


@pytest.mark.parametrize("client", [UNDRAWN, DROPPED])
def test_absent_clients_are_untouched(case, client):
    before = of_client(case.federation, case.start, client)
    chex.assert_trees_all_equal(of_client(case.federation, case.end, client), before)


def test_a_clients_place_does_not_matter(case):
    rng = np.random.default_rng(0)
    places = [rng.permutation(c.num_clients) for c in case.federation.cohorts]
    cohorts = tuple(
        dataclasses.replace(
            cohort,
            ids=cohort.ids[place_],
            **{
                part: jax.tree.map(lambda a, p=place_: a[p], getattr(cohort, part))
                for part in ("train", "validation", "test")
            },
        )
        for cohort, place_ in zip(case.federation.cohorts, places, strict=True)
    )
    federation = dataclasses.replace(case.federation, cohorts=cohorts)
    start = rounds.init_state(case.algorithm, federation, INIT_KEY)
    for client in range(len(SIZES)):
        chex.assert_trees_all_equal(
            of_client(federation, start, client),
            of_client(case.federation, case.start, client),
        )
    end, _ = case.run(federation, start)
    chex.assert_trees_all_equal(end.server, case.end.server)
    for client in range(len(SIZES)):
        chex.assert_trees_all_equal(
            of_client(federation, end, client),
            of_client(case.federation, case.end, client),
        )


def test_a_client_without_samples_changes_nothing(case):
    end, reports = case.run(without(case.federation, EMPTY))
    chex.assert_trees_all_equal(end.server, case.end.server)
    for client in set(range(len(SIZES))) - {EMPTY}:
        chex.assert_trees_all_equal(
            of_client(case.federation, end, client),
            of_client(case.federation, case.end, client),
        )
    chex.assert_trees_all_equal(reports.metrics, case.reports.metrics)


def test_a_client_with_nan_counts_as_absent(case):
    # Client 0 also owns the row that padding reads, so it would reach everybody.
    federation = poison(case.federation, training_rows(case.federation, 0))
    end, reports = case.run(federation)
    expected, others = case.run(without(case.federation, 0))
    chex.assert_trees_all_equal(end, expected)
    chex.assert_trees_all_equal(reports.metrics, others.metrics)
    chex.assert_trees_all_equal(reports.participants, others.participants)
    assert np.all(np.any(np.asarray(reports.failed) == 0, axis=1))
    assert set(np.unique(reports.failed)) == {-1, 0}


def test_rows_that_nobody_trains_on_are_never_read(case):
    owned = [training_rows(case.federation, i) for i in range(len(SIZES))]
    rest = np.setdiff1d(np.arange(case.federation.pool.x.shape[0]), np.hstack(owned))
    assert len(rest) > 4
    end, reports = case.run(poison(case.federation, rest))
    chex.assert_trees_all_equal((end, reports), (case.end, case.reports))


def test_what_others_hold_stays_with_them(case):
    if case.name not in ALONE:
        pytest.skip("its clients learn from each other")
    mine = training_rows(case.federation, 1)
    rest = np.setdiff1d(np.arange(case.federation.pool.x.shape[0]), mine)
    end, _ = case.run(poison(case.federation, rest))
    chex.assert_trees_all_equal(
        of_client(case.federation, end, 1),
        of_client(case.federation, case.end, 1),
    )


def test_bytes_are_those_of_the_paper(case):
    traffic = rounds.traffic(case.algorithm, case.federation, case.start)
    assert {tuple(t) for t in traffic} == {TRAFFIC[case.name]}


def test_the_training_loss_falls(case):
    state, last = case.end, case.reports
    for _ in range(4):
        state, last = case.run(case.federation, state)
    assert losses(last)[-1] < 0.8 * losses(case.reports)[0]


def test_only_architecture_free_algorithms_take_two_cohorts(case, toy_federation):
    federation = toy_federation((3, 4, 2, 5), models=2)
    if case.name not in ANY_ARCHITECTURE:
        with pytest.raises(ValueError, match="share one architecture"):
            rounds.init_state(case.algorithm, federation, INIT_KEY)
        return
    state = rounds.init_state(case.algorithm, federation, INIT_KEY)
    round_fn = rounds.make_round(case.algorithm, sampler, Execution())
    after, _ = jax.eval_shape(round_fn, state, federation, KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_what_the_server_predicts_for_everybody_is_marked(case):
    marked = case.algorithm.predict == ByServer(case.algorithm.predict_global)
    assert marked == (case.name in ("fedavg", "fedadam", "fedyogi", "fedprox", "ccvr"))


def test_predictions_are_finite_even_for_unseen_classes(case):
    federation = case.federation
    x = federation.pool.x[:6]

    @jax.jit
    def logits(state):
        out = []
        for k, cohort in enumerate(federation.cohorts):
            context = federation.context(k)

            def one(id_, rows, client, context=context, order=cohort.order):
                data = Data(federation.pool, order, *rows, jnp.float32(1))
                message = case.algorithm.download(context, state.server, id_)
                client = case.algorithm.personalise(context, KEY, client, message, data)
                return case.algorithm.predict(context, state.server, client, x)

            out.append(jax.vmap(one)(cohort.ids, cohort.train, state.clients[k]))
            if case.algorithm.predict_global is not None:
                out.append(
                    case.algorithm.predict_global(context, state.server, x)[None]
                )
        return jnp.concatenate(out)

    for state in (case.start, case.end):
        values = logits(state)
        whole = 0 if case.algorithm.predict_global is None else 1
        assert values.shape == (len(SIZES) + whole, 6, federation.num_classes)
        assert np.all(np.isfinite(values))
