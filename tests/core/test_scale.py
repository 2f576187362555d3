"""What many and unequal clients cost: memory outside the chunk, and idle steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgen import algorithms, models
from fedgen.core import execution, participation, rounds, simulate, tree
from fedgen.core.algorithm import Algorithm, Mean
from fedgen.core.execution import Execution
from fedgen.core.fit import Schedule
from fedgen.data import federate, partition
from fedgen.data.sources import Source

SAMPLES = 70_000  # As many as Fashion-MNIST has.


def build(num_clients, kind, shape=(28, 28, 1), samples=SAMPLES):
    """Deal blank images of ten classes to clients."""
    y = np.random.default_rng(0).permutation(np.arange(samples) % 10).astype(np.int32)
    source = Source("blank", np.zeros((samples, *shape), np.uint8), y, 10)
    owner = partition.partition(kind, y, num_clients, seed=0, alpha=0.1)
    split = partition.split(owner, y, num_clients, seed=0)
    return federate.federate(source, split, models.build("mlp", shape, 10))


def block_memory(name, federation, chunk):
    """Compile a block; return (arguments and results, working memory) in bytes."""
    algorithm = algorithms.make(
        name, optax.sgd(0.05, momentum=0.5), Schedule(50, steps=2)
    )
    layout = Execution(chunk)
    key = jax.random.key(0)
    state = jax.eval_shape(
        lambda: rounds.init_state(algorithm, federation, key, layout)
    )
    round_fn = rounds.make_round(algorithm, participation.full(), layout)
    block = simulate.make_block(round_fn, 2, layout)
    sizes = (
        block.lower(state, federation, key, jnp.int32(2)).compile().memory_analysis()
    )
    held = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
    assert sizes.alias_size_in_bytes >= tree.num_bytes(state), "a state was copied"
    return held, sizes.temp_size_in_bytes, tree.num_bytes(state.clients)


@pytest.mark.parametrize("name", ["pfedgm", "local_only"])
def test_a_thousand_clients_hold_little_beside_the_pool_and_their_state(name):
    many = build(1000, "dirichlet")
    held, working, clients = block_memory(name, many, 1)
    # What one client needs while it trains does not grow with the clients.
    _, chunk, _ = block_memory(name, build(2, "iid"), 1)
    outside = held + max(working - chunk, 0)
    pool = tree.num_bytes(many.pool)
    assert pool == SAMPLES * (28 * 28 + 4)
    assert outside <= 1.5 * (pool + clients)


def compiled_round(name, num_clients, participants, devices):
    """Compile a block for shapes of so many clients, of whom some take part."""
    layout = Execution(1, execution.make_mesh(devices))
    federation = execution.place(build(4, "iid", (2, 2, 1), 40), layout.mesh)
    (cohort,) = federation.cohorts

    def grown(a, size=num_clients):
        return jax.ShapeDtypeStruct((size,), a.dtype, sharding=a.sharding)

    many = dataclasses.replace(
        cohort,
        order=grown(cohort.order, 10 * num_clients),
        by_id=cohort.by_id if devices == 1 else grown(cohort.by_id),
        num_real=num_clients,
        **{
            name: jax.tree.map(grown, getattr(cohort, name))
            for name in ("ids", "train", "validation", "test")
        },
    )
    federation = dataclasses.replace(federation, cohorts=(many,))
    algorithm = algorithms.make(name, optax.sgd(0.05), Schedule(5, steps=2))
    key = jax.random.key(0)
    state = jax.eval_shape(rounds.make_init(algorithm, layout), key, federation)
    sampler = participation.uniform(participants / num_clients)
    round_fn = rounds.make_round(algorithm, sampler, layout)
    block = simulate.make_block(round_fn, 2, layout)
    return block.lower(state, federation, key, jnp.int32(2)).compile()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_round_costs_what_its_participants_cost(devices):
    costs = []
    for num_clients in (1_000, 100_000):
        compiled = compiled_round("fedper", num_clients, 20, devices)
        memory = compiled.memory_analysis()
        # What clients keep goes in and out in the same place.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        work = compiled.cost_analysis()["flops"]
        costs.append((memory.temp_size_in_bytes, new, work))
    assert costs[0] == costs[1]


def count_steps(schedule):
    """Build an algorithm that only counts its steps."""

    def local(context, key, client, message, data):
        steps = schedule.num_steps(data)
        return client, Mean((), data.size), {"steps": steps}

    return Algorithm(
        init=lambda key, federation: ((), ((),)),
        download=lambda context, server, id_: (),
        local=local,
        aggregate=lambda context, key, server, uploads: (server, {}),
        predict=lambda context, server, client, x: x,
    )


def executed(kind, chunk, devices):
    mesh = execution.make_mesh(devices)
    federation = execution.place(build(100, kind, (1, 1, 1)), mesh)
    layout = Execution(chunk, mesh)
    algorithm = count_steps(Schedule(batch_size=50))
    state = rounds.init_state(algorithm, federation, jax.random.key(0), layout)
    round_fn = rounds.make_round(algorithm, participation.full(), layout)
    _, report = jax.jit(round_fn)(state, federation, jax.random.key(1))
    return int(report.steps), int(report.executed)


@pytest.mark.parametrize(("chunk", "devices"), [(1, 1), (10, 1), (4, 2)])
def test_unequal_clients_cost_hardly_more_steps_than_equal_ones(chunk, devices):
    steps, even = executed("iid", chunk, devices)
    assert steps == 100 * 10  # 490 samples each, in batches of 50.
    _, uneven = executed("dirichlet", chunk, devices)
    assert uneven <= 1.3 * even
