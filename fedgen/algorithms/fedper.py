"""FedPer: a common body under personal heads.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019
(arXiv:1912.00818), Algorithms 1 and 2, with the model's head as the one
personalisation layer (K_P = 1). Body and head train together; only the body is
averaged. With an empty head this is FedAvg.
"""

from __future__ import annotations

import jax
import optax

from fedgen.core import fit, tree
from fedgen.core.algorithm import Algorithm, Mean
from fedgen.core.fit import Schedule


def fedper(optimizer: optax.GradientTransformation, schedule: Schedule) -> Algorithm:
    """Build FedPer.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
    """

    def init(key, federation):
        params = federation.only_model("FedPer").init(key)
        heads = tree.broadcast(params["head"], federation.cohorts[0].num_clients)
        return params["body"], (heads,)  # W_B, W_P_1 ... W_P_n

    def download(context, server, id_):
        del context, id_
        return server

    def local(context, key, head, body, data):
        def loss(params, batch, key):
            del key
            return fit.cross_entropy(context.model.apply(params, batch.x), batch)

        start = {"body": body, "head": head}
        params, metrics = fit.fit(loss, optimizer, start, key, data, schedule)
        delta = jax.tree.map(lambda new, old: new - old, params["body"], body)
        return params["head"], Mean(delta, data.size), metrics

    def aggregate(context, key, body, uploads):
        del context, key
        (upload,) = uploads
        delta = upload.message.value
        body = optax.apply_updates(body, delta)
        return body, {"delta_norm": optax.tree.norm(delta)}

    def predict(context, body, head, x):
        return context.model.apply({"body": body, "head": head}, x)

    return Algorithm(init, download, local, aggregate, predict)
