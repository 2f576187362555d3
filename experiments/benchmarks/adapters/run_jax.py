"""Plain JAX, as one writes it for one experiment.

`--mode`: `scan`, a scan over clients and steps on every device, of which each core is
one; `loop`, a Python loop over clients with a jitted scan over steps; `serial`, a
Python loop over steps as well; `vmap`, one jitted program over all clients. A scan over
steps convolves by slices, since `lax.conv` is slow in loops on a CPU; a single step by
`lax.conv`, where that is the faster; and `vmap` by `lax.conv` as well, for it is naive.
On an accelerator all convolve by `lax.conv`.
"""

from __future__ import annotations

import functools
import os

import common
import jax
import jax.numpy as jnp
import jax_nets


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
    events = common.Events(args.folder)
    if args.mode == "scan":
        jax.config.update("jax_num_cpu_devices", args.processes)
        # As `fedgen.core.execution.use_cores` says, or products may be wrong.
        flags = os.environ.get("XLA_FLAGS", "")
        undivided = "--xla_disable_hlo_passes=cpu-parallel-task-assigner"
        os.environ["XLA_FLAGS"] = f"{flags} {undivided}"
    jax_nets.set_precision(args.precision)
    workload = common.Workload(args.workload)
    naive = args.mode in ("serial", "vmap") or jax.default_backend() != "cpu"
    convolution = jax_nets.convolve if naive else jax_nets.convolve_slices
    pool = jax.device_put((workload.x, workload.y))

    def step(params, rows, pool):
        x, y = (a[rows] for a in pool)
        grads = jax.grad(lambda p: jax_nets.loss(workload.model, p, x, y, convolution))(
            params
        )
        return jax.tree_util.tree_map(
            lambda p, g: p - workload.learning_rate * g, params, grads
        )

    def train(params, rows, pool):
        return jax.lax.scan(lambda p, r: (step(p, r, pool), None), params, rows)[0]

    def add(total, params):
        return jax.tree_util.tree_map(jnp.add, total, params)

    @jax.jit
    def visit(total, params, rows, pool):
        return add(total, train(params, rows, pool))

    @functools.partial(jax.jit, donate_argnums=0)
    def visit_all(total, params, rows, pool):
        def one(total, rows):
            return add(total, train(params, rows, pool)), None

        return jax.lax.scan(one, total, rows)[0]

    @jax.jit
    def together(params, rows, pool):
        trained = jax.vmap(train, (None, 0, None))(params, rows, pool)
        return jax.tree_util.tree_map(lambda a: a.mean(0), trained)

    jitted_step, jitted_add = jax.jit(step), jax.jit(add)
    mean = jax.jit(
        lambda total: jax.tree_util.tree_map(lambda a: a / rows.shape[1], total)
    )
    rows = jax.device_put(workload.rows)
    params = jax.device_put(workload.params)
    here = jax.devices()
    pools = [jax.device_put(pool, device) for device in here]
    parts = [
        [jax.device_put(drawn[i :: len(here)], here[i]) for i in range(len(here))]
        for drawn in rows
    ]
    jax.block_until_ready((pools, parts, rows, params))
    events.ready("jax", "jaxlib")
    for drawn, part in zip(rows, parts, strict=True):
        if args.mode == "vmap":
            params = together(params, drawn, pool)
        elif args.mode == "scan":
            totals = []
            for device, mine, own in zip(here, part, pools, strict=True):
                start = jax.device_put(params, device)
                nothing = jax.tree_util.tree_map(jnp.zeros_like, start)
                totals.append(visit_all(nothing, start, mine, own))
            total = jax.device_put(totals[0], here[0])
            for other in totals[1:]:
                total = jitted_add(total, jax.device_put(other, here[0]))
            params = mean(total)
        else:
            total = jax.tree_util.tree_map(jnp.zeros_like, params)
            for of_client in drawn:
                if args.mode == "loop":
                    total = visit(total, params, of_client, pool)
                else:
                    trained = params
                    for row in of_client:
                        trained = jitted_step(trained, row, pool)
                    total = jitted_add(total, trained)
            params = mean(total)
        jax.block_until_ready(params)
        events.round_done()
    events.finish(params, jax_nets.device_bytes())


if __name__ == "__main__":
    main()
