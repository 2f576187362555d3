"""FedGMM: shared Gaussians of the inputs times shared predictors, in personal shares.

Wu et al., "Personalized Federated Learning under Mixture of Distributions", ICML 2023:

    p_i(x, y) = sum_jk pi_i(j, k) N(phi(x); mu_j, Sigma_j) softmax(h_k(x))_y

with M1 Gaussians and M2 predictors. The paper's text was not available; this follows
the authors' code, and EM where the code departs from it (`mode="exact"`): the server
merges sufficient statistics, which is the M-step of the pooled samples.

`mode="official_code"` keeps what the code does to the mathematics: prediction adds pi
to log densities instead of log pi; covariances leave out the scatter between clients;
0.1 is added to the counts of client means and covariances, and to the diagonal; and
the Gaussians start at random means with covariance 100 I. Slips of its evaluation,
sampling and data loading are not kept.

Reconstructions:
- phi is a random projection, where the code takes principal components of the features
  of an ImageNet network; pass `embedding` for another one.
- In the exact mode Gaussians start in the first round, see `_input_gaussians.spread`.
- Covariances borrow `strength` samples from the pooled one and are shrunk slightly. A
  Gaussian that less than one sample is due to stays as it was.
- Further readings are those of FedEM with `weighting="mass"`, which M1 = 1 equals.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgen.aggregators import mixture
from fedgen.algorithms import _components, _input_gaussians, _options
from fedgen.algorithms._input_gaussians import Embedding, Gaussians
from fedgen.core import fit, tree
from fedgen.core.algorithm import Algorithm
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule

MODES = ("exact", "official_code")


class Server(NamedTuple):
    """All that clients share."""

    predictors: Params  # theta, leaves [M2, ...]
    gaussians: Gaussians
    started: jax.Array  # [] bool, whether the Gaussians differ


def log_density(
    gaussians: Gaussians, proportions: jax.Array, phi: jax.Array
) -> jax.Array:
    """Compute a client's `log p_i(x)`: the lower, the more novel the sample.

    Args:
      gaussians: The server's.
      proportions: `[M1, M2]` pi of the client.
      phi: `[s, d]` embedded inputs.

    Returns:
      `[s]` nats.
    """
    table = mixture.gaussian_log_density(phi, *gaussians)
    shares = jnp.sum(proportions, axis=1)
    return mixture.log_evidence(table, shares, jnp.ones(phi.shape[0], bool))


def fedgmm(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    mode: str = "exact",
    num_gaussians: int = 3,
    num_predictors: int = 3,
    dim: int = 32,
    strength: float = 1.0,
    shrinkage: float = 1e-4,
    adapt_steps: int = 10,
    embedding: Embedding | None = None,
) -> Algorithm:
    """Build FedGMM.

    Args:
      optimizer: Local optimiser of the predictors, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      mode: "exact" or "official_code", see above.
      num_gaussians: M1, at least 1.
      num_predictors: M2, at least 1.
      dim: Features d of the embedding, at least 1.
      strength: Samples that the pooled covariance is worth (exact), at least 0.
      shrinkage: Share of a spherical part in covariances (exact), in [0, 1].
      adapt_steps: E- and pi-steps before a client's model is used, at least 0.
      embedding: phi, `[b, ...] -> [b, d]`, in place of the one with `dim` features.

    Raises:
      ValueError: If an argument is out of range.
    """
    counts = {"num_gaussians": num_gaussians, "num_predictors": num_predictors}
    _options.check_choice("mode", mode, MODES)
    _options.check_at_least(1, **counts, dim=dim)
    _options.check_at_least(0, strength=strength, adapt_steps=adapt_steps)
    _options.check_share(shrinkage=shrinkage)
    exact = mode == "exact"
    if not exact:
        strength = shrinkage = 0.0
    embed = embedding or _input_gaussians.random_projection(dim)
    pairs = jnp.ones((num_gaussians, num_predictors))
    uniform = pairs / pairs.size

    def init(key, federation):
        model = federation.only_model("FedGMM")
        gaussians = _input_gaussians.equal(num_gaussians, embed, federation.pool.x)
        if not exact:
            unused = jax.random.fold_in(key, num_predictors)
            gaussians = _input_gaussians.as_official_code_starts(unused, gaussians)
        predictors = _components.init(model, key, num_predictors)
        server = Server(predictors, gaussians, jnp.array(not exact))
        return server, (tree.broadcast(uniform, federation.cohorts[0].num_clients),)

    def density(context, server):
        """Return `batch -> log p(x, y) [b, M1, M2]` under these components."""

        def of_batch(batch):
            phi, mask = embed(batch.x), batch.mask
            inputs = mixture.gaussian_log_density(phi, *server.gaussians, mask=mask)
            labels = -_components.losses(context.model, server.predictors, batch)
            return inputs[:, :, None] + labels[:, None]

        return of_batch

    def e_step(proportions, log_density, mask):
        """Compute `gamma [b, M1, M2]`."""
        gamma = _components.responsibilities(
            log_density.reshape(mask.shape[0], -1), proportions.ravel(), mask
        )
        return gamma.reshape(log_density.shape)

    def download(context, server, id_):
        del context, id_
        return server._replace(started=())

    def local(context, key, proportions, server, data):
        log_density = density(context, server)

        def gamma(batch):
            return e_step(proportions, log_density(batch), batch.mask)

        def add(carry, batch):
            total, stats = carry
            new = gamma(batch)
            own = mixture.component_statistics(embed(batch.x), jnp.sum(new, axis=2))
            stats = _input_gaussians.merge_two(stats, own)
            return total + jnp.sum(new, axis=0), stats

        nothing = _input_gaussians.no_statistics(server.gaussians)
        start = jnp.zeros_like(proportions), nothing
        total, stats = fit.fold(add, start, data, schedule.batch_size)

        def q(batch):
            return jnp.sum(gamma(batch), axis=1)  # q_s(k)

        delta, metrics = _components.fit_weighted(
            context, optimizer, server.predictors, key, data, schedule, q
        )
        if not exact:
            stats = _input_gaussians.as_official_code_averages(stats)
        message = _components.to_message(delta, jnp.sum(total, axis=0)), stats
        return _components.mean_share(total, proportions, data), message, metrics

    def aggregate(context, key, server, uploads):
        del context
        deltas, stats = uploads[0].message
        stats = _input_gaussians.pool(uploads[0].id, stats, between=exact)
        gaussians = _input_gaussians.maximise(
            server.gaussians, stats, strength, shrinkage
        )
        started = server.started | jnp.any(stats.count > 0)
        gaussians = _input_gaussians.spread(key, gaussians, started & ~server.started)
        predictors = _components.move(server.predictors, deltas)
        return Server(predictors, gaussians, started), {"fewest": jnp.min(stats.count)}

    def personalise(context, key, proportions, server, data):
        del key
        return _components.fit_proportions(
            density(context, server),
            e_step,
            proportions,
            data,
            schedule.batch_size,
            adapt_steps,
        )

    def predict(context, server, proportions, x):
        inputs = mixture.gaussian_log_density(embed(x), *server.gaussians)
        # The authors' code adds the shares themselves.
        shares = _components.log_shares(proportions) if exact else proportions
        weight = jax.nn.softmax(inputs[:, :, None] + shares[None], axis=(1, 2))
        log_weight = _components.log_shares(jnp.sum(weight, axis=1))  # w(k | x)
        return _components.mix(context.model, server.predictors, log_weight, x)

    def predict_global(context, server, x):
        return predict(context, server, uniform, x)

    functions = init, download, local, aggregate, predict, personalise
    return Algorithm(*functions, predict_global=predict_global)
