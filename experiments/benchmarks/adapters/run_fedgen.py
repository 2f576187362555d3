"""fedgen: its engine, one device per core; on an accelerator, all clients at once.

`--mode=map` trains one client at a time on an accelerator, too, unless `--chunk` says
how many.
"""

from __future__ import annotations

import common
import jax
import jax_nets
import numpy as np

from experiments.benchmarks import workloads
from fedgen.core import execution, rounds, simulate
from fedgen.core.execution import Execution


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
    events = common.Events(args.folder)
    execution.use_cores()
    jax_nets.set_precision(args.precision)
    with np.load(args.workload) as arrays:
        num_rounds = len(arrays["rows"])
    _, problem = workloads.read(args.workload)
    mesh = execution.make_mesh(len(jax.devices()))
    own = 1 if args.mode == "map" else execution.default_chunk()
    layout = Execution(args.chunk or own, mesh)
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
    params = workloads.flatten(state.server.params)
    events.finish(params, jax_nets.device_bytes())


if __name__ == "__main__":
    main()
