"""What users of FedGMI ask: proportions, and how far off they are."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedgen.aggregators import mixture
from fedgen.core import execution as execution_lib
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Data, Federation


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
