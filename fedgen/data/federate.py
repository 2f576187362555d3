"""From a source and a split to the federation that algorithms train."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fedgen.core.federation import Cohort, Federation, Model, Pool, Rows
from fedgen.data.partition import Split
from fedgen.data.sources import Source, check


def federate(
    source: Source,
    split: Split,
    models: Model | Sequence[Model],
    *,
    clients: np.ndarray | None = None,
    cohort_of: np.ndarray | None = None,
    public: Source | None = None,
) -> Federation:
    """Build a federation with one cohort per model.

    Args:
      source: The pool of samples.
      split: Rows of every client.
      models: One architecture or several.
      clients: Which clients of the split take part; all of them where None.
      cohort_of: `[n]` which model each client trains; where None, client `i` of `k`
        models trains model `i mod k`.
      public: Samples that everybody may read, if any.

    Returns:
      The federation, with its arrays on the default device.

    Raises:
      ValueError: If the arrays do not fit together.
    """
    models = (models,) if isinstance(models, Model) else tuple(models)
    if not models:
        raise ValueError("models must hold an architecture, got none")
    check(source)
    if public is not None:
        check(public)
        if public.x.shape[1:] != source.x.shape[1:]:
            raise ValueError(
                f"public samples must have the shape {list(source.x.shape[1:])} of the "
                f"clients' samples, got {list(public.x.shape[1:])}"
            )
    num_clients = len(split.train.size)
    _check_split(split, len(source.y))
    if cohort_of is None:
        cohort_of = np.arange(num_clients) % len(models)
    cohort_of = np.asarray(cohort_of)
    if cohort_of.shape != (num_clients,):
        raise ValueError(
            f"cohort_of must have one entry per client, {num_clients}, got shape "
            f"{list(cohort_of.shape)}"
        )
    if not np.isin(cohort_of, range(len(models))).all():
        raise ValueError(
            f"cohort_of must lie in [0, {len(models)}), got "
            f"{cohort_of.min()}..{cohort_of.max()}"
        )
    clients = np.arange(num_clients) if clients is None else np.asarray(clients)
    cohorts = tuple(
        _cohort(model, clients[cohort_of[clients] == number], split)
        for number, model in enumerate(models)
    )
    for cohort in cohorts:
        if not cohort.num_clients:
            raise ValueError(
                f"every model needs a client, got none for {cohort.model.name!r}"
            )
    pool = _pool(source)
    shared = None if public is None else _pool(public)
    return Federation(pool, cohorts, source.num_classes, shared)


def _pool(source: Source) -> Pool:
    """Move the samples to the default device."""
    return Pool(jnp.asarray(source.x), jnp.asarray(source.y, jnp.int32))


def _check_split(split: Split, num_samples: int) -> None:
    """Raise where a run of a client leaves `order`, or `order` leaves the pool."""
    order = np.asarray(split.order)
    if order.size and not (order.min() >= 0 and order.max() < num_samples):
        raise ValueError(
            f"order must hold rows of a pool of {num_samples} samples, got "
            f"{order.min()}..{order.max()}"
        )
    expected = np.asarray(split.train.start)
    for name in ("train", "validation", "test"):
        start, size = (np.asarray(array) for array in getattr(split, name))
        if start.shape != split.train.size.shape or size.shape != start.shape:
            raise ValueError(
                f"start and size of {name} must have one entry per client, got "
                f"{list(start.shape)} and {list(size.shape)}"
            )
        bad = np.flatnonzero((start < 0) | (size < 0) | (start + size > len(order)))
        if len(bad):
            raise ValueError(
                f"the {name} rows of client {bad[0]} must lie in order, which holds "
                f"{len(order)}, got {size[bad[0]]} from {start[bad[0]]}"
            )
        if not np.array_equal(start, expected):
            raise ValueError(
                "a client's train, validation and test rows must follow one another; "
                f"the {name} rows do not begin where those before them end"
            )
        expected = start + size


def _cohort(model: Model, ids: np.ndarray, split: Split) -> Cohort:
    """Cut the runs of some clients out of the split."""
    begin = np.asarray(split.train.start)[ids]
    sizes = sum(np.asarray(part.size)[ids] for part in split[1:])
    new_begin = np.cumsum(sizes) - sizes
    position = np.arange(sizes.sum()) + np.repeat(begin - new_begin, sizes)

    def rows(part: Rows) -> Rows:
        start, size = (np.asarray(array)[ids] for array in part)
        start = start - begin + new_begin
        return Rows(jnp.asarray(start, jnp.int32), jnp.asarray(size, jnp.int32))

    return Cohort(
        model=model,
        ids=jnp.asarray(ids, jnp.int32),
        order=jnp.asarray(np.asarray(split.order)[position], jnp.int32),
        train=rows(split.train),
        validation=rows(split.validation),
        test=rows(split.test),
        num_real=len(ids),
        # Who is drawn depends on ids, not on places.
        by_id=None
        if np.all(np.diff(ids) > 0)
        else jnp.asarray(np.argsort(ids, kind="stable"), jnp.int32),
    )
