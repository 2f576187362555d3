"""pfl-research: its FedAvg; with `--processes`, started again by `torchrun`.

A user's data set is the minibatches of its round, one after another, and is passed
over once.
"""

from __future__ import annotations

import os
import sys

import common

ARGS = common.arguments()
if ARGS.processes > 1 and "RANK" not in os.environ:
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    os.execv(
        sys.executable,
        [sys.executable, *launcher, f"--nproc_per_node={ARGS.processes}", *sys.argv],
    )

import itertools  # noqa: E402

import torch  # noqa: E402
import torch_nets  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.base import TrainingProcessCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.hyperparam import NNTrainHyperParams  # noqa: E402
from pfl.metrics import Metrics  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402
from torch.nn import functional as F  # noqa: E402

MASTER = os.environ.get("RANK", "0") == "0"


class Tell(TrainingProcessCallback):
    """Tells when a round is over, and lets the next one draw its own participants.

    Workers draw all participants and train some; the last draws may be too many.
    """

    def __init__(self, events: common.Events) -> None:
        self._events = events
        self.number, self.turns = 0, itertools.count()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Let the harness know, and let training go on."""
        if MASTER:
            self._events.round_done()
        self.turns = itertools.count()
        self.number = central_iteration + 1
        return False, Metrics()


def main() -> None:
    """Run the workload's rounds."""
    torch.set_num_threads(ARGS.threads)
    events = common.Events(ARGS.folder)
    workload = common.Workload(ARGS.workload)
    data = torch_nets.Data(workload)
    num_rounds, participants, _, batch_size = data.rows.shape
    net = torch_nets.build(workload.model, workload.params)
    net.loss = lambda x, y: F.cross_entropy(net(x), y)
    net.metrics = lambda x, y: {}
    tell = Tell(events)

    def make_dataset(turn):
        rows = data.rows[tell.number, turn].flatten()
        return Dataset([data.x[rows], data.y[rows]], user_id=str(turn))

    training = FederatedDataset(make_dataset, lambda: next(tell.turns))
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    if MASTER:
        events.ready("pfl", "torch")
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=num_rounds,
            evaluation_frequency=num_rounds + 1,
            train_cohort_size=participants,
            val_cohort_size=0,
        ),
        SimulatedBackend(training, training),
        model,
        NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.learning_rate,
            local_batch_size=batch_size,
        ),
        callbacks=[tell],
    )
    if MASTER:
        events.finish(torch_nets.save(net))


if __name__ == "__main__":
    main()
