"""VAEs as the components of a mixture that clients share, on an axis `[k, ...]`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import logsumexp

from fedgen.aggregators import mixture
from fedgen.algorithms import _components
from fedgen.core import fit
from fedgen.core.algorithm import Mean, Metrics
from fedgen.core.federation import Batch, Data, Model, Params
from fedgen.core.fit import Schedule

DENSITIES = ("x", "xy", "cvae")
LIKELIHOODS = ("bernoulli", "continuous_bernoulli", "normal")
_RESAMPLE = 1 << 30  # a key beyond those that `fit` makes by splitting
_RARE = 0.01  # share of uniform labels in p_k(y), so that no label is impossible


class Components(NamedTuple):
    """All that describes the inherent distributions."""

    vaes: Params  # phi_k, leaves [k, ...]
    classifiers: Params  # w_k, leaves [k, ...]
    labels: Any  # [k, c] frequencies p_k(y), or () if the density asks for none


class Sent(NamedTuple):
    """Displacements of some components only."""

    index: jax.Array  # [u] which
    delta: Params  # leaves [u, ...]
    weight: jax.Array  # [u]


class Density(NamedTuple):
    """How components give densities; `vae` is a `fedgen.models.vae.Vae`."""

    vae: Any
    likelihood: str
    kind: str

    def bound(
        self,
        params: Params,
        key: jax.Array,
        x: jax.Array,
        y: jax.Array | None = None,
        *,
        num_samples: int = 1,
    ) -> jax.Array:
        """Bound the log density of inputs under one VAE from below, in nats.

        With one sample, which is what training uses, the divergence is taken in closed
        form; with more, the bound is importance-weighted.

        Args:
          params: Weights of the VAE.
          key: Of the noise. Components are comparable under the same key.
          x: `[b, ...]`. For Bernoulli likelihoods -1 is black and 1 is white.
          y: `[b]`, for a conditional VAE.
          num_samples: Samples `l` of the code.

        Returns:
          `[b]`, a sum over features.
        """
        target = x.reshape(x.shape[0], -1)
        if self.likelihood != "normal":
            target = jnp.clip((target + 1) / 2, 0, 1)

        def log_prob(_, z):
            out = self.vae.decode(params, z, y)
            if self.likelihood == "normal":
                return mixture.normal_log_prob(target, out, params["log_variance"])
            if self.likelihood == "bernoulli":
                return mixture.bernoulli_log_prob(target, out)
            return mixture.continuous_bernoulli_log_prob(target, out)

        return mixture.vae_log_density(
            key,
            x,
            lambda x: self.vae.encode(params, x, y),
            log_prob,
            num_samples=num_samples,
            bound="elbo" if num_samples == 1 else "importance",
        )

    def joint(
        self,
        model: Model,
        components: Components,
        key: jax.Array,
        batch: Batch,
        num_samples: int,
    ) -> jax.Array:
        """Compute the log densities that responsibilities are fit to, `[b, k]`."""
        y = batch.y if self.kind == "cvae" else None

        def of_one(params):
            return self.bound(params, key, batch.x, y, num_samples=num_samples)

        table = jax.vmap(of_one, out_axes=1)(components.vaes)
        if self.kind == "xy":
            table -= _components.losses(model, components.classifiers, batch)
        if self.kind == "cvae":
            table += _log_labels(components.labels)[:, batch.y].T
        return table

    def marginal(
        self, components: Components, key: jax.Array, x: jax.Array, num_samples: int
    ) -> jax.Array:
        """Compute the log densities of inputs alone, `[b, k]`, legal at test time."""

        def of_one(params, log_labels):
            if self.kind != "cvae":
                return self.bound(params, key, x, num_samples=num_samples)

            def of_label(label, log_label):
                y = jnp.full(x.shape[:1], label)
                return log_label + self.bound(
                    params, key, x, y, num_samples=num_samples
                )

            number = jnp.arange(log_labels.shape[0])
            return logsumexp(jax.vmap(of_label)(number, log_labels), axis=0)

        labels = components.labels
        log_labels = _log_labels(labels) if self.kind == "cvae" else labels
        return jax.vmap(of_one, out_axes=1)(components.vaes, log_labels)


def _log_labels(labels: jax.Array) -> jax.Array:
    return jnp.log((1 - _RARE) * labels + _RARE / labels.shape[-1])


# The samples of the E-step, and the M-step by resampling.


def subset(key: jax.Array, data: Data, limit: int) -> Data:
    """Keep at most `limit` samples, so that the E-step's table has a static shape.

    Returns:
      The same client with an `order [limit]` of its own: the old one if all samples
      fit, and otherwise a run of it from a random place on, over its end.
    """
    slot, held = jnp.arange(limit), jnp.maximum(data.size, 1)
    first = jnp.where(data.size > limit, jax.random.randint(key, (), 0, held), 0)
    return data._replace(
        order=data.order[data.start + (first + slot) % held],
        start=jnp.zeros_like(data.start),
        size=jnp.minimum(data.size, limit),
    )


def resample(key: jax.Array, data: Data, responsibility: jax.Array) -> Data:
    """Draw one component's samples, as many as it is responsible for.

    Systematic resampling: sample `s` appears `r_s` times on average, rounded up or
    down. Where all responsibilities are 1, nothing changes.

    Args:
      key: Consumed.
      data: A `subset`, `order [s]`.
      responsibility: `[s]`, 0 where there is no sample.
    """
    cumulative = jnp.cumsum(responsibility)
    size = jnp.round(cumulative[-1]).astype(jnp.int32)
    spacing = cumulative[-1] / jnp.maximum(size, 1)
    # Below 1 by more than a rounding of the largest position.
    first = jax.random.uniform(key, maxval=1 - 2.0**-10)
    position = (jnp.arange(cumulative.shape[0]) + first) * spacing
    drawn = jnp.searchsorted(cumulative, position, side="right")
    drawn = jnp.minimum(drawn, jnp.maximum(data.size - 1, 0))
    return data._replace(order=data.order[drawn], size=size)


def train(
    loss: fit.Loss,
    optimizer: optax.GradientTransformation,
    components: Params,
    key: jax.Array,
    data: Data,
    responsibility: jax.Array,
    schedule: Schedule,
) -> tuple[Params, Metrics]:
    """Train every component on samples drawn by its responsibilities: the M-step.

    One component after another, so that the steps add up to those of one model.

    Args:
      loss: `(params, batch, key)`, a mean over the batch's samples.
      optimizer: Restarted, and separate for every component.
      components: Leaves `[k, ...]`.
      key: The first component gets it as it is.
      data: A `subset`, `order [s]`.
      responsibility: `[s, k]`.
      schedule: Local epochs or steps, and minibatch.

    Returns:
      Displacements `[k, ...]`; mean loss of a step, and number of steps.
    """
    num_components = responsibility.shape[1]
    others = [jax.random.fold_in(key, k) for k in range(1, num_components)]

    def one(args):
        own, params, responsibility = args
        drawn = resample(jax.random.fold_in(own, _RESAMPLE), data, responsibility)
        if schedule.steps is not None:
            share = drawn.size / jnp.maximum(data.size, 1)
            drawn = drawn._replace(work=drawn.work * share)
        trained, metrics = fit.fit(loss, optimizer, params, own, drawn, schedule)
        return jax.tree.map(jnp.subtract, trained, params), metrics

    keys = jnp.stack([key, *others])
    delta, metrics = jax.lax.map(one, (keys, components, responsibility.T))
    steps = metrics["steps"]
    total = jnp.sum(steps, dtype=steps.dtype)
    loss = jnp.sum(metrics["loss"] * steps) / jnp.maximum(total, 1)
    return delta, {"loss": loss, "steps": total}


# Messages.


def choose(
    key: jax.Array, responsibility: jax.Array, upload: str, num_sent: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose the components that a client trains and sends.

    Args:
      key: Consumed by "sampled".
      responsibility: `[s, k]`.
      upload: "all"; "top", those of the largest `n_k = sum_s r_sk`; or "sampled", one
        drawn in proportion to `n_k`, whose weight `n_k / pi_k` is then `n`.
      num_sent: How many for "top".

    Returns:
      Components `[u]`, their weights in the server's mean `[u]`, and responsibilities
      `[s, k]` of these components only. Less than half a sample counts as none.
    """
    count = jnp.sum(responsibility, axis=0)
    num_components = count.shape[0]
    if upload == "all":
        index, weight = jnp.arange(num_components), count
    elif upload == "top":
        weight, index = jax.lax.top_k(count, num_sent)
    else:
        index = jax.random.categorical(key, jnp.log(count))[None]
        weight = jnp.sum(count)[None]
    weight = jnp.where(jnp.round(count)[index] > 0, weight, 0.0)
    kept = jnp.zeros(num_components).at[index].set(1.0)
    return index, weight, responsibility * kept[None]


