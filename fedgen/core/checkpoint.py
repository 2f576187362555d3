"""Checkpoints of the whole `State`, atomic and verified, by orbax.

Clients are written where they lie, by the processes that hold them, together with their
ids. So a state can be read back under any number of devices and processes.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from fedgen.core import execution, hosts
from fedgen.core.algorithm import State

PyTree = Any
_ROWS = 10_000  # of which the digest makes copies at a time

# Orbax reports every file it touches; a run reports for itself.
logging.getLogger("absl").addFilter(
    lambda record: "orbax" not in record.pathname or record.levelno >= logging.ERROR
)


class Checkpoints:
    """The last two states of a run, under one folder.

    A checkpoint becomes visible by a rename, so a killed run never leaves half of
    one. Each carries a digest of its arrays: what was truncated or altered on disk is
    reported, and the one before it is used. A context manager. With several processes
    each makes the same calls, on a folder that they share.

    Args:
      folder: Made if it is not there.
      ids: `[n]` client numbers of each cohort in the order of the clients' state, -1
        for padding. Without them only states of one layout can be read.
    """

    def __init__(
        self, folder: epath.PathLike, ids: Sequence[np.ndarray] | None = None
    ) -> None:
        self.folder = epath.Path(folder)
        self._ids = ids
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def save(self, state: State, info: dict[str, Any]) -> None:
        """Write the state of a round, and a JSON dictionary with it."""
        ids = None if self._ids is None else [each.tolist() for each in self._ids]
        info = {**info, "ids": ids, "digest": digest(state, self._ids)}
        self._manager.save(
            int(state.round),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
            ),
            force=True,
        )

    def restore(
        self,
        like: State,
        warn: Callable[[str], None],
        last_round: int | None = None,
        *,
        set_aside: bool = True,
    ) -> tuple[State, dict[str, Any]] | None:
        """Read the newest sound checkpoint, or return None if there is none.

        Args:
          like: A state, or shapes with shardings, of the structure that was saved.
          warn: Called with a sentence for every checkpoint that cannot be used. Those
            are renamed to `ROUND.unused`, so that the resumed run can write the same
            rounds again.
          last_round: Use no checkpoint of a later round; None allows all.
          set_aside: Whether to rename at all; a mere reader must not.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                if last_round is not None and step > last_round:
                    raise ValueError(f"the metrics end at round {last_round}")
                return self._read(step, like)
            # Damage surfaces as whatever the storage layers happen to raise.
            except Exception as error:  # noqa: BLE001
                if hosts.several() and isinstance(error, jax.errors.JaxRuntimeError):
                    raise  # Another process is lost, and the checkpoint none the worse.
                reason = str(error).strip().splitlines() or [type(error).__name__]
                warn(
                    f"the checkpoint of round {step} in {self.folder} cannot be used: "
                    f"{reason[0][:200]}"
                )
                if set_aside:
                    self._set_aside(step)
        return None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Read a checkpoint, with the clients in the places that `like` has for them.

        Raises:
          Exception: Of any type, on every process, if it is not sound for one.
        """

        def read(**args):
            return hosts.together(
                lambda: self._manager.restore(step, args=ocp.args.Composite(**args))
            )

        info = read(info=ocp.args.JsonRestore()).info
        stored = info.get("ids") and [np.asarray(each, int) for each in info["ids"]]
        if self._ids is not None and stored is None:
            raise ValueError("it does not say which clients it holds")
        ids = stored if self._ids is None else self._ids
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        if ids is None or all(map(np.array_equal, stored, ids)):
            state = read(state=ocp.args.StandardRestore(like)).state
        else:
            places = list(map(_places, stored, ids))
            as_stored = like._replace(
                clients=tuple(map(_resized, like.clients, map(len, stored)))
            )
            state = read(state=ocp.args.StandardRestore(as_stored, strict=False)).state
            clients = map(_moved, state.clients, places, like.clients)
            state = state._replace(clients=tuple(clients))
        if digest(state, ids) != info["digest"]:
            raise ValueError("its arrays differ from those that were saved")
        return state, info

    def _set_aside(self, step: int) -> None:
        if hosts.is_first():
            unused = self.folder / f"{step}.unused"
            if unused.exists():
                unused.rmtree()
            (self.folder / str(step)).rename(unused)
        hosts.gather("")  # until it is done
        self._manager.reload()


def digest(state: State, ids: Sequence[np.ndarray] | None = None) -> str:
    """Hash the structure, types and bits of a state, wherever the clients lie.

    Every process sums over what it holds, so nothing is moved to one place. Any single
    change is found; sums of several cancel with a chance of about 2^-64.

    Args:
      state: What to hash.
      ids: As of `Checkpoints`; None takes the places for ids.
    """
    names, sums = [], []
    for k, part in enumerate((state.round, state.server, *state.clients)):
        of_clients = ids is not None and k >= 2
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            leaf = jax.numpy.asarray(leaf)
            rows = ids[k - 2] if of_clients else np.arange(*leaf.shape[:1] or (1,))
            shape = (int(np.sum(rows >= 0)), *leaf.shape[1:])
            names.append(f"{k}{jax.tree_util.keystr(path)} {leaf.dtype} {shape}")
            sums.append(_sum_bits(leaf, rows))
    words = np.array(sums, np.uint64)
    if hosts.several():  # JAX would cut 64 bits to 32.
        parts = multihost_utils.process_allgather(words.view(np.uint32))
        words = np.sum(np.ascontiguousarray(parts).view(np.uint64), 0, np.uint64)
    return hashlib.sha256("\n".join(names).encode() + words.tobytes()).hexdigest()


def _sum_bits(leaf: jax.Array, ids: np.ndarray) -> int:
    """Sum the bits of the rows `[n, ...]` that this process holds, modulo 2^64."""
    key = np.random.PCG64(1).random_raw(int(ids.max(initial=0)) + 1) | np.uint64(1)
    # Odd numbers can be divided by, so that a changed word always changes a sum.
    key = np.where(ids >= 0, key[ids], 0)
    total = 0
    for shard in leaf.addressable_shards:
        if shard.replica_id:
            continue
        rows = np.atleast_1d(shard.data)
        words = np.ascontiguousarray(rows).view(f"u{rows.dtype.itemsize}")
        words = words.reshape(len(rows), math.prod(rows.shape[1:]))
        odd = np.random.PCG64(0).random_raw(words.shape[1]) | np.uint64(1)
        mine = key[shard.index[0]] if shard.index else key
        # A few rows at a time, or the sums would need several times the state.
        for first in range(0, len(words), _ROWS):
            some = slice(first, first + _ROWS)
            total += int(mine[some] @ (words[some].astype(np.uint64) @ odd))
    return total % 2**64


def _places(stored: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Find where each client `[n]` of `ids` is stored; for padding, any place."""
    order = np.argsort(stored, kind="stable")
    held = stored[order]
    if not np.array_equal(held[held >= 0], np.sort(ids[ids >= 0])):
        raise ValueError("it holds other clients")
    return order[np.searchsorted(held, ids)]


def _resized(part: PyTree, length: int) -> PyTree:
    """Ask for the state of `length` clients, and more if devices have to share it."""

    def resize(leaf):
        whole = execution.padded(length, len(leaf.sharding.device_set))
        shape = (whole, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(resize, part)


def _moved(stored: PyTree, places: np.ndarray, like: PyTree) -> PyTree:
    """Put clients from their stored places into those of `like`, leaf after leaf."""

    def move(leaf, like):
        take = jax.jit(lambda leaf, at: leaf[at], out_shardings=like.sharding)
        return take(leaf, places)

    return jax.tree.map(move, stored, like)
