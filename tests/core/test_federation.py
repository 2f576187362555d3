"""Reading samples, and the checks of a federation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.core.federation import Data, Pool, normalise


def test_normalise_maps_bytes_to_minus_one_and_one():
    x = jnp.arange(256, dtype=jnp.uint8)
    found = normalise(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.linspace(-1, 1, 256), atol=1e-6)
    features = jnp.array([-3.0, 200.0])
    np.testing.assert_array_equal(normalise(features), features)


def test_take_reads_this_client_and_blanks_the_padding():
    images = jnp.arange(6 * 2 * 2, dtype=jnp.uint8).reshape(6, 2, 2, 1)
    pool = Pool(images, jnp.array([5, 4, 3, 2, 1, 0], jnp.int32))
    order = jnp.array([3, 0, 5, 1, 2, 4])
    data = Data(pool, order, jnp.int32(2), jnp.int32(3), jnp.float32(1))
    mask = jnp.array([True, True, False, True])
    batch = jax.jit(Data.take)(data, jnp.array([2, 0, 100, 1]), mask)
    rows = [2, 5, 1]
    assert batch.y.tolist() == [3, 0, 0, 4]
    assert batch.mask.tolist() == [1, 1, 0, 1]
    np.testing.assert_array_equal(
        np.asarray(batch.x)[[0, 1, 3]], np.asarray(normalise(images))[rows]
    )
    # Zero after normalisation: nothing, not black.
    assert not np.any(batch.x[2])


def test_apply_is_head_after_embed(toy_model):
    model = toy_model(3, features=5, num_classes=7)
    params = model.init(jax.random.key(0))
    x = jnp.ones((2, 5))
    z = model.embed({"body": params["body"]}, x)
    assert z.shape == (2, model.dim) == (2, 3)
    logits = model.head({"head": params["head"]}, z)
    np.testing.assert_array_equal(model.apply(params, x), logits)
    assert logits.shape == (2, 7)


def test_context_and_only_model(toy_federation):
    one, two = toy_federation(), toy_federation(models=2)
    assert one.only_model("FedAvg") is one.cohorts[0].model
    assert two.context(1).model is two.cohorts[1].model
    assert two.context(0).num_classes == 4
    with pytest.raises(ValueError, match="^FedAvg averages weights.*toy6, toy8"):
        two.only_model("FedAvg")


def test_a_federation_is_an_argument_of_jit(toy_federation):
    federation = toy_federation()
    traces = []

    @jax.jit
    def count(federation):
        traces.append(federation.cohorts[0].model.name)
        return federation.cohorts[0].train.size.sum() * federation.num_classes

    assert int(count(federation)) == 53 * 4
    moved = jax.tree.map(lambda a: a + 1, federation)
    assert int(count(moved)) == (53 + 9) * 4
    assert traces == ["toy6"]
    leaves = jax.tree.leaves(federation)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
