"""How the client axis is laid out over time and devices; algorithms never see it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedgen import _matrices
from fedgen.core.algorithm import State
from fedgen.core.federation import Federation, Rows

AXIS = "clients"
PyTree = Any

# XLA:CPU offers parts of sums and the like to the other threads of its pool. A thread
# that gets to such a part first itself leaves an empty task in its queue, and where all
# threads run devices, nobody takes that away. A queue holds 1,024. From then on tasks
# run at once, and a product of matrices packs a block over one that is still in use:
# its result is wrong (jaxlib 0.10.2). Devices with a core each gain nothing thereby.
_UNDIVIDED = "--xla_disable_hlo_passes=cpu-parallel-task-assigner"


class Execution(NamedTuple):
    """The layout of the client axis.

    Attributes:
      chunk: Clients trained at once on a device; None trains all of them.
      mesh: A mesh with a "clients" axis, or None for the default device.
    """

    chunk: int | None = None
    mesh: Mesh | None = None

    @property
    def num_devices(self) -> int:
        """Number of devices that share the clients."""
        return 1 if self.mesh is None else self.mesh.size


def default_chunk() -> int | None:
    """Return the chunk that suits the platform.

    On a CPU one client at a time fills the caches and the cores' vector units;
    larger chunks only cost memory traffic. An accelerator wants all of them.
    """
    return 1 if jax.default_backend() == "cpu" else None


def read_chunk(chunk: int | str) -> int | None:
    """Turn a number, "all" or "auto", which suits the platform, into a chunk."""
    if chunk == "auto":
        return default_chunk()
    return None if chunk == "all" else int(chunk)


def use_cores(devices: int = 0) -> None:
    """Make each CPU core a device, so that clients train side by side on them.

    To be called before JAX is first used. Other platforms go on as they are. If the
    environment sets JAX_NUM_CPU_DEVICES, there are as many devices as that says. Where
    no core is left over, it adds to XLA_FLAGS that operations are not divided.

    Args:
      devices: How many will be used at once, 0 for all.
    """
    if jax.config.jax_num_cpu_devices <= 0:
        jax.config.update("jax_num_cpu_devices", num_cores())
    busy = devices or jax.config.jax_num_cpu_devices
    flags = os.environ.get("XLA_FLAGS", "")
    if busy >= num_cores() and _UNDIVIDED not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_UNDIVIDED}".strip()


def num_cores() -> int:
    """Count the cores that this process may use."""
    # Not every system can tell.
    mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(mine(0))


def make_mesh(num_devices: int) -> Mesh | None:
    """Build a mesh over `num_devices` devices; None for one device.

    Every process gives as many, its first ones.

    Raises:
      ValueError: If there are fewer devices, processes cannot give as many each, or
        they would take every core of a CPU without `use_cores`.
    """
    available, processes = len(jax.devices()), jax.process_count()
    if not 1 <= num_devices <= available:
        raise ValueError(
            f"devices must be between 1 and the {available} available, got "
            f"{num_devices}"
        )
    if num_devices % processes:
        raise ValueError(
            f"devices must be a multiple of the {processes} processes, got "
            f"{num_devices}"
        )
    if num_devices == 1:
        return None
    each = num_devices // processes
    local = [jax.local_devices(process_index=i) for i in range(processes)]
    if min(map(len, local)) < each:
        raise ValueError(
            f"devices must be {each} on each of the {processes} processes, got "
            f"{', '.join(str(len(devices)) for devices in local)}"
        )
    devices = np.asarray([devices[:each] for devices in local]).reshape(-1)
    full = devices[0].platform == "cpu" and 1 < each >= num_cores()
    if full and _UNDIVIDED not in os.environ.get("XLA_FLAGS", ""):
        raise ValueError(
            f"devices must be fewer than the {num_cores()} cores, got {each}, unless "
            "fedgen.core.execution.use_cores() comes before anything else of JAX; "
            "without it XLA may compute wrong products of matrices"
        )
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def place(federation: Federation, mesh: Mesh | None) -> Federation:
    """Lay a federation out over the devices of a mesh.

    Clients are dealt out by size, largest first and back and forth, so that every
    device gets a like share of the samples; padding makes the count divide. The
    pool lies whole on every device.
    """
    if mesh is None:
        return federation
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    whole = replicated(mesh)

    def deal(cohort):
        n = cohort.num_clients
        width = -(-n // mesh.size)
        ranked = np.argsort(-np.asarray(cohort.train.size), kind="stable")
        ranked = np.append(ranked, np.full(width * mesh.size - n, -1))
        table = ranked.reshape(width, mesh.size)
        table[1::2] = table[1::2, ::-1]
        slot = table.T.reshape(-1)
        ids = np.where(slot >= 0, np.asarray(cohort.ids)[slot], -1)

        def pick(a, padding):
            dealt = np.where(slot >= 0, np.asarray(a)[slot], padding)
            return _put(dealt.astype(a.dtype), split)

        return dataclasses.replace(
            cohort,
            ids=pick(cohort.ids, -1),
            # Padding, id -1, sorts first.
            by_id=_put(np.argsort(ids, kind="stable")[-n:].astype(np.int32), whole),
            order=_put(cohort.order, whole),
            **{
                name: Rows(*(pick(a, 0) for a in getattr(cohort, name)))
                for name in ("train", "validation", "test")
            },
        )

    return dataclasses.replace(
        federation,
        pool=_put(federation.pool, whole),
        public=_put(federation.public, whole),
        cohorts=tuple(deal(cohort) for cohort in federation.cohorts),
    )


def _put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Lay out arrays that every process holds whole."""
    # From host memory, which the devices of a CPU then share.
    tree = jax.tree.map(np.asarray, tree)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), tree
    )


