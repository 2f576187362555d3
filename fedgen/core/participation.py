"""Who takes part in a round.

A sampler is `(key, federation) -> one Participants per cohort`. It always draws the
same number of clients, so that shapes never change, and knows nothing of devices,
so that a draw never changes with the hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedgen.core.federation import Cohort, Federation


class Participants(NamedTuple):
    """Clients of one cohort that take part in a round."""

    slot: jax.Array  # [m] distinct positions in the cohort
    mask: jax.Array  # [m] bool, False for clients that never report back
    work: jax.Array  # [m] float32 share of the local steps done, (0, 1]


Sampler = Callable[[jax.Array, Federation], tuple[Participants, ...]]

_MANY = 16  # Of so many numbers, one or more asked for: a permutation is cheap.


def full() -> Sampler:
    """Let every client take part in every round."""
    return uniform(1.0)


def uniform(fraction: float) -> Sampler:
    """Draw a fixed share of every cohort uniformly, without replacement.

    Args:
      fraction: Share of a cohort's clients per round, in (0, 1]; at least one client.

    Raises:
      ValueError: If `fraction` is out of range.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"participation must be in (0, 1], got {fraction}")

    def draw(key: jax.Array, cohort: Cohort) -> Participants:
        if fraction == 1.0:
            slot = jnp.arange(cohort.num_clients)
        else:
            # Ids rank the clients, so that the draw does not depend on their places.
            count = cohort.num_real
            slot = distinct(key, _share(fraction, count), count)
            slot = slot if cohort.by_id is None else cohort.by_id[slot]
        return Participants(slot, cohort.ids[slot] >= 0, jnp.ones(slot.shape))

    def sample(key, federation):
        return tuple(
            draw(jax.random.fold_in(key, k), cohort)
            for k, cohort in enumerate(federation.cohorts)
        )

    return sample


def unreliable(
    sampler: Sampler, *, dropout: float = 0.0, stragglers: float = 0.0
) -> Sampler:
    """Let drawn clients fail or run late.

    Args:
      sampler: Draws the clients.
      dropout: Chance that a drawn client never reports back; its state is kept.
      stragglers: Chance that a client gets only a share of its local steps done,
        drawn uniformly from (0, 1), as in FedProx (Li et al., MLSys 2020).

    Raises:
      ValueError: If a chance is outside [0, 1).
    """
    for name, value in (("dropout", dropout), ("stragglers", stragglers)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value}")

    def lose(key, drawn, cohort):
        drop_key, late_key, work_key = jax.random.split(key, 3)

        # One draw per client id: who else was drawn does not matter.
        def chance(role):
            keys = jax.vmap(lambda i: jax.random.fold_in(role, i))(
                cohort.ids[drawn.slot]
            )
            return jax.vmap(jax.random.uniform)(keys)

        late = chance(late_key) < stragglers
        return Participants(
            drawn.slot,
            drawn.mask & (chance(drop_key) >= dropout),
            jnp.where(late, jnp.maximum(chance(work_key), 1e-3), drawn.work),
        )

    def sample(key, federation):
        draw_key, fail_key = jax.random.split(key)
        return tuple(
            lose(jax.random.fold_in(fail_key, k), drawn, cohort)
            for k, (drawn, cohort) in enumerate(
                zip(sampler(draw_key, federation), federation.cohorts, strict=True)
            )
        )

    return sample


def distinct(key: jax.Array, count: int, total: int) -> jax.Array:
    """Draw `count` different numbers below `total`; all sets are equally likely.

    Few of many are drawn with replacement, and those that were there before again
    until none was: the first different ones of an endless stream, at a cost that does
    not depend on `total`.
    """
    if total <= _MANY * count:
        return jax.random.permutation(key, total)[:count]

    def redraw(carry):
        turn, drawn, repeated = carry
        fresh = jax.random.randint(jax.random.fold_in(key, turn), (count,), 0, total)
        drawn = jnp.where(repeated, fresh, drawn)
        # Of equal numbers, the one that was there first stays.
        order = jnp.lexsort((repeated, drawn))
        equal = jnp.diff(drawn[order], prepend=-1) == 0
        return turn + 1, drawn, repeated.at[order].set(equal)

    start = (jnp.int32(0), jnp.zeros(count, jnp.int32), jnp.ones(count, bool))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), redraw, start)[1]


def _share(fraction: float, count: int) -> int:
    return max(1, round(fraction * count))
