"""The machine's highest rate of float32 matrix products, by one library (`--mode`).

Square matrices, and the tall ones of a convolution as a product; in JAX also a loop
of products on every device at once, as fedgen trains. Prints GFLOP/s.
"""

from __future__ import annotations

import sys
import time

import numpy as np

SHAPES = ((3072, 3072, 3072), (6272, 800, 64), (6272, 800, 512))
REPEATS = 5


def best(run, flops: float) -> float:
    """Return the highest rate of a few calls, after one that warms up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds) / 1e9


def numpy_rates(a, b, flops):
    """Yield NumPy's rate."""
    yield best(lambda: a @ b, flops)


def torch_rates(a, b, flops):
    """Yield PyTorch's rate."""
    import torch

    a, b = torch.from_numpy(a), torch.from_numpy(b)
    yield best(lambda: a @ b, flops)


def jax_rates(a, b, flops):
    """Yield JAX's rate alone, and in a loop on all devices."""
    import jax

    product = jax.jit(lambda a, b: a @ b)
    yield best(lambda: jax.block_until_ready(product(a, b)), flops)

    loops, devices = max(1, int(4e9 / flops)), jax.devices()

    @jax.jit
    def loop(a, b):
        # The factor depends on the last product, which keeps it inside the loop.
        def body(_, carry):
            return a @ (b * (1 + 1e-30 * carry[0, 0]))

        return jax.lax.fori_loop(0, loops, body, a @ b)

    pairs = [jax.device_put((a, b), device) for device in devices]
    yield best(
        lambda: jax.block_until_ready([loop(*pair) for pair in pairs]),
        flops * (loops + 1) * len(devices),
    )


def main() -> None:
    """Print the highest rate that the library reaches."""
    library = sys.argv[1]
    if library == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    rng = np.random.default_rng(0)
    rates = []
    for n, k, m in SHAPES:
        a, b = (
            rng.standard_normal(shape, dtype=np.float32) for shape in ((n, k), (k, m))
        )
        rates += list(globals()[f"{library}_rates"](a, b, 2.0 * n * k * m))
    print(max(rates))


if __name__ == "__main__":
    main()
