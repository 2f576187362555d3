"""The statistic extractor of pFedGM: what clients say of their features, and heads.

Everything that needs no gradient: the global belief (prior), its fusion with a
client's statistics (likelihood), and prediction by Bayes' rule.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedgen.aggregators import gaussian
from fedgen.aggregators.gaussian import Statistics
from fedgen.core.algorithm import Mean

GAINS = (*gaussian.BETWEEN_FORMS, "global", "local")
INFERENCES = ("plugin", "predictive")


class Belief(NamedTuple):
    """What all clients together say of the representation: the prior."""

    mean: jax.Array  # [c, d] m_c
    variance: jax.Array  # [c] U_c, in units of Sigma_g; infinite for unseen classes
    within: jax.Array  # [d, d] Sigma_g
    between: jax.Array  # [d, d] B


class Head(NamedTuple):
    """A client's personal classifier."""

    mean: jax.Array  # [c, d] mu_ic
    cov: jax.Array  # [d, d] Sigma_i
    mean_cov: jax.Array  # [c, d, d] V_ic; [c, 0, 0] for plug-in prediction
    log_prior: jax.Array  # [c] log pi_ic


class Message(NamedTuple):
    """A client's statistics T_i as they cross the wire."""

    count: jax.Array  # [c] n_ic
    mean: jax.Array  # [c, d] zbar_ic
    within: Mean  # S_i / (n_i - C_i), weighted with n_i - C_i


def no_belief(num_classes: int, dim: int) -> Belief:
    """Return the belief before the first statistics."""
    return Belief(
        jnp.zeros((num_classes, dim)),
        jnp.full(num_classes, jnp.inf, jnp.float32),
        jnp.eye(dim),
        jnp.zeros((dim, dim)),
    )


def known_classes(belief: Belief) -> jax.Array:
    """Tell which classes anybody has shown so far, `[c]`."""
    return jnp.isfinite(belief.variance)


def to_message(statistics: Statistics) -> Message:
    """Pack a client's statistics; the server only sees scatters averaged."""
    freedom = gaussian.degrees_of_freedom(statistics.count)  # n_i - C_i
    within = statistics.scatter / jnp.maximum(freedom, 1.0)
    return Message(statistics.count, statistics.mean, Mean(within, freedom))


def fuse_globally(
    belief: Belief, message: Message, gain: str, shrinkage: float, process_noise: float
) -> Belief:
    """Fuse the belief so far with a round's statistics, leaves `[m, ...]`.

    What a round does not tell stays: the covariance within if nobody holds two samples
    of a class, the one between if no class has two holders.
    """
    count, mean, within = message
    total = jnp.sum(count, axis=0)  # N_c
    pooled = jnp.einsum("mc,mcd->cd", count / jnp.maximum(total, 1.0)[None], mean)
    noise = jnp.where(within.weight > 0, within.value, belief.within)
    unit = jnp.where(
        within.weight > 0, gaussian.shrink(within.value, shrinkage), belief.within
    )
    statistics = Statistics(count, mean, None)
    scale = gaussian.between_scale(statistics, pooled, unit, noise=noise, fallback=0.0)
    centre, variance = gaussian.fuse_global(
        belief.mean,
        belief.variance,
        pooled,
        count,
        between=scale,
        process_noise=process_noise,
    )
    # Infinite process noise would call a class unknown that nobody holds in this
    # round, though its old mean is still the best there is.
    told = (total > 0) | jnp.isfinite(variance)
    variance = jnp.where(told, variance, belief.variance)
    between = belief.between
    if gain in gaussian.BETWEEN_FORMS:
        estimate = gaussian.between_covariance(
            statistics, pooled, unit, form=gain, noise=noise
        )
        shared = jnp.any(jnp.sum(count > 0, axis=0) > 1)
        between = jnp.where(shared, estimate, between)
    return Belief(centre, variance, unit, between)


def personal_mean(belief: Belief, statistics: Statistics, gain: str) -> jax.Array:
    """Fuse class means, mu_ic `[c, d]`; a class new to the server has no prior."""
    local = statistics.count > 0
    if gain == "global":
        fused = belief.mean
    elif gain == "local":
        fused = jnp.where(local[:, None], statistics.mean, belief.mean)
    else:
        fused = gaussian.fuse_mean(
            belief.mean,
            belief.between,
            statistics.mean,
            belief.within,
            statistics.count,
        )
    unheard = local & ~known_classes(belief)
    return jnp.where(unheard[:, None], statistics.mean, fused)


def personal_covariance(
    belief: Belief, statistics: Statistics, strength: float
) -> jax.Array:
    """Fuse the covariance within classes, Sigma_i `[d, d]`."""
    return gaussian.fuse_covariance(
        belief.within,
        statistics.scatter,
        gaussian.degrees_of_freedom(statistics.count),
        strength=strength,
    )


def personal_head(
    belief: Belief,
    statistics: Statistics,
    gain: str,
    inference: str,
    strength: float,
    concentration: float,
) -> Head:
    """Fuse prior and likelihood into a client's classifier."""
    count = statistics.count
    mean_cov = jnp.zeros((count.shape[0], 0, 0))
    if inference == "predictive" and gain == "local":
        share = jnp.where(count > 0, 1.0 / jnp.maximum(count, 1.0), 0.0)
        mean_cov = share[:, None, None] * belief.within[None]
    elif inference == "predictive":
        _, mean_cov = gaussian.fuse(
            belief.mean, belief.between, statistics.mean, belief.within, count
        )
    return Head(
        personal_mean(belief, statistics, gain),
        personal_covariance(belief, statistics, strength),
        mean_cov,
        gaussian.class_prior(count, concentration),
    )


def score(head: Head, z: jax.Array, inference: str, temperature: float) -> jax.Array:
    """Compute log posteriors of the classes up to a constant, `[b, d] -> [b, c]`."""
    if inference == "plugin":
        return gaussian.plugin_logits(
            z, head.mean, head.cov, head.log_prior, temperature=temperature
        )
    return gaussian.predictive_logits(z, *head, temperature=temperature)
