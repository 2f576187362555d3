"""The half of FedGMM that looks at inputs: an embedding and Gaussians on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgen._matrices import each
from fedgen.aggregators import gaussian, mixture
from fedgen.core import tree

_EPS = 0.1  # of the M-step in FedGMM's code

Embedding = Callable[[jax.Array], jax.Array]  # x [b, ...] -> phi [b, d]


class Gaussians(NamedTuple):
    """Components of the embedded inputs."""

    mean: jax.Array  # [k, d] mu
    cov: jax.Array  # [k, d, d] Sigma


def random_projection(dim: int) -> Embedding:
    """Build an embedding in fixed orthonormal directions; the identity if `d <= dim`.

    Such projections keep mixtures apart and make their components rounder (Dasgupta,
    "Experiments with Random Projection", UAI 2000), and need no data. This one is the
    same wherever it is built, so that nobody has to send it.
    """

    def embed(x):
        flat = x.reshape(x.shape[0], -1)
        if flat.shape[1] <= dim:
            return flat
        normal = np.random.default_rng(0).normal(size=(flat.shape[1], dim))
        return flat @ jnp.asarray(np.linalg.qr(normal)[0], flat.dtype)

    return embed


def equal(num_components: int, embed: Embedding, x: jax.Array) -> Gaussians:
    """Return Gaussians of mean 0 and covariance I, which all samples belong to alike.

    Args:
      num_components: Their number `k`.
      embed: To their `d` features.
      x: `[rows, ...]` inputs, of which only the shape is used.
    """
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32)
    dim = jax.eval_shape(embed, one).shape[1]
    mean = jnp.zeros((num_components, dim))
    return Gaussians(mean, tree.broadcast(jnp.eye(dim), num_components))


def no_statistics(gaussians: Gaussians) -> mixture.Statistics:
    """Return what no sample at all says."""
    mean, cov = gaussians
    return mixture.Statistics(
        jnp.zeros(mean.shape[0]), jnp.zeros_like(mean), jnp.zeros_like(cov)
    )


def merge_two(
    a: mixture.Statistics, b: mixture.Statistics, *, between: bool = True
) -> mixture.Statistics:
    """Pool the samples of two sets of statistics."""
    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
    return mixture.merge(both, between=between)


def pool(
    ids: jax.Array, stats: mixture.Statistics, *, between: bool
) -> mixture.Statistics:
    """Merge the statistics of the clients `ids [m]`, one by one in that order.

    Uploads come in no order, and roundings of sums would depend on it. Whoever is
    absent is passed over, since even adding nothing may round.
    """
    order = jnp.argsort(ids)

    def add(total, one):
        merged = merge_two(total, one, between=between)
        here = jnp.any(one.count > 0)
        return jax.tree.map(lambda a, b: jnp.where(here, a, b), merged, total), None

    start = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), stats)
    return jax.lax.scan(add, start, jax.tree.map(lambda a: a[order], stats))[0]


def maximise(
    old: Gaussians, stats: mixture.Statistics, strength: float, shrinkage: float
) -> Gaussians:
    """Take the M-step; what less than one sample is due to stays as it was."""
    mean, cov, _ = mixture.maximise(stats, strength=strength)
    cov = jax.vmap(lambda one: gaussian.shrink(one, shrinkage))(cov)
    known = stats.count >= 1
    return Gaussians(
        jnp.where(known[:, None], mean, old.mean),
        jnp.where(known[:, None, None], cov, old.cov),
    )


def spread(key: jax.Array, gaussians: Gaussians, first: jax.Array) -> Gaussians:
    """Start the components, where this is the end of the `first []` round.

    Before, all of them were equal, so that each has learned the mean and covariance
    of all samples. Means are drawn from that Gaussian, about its mean, where a single
    one therefore stays. Nothing leaves a client that it would not send anyway, while
    k-means++ asks for samples.
    """
    mean, cov = gaussians
    noise = jax.random.normal(key, mean.shape)
    noise = noise - jnp.mean(noise, axis=0, keepdims=True)
    step = each(lambda cov, noise: jnp.linalg.cholesky(cov) @ noise, cov, noise)
    return Gaussians(jnp.where(first, mean + step, mean), cov)


def as_official_code_starts(key: jax.Array, gaussians: Gaussians) -> Gaussians:
    """Draw means from N(0, I) and make covariances 100 I."""
    mean, cov = gaussians
    return Gaussians(jax.random.normal(key, mean.shape), 100.0 * cov)


def as_official_code_averages(stats: mixture.Statistics) -> mixture.Statistics:
    """Turn a client's statistics into those that FedGMM's code averages.

    mu = S_1 / (S_0 + eps) and Sigma = sum r (x - mu)(x - mu)^T / (S_0 + eps) + eps I,
    both with the weight S_0.
    """
    count = stats.count[:, None, None]
    mean = stats.mean * (stats.count / (stats.count + _EPS))[:, None]
    gap = stats.mean - mean
    scatter = stats.scatter + count * gap[:, :, None] * gap[:, None]
    cov = scatter / (count + _EPS) + _EPS * jnp.eye(mean.shape[1])[None]
    return mixture.Statistics(stats.count, mean, count * cov)
