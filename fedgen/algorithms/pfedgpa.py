"""pFedGPA: the server generates each client's parameters with a diffusion model.

Lai et al., "pFedGPA: Diffusion-based Generative Parameter Aggregation for Personalized
Federated Learning", AAAI 2025 (arXiv:2409.05701), Algorithm 1. Reconstructed: of the
paper the abstract and Algorithm 1 were at hand, its equation 15 (the inversion) was
not, there is no released code, and no published number is claimed as reproduced.

As in Algorithm 1: a client sends its parameters and is sent parameters, as in FedAvg;
the server trains a denoiser on what was uploaded, turns each upload into a latent code
and generates from it what the client starts from next. A newcomer alternates a local
update with denoising steps guided by its own displacement. The server takes these
steps, since clients never see the denoiser; a newcomer's first `newcomer_rounds`
uploads teach it nothing (but a body that is averaged learns from everybody). Clients
that were never generated for start from the population's mean.

Choices made here (see also `aggregators/diffusion.py`):

- Inversion: noise maps ("noise_maps", A, the reading that fits the text best), "ddim"
  (B) or "noising" (C). With version A and `gamma=1` a client gets back what it sent.
- Rounds of FedAvg come first, of which the algorithm knows none (`warmup=0`).
- What is modelled are deviations from the round's mean (`center=False`: parameters), as
  `rank` principal components (None: the vector itself), where the paper has an
  auto-encoder, in units of their size. Of what the components leave out, rho is kept.
- The denoiser is a residual perceptron on top of the best linear denoiser, trained on
  the last `memory` uploads of each client, with a little noise. Its average generates.
- Whatever is not finite, or moves further than `max_move` population standard
  deviations, is not sent: the client gets its own upload back. A denoiser that
  diverges stops the run all the same, which names the round.
- A round's mean is that of its participants. With few of them a round it wanders, and
  what the memory holds are deviations from different means.

Two controls belong in every table: `generator="none"` sends clients what they uploaded,
so that after the warm-up each trains alone; `generator="linear"` shrinks principal
components as the best linear denoiser would on average, without any diffusion.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedgen.aggregators import diffusion
from fedgen.algorithms import _options
from fedgen.algorithms._pfedgpa_population import (
    VERSIONS,
    Codec,
    Learner,
    Replay,
    fit_codec,
    init_learner,
    learn,
    linear_factor,
    regenerate,
    within,
)
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm, Mean
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule

GENERATORS = ("diffusion", "linear", "none")
LAYERS = ("all", "head")


class Server(NamedTuple):
    """All that the server knows; what a generator does not need is empty."""

    round: jax.Array  # [] int32
    params: Params  # the population's mean, FedAvg's model
    sent: jax.Array  # [n, p] generated for each client
    known: jax.Array  # [n] bool, whether anything was
    guided: jax.Array  # [n] int32 rounds left to a client as a newcomer
    replay: Replay | tuple[()]
    directions: jax.Array | tuple[()]  # [r, p] of the codes of the last round
    learner: Learner | tuple[()]


def pfedgpa(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    generator: str = "diffusion",
    version: str = "noise_maps",
    layers: str = "all",
    warmup: int = 10,
    memory: int = 5,
    rank: int | None = 8,
    rho: float = 0.5,
    center: bool = True,
    scale: str = "scalar",
    num_times: int = 1000,
    depth: int = 100,
    steps: int = 6,
    gamma: float = 0.5,
    eta: float = 0.0,
    denoiser_steps: int = 100,
    denoiser_batch: int = 64,
    denoiser_rate: float = 1e-3,
    denoiser_width: int = 256,
    jitter: float = 0.02,
    decay: float = 0.99,
    max_move: float = 2.0,
    newcomer_rounds: int = 2,
    omega: float = 0.0,
) -> Algorithm:
    """Build pFedGPA.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs or steps, and minibatch; also of the local update after
        which a client is evaluated.
      generator: "diffusion", or a control: "linear" or "none".
      version: Inversion by "noise_maps" (A), "ddim" (B) or "noising" (C).
      layers: "all" parameters are generated, or only those of the "head", with the
        body averaged.
      warmup: Rounds of FedAvg, during which the denoiser trains too.
      memory: Uploads B kept of each client.
      rank: Principal components r, cut to what there may be; None for no basis.
      rho: Share kept of what lies outside the components, in [0, 1].
      center: Whether the mean of the round is taken off before anything else.
      scale: What codes are divided by: one number ("scalar") or one a "coordinate".
      num_times: Times T of the linear schedule.
      depth: Time of the latent code, in [steps, num_times].
      steps: Steps of inversion, of generation, and of a newcomer's denoising (s).
      gamma: Strength of the code, in [0, 1]: of its noise maps in version A, of its
        latent in B and C, which want values near 1.
      eta: Share of fresh noise, in [0, 1], in versions B and C and for newcomers.
      denoiser_steps: Steps of Adam in a round.
      denoiser_batch: Codes of such a step.
      denoiser_rate: Learning rate of Adam.
      denoiser_width: Hidden units.
      jitter: Standard deviation of the noise added to codes in training, in units of
        their size.
      decay: Of the average of the denoiser's weights, in [0, 1).
      max_move: Longest way from an upload to what is sent for it, in standard
        deviations of the population; may be infinite.
      newcomer_rounds: Rounds I of guided denoising for clients first seen after the
        warm-up; 0 treats them like all others.
      omega: Strength of their guidance, at least -1, at which it is off.

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_choice("generator", generator, GENERATORS)
    _options.check_choice("version", version, VERSIONS)
    _options.check_choice("layers", layers, LAYERS)
    _options.check_choice("scale", scale, diffusion.SCALES)
    _options.check_at_least(
        0,
        warmup=warmup,
        denoiser_steps=denoiser_steps,
        jitter=jitter,
        newcomer_rounds=newcomer_rounds,
    )
    _options.check_at_least(
        1,
        memory=memory,
        steps=steps,
        denoiser_batch=denoiser_batch,
        denoiser_width=denoiser_width,
    )
    _options.check_at_least(0, infinite=True, max_move=max_move)
    _options.check_at_least(-1, omega=omega)
    _options.check_share(rho=rho, gamma=gamma, eta=eta)
    _options.check_decay(decay=decay)  # At 1 the generating network never learns.
    _options.check_positive(denoiser_rate=denoiser_rate)
    if rank is not None:
        _options.check_at_least(1, rank=rank)
    if not steps <= depth <= num_times:
        raise ValueError(
            f"depth must be in [steps, num_times] = [{steps}, {num_times}], got {depth}"
        )
    times = diffusion.linear_schedule(num_times)
    adam = optax.adam(denoiser_rate)

    def own(params):
        return params if layers == "all" else params["head"]

    def with_own(params, vector):
        """Put generated parameters `[p]` into a model."""
        new = ravel_pytree(own(params))[1](vector)
        return new if layers == "all" else {**params, "head": new}

    def network(size):
        # Imported here, for flax takes long to load and few algorithms need it.
        from fedgen.models import denoiser

        built = denoiser.residual_mlp(size, width=denoiser_width)
        # Traced once, however often it is used.
        return built._replace(apply=jax.jit(built.apply, inline=True))

    def num_codes(rows, p):
        return p if rank is None else min(rank, rows, p)

    def init(key, federation):
        params = federation.only_model("pFedGPA").init(key)
        n, p = federation.cohorts[0].num_real, ravel_pytree(own(params))[0].size
        replay = directions = learner = ()
        if generator != "none":
            replay = Replay(jnp.zeros((n, memory, p)), jnp.zeros(n, jnp.int32))
        if generator == "diffusion":
            r = num_codes(n * memory, p)
            directions = () if rank is None else jnp.zeros((r, p))
            # Another key than the model's, which is FedAvg's.
            learner = init_learner(network(r).init(jax.random.fold_in(key, 1)), adam)
        return Server(
            jnp.int32(0),
            params,
            jnp.zeros((n, p)),
            jnp.zeros(n, bool),
            jnp.full(n, newcomer_rounds, jnp.int32),
            replay,
            directions,
            learner,
        ), ((),)

    def download(context, server, id_):
        del context
        n = server.known.shape[0]
        place = jnp.clip(id_, 0, n - 1)
        known = (id_ == place) & server.known[place]
        mean, _ = ravel_pytree(own(server.params))
        return with_own(server.params, jnp.where(known, server.sent[place], mean))

    def train(context, key, params, data):
        def loss(params, batch, key):
            del key
            return fit.cross_entropy(context.model.apply(params, batch.x), batch)

        return fit.fit(loss, optimizer, params, key, data, schedule)

    def local(context, key, client, params, data):
        trained, metrics = train(context, key, params, data)
        common = ()
        if layers == "head":
            delta = jax.tree.map(jnp.subtract, trained["body"], params["body"])
            common = Mean(delta, data.size)
        return client, (ravel_pytree(own(trained))[0], common), metrics

    def aggregate(context, key, server, uploads):
        del context
        (upload,) = uploads
        n, p = server.sent.shape
        vectors, common = upload.message
        # By client, since participants come in any order.
        place = jnp.where((upload.weight > 0) & (upload.id >= 0), upload.id, n)
        x = jnp.zeros((n, p)).at[place].set(vectors, mode="drop")  # theta_i
        weight = jnp.zeros(n).at[place].set(upload.weight, mode="drop")
        here = weight > 0
        generating = server.round >= warmup
        late = server.round >= max(warmup, 1)
        newcomer = here & late & (server.guided > 0)
        teaches = here & ~newcomer

        old, _ = ravel_pytree(own(server.params))
        share = jnp.where(teaches, weight, 0.0)
        share = share / jnp.maximum(jnp.sum(share), 1.0)
        mean = old + share @ (x - old[None])
        params = with_own(server.params, mean)
        if layers == "head":
            body = optax.apply_updates(server.params["body"], common.value)
            params = {**params, "body": body}
        server = server._replace(
            round=server.round + 1,
            params=params,
            guided=jnp.where(here, jnp.where(late, server.guided - 1, 0), server.guided)
            .clip(0)
            .astype(jnp.int32),
        )
        metrics = {}
        new = x
        if generator != "none":
            centre = mean if center else jnp.zeros_like(mean)
            before = jnp.where(server.known[:, None], server.sent, old[None])
            server, new, metrics = _generate(
                key, server, x, centre, before, teaches, newcomer, generating
            )
            metrics["newcomers"] = jnp.sum(newcomer, dtype=jnp.float32)
        served = here & generating
        server = server._replace(
            sent=jnp.where(served[:, None], new, server.sent),
            known=server.known | served,
        )
        return server, metrics

    def _generate(key, server, x, centre, before, teaches, newcomer, generating):
        """Learn from those who teach, and generate for all, `[n, p]`."""
        learn_key, code_key = jax.random.split(key)
        n, p = x.shape
        here = teaches | newcomer
        deviation = jnp.where(here[:, None], x - centre[None], 0.0)
        replay = server.replay.push(deviation, teaches)
        rows, weight = replay.flat()
        diffuses = generator == "diffusion"
        codec, codes = fit_codec(
            rows,
            weight,
            rank=None if rank is None else num_codes(len(rows), p),
            scale=scale,
            previous=server.directions if diffuses and rank is not None else None,
        )
        server, metrics = server._replace(replay=replay), {}
        if diffuses:
            net = network(codes.shape[1])
            base = diffusion.gaussian_denoiser(
                times, jnp.zeros(codes.shape[1]), codec.cov
            )
            learner, metrics["denoiser_loss"] = learn(
                net,
                adam,
                times,
                base,
                server.learner,
                learn_key,
                codes,
                weight,
                steps=denoiser_steps,
                batch_size=denoiser_batch,
                jitter=jitter,
                decay=decay,
            )
            directions = () if codec.basis is None else codec.basis.directions
            server = server._replace(learner=learner, directions=directions)

            def denoise(z, t):
                return base(z, t) + net.apply(learner.average, z, t)

            one = functools.partial(_diffuse, denoise, codec)
        else:
            factor = linear_factor(
                times,
                codec.cov if rank is None else jnp.diag(codec.cov),
                version=version,
                depth=depth,
                gamma=gamma,
                eta=eta,
            )
            one = functools.partial(_shrink, factor, codec)

        def everybody():
            keys = jax.vmap(jax.random.fold_in, (None, 0))(code_key, jnp.arange(n))
            start = before - centre[None]
            return centre[None] + jax.vmap(one)(keys, deviation, start, newcomer)

        new = jax.lax.cond(generating, everybody, lambda: x)
        fits, move = within(x, new, rows, weight, max_move)
        kept = here & fits
        metrics["rejected"] = jnp.sum(here & ~fits, dtype=jnp.float32)
        metrics["moved"] = jnp.sum(jnp.where(kept, move, 0.0)) / jnp.maximum(
            jnp.sum(kept), 1
        )
        return server, jnp.where(fits[:, None], new, x), metrics

    def _diffuse(denoise, codec: Codec, key, deviation, before, newcomer):
        code_key, path_key, guided_key = jax.random.split(key, 3)
        z = codec.encode(deviation)
        new = regenerate(
            denoise,
            times,
            z,
            code_key,
            path_key,
            version=version,
            depth=depth,
            steps=steps,
            gamma=gamma,
            eta=eta,
        )
        if newcomer_rounds:
            steered = diffusion.guide(
                denoise, times, codec.encode(before), z, omega=omega
            )
            guided = diffusion.sample(
                steered, times, z, depth=depth, steps=steps, eta=eta, key=guided_key
            )
            new = jnp.where(newcomer, guided, new)
        return codec.decode(deviation, new, rho)

    def _shrink(factor, codec: Codec, key, deviation, before, newcomer):
        del key, before, newcomer
        return codec.decode(deviation, factor * codec.encode(deviation), rho)

    def personalise(context, key, client, params, data):
        del client
        return train(context, key, params, data)[0]

    def receive(context, client, params):
        del context, client
        return params

    def predict(context, server, params, x):
        del server
        return context.model.apply(params, x)

    def predict_global(context, server, x):
        return context.model.apply(server.params, x)

    return Algorithm(
        init,
        download,
        local,
        aggregate,
        predict,
        personalise,
        predict_global=predict_global,
        receive=receive,
        min_rounds=warmup + 1,
    )
