"""fedgen: its engine, one device per core."""

from __future__ import annotations

import common
import jax
import numpy as np

from experiments.benchmarks import workloads
from fedgen.core import execution, rounds, simulate
from fedgen.core.execution import Execution


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
    events = common.Events(args.folder)
    execution.use_cores()
    with np.load(args.workload) as arrays:
        num_rounds = len(arrays["rows"])
    _, problem = workloads.read(args.workload)
    mesh = execution.make_mesh(len(jax.devices()))
    layout = Execution(args.chunk or execution.default_chunk(), mesh)
    federation = execution.place(problem.federation, mesh)
    round_fn = rounds.make_round(problem.algorithm, problem.sampler, layout)
    block = simulate.make_block(round_fn, 1, layout)
    state = rounds.init_state(problem.algorithm, federation, problem.init_key, layout)
    jax.block_until_ready((federation, state))
    events.ready("jax", "jaxlib")
    for _ in range(num_rounds):
        state, _ = jax.block_until_ready(
            block(state, federation, problem.round_key, np.int32(1))
        )
        events.round_done()
    events.finish(workloads.flatten(state.server.params))


if __name__ == "__main__":
    main()
