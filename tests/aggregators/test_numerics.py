"""Loops over matrices: values, derivatives, and that nothing waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fedgen.aggregators._numerics import each


def test_each_is_vmap():
    a = np.random.default_rng(0).normal(size=(4, 3, 5))
    cov = jnp.asarray(a @ a.swapaxes(1, 2))
    shift = jnp.arange(4.0)

    def factorise(cov, shift):
        factor = jnp.linalg.cholesky(cov + shift * jnp.eye(3))
        return factor, jnp.sum(jnp.log(jnp.diag(factor)))

    def total(cov):
        return jnp.sum(each(factorise, cov, shift)[1])

    expected = jax.vmap(factorise)(cov, shift)
    for found in (
        each(factorise, cov, shift),
        jax.jit(each, static_argnums=0)(factorise, cov, shift),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5), found, expected
        )
    inverse = np.linalg.inv(np.asarray(cov) + np.arange(4)[:, None, None] * np.eye(3))
    np.testing.assert_allclose(jax.jit(jax.grad(total))(cov), inverse / 2, rtol=1e-4)


# Two devices on two threads, and on each of them two batches at once.
BATCHES = """
import jax
import jax.numpy as jnp
from fedgen.aggregators._numerics import each

cov = jnp.tile(jnp.eye(200), (2, 10, 1, 1))

@jax.pmap
def factorise(cov):
    return [each(jnp.linalg.cholesky, scale * cov) for scale in (1.0, 2.0)]

for _ in range(20):
    jax.block_until_ready(factorise(cov))
"""


def test_batches_on_all_threads_do_not_wait_for_each_other():
    # In a process, or what waits for ever would take this one with it.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "2"}
    subprocess.run([sys.executable, "-c", BATCHES], env=env, check=True, timeout=120)
