"""pFedGM: personalised heads by Bayesian fusion of feature statistics.

Hu & Ma, "pFedGM" (arXiv 2603.11620, 2026). Only the abstract was available, so this
is a RECONSTRUCTION that keeps its clauses: a Gaussian generator trained with
weighted re-sampling; a dual objective, shared (classes far apart, across clients)
and local (a class close together, within a client); a Gaussian classifier split
into a *navigator*, which guides training, and a *statistic extractor*; fusion
inspired by the Kalman gain at a global and at a local level; prediction by Bayes'
rule with the global representation as prior and the client's data as likelihood.
Equations, derivations and the readings that the abstract leaves open:

    cross entropy of a Gaussian classifier = pull to the own class - push from all
    L = mean_j w_{y_j} CE(navigator(z_j), y_j) + lambda L_ext           (local loss)
    L_ext = mean_j |z_j - sg(mu_{i, y_j})|^2 / 2d                       (pull)
    K_ic = B (B + Sigma / n_ic)^-1,  mu_ic = m_c + K_ic (zbar_ic - m_c) (local fusion)
    Sigma_i = (tau Sigma + S_i) / (tau + n_i - C_i)
    score_c(z) = T log N(z; mu_ic, Sigma_i [+ V_ic]) + log pi_ic        (prediction)

A round has two exchanges: train and average the extractor, then send statistics
under the averaged extractor (with one exchange they would belong to extractors that
no longer exist). Tempering by `temperature` T is not in the abstract either; it
makes up for training features being more compact than test features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.aggregators import gaussian
from fedgen.algorithms import _statistics
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, Exchange, Mean
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule

NAVIGATORS = ("gaussian", "linear")
GAINS = (*gaussian.BETWEEN_FORMS, "global", "local")
INFERENCES = ("plugin", "predictive")


class Belief(NamedTuple):
    """What all clients together say of the representation: the prior."""

    mean: jax.Array  # [c, d] m_c
    within: jax.Array  # [d, d] Sigma_g
    between: jax.Array  # [d, d] B
    count: jax.Array  # [c] N_c, samples behind each mean


class Server(NamedTuple):
    """Extractor, navigator and belief."""

    params: Params  # theta in "body"; the linear navigator in "head"
    anchors: jax.Array  # [c, d] a_c, the Gaussian navigator
    belief: Belief


class Head(NamedTuple):
    """A client's personal classifier."""

    mean: jax.Array  # [c, d] mu_ic
    cov: jax.Array  # [d, d] Sigma_i
    mean_cov: jax.Array  # [c, d, d] V_ic; [c, 0, 0] for plug-in prediction
    log_prior: jax.Array  # [c] log pi_ic


