"""FedAvg whose model every client fine-tunes before using it.

Wang et al., "Federated Evaluation of On-device Personalization", 2019
(arXiv:1910.10252), section 2. Training is FedAvg's, bit for bit: fine-tuning only
ever happens to a copy.
"""

from __future__ import annotations

import optax

from fedgen.algorithms import _options
from fedgen.algorithms.fedavg import fedavg
from fedgen.core import fit
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule

PARTS = ("all", "head")


def fedavg_ft(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    finetune_epochs: int = 2,
    finetune_part: str = "all",
) -> Algorithm:
    """Build FedAvg with fine-tuning.

    Args:
      optimizer: Local optimiser, in training and in fine-tuning.
      schedule: Local epochs or steps, and minibatch; fine-tuning shares the latter.
      finetune_epochs: Passes over a client's data; 0 gives FedAvg.
      finetune_part: "all" of the weights, or only those of the "head".

    Raises:
      ValueError: If an argument is out of range.
    """
    _options.check_at_least(0, finetune_epochs=finetune_epochs)
    _options.check_choice("finetune_part", finetune_part, PARTS)
    finetuning = Schedule(schedule.batch_size, finetune_epochs)

    def personalise(context, key, client, params, data):
        del client
        tuned = params if finetune_part == "all" else {"head": params["head"]}

        def loss(tuned, batch, key):
            del key
            logits = context.model.apply({**params, **tuned}, batch.x)
            return fit.cross_entropy(logits, batch)

        tuned, _ = fit.fit(loss, optimizer, tuned, key, data, finetuning)
        return {**params, **tuned}

    def receive(context, client, params):
        del context, client
        return params

    def predict(context, server, client, x):
        del server
        return context.model.apply(client, x)

    return fedavg(optimizer, schedule)._replace(
        personalise=personalise, predict=predict, receive=receive
    )
