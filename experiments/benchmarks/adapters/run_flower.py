"""Flower's simulation on Ray: an actor per core, a node per participant of a round.

Node `i` plays the `i`-th participant, so that no node is only ever waiting.
"""

from __future__ import annotations

import os
import pathlib

# The actors import the client's module, whose data they then read but once each.
os.environ["PYTHONPATH"] = str(pathlib.Path(__file__).parent)

import common  # noqa: E402
import flower_client  # noqa: E402
import numpy as np  # noqa: E402
import torch_nets  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

ARGS = common.arguments()
server = ServerApp()


@server.main()
def main(grid, context):
    """Run the workload's rounds."""
    events = common.Events(ARGS.folder)
    workload = common.Workload(ARGS.workload)
    num_rounds, participants = workload.rows.shape[:2]
    del workload.x
    net = torch_nets.build(workload.model, workload.params)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=participants,
        min_available_nodes=participants,
    )

    def tell(server_round, arrays):
        if server_round == 0:
            events.ready("flwr", "ray", "torch")
        else:
            events.round_done()
        if server_round == num_rounds:
            net.load_state_dict(arrays.to_torch_state_dict())
            events.finish(torch_nets.save(net))

    strategy.start(
        grid,
        ArrayRecord(net.state_dict()),
        num_rounds=num_rounds,
        train_config=ConfigRecord({"workload": ARGS.workload, "threads": ARGS.threads}),
        evaluate_fn=tell,
    )


if __name__ == "__main__":
    with np.load(ARGS.workload) as arrays:
        participants = arrays["clients"].shape[1]
    run_simulation(
        server,
        flower_client.app,
        num_supernodes=participants,
        backend_config={
            "init_args": {"num_cpus": ARGS.processes, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