def pfedgm(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    navigator: str = "gaussian",
    pull: float = 1.0,
    resampling: float = 1.0,
    gain: str = "scalar",
    covariance_strength: float = 4.0,
    shrinkage: float = 0.01,
    prior_concentration: float = 0.1,
    temperature: float = 0.7,
    inference: str = "plugin",
) -> Algorithm:
    """Build pFedGM.

    Args:
      optimizer: Local optimiser.
      schedule: Local epochs or steps, and minibatch.
      navigator: "gaussian" (unit-covariance Gaussian logits) or "linear" (the
        model's own head); with "linear" and `pull=0` training is FedAvg's.
      pull: Weight lambda of the local objective, at least 0.
      resampling: Exponent gamma in [0, 1]: classes are re-sampled in proportion to
        `n_ic ** gamma`; 1 leaves the data as they are, 0 balances the classes.
      gain: Between-client covariance B by moments, "scalar", "diagonal" or "full";
        or the limits "global" (K = 0) and "local" (K = 1).
      covariance_strength: tau / d, weight of the global covariance.
      shrinkage: Share rho of a spherical part in the global covariance, [0, 1].
      prior_concentration: Pseudo-count alpha_0 of the class prior, above 0.
      temperature: Power T of the likelihood at prediction, above 0.
      inference: "plugin" (linear) or "predictive" (integrates out the mean).

    Raises:
      ValueError: If an argument is out of range.
    """
    _check("navigator", navigator, NAVIGATORS)
    _check("gain", gain, GAINS)
    _check("inference", inference, INFERENCES)
    for name, value, low, high in (
        ("pull", pull, 0, math.inf),
        ("resampling", resampling, 0, 1),
        ("covariance_strength", covariance_strength, 0, math.inf),
        ("shrinkage", shrinkage, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    for name, value in (
        ("prior_concentration", prior_concentration),
        ("temperature", temperature),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")

    def init(key, federation):
        model = federation.only_model("pFedGM")
        c, d = federation.num_classes, model.dim
        anchors = jax.random.normal(jax.random.fold_in(key, 1), (c, d)) / jnp.sqrt(d)
        belief = Belief(jnp.zeros((c, d)), jnp.eye(d), jnp.zeros((d, d)), jnp.zeros(c))
        return Server(model.init(key), anchors, belief), ((),)

    def navigate(context, trained, z):
        params, anchors = trained
        if navigator == "linear":
            return context.model.head(params, z)
        return z @ anchors.T - jnp.sum(anchors**2, -1)[None] / 2

    def measure(context, params, data):
        """Compute T_i = (n_ic, zbar_ic, S_i) of the samples as they are."""
        return _statistics.measure(context, params, data, schedule.batch_size)

    def personal_mean(belief, statistics):
        """Fuse the class means, mu_ic [c, d]."""
        if gain == "global":
            return belief.mean
        if gain == "local":
            known = statistics.count[:, None] > 0
            return jnp.where(known, statistics.mean, belief.mean)
        return gaussian.fuse_mean(
            belief.mean,
            belief.between,
            statistics.mean,
            belief.within,
            statistics.count,
        )

    def download(context, server, id_):
        del context, id_
        return server

    def local(context, key, client, server, data):
        statistics = measure(context, server.params, data) if pull else None
        if pull:
            target = jax.lax.stop_gradient(personal_mean(server.belief, statistics))
            # Without statistics there is nothing to be pulled to yet.
            known = jnp.any(server.belief.count > 0).astype(jnp.float32)

        count = fit.class_counts(data, context.num_classes, schedule.batch_size)
        weight = _class_weights(count, resampling)

        def loss(trained, batch, key):
            del key
            z = context.model.embed(trained[0], batch.x)
            each = optax.losses.softmax_cross_entropy_with_integer_labels(
                navigate(context, trained, z), batch.y
            )
            if pull:
                gap = jnp.sum((z - target[batch.y]) ** 2, -1) / (2 * z.shape[-1])
                each += pull * known * gap
            return fit.masked_mean(weight[batch.y] * each, batch.mask)

        start = (server.params, server.anchors)
        trained, metrics = fit.fit(loss, optimizer, start, key, data, schedule)
        params, anchors = jax.tree.map(jnp.subtract, trained, start)
        message = (Mean(params, data.size), Mean(anchors, count[:, None]))
        return client, message, metrics

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        params, anchors = upload.message
        return server._replace(
            params=optax.apply_updates(server.params, params.value),
            anchors=server.anchors + anchors.value,
        ), {}

    def send_statistics(context, key, client, params, data):
        del key
        statistics = measure(context, params, data)
        freedom = gaussian.degrees_of_freedom(statistics.count)  # n_i - C_i
        within = statistics.scatter / jnp.maximum(freedom, 1.0)
        message = (statistics.count, statistics.mean, Mean(within, freedom))
        return client, message, {"steps": jnp.int32(0)}

    def fuse_globally(context, key, server, uploads):
        del key
        (upload,) = uploads
        count, mean, within = upload.message
        total = jnp.sum(count, axis=0)  # N_c
        pooled = jnp.einsum("mc,mcd->cd", count / jnp.maximum(total, 1.0)[None], mean)
        seen = total > 0
        pooled = jnp.where(seen[:, None], pooled, server.belief.mean)
        noise = jnp.where(within.weight > 0, within.value, server.belief.within)
        unit = gaussian.shrink(noise, shrinkage)
        between = jnp.zeros_like(unit)
        if gain in gaussian.BETWEEN_FORMS:
            statistics = gaussian.Statistics(count, mean, None)
            between = gaussian.between_covariance(
                statistics, pooled, unit, form=gain, noise=noise
            )
        total = jnp.where(seen, total, server.belief.count)
        return server._replace(belief=Belief(pooled, unit, between, total)), {
            "within": jnp.trace(unit),
            "between": jnp.trace(between),
        }

    def personalise(context, key, client, server, data):
        del key, client
        belief = server.belief
        statistics = measure(context, server.params, data)
        cov = gaussian.fuse_covariance(
            belief.within,
            statistics.scatter,
            gaussian.degrees_of_freedom(statistics.count),
            strength=covariance_strength * context.model.dim,
        )
        c = context.num_classes
        mean, mean_cov = personal_mean(belief, statistics), jnp.zeros((c, 0, 0))
        if inference == "predictive":
            _, mean_cov = gaussian.fuse(
                belief.mean,
                belief.between,
                statistics.mean,
                belief.within,
                statistics.count,
            )
        log_prior = gaussian.class_prior(statistics.count, prior_concentration)
        return Head(mean, cov, mean_cov, log_prior)

    def predict(context, server, head, x):
        z = context.model.embed(server.params, x)
        if inference == "predictive":
            return gaussian.predictive_logits(
                z,
                head.mean,
                head.cov,
                head.mean_cov,
                head.log_prior,
                temperature=temperature,
            )
        return gaussian.plugin_logits(
            z, head.mean, head.cov, head.log_prior, temperature=temperature
        )

    def predict_global(context, server, x):
        z = context.model.embed(server.params, x)
        return navigate(context, (server.params, server.anchors), z)

    return Algorithm(
        init,
        download,
        local,
        aggregate,
        predict,
        personalise,
        more=(
            Exchange(
                lambda context, server, id_: server.params,
                send_statistics,
                fuse_globally,
            ),
        ),
        predict_global=predict_global,
    )


def _class_weights(count: jax.Array, resampling: float) -> jax.Array:
    """Weigh classes as if drawn in proportion to `n_c ** gamma`; `[c]`, mean 1."""
    present = count > 0
    share = jnp.where(present, jnp.maximum(count, 1.0) ** resampling, 0.0)
    share = share / jnp.maximum(jnp.sum(share), 1.0)  # q_i(c)
    return jnp.where(present, share * jnp.sum(count) / jnp.maximum(count, 1.0), 0.0)


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
