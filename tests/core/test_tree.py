"""Algebra on stacked trees, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.core import tree

RNG = np.random.default_rng(0)
TREE = {
    "a": jnp.asarray(RNG.normal(size=(4, 2, 3)), jnp.float32),
    "b": (jnp.arange(4.0),),
}


def test_num_bytes():
    shapes = (jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), jnp.zeros(7, jnp.int32))
    assert tree.num_bytes(shapes) == 2 * 15 + 4 * 7
    assert tree.num_bytes(()) == 0


def test_where_never_mixes():
    mask = jnp.array([True, False, False, True])
    other = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), TREE)
    chosen = tree.where(mask, TREE, other)
    for found, given in zip(*map(jax.tree.leaves, (chosen, TREE)), strict=True):
        np.testing.assert_array_equal(found[::3], given[::3])
        assert np.all(np.isnan(found[1:3]))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite(bad):
    assert bool(tree.all_finite((TREE, jnp.arange(3), jnp.array(True))))
    assert bool(tree.all_finite(()))
    spoiled = {**TREE, "a": TREE["a"].at[1, 0, 2].set(bad)}
    assert not bool(tree.all_finite(spoiled))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_all_finite_as_compiled_for_stacked_clients(dtype):
    largest = float(jnp.finfo(dtype).max)
    clients = jnp.full((4, 3, 40), largest, dtype)  # finite, though no sum of it is
    clients = clients.at[1, 2, 3].set(jnp.nan).at[2, 0, 39].set(-jnp.inf)
    finite = jax.jit(jax.vmap(tree.all_finite))((clients, jnp.ones((4,))))
    assert finite.tolist() == [True, False, False, True]
    assert not bool(jax.jit(tree.all_finite)(jnp.array(jnp.inf)))


def test_broadcast():
    copies = tree.broadcast({"w": jnp.arange(3.0), "n": jnp.int32(2)}, 5)
    assert copies["n"].tolist() == [2] * 5
    np.testing.assert_array_equal(copies["w"], np.tile(np.arange(3.0), (5, 1)))
