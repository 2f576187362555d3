"""Shuffling, schedules and local training, against NumPy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fedgen.core import fit
from fedgen.core.federation import Data, Pool
from fedgen.core.fit import Schedule

KEY = jax.random.key(3)
shuffled = jax.jit(fit.shuffled)


def permutation(key, epoch: int, size: int) -> np.ndarray:
    index = jnp.arange(size)
    return np.asarray(shuffled(key, jnp.full(size, epoch), index, jnp.int32(size)))


def make_data(size: int, *, start: int = 3, work: float = 1.0, features: int = 3):
    """Hold `size` samples from `start` on; all other rows of the pool are NaN."""
    rng = np.random.default_rng(size)
    rows = start + size + 2
    order = rng.permutation(rows)
    mine = order[start : start + size]
    x, y = np.full((rows, features), np.nan), np.full(rows, 99)
    x[mine], y[mine] = rng.normal(size=(size, features)), np.arange(size)
    pool = Pool(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    scalars = jnp.int32(start), jnp.int32(size), jnp.float32(work)
    return Data(pool, jnp.asarray(order, jnp.int32), *scalars)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 9, 16, 17, 100, 1023, 4097])
def test_shuffled_is_a_permutation(size):
    for epoch in (0, 1, 5):
        assert sorted(permutation(KEY, epoch, size)) == list(range(size))


def test_shuffled_depends_on_key_and_epoch_alone():
    first = permutation(KEY, 0, 50)
    np.testing.assert_array_equal(first, permutation(KEY, 0, 50))
    assert np.mean(first == permutation(KEY, 1, 50)) < 0.2
    assert np.mean(first == permutation(jax.random.key(4), 0, 50)) < 0.2
    # A batch may reach from one epoch into the next.
    epoch, index = jnp.array([0, 1, 0, 1]), jnp.array([4, 4, 9, 0])
    mixed = shuffled(KEY, epoch, index, jnp.int32(50))
    second = permutation(KEY, 1, 50)
    np.testing.assert_array_equal(mixed, [first[4], second[4], first[9], second[0]])


@pytest.mark.parametrize("vary", ["key", "epoch"])
@pytest.mark.parametrize("size", [2, 3, 7, 9, 12])
def test_shuffled_is_uniform(size, vary):
    draws, index = 4000, jnp.arange(size)

    @jax.jit
    @jax.vmap
    def draw(i):
        key, epoch = (jax.random.fold_in(KEY, i), 0) if vary == "key" else (KEY, i)
        return fit.shuffled(key, jnp.full(size, epoch), index, jnp.int32(size))

    found = np.asarray(draw(jnp.arange(draws)))
    marginal = np.stack([np.bincount(found[:, i], minlength=size) for i in range(size)])
    assert np.min(scipy.stats.chisquare(marginal, axis=1).pvalue) > 1e-4
    # Neighbours must not stay neighbours: pairs are uniform, too.
    pairs = np.bincount(found[:, 0] * size + found[:, 1], minlength=size**2)
    off_diagonal = ~np.eye(size, dtype=bool).ravel()
    assert not pairs[~off_diagonal].any()
    assert scipy.stats.chisquare(pairs[off_diagonal]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("schedule", "size", "work", "expected"),
    [
        (Schedule(4, 3), 9, 1.0, 9),  # 3 batches, the last of one sample
        (Schedule(4, 3), 8, 1.0, 6),
        (Schedule(4, 3), 0, 1.0, 0),
        (Schedule(4, 3), 9, 0.5, 5),  # ceil(4.5)
        (Schedule(4, 3), 9, 1e-3, 1),
        (Schedule(4, 3), 9, 0.0, 0),
        (Schedule(4, steps=7), 2, 1.0, 7),
        (Schedule(4, steps=7), 0, 1.0, 0),
        (Schedule(4, steps=7), 50, 0.25, 2),
    ],
)
def test_num_steps(schedule, size, work, expected):
    steps = schedule.num_steps(make_data(size, work=work))
    assert steps.dtype == jnp.int32
    assert int(steps) == expected


@pytest.mark.parametrize("size", [1, 4, 9])
def test_an_epoch_visits_every_sample_once(size):
    data, schedule = make_data(size), Schedule(4, 2)
    steps = int(schedule.num_steps(data))
    batches = [jax.jit(schedule.batch)(KEY, jnp.int32(i), data) for i in range(steps)]
    chex.assert_tree_all_finite(batches)
    epochs = [batches[: steps // 2], batches[steps // 2 :]]
    orders = [
        np.concatenate([np.asarray(b.y)[np.asarray(b.mask) > 0] for b in epoch])
        for epoch in epochs
    ]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size == 9:
        assert orders[0].tolist() != orders[1].tolist()
        assert [int(b.mask.sum()) for b in epochs[0]] == [4, 4, 1]
    for batch in batches:
        padding = np.asarray(batch.mask) == 0
        assert not np.any(np.asarray(batch.x)[padding])
        assert not np.any(np.asarray(batch.y)[padding])
        own = ~padding
        want = {int(y): x for y, x in zip(data.pool.y, data.pool.x, strict=True)}
        for x, y in zip(batch.x[own], batch.y[own], strict=True):
            np.testing.assert_array_equal(x, want[int(y)])


@pytest.mark.parametrize("size", [3, 4, 10])
def test_steps_draw_from_an_endless_stream(size):
    data, schedule = make_data(size), Schedule(4, steps=5)
    batches = [schedule.batch(KEY, jnp.int32(i), data) for i in range(5)]
    assert all(np.all(np.asarray(b.mask) == 1) for b in batches)
    stream = np.concatenate([b.y for b in batches])
    for i in range(len(stream) // size):
        assert sorted(stream[i * size : (i + 1) * size]) == list(range(size))


def loss(params, batch, key):
    """Squared error of a linear model with a target that its samples' labels set."""
    del key
    error = batch.x @ params["w"] + params["b"] - batch.y.astype(jnp.float32)
    return fit.masked_mean(error**2, batch.mask)


