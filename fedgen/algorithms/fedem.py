"""FedEM: every client is a mixture of k shared predictors, in proportions of its own.

Marfoq et al., "Federated Multi-Task Learning under a Mixture of Distributions",
NeurIPS 2021, Algorithm 1, with p_k(y|x) = softmax(h_k(x)), after public descriptions
of it. In a round a client computes, of the models that it was sent,

    q_s(k) ~ pi_k exp(-l_k(s)),    pi_k <- mean_s q_s(k),

trains model k on its samples weighted by q_s(k), and the server averages each model
over clients. With one predictor this is FedAvg.

- No responsibilities are stored: those of a minibatch are computed again when it is
  trained on, from the models and proportions that the round began with. The numbers
  are the same for one more forward pass of k models.
- The paper averages models by n_i (`weighting="size"`). EM's own weight for model k
  is the mass sum_s q_s(k), as in FedGMM's code (`"mass"`).
- A client takes further E- and pi-steps with the newest download before its model is
  used. That is all that unseen clients do: no model is trained for them.
- `counting="hard"` gives every sample to the predictor of least loss alone, whatever
  the proportions, which are then shares of a count: the way in which FedSoft (Ruan and
  Joe-Wong, AAAI 2022) estimates how a client mixes clusters. The rest of FedSoft, one
  local model drawn to all clusters' at once, is not here.
- The server's one model mixes the predictors in equal shares, the start of all pi.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fedgen.algorithms import _components, _options
from fedgen.core import tree
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule

WEIGHTINGS = ("size", "mass")
COUNTINGS = ("soft", "hard")


def fedem(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    num_components: int = 3,
    weighting: str = "size",
    counting: str = "soft",
    adapt_steps: int = 10,
) -> Algorithm:
    """Build FedEM.

    Args:
      optimizer: Local optimiser, restarted every round.
      schedule: Local epochs E, or steps, and minibatch B.
      num_components: Predictors k, at least 1.
      weighting: Whether the server weighs a client's model k by its samples, "size",
        or by those that are due to k, "mass".
      counting: Whether a sample is shared among predictors, "soft", or belongs to one,
        "hard".
      adapt_steps: E- and pi-steps before a client's model is used, at least 0.

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_at_least(1, num_components=num_components)
    _options.check_at_least(0, adapt_steps=adapt_steps)
    _options.check_choice("weighting", weighting, WEIGHTINGS)
    _options.check_choice("counting", counting, COUNTINGS)
    uniform = jnp.full(num_components, 1 / num_components, jnp.float32)

    def init(key, federation):
        model = federation.only_model("FedEM")
        components = _components.init(model, key, num_components)
        return components, (tree.broadcast(uniform, federation.cohorts[0].num_clients),)

    def density(context, components):
        """Return `batch -> log p_k(y | x) [b, k]` under these components."""
        return lambda batch: -_components.losses(context.model, components, batch)

    def e_step(proportions, log_density, mask):
        """Compute `q [b, k]`."""
        if counting == "hard":
            best = jnp.argmax(log_density, axis=1)
            return mask[:, None] * jax.nn.one_hot(best, num_components)
        return _components.responsibilities(log_density, proportions, mask)

    def refresh(context, components, proportions, data, steps):
        return _components.fit_proportions(
            density(context, components),
            e_step,
            proportions,
            data,
            schedule.batch_size,
            steps,
        )

    def download(context, server, id_):
        del context, id_
        return server

    def local(context, key, proportions, components, data):
        updated = refresh(context, components, proportions, data, 1)
        log_density = density(context, components)
        delta, metrics = _components.fit_weighted(
            context,
            optimizer,
            components,
            key,
            data,
            schedule,
            lambda batch: e_step(proportions, log_density(batch), batch.mask),
        )
        share = updated if weighting == "mass" else jnp.ones_like(updated)
        return updated, _components.to_message(delta, data.size * share), metrics

    def aggregate(context, key, server, uploads):
        del context, key
        (upload,) = uploads
        return _components.move(server, upload.message), {}

    def personalise(context, key, proportions, components, data):
        del key
        return refresh(context, components, proportions, data, adapt_steps)

    def predict(context, server, proportions, x):
        log_weight = _components.log_shares(proportions)[None]
        return _components.mix(context.model, server, log_weight, x)

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
