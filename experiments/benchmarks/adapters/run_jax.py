"""Plain JAX, as one writes it for one experiment: clients in a loop, or `vmap`.

`--mode`: `loop`, a Python loop over clients with a jitted scan over steps; `serial`, a
Python loop over steps as well; `vmap`, one jitted program over all clients. A scan over
steps convolves by slices, since `lax.conv` is slow in loops on a CPU; a single step by
`lax.conv`, where that is the faster; and `vmap` by `lax.conv` as well, for it is naive.
"""

from __future__ import annotations

import common
import jax
import jax.numpy as jnp
import jax_nets


def main() -> None:
    """Run the workload's rounds."""
    args = common.arguments()
    events = common.Events(args.folder)
    workload = common.Workload(args.workload)
    naive = args.mode in ("serial", "vmap")
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
    jax.block_until_ready((pool, rows, params))
    events.ready("jax", "jaxlib")
    for drawn in rows:
        if args.mode == "vmap":
            params = together(params, drawn, pool)
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
    events.finish(params)


if __name__ == "__main__":
    main()
