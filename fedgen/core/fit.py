"""Local training: shuffled minibatches, optax steps, passes over a client's data.

Every loop has a dynamic trip count, read off the client's own size. Under `vmap`
a chunk of clients loops until its largest one is done and JAX freezes the others,
so momentum and weight decay never act on padding. One step alone needs no loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.core import tree
from fedgen.core.algorithm import Metrics
from fedgen.core.federation import Batch, Data, Params

PyTree = Any


class Schedule(NamedTuple):
    """How long a client trains in a round.

    Attributes:
      batch_size: Samples `b` of a step.
      epochs: Passes over the client's data; its last batch may be short.
      steps: If given, that many steps over an endless shuffled stream instead, the
        same number for every client.
    """

    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None

    def num_steps(self, data: Data) -> jax.Array:
        """Count the steps `t` of a client, [] int32; 0 if it holds nothing."""
        if self.steps is None:
            steps = self.epochs * _ceil_div(data.size, self.batch_size)
        else:
            steps = jnp.where(data.size > 0, self.steps, 0)
        share = jnp.ceil(data.work * steps.astype(jnp.float32))
        return share.astype(jnp.int32)

    def batch(self, key: jax.Array, step: jax.Array, data: Data) -> Batch:
        """Gather the minibatch of one step; `key` fixes the whole order."""
        return data.take(*self.positions(key, step, data))

    def positions(
        self, key: jax.Array, step: jax.Array, data: Data
    ) -> tuple[jax.Array, jax.Array]:
        """Say where among a client's samples the minibatch of one step lies.

        Returns:
          Positions `[b]` int32 and the mask `[b]` of those that count.
        """
        slot = jnp.arange(self.batch_size)
        size = jnp.maximum(data.size, 1)
        if self.steps is None:
            per_epoch = _ceil_div(size, self.batch_size)
            index = step % per_epoch * self.batch_size + slot
            epoch, mask = jnp.broadcast_to(step // per_epoch, slot.shape), index < size
        else:
            index = step * self.batch_size + slot
            epoch, index, mask = index // size, index % size, slot >= 0
        position = shuffled(key, epoch, jnp.minimum(index, size - 1), size)
        return position, mask & (data.size > 0)


def shuffled(
    key: jax.Array, epoch: jax.Array, index: jax.Array, size: jax.Array
) -> jax.Array:
    """Look up entries of a random permutation of `range(size)`, without making it.

    A sort would cost every client the padded size of the largest one, each epoch.
    Instead a Feistel network over a grid of `rows * columns >= size` cells permutes
    the cells, and entries beyond `size` walk on until they fall inside (Black &
    Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4 with
    the modular network of section 5).

    Args:
      key: One permutation per (key, epoch).
      epoch: `[b]` int32.
      index: `[b]` int32 in `[0, size)`.
      size: [] int32, at least 1.

    Returns:
      `[b]` int32 in `[0, size)`; a bijection of `index` for a fixed epoch.
    """
    rows = jnp.ceil(jnp.sqrt(size.astype(jnp.float32))).astype(jnp.uint32)
    columns = _ceil_div(size.astype(jnp.uint32), rows)
    salts = jax.random.bits(key, (6,), jnp.uint32)
    tweak = epoch.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)

    def network(cell):
        row, column = cell // columns, cell % columns
        for i in range(0, 6, 2):
            row = (row + _mix(column ^ tweak, salts[i])) % rows
            column = (column + _mix(row ^ tweak, salts[i + 1])) % columns
        return row * columns + column

    def walk(carry):
        cell, inside = carry
        cell = jnp.where(inside, cell, network(cell))
        return cell, cell < size.astype(jnp.uint32)

    # Nobody is inside at first, so that the network is compiled but once.
    start = (index.astype(jnp.uint32), jnp.zeros(index.shape, bool))
    cell, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[1]), walk, start)
    return cell.astype(jnp.int32)


def _mix(x: jax.Array, salt: jax.Array) -> jax.Array:
    """Scramble 32 bits (the finaliser of MurmurHash3), with a salt on both ends."""
    x = x ^ salt
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    # Values stay below 2^31 so that adding a coordinate cannot wrap around.
    return (x ^ (x >> 16) ^ salt) >> 1


def _ceil_div(a: jax.Array, b: jax.Array | int) -> jax.Array:
    return (a + b - 1) // b


def is_given(weight: jax.Array | float) -> bool:
    """Tell whether a term of this weight takes part; a traced weight never is 0."""
    return isinstance(weight, jax.core.Tracer) or weight != 0


def scale_by_round(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale the updates of a local optimiser by the round, as rates that decay do.

    Args:
      schedule: From the number of rounds before this one, which `fit` tells, to the
        factor.
    """

    def update(updates, state, params=None, *, round=None, **extra):
        del params, extra
        if round is None:
            raise ValueError("scale_by_round needs update(..., round=), as of `fit`")
        factor = schedule(round)
        scaled = jax.tree.map(lambda a: a * jnp.asarray(factor, a.dtype), updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


Loss = Callable[[Params, Batch, jax.Array], jax.Array]


def fit(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Params,
    key: jax.Array,
    data: Data,
    schedule: Schedule,
) -> tuple[Params, Metrics]:
    """Minimise `loss(params, batch, key)` on one client with a fresh optimiser.

    An optimiser that takes extra arguments gets `round=data.round` with every update.

    Returns:
      The trained parameters, and `loss` (mean over steps) and `steps`.
    """
    steps = schedule.num_steps(data)
    order_key, loss_key = jax.random.split(key)
    optimizer = optax.with_extra_args_support(optimizer)

    if schedule.steps is None:

        def batch_of(i):
            return schedule.batch(order_key, i, data)
    else:
        # Looked up at once, `[t, b]`: each look-up is a loop, for whose end an
        # accelerator waits.
        look_up = jax.vmap(schedule.positions, (None, 0, None))
        drawn = look_up(order_key, jnp.arange(max(1, schedule.steps)), data)

        def batch_of(i):
            return data.take(*jax.tree.map(lambda a: a[i], drawn))

    def step(carry):
        i, params, opt_state, total = carry
        batch = batch_of(i)
        value, grads = jax.value_and_grad(loss)(
            params, batch, jax.random.fold_in(loss_key, i)
        )
        updates, opt_state = optimizer.update(
            grads, opt_state, params, round=data.round
        )
        params = optax.apply_updates(params, updates)
        return i + 1, params, opt_state, total + value

    start = (jnp.int32(0), params, optimizer.init(params), jnp.float32(0.0))
    if schedule.steps == 1:  # A loop would copy the parameters that it starts from.
        _, trained, _, value = step(start)
        params, total = tree.where(steps > 0, (trained, value), (params, start[-1]))
    else:
        _, params, _, total = jax.lax.while_loop(lambda c: c[0] < steps, step, start)
    mean = total / jnp.maximum(steps, 1).astype(jnp.float32)
    return params, {"loss": mean, "steps": steps}


def fold(
    fn: Callable[[PyTree, Batch], PyTree], init: PyTree, data: Data, batch_size: int
) -> PyTree:
    """Fold `fn(carry, batch) -> carry` over one pass of a client's data, in order."""
    slot = jnp.arange(batch_size)

    def step(carry):
        i, value = carry
        position = i * batch_size + slot
        return i + 1, fn(value, data.take(position, position < data.size))

    steps = _ceil_div(data.size, batch_size)
    return jax.lax.while_loop(lambda c: c[0] < steps, step, (jnp.int32(0), init))[1]


def tabulate(
    fn: Callable[[jax.Array, Batch], jax.Array],
    data: Data,
    batch_size: int,
    num_rows: int,
) -> jax.Array:
    """Collect `fn(i, batch) -> [b, ...]` of the batches `i` of one pass, in order.

    Args:
      fn: Sees every batch once.
      data: At most `num_rows` samples.
      batch_size: `b`.
      num_rows: Rows of the table, to which whole batches are filled up.

    Returns:
      `[rows, ...]`; those from `data.size` on mean nothing.
    """
    slot = jnp.arange(batch_size)
    like = jax.eval_shape(
        lambda data: fn(jnp.int32(0), data.take(slot, slot < data.size)), data
    )

    def add(carry, batch):
        i, table = carry
        rows = fn(i, batch)
        at = i * batch_size
        return i + 1, jax.lax.dynamic_update_slice_in_dim(table, rows, at, axis=0)

    padded = _ceil_div(num_rows, batch_size) * batch_size
    table = jnp.zeros((padded, *like.shape[1:]), like.dtype)
    return fold(add, (jnp.int32(0), table), data, batch_size)[1]


def class_counts(data: Data, num_classes: int, batch_size: int) -> jax.Array:
    """Count a client's samples of each class, `[c]` float32."""

    def add(count, batch):
        member = jax.nn.one_hot(batch.y, num_classes)
        return count + jnp.sum(member * batch.mask[:, None], axis=0)

    return fold(add, jnp.zeros(num_classes), data, batch_size)


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """Average the cross entropy over a batch's real samples, `[b, c]` -> []."""
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    return masked_mean(each, batch.mask)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Average `x [b]` over `mask [b]`; 0 if nothing is left."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
