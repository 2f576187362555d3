"""A plain PyTorch loop over clients; with `--processes`, each takes its share of them.

The processes share the weights, and wait for one another twice a round.
"""

from __future__ import annotations

import common
import torch
import torch.multiprocessing as mp
import torch_nets


def work(rank, args, barrier, shared, sums):
    """Train every `processes`-th client of every round."""
    torch.set_num_threads(args.threads)
    workload = common.Workload(args.workload)
    data = torch_nets.Data(workload)
    del workload.x
    model = torch_nets.build(workload.model, workload.params)
    params = list(model.parameters())
    events = common.Events(args.folder)
    barrier.wait()
    if rank == 0:
        events.ready("torch")
    for drawn in data.rows:
        total = [torch.zeros_like(p) for p in params]
        for of_client in drawn[rank :: args.processes]:
            with torch.no_grad():
                torch._foreach_copy_(params, shared)
            torch_nets.descend(model, data.x, data.y, of_client, workload.learning_rate)
            with torch.no_grad():
                torch._foreach_add_(total, params)
        torch._foreach_copy_(sums[rank], total)
        barrier.wait()
        if rank == 0:
            for mine, *parts in zip(shared, *sums, strict=True):
                torch.div(sum(parts), len(drawn), out=mine)
            events.round_done()
        barrier.wait()
    if rank == 0:
        with torch.no_grad():
            torch._foreach_copy_(params, shared)
        events.finish(torch_nets.save(model))


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
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
