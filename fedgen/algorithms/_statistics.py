"""What a client's samples say of its representation, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from fedgen.aggregators import gaussian
from fedgen.core import fit
from fedgen.core.federation import Context, Data, Params


def measure(
    context: Context, params: Params, data: Data, batch_size: int
) -> gaussian.Statistics:
    """Compute counts, class means and scatter of all features of one client."""

    def add(statistics, batch):
        z = context.model.embed(params, batch.x)
        new = gaussian.class_statistics(z, batch.y, batch.mask, context.num_classes)
        return gaussian.merge_two(statistics, new)

    empty = gaussian.empty_statistics(context.num_classes, context.model.dim)
    return fit.fold(add, empty, data, batch_size)


def measure_folds(
    context: Context, params: Params, data: Data, batch_size: int
) -> tuple[gaussian.Statistics, gaussian.Statistics]:
    """Compute the statistics of two halves of a client's samples.

    The halves are stratified: the samples of a class go to one and the other in
    turn. `fold_of` says which sample went where.
    """

    def add(halves, batch):
        z = context.model.embed(params, batch.x)
        second = fold_of(batch.y, batch.mask, halves[0].count + halves[1].count)
        return tuple(
            gaussian.merge_two(
                half,
                gaussian.class_statistics(z, batch.y, mask, context.num_classes),
            )
            for half, mask in zip(
                halves,
                (batch.mask * (1 - second), batch.mask * second),
                strict=True,
            )
        )

    empty = gaussian.empty_statistics(context.num_classes, context.model.dim)
    return fit.fold(add, (empty, empty), data, batch_size)


def cross_validate(
    context: Context,
    params: Params,
    data: Data,
    batch_size: int,
    heads: Iterable[tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Score linear heads on the half of a client's samples that they were not fit to.

    Args:
      context: Model and number of classes.
      params: Weights of the extractor.
      data: The client's samples.
      batch_size: Samples `b` looked at together.
      heads: Per half of `measure_folds`, kernels `[g, d, c]` and biases `[g, c]` of
        `g` candidates fit to it.

    Returns:
      `[g]` cross entropy, summed over all samples.
    """
    heads = tuple(heads)

    def add(carry, batch):
        total, seen = carry
        z = context.model.embed(params, batch.x)
        second = fold_of(batch.y, batch.mask, seen)
        for (kernel, bias), others in zip(heads, (second, 1 - second), strict=True):
            logits = jnp.einsum("bd,gdc->gbc", z, kernel) + bias[:, None]
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, jnp.broadcast_to(batch.y, logits.shape[:-1])
            )
            total = total + loss @ (others * batch.mask)
        member = jax.nn.one_hot(batch.y, context.num_classes)
        return total, seen + batch.mask @ member

    start = (jnp.zeros(heads[0][1].shape[0]), jnp.zeros(context.num_classes))
    return fit.fold(add, start, data, batch_size)[0]


def fold_of(y: jax.Array, mask: jax.Array, seen: jax.Array) -> jax.Array:
    """Deal a batch's samples out to two halves, class by class.

    Args:
      y: `[b]` labels.
      mask: `[b]`, 0 for padding.
      seen: `[c]` samples of each class in earlier batches.

    Returns:
      `[b]` float32, 0 for the first half and 1 for the second.
    """
    member = jax.nn.one_hot(y, seen.shape[0]) * mask[:, None]
    earlier = seen[None] + jnp.cumsum(member, axis=0) - member
    rank = jnp.take_along_axis(earlier, y[:, None], axis=1)[:, 0]
    return rank % 2
