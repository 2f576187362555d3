"""BlazeFL: its pool of threads, whose size is `--processes`.

Its pool of processes is left out: it starts anew every round, and was slower with every
setting tried.
"""

from __future__ import annotations

import threading

import common
import torch
import torch_nets
from blazefl.contrib.fedavg import FedAvgBaseServerHandler
from blazefl.core import ThreadPoolClientTrainer, deserialize_model, serialize_model


class Trainer(ThreadPoolClientTrainer):
    """Trains the participants of a round."""

    def __init__(self, workload: common.Workload, num_parallels: int) -> None:
        self.workload, self.data = workload, torch_nets.Data(workload)
        self.num_parallels = num_parallels
        self.device, self.device_count, self.cache = "cpu", 0, []
        self.stop_event = threading.Event()
        self._own = threading.local()

    def worker(self, cid, device, payload, stop_event):
        """Train one of them, from the weights and round that the server sent."""
        if not hasattr(self._own, "net"):
            workload = self.workload
            self._own.net = torch_nets.build(workload.model, workload.params)
        net, (weights, number) = self._own.net, payload
        with torch.no_grad():
            deserialize_model(net, weights)
        rows = self.data.rows[number, cid]
        rate = self.workload.learning_rate
        torch_nets.descend(net, self.data.x, self.data.y, rows, rate)
        return serialize_model(net)


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
    torch.set_num_threads(args.threads)
    events = common.Events(args.folder)
    trainer = Trainer(common.Workload(args.workload), args.processes)
    net = torch_nets.build(trainer.workload.model, trainer.workload.params)
    num_rounds, participants = trainer.data.rows.shape[:2]
    weights = serialize_model(net)
    events.ready("blazefl", "torch")
    for number in range(num_rounds):
        trainer.local_process((weights, number), list(range(participants)))
        trained, trainer.cache = trainer.cache, []
        weights = FedAvgBaseServerHandler.aggregate(trained, [1] * participants)
        events.round_done()
    with torch.no_grad():
        deserialize_model(net, weights)
    events.finish(torch_nets.save(net))


if __name__ == "__main__":
    main()
