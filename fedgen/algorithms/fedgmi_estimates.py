"""What users of FedGMI ask: proportions, how far off they are, and samples."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedgen.aggregators import mixture
from fedgen.algorithms import _components
from fedgen.algorithms._vae_mixture import Components, Density
from fedgen.core import execution as execution_lib
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Data, Federation, Model, Pool, normalise

_BATCH = 100  # samples that are scored at once


def make_proportions(
    algorithm: Algorithm, execution: Execution
) -> Callable[[State, Federation, jax.Array], jax.Array]:
    """Build `(state, federation, key) -> pi [n, k]`, to be jitted by the caller.

    Clients fit pi to the newest components, as for evaluation and as new clients do:
    they may be others than those that trained.
    """

    def proportions(state, federation, key):
        (cohort,) = federation.cohorts
        context = federation.context(0)

        def fit_one(id_, rows):
            data = Data(federation.pool, cohort.order, *rows, jnp.float32(1))
            server = algorithm.download(context, state.server, id_)
            own_key = jax.random.fold_in(key, id_)
            return algorithm.personalise(context, own_key, None, server, data)

        each = execution_lib.map_clients(fit_one, execution.chunk)
        return each(cohort.ids, cohort.train)

    return proportions


def proportion_error(estimate: jax.Array, truth: jax.Array) -> jax.Array:
    """Average the total variation over clients, components in their best order.

    Args:
      estimate: `[n, k]`.
      truth: `[n, k]`, of the samples that clients hold.

    Returns:
      [], from 0 to 1.
    """
    order = mixture.match_proportions(estimate, truth)
    return jnp.mean(mixture.total_variation(estimate[:, order], truth))


def true_proportions(
    domain: np.ndarray, federation: Federation, num_components: int
) -> np.ndarray:
    """Count the inherent distributions of what clients train on.

    Args:
      domain: `[rows]` inherent distribution of every pool row.
      federation: One cohort.
      num_components: k.

    Returns:
      `[n, k]`, zeros for a client without samples.
    """
    row, owner = owned(federation, "train")
    count = np.zeros((federation.cohorts[0].num_clients, num_components))
    np.add.at(count, (owner, domain[row]), 1)
    return count / np.maximum(count.sum(axis=1, keepdims=True), 1)


def owned(federation: Federation, part: str) -> tuple[np.ndarray, np.ndarray]:
    """List what all clients hold.

    Args:
      federation: One cohort.
      part: "train", "validation" or "test".

    Returns:
      `[s]` pool rows, client after client, and `[s]` whose they are, by position.
    """
    (cohort,) = federation.cohorts
    start, size = map(np.asarray, getattr(cohort, part))
    order = np.asarray(cohort.order)
    rows = [order[s : s + t] for s, t in zip(start, size, strict=True)]
    return np.concatenate(rows), np.repeat(np.arange(len(size)), size)


def score_gate(
    kind: Density,
    model: Model,
    num_samples: int,
    components: Components,
    pool: Pool,
    row: jax.Array,
    proportions: jax.Array,
    component: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Score the posterior gate, and the classifiers as if it never were wrong.

    Every sample has noise of its own, where predictions have that of their batch.

    Args:
      kind: How components give densities.
      model: The classifiers' architecture.
      num_samples: Importance samples of the densities.
      components: Of the server.
      pool: All samples.
      row: `[s]` which of them.
      proportions: `[s, k]` pi of the client that holds the sample.
      component: `[s]` the true one of every sample.

    Returns:
      `[s]` bool, whether the likeliest component is the true one, and `[s]` bool,
      whether the classifier of the true one is right.
    """
    noise = jax.random.key(0)

    def of_one(sample):
        row, pi, true = sample
        x, key = normalise(pool.x[row])[None], jax.random.fold_in(noise, row)
        log_density = kind.marginal(components, key, x, num_samples)[0]
        likeliest = jnp.argmax(_components.log_shares(pi) + log_density)
        logits = jax.vmap(lambda params: model.apply(params, x)[0])
        label = jnp.argmax(logits(components.classifiers)[true])
        return likeliest == true, label == pool.y[row]

    return jax.lax.map(of_one, (row, proportions, component), batch_size=_BATCH)


def generate(
    kind: Density,
    components: Components,
    key: jax.Array,
    count: int,
    shape: tuple[int, ...],
) -> jax.Array:
    """Let every component's VAE generate samples.

    Args:
      kind: How components give densities.
      components: Of the server.
      key: Consumed; all components decode the same codes.
      count: Samples of each, `g`.
      shape: Of one sample.

    Returns:
      `[k, g, ...]` means of the decoder, in the units of inputs; a conditional VAE
      takes labels by their frequencies.
    """
    code_key, label_key = jax.random.split(key)
    label = jnp.zeros(1, jnp.int32) if kind.kind == "cvae" else None
    vae = jax.tree.map(lambda a: a[0], components.vaes)
    code, _ = jax.eval_shape(kind.vae.encode, vae, jnp.zeros((1, *shape)), label)
    z = jax.random.normal(code_key, (count, code.shape[1]))

    def of_one(vae, labels):
        y = None
        if kind.kind == "cvae":
            y = jax.random.categorical(label_key, jnp.log(labels), shape=(count,))
        out = kind.vae.decode(vae, z, y)
        return _mean(kind.likelihood, out).reshape(count, *shape)

    return jax.vmap(of_one)(components.vaes, components.labels)


def _mean(likelihood: str, out: jax.Array) -> jax.Array:
    """Return the mean of the decoder's distribution, of images in [-1, 1]."""
    if likelihood == "normal":
        return out
    if likelihood == "bernoulli":
        return 2 * jax.nn.sigmoid(out) - 1
    # 1 / (1 - exp(-a)) - 1 / a, and its expansion where the two cancel.
    small = jnp.abs(out) < 0.03
    a = jnp.where(small, 1.0, out)
    return 2 * jnp.where(small, 0.5 + out / 12, -1 / jnp.expm1(-a) - 1 / a) - 1
