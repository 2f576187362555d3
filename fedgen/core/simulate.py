"""Rounds in compiled blocks; the host looks in between blocks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedgen.core import tree
from fedgen.core.algorithm import State
from fedgen.core.execution import Execution, replicated, state_shardings
from fedgen.core.federation import Federation
from fedgen.core.rounds import Report, RoundFn

Block = Callable[[State, Federation, jax.Array, jax.Array], tuple[State, Report]]


def make_block(
    round_fn: RoundFn, length: int, execution: Execution = Execution()
) -> Block:
    """Compile up to `length` rounds into one call that donates its state.

    The number of rounds is an argument, so a short last block compiles nothing.

    Returns:
      `(state, federation, key, rounds [] int32) -> (state, reports [length, ...])`.
    """
    shardings = state_shardings(execution.mesh)
    whole = replicated(execution.mesh)
    round_fn = jax.jit(round_fn, inline=True)  # traced once for its shapes and its use

    @functools.partial(
        jax.jit, donate_argnums=0, out_shardings=shardings and (shardings, whole)
    )
    def block(state, federation, key, rounds):
        shapes = jax.eval_shape(round_fn, state, federation, key)[1]
        reports = jax.tree.map(lambda a: jnp.zeros((length, *a.shape), a.dtype), shapes)

        def body(i, carry):
            state, reports = carry
            state, report = round_fn(state, federation, key)
            return state, jax.tree.map(lambda a, b: a.at[i].set(b), reports, report)

        return jax.lax.fori_loop(0, rounds, body, (state, reports))

    return block


def simulate(
    block: Block,
    state: State,
    federation: Federation,
    key: jax.Array,
    *,
    num_rounds: int,
    rounds_per_block: int,
) -> Iterator[tuple[State, Report]]:
    """Run rounds up to `num_rounds` and yield on the host between blocks.

    Blocks end at multiples of `rounds_per_block` wherever the run starts, so a
    resumed run stops at the same rounds as one never killed. The yielded state is
    donated to the next block: save or copy it before asking for the next one.

    Yields:
      The state, and the reports of the block's rounds as NumPy arrays.

    Raises:
      ValueError: If the block was compiled for fewer rounds than `rounds_per_block`.
      FloatingPointError: If a metric or the server's state is not finite.
    """
    start = int(state.round)
    while start < num_rounds:
        stop = min(num_rounds, (start // rounds_per_block + 1) * rounds_per_block)
        done = slice(stop - start)
        state, reports = block(state, federation, key, np.int32(done.stop))
        if reports.steps.shape[0] < done.stop:
            raise ValueError(
                f"rounds_per_block must be <= {reports.steps.shape[0]}, the length of "
                f"the block, got {rounds_per_block}"
            )
        reports = jax.tree.map(operator.itemgetter(done), jax.device_get(reports))
        check_finite(state, reports, start)
        yield state, reports
        start = stop


def check_finite(state: State, reports: Report, start: int) -> None:
    """Raise a `FloatingPointError` that names the round and the clients at fault."""
    check_reported(jax.device_get(finite_leaves(state.server)), reports, start)


def check_reported(finite: Any, reports: Report, start: int) -> None:
    """Do as `check_finite`, given what `finite_leaves` tells of the server."""
    for i in range(reports.steps.shape[0]):
        bad = [k for k, v in reports.metrics.items() if not np.all(np.isfinite(v[i]))]
        failed = sorted({int(c) for c in reports.failed[i] if c >= 0})
        if not bad and failed and not np.any(reports.participants[i]):
            bad = ["the upload of every participant"]
        if bad:
            raise FloatingPointError(
                f"round {start + i + 1}: {', '.join(bad)} not finite"
                + (f"; clients left out before: {failed}" if failed else "")
            )
    for path, good in jax.tree_util.tree_leaves_with_path(finite):
        if not good:
            rounds = f"{start + 1} to {start + reports.steps.shape[0]}"
            raise FloatingPointError(
                f"rounds {rounds}: server state {jax.tree_util.keystr(path)} not finite"
            )


@jax.jit  # one program, not two for every shape
def finite_leaves(state: Any) -> Any:
    """Tell of every leaf whether all of it is finite, or not of floating point."""
    return jax.tree.map(tree.all_finite, state)
