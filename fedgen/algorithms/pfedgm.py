"""pFedGM: personalised heads by Bayesian fusion of feature statistics.

Hu & Ma, "pFedGM" (arXiv 2603.11620, 2026). Only the abstract was available, so this
is a RECONSTRUCTION from its clauses: a dual objective, shared (classes far apart,
across clients) and local (a class close together, within a client); a Gaussian
classifier split into a *navigator*, which guides training, and a *statistic
extractor*; fusion inspired by the Kalman gain at a global and at a local level;
prediction by Bayes' rule with the global representation as prior and the client's
data as likelihood.

    L = mean_j w_{y_j} CE(navigator(z_j), y_j) + lambda L_ext           (local loss)
    L_ext = mean_j |z_j - sg(mu_{i, y_j})|^2_Lambda / 2d                (pull)
    m_c <- m_c + G_c (zbar_c - m_c), G_c = U_c / (U_c + R_c)            (global fusion)
    mu_ic = m_c + K_ic (zbar_ic - m_c), K_ic = B (B + Sigma / n_ic)^-1  (local fusion)
    Sigma_i = (tau Sigma + S_i) / (tau + n_i - C_i)
    score_c(z) = T log N(z; mu_ic, Sigma_i [+ V_ic]) + log pi_ic        (prediction)

What the abstract leaves open is an option here: the form of the navigator; weighted
re-sampling of the data (`resampling`) or of a Gaussian generator of features
(`generator`); an explicit distance between classes (`separation`); the metric Lambda of
the pull (`pull_metric`); the class prior in the training loss (`prior_in_training`);
navigator and extractor trained together or in turn (`alternate`). Two things are this
library's own. A round has two exchanges, since statistics sent with the weights would
belong to extractors that no longer exist once these are averaged; and `temperature`
makes up for training features being more compact than test features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.algorithms import _gaussian_head, _options, _statistics
from fedgen.algorithms._gaussian_head import GAINS, INFERENCES, Belief
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, Exchange, Mean
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule

NAVIGATORS = ("gaussian", "linear", "cosine", "frozen")
METRICS = ("identity", "precision")


class Server(NamedTuple):
    """Extractor, navigator and belief."""

    body: Params  # theta
    navigator: Any  # a_c [c, d]; the parameters of the model's head if linear
    belief: Belief


def pfedgm(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    navigator: str = "gaussian",
    pull: float = 1.0,
    pull_metric: str = "identity",
    resampling: float = 1.0,
    generator: float = 0.0,
    separation: float = 0.0,
    prior_in_training: bool = False,
    alternate: bool = False,
    gain: str = "scalar",
    process_noise: float = math.inf,
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
      navigator: "gaussian" (unit-covariance Gaussian logits), "linear" (the model's
        own head; with `pull=0` training is FedAvg's), "cosine", or "frozen" (Gaussian
        logits at the global means, which no gradient moves).
      pull: Weight lambda of the local objective.
      pull_metric: Its metric Lambda, "identity" or "precision" (that of the client's
        fused covariance, scaled to trace d).
      resampling: Exponent gamma in [0, 1]: classes are re-sampled in proportion to
        `n_ic ** gamma`; 1 leaves the data as they are, 0 balances the classes.
      generator: Weight of the navigator's loss on features drawn from the global
        Gaussians, all classes seen so far alike.
      separation: Weight of the mean distance between anchors, capped, per feature.
      prior_in_training: Add the client's log class frequencies to training logits.
      alternate: Train first the navigator alone, then the extractor alone, each for
        the whole schedule: twice the local steps.
      gain: Between-client covariance B by moments, "scalar", "diagonal" or "full";
        or the limits "global" (K = 0) and "local" (K = 1).
      process_noise: Variance that class means gain in a round, in units of Sigma;
        infinity forgets earlier rounds.
      covariance_strength: tau / d, weight of the global covariance.
      shrinkage: Share rho of a spherical part in the global covariance.
      prior_concentration: Pseudo-count alpha_0 of the class prior.
      temperature: Power T of the likelihood at prediction.
      inference: "plugin" (linear) or "predictive" (integrates out the mean).

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_choice("navigator", navigator, NAVIGATORS)
    _options.check_choice("pull_metric", pull_metric, METRICS)
    _options.check_choice("gain", gain, GAINS)
    _options.check_choice("inference", inference, INFERENCES)
    _options.check_share(resampling=resampling, shrinkage=shrinkage)
    _options.check_at_least(0, pull=pull, generator=generator, separation=separation)
    # Infinite, a belief forgets at once and a covariance stays the global one.
    _options.check_at_least(
        0,
        infinite=True,
        process_noise=process_noise,
        covariance_strength=covariance_strength,
    )
    _options.check_positive(
        prior_concentration=prior_concentration, temperature=temperature
    )
    if alternate and navigator == "frozen":
        raise ValueError("alternate must be false with the frozen navigator")
    if fit.is_given(separation) and navigator in ("linear", "frozen"):
        raise ValueError(
            f"separation must be 0 with the {navigator} navigator, which has no "
            f"anchors to train, got {separation}"
        )

    def init(key, federation):
        model = federation.only_model("pFedGM")
        c, d = federation.num_classes, model.dim
        params = model.init(key)
        anchors = jax.random.normal(jax.random.fold_in(key, 1), (c, d)) / jnp.sqrt(d)
        trained = params["head"] if navigator == "linear" else anchors
        return Server(params["body"], trained, _gaussian_head.no_belief(c, d)), ((),)

    def navigate(context, weights, belief, z):
        """Compute the logits that guide training, `[b, d] -> [b, c]`."""
        if navigator == "linear":
            return context.model.head({"head": weights}, z)
        if navigator == "cosine":
            unit_z, unit_a = (
                a / (jnp.linalg.norm(a, axis=-1, keepdims=True) + 1e-6)
                for a in (z, weights)
            )
            return 16.0 * unit_z @ unit_a.T
        anchors = belief.mean if navigator == "frozen" else weights
        return z @ anchors.T - jnp.sum(anchors**2, -1)[None] / 2

    def measure(context, body, data):
        """Compute T_i = (n_ic, zbar_ic, S_i) of the samples as they are."""
        return _statistics.measure(context, {"body": body}, data, schedule.batch_size)

    def pull_precision(belief, statistics):
        """Compute Lambda `[d, d]`, of trace d."""
        d = belief.within.shape[0]
        cov = _gaussian_head.personal_covariance(
            belief, statistics, covariance_strength * d
        )
        precision = jax.scipy.linalg.cho_solve(
            (jnp.linalg.cholesky(cov), True), jnp.eye(d)
        )
        return precision * d / jnp.trace(precision)

    def download(context, server, id_):
        del context, id_
        return server

    def local(context, key, client, server, data):
        belief = server.belief
        known = _gaussian_head.known_classes(belief).astype(jnp.float32)
        count = fit.class_counts(data, context.num_classes, schedule.batch_size)
        weight = _class_weights(count, resampling)  # w_c
        log_prior = jnp.log(count + prior_concentration)[None]
        if fit.is_given(pull):
            statistics = measure(context, server.body, data)
            target = _gaussian_head.personal_mean(belief, statistics, gain)
            target = jax.lax.stop_gradient(target)
            if pull_metric == "precision":
                metric = jax.lax.stop_gradient(pull_precision(belief, statistics))
        if fit.is_given(generator):
            factor = jnp.linalg.cholesky(belief.within)
            seen = jnp.log(known)

        def shared(weights, z, y, mask, weight):
            logits = navigate(context, weights, belief, z)
            if prior_in_training:
                logits += log_prior
            each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
            return fit.masked_mean(weight[y] * each, mask)

        def loss(trained, batch, key):
            body, weights = trained
            z = context.model.embed({"body": body}, batch.x)
            total = shared(weights, z, batch.y, batch.mask, weight)
            if fit.is_given(pull):
                gap = z - target[batch.y]
                scaled = gap if pull_metric == "identity" else gap @ metric
                gap = jnp.sum(scaled * gap, -1) / (2 * z.shape[-1])
                # Without statistics of a class there is nothing to be pulled to yet.
                gap = known[batch.y] * gap
                total += pull * fit.masked_mean(gap, batch.mask)
            if fit.is_given(separation):
                total -= separation * _mean_distance(weights)
            if fit.is_given(generator):
                class_key, noise_key = jax.random.split(key)
                y = jax.random.categorical(class_key, seen, shape=batch.y.shape)
                noise = jax.random.normal(noise_key, z.shape) @ factor.T
                drawn = shared(
                    weights, belief.mean[y] + noise, y, known[y], jnp.ones_like(known)
                )
                total += generator * jnp.where(jnp.any(known > 0), drawn, 0.0)
            return total

        start = body, weights = server.body, server.navigator
        if alternate:
            weights, before = fit.fit(
                lambda weights, *rest: loss((body, weights), *rest),
                optimizer,
                weights,
                jax.random.fold_in(key, 1),
                data,
                schedule,
            )
            body, metrics = fit.fit(
                lambda body, *rest: loss((body, weights), *rest),
                optimizer,
                body,
                key,
                data,
                schedule,
            )
            metrics["steps"] += before["steps"]
            trained = (body, weights)
        else:
            trained, metrics = fit.fit(loss, optimizer, start, key, data, schedule)
        body, weights = jax.tree.map(jnp.subtract, trained, start)
        # Anchors weigh as the samples behind them; other navigators as the body.
        rows = data.size if navigator == "linear" else count[:, None]
        return client, (Mean(body, data.size), Mean(weights, rows)), metrics

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        body, weights = upload.message
        return server._replace(
            body=optax.apply_updates(server.body, body.value),
            navigator=optax.apply_updates(server.navigator, weights.value),
        ), {}

    def download_body(context, server, id_):
        del context, id_
        return server.body

    def send_statistics(context, key, client, body, data):
        del key
        message = _gaussian_head.to_message(measure(context, body, data))
        return client, message, {"steps": jnp.int32(0)}

    def fuse_globally(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        belief = _gaussian_head.fuse_globally(
            server.belief, upload.message, gain, shrinkage, process_noise
        )
        return server._replace(belief=belief), {
            "within": jnp.trace(belief.within),
            "between": jnp.trace(belief.between),
        }

    def personalise(context, key, client, server, data):
        del key, client
        return _gaussian_head.personal_head(
            server.belief,
            measure(context, server.body, data),
            gain,
            inference,
            covariance_strength * context.model.dim,  # tau
            prior_concentration,
        )

    def predict(context, server, head, x):
        z = context.model.embed({"body": server.body}, x)
        return _gaussian_head.score(head, z, inference, temperature)

    def predict_global(context, server, x):
        z = context.model.embed({"body": server.body}, x)
        return navigate(context, server.navigator, server.belief, z)

    return Algorithm(
        init,
        download,
        local,
        aggregate,
        predict,
        personalise,
        more=(Exchange(download_body, send_statistics, fuse_globally),),
        predict_global=predict_global,
    )


def _class_weights(count: jax.Array, resampling: float) -> jax.Array:
    """Weigh classes as if drawn in proportion to `n_c ** gamma`; `[c]`, mean 1."""
    present = count > 0
    share = jnp.where(present, jnp.maximum(count, 1.0) ** resampling, 0.0)
    share = share / jnp.maximum(jnp.sum(share), 1.0)  # q_i(c)
    return jnp.where(present, share * jnp.sum(count) / jnp.maximum(count, 1.0), 0.0)


def _mean_distance(anchors: jax.Array, cap: float = 4.0) -> jax.Array:
    """Average squared distances of anchors per feature, each capped, []."""
    c, d = anchors.shape
    gap = jnp.sum((anchors[:, None] - anchors[None]) ** 2, axis=-1) / d
    return jnp.sum(jnp.minimum(gap, cap)) / (c * max(c - 1, 1))
