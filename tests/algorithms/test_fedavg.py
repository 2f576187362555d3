"""FedAvg, its server optimisers and its fine-tuned variant."""

from __future__ import annotations

import chex
import jax
import numpy as np
import optax
import pytest

from fedgen.algorithms.fedavg import fedadam, fedavg, fedyogi
from fedgen.algorithms.fedavg_ft import fedavg_ft
from fedgen.core.fit import Schedule

# One full-batch step from w = 0, v = 1. Client 0 goes to w = 1, client 1 to -1/2 (see
# test_local_only); v stays, as dv = (p - y) w x = 0. With weights 1 and 3 the mean is
# (1 - 3/2) / 4 = -1/8.
DELTA = -0.125


@pytest.fixture(scope="module")
def pair(scalar_federation):
    return scalar_federation([[2.0], [1.0] * 3], [[1], [0] * 3], w=0.0, v=1.0)


def test_step_by_hand(train, pair):
    state = train(fedavg(optax.sgd(1.0), Schedule(4)), pair)
    np.testing.assert_allclose(state.server.params["body"], DELTA, rtol=1e-6)
    np.testing.assert_allclose(state.server.params["head"], 1.0, rtol=1e-6)


def test_server_momentum_by_hand(train, pair):
    # The second displacement comes from w = -1/8, where p differs per client:
    # client 0 has p = sigmoid(-1/4), hence dw = -2 (1 - p); client 1 sigmoid(-1/8).
    algorithm = fedavg(
        optax.sgd(1.0), Schedule(4), server_optimizer=optax.sgd(1.0, momentum=0.5)
    )
    up = 2 / (1 + np.exp(-0.25))
    down = -1 / (1 + np.exp(0.125))
    second = 0.5 * DELTA + (up + 3 * down) / 4
    state = train(algorithm, pair, 2)
    np.testing.assert_allclose(state.server.params["body"], DELTA + second, rtol=1e-5)


def test_fedadam_by_hand(train, pair):
    # Corrected for bias, the first moments are g and g^2 with g = -delta.
    algorithm = fedadam(
        optax.sgd(1.0), Schedule(4), server_learning_rate=0.1, b1=0.8, eps=0.05
    )
    state = train(algorithm, pair)
    step = 0.1 * DELTA / (abs(DELTA) + 0.05)
    np.testing.assert_allclose(state.server.params["body"], step, rtol=1e-5)


def test_fedyogi_by_hand(train, pair):
    # Both moments start at 1e-6. As that is below g^2, v_1 = 1e-6 + (1 - b2) g^2;
    # m_1 = b1 1e-6 + (1 - b1) g. The correction divides by 1 - b2 and 1 - b1.
    algorithm = fedyogi(
        optax.sgd(1.0), Schedule(4), server_learning_rate=0.1, b2=0.9, eps=0.05
    )
    state = train(algorithm, pair)
    second = (1e-6 + 0.1 * DELTA**2) / 0.1
    first = (0.9e-6 + 0.1 * -DELTA) / 0.1
    step = -0.1 * first / (np.sqrt(second) + 0.05)
    np.testing.assert_allclose(state.server.params["body"], step, rtol=1e-5)


@pytest.mark.parametrize("factory", [fedadam, fedyogi])
@pytest.mark.parametrize(
    ("name", "value"),
    [("server_learning_rate", 0.0), ("b1", 1.0), ("b2", -0.1), ("eps", 0.0)],
)
def test_moments_out_of_range(factory, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        factory(optax.sgd(0.1), Schedule(4), **{name: value})


def test_two_architectures_are_refused(toy_federation):
    with pytest.raises(ValueError, match="2 cohorts"):
        fedavg(optax.sgd(0.1), Schedule(4)).init(
            jax.random.key(0), toy_federation(models=2)
        )


@pytest.mark.parametrize("epochs", [0, 3])
def test_finetuning_never_reaches_training(train, score, toy_federation, epochs):
    federation = toy_federation()
    plain = fedavg(optax.sgd(0.1), Schedule(4))
    tuned = fedavg_ft(optax.sgd(0.1), Schedule(4), finetune_epochs=epochs)
    a, b = train(plain, federation, 2), train(tuned, federation, 2)
    chex.assert_trees_all_equal(a, b)
    before, after = score(plain, a, federation), score(tuned, b, federation)
    np.testing.assert_array_equal(before.global_correct, after.global_correct)
    if epochs == 0:
        np.testing.assert_allclose(before.loss, after.loss, rtol=1e-6)
    else:
        assert np.sum(after.loss) < 0.8 * np.sum(before.loss)


@pytest.mark.parametrize("part", ["all", "head"])
def test_finetuning_by_hand(pair, client_data, part):
    # From w = v = 1 on client 1: p = sigmoid(1), dw = p v x = p and dv = p w x = p.
    algorithm = fedavg_ft(
        optax.sgd(1.0), Schedule(4), finetune_epochs=1, finetune_part=part
    )
    params = {"body": np.float32(1.0), "head": np.float32(1.0)}
    tuned = algorithm.personalise(
        pair.context(0), jax.random.key(0), (), params, client_data(pair, 1)
    )
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(tuned["head"], 1 - p, rtol=1e-6)
    np.testing.assert_allclose(tuned["body"], 1 - p if part == "all" else 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("finetune_epochs", -1), ("finetune_part", "body")]
)
def test_finetuning_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        fedavg_ft(optax.sgd(0.1), Schedule(4), **{name: value})


def test_penalty_is_added_to_the_loss(client_data, pair):
    # The loss at w = 0, v = 1 is log 2; the penalty's derivative by v is 3.
    algorithm = fedavg(
        optax.sgd(1.0), Schedule(4), penalty=lambda new, old: 3 * new["head"]
    )
    params = {"body": np.float32(0.0), "head": np.float32(1.0)}
    _, upload, metrics = algorithm.local(
        pair.context(0), jax.random.key(0), (), params, client_data(pair, 0)
    )
    np.testing.assert_allclose(metrics["loss"], np.log(2) + 3, rtol=1e-6)
    np.testing.assert_allclose(upload.value["head"], -3.0, rtol=1e-6)
