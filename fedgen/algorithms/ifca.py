"""IFCA: clients choose among k models by their own loss, and train the one they chose.

Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020,
Algorithm 1, written down from public descriptions of it. With one model this is FedAvg.

- Clients weigh by their number of samples, of which the paper gives all the same.
- As there, a client sends one model and says whose it is. The engine sums only what
  all clients send alike, so that the server holds a model for each participant during
  a round and sees who chose what. To hide the choice, clients would have to send k.
- Models start from k seeds. The paper's guarantees need a start near the clusters;
  from random ones it may happen that all clients choose the same model for ever.
- Weight sharing (k heads on one extractor) is not part of this file.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fedgen.algorithms import _components, _options
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule

AVERAGINGS = ("model", "gradient")


def ifca(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    num_components: int = 3,
    averaging: str = "model",
) -> Algorithm:
    """Build IFCA.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      num_components: Models k, at least 1.
      averaging: "model" divides the displacements in a cluster by its own samples;
        "gradient" by those of all participants, which is the paper's gradient
        averaging if the schedule is one step of SGD.

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_at_least(1, num_components=num_components)
    _options.check_choice("averaging", averaging, AVERAGINGS)

    def init(key, federation):
        model = federation.only_model("IFCA")
        return _components.init(model, key, num_components), ((),)

    def download(context, server, id_):
        del context, id_
        return server

    def choose(context, components, data):
        """Find j = argmin_k F_i(theta_k), the first one of equals."""

        def add(total, batch):
            return total + batch.mask @ _components.losses(
                context.model, components, batch
            )

        total = fit.fold(add, jnp.zeros(num_components), data, schedule.batch_size)
        return jnp.argmin(total)

    def local(context, key, client, components, data):
        chosen = choose(context, components, data)
        params = jax.tree.map(lambda a: a[chosen], components)

        def loss(params, batch, key):
            del key
            return fit.cross_entropy(context.model.apply(params, batch.x), batch)

        trained, metrics = fit.fit(loss, optimizer, params, key, data, schedule)
        delta = jax.tree.map(jnp.subtract, trained, params)
        return client, (delta, chosen), metrics

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        delta, chosen = upload.message
        weight = upload.weight[:, None] * jax.nn.one_hot(chosen, num_components)
        size = jnp.sum(weight, axis=0)  # [k] samples in each cluster
        whole = size if averaging == "model" else jnp.full_like(size, jnp.sum(size))
        share = weight / jnp.where(whole > 0, whole, 1.0)[None]  # [m, k]
        delta = jax.tree.map(lambda a: jnp.tensordot(share.T, a, axes=1), delta)
        # The largest cluster's share of the samples is 1 if all clients agree.
        largest = jnp.max(size) / jnp.maximum(jnp.sum(size), 1.0)
        return optax.apply_updates(server, delta), {
            "clusters": jnp.sum(size > 0, dtype=jnp.float32),
            "largest_cluster": largest,
        }

    def personalise(context, key, client, components, data):
        del key, client
        return choose(context, components, data)

    def predict(context, server, chosen, x):
        return context.model.apply(jax.tree.map(lambda a: a[chosen], server), x)

    return Algorithm(init, download, local, aggregate, predict, personalise)
