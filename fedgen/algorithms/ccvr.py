"""CCVR: FedAvg with a head calibrated on virtual features.

Luo et al., "No Fear of Heterogeneity: Classifier Calibration for Federated Learning
with Non-IID Data", NeurIPS 2021, equations 2 and 3 and Algorithm 1. Clients describe
the features of each class by a Gaussian; the server pools these, draws virtual
features and trains the head, and only the head, on them.

The paper calibrates once, after training. Here it happens after every round, in an
exchange of its own, so that a learning curve shows what calibration would give;
training never sees the calibrated head, and the bytes of all these exchanges count.
Clients send raw second moments, not covariances: equation 3 turns the latter into
the former, and a sum of moments tells the server nothing of a single client.
`shrinkage` is not in the paper; it makes covariances from few samples definite.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen._matrices import each
from fedgen.aggregators import gaussian
from fedgen.algorithms import _options
from fedgen.algorithms import fedavg as fedavg_lib
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, ByServer, Exchange, Mean
from fedgen.core.federation import Data, Params, Pool
from fedgen.core.fit import Schedule


class Server(NamedTuple):
    """FedAvg's server, and the calibrated head beside it."""

    fedavg: fedavg_lib.Server
    head: Params


def ccvr(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    virtual_per_class: int = 200,
    calibration_epochs: int = 5,
    shrinkage: float = 0.01,
) -> Algorithm:
    """Build CCVR.

    Args:
      optimizer: Local optimiser; a fresh one calibrates the head.
      schedule: Local epochs or steps, and minibatch; calibration shares the latter.
      virtual_per_class: Virtual features M_c of each class, at least 1.
      calibration_epochs: Passes over them, at least 0; 0 gives FedAvg.
      shrinkage: Share of a spherical part in the covariances, in (0, 1].

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_at_least(1, virtual_per_class=virtual_per_class)
    _options.check_at_least(0, calibration_epochs=calibration_epochs)
    _options.check_share(zero=False, shrinkage=shrinkage)
    base = fedavg_lib.fedavg(optimizer, schedule)
    calibration = Schedule(schedule.batch_size, calibration_epochs)

    def init(key, federation):
        federation.only_model("CCVR")
        server, clients = base.init(key, federation)
        return Server(server, server.params["head"]), clients

    def download(context, server, id_):
        return base.download(context, server.fedavg, id_)

    def aggregate(context, key, server, uploads):
        trained, metrics = base.aggregate(context, key, server.fedavg, uploads)
        return server._replace(fedavg=trained), metrics

    def send_moments(context, key, client, params, data):
        """Send class means of z and of z z^T, with counts as weights."""
        del key
        c, d = context.num_classes, context.model.dim

        def add(sums, batch):
            z = context.model.embed(params, batch.x)
            member = jax.nn.one_hot(batch.y, c) * batch.mask[:, None]
            first = jnp.einsum("bc,bd->cd", member, z)
            second = jnp.einsum("bc,bd,be->cde", member, z, z)
            return jax.tree.map(jnp.add, sums, (jnp.sum(member, 0), first, second))

        zeros = (jnp.zeros(c), jnp.zeros((c, d)), jnp.zeros((c, d, d)))
        count, first, second = fit.fold(add, zeros, data, schedule.batch_size)
        some = jnp.maximum(count, 1.0)
        message = (
            Mean(first / some[:, None], count[:, None]),
            Mean(second / some[:, None, None], count[:, None, None]),
        )
        return client, message, {"steps": jnp.int32(0)}

    def calibrate(contexts, key, server, uploads):
        (context,), (upload,) = contexts, uploads
        first, second = upload.message
        count, mean, cov = pool(first, second)
        draw_key, fit_key = jax.random.split(key)
        c, d = mean.shape
        factor = each(
            lambda cov: jnp.linalg.cholesky(gaussian.shrink(cov, shrinkage)), cov
        )
        noise = jax.random.normal(draw_key, (c, virtual_per_class, d))
        features = mean[:, None] + jnp.einsum("cde,cse->csd", factor, noise)

        # The virtual features are data like any other. Classes without a Gaussian
        # come last in the order, beyond the size.
        known = jnp.repeat(count > 1, virtual_per_class)
        virtual = Data(
            Pool(features.reshape(-1, d), jnp.repeat(jnp.arange(c), virtual_per_class)),
            jnp.argsort(~known, stable=True),
            jnp.int32(0),
            jnp.sum(known, dtype=jnp.int32),
            jnp.float32(1),
        )
        params = server.fedavg.params

        def loss(head, batch, key):
            del key
            logits = context.model.head({**params, "head": head}, batch.x)
            return fit.cross_entropy(logits, batch)

        head, metrics = fit.fit(
            loss, optimizer, params["head"], fit_key, virtual, calibration
        )
        return server._replace(head=head), {"calibration_loss": metrics["loss"]}

    def predict_global(context, server, x):
        return context.model.apply({**server.fedavg.params, "head": server.head}, x)

    return Algorithm(
        init,
        download,
        base.local,
        aggregate,
        ByServer(predict_global),
        more=(Exchange(download, send_moments, calibrate),),
        predict_global=predict_global,
    )


def pool(first: Mean, second: Mean) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the class Gaussians of pooled features from pooled moments.

    Args:
      first: Means of z, `[c, d]`, and counts `[c, 1]`.
      second: Means of z z^T, `[c, d, d]`.

    Returns:
      Counts `[c]`, means `[c, d]` and unbiased covariances `[c, d, d]`; a covariance
      is 0 where the count is below 2.
    """
    count, mean = first.weight[:, 0], first.value
    spread = second.value - jnp.einsum("cd,ce->cde", mean, mean)
    bessel = jnp.where(count > 1, count / jnp.maximum(count - 1, 1.0), 0.0)
    return count, mean, bessel[:, None, None] * spread
