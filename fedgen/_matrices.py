"""Batches of matrices, which a CPU may never be done with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

_LAPACK = frozenset(
    {
        primitives.cholesky_p,
        primitives.eig_p,
        primitives.eigh_p,
        primitives.hessenberg_p,
        primitives.householder_product_p,
        primitives.lu_p,
        primitives.qr_p,
        primitives.schur_p,
        primitives.svd_p,
        primitives.triangular_solve_p,
        primitives.tridiagonal_p,
        primitives.tridiagonal_solve_p,
    }
)


def batches_may_hang() -> bool:
    """Tell whether to factorise a batch of matrices may never end.

    Before 0.11.2, jaxlib deals the matrices of a batch out to the threads of the CPU,
    and the thread that does so waits for them. If all threads wait, as they may where
    each runs a device, or a program has several batches, none is left to work.
    """
    return jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11, 2)


def each(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Map `fn`, which factorises or solves, over the first axis, as `vmap` does.

    Where batches may hang, arrays that are traced are taken one after another.
    """
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if traced and batches_may_hang():
        return jax.lax.map(lambda args: fn(*args), arrays)
    return jax.vmap(fn)(*arrays)


def factorises(fn: Callable[..., Any], *args: Any) -> bool:
    """Tell whether `fn(*args)` factorises matrices or solves with them."""

    def found(jaxpr: core.Jaxpr) -> bool:
        return any(eqn.primitive in _LAPACK for eqn in jaxpr.eqns) or any(
            map(found, core.subjaxprs(jaxpr))
        )

    return found(jax.make_jaxpr(fn)(*args).jaxpr)
