"""Federated averaging, with any optax optimiser on the server.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, Algorithm 1. With another server optimiser than
`optax.sgd(1.0)`: Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
Algorithms 1 and 2. There the second moment starts at tau^2 and nothing is corrected
for bias; optax corrects, and starts moments at 0 (Adam) or 1e-6 (Yogi).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from fedgen.algorithms import _options
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, ByServer, Mean
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule


class Server(NamedTuple):
    """The global model and the state of its optimiser."""

    params: Params  # w_t
    opt_state: optax.OptState


def fedavg(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    server_optimizer: optax.GradientTransformation | None = None,
    penalty: Callable[[Params, Params], jax.Array] | None = None,
) -> Algorithm:
    """Build FedAvg, or FedOpt with a server optimiser.

    Args:
      optimizer: Local optimiser, restarted every round as in the paper.
      schedule: Local epochs E, or steps, and minibatch B.
      server_optimizer: Applied to minus the mean displacement; `optax.sgd(1.0)`
        replaces the global model by the mean of the clients' models.
      penalty: `(params, global_params) -> []`, added to the local loss.
    """
    server_optimizer = server_optimizer or optax.sgd(1.0)

    def init(key, federation):
        params = federation.only_model("FedAvg").init(key)
        return Server(params, server_optimizer.init(params)), ((),)

    def download(context, server, id_):
        del context, id_
        return server.params

    def local(context, key, client, params, data):
        def loss(new_params, batch, key):
            del key
            logits = context.model.apply(new_params, batch.x)
            task = fit.cross_entropy(logits, batch)
            return task if penalty is None else task + penalty(new_params, params)

        new_params, metrics = fit.fit(loss, optimizer, params, key, data, schedule)
        delta = jax.tree.map(lambda new, old: new - old, new_params, params)
        return client, Mean(delta, data.size), metrics  # delta_k, n_k

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        delta = upload.message.value  # sum n_k/n delta_k
        pseudo_gradient = jax.tree.map(lambda d: -d, delta)
        updates, opt_state = server_optimizer.update(
            pseudo_gradient, server.opt_state, server.params
        )
        params = optax.apply_updates(server.params, updates)
        return Server(params, opt_state), {"delta_norm": optax.tree.norm(delta)}

    def predict_global(context, server, x):
        return context.model.apply(server.params, x)

    return Algorithm(
        init,
        download,
        local,
        aggregate,
        ByServer(predict_global),
        predict_global=predict_global,
    )


def fedadam(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    server_learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-3,
) -> Algorithm:
    """Build FedAdam: FedAvg with Adam on the server.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      server_learning_rate: eta, above 0.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: tau, the degree of adaptivity, above 0.

    Raises:
      ValueError: If an argument is out of range.
    """
    _check_moments(server_learning_rate, b1, b2, eps)
    server_optimizer = optax.adam(server_learning_rate, b1, b2, eps)
    return fedavg(optimizer, schedule, server_optimizer=server_optimizer)


def fedyogi(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    server_learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-3,
) -> Algorithm:
    """Build FedYogi: FedAvg with Yogi on the server; arguments as for `fedadam`."""
    _check_moments(server_learning_rate, b1, b2, eps)
    server_optimizer = optax.yogi(server_learning_rate, b1, b2, eps)
    return fedavg(optimizer, schedule, server_optimizer=server_optimizer)


def _check_moments(server_learning_rate, b1, b2, eps) -> None:
    _options.check_positive(server_learning_rate=server_learning_rate, eps=eps)
    _options.check_decay(b1=b1, b2=b2)