def state_shardings(mesh: Mesh | None) -> State | None:
    """Return where the parts of a `State` lie: clients split, the rest whole."""
    if mesh is None:
        return None
    whole = replicated(mesh)
    return State(whole, whole, NamedSharding(mesh, PartitionSpec(AXIS)))


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Return where lies what every process reads: whole on each device."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def over_clients(fn: Callable, chunk: int) -> Callable:
    """Lift `fn` of one client to a chunk of them, stacked on a leading axis.

    Clients who factorise matrices take turns where batches of these may hang.
    """

    def lifted(*args):
        first = jax.tree.map(lambda a: a[0], args)
        # One client alone needs no batch axis, hence no batched matrix products.
        if chunk == 1:
            return jax.tree.map(lambda a: a[None], fn(*first))
        if _matrices.batches_may_hang() and _matrices.factorises(fn, *first):
            return jax.lax.map(lambda args: fn(*args), args)
        return jax.vmap(fn)(*args)

    return lifted


def map_clients(fn: Callable, chunk: int | None) -> Callable:
    """Lift `fn` of one client to clients `[n, ...]`, `chunk` of them at once."""

    def mapped(*args):
        n = jax.tree.leaves(args)[0].shape[0]
        width = chunk or n
        extra = padded(n, width) - n

        def split(a):
            a = jnp.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1))
            return a.reshape(-1, width, *a.shape[1:])

        out = jax.lax.map(
            lambda chunk: over_clients(fn, width)(*chunk), jax.tree.map(split, args)
        )
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], out)

    return mapped


def add_up(total: PyTree, stacked: PyTree) -> PyTree:
    """Add clients, leaves `[n, ...]`, to sums of them, leaves `[...]`.

    On a CPU one client after another, so that rounding does not depend on the chunk. On
    an accelerator that would be a kernel for every client.
    """
    if jax.default_backend() != "cpu":
        return jax.tree.map(lambda a, b: a + jnp.sum(b, axis=0), total, stacked)
    return jax.lax.scan(
        lambda sums, one: (jax.tree.map(jnp.add, sums, one), None), total, stacked
    )[0]


def padded(count: int, chunk: int) -> int:
    """Round a number of clients up to a multiple of the chunk."""
    return -(-count // chunk) * chunk


def on_shards(fn: Callable, mesh: Mesh | None, whole: Sequence[int] = ()) -> Callable:
    """Give each device its own clients.

    `fn` only ever indexes the clients that its device holds. Indexing the global
    array instead would make the partitioner copy every client to every device.

    Args:
      fn: Takes trees whose leaves have a leading client axis.
      mesh: The devices, or None to call `fn` as it is.
      whole: Positions of arguments that every device sees whole.
    """
    if mesh is None:
        return fn

    def sharded(*args):
        specs = tuple(
            PartitionSpec() if i in whole else PartitionSpec(AXIS)
            for i in range(len(args))
        )
        return jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(AXIS),
            # Local training loops from replicated values (server weights, fresh
            # optimiser counters) to per-device ones, which the check forbids.
            check_vma=False,
        )(*args)

    return sharded


def first_slot(mesh: Mesh | None, clients: int) -> jax.Array:
    """Return the global position of this device's first client, [] int32."""
    if mesh is None:
        return jnp.int32(0)
    return jax.lax.axis_index(AXIS).astype(jnp.int32) * clients
