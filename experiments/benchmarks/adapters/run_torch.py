"""A plain PyTorch loop over clients; with `--processes`, each takes its share of them.

The processes share the weights, and wait for one another twice a round. `--mode`:
empty, one kernel after another; `graph`, on a CUDA device, one graph of kernels that
trains a client; `vmap`, all clients at once by `torch.func.vmap`.
"""

from __future__ import annotations

import common
import torch
import torch.multiprocessing as mp
import torch_nets


def work(rank, args, barrier, shared, sums):
    """Train every `processes`-th client of every round."""
    torch.set_num_threads(args.threads)
    torch_nets.set_precision(args.precision)
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = common.Workload(args.workload)
    data = torch_nets.Data(workload, device)
    del workload.x
    model = torch_nets.build(workload.model, workload.params).to(device)
    start = [p.to(device) for p in shared]
    total = [torch.zeros_like(p) for p in start]
    train = TRAINERS[args.mode](model, data, workload.learning_rate, start, total)
    events = common.Events(args.folder)
    barrier.wait()
    if rank == 0:
        events.ready("torch")
    for drawn in data.rows:
        with torch.no_grad():
            torch._foreach_copy_(start, shared)
            torch._foreach_zero_(total)
        train(drawn[rank :: args.processes])
        torch._foreach_copy_(sums[rank], total)
        barrier.wait()
        if rank == 0:
            for mine, *parts in zip(shared, *sums, strict=True):
                torch.div(sum(parts), len(drawn), out=mine)
            events.round_done()
        barrier.wait()
    if rank == 0:
        torch_nets.assign(list(model.parameters()), shared)
        most = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        events.finish(torch_nets.save(model), most)


def one_by_one(model, data, learning_rate, start, total):
    """Return what trains clients one after another and adds their weights up."""
    params = list(model.parameters())

    def train(rows):
        for of_client in rows:
            torch_nets.assign(params, start)
            torch_nets.descend(model, data.x, data.y, of_client, learning_rate)
            with torch.no_grad():
                torch._foreach_add_(total, params)

    return train


def by_graph(model, data, learning_rate, start, total):
    """Return what replays the training of one client, captured as a CUDA graph."""
    rows = data.rows[0, :1].clone()
    train_one = one_by_one(model, data, learning_rate, start, total)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is allocated or tuned first is not captured
        for _ in range(3):
            train_one(rows)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_one(rows)

    def train(drawn):
        for of_client in drawn:
            rows[0].copy_(of_client)
            graph.replay()

    return train


def together(model, data, learning_rate, start, total):
    """Return what trains all clients at once."""
    names = [name for name, _ in model.named_parameters()]

    def train(rows):
        each = [p.expand(len(rows), *p.shape).clone() for p in start]
        stacked = dict(zip(names, each, strict=True))
        torch_nets.descend_stacked(model, stacked, data.x, data.y, rows, learning_rate)
        torch._foreach_add_(total, [p.sum(0) for p in stacked.values()])

    return train


TRAINERS = {"": one_by_one, "graph": by_graph, "vmap": together}


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
    if args.mode == "graph" and not torch.cuda.is_available():
        raise ValueError("--mode=graph needs a CUDA device, got none")
    workload = common.Workload(args.workload)
    model = torch_nets.build(workload.model, workload.params)
    shared = [p.detach().clone().share_memory_() for p in model.parameters()]
    del workload
    sums = [
        [torch.zeros_like(p).share_memory_() for p in shared]
        for _ in range(args.processes)
    ]
    context = mp.get_context("spawn")
    barrier = context.Barrier(args.processes)
    others = [
        context.Process(target=work, args=(rank, args, barrier, shared, sums))
        for rank in range(1, args.processes)
    ]
    for process in others:
        process.start()
    work(0, args, barrier, shared, sums)
    for process in others:
        process.join()


if __name__ == "__main__":
    main()