PARAMS = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array([0.5])}
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9))


def test_no_steps_leave_the_parameters():
    given = PARAMS, KEY, make_data(10), Schedule(4, steps=0)
    params, metrics = fit.fit(loss, OPTIMIZER, *given)
    chex.assert_trees_all_equal(params, PARAMS)
    assert metrics == {"loss": 0, "steps": 0}


@pytest.mark.parametrize(
    "schedule", [Schedule(4, 3), Schedule(4, steps=6), Schedule(4, steps=1)]
)
def test_fit_is_sgd_with_momentum_and_decay(schedule):
    data = make_data(10, work=0.7)
    params, metrics = jax.jit(
        lambda data: fit.fit(loss, OPTIMIZER, PARAMS, KEY, data, schedule)
    )(data)

    order_key, _ = jax.random.split(KEY)
    w, b = np.array([0.3, -0.2, 0.1]), 0.5
    velocity_w, velocity_b, values = np.zeros(3), 0.0, []
    steps = int(np.ceil(0.7 * (schedule.steps or 9) - 1e-6))
    for i in range(steps):
        batch = schedule.batch(order_key, jnp.int32(i), data)
        real = np.asarray(batch.mask) > 0
        x, y = np.asarray(batch.x, np.float64)[real], np.asarray(batch.y)[real]
        error = x @ w + b - y
        values.append(np.mean(error**2))
        gradient_w = 2 * x.T @ error / len(y) + 0.1 * w
        gradient_b = 2 * np.mean(error) + 0.1 * b
        velocity_w = 0.9 * velocity_w + gradient_w
        velocity_b = 0.9 * velocity_b + gradient_b
        w, b = w - 0.05 * velocity_w, b - 0.05 * velocity_b
    assert int(metrics["steps"]) == steps
    np.testing.assert_allclose(params["w"], w, rtol=1e-4)
    np.testing.assert_allclose(params["b"], [b], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], np.mean(values), rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(Schedule(4, 2), [10, 2, 0, 3]), (Schedule(4, steps=1), [1, 1, 0, 1])],
)
def test_short_clients_wait_for_long_ones_unchanged(schedule, steps):
    # Momentum and decay would go on moving a client whose steps are over.
    long = make_data(20)
    sizes, work = jnp.array([20, 3, 0, 9]), jnp.array([1.0, 1.0, 1.0, 0.4])

    def train(size, work):
        data = long._replace(size=size, work=work)
        return fit.fit(loss, OPTIMIZER, PARAMS, KEY, data, schedule)

    together, metrics = jax.jit(jax.vmap(train))(sizes, work)
    alone = jax.jit(train)
    for i in range(4):
        expected = alone(sizes[i], work[i])
        found = jax.tree.map(lambda a, i=i: a[i], (together, metrics))
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert metrics["steps"].tolist() == steps
    empty = jax.tree.map(lambda a: a[2], together)
    chex.assert_trees_all_equal(empty, PARAMS)
    assert float(metrics["loss"][2]) == 0.0


