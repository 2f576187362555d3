"""FedProto: clients of any architecture share class prototypes and no weights.

Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients",
AAAI 2022, equations 5 to 7 and Algorithm 1. After the authors' code, the distance
is taken per sample and averaged over features, where equation 7 compares class
means; and a client predicts with its head, where section 4 asks for the nearest
prototype (`predict_by`). `weighting="count"` is equation 6 without its factor of one
over the number of clients, which would shrink the prototypes; the authors' code
weights holders of a class alike ("client").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.algorithms import _options, _statistics
from fedgen.core import fit, tree
from fedgen.core.algorithm import Algorithm, Mean
from fedgen.core.fit import Schedule

WEIGHTINGS = ("count", "client")
PREDICTORS = ("head", "prototype")
_UNKNOWN = -1e6  # score of a class without a prototype; finite, as losses must be


class Prototypes(NamedTuple):
    """Class means of the representation."""

    mean: jax.Array  # [c, d] C
    weight: jax.Array  # [c] samples, or clients, behind each; 0 if there never was one


def fedproto(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    pull: float = 1.0,
    weighting: str = "count",
    predict_by: str = "head",
) -> Algorithm:
    """Build FedProto, with any number of architectures of one width `d`.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      pull: lambda, weight of the distance to the prototypes, at least 0.
      weighting: Whether the server weights prototypes by "count" or by "client".
      predict_by: The client's "head", or the nearest "prototype" of the server.

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_at_least(0, pull=pull)
    _options.check_choice("weighting", weighting, WEIGHTINGS)
    _options.check_choice("predict_by", predict_by, PREDICTORS)

    def init(key, federation):
        models = [cohort.model for cohort in federation.cohorts]
        if len({model.dim for model in models}) != 1:
            raise ValueError(
                "FedProto compares representations, so all architectures must have "
                "one width; got "
                + ", ".join(f"{model.name} with {model.dim}" for model in models)
            )
        clients = tuple(
            tree.broadcast(cohort.model.init(key), cohort.num_clients)
            for cohort in federation.cohorts
        )
        c, d = federation.num_classes, models[0].dim
        return Prototypes(jnp.zeros((c, d)), jnp.zeros(c)), clients

    def download(context, server, id_):
        del context, id_
        return server

    def local(context, key, client, prototypes, data):
        known = (prototypes.weight > 0).astype(jnp.float32)

        def loss(params, batch, key):
            del key
            z = context.model.embed(params, batch.x)
            task = fit.cross_entropy(context.model.head(params, z), batch)
            gap = jnp.mean((z - prototypes.mean[batch.y]) ** 2, -1) * known[batch.y]
            return task + pull * fit.masked_mean(gap, batch.mask)

        params, metrics = fit.fit(loss, optimizer, client, key, data, schedule)
        own = _statistics.measure(context, params, data, schedule.batch_size)
        weight = own.count
        if weighting == "client":
            weight = (weight > 0).astype(jnp.float32)
        return params, Mean(own.mean, weight[:, None]), metrics

    def aggregate(context, key, server, uploads):
        del context, key
        # Architectures differ, messages do not: join the cohorts.
        joined = [upload.message for upload in uploads]
        total = sum(one.weight for one in joined)  # [c, 1]
        seen = total > 0
        mean = sum(one.weight * one.value for one in joined)
        mean = mean / jnp.where(seen, total, 1.0)
        return Prototypes(
            jnp.where(seen, mean, server.mean),
            jnp.where(seen[:, 0], total[:, 0], server.weight),
        ), {"classes_seen": jnp.sum(seen, dtype=jnp.float32)}

    def predict(context, server, client, x):
        if predict_by == "head":
            return context.model.apply(client, x)
        z = context.model.embed(client, x)
        gap = jnp.sum((z[:, None] - server.mean[None]) ** 2, axis=-1)
        return jnp.where(server.weight[None] > 0, -gap, _UNKNOWN)

    return Algorithm(init, download, local, aggregate, predict)
