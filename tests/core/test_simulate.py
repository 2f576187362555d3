"""Blocks of rounds: length, resumption, donation, and runs that went wrong."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen.algorithms.local_only import local_only
from fedgen.core import participation, rounds, simulate
from fedgen.core.algorithm import State
from fedgen.core.execution import Execution, make_mesh, place
from fedgen.core.fit import Schedule
from fedgen.core.rounds import Report

KEY = jax.random.key(0)
ROUNDS = 5


@pytest.fixture(scope="module")
def problem(toy_federation):
    """Local training of half the clients, for which all state is on the clients."""
    federation = toy_federation((7, 0, 5, 3))
    algorithm = local_only(optax.sgd(0.1, momentum=0.5), Schedule(4, 1))
    round_fn = rounds.make_round(algorithm, participation.uniform(0.5), Execution())
    return federation, algorithm, round_fn


def run(problem, block, length, *, start=None, until=ROUNDS):
    federation, algorithm, _ = problem
    state = start
    if state is None:
        state = rounds.init_state(algorithm, federation, KEY)
    reports, blocks = (
        [],
        simulate.simulate(
            block, state, federation, KEY, num_rounds=until, rounds_per_block=length
        ),
    )
    for after, report in blocks:
        state = after
        reports.append(report)
    joined = jax.tree.map(lambda *a: np.concatenate(a), *reports) if reports else None
    return state, joined, [len(r.steps) for r in reports]


def test_block_length_and_resumption_change_nothing(problem):
    results, block = [], None
    for length, lengths in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5])):
        block = simulate.make_block(problem[2], length)
        *result, seen = run(problem, block, length)
        assert seen == lengths
        assert block._cache_size() == 1, "a short last block compiled again"
        results.append(result)
    for other in results[:-1]:
        chex.assert_trees_all_equal(other, results[-1])
    assert results[0][1].steps.shape == (5,)

    half, first, _ = run(problem, block, 5, until=3)
    resumed = jax.tree.map(lambda a: jnp.array(np.array(a)), half)
    state, second, _ = run(problem, block, 5, start=resumed)
    chex.assert_trees_all_equal(state, results[-1][0])
    joined = jax.tree.map(lambda *a: np.concatenate(a), first, second)
    chex.assert_trees_all_equal(joined, results[-1][1])
    assert run(problem, block, 5, start=state)[1] is None, "it was already done"


def test_a_resumed_run_stops_where_the_whole_one_does(problem):
    block = simulate.make_block(problem[2], 2)
    state, _, _ = run(problem, block, 2, until=1)
    assert run(problem, block, 2, start=state)[2] == [1, 2, 1]


def test_a_block_eats_its_state_and_nothing_else(problem):
    federation, algorithm, round_fn = problem
    block = simulate.make_block(round_fn, 1)
    state = rounds.init_state(algorithm, federation, KEY)
    after, _ = block(state, federation, KEY, jnp.int32(1))
    assert all(a.is_deleted() for a in jax.tree.leaves(state.clients))
    assert not any(a.is_deleted() for a in jax.tree.leaves((federation, after)))
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        block(state, federation, KEY, jnp.int32(1))


def test_client_state_stays_on_its_device(problem, toy_federation):
    _, algorithm, _ = problem
    mesh = make_mesh(2)
    execution = Execution(1, mesh)
    federation = place(toy_federation((7, 0, 5, 3, 8)), mesh)
    round_fn = rounds.make_round(algorithm, participation.uniform(0.5), execution)
    block = simulate.make_block(round_fn, 1, execution)
    state = rounds.init_state(algorithm, federation, KEY, execution)
    for _ in range(2):
        for leaf in jax.tree.leaves(state.clients):
            assert leaf.sharding.spec[0] == "clients"
            assert {s.data.shape[0] for s in leaf.addressable_shards} == {3}
        for leaf in jax.tree.leaves((state.round, state.server)):
            assert leaf.sharding.is_fully_replicated
        state, _ = block(state, federation, KEY, jnp.int32(1))
    assert block._cache_size() == 1


def test_too_long_a_block_is_refused(problem):
    block = simulate.make_block(problem[2], 1)
    with pytest.raises(ValueError, match="rounds_per_block must be <= 1.*got 3"):
        run(problem, block, 3)


def make_report(loss, participants, failed) -> Report:
    count = len(loss)
    return Report(
        {"loss": np.asarray(loss)},
        np.asarray(participants)[:, None],
        np.ones(count, np.int32),
        np.ones(count, np.int32),
        np.asarray(failed),
    )


GOOD = State(jnp.int32(0), {"w": jnp.ones(2), "n": jnp.int32(3)}, ((),))


def test_check_finite_passes_what_is_finite():
    report = make_report([1.0, 2.0], [3, 2], [[-1, -1], [4, -1]])
    simulate.check_finite(GOOD, report, 10)


def test_check_finite_names_the_round_and_the_clients():
    report = make_report([1.0, np.nan], [3, 2], [[-1, -1], [4, 2]])
    with pytest.raises(FloatingPointError, match=r"^round 12: loss not .*\[2, 4\]"):
        simulate.check_finite(GOOD, report, 10)


def test_check_finite_needs_somebody_left():
    report = make_report([0.0], [0], [[1, 0]])
    with pytest.raises(FloatingPointError, match=r"round 1: .*every participant"):
        simulate.check_finite(GOOD, report, 0)
    # A round in which all dropped out is no failure.
    simulate.check_finite(GOOD, make_report([0.0], [0], [[-1, -1]]), 0)


def test_check_finite_looks_at_the_server():
    bad = GOOD._replace(server={"w": jnp.array([1.0, jnp.inf]), "n": jnp.int32(3)})
    report = make_report([1.0, 1.0], [3, 3], [[-1], [-1]])
    with pytest.raises(FloatingPointError, match=r"rounds 4 to 5: .*'w'.* not finite"):
        simulate.check_finite(bad, report, 3)
