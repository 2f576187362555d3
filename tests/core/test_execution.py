"""Chunks, meshes and the dealing of clients to devices."""

from __future__ import annotations

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fedgen.core import execution
from fedgen.core.execution import Execution, make_mesh, place


def test_make_mesh():
    assert make_mesh(1) is None
    mesh = make_mesh(2)
    assert mesh.axis_names == ("clients",)
    assert Execution(None, mesh).num_devices == 2
    assert Execution().num_devices == 1


@pytest.mark.parametrize("count", [0, -1, 3])
def test_make_mesh_refuses(count):
    with pytest.raises(ValueError, match=f"between 1 and the 2 available, got {count}"):
        make_mesh(count)


def test_place_without_a_mesh_is_the_federation_itself(toy_federation):
    federation = toy_federation()
    assert place(federation, None) is federation


def test_default_chunk_on_a_cpu():
    assert execution.default_chunk() == 1


@pytest.mark.parametrize("models", [1, 2])
def test_place_keeps_every_client_once(toy_federation, models):
    federation = toy_federation(models=models)
    placed = place(federation, make_mesh(2))
    for before, after in zip(federation.cohorts, placed.cohorts, strict=True):
        assert after.num_real == before.num_real
        assert after.num_clients % 2 == 0
        assert after.num_clients - before.num_clients in (0, 1)
        ids = np.asarray(after.ids)
        assert sorted(ids[ids >= 0]) == sorted(before.ids.tolist())
        at = {int(i): k for k, i in enumerate(before.ids)}
        for part in ("train", "validation", "test"):
            old, new = getattr(before, part), getattr(after, part)
            assert new.start.dtype == new.size.dtype == jnp.int32
            for k, i in enumerate(ids):
                if i < 0:
                    assert int(new.size[k]) == 0
                else:
                    assert int(new.start[k]) == int(old.start[at[i]])
                    assert int(new.size[k]) == int(old.size[at[i]])
            assert new.size.sharding.spec == PartitionSpec("clients")
        np.testing.assert_array_equal(after.order, before.order)
    assert placed.pool.x.sharding.is_fully_replicated


@pytest.mark.parametrize("seed", range(5))
def test_place_deals_balanced_shares(toy_federation, seed):
    # Greedy back and forth: the shares differ by at most the largest client.
    rng = np.random.default_rng(seed)
    sizes = (rng.pareto(1.5, 21) * 10).astype(int)
    placed = place(toy_federation(sizes), make_mesh(2))
    shares = np.asarray(placed.cohorts[0].train.size).reshape(2, -1)
    assert shares.sum() == sizes.sum()
    assert abs(shares[0].sum() - shares[1].sum()) <= sizes.max()
    even = place(toy_federation(np.arange(8, 0, -1)), make_mesh(2))
    dealt = np.asarray(even.cohorts[0].train.size).reshape(2, -1)
    assert dealt.tolist() == [[8, 5, 4, 1], [7, 6, 3, 2]]
    # Each device's clients come largest first, whatever is dealt.
    assert (np.diff(shares, axis=1) <= 0).all()


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_map_clients_is_vmap(chunk):
    tree = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.arange(6)}

    def fn(args):
        return {"sum": args["a"].sum() * args["b"], "copy": args["a"][None]}

    found = jax.jit(execution.map_clients(fn, chunk))(tree)
    chex.assert_trees_all_equal(found, jax.vmap(fn)(tree))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_clients_are_added_to_sums(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    total = {"a": jnp.float32(1), "b": jnp.ones((2, 3))}
    stacked = {"a": jnp.arange(5.0), "b": jnp.arange(30.0).reshape(5, 2, 3)}
    found = execution.add_up(total, stacked)
    expected = {"a": 11.0, "b": 1 + np.arange(30.0).reshape(5, 2, 3).sum(0)}
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.float32, expected))
    # A function of its own, or the other platform's program would be found.
    traced = jax.make_jaxpr(lambda *given: execution.add_up(*given))(total, stacked)
    looped = "scan" in str(traced)
    assert looped == (platform == "cpu")


