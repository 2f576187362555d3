"""FedGMI: inherent distributions as VAEs, of which every client is a mixture.

Hou, Shi, Fan and Letaief, FedGMI, arXiv:2605.08760. Only the abstract was available:
VAEs estimate the densities of distributions that all clients share and infer each
client's proportions of them. The rest is a RECONSTRUCTION:

    p_i(x, y) = sum_k pi_ik p_k(x) p_k(y | x)
    F = sum_is logsumexp_k(log pi_ik + ELBO_k(x_is))                     (objective)
    r_isk = softmax_k(log pi_ik + ELBO_k(x_is)), pi_ik = mean_s r_isk    (E-step)
    phi_k <- sum_i n_ik phi_ik / sum_i n_ik, w_k alike, n_ik = sum_s r_isk
    p_i(y | x) = sum_k rho_ik(x) p_k(y | x), rho_ik as r_isk, of x       (prediction)

The E-step is exact ascent of F in closed form, pi fitted until it rests. In the M-step
a client trains VAE and classifier k on samples drawn by r_.k, n_ik of them per epoch.
Losses weighted by r would need k times the steps and a normaliser for every batch.

VAEs that start at random end worse than a uniform guess: which one is ahead takes all
samples. So training has stages, this project's own remedy. `stage_of` reads them off
the server's counters, for the engine runs one algorithm: they differ in numbers, never
in shapes, and are compiled once.

1. Shared, `pretrain_rounds`: FedAvg of one VAE and one classifier.
2. Seeding: clients say how well the seeds so far explain their samples. The one that
   they explain worst is chosen (`next_seed`) and, in the next round, fine-tunes the
   shared VAE, which becomes a component. The first of these clients serves to find the
   second and is dropped. That takes `2 (k + 1) + 1` rounds, in which the classifier
   goes on as before, and `k + 1` columns of the cross-density matrix of
   `mixture.farthest_first`: the whole would cost every client all others' VAEs. If the
   chosen client is absent, one is chosen anew.
3. Annealing, `anneal_rounds`: `r_isk = softmax_k((ELBO_k - b_k) / tau)`, without pi,
   which must not be fitted at a temperature. The offset b_k, known to all, makes
   components' masses equal: first by their mean ELBO, then by one step of Sinkhorn's
   algorithm a round.
4. EM.

With one component only stage 1 is left, whose classifier is FedAvg's.

Communication is saved by `upload` (only the largest components, or a sampled one),
`vae_every` (lazy VAEs), `hidden` and `latent` (narrow VAEs), and `payload` (precision).
The engine reads bytes off shapes. What a round needs in its stage is in the metrics
`bytes_up` and `bytes_down`: of stages 1 and 2, and of lazy VAEs, it is less.

Does a run go astray? With `truth`, the inherent distribution of every pool row,
`anneal_rounds` M-steps from the true responsibilities replace stages 2 and 3. EM must
stay there: `fedgmi_estimates.proportion_error` has to be as small at the end as at the
start of stage 4. If it is not, VAEs are trained too little, and no start will help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedgen.aggregators import mixture
from fedgen.algorithms import _components, _fedgmi_stages, _vae_mixture
from fedgen.algorithms._fedgmi_stages import Plan, Progress
from fedgen.algorithms._vae_mixture import (
    DENSITIES,
    LIKELIHOODS,
    Components,
    Density,
)
from fedgen.core import fit, tree
from fedgen.core.algorithm import Algorithm
from fedgen.core.federation import Params
from fedgen.core.fit import Schedule

GATES = ("posterior", "prior", "params")
UPLOADS = ("all", "top", "sampled")
PAYLOADS = ("float32", "bfloat16", "float16")

VaeFactory = Callable[[tuple[int, ...], int], Any]


class Server(NamedTuple):
    """All that clients share, and where training is."""

    components: Components
    progress: Progress


class Message(NamedTuple):
    """What a client sends."""

    vaes: Any
    classifiers: Any
    labels: Any  # mean label frequencies [k, c], or ()
    told: jax.Array  # [k] mean log density while seeding, mean responsibility after


def fedgmi(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    num_components: int = 2,
    density: str = "x",
    likelihood: str = "bernoulli",
    gate: str = "posterior",
    hidden: int = 128,
    latent: int = 16,
    vae_epochs: int = 5,
    vae_learning_rate: float = 2e-3,
    pretrain_rounds: int = 8,
    seed_epochs: int = 30,
    anneal_rounds: int = 8,
    temperature: float = 30.0,
    concentration: float = 1.0,
    num_samples: int = 8,
    max_samples: int = 1024,
    upload: str = "all",
    num_sent: int = 1,
    vae_every: int = 1,
    payload: str = "float32",
    truth: np.ndarray | None = None,
    vae: VaeFactory | None = None,
) -> Algorithm:
    """Build FedGMI.

    Args:
      optimizer: Local optimiser of the classifiers, restarted every round.
      schedule: Their local epochs E, or steps, and minibatch B.
      num_components: k, at least 1; see `fedgmi_estimates.cross_density`.
      density: What VAEs describe: inputs "x"; "xy", inputs, times the classifiers'
        p_k(y | x) in training; or "cvae", inputs given the label, times label
        frequencies. Components that differ in labels only need "xy".
      likelihood: Of the decoders: "bernoulli" or "continuous_bernoulli" for images,
        "normal" with a learnt variance for features.
      gate: rho, "posterior"; "prior", pi; or "params", one classifier of mean weights.
      hidden: Hidden units of a VAE.
      latent: Size q of its codes.
      vae_epochs: Local epochs of VAEs, at least 1.
      vae_learning_rate: Of Adam for VAEs, restarted every round, above 0.
      pretrain_rounds: Rounds of the shared VAE, at least 1.
      seed_epochs: Epochs of its fine-tuning by a seed, at least 1.
      anneal_rounds: Rounds of annealing, at least 0.
      temperature: tau of the first of them, which falls geometrically to 1, at least 1.
      concentration: a of a Dirichlet prior of pi, at least 1.
      num_samples: Importance samples, at least 1, of a client's own model; training
        takes one.
      max_samples: Samples that a client uses in a round, at least 1; random ones if
        it has more.
      upload: "all" components; "top", those of most samples; or "sampled", one.
      num_sent: How many for "top", from 1 to k.
      vae_every: Rounds from one update of VAEs to the next in stages 3 and 4.
      payload: Precision of weights on the wire, "float32", "bfloat16" or "float16".
      truth: `[rows]` inherent distribution of every pool row, for the diagnosis above.
      vae: Builds another `fedgen.models.vae.Vae` from the shape of a sample and the
        number of classes; `hidden` and `latent` are then not used.

    Raises:
      ValueError: If an argument is out of range.
    """
    _components.check_at_least(
        1,
        num_components=num_components,
        vae_epochs=vae_epochs,
        pretrain_rounds=pretrain_rounds,
        seed_epochs=seed_epochs,
        temperature=temperature,
        concentration=concentration,
        num_samples=num_samples,
        max_samples=max_samples,
        num_sent=num_sent,
        vae_every=vae_every,
    )
    _components.check_at_least(0, anneal_rounds=anneal_rounds)
    for name, value, choices in (
        ("density", density, DENSITIES),
        ("likelihood", likelihood, LIKELIHOODS),
        ("gate", gate, GATES),
        ("upload", upload, UPLOADS),
        ("payload", payload, PAYLOADS),
    ):
        _components.check_choice(name, value, choices)
    if not 0 < vae_learning_rate < math.inf:
        raise ValueError(
            f"vae_learning_rate must be > 0 and finite, got {vae_learning_rate}"
        )
    if num_sent > num_components:
        raise ValueError(f"num_sent must be <= {num_components}, got {num_sent}")
    if truth is not None:
        truth = jnp.asarray(truth, jnp.int32)

    uniform = jnp.full(num_components, 1 / num_components, jnp.float32)
    vae_optimizer = optax.adam(vae_learning_rate)
    vae_schedule = Schedule(schedule.batch_size, vae_epochs)
    plan = Plan(num_components, pretrain_rounds, anneal_rounds, temperature, vae_every)

    if vae is None:
        vae = perceptrons(density, likelihood, hidden, latent)

    def density_of(shape, num_classes):
        return Density(vae(tuple(shape), num_classes), likelihood, density)

    def init(key, federation):
        model = federation.only_model("FedGMI")
        c, n = federation.num_classes, federation.cohorts[0].num_clients
        kind = density_of(federation.pool.x.shape[1:], c)
        components = Components(
            tree.broadcast(kind.vae.init(jax.random.fold_in(key, 1)), num_components),
            tree.broadcast(model.init(key), num_components),
            jnp.full((num_components, c), 1 / c) if density == "cvae" else (),
        )
        seeded = num_components == 1 or truth is not None
        clients = tree.broadcast(uniform, n)
        return Server(components, plan.start(seeded=seeded)), (clients,)

    def cast(components, dtype):
        vaes, classifiers = jax.tree.map(
            lambda a: a.astype(dtype), (components.vaes, components.classifiers)
        )
        return components._replace(vaes=vaes, classifiers=classifiers)

    def download(context, server, id_):
        del context
        progress = server.progress
        return Server(
            cast(server.components, payload),
            progress._replace(asked=progress.asked == id_),
        )

    def tabulate(context, components, key, data, num_samples):
        """Compute log densities `[s, k]` of a subset, and which rows `[s]` count."""
        kind = density_of(data.pool.x.shape[1:], context.num_classes)

        def of_batch(key, batch):
            return kind.joint(context.model, components, key, batch, num_samples)

        table = _vae_mixture.tabulate(
            of_batch, num_components, key, data, schedule.batch_size
        )
        return table, jnp.arange(max_samples) < data.size

    def fit_proportions(table, mask):
        return mixture.fit_proportions(
            table, mask, concentration=concentration, tolerance=1e-4, max_steps=200
        )

    def e_step(stage, offset, table, mask, rows):
        """Compute responsibilities `[s, k]` and proportions `[k]` in stages 3 and 4."""
        proportions = jnp.where(stage.annealing, uniform, fit_proportions(table, mask))
        offset = jnp.where(stage.annealing, offset, 0.0)
        tempered = (table - offset[None]) / stage.temperature
        r = _components.responsibilities(tempered, proportions, mask)
        if truth is not None:
            true = jax.nn.one_hot(truth[rows], num_components) * mask[:, None]
            r = jnp.where(stage.annealing, true, r)
        return r, proportions

    def assign(stage, progress, r, mask):
        """Say which samples `[s, k]` VAEs and classifiers are trained on."""
        alone, seed = (
            mask[:, None] * jax.nn.one_hot(k, num_components)[None]
            for k in (0, _fedgmi_stages.slot(progress))
        )
        vae = jnp.where(stage.seeding, seed * progress.asked, r * ~stage.lazy)
        vae = jnp.where(stage.shared, alone, vae)
        return vae, jnp.where(stage.alone, alone, r)

    def local(context, key, client, server, data):
        del client
        keys = jax.random.split(jax.random.fold_in(key, num_components), 4)
        components, progress = cast(server.components, jnp.float32), server.progress
        stage = plan.stage(progress)
        size = jnp.maximum(data.size, 1)
        data = _vae_mixture.subset(keys[0], data, max_samples)
        scale = size / jnp.maximum(data.size, 1)
        table, mask = tabulate(context, components, keys[1], data, 1)
        r, proportions = e_step(stage, progress.offset, table, mask, data.order)
        r_vae, r_classifier = assign(stage, progress, r, mask)
        kind = density_of(data.pool.x.shape[1:], context.num_classes)

        def vae_loss(params, batch, key):
            y = batch.y if density == "cvae" else None
            return -fit.masked_mean(kind.bound(params, key, batch.x, y), batch.mask)

        def classifier_loss(params, batch, key):
            del key
            return fit.cross_entropy(context.model.apply(params, batch.x), batch)

        def m_step(key, loss, optimizer, start, data, r, schedule):
            index, weight, r = _vae_mixture.choose(keys[2], r, upload, num_sent)
            delta, metrics = _vae_mixture.train(
                loss, optimizer, start, key, data, r, schedule
            )
            weight = scale * weight
            message = _vae_mixture.to_message(index, weight, delta, upload, payload)
            return message, metrics, jnp.sum(weight > 0) * one(start)

        fine_tuning = jnp.where(stage.seeding, seed_epochs / vae_epochs, 1.0)
        vaes, vae_metrics, vae_bytes = m_step(
            keys[3],
            vae_loss,
            vae_optimizer,
            starts(stage, components.vaes),
            data._replace(work=data.work * fine_tuning),
            r_vae,
            vae_schedule,
        )
        classifiers, metrics, classifier_bytes = m_step(
            key,
            classifier_loss,
            optimizer,
            components.classifiers,
            data,
            r_classifier,
            schedule,
        )
        labels = ()
        if density == "cvae":
            labels = _vae_mixture.mean_labels(
                data.pool.y[data.order], scale * r_classifier, context.num_classes
            )
        told = jnp.where(stage.seeding, table, r) * mask[:, None]
        told = jnp.sum(told, axis=0) / jnp.maximum(data.size, 1)
        message = Message(vaes, classifiers, labels, told)
        received = jnp.where(stage.shared, 1, num_components) * ~stage.lazy
        received = received * one(components.vaes)
        received += jnp.where(stage.alone, 1, num_components) * one(
            components.classifiers
        )
        metrics = {
            "loss": metrics["loss"],
            "vae_loss": vae_metrics["loss"],
            "steps": metrics["steps"] + vae_metrics["steps"],
            "bytes_down": received,
            "bytes_up": vae_bytes + classifier_bytes,
        }
        em = ~(stage.alone | stage.annealing)
        return jnp.where(em, proportions, uniform), message, metrics

    def starts(stage, vaes):
        """Return what VAEs are trained from: while seeding, the shared one."""
        return tree.where(stage.seeding, _all_as(vaes, -1), vaes)

    def one(components):
        """Count the bytes of one component on the wire."""
        count = sum(a.size for a in jax.tree.leaves(components)) / num_components
        return jnp.float32(count * jnp.dtype(payload).itemsize)

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        stage = plan.stage(server.progress)
        message, old = upload.message, server.components
        vaes, weight = _vae_mixture.move(starts(stage, old.vaes), message.vaes)
        vaes = tree.where(weight > 0, vaes, old.vaes)
        classifiers, _ = _vae_mixture.move(old.classifiers, message.classifiers)
        labels = old.labels
        if density == "cvae":
            mean = message.labels
            labels = tree.where(mean.weight[:, 0] > 0, mean.value, labels)
        components = Components(
            tree.where(stage.shared, _all_as(vaes, 0), vaes),
            *tree.where(
                stage.alone,
                _all_as((classifiers, labels), 0),
                (classifiers, labels),
            ),
        )
        progress = plan.advance(
            server.progress, message.told, upload.weight, upload.id, jnp.any(weight > 0)
        )
        return Server(components, progress), {"temperature": stage.temperature}

    def personalise(context, key, client, server, data):
        del client
        keys = jax.random.split(key)
        data = _vae_mixture.subset(keys[0], data, max_samples)
        components = cast(server.components, jnp.float32)
        table, mask = tabulate(context, components, keys[1], data, num_samples)
        return fit_proportions(table, mask)

    def predict(context, server, proportions, x):
        components, log_weight = server.components, _components.log_shares(proportions)
        if gate == "params":
            mean = tree.weighted_mean(components.classifiers, proportions)
            return context.model.apply(mean, x)
        log_weight = log_weight[None]
        if gate == "posterior":
            kind = density_of(x.shape[1:], context.num_classes)
            # The same noise for all inputs' components, and no key to be given.
            log_weight += kind.marginal(components, jax.random.key(0), x, num_samples)
        log_weight = jax.nn.log_softmax(log_weight)
        return _components.mix(context.model, components.classifiers, log_weight, x)

    def predict_global(context, server, x):
        return predict(context, server, uniform, x)

    return Algorithm(
        init,
        download,
        local,
        aggregate,
        predict,
        personalise,
        predict_global=predict_global,
    )


def perceptrons(
    density: str, likelihood: str, hidden: int = 128, latent: int = 16
) -> VaeFactory:
    """Return the builder of VAEs that `fedgmi` uses; arguments as there."""

    def build(shape, num_classes):
        # Here, so that to import the algorithms does not load flax.
        from fedgen.models.vae import mlp_vae

        return mlp_vae(
            shape,
            num_classes,
            hidden=hidden,
            latent=latent,
            conditional=density == "cvae",
            learn_variance=likelihood == "normal",
        )

    return build


def _all_as(components: Params, k: int) -> Params:
    return jax.tree.map(lambda a: jnp.broadcast_to(a[k], a.shape), components)
