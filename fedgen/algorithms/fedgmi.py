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
samples. So training has stages, this project's own remedy, read off a counter of the
server: they differ in numbers, never in shapes, and are compiled once.

1. Shared, `pretrain_rounds`: FedAvg of one VAE and one classifier. Clients also tell
   the mean of fixed random features of their samples. Such a mean is linear in a
   client's proportions, so clients lie in a simplex with the components at its
   corners, and the server finds it (`simplex.unmix`).
2. Guided, `guided_rounds`: every component begins as the shared one, and r_isk is that
   of the linear classifier of features that the corners make.
3. EM.

Farthest-first seeds, annealing and mass balance, which `fedgen.aggregators.mixture`
has, are not used. Seeds are clients, none of which need be pure; on rotated images
the error of proportions stayed several times as large with them, and annealing made
it larger still.

With one component only stage 1 is left, whose classifier is FedAvg's if `max_samples`
leaves nobody anything out. If the number of
components is not given, it is estimated before training (`Algorithm.prepare`) from the
same means: what stands out of the noise of sampling is of rank k - 1.

Communication is saved by `upload` (only the largest components, or a sampled one),
`vae_every` (lazy VAEs), `hidden` and `latent` (narrow VAEs), and `payload` (precision).
The engine reads bytes off shapes. In stage 1 and with lazy VAEs a round needs fewer:
the metrics `needed_up` and `needed_down` count bytes of models of its stage, mean over
clients, for clients that take part in every round.

Does a run go astray? With `truth`, the inherent distribution of every pool row, the
guided rounds take the true responsibilities. EM must stay there:
`fedgmi_estimates.proportion_error` has to be as small at the end as at the start of
stage 3. If it is not, VAEs are trained too little, and no start will help.
`python -m experiments.inherent --diagnose` does this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedgen.aggregators import mixture
from fedgen.algorithms import _components, _options, _survey, _vae_mixture
from fedgen.algorithms._survey import Guide, Survey, Told
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
_VAE = 1 << 30  # a key beyond those that others make by splitting or counting

VaeFactory = Callable[[tuple[int, ...], int], Any]


class Shared(NamedTuple):
    """All that clients know, and where training is."""

    components: Components
    guide: Guide
    clock: jax.Array  # [] int32 rounds


class Server(NamedTuple):
    """That, and what clients told."""

    shared: Shared
    survey: Survey


class Message(NamedTuple):
    """What a client sends."""

    vaes: Any
    classifiers: Any
    labels: Any  # mean label frequencies [k, c], or ()
    told: Told


class Stage(NamedTuple):
    """What a round is for; EM if neither of the first two."""

    shared: jax.Array  # [] bool
    guided: jax.Array  # [] bool
    lazy: jax.Array  # [] bool, whether VAEs rest


