"""Every client alone: what federated learning has to beat.

There is no paper. All clients of a cohort start from the same weights, those that
FedAvg starts from under the same key, and never exchange a byte.
"""

from __future__ import annotations

import optax

from fedgen.core import fit, tree
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule


def local_only(
    optimizer: optax.GradientTransformation, schedule: Schedule
) -> Algorithm:
    """Build local-only training, with any number of architectures.

    Args:
      optimizer: Local optimiser, restarted every round as in the other algorithms.
      schedule: Local epochs E, or steps, and minibatch B.
    """

    def init(key, federation):
        clients = tuple(
            tree.broadcast(cohort.model.init(key), cohort.num_clients)
            for cohort in federation.cohorts
        )
        return (), clients

    def download(context, server, id_):
        del context, server, id_
        return ()

    def local(context, key, client, message, data):
        def loss(params, batch, key):
            del key
            return fit.cross_entropy(context.model.apply(params, batch.x), batch)

        params, metrics = fit.fit(loss, optimizer, client, key, data, schedule)
        return params, message, metrics

    def aggregate(context, key, server, uploads):
        del context, key, uploads
        return server, {}

    def predict(context, server, client, x):
        del server
        return context.model.apply(client, x)

    return Algorithm(init, download, local, aggregate, predict)
