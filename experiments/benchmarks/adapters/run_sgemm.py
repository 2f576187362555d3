"""The machine's highest rate of float32 matrix products, by one library.

Called as `python run_sgemm.py LIBRARY CORES PRECISION`. Square matrices, and the tall
ones of a convolution as a product; in JAX also a loop of products on every device at
once, as fedgen trains. On an accelerator many products follow one another before
anybody waits for them. Prints GFLOP/s.
"""

from __future__ import annotations

import sys
import time

import numpy as np

SHAPES = ((3072, 3072, 3072), (6272, 800, 64), (6272, 800, 512))
LARGE = (8192, 8192, 8192)  # for an accelerator, which the others do not fill
REPEATS = 5
AT_ONCE = 20  # products on an accelerator


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
    if not torch.cuda.is_available():
        yield best(lambda: a @ b, flops)
        return
    a, b = a.cuda(), b.cuda()

    def run():
        for _ in range(AT_ONCE):
            a @ b
        torch.cuda.synchronize()

    yield best(run, AT_ONCE * flops)


def jax_rates(a, b, flops):
    """Yield JAX's rate alone, and in a loop on all devices."""
    import jax

    at_once = 1 if jax.default_backend() == "cpu" else AT_ONCE
    product = jax.jit(lambda a, b: a @ b)
    left, right = jax.device_put((a, b))
    yield best(
        lambda: jax.block_until_ready([product(left, right) for _ in range(at_once)]),
        at_once * flops,
    )

    loops, devices = max(at_once, int(4e9 / flops)), jax.devices()

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


def prepare(library: str, cores: int, precision: str) -> bool:
    """Set a library up, and tell whether it computes on an accelerator."""
    if library == "jax":
        import jax
        import jax_nets

        jax.config.update("jax_num_cpu_devices", cores)
        jax_nets.set_precision(precision)
        return jax.default_backend() != "cpu"
    if library == "torch":
        import torch
        import torch_nets

        torch_nets.set_precision(precision)
        return torch.cuda.is_available()
    return False


def main() -> None:
    """Print the highest rate that the library reaches."""
    library, cores, precision = sys.argv[1:]
    large = prepare(library, int(cores), precision)
    rng = np.random.default_rng(0)
    rates = []
    for n, k, m in (*SHAPES, LARGE) if large else SHAPES:
        a, b = (
            rng.standard_normal(shape, dtype=np.float32) for shape in ((n, k), (k, m))
        )
        rates += list(globals()[f"{library}_rates"](a, b, 2.0 * n * k * m))
    print(max(rates))


if __name__ == "__main__":
    main()
