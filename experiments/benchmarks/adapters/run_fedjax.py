"""FedJAX: its loop over clients, by the backend `jit` or `pmap` (`--mode`)."""

from __future__ import annotations

import os

import common

ARGS = common.arguments()
if ARGS.mode == "pmap":  # read when JAX is imported
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={ARGS.processes}"

import fedjax  # noqa: E402
import jax  # noqa: E402
import jax_nets  # noqa: E402
import numpy as np  # noqa: E402


def main() -> None:
    """Run the workload's rounds."""
    events = common.Events(ARGS.folder)
    workload = common.Workload(ARGS.workload)
    gradient = jax.grad(
        lambda p, batch: jax_nets.loss(workload.model, p, batch["x"], batch["y"])
    )

    def client_init(shared, own):
        del own
        return shared

    def client_step(params, batch):
        grads = gradient(params, batch)
        rate = workload.learning_rate
        return jax.tree_util.tree_map(lambda p, g: p - rate * g, params, grads)

    def client_final(shared, params):
        del shared
        return params

    def batches(rows):
        for row in rows:
            yield {"x": workload.x[row], "y": workload.y[row]}

    fedjax.set_for_each_client_backend(ARGS.mode)
    visit = fedjax.for_each_client(client_init, client_step, client_final)
    params = jax.device_put(workload.params)
    events.ready("fedjax", "jax", "jaxlib")
    for drawn in workload.rows:
        clients = ((i, batches(rows), np.zeros(())) for i, rows in enumerate(drawn))
        trained = ((params, 1.0) for _, params in visit(params, clients))
        params = jax.block_until_ready(fedjax.tree_util.tree_mean(trained))
        events.round_done()
    events.finish(params)


if __name__ == "__main__":
    main()