def test_every_step_gets_its_own_key():
    def noisy(params, batch, key):
        del batch
        return params["w"] @ jax.random.normal(key, (3,))

    data, schedule = make_data(8), Schedule(4, 2)
    params, _ = fit.fit(noisy, optax.sgd(1.0), PARAMS, KEY, data, schedule)
    _, loss_key = jax.random.split(KEY)
    noise = [jax.random.normal(jax.random.fold_in(loss_key, i), (3,)) for i in range(4)]
    np.testing.assert_allclose(PARAMS["w"] - params["w"], sum(noise), rtol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 4, 9])
def test_fold_visits_every_sample_once_in_order(size):
    data = make_data(size)

    def add(carry, batch):
        seen, total, calls = carry
        hits = (batch.y[:, None] == jnp.arange(16)[None]) & (batch.mask > 0)[:, None]
        return seen + hits.sum(0), total + batch.x.sum(0), calls + 1

    zeros = jnp.zeros(16, jnp.int32), jnp.zeros(3), jnp.int32(0)
    seen, total, calls = jax.jit(lambda data: fit.fold(add, zeros, data, 4))(data)
    assert seen.tolist() == [1] * size + [0] * (16 - size)
    mine = np.asarray(data.pool.x)[np.asarray(data.order)[3 : 3 + size]]
    np.testing.assert_allclose(total, mine.sum(0), rtol=1e-5, atol=1e-6)
    assert int(calls) == -(-size // 4)


def test_fold_keeps_the_order_of_the_rows():
    def append(carry, batch):
        i, found = carry
        return i + 4, jax.lax.dynamic_update_slice(found, batch.y, (i,))

    data = make_data(10)
    _, found = fit.fold(append, (0, jnp.full(12, -1)), data, 4)
    labels = np.asarray(data.pool.y)[np.asarray(data.order)[3:13]]
    np.testing.assert_array_equal(found[:10], labels)


def test_a_table_has_a_row_for_every_sample():
    def rows(i, batch):
        return jnp.stack([batch.x + i, -2 * batch.x], axis=1)

    tabulate = jax.jit(lambda data: fit.tabulate(rows, data, 4, 9))
    for size in (0, 3, 9):
        data = make_data(size)
        mine = np.asarray(data.pool.x)[np.asarray(data.order)[3 : 3 + size]]
        table = tabulate(data)
        assert table.shape == (12, 2, 3)
        batch = np.arange(size)[:, None] // 4
        np.testing.assert_allclose(table[:size, 0], mine + batch, rtol=1e-6)
        np.testing.assert_allclose(table[:size, 1], -2 * mine, rtol=1e-6)


@pytest.mark.parametrize("schedule", [Schedule(4, 1), Schedule(4, steps=3)])
def test_a_batch_of_a_client_without_samples_is_empty(schedule):
    batch = schedule.batch(KEY, jnp.int32(0), make_data(0))
    assert not batch.mask.any() and not batch.x.any() and not batch.y.any()


def test_masked_losses():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    y, mask = np.array([0, 2, 1, 1, 0]), np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    expected = -np.mean(log_p[[0, 1, 3], [0, 2, 1]])
    batch = fit.Batch(jnp.zeros((5, 2)), jnp.asarray(y), jnp.asarray(mask))
    found = fit.cross_entropy(jnp.asarray(logits, jnp.float32), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert float(fit.masked_mean(jnp.ones(5), jnp.zeros(5))) == 0.0


def test_a_rate_by_round_asks_for_the_round():
    optimizer = fit.scale_by_round(lambda count: 0.5**count)
    with pytest.raises(ValueError, match="round="):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
