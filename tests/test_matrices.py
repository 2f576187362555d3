"""Batches of matrices: values, derivatives, and that nothing waits for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen import _matrices
from fedgen._matrices import each
from fedgen.core.execution import map_clients


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


def solve(cov):
    return jnp.linalg.solve(cov, jnp.ones(len(cov)))


def test_factorisations_are_found_wherever_they_are():
    cov = jnp.eye(3)
    within = (
        jax.jit(solve),
        jax.grad(lambda cov: jnp.sum(solve(cov))),
        lambda cov: jax.lax.cond(cov[0, 0] > 0, jnp.linalg.cholesky, jnp.abs, cov),
        lambda cov: jax.lax.fori_loop(0, 2, lambda _, a: jnp.linalg.cholesky(a), cov),
        lambda cov: jnp.linalg.eigh(cov)[0],
        lambda cov: jnp.linalg.svd(cov, compute_uv=False),
        lambda cov: jnp.linalg.qr(cov)[0],
    )
    assert all(_matrices.factorises(fn, cov) for fn in within)
    assert not _matrices.factorises(jax.jit(lambda cov: jnp.sum(cov @ cov)), cov)


@pytest.mark.parametrize("hang", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_clients_get_the_same_whether_they_take_turns(monkeypatch, chunk, hang):
    monkeypatch.setattr(_matrices, "batches_may_hang", lambda: hang)
    cov = jnp.eye(3)[None] * jnp.arange(1.0, 6)[:, None, None]
    mapped = map_clients(solve, chunk)
    np.testing.assert_allclose(
        jax.jit(mapped)(cov), np.ones([5, 3]) / np.arange(1, 6)[:, None], rtol=1e-6
    )
    # Factorised are those of one client, or of a chunk.
    text = jax.jit(mapped).lower(cov).as_text()
    (factorised,) = re.findall(r"@lapack_sgetrf_ffi.*: \(tensor<([0-9x]*)xf32>\)", text)
    batch = [] if hang or chunk == 1 else [chunk or 5]
    assert factorised == "x".join(map(str, [*batch, 3, 3]))


# Two devices on two threads, and on each of them two batches at once.
BATCHES = """
import jax
import jax.numpy as jnp
from fedgen._matrices import each
from fedgen.core.execution import map_clients

cov = jnp.tile(jnp.eye(200), (2, 10, 1, 1))

@jax.pmap
def factorise(cov):
    return [HOW(scale * cov) for scale in (1.0, 2.0)]

for _ in range(20):
    jax.block_until_ready(factorise(cov))
"""


@pytest.mark.parametrize(
    "how",
    [
        "(lambda cov: each(jnp.linalg.cholesky, cov))",
        "map_clients(jnp.linalg.cholesky, 5)",
        "map_clients(jnp.linalg.cholesky, None)",
    ],
)
def test_batches_on_all_threads_do_not_wait_for_each_other(how):
    # In a process, or what waits for ever would take this one with it.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "2"}
    code = BATCHES.replace("HOW", how)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
