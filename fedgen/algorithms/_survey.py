"""What clients tell of their inputs before training, and what it is good for.

The mean of random Fourier features (Rahimi and Recht, 2007) over a client's samples is
its kernel mean embedding: it tells any two distributions apart, and it is linear in the
client's proportions. `simplex.unmix` finds from it what the components look like in
these features, and a linear classifier of samples is the guide that training starts by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedgen.aggregators import gaussian, simplex
from fedgen.core import fit
from fedgen.core.algorithm import Mean
from fedgen.core.federation import Batch, Cohort, Data, Federation

NUM_FEATURES = 128
# Widths of the kernel: typical distances between two samples, in inputs for an entry.
_INPUT_WIDTH = 0.7
_LABEL_WIDTH = 0.7

Features = Callable[[Batch], jax.Array]  # [b] samples -> [b, d]


class Told(NamedTuple):
    """What a client tells, all zeros after the survey."""

    mean: jax.Array  # [d]
    cov: Mean  # [d, d] of its samples, unbiased, weighted by degrees of freedom


class Survey(NamedTuple):
    """What the server knows from all that took part so far."""

    id: jax.Array  # [n] clients
    count: jax.Array  # [n] samples, 0 for who has not told yet
    mean: jax.Array  # [n, d]
    cov: jax.Array  # [d, d] within a client
    weight: jax.Array  # [] degrees of freedom of `cov`


class Guide(NamedTuple):
    """Log densities of the features, up to what all components share."""

    kernel: jax.Array  # [d, k]
    bias: jax.Array  # [k]


def random_features(dim: int, num_classes: int) -> Features:
    """Draw features of `dim` inputs, and of labels if there are classes.

    Nobody has to be told of the draw: it is the same for all.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (dim, NUM_FEATURES))
    kernel = kernel / (_INPUT_WIDTH * dim**0.5)
    phase = jax.random.uniform(keys[1], (1, NUM_FEATURES), maxval=2 * jnp.pi)
    label = jax.random.normal(keys[2], (num_classes, NUM_FEATURES)) / _LABEL_WIDTH

    def features(batch):
        angle = batch.x.reshape(batch.x.shape[0], -1) @ kernel + phase
        if num_classes:
            angle += label[batch.y]
        return jnp.cos(angle)

    return features


def start(cohort: Cohort, num_components: int) -> tuple[Survey, Guide]:
    """Begin with nothing known of the clients `[n]` of a cohort."""
    n, d = cohort.num_real, NUM_FEATURES
    zeros = (jnp.zeros(shape) for shape in (n, (n, d), (d, d), ()))
    guide = Guide(jnp.zeros((d, num_components)), jnp.zeros(num_components))
    # In the order of ids, so that a client's place changes no rounding; padding has -1.
    return Survey(jnp.sort(cohort.ids)[-n:], *zeros), guide


def tell(features: Features, data: Data, batch_size: int) -> Told:
    """Average features and their products over all samples of a client."""

    def add(total, batch):
        z = features(batch) * batch.mask[:, None]
        return total[0] + jnp.sum(z, axis=0), total[1] + z.T @ z

    zeros = jnp.zeros(NUM_FEATURES), jnp.zeros((NUM_FEATURES, NUM_FEATURES))
    total, square = fit.fold(add, zeros, data, batch_size)
    mean = total / jnp.maximum(data.size, 1)
    scatter = square - data.size * mean[:, None] * mean[None]
    freedom = jnp.maximum(data.size - 1.0, 0.0)
    return Told(mean, Mean(scatter / jnp.maximum(freedom, 1), freedom))


def listen(survey: Survey, id_: jax.Array, weight: jax.Array, told: Told) -> Survey:
    """Add a round's participants, of whom the newest word counts.

    Args:
      survey: Until then.
      id_: `[m]`.
      weight: `[m]` their samples, 0 for those who were absent.
      told: Leaves `[m, ...]`.
    """
    match = (survey.id[:, None] == id_[None]) & (weight > 0)[None]
    seen, slot = jnp.any(match, axis=1), jnp.argmax(match, axis=1)
    total = survey.weight + told.cov.weight
    share = told.cov.weight / jnp.maximum(total, 1)
    return Survey(
        survey.id,
        jnp.where(seen, weight[slot], survey.count),
        jnp.where(seen[:, None], told.mean[slot], survey.mean),
        survey.cov + share * (told.cov.value - survey.cov),
        total,
    )


def find_guide(survey: Survey, num_components: int) -> Guide:
    """Tell components apart by what clients told."""
    found = simplex.unmix(
        survey.mean, survey.cov, num_components, mask=survey.count > 0
    )
    return Guide(
        *gaussian.plugin_head(found.mean, found.cov, jnp.zeros(num_components))
    )


def estimate_num_components(features: Features, federation: Federation) -> int:
    """Estimate k from all clients of the only cohort, before any training."""
    (cohort,) = federation.cohorts

    @jax.jit
    def estimate(pool, cohort):
        def visit(survey, one):
            id_, rows = one
            told = tell(features, Data(pool, cohort.order, *rows, jnp.float32(1)), 100)
            weight = rows.size.astype(jnp.float32)
            told = told._replace(mean=told.mean[None])
            return listen(survey, id_[None], weight[None], told), None

        survey, _ = start(cohort, 1)
        survey, _ = jax.lax.scan(visit, survey, (cohort.ids, cohort.train))
        return simplex.estimate_num_components(
            survey.mean, survey.cov, survey.count, mask=survey.count > 0
        )[0]

    return int(estimate(federation.pool, cohort))
