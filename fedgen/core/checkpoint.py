"""Checkpoints of the whole `State`, atomic and verified, by orbax."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fedgen.core.algorithm import State

# Orbax reports every file it touches; a run reports for itself.
logging.getLogger("absl").addFilter(
    lambda record: "orbax" not in record.pathname or record.levelno >= logging.ERROR
)


class Checkpoints:
    """The last two states of a run, under one folder.

    A checkpoint becomes visible by a rename, so a killed run never leaves half of
    one. Each carries a digest of its arrays: what was truncated or altered on disk is
    reported, and the one before it is used. A context manager.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        self.folder = epath.Path(folder)
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
        self._manager.save(
            int(state.round),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                info=ocp.args.JsonSave({**info, "digest": digest(state)}),
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
                found = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(
                            jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                        ),
                        info=ocp.args.JsonRestore(),
                    ),
                )
                if digest(found.state) != found.info["digest"]:
                    raise ValueError("its arrays differ from those that were saved")
            # Damage surfaces as whatever the storage layers happen to raise.
            except Exception as error:  # noqa: BLE001
                reason = str(error).strip().splitlines() or [type(error).__name__]
                warn(
                    f"the checkpoint of round {step} in {self.folder} cannot be used: "
                    f"{reason[0][:200]}"
                )
                if set_aside:
                    self._set_aside(step)
            else:
                return found.state, found.info
        return None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        unused = self.folder / f"{step}.unused"
        if unused.exists():
            unused.rmtree()
        (self.folder / str(step)).rename(unused)
        self._manager.reload()


def digest(state: State) -> str:
    """Hash the structure, types and bits of a state."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return sha.hexdigest()
