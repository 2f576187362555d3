"""The stages of FedGMI, read off counters of the server: see `fedgmi`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Progress(NamedTuple):
    """Where training is."""

    offset: jax.Array  # [k] b, nats
    clock: jax.Array  # [] int32 rounds, those of seeding left out
    planted: jax.Array  # [] int32 VAEs planted; one more when seeding is over
    asked: jax.Array  # [] int32 client that plants a VAE, -1 if none does


class Stage(NamedTuple):
    """What a round is for; EM if neither of the first three."""

    shared: jax.Array  # [] bool
    seeding: jax.Array  # [] bool
    annealing: jax.Array  # [] bool
    lazy: jax.Array  # [] bool, whether VAEs rest
    temperature: jax.Array  # [] float32 tau

    @property
    def alone(self) -> jax.Array:
        """Whether there is one classifier still."""
        return self.shared | self.seeding


class Plan(NamedTuple):
    """How long the stages last; fields as the arguments of `fedgmi`."""

    num_components: int
    pretrain_rounds: int
    anneal_rounds: int
    temperature: float
    vae_every: int

    @property
    def rooted(self) -> int:
        """What `planted` is when all seeds are planted and measured."""
        return self.num_components + 2

    def start(self, *, seeded: bool) -> Progress:
        """Begin, with seeding to come or not."""
        return Progress(
            jnp.zeros(self.num_components),
            jnp.int32(0),
            jnp.int32(self.rooted if seeded else 0),
            jnp.int32(-1),
        )

    def stage(self, progress: Progress) -> Stage:
        """Tell what the round is for."""
        after = progress.clock - self.pretrain_rounds
        shared = after < 0
        seeding = ~shared & (progress.planted < self.rooted)
        later = ~shared & ~seeding
        annealing = later & (after < self.anneal_rounds)
        left = 1 - after / max(self.anneal_rounds, 1)
        tau = jnp.where(annealing, self.temperature**left, 1.0)
        return Stage(
            shared,
            seeding,
            annealing,
            later & (after % self.vae_every != 0),
            tau.astype(jnp.float32),
        )

    def advance(
        self,
        progress: Progress,
        told: jax.Array,
        weight: jax.Array,
        id_: jax.Array,
        planted: jax.Array,
    ) -> Progress:
        """Choose the next seed, move the offsets, count the round.

        Args:
          progress: Of the round that ends.
          told: `[m, k]` what clients told of every component: while seeding, the mean
            log density of their samples; later, their mean responsibility.
          weight: `[m]` their samples, 0 for those who were absent.
          id_: `[m]` who they are.
          planted: [] bool, whether the VAE that was asked for has come.
        """
        stage = self.stage(progress)
        measuring = stage.seeding & (progress.asked < 0)
        last = measuring & (progress.planted == self.rooted - 1)
        mean = weight / jnp.maximum(jnp.sum(weight), 1) @ told  # [k]
        # One step of Sinkhorn's algorithm on the masses at this temperature.
        excess = stage.temperature * jnp.log(jnp.maximum(mean, 1e-3))
        offset = progress.offset + jnp.where(stage.annealing, excess, 0.0)
        offset = jnp.where(last, mean, offset)
        seed = next_seed(told, weight, id_, _num_seeds(progress))
        return Progress(
            offset - jnp.mean(offset),
            progress.clock + ~stage.seeding,
            progress.planted + (last | (stage.seeding & planted)),
            jnp.where(measuring & ~last, seed, -1),
        )


def slot(progress: Progress) -> jax.Array:
    """Return the component that the next VAE becomes, [] int32.

    The second VAE takes the place of the first; the shared one is last until then.
    """
    return jnp.maximum(progress.planted - 1, 0)


def _num_seeds(progress: Progress) -> jax.Array:
    return jnp.minimum(progress.planted, jnp.maximum(progress.planted - 1, 1))


def next_seed(
    log_density: jax.Array, weight: jax.Array, id_: jax.Array, num_seeds: jax.Array
) -> jax.Array:
    """Find the client whose samples the seeds explain worst: farthest-first.

    The distance of a client from a seed is what the seed's VAE loses, on that client's
    samples, to the VAE that all clients share, which makes up for samples that are
    difficult under any. It is linear in the client's proportions, hence largest for a
    pure client. Without a seed, the client that the shared VAE explains worst. Clients
    with less than half of the mean number of samples are no seeds.

    Args:
      log_density: `[m, k]` mean over every client's samples. The first components are
        the seeds, the last is the shared VAE.
      weight: `[m]` samples of every client, 0 for absent ones.
      id_: `[m]`.
      num_seeds: [] int32.

    Returns:
      The client's id, -1 if all are absent; ties go to the lower id.
    """
    shared = log_density[:, -1:]
    seed = jnp.arange(log_density.shape[1])[None] < num_seeds
    nearest = jnp.min(jnp.where(seed, shared - log_density, jnp.inf), axis=1)
    score = jnp.where(num_seeds > 0, nearest, -shared[:, 0])
    present = weight > 0
    typical = jnp.sum(weight) / jnp.maximum(jnp.sum(present), 1)
    score = jnp.where(present & (weight >= typical / 2), score, -jnp.inf)
    best = present & (score == jnp.max(score))
    lowest = jnp.min(jnp.where(best, id_, jnp.iinfo(id_.dtype).max))
    return jnp.where(jnp.any(best), lowest, -1)
