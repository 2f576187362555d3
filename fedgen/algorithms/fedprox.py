"""FedProx: FedAvg with a proximal term that keeps clients near the global model.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation
2 and Algorithm 2. The paper's other half, partial work of stragglers, is a property
of participation here and open to every algorithm. Clients are drawn uniformly and
averaged with weights n_k, where the paper draws with probability n_k / n and
averages uniformly: the same in expectation, and `mu=0` is FedAvg bit for bit.
"""

from __future__ import annotations

import jax
import optax

from fedgen.algorithms import _options
from fedgen.algorithms.fedavg import fedavg
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule


def fedprox(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    mu: float = 0.01,
) -> Algorithm:
    """Build FedProx.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      mu: Weight of the proximal term, at least 0.

    Raises:
      ValueError: If `mu` is negative.
    """
    _options.check_at_least(0, mu=mu)

    def proximal(params, global_params):
        gap = jax.tree.map(lambda w, w_t: w - w_t, params, global_params)
        return mu / 2 * optax.tree.norm(gap, squared=True)

    return fedavg(optimizer, schedule, penalty=proximal if fit.is_given(mu) else None)
