"""Fifty rounds compile one block and the check of its result, and nothing else."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from fedgen.algorithms import make
from fedgen.core import participation, rounds, simulate
from fedgen.core.execution import Execution
from fedgen.core.fit import Schedule

SYSTEMS = {
    "fedem": {},
    "fedgmi": {"num_components": 2, "hidden": 4, "latent": 2, "max_samples": 8},
    "fedgmm": {},
    "ifca": {},
    "pfedgpa": {"rank": 2, "denoiser_steps": 2, "denoiser_width": 4},
}
KEY = jax.random.key(0)
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """List the programs that are compiled inside, by name."""
    names = []

    def listen(event, seconds, **info):
        del seconds
        if event == COMPILED:
            names.append(info["fun_name"])

    jax.clear_caches()  # what another test compiled must count here
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def run_fifty(block, algorithm, federation):
    """Run ten blocks of five rounds, and list what they compile."""
    state = rounds.init_state(algorithm, federation, KEY)
    with compilations() as names:
        for after, _ in simulate.simulate(
            block, state, federation, KEY, num_rounds=50, rounds_per_block=5
        ):
            state = after
    assert int(state.round) == 50
    return names


@pytest.fixture(scope="module")
def federation(toy_federation):
    return toy_federation((7, 5, 3))


@pytest.mark.parametrize("name", SYSTEMS)
def test_fifty_rounds_compile_no_more_than_two_programs(name, federation):
    algorithm = make(name, optax.sgd(0.05), Schedule(4, 1), SYSTEMS[name])
    sampler = participation.uniform(0.7)
    block = simulate.make_block(rounds.make_round(algorithm, sampler, Execution()), 5)
    names = run_fifty(block, algorithm, federation)
    assert 1 <= len(names) <= 2, names


def test_a_block_that_depends_on_its_round_is_found_out(federation):
    algorithm = make("local_only", optax.sgd(0.05), Schedule(4, 1))

    @functools.partial(jax.jit, static_argnums=1)
    def advance(state, first):
        ones = jnp.ones((5, 1), jnp.int32)
        report = rounds.Report({"loss": first + ones}, ones, ones, ones, -ones)
        return state._replace(round=state.round + 5), report

    def block(state, federation, key, count):
        return advance(state, int(state.round))

    names = run_fifty(block, algorithm, federation)
    assert names.count("jit(advance)") == 10 and len(names) > 2
