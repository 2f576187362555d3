"""The benchmarks of `guard.py`: reads the name of one, runs it, prints the seconds.

The first time that includes all compilation.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedgen.aggregators import gaussian
from fedgen.core import execution
from fedgen.runs import build, leg
from fedgen.runs.config import Config

_FEDAVG = Config(
    algorithm="fedavg", baselines=(), rounds=100, eval_every=1, checkpoint_every=0
)
_MLP = {"model": "mlp", "num_clients": 50, "local_steps": 20, "batch_size": 32}
_CNN = {"model": "cnn", "num_clients": 4, "local_steps": 3, "batch_size": 32}


@functools.cache
def setup(**flags) -> tuple[Config, build.Setup]:
    """Build the data and the layout of a run."""
    config = Config(**{**_FEDAVG.__dict__, **flags})
    return config, build.build(config)


@functools.cache
def prepare(**flags) -> leg.Leg:
    """Compile a run."""
    config, built = setup(**flags)
    algorithm = build.build_algorithm(config, config.algorithm)
    return leg.prepare(config.algorithm, algorithm, built, config)


def a_round(**flags) -> Callable[[], object]:
    """Return what trains a round, each time from where the last one ended."""
    ready, (config, built) = prepare(**flags), setup(**flags)
    state, key = [ready.init()], leg.run_keys(config.seed)[1]

    def run():
        state[0], _ = jax.block_until_ready(
            ready.block(state[0], built.federation, key, np.int32(1))
        )

    return run


def an_evaluation(**flags) -> Callable[[], object]:
    """Return what evaluates all clients."""
    ready, (config, built) = prepare(**flags), setup(**flags)
    state, key = ready.init(), leg.run_keys(config.seed)[2]
    return lambda: jax.block_until_ready(ready.evaluate(state, built.federation, key))


def a_fusion(clients: int, classes: int, dim: int) -> Callable[[], object]:
    """Return what fuses class means."""
    mean = jax.random.normal(jax.random.key(0), (clients, classes, dim))
    count = jnp.ones((clients, classes))
    fuse = jax.jit(jax.vmap(gaussian.fuse_mean, (None, None, 0, None, 0)))
    arguments = (jnp.zeros((classes, dim)), jnp.eye(dim), mean, jnp.eye(dim), count)
    return lambda: jax.block_until_ready(fuse(*arguments))


MAKE = {
    "MLP round": lambda: a_round(**_MLP),
    "CNN round": lambda: a_round(**_CNN),
    "evaluation": lambda: an_evaluation(**_MLP),
    "Gaussian fusion": lambda: a_fusion(200, 20, 64),
}


def main() -> None:
    """Answer until nobody asks any more."""
    execution.use_cores()
    jax.block_until_ready(jnp.zeros(1))
    # Each compilation must be one: nothing is to be found in a cache.
    jax.config.update("jax_enable_compilation_cache", False)
    print("ready", flush=True)
    made: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        case = line.strip()
        start = time.perf_counter()
        if case not in made:
            made[case] = MAKE[case]()
        made[case]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