def fedgmi(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    num_components: int | None = None,
    density: str = "x",
    likelihood: str = "bernoulli",
    gate: str = "posterior",
    hidden: int = 128,
    latent: int = 16,
    vae_epochs: int = 5,
    vae_learning_rate: float = 2e-3,
    pretrain_rounds: int = 8,
    guided_rounds: int = 1,
    concentration: float = 1.0,
    num_samples: int = 2,
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
      num_components: k, at least 1; estimated before training if None.
      density: What VAEs describe: inputs "x"; "xy", inputs, times the classifiers'
        p_k(y | x) in training; or "cvae", inputs given the label, times label
        frequencies. Components that differ in labels only need "xy".
      likelihood: Of the decoders: "bernoulli" or "continuous_bernoulli" for images,
        "normal" with a learnt variance for features, which should be of about unit
        scale: the survey's kernel has a fixed width.
      gate: rho, "posterior"; "prior", pi; or "params", one classifier of mean weights.
      hidden: Hidden units of a VAE.
      latent: Size q of its codes.
      vae_epochs: Local epochs of VAEs, at least 1.
      vae_learning_rate: Of Adam for VAEs, restarted every round, above 0.
      pretrain_rounds: Rounds of the shared VAE, at least 1. EM begins after these and
        `guided_rounds`; until then there is but one component.
      guided_rounds: Rounds after them before EM, at least 1.
      concentration: a of a Dirichlet prior of pi, at least 1.
      num_samples: Importance samples, at least 1, of a client's own model; training
        takes one.
      max_samples: Samples that a client uses in a round, at least 1; random ones if
        it has more.
      upload: "all" components; "top", those of most samples; or "sampled", one.
      num_sent: How many for "top", from 1 to k.
      vae_every: Rounds from one update of VAEs to the next, counted anew from stage 2.
      payload: Precision of weights on the wire, "float32", "bfloat16" or "float16".
      truth: `[rows]` inherent distribution of every pool row, for the diagnosis above.
      vae: Builds another `fedgen.models.vae.Vae` from the shape of a sample and the
        number of classes; `hidden` and `latent` are then not used.

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_at_least(
        1,
        num_components=1 if num_components is None else num_components,
        vae_epochs=vae_epochs,
        pretrain_rounds=pretrain_rounds,
        guided_rounds=guided_rounds,
        concentration=concentration,
        num_samples=num_samples,
        max_samples=max_samples,
        num_sent=num_sent,
        vae_every=vae_every,
        hidden=hidden,
        latent=latent,
    )
    for name, value, choices in (
        ("density", density, DENSITIES),
        ("likelihood", likelihood, LIKELIHOODS),
        ("gate", gate, GATES),
        ("upload", upload, UPLOADS),
        ("payload", payload, PAYLOADS),
    ):
        _options.check_choice(name, value, choices)
    _options.check_positive(vae_learning_rate=vae_learning_rate)
    if num_components is not None and upload == "top":
        _check_num_components(num_components, num_sent)

    vae_optimizer = optax.adam(vae_learning_rate)
    vae_schedule = Schedule(schedule.batch_size, vae_epochs)
    if vae is None:
        vae = perceptrons(density, likelihood, hidden, latent)

    def kind_of(shape, num_classes):
        return Density(vae(tuple(shape), num_classes), likelihood, density)

    def features_of(pool, num_classes):
        dim = math.prod(pool.x.shape[1:])
        return _survey.random_features(dim, 0 if density == "x" else num_classes)

    def stage_of(clock):
        after = clock - pretrain_rounds
        return Stage(
            after < 0,
            (after >= 0) & (after < guided_rounds),
            jnp.where(after < 0, clock, after) % vae_every != 0,
        )

    def init(key, federation, num_components=num_components):
        if num_components is None:
            raise ValueError(
                "num_components must be given, or estimated by "
                "`algorithm.prepared(federation)`, got None"
            )
        model = federation.only_model("FedGMI")
        if truth is not None:
            _check_truth(truth, len(federation.pool.y), num_components)
        c, (cohort,) = federation.num_classes, federation.cohorts
        kind = kind_of(federation.pool.x.shape[1:], c)
        vae = kind.vae.init(jax.random.fold_in(key, _VAE))
        even = jnp.full(c, 1 / c, jnp.float32)
        components = Components(
            tree.broadcast(vae, num_components),
            tree.broadcast(model.init(key), num_components),
            tree.broadcast(even, num_components) if density == "cvae" else (),
        )
        survey, guide = _survey.start(cohort, num_components)
        shared = Shared(components, guide, jnp.int32(0))
        uniform = jnp.full(num_components, 1 / num_components, jnp.float32)
        clients = tree.broadcast(uniform, cohort.num_clients)
        return Server(shared, survey), (clients,)

    def prepare(federation):
        federation.only_model("FedGMI")
        features = features_of(federation.pool, federation.num_classes)
        k = _survey.estimate_num_components(features, federation)
        if upload == "top":
            _check_num_components(k, num_sent)
        return algorithm._replace(
            init=functools.partial(init, num_components=k), prepare=None
        )

    def cast(components, dtype):
        vaes, classifiers = jax.tree.map(
            lambda a: a.astype(dtype), (components.vaes, components.classifiers)
        )
        return components._replace(vaes=vaes, classifiers=classifiers)

    def download(context, server, id_):
        del context, id_
        shared = server.shared
        return shared._replace(components=cast(shared.components, payload))

    def joint(context, components, num_samples):
        """Return `(key, batch) -> [b, k]`, log densities under all components."""

        def of_batch(key, batch):
            kind = kind_of(batch.x.shape[1:], context.num_classes)
            return kind.joint(context.model, components, key, batch, num_samples)

        return of_batch

    def tabulate(of_batch, key, data):
        """Compute log densities `[s, k]` of a subset."""

        def rows(i, batch):
            return of_batch(jax.random.fold_in(key, i), batch)

        table = fit.tabulate(rows, data, schedule.batch_size, max_samples)
        return table[:max_samples]

    def fit_proportions(table, mask):
        return mixture.fit_proportions(
            table, mask, concentration=concentration, tolerance=1e-4, max_steps=200
        )

    def e_step(stage, context, features, key, shared, data):
        """Compute responsibilities `[s, k]` and proportions `[k]` of a subset."""
        guide, components = shared.guide, shared.components
        by_vaes, k = joint(context, components, 1), _num_components(components)

        def by_guide(key, batch):
            del key
            return features(batch) @ guide.kernel + guide.bias[None]

        def of_batch(key, batch):
            return jax.lax.cond(stage.guided, by_guide, by_vaes, key, batch)

        read = data._replace(size=data.size * ~stage.shared)
        table = tabulate(of_batch, key, read)
        mask = jnp.arange(max_samples) < data.size
        # Where `mixture` turns nonsense into a bound, here a client has to fail.
        sound = jnp.all((jnp.abs(table) < mixture.BOUND) | ~mask[:, None])
        proportions = jnp.where(sound, fit_proportions(table, mask), jnp.nan)
        r = _components.responsibilities(table, proportions, mask)
        if truth is not None:
            true = jax.nn.one_hot(jnp.asarray(truth)[data.order], k) * mask[:, None]
            r = jnp.where(stage.guided, true, r)
        alone = jax.nn.one_hot(0, k)[None] * mask[:, None]
        return jnp.where(stage.shared, alone, r), proportions

    def local(context, key, client, shared, data):
        del client
        shared = shared._replace(components=cast(shared.components, jnp.float32))
        components, stage = shared.components, stage_of(shared.clock)
        # Beyond the numbers that components train by.
        keys = jax.random.fold_in(key, _num_components(components))
        keys = jax.random.split(keys, 4)
        features = features_of(data.pool, context.num_classes)
        told = _survey.tell(
            features,
            data._replace(size=data.size * stage.shared),
            schedule.batch_size,
        )
        size = jnp.maximum(data.size, 1)
        data = _vae_mixture.subset(keys[0], data, max_samples)
        scale = size / jnp.maximum(data.size, 1)
        r, proportions = e_step(stage, context, features, keys[1], shared, data)
        kind = kind_of(data.pool.x.shape[1:], context.num_classes)

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

        vaes, vae_metrics, vae_bytes = m_step(
            keys[3],
            vae_loss,
            vae_optimizer,
            components.vaes,
            data,
            r * ~stage.lazy,
            vae_schedule,
        )
        classifiers, metrics, classifier_bytes = m_step(
            key, classifier_loss, optimizer, components.classifiers, data, r, schedule
        )
        labels = ()
        if density == "cvae":
            labels = _vae_mixture.mean_labels(
                data.pool.y[data.order], scale * r, context.num_classes
            )
        # Until the first round of stage 2 is over, all components are equal; and what
        # has not changed is not sent again. The first round needs all that is shared.
        known = stage_of(jnp.maximum(shared.clock - 1, 0))
        received = jnp.where(known.shared, 1, _num_components(components))
        received = received * (
            one(components.vaes) * ~known.lazy + one(components.classifiers)
        )
        metrics = {
            "loss": metrics["loss"],
            "vae_loss": vae_metrics["loss"],
            "steps": metrics["steps"] + vae_metrics["steps"],
            "needed_down": received,
            "needed_up": vae_bytes + classifier_bytes,
        }
        return proportions, Message(vaes, classifiers, labels, told), metrics

    def one(components):
        """Count the bytes of one component on the wire."""
        count = sum(a[0].size for a in jax.tree.leaves(components))
        return jnp.float32(count * jnp.dtype(payload).itemsize)

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        shared, message = server.shared, upload.message
        stage, old = stage_of(shared.clock), shared.components
        vaes, _ = _vae_mixture.move(old.vaes, message.vaes)
        classifiers, _ = _vae_mixture.move(old.classifiers, message.classifiers)
        labels = old.labels
        if density == "cvae":
            mean = message.labels
            labels = tree.where(mean.weight[:, 0] > 0, mean.value, labels)
        components = Components(vaes, classifiers, labels)
        components = tree.where(stage.shared, _all_as(components, 0), components)
        survey = tree.where(
            stage.shared,
            _survey.listen(server.survey, upload.id, upload.weight, message.told),
            server.survey,
        )
        guide = jax.lax.cond(
            shared.clock == pretrain_rounds - 1,
            lambda: _survey.find_guide(survey, _num_components(components)),
            lambda: shared.guide,
        )
        new = Server(Shared(components, guide, shared.clock + 1), survey)
        return new, {
            "components": jnp.float32(_num_components(components)),
            "told": jnp.sum(survey.count > 0, dtype=jnp.float32),
        }

    def personalise(context, key, client, shared, data):
        del client
        keys = jax.random.split(key)
        data = _vae_mixture.subset(keys[0], data, max_samples)
        components = cast(shared.components, jnp.float32)
        of_batch = joint(context, components, num_samples)
        table = tabulate(of_batch, keys[1], data)
        return fit_proportions(table, jnp.arange(max_samples) < data.size)

    def predict(context, server, proportions, x):
        components = server.shared.components
        if gate == "params":
            mean = jax.tree.map(
                lambda a: jnp.tensordot(proportions, a, axes=1), components.classifiers
            )
            return context.model.apply(mean, x)
        log_weight = _components.log_shares(proportions)[None]
        if gate == "posterior":
            kind = kind_of(x.shape[1:], context.num_classes)
            # The same noise for all inputs' components, and no key to be given.
            log_weight += kind.marginal(components, jax.random.key(0), x, num_samples)
        log_weight = jax.nn.log_softmax(log_weight)
        return _components.mix(context.model, components.classifiers, log_weight, x)

    def predict_global(context, server, x):
        k = _num_components(server.shared.components)
        return predict(context, server, jnp.full(k, 1 / k), x)

    algorithm = Algorithm(
        init,
        download,
        local,
        aggregate,
        predict,
        personalise,
        predict_global=predict_global,
        prepare=prepare if num_components is None else None,
        min_rounds=1 if num_components == 1 else pretrain_rounds + guided_rounds + 1,
    )
    return algorithm


def density_of(
    shape: tuple[int, ...], num_classes: int, settings: Mapping[str, Any]
) -> Density:
    """Return how the components of a run with these hyper-parameters give densities."""
    names = ("density", "likelihood", "hidden", "latent")
    density, likelihood, *sizes = (settings[name] for name in names)
    vae = perceptrons(density, likelihood, *sizes)(tuple(shape), num_classes)
    return Density(vae, likelihood, density)


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


def _check_truth(truth: np.ndarray, num_rows: int, num_components: int) -> None:
    truth = np.asarray(truth)
    whole = np.issubdtype(truth.dtype, np.integer) and truth.shape == (num_rows,)
    if not whole or truth.min() < 0 or truth.max() >= num_components:
        raise ValueError(
            f"truth must hold integers in [0, {num_components}) for {num_rows} pool "
            f"rows, got {truth.dtype} {truth.shape} from {truth.min()} to {truth.max()}"
        )


def _check_num_components(num_components: int, num_sent: int) -> None:
    if num_sent > num_components:
        raise ValueError(
            f"num_sent must be <= {num_components}, the number of components, "
            f"got {num_sent}"
        )


def _num_components(components: Components) -> int:
    return jax.tree.leaves(components)[0].shape[0]


def _all_as(components: Params, k: int) -> Params:
    return jax.tree.map(lambda a: jnp.broadcast_to(a[k], a.shape), components)
