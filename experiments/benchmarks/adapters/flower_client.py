"""The clients of `run_flower.py`.

A module of its own: Ray would pickle what stands in `__main__` with every task, data
included.
"""

from __future__ import annotations

import functools

import common
import torch
import torch_nets
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@functools.cache
def load(path: str, threads: int):
    """Read the workload, once in every actor."""
    torch.set_num_threads(threads)
    workload = common.Workload(path)
    data = torch_nets.Data(workload)
    del workload.x
    return workload, data, torch_nets.build(workload.model, workload.params)


@app.train()
def train(message, context):
    """Train one participant of one round; all weigh the same."""
    config = message.content["config"]
    workload, data, net = load(config["workload"], config["threads"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    place = int(context.node_config["partition-id"])
    rows = data.rows[config["server-round"] - 1, place]
    torch_nets.descend(net, data.x, data.y, rows, workload.learning_rate)
    content = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(content=RecordDict(content), reply_to=message)
