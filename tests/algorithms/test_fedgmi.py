"""FedGMI: densities in closed form, steps by hand, FedAvg, and two obvious domains."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from fedgen.aggregators import mixture
from fedgen.algorithms import _fedgmi_stages, _vae_mixture, fedgmi_estimates
from fedgen.algorithms._fedgmi_stages import Plan, Progress, next_seed
from fedgen.algorithms._vae_mixture import Components, Density
from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedgmi import fedgmi
from fedgen.core import participation, rounds, simulate
from fedgen.core.execution import Execution
from fedgen.core.federation import Batch, Cohort, Data, Federation, Pool, Rows
from fedgen.core.fit import Schedule
from fedgen.models.vae import Vae, mlp_vae

KEY = jax.random.key(3)
RATE = 0.25


def normal(dim):
    """Build a "VAE" without a code: a normal distribution whose mean is learnt."""

    def init(key):
        del key
        return {"mean": jnp.zeros(dim), "log_variance": jnp.zeros([])}

    def encode(params, x, y=None):
        del params, y
        return jnp.zeros((x.shape[0], 1)), jnp.zeros((x.shape[0], 1))

    def decode(params, z, y=None):
        del y
        return jnp.broadcast_to(params["mean"], (z.shape[0], dim))

    return Vae("normal", init, encode, decode, False)


def any_normal(shape, num_classes):
    del num_classes
    return normal(*shape)


# Densities.


@pytest.mark.parametrize("num_samples", [2, 5])
def test_the_bound_is_tight_where_the_encoder_is_exact(num_samples):
    # x = a z + noise of variance v: log N(x; 0, a^2 + v), whatever codes are drawn.
    a, v = 1.5, 0.4
    gain = a / (a**2 + v)

    def encode(params, x, y):
        del params, y
        return gain * x, jnp.full_like(x, np.log(v / (a**2 + v)))

    kind = Density(
        Vae("linear", None, encode, lambda params, z, y: a * z, False), "normal", "x"
    )
    x = np.array([[-2.0], [0.1], [3.0]], np.float32)
    bound = kind.bound(
        {"log_variance": jnp.log(v)}, KEY, jnp.asarray(x), num_samples=num_samples
    )
    expected = scipy.stats.norm.logpdf(x[:, 0], scale=np.sqrt(a**2 + v))
    np.testing.assert_allclose(bound, expected, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli"])
def test_images_are_probabilities_of_pixels(likelihood):
    logits = np.array([0.0, 1.5, -2.0])
    vae = normal(3)._replace(
        decode=lambda params, z, y: jnp.broadcast_to(jnp.asarray(logits), (2, 3))
    )
    x = jnp.asarray([[1.0, 1.0, 0.0], [-1.0, 3.0, -1.0]])  # white, black, grey, clipped
    pixel = np.array([[1, 1, 0.5], [0, 1, 0]])
    bound = Density(vae, likelihood, "x").bound({}, KEY, x)
    expected = -np.sum(np.logaddexp(0, logits) - pixel * logits, axis=1)
    if likelihood == "continuous_bernoulli":
        scale = [2.0] + [a / np.tanh(a / 2) for a in logits[1:]]
        expected += np.sum(np.log(scale))
    np.testing.assert_allclose(bound, expected, rtol=1e-5)


def test_joint_and_marginal_densities(toy_model):
    model, rng = toy_model(), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    batch = Batch(x, jnp.asarray([2, 0, 3]), jnp.ones(3))
    classifiers = jax.vmap(model.init)(jax.random.split(KEY))
    labels = jnp.asarray([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])

    def both(conditional, kind, samples):
        vae = mlp_vae((4,), 4, hidden=3, latent=2, conditional=conditional)
        components = Components(
            jax.vmap(vae.init)(jax.random.split(KEY)),
            classifiers,
            labels if conditional else (),
        )
        kind = Density(vae, "bernoulli", kind)

        @jax.jit
        def tables(y):
            new = batch._replace(y=y)
            joint = kind.joint(model, components, KEY, new, samples)
            return joint, kind.marginal(components, KEY, x, samples)

        return tables

    inputs, marginal = both(False, "x", 2)(batch.y)
    np.testing.assert_allclose(inputs, marginal, rtol=1e-6)
    assert inputs.shape == (3, 2) and np.all(inputs[:, 0] != inputs[:, 1])

    pairs, marginal = both(False, "xy", 2)(batch.y)
    np.testing.assert_allclose(marginal, inputs, rtol=1e-6)
    for k in range(2):
        logits = model.apply(jax.tree.map(lambda a, k=k: a[k], classifiers), x)
        known = jax.nn.log_softmax(logits)[np.arange(3), batch.y]
        np.testing.assert_allclose(pairs[:, k] - inputs[:, k], known, atol=1e-5)

    tables = both(True, "cvae", 2)
    each = [tables(jnp.full(3, c)) for c in range(4)]
    total = scipy.special.logsumexp([np.asarray(joint) for joint, _ in each], axis=0)
    np.testing.assert_allclose(each[0][1], total, rtol=1e-5)


def test_rare_labels_stay_possible():
    labels = _vae_mixture._log_labels(jnp.asarray([[1.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(np.exp(labels), [[0.9925] + [0.0025] * 3], rtol=1e-5)


# E-step's table and resampling.


def client_of(size, start=2):
    pool = Pool(jnp.arange(20.0)[:, None], jnp.arange(20))
    order = jnp.asarray(np.random.default_rng(0).permutation(20), jnp.int32)
    return Data(pool, order, jnp.int32(start), jnp.int32(size), jnp.float32(1))


def test_the_table_has_a_row_for_every_sample():
    data = _vae_mixture.subset(KEY, client_of(7), 9)
    assert data.order.shape == (9,) and int(data.size) == 7
    np.testing.assert_array_equal(data.order[:7], client_of(7).order[2:9])
    table = _vae_mixture.tabulate(
        lambda key, batch: batch.x * jnp.asarray([[1.0, -2.0]]), 2, KEY, data, 4
    )
    assert table.shape == (9, 2)
    x = np.asarray(data.order[:7], float)
    np.testing.assert_allclose(table[:7], np.stack([x, -2 * x], axis=1))


def test_a_client_with_too_many_samples_uses_some_of_them():
    held = np.asarray(client_of(7).order[2:9]).tolist()
    drawn = jax.vmap(lambda key: _vae_mixture.subset(key, client_of(7), 5).order)
    chosen = np.asarray(drawn(jax.random.split(KEY, 40)))
    assert all(len(set(row)) == 5 and set(row) <= set(held) for row in chosen.tolist())
    assert set(chosen[:, 0].tolist()) == set(held)


def test_resampling_by_ones_changes_nothing():
    data = _vae_mixture.subset(KEY, client_of(7), 9)
    ones = (jnp.arange(9) < 7).astype(jnp.float32)
    resample = jax.vmap(lambda key: _vae_mixture.resample(key, data, ones))
    drawn = resample(jax.random.split(KEY, 20))
    assert np.all(drawn.size == 7)
    np.testing.assert_array_equal(drawn.order[:, :7], np.tile(data.order[:7], (20, 1)))


def test_resampling_draws_in_proportion():
    data = _vae_mixture.subset(KEY, client_of(5, start=0), 6)
    r = np.array([0.9, 0.0, 0.3, 1.0, 0.7, 0.0])  # sums to 2.9, so 3 are drawn
    resample = jax.vmap(lambda key: _vae_mixture.resample(key, data, jnp.asarray(r)))
    drawn = resample(jax.random.split(KEY, 400))
    assert np.all(drawn.size == 3)
    each = np.asarray(drawn.order[:, :3, None] == data.order[None, None, :5])
    count = each.sum(axis=1)
    expected = 3 * r[:5] / r.sum()
    assert np.all(count >= np.floor(expected)) and np.all(count <= np.ceil(expected))
    np.testing.assert_allclose(count.mean(axis=0), expected, atol=0.08)
    nothing = _vae_mixture.resample(KEY, data, jnp.zeros(6))
    assert int(nothing.size) == 0


# Messages.


def test_what_is_sent():
    r = jnp.asarray([[0.5, 1.0, 0.0], [0.1, 1.0, 0.2]])  # masses 0.6, 2.0, 0.2
    index, weight, kept = _vae_mixture.choose(KEY, r, "all", 1)
    np.testing.assert_allclose(weight, [0.6, 2.0, 0.0])  # 0.2 rounds to no sample
    np.testing.assert_allclose(kept, r)
    index, weight, kept = _vae_mixture.choose(KEY, r, "top", 2)
    assert index.tolist() == [1, 0]
    np.testing.assert_allclose(weight, [2.0, 0.6])
    np.testing.assert_allclose(kept, r * jnp.asarray([[1, 1, 0]]))
    many = jax.vmap(lambda key: _vae_mixture.choose(key, r, "sampled", 1))
    index, weight, kept = many(jax.random.split(KEY, 600))
    share = np.bincount(np.ravel(index), minlength=3) / 600
    np.testing.assert_allclose(share, np.array([0.6, 2.0, 0.2]) / 2.8, atol=0.07)
    # n_k / pi_k is the number of all samples.
    np.testing.assert_allclose(weight[index < 2], 2.8, rtol=1e-6)
    assert np.all((np.asarray(kept).sum(1) > 0).sum(1) == 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_partial_uploads_are_averaged_by_component(dtype):
    components = {"w": jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    delta = {"w": jnp.asarray([[1.0, 1.0], [2.0, 4.0], [8.0, 8.0]])}
    messages = [
        _vae_mixture.to_message(jnp.asarray(i), jnp.asarray(w), delta, "top", dtype)
        for i, w in (([0, 1], [3.0, 1.0]), ([1, 2], [3.0, 0.0]))
    ]
    assert {m.delta["w"].dtype.name for m in messages} == {dtype}
    messages[1] = jax.tree.map(lambda a: a, messages[1])
    messages[1].delta["w"] = 2 * messages[1].delta["w"]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *messages)
    moved, weight = _vae_mixture.move(components, stacked)
    assert weight.tolist() == [3.0, 4.0, 0.0]
    # Component 1 moves by (1 d + 3 (2 d)) / 4, and nobody moves component 2.
    np.testing.assert_allclose(
        moved["w"], [[2.0, 3.0], [3 + 3.5, 4 + 7.0], [5.0, 6.0]], rtol=1e-6
    )


def test_label_frequencies():
    r = jnp.asarray([[1.0, 0.5], [0.0, 0.5], [1.0, 0.0]])
    mean = _vae_mixture.mean_labels(jnp.asarray([0, 2, 2]), r, 3)
    np.testing.assert_allclose(mean.value, [[0.5, 0, 0.5], [0.5, 0, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(mean.weight, [[2.0], [1.0]])


@pytest.mark.parametrize(
    ("settings", "vaes", "itemsize"),
    [
        ({}, (3, 3), 4),
        ({"upload": "top", "num_sent": 2}, (3, 2), 4),
        ({"upload": "sampled"}, (3, 1), 4),
        ({"payload": "float16"}, (3, 3), 2),
    ],
)
def test_bytes(toy_federation, settings, vaes, itemsize):
    federation = toy_federation((3, 4), spare=0)
    algorithm = fedgmi(
        optax.sgd(0.1), Schedule(4), num_components=3, hidden=3, latent=2, **settings
    )
    shape = jax.eval_shape(lambda: algorithm.init(KEY, federation))
    state = rounds.State(jnp.int32(0), *shape)
    ((down, up),) = rounds.traffic(algorithm, federation, state)
    vae = (4 * 3 + 3) + (3 * 4 + 4) + (2 * 3 + 3) + (3 * 4 + 4)
    classifier = (4 * 6 + 6) + (6 * 5 + 5) + (5 * 4 + 4)
    # Offsets, clock, planted and whether one is asked; up, weights and what is told.
    assert down == itemsize * vaes[0] * (vae + classifier) + 3 * 4 + 4 + 4 + 1
    index = 0 if vaes[1] == 3 else 2 * 4 * vaes[1]
    sent = itemsize * vaes[1] * (vae + classifier)
    assert up == sent + 2 * 4 * vaes[1] + index + 3 * 4


# Stages.


def test_the_next_seed_is_who_the_seeds_explain_worst():
    weight, ids = jnp.asarray([9.0, 9.0, 9.0, 1.0, 0.0]), jnp.asarray([4, 7, 2, 1, 0])
    # Columns: two seeds, the shared VAE. Clients 1 and 0 are too small and absent.
    told = jnp.asarray(
        [
            [-1.0, -9.0, -3.0],
            [-8.0, -2.0, -4.0],
            [-7.0, -6.0, -5.0],
            [-90.0, -90.0, -1.0],
            [-90.0, -90.0, -1.0],
        ]
    )
    for seeds, expected in ((0, 2), (1, 7), (2, 2)):
        assert int(next_seed(told, weight, ids, jnp.int32(seeds))) == expected
    assert int(next_seed(told, jnp.zeros(5), ids, jnp.int32(1))) == -1
    equal = jnp.zeros((5, 3))
    assert int(next_seed(equal, weight, ids, jnp.int32(2))) == 2


def test_the_order_of_the_stages():
    # Clients 0, 1 and 2 are pure, 3 is mixed. A VAE gains on the shared one by 4 on its
    # own component and loses 5 on others, and client 0 is difficult for the shared one.
    purity = np.vstack([np.eye(3), np.full((1, 3), 1 / 3)])
    shared = np.array([-5.5, -5.0, -5.0, -5.0])
    plan = Plan(3, 2, 2, 16.0, 1)
    progress = plan.start(seeded=False)
    owner, trace, chosen = [None] * 3, [], []
    for i in range(16):
        stage = plan.stage(progress)
        flags = (stage.shared, stage.seeding, stage.annealing)
        trace.append(("".join(str(int(flag)) for flag in flags), stage.temperature))
        asked, slot = int(progress.asked), int(_fedgmi_stages.slot(progress))
        told = np.stack(
            [shared if j is None else 9 * purity @ purity[j] - 10 for j in owner], 1
        )
        came = asked >= 0 and i != 5
        if asked >= 0:
            chosen.append(asked)
        if came:
            owner[slot] = asked
        progress = plan.advance(
            progress,
            jnp.asarray(told, jnp.float32),
            jnp.full(4, 10.0),
            jnp.arange(4),
            jnp.array(came),
        )
    # 2 (3 + 1) + 1 rounds of seeding, and two for the client that did not come.
    assert [flags for flags, _ in trace] == (
        ["100"] * 2 + ["010"] * 11 + ["001"] * 2 + ["000"]
    )
    np.testing.assert_allclose([t for _, t in trace][12:], [1, 16, 4, 1], rtol=1e-6)
    # The first finds another corner, is dropped, and is the last to be found again.
    assert chosen == [0, 1, 1, 2, 0] and owner == [1, 2, 0]


def test_offsets_start_at_mean_densities():
    plan = Plan(2, 0, 4, 16.0, 1)
    start = plan.start(seeded=False)._replace(planted=jnp.int32(3))
    told = jnp.asarray([[-8.0, -2.0], [-4.0, -6.0]])
    weight = jnp.asarray([3.0, 1.0])  # means -7 and -3
    after = plan.advance(start, told, weight, jnp.arange(2), jnp.array(False))
    np.testing.assert_allclose(after.offset, [-2.0, 2.0])
    assert not bool(plan.stage(after).seeding)


@pytest.mark.parametrize(("every", "rest"), [(1, [0, 0, 0, 0]), (2, [0, 1, 0, 1])])
def test_lazy_vaes_rest(every, rest):
    plan = Plan(2, 3, 2, 4.0, every)
    start = plan.start(seeded=True)
    lazy = [plan.stage(start._replace(clock=jnp.int32(c))).lazy for c in range(7)]
    assert [int(a) for a in lazy] == [0, 0, 0, *rest]


def test_offsets_balance_masses():
    plan = Plan(2, 0, 4, 16.0, 1)
    start = plan.start(seeded=True)
    told = jnp.asarray([[0.9, 0.1], [0.5, 0.5]])
    # Weighted masses 0.8 and 0.2, at tau 16: b = 16 log 0.8 and 16 log 0.2, centred.
    after = plan.advance(
        start, told, jnp.asarray([3.0, 1.0]), jnp.arange(2), jnp.array(False)
    )
    half = 16 * np.log(4) / 2
    np.testing.assert_allclose(after.offset, [half, -half], rtol=1e-5)
    assert int(after.clock) == 1
    em = start._replace(clock=jnp.int32(4))
    after = plan.advance(em, told, jnp.ones(2), jnp.arange(2), jnp.array(False))
    np.testing.assert_allclose(after.offset, 0, atol=1e-6)


# Steps by hand, with normal distributions for VAEs and Adam's first step, +-RATE.


@pytest.fixture(scope="module")
def by_hand(scalar_federation):
    federation = scalar_federation(
        [[11.0, 11.0, -10.5], [9.5, -9.0]], [[0, 1, 1], [0, 1]], w=0.5, v=1.0
    )
    optimizer, schedule = optax.sgd(0.1), Schedule(4)
    algorithm = fedgmi(
        optimizer,
        schedule,
        likelihood="normal",
        vae_epochs=1,
        vae_learning_rate=RATE,
        pretrain_rounds=1,
        anneal_rounds=2,
        max_samples=4,
        vae=any_normal,
    )

    def first(algorithm):
        state = rounds.init_state(algorithm, federation, KEY)
        step = jax.jit(
            rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
        )
        return step, step(state, federation, KEY)[0]

    step, state = first(algorithm)
    _, expected = first(fedavg(optimizer, schedule))
    return federation, step, state, expected


def test_the_shared_step(by_hand):
    _, _, state, fedavg_state = by_hand
    # Client means 11.5 / 3 and 0.25 are both positive.
    vaes = state.server.components.vaes
    np.testing.assert_allclose(vaes["mean"], [[RATE], [RATE]], rtol=1e-4)
    for k in range(2):
        own = jax.tree.map(lambda a, k=k: a[k], state.server.components.classifiers)
        chex.assert_trees_all_close(own, fedavg_state.server.params, rtol=1e-6)
    np.testing.assert_array_equal(state.clients[0], np.full((2, 2), 0.5))
    assert int(state.server.progress.clock) == 1


def test_the_em_step(by_hand):
    federation, step, state, _ = by_hand
    components = state.server.components
    vaes = components.vaes | {"mean": jnp.asarray([[10.0], [-10.0]])}
    server = state.server._replace(
        components=components._replace(vaes=vaes),
        progress=Plan(2, 1, 2, 30.0, 1).start(seeded=True)._replace(clock=jnp.int32(3)),
    )
    after, report = step(state._replace(server=server), federation, KEY)
    np.testing.assert_allclose(
        after.clients[0], [[2 / 3, 1 / 3], [0.5, 0.5]], atol=1e-4
    )
    # Component 0: up by client 0 with two samples, down by client 1 with one.
    mean = after.server.components.vaes["mean"]
    np.testing.assert_allclose(mean, [[10 + RATE / 3], [-10.0]], rtol=1e-5)
    # Two numbers a VAE and two a classifier; all four arrive.
    assert float(report.metrics["bytes_up"]) == 4 * (2 * 2 + 2 * 2)


def test_an_annealed_step_ignores_proportions_and_offsets_it(by_hand):
    federation, step, state, _ = by_hand
    server = state.server._replace(
        progress=Progress(
            jnp.asarray([15.0 * np.log(3), -15.0 * np.log(3)], jnp.float32),
            jnp.int32(1),
            jnp.int32(4),
            jnp.int32(-1),
        )
    )
    after, report = step(state._replace(server=server), federation, KEY)
    # Equal VAEs, tau = 30: r = softmax(-b / 30) = (1, 3) / 4, so b moves by 30 log r,
    # which is 15 log(1 / 3) for component 0 once centred, back to 0.
    assert float(report.metrics["server/temperature"]) == 30.0
    np.testing.assert_allclose(after.server.progress.offset, 0, atol=1e-4)
    np.testing.assert_array_equal(after.clients[0], np.full((2, 2), 0.5))


def test_a_seed_grows_from_the_shared_vae(by_hand):
    federation, step, state, _ = by_hand
    vaes = state.server.components.vaes | {"mean": jnp.asarray([[107.0], [1.0]])}
    progress = Plan(2, 1, 2, 30.0, 1).start(seeded=False)
    for planted, slot in ((0, 0), (2, 1)):
        server = state.server._replace(
            components=state.server.components._replace(vaes=vaes),
            progress=progress._replace(
                clock=jnp.int32(1), planted=jnp.int32(planted), asked=jnp.int32(1)
            ),
        )
        after, report = step(state._replace(server=server), federation, KEY)
        mean = np.asarray(after.server.components.vaes["mean"])
        # Client 1 has mean 0.25, which 30 steps of RATE reach from 1 and not from 107.
        assert 0.01 < abs(mean[slot, 0] - 1) < 3
        assert mean[1 - slot, 0] == [1.0, 107.0][slot]
        after = after.server.progress
        assert (int(after.planted), int(after.asked)) == (planted + 1, -1)
        assert int(after.clock) == 1
        assert float(report.metrics["bytes_down"]) == 4 * (2 * 2 + 2)


def test_gates_by_hand(by_hand):
    federation, _, state, _ = by_hand
    components = Components(
        state.server.components.vaes | {"mean": jnp.asarray([[1.0], [-1.0]])},
        {"body": jnp.asarray([1.0, 1.0]), "head": jnp.asarray([2.0, -1.0])},
        (),
    )
    components.vaes["log_variance"] = jnp.zeros(2)
    server = state.server._replace(components=components)
    share, x = np.array([0.25, 0.75]), np.array([[0.0], [0.5]], np.float32)
    p = scipy.special.expit(x * np.array([[2.0, -1.0]]))  # of class 1, [b, k]
    density = share * np.exp(-((x - np.array([[1.0, -1.0]])) ** 2) / 2)
    rho = density / density.sum(1, keepdims=True)
    expected = {
        "posterior": np.sum(rho * p, axis=1),
        "prior": p @ share,
        "params": scipy.special.expit(x[:, 0] * (2 * 0.25 - 0.75)),
    }
    for gate, value in expected.items():
        own = fedgmi(
            optax.sgd(0.1), Schedule(4), gate=gate, likelihood="normal", vae=any_normal
        )
        logits = own.predict(
            federation.context(0), server, jnp.asarray(share, jnp.float32), x
        )
        np.testing.assert_allclose(
            jax.nn.softmax(logits)[:, 1], value, rtol=1e-4, err_msg=gate
        )


# Two obvious domains, with real VAEs.


def images(truth, size, seed):
    """Deal 4 x 4 images whose left (domain 0) or right (1) half is bright."""
    rng = np.random.default_rng(seed)
    domain = np.concatenate([np.arange(size) >= round(p * size) for p, _ in truth])
    bright = np.where(domain[:, None], np.arange(4) >= 2, np.arange(4) < 2)
    x = np.where(bright[:, None], 0.8, -0.8) + 0.1 * rng.normal(
        size=(len(domain), 4, 4)
    )
    y = rng.integers(0, 2, len(domain))
    x[:, 0] *= np.where(y, 1.0, -1.0)[:, None]
    n = len(truth)
    rows = Rows(jnp.arange(n) * size, jnp.full(n, size))
    return Pool(jnp.asarray(x, jnp.float32), jnp.asarray(y)), rows, domain


@pytest.fixture(scope="module")
def learned(toy_model):
    share = np.array([0.9, 0.1, 0.5, 0.75])
    truth = np.stack([share, 1 - share], axis=1)
    pool, rows, domain = images(truth, 20, 0)
    model = toy_model(dim=3, features=16, num_classes=2)
    model = model._replace(embed=lambda p, x: toy_embed(model, p, x))
    cohort = Cohort(model, jnp.arange(4), jnp.arange(80), rows, rows, rows, 4)
    federation = Federation(pool, (cohort,), 2)
    algorithm = fedgmi(
        optax.sgd(0.1),
        Schedule(10),
        hidden=8,
        latent=2,
        vae_epochs=5,
        vae_learning_rate=0.02,
        pretrain_rounds=3,
        seed_epochs=20,
        anneal_rounds=3,
        temperature=3.0,
        max_samples=20,
    )
    execution = Execution(chunk=1)
    block = simulate.make_block(
        rounds.make_round(algorithm, participation.full(), execution), 15
    )
    state = rounds.init_state(algorithm, federation, KEY)
    state, _ = block(state, federation, KEY, jnp.int32(2))
    proportions = jax.jit(fedgmi_estimates.make_proportions(algorithm, execution))
    early = proportions(state, federation, KEY)
    state, reports = block(state, federation, KEY, jnp.int32(15))
    return block, federation, state, reports, proportions, early, truth


def toy_embed(model, params, x):
    hidden = params["body"]["hidden"]
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ hidden["kernel"] + hidden["bias"][None])
    return x @ params["body"]["out"]["kernel"] + params["body"]["out"]["bias"][None]


def test_equal_components_share_equally(learned):
    early = learned[5]
    np.testing.assert_allclose(early, np.full((4, 2), 0.5), atol=1e-5)


def test_proportions_of_obvious_domains_are_found(learned):
    _, federation, state, _, proportions, _, truth = learned
    # 3 rounds, 2 (2 + 1) + 1 of seeding, then 7 more.
    assert int(state.server.progress.clock) == 10
    estimate = proportions(state, federation, KEY)
    error = fedgmi_estimates.proportion_error(estimate, jnp.asarray(truth, jnp.float32))
    assert float(error) < 0.02
    error = fedgmi_estimates.proportion_error(
        state.clients[0], jnp.asarray(truth, jnp.float32)
    )
    assert float(error) < 0.02


def test_new_clients_take_e_and_pi_steps_only(learned):
    _, federation, state, _, proportions, _, _ = learned
    truth = np.array([[1.0, 0.0], [0.3, 0.7], [0.6, 0.4], [0.0, 1.0]])
    pool, _, _ = images(truth, 20, 1)
    newcomers = dataclasses.replace(federation, pool=pool)
    estimate = proportions(state, newcomers, KEY)
    error = fedgmi_estimates.proportion_error(estimate, jnp.asarray(truth, jnp.float32))
    assert float(error) < 0.02


def test_all_stages_share_one_compilation(learned):
    block, _, _, reports, *_ = learned
    assert block._cache_size() == 1
    # Seeding and annealing did take place in there.
    temperature = np.asarray(reports.metrics["server/temperature"])
    assert temperature.max() == 3.0 and temperature[-1] == 1.0


# Estimates.


def test_error_of_proportions_does_not_depend_on_their_order():
    truth = jnp.asarray([[0.2, 0.8], [0.6, 0.4]])
    estimate = jnp.asarray([[0.7, 0.3], [0.4, 0.6]])
    error = fedgmi_estimates.proportion_error(estimate, truth)
    np.testing.assert_allclose(error, 0.05, rtol=1e-5)


def test_the_cross_density_matrix(scalar_federation):
    # Normal distributions, five clients of each of two; the last is noisy.
    centre, noise = np.repeat([-4.0, 4.0], 5), np.append(np.full(9, 0.3), 2.0)
    x = np.random.default_rng(0).normal(centre[:, None], noise[:, None], (10, 8))
    federation = scalar_federation(x, np.zeros((10, 8), int), w=1.0, v=1.0)
    cross = fedgmi_estimates.cross_density(
        Density(normal(1), "normal", "x"),
        normal(1).init(KEY),
        federation,
        KEY,
        epochs=40,
        learning_rate=0.15,
        batch_size=4,
    )
    same = np.equal.outer(centre, centre)
    same[-1] = same[:, -1] = False
    assert np.min(np.asarray(cross)[same]) > np.max(
        np.asarray(cross)[:9, :9][~same[:9, :9]]
    )
    # Row i is of the samples of client i: others' VAEs are too narrow for the noise.
    assert np.all(cross[-1, 5:9] < cross[5:9, -1])
    _, values = mixture.estimate_num_components(cross[:9, :9])
    assert values[0] > 5 * values[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_components", 0),
        ("density", "y"),
        ("likelihood", "poisson"),
        ("gate", "hard"),
        ("vae_epochs", 0),
        ("vae_learning_rate", 0.0),
        ("pretrain_rounds", 0),
        ("seed_epochs", 0),
        ("anneal_rounds", -1),
        ("temperature", 0.5),
        ("concentration", 0.5),
        ("num_samples", 0),
        ("max_samples", 0),
        ("upload", "none"),
        ("num_sent", 3),
        ("vae_every", 0),
        ("payload", "int8"),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        fedgmi(optax.sgd(0.1), Schedule(4), **{name: value})
