"""What users of FedGMI ask: proportions, their error, the number of components."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedgen.aggregators import mixture
from fedgen.algorithms._vae_mixture import Density
from fedgen.core import execution as execution_lib
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Data, Federation, Params
from fedgen.core.fit import Schedule


def make_proportions(
    algorithm: Algorithm, execution: Execution
) -> Callable[[State, Federation, jax.Array], jax.Array]:
    """Build `(state, federation, key) -> pi [n, k]`, to be jitted by the caller.

    Clients fit pi to the newest components, as for evaluation and as new clients do:
    they may be others than those that trained.
    """

    def proportions(state, federation, key):
        (cohort,) = federation.cohorts
        context = federation.context(0)

        def fit_one(id_, rows):
            data = Data(federation.pool, cohort.order, *rows, jnp.float32(1))
            server = algorithm.download(context, state.server, id_)
            own_key = jax.random.fold_in(key, id_)
            return algorithm.personalise(context, own_key, None, server, data)

        each = execution_lib.map_clients(fit_one, execution.chunk)
        return each(cohort.ids, cohort.train)

    return proportions


def proportion_error(estimate: jax.Array, truth: jax.Array) -> jax.Array:
    """Average the total variation over clients, components in their best order.

    Args:
      estimate: `[n, k]`.
      truth: `[n, k]`, of the samples that clients hold.

    Returns:
      [], from 0 to 1.
    """
    order = mixture.match_proportions(estimate, truth)
    return jnp.mean(mixture.total_variation(estimate[:, order], truth))


def cross_density(
    kind: Density,
    params: Params,
    federation: Federation,
    key: jax.Array,
    *,
    epochs: int = 30,
    learning_rate: float = 2e-3,
    batch_size: int = 50,
    num_samples: int = 4,
) -> jax.Array:
    """Let every client fine-tune a VAE and score the samples of every other.

    `mixture.estimate_num_components` of the result estimates k before a run, since
    shapes depend on it; several clients for each component are needed. The VAE comes
    from some rounds of `fedgmi(..., num_components=1)`, whose server holds only one:
    `jax.tree.map(lambda a: a[0], state.server.components.vaes)`.

    Args:
      kind: VAE and likelihood; a `Density` of kind "x".
      params: Weights of the VAE that all clients share.
      federation: One cohort.
      key: Consumed.
      epochs: Of fine-tuning, on the first half of a client's samples.
      learning_rate: Of Adam.
      batch_size: Samples `b` of a step.
      num_samples: Importance samples.

    Returns:
      `[n, n]` mean log density of the second half of client `i`'s samples, which no
      VAE was trained on, under `j`'s.
    """
    (cohort,) = federation.cohorts
    tune_key, score_key = jax.random.split(key)

    def half(rows, second):
        first = (rows.size + 1) // 2
        start = rows.start + first * second
        size = jnp.where(second, rows.size - first, first)
        return Data(federation.pool, cohort.order, start, size, jnp.float32(1))

    def loss(params, batch, key):
        return -fit.masked_mean(kind.bound(params, key, batch.x), batch.mask)

    def tune(args):
        id_, rows = args
        own_key = jax.random.fold_in(tune_key, id_)
        schedule = Schedule(batch_size, epochs)
        optimizer = optax.adam(learning_rate)
        return fit.fit(loss, optimizer, params, own_key, half(rows, False), schedule)[0]

    vaes = jax.lax.map(tune, (cohort.ids, cohort.train))

    def score(rows):
        data = half(rows, True)

        def under(vae):
            def add(total, batch):
                each = kind.bound(vae, score_key, batch.x, num_samples=num_samples)
                return total + jnp.sum(each * batch.mask)

            return fit.fold(add, jnp.float32(0), data, batch_size)

        return jax.lax.map(under, vaes) / jnp.maximum(data.size, 1)

    return jax.lax.map(score, cohort.train)
