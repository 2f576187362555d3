"""Models that clients share as components, on a leading axis `[k, ...]`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import logsumexp

from fedgen.aggregators import mixture
from fedgen.core import fit
from fedgen.core.algorithm import Mean, Metrics
from fedgen.core.federation import Batch, Context, Data, Model, Params
from fedgen.core.fit import Schedule

# A share that rounded to 0 would stay there, whatever its component becomes.
_SMALLEST_SHARE = 1e-12

# From proportions `[k]`, or `[j, k]` of pairs, log densities and a mask to `[b, k]`, or
# `[b, j, k]`; masked rows are 0.
EStep = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_TABLE_ROWS = 4096


def init(model: Model, key: jax.Array, num_components: int) -> Params:
    """Initialise models from different seeds, or they would stay equal for ever.

    Returns:
      Leaves `[k, ...]`; the first is FedAvg's initial model under the same key.
    """
    others = [jax.random.fold_in(key, k) for k in range(1, num_components)]
    return jax.vmap(model.init)(jnp.stack([key, *others]))


def losses(model: Model, components: Params, batch: Batch) -> jax.Array:
    """Compute the cross entropy of every sample under every model, `[b, k]`."""

    def of_one(params):
        logits = model.apply(params, batch.x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)

    return jax.vmap(of_one, out_axes=1)(components)


def responsibilities(
    log_density: jax.Array, proportions: jax.Array, mask: jax.Array
) -> jax.Array:
    """Compute `mixture.responsibilities`, of components that may come back."""
    floored = jnp.maximum(proportions, _SMALLEST_SHARE)
    return mixture.responsibilities(log_density, floored, mask)


def fit_proportions(
    density: Callable[[Batch], jax.Array],
    e_step: EStep,
    proportions: jax.Array,
    data: Data,
    batch_size: int,
    steps: int,
) -> jax.Array:
    """Alternate E-steps and `pi_k = mean_s q_sk`, the components being frozen.

    The likelihood is concave in the proportions and never falls. Without
    samples they stay as they are.

    Densities do not change meanwhile. Those of a client of up to 4,096 samples are
    kept in a table; with more, they are computed anew in every step.

    Args:
      density: From a batch to log densities `[b, k]`, or `[b, j, k]` of pairs.
      e_step: From proportions, such densities and a mask `[b]` to responsibilities.
      proportions: To start from, `[k]` or `[j, k]`.
      data: The client's samples.
      batch_size: Samples `b` that are read at once.
      steps: Number of E-steps, at least 0.
    """
    slot = jnp.arange(batch_size)
    num_rows = min(_TABLE_ROWS, data.order.shape[0])
    few = data._replace(size=jnp.where(data.size <= num_rows, data.size, 0))
    many = data._replace(size=data.size - few.size)
    table = fit.tabulate(lambda _, batch: density(batch), few, batch_size, num_rows)

    def look_up(i):
        return jax.lax.dynamic_slice_in_dim(table, i * batch_size, batch_size)

    def compute(i):
        position = i * batch_size + slot
        return density(many.take(position, position < many.size))

    def refine(proportions, data, rows):
        def improve(_, proportions):
            def add(i, total):
                mask = (i * batch_size + slot < data.size).astype(jnp.float32)
                return total + jnp.sum(e_step(proportions, rows(i), mask), axis=0)

            batches = (data.size + batch_size - 1) // batch_size
            total = jnp.zeros_like(proportions)
            total = jax.lax.fori_loop(0, batches, add, total)
            return mean_share(total, proportions, data)

        return jax.lax.fori_loop(0, steps, improve, proportions)

    # One of the two has no samples, and leaves the proportions as they are.
    proportions = refine(proportions, few, look_up)
    if num_rows < data.order.shape[0]:
        proportions = refine(proportions, many, compute)
    return proportions


def mean_share(total: jax.Array, old: jax.Array, data: Data) -> jax.Array:
    """Divide a client's summed responsibilities by its number of samples."""
    return jnp.where(data.size > 0, total / jnp.maximum(data.size, 1), old)


def fit_weighted(
    context: Context,
    optimizer: optax.GradientTransformation,
    components: Params,
    key: jax.Array,
    data: Data,
    schedule: Schedule,
    weigh: Callable[[Batch], jax.Array],
) -> tuple[Params, Metrics]:
    """Train every model on the same minibatches, its samples weighted.

    Model `k` minimises `(1/b) sum_s q_sk l_k(s)`: weights are not normalised.

    Args:
      context: Model and number of classes.
      optimizer: Restarted, and separate for every model.
      components: Leaves `[k, ...]`.
      key: Order of the samples.
      data: The client's samples.
      schedule: Local epochs or steps, and minibatch.
      weigh: From a batch to the weights `q [b, k]`.

    Returns:
      Displacements `[k, ...]`; losses and steps, summed over models.
    """

    def train(params, k):
        def loss(params, batch, key):
            del key
            logits = context.model.apply(params, batch.x)
            each = optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, batch.y
            )
            return fit.masked_mean(weigh(batch)[:, k] * each, batch.mask)

        return fit.fit(loss, optimizer, params, key, data, schedule)

    number = jnp.arange(jax.tree.leaves(components)[0].shape[0])
    trained, metrics = jax.vmap(train)(components, number)
    delta = jax.tree.map(jnp.subtract, trained, components)
    return delta, jax.tree.map(lambda a: jnp.sum(a, dtype=a.dtype), metrics)


def to_message(delta: Params, weight: jax.Array) -> tuple[Mean, ...]:
    """Mark every model's displacement for averaging by its own weight, of `[k]`."""
    return tuple(
        Mean(jax.tree.map(lambda a, k=k: a[k], delta), weight[k])
        for k in range(weight.shape[0])
    )


def move(components: Params, message: tuple[Mean, ...]) -> Params:
    """Add mean displacements; a model without weight stays where it is."""
    delta = jax.tree.map(
        lambda *parts: jnp.stack(parts), *(mean.value for mean in message)
    )
    return optax.apply_updates(components, delta)


def mix(
    model: Model, components: Params, log_weight: jax.Array, x: jax.Array
) -> jax.Array:
    """Compute `log sum_k w_k(x) p_k(y | x)`.

    Args:
      model: The architecture.
      components: Leaves `[k, ...]`.
      log_weight: `[b, k]`, or `[1, k]` if it depends on no input.
      x: `[b, ...]`.

    Returns:
      `[b, c]`.
    """

    def log_prob(params):
        return jax.nn.log_softmax(model.apply(params, x))

    each = jax.vmap(log_prob, out_axes=1)(components)  # [b, k, c]
    return logsumexp(log_weight[:, :, None] + each, axis=1)


def log_shares(proportions: jax.Array) -> jax.Array:
    """Take logarithms that are finite."""
    return jnp.log(jnp.maximum(proportions, _SMALLEST_SHARE))