def to_message(
    index: jax.Array, weight: jax.Array, delta: Params, upload: str, dtype: Any
) -> Any:
    """Pack displacements `[k, ...]` in the precision of the wire."""
    delta = jax.tree.map(lambda a: a.astype(dtype), delta)
    if upload == "all":
        return _components.to_message(delta, weight)
    return Sent(index, jax.tree.map(lambda a: a[index], delta), weight)


def move(components: Params, message: Any) -> tuple[Params, jax.Array]:
    """Add mean displacements; what nobody sent stays as it is.

    Returns:
      Components `[k, ...]` and the weight `[k]` behind each.
    """
    if not isinstance(message, Sent):
        weight = jnp.stack([mean.weight for mean in message])
        return _components.move(components, message), weight
    index, each = message.index.reshape(-1), message.weight.reshape(-1)
    num_components = jax.tree.leaves(components)[0].shape[0]
    total = jnp.zeros(num_components).at[index].add(each)
    share = each / jnp.where(total > 0, total, 1.0)[index]

    def add(old, delta):
        delta = delta.reshape(-1, *old.shape[1:]).astype(old.dtype)
        weighted = share.reshape(-1, *[1] * (old.ndim - 1)) * delta
        return old.at[index].add(weighted)

    return jax.tree.map(add, components, message.delta), total


def mean_labels(y: jax.Array, responsibility: jax.Array, num_classes: int) -> Mean:
    """Compute a client's label frequencies `[k, c]` of every component."""
    count = jnp.sum(responsibility, axis=0)[:, None]
    total = responsibility.T @ jax.nn.one_hot(y, num_classes)
    return Mean(total / jnp.maximum(count, 1e-6), count)