def test_map_clients_holds_one_chunk_at_a_time():
    # 64 clients with 1 MB of intermediates each.
    def fn(x):
        return jnp.sort(jnp.sin(x + jnp.arange(2.0**18)))[0]

    def peak(chunk):
        mapped = jax.jit(execution.map_clients(fn, chunk))
        return mapped.lower(jnp.ones(64)).compile().memory_analysis().temp_size_in_bytes

    assert peak(2) < peak(None) / 8


@pytest.mark.parametrize(
    ("count", "chunk", "expected"), [(5, 1, 5), (5, 2, 6), (4, 2, 4), (3, 8, 8)]
)
def test_padded(count, chunk, expected):
    assert execution.padded(count, chunk) == expected


def test_on_shards_gives_each_device_its_own_clients():
    mesh = make_mesh(2)

    def fn(scale, x):
        first = execution.first_slot(mesh, x.shape[0])
        return scale * x + first, jnp.full(x.shape, x.shape[0])

    run = execution.on_shards(fn, mesh, whole=(0,))
    found, held = jax.jit(run)(jnp.float32(2.0), jnp.arange(6.0))
    assert found.tolist() == [0.0, 2.0, 4.0, 9.0, 11.0, 13.0]
    assert held.tolist() == [3] * 6
    assert execution.on_shards(fn, None) is fn
    assert int(execution.first_slot(None, 3)) == 0


LONG_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from fedgen.core import execution

execution.use_cores()

def multiply(x, y):
    z = jax.lax.fori_loop(0, 1500, lambda i, z: jnp.sin(z), jnp.ones(2**17))
    return (x + 0 * z[0]).T @ y

rng = np.random.default_rng(0)
x, y = (rng.normal(size=(400, n)).astype(np.float32) for n in (7200, 16))
mesh = execution.make_mesh(len(jax.devices()))
program = jax.jit(
    execution.on_shards(lambda *a: multiply(*a)[None], mesh, whole=range(2))
)
for _ in range(4):
    for product in np.asarray(program(x, y)):
        np.testing.assert_allclose(product, x.T @ y, atol=1e-3)
"""


@pytest.mark.skipif(execution.num_cores() == 1, reason="one thread divides nothing")
def test_products_are_right_after_many_operations_on_all_cores():
    # Optimised as for users, and XLA reads its flags once: a process of its own.
    without = ("XLA_FLAGS", "NPROC", "PJRT_NPROC")
    env = {name: value for name, value in os.environ.items() if name not in without}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(execution.num_cores())}
    done = subprocess.run(
        [sys.executable, "-c", LONG_PROGRAM],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


UNDIVIDED = "--xla_disable_hlo_passes=cpu-parallel-task-assigner"


@pytest.mark.parametrize(
    "cores, used, flags",
    [
        (1, 0, f"--xla_mine {UNDIVIDED}"),
        (2, 0, f"--xla_mine {UNDIVIDED}"),
        (2, 1, "--xla_mine"),
        (4, 0, "--xla_mine"),
    ],
)
def test_use_cores_lets_xla_divide_if_a_core_is_left(monkeypatch, cores, used, flags):
    monkeypatch.setattr(execution, "num_cores", lambda: cores)  # and two devices
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine")
    for _ in range(2):
        execution.use_cores(used)
    assert os.environ["XLA_FLAGS"] == flags


def test_make_mesh_refuses_all_cores_if_xla_divides(monkeypatch):
    monkeypatch.setattr(execution, "num_cores", lambda: 2)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(ValueError, match=r"fewer than the 2 cores, got 2.*use_cores"):
        make_mesh(2)
    monkeypatch.setattr(execution, "num_cores", lambda: 3)
    assert make_mesh(2).size == 2
