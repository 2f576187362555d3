"""pFedFDA: discriminant heads from interpolated local and global Gaussians.

McLaughlin & Su, "Personalized Federated Learning via Feature Distribution
Adaptation", NeurIPS 2024, Algorithm 1, after the authors' code. The head is no
weight but the linear discriminant of class means and a tied covariance; it is frozen
while the extractor learns. A client's means and covariance lie between the global
and its own, at shares (b_m, b_c) that two-fold cross-validation picks.

Where this differs from the authors' code:
- Statistics are taken of all samples under the averaged extractor, in a second
  exchange, instead of under the drifting extractor while it trains.
- (b_m, b_c) come from a grid instead of L-BFGS on a clipped objective, whose
  gradient is 0 at the edges of the box. Ties go to the smaller share.
- The server weights a class mean with n_ic, not n_i: a class that a client lacks
  does not drag the average back to its old value.
One quirk is kept by default, `covariance_quirk`: an identity added to a client's
covariance. Without it the frozen head grows as features become compact, and training
diverged at ordinary learning rates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.aggregators import gaussian
from fedgen.algorithms import _options, _statistics
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, Exchange, Mean
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule


class Gaussians(NamedTuple):
    """Class-conditional Gaussians with one covariance."""

    mean: jax.Array  # [c, d] mu
    cov: jax.Array  # [d, d] Sigma


class Server(NamedTuple):
    """Extractor and global Gaussians."""

    body: Params  # theta
    gaussians: Gaussians
    count: jax.Array  # [c] samples behind the means of the last round


def pfedfda(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    shrinkage: float = 1e-4,
    prior_floor: float = 1e-4,
    grid: int = 6,
    single_beta: bool = False,
    covariance_quirk: bool = True,
) -> Algorithm:
    """Build pFedFDA.

    Args:
      optimizer: Local optimiser of the extractor, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      shrinkage: Share of a spherical part in any covariance before use, in (0, 1].
      prior_floor: Added to local class frequencies, above 0.
      grid: Candidates for each share, spread evenly over [0, 1]; at least 2.
      single_beta: Use one share for means and covariance.
      covariance_quirk: Add the identity and 1e-4 to a client's covariance, as the
        authors' code does; see above.

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_share(zero=False, shrinkage=shrinkage)
    _options.check_positive(prior_floor=prior_floor)
    _options.check_at_least(2, grid=grid)
    ticks = jnp.linspace(0.0, 1.0, grid)
    pairs = (ticks, ticks) if single_beta else jnp.meshgrid(ticks, ticks, indexing="ij")
    shares = jnp.stack(pairs, axis=-1).reshape(-1, 2)  # [g, 2] (b_m, b_c)

    def init(key, federation):
        model = federation.only_model("pFedFDA")
        c, d = federation.num_classes, model.dim
        mean = jax.random.uniform(jax.random.fold_in(key, 1), (c, d))
        gaussians = Gaussians(mean, jnp.eye(d))
        return Server(model.init(key)["body"], gaussians, jnp.zeros(c)), ((),)

    def discriminant(gaussians, count):
        """Compute W = Sigma^-1 mu and b = log pi - mu^T W / 2."""
        frequency = count / jnp.maximum(jnp.sum(count), 1.0) + prior_floor
        log_prior = jnp.log(frequency / jnp.sum(frequency))
        cov = gaussian.shrink(gaussians.cov, shrinkage)
        return gaussian.plugin_head(gaussians.mean, cov, log_prior)

    def estimate(statistics, prior):
        """Compute a client's own Gaussians, the global ones where it has no data."""
        n = jnp.sum(statistics.count)
        mean = jnp.where(statistics.count[:, None] > 0, statistics.mean, prior.mean)
        cov = statistics.scatter / jnp.maximum(n - 1, 1.0)
        if covariance_quirk:
            cov = cov + 1e-4 + jnp.eye(cov.shape[0])
        return Gaussians(mean, jnp.where(n > 1, cov, prior.cov))

    def interpolate(share, own, prior):
        return Gaussians(
            share[0] * own.mean + (1 - share[0]) * prior.mean,
            share[1] * own.cov + (1 - share[1]) * prior.cov,
        )

    def adapt(context, server, data):
        """Pick the shares by cross-validation; return them, Gaussians and counts."""
        params = {"body": server.body}
        prior = server.gaussians
        halves = _statistics.measure_folds(context, params, data, schedule.batch_size)
        count = halves[0].count + halves[1].count

        def candidates(half):
            own = estimate(half, prior)
            # One after another: see `_matrices.batches_may_hang`.
            return jax.lax.map(
                lambda share: discriminant(interpolate(share, own, prior), count),
                shares,
            )

        loss = _statistics.cross_validate(
            context, params, data, schedule.batch_size, map(candidates, halves)
        )
        # A covariance too singular for a head is no candidate.
        best = jnp.argmin(jnp.where(jnp.isfinite(loss), loss, jnp.inf))
        own = estimate(gaussian.merge_two(*halves), prior)
        return shares[best], interpolate(shares[best], own, prior), count

    def download(context, server, id_):
        del context, id_
        return server._replace(count=())

    def local(context, key, client, server, data):
        count = fit.class_counts(data, context.num_classes, schedule.batch_size)
        kernel, bias = discriminant(server.gaussians, count)

        def loss(body, batch, key):
            del key
            z = context.model.embed({"body": body}, batch.x)
            return fit.cross_entropy(z @ kernel + bias[None], batch)

        body, metrics = fit.fit(loss, optimizer, server.body, key, data, schedule)
        delta = jax.tree.map(jnp.subtract, body, server.body)
        return client, Mean(delta, data.size), metrics

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        delta = upload.message.value
        body = optax.apply_updates(server.body, delta)
        return server._replace(body=body), {"delta_norm": optax.tree.norm(delta)}

    def send_gaussians(context, key, client, server, data):
        del key
        share, adapted, count = adapt(context, server, data)
        message = Mean(adapted.mean, count[:, None]), Mean(adapted.cov, data.size)
        metrics = {"beta_mean": share[0], "beta_cov": share[1], "steps": jnp.int32(0)}
        return client, message, metrics

    def average_gaussians(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        mean, cov = upload.message
        old = server.gaussians
        gaussians = Gaussians(
            jnp.where(mean.weight > 0, mean.value, old.mean),
            jnp.where(cov.weight > 0, cov.value, old.cov),
        )
        return server._replace(gaussians=gaussians, count=mean.weight[:, 0]), {}

    def personalise(context, key, client, server, data):
        del key, client
        _, adapted, count = adapt(context, server, data)
        return discriminant(adapted, count)

    def predict(context, server, head, x):
        kernel, bias = head
        return context.model.embed({"body": server.body}, x) @ kernel + bias[None]

    def predict_global(context, server, x):
        z = context.model.embed({"body": server.body}, x)
        kernel, bias = discriminant(server.gaussians, server.count)
        return z @ kernel + bias[None]

    return Algorithm(
        init,
        download,
        local,
        aggregate,
        predict,
        personalise,
        more=(Exchange(download, send_gaussians, average_gaussians),),
        predict_global=predict_global,
    )
