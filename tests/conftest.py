"""Settings of every test, and a problem small enough to compile in a second.

Two CPU devices, so that everything which shards is tested; no rank promotion, so
that no mask ever broadcasts by accident; no compilation cache, so that no test
depends on the one before.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fedgen.core import execution
from fedgen.core.federation import Cohort, Federation, Model, Pool, Rows

os.environ["MPLBACKEND"] = "Agg"
# Whatever the environment says, since comparisons are exact.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
# The suite compiles far longer than it computes. What runs in a process of its own,
# the command line and the notebooks, is optimised as for users. XLA reads flags once,
# and aborts if it does not know one, so only releases that have this one get it.
jax.config.update("jax_disable_most_optimizations", True)
execution.use_cores()
QUICK_FLAGS = os.environ.get("XLA_FLAGS", "")
if jax.__version_info__ < (0, 11):
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", QUICK_FLAGS)
    jax.devices()

WARNINGS_AS_ERRORS = (
    "error:Some donated buffers were not usable:UserWarning",
    "error:Explicitly requested dtype:UserWarning",
    "error:Casting complex values:Warning",
    "error::RuntimeWarning:fedgen",
    "error::DeprecationWarning:fedgen",
)


def pytest_configure(config: pytest.Config) -> None:
    """Turn into errors the warnings that announce a wrong result or a lost buffer."""
    for line in WARNINGS_AS_ERRORS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def fedgen_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep decoded data sets of the tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDGEN_CACHE", str(folder))
        yield folder


@pytest.fixture
def cache_events():
    """Allow caches of compiled programs for once, and count their hits and misses."""
    events = collections.Counter()

    def listen(event, **info):
        del info
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        yield events
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(listen)


def build_model(
    dim: int = 5, *, features: int = 4, num_classes: int = 4, width: int = 6
) -> Model:
    """Build a two-layer perceptron body of `width`, with a linear head on `dim`."""

    def init(key: jax.Array):
        first, second, last = jax.random.split(key, 3)

        def dense(key: jax.Array, fan_in: int, fan_out: int):
            kernel = jax.random.normal(key, (fan_in, fan_out)) / np.sqrt(fan_in)
            return {"kernel": kernel, "bias": jnp.zeros(fan_out)}

        return {
            "body": {
                "hidden": dense(first, features, width),
                "out": dense(second, width, dim),
            },
            "head": dense(last, dim, num_classes),
        }

    def affine(layer, x: jax.Array) -> jax.Array:
        return x @ layer["kernel"] + layer["bias"][None]

    def embed(params, x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(affine(params["body"]["hidden"], x))
        return affine(params["body"]["out"], hidden)

    def head(params, z: jax.Array) -> jax.Array:
        return affine(params["head"], z)

    return Model(f"toy{width}", init, embed, head, dim)


def build_federation(
    sizes: Sequence[int] = (7, 0, 12, 3, 5, 9, 1, 6, 10),
    *,
    num_classes: int = 4,
    features: int = 4,
    dim: int = 5,
    seed: int = 0,
    models: int = 1,
    spare: int = 4,
) -> Federation:
    """Deal well separated classes to ragged clients, two of the classes to each.

    Client `i` trains on `sizes[i]` samples, and has `2 + i % 3` for validation and
    `3 + i % 2` for test even if it has none to train on. With several models,
    client `i` is of cohort `i % models`; the models differ in width, not in `dim`.
    The last `spare` rows of the pool belong to nobody.
    """
    rng = np.random.default_rng(seed)
    n = len(sizes)
    counts = np.stack(
        [np.asarray(sizes), 2 + np.arange(n) % 3, 3 + np.arange(n) % 2], axis=1
    )
    total = int(counts.sum())
    owner = np.repeat(np.arange(n), counts.sum(axis=1))
    y = (owner + rng.integers(0, 2, total)) % num_classes
    centres = 2.0 * rng.choice([-1.0, 1.0], (num_classes, features))
    centres += np.eye(num_classes, features)
    x = centres[y] + 0.5 * rng.normal(size=(total, features))

    # Clients' runs are contiguous in `order` but scattered over the pool.
    order = rng.permutation(total + spare)[:total]
    pool_x = rng.normal(size=(total + spare, features))
    pool_y = rng.integers(0, num_classes, total + spare)
    pool_x[order], pool_y[order] = x, y

    start = np.cumsum(counts).reshape(n, 3) - counts
    cohorts = []
    for k in range(models):
        ids = np.arange(k, n, models)
        parts = (
            Rows(jnp.asarray(start[ids, j], jnp.int32), jnp.asarray(c, jnp.int32))
            for j, c in enumerate(counts[ids].T)
        )
        model = build_model(
            dim, features=features, num_classes=num_classes, width=6 + 2 * k
        )
        cohorts.append(
            Cohort(
                model,
                jnp.asarray(ids, jnp.int32),
                jnp.asarray(order, jnp.int32),
                *parts,
                num_real=len(ids),
            )
        )
    pool = Pool(jnp.asarray(pool_x, jnp.float32), jnp.asarray(pool_y, jnp.int32))
    return Federation(pool, tuple(cohorts), num_classes)


@pytest.fixture(scope="session")
def quick_flags() -> str:
    """Return XLA_FLAGS for processes that compile much, as the tests do."""
    return QUICK_FLAGS


@pytest.fixture(scope="session")
def toy_model() -> Callable[..., Model]:
    """Return `build_model`."""
    return build_model


@pytest.fixture(scope="session")
def toy_federation() -> Callable[..., Federation]:
    """Return `build_federation`."""
    return build_federation
