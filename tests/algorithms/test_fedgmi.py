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

from fedgen.algorithms import _survey, _vae_mixture, fedgmi_estimates
from fedgen.algorithms._survey import NUM_FEATURES as D
from fedgen.algorithms._survey import Guide
from fedgen.algorithms._vae_mixture import Components, Density
from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedgmi import fedgmi
from fedgen.core import participation, rounds, simulate
from fedgen.core.algorithm import Mean
from fedgen.core.execution import Execution, make_mesh, place
from fedgen.core.federation import Batch, Cohort, Data, Federation, Pool, Rows
from fedgen.core.fit import Schedule
from fedgen.models.mlp import mlp
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


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli", "continuous_bernoulli"])
def test_generated_samples_are_means(likelihood):
    logits = np.array([0.0, 0.02, -0.04, 1.5, -6.0])
    vae = normal(5)._replace(
        decode=lambda params, z, y: jnp.tile(params["mean"][None], (len(z), 1))
    )
    components = Components({"mean": jnp.asarray([logits, -logits])}, (), ())
    found = fedgmi_estimates.generate(
        Density(vae, likelihood, "x"), components, KEY, 3, (5, 1)
    )
    assert found.shape == (2, 3, 5, 1)
    grid = (np.arange(200000) + 0.5) / 200000

    def expected(a):
        if likelihood == "normal":
            return a
        if likelihood == "bernoulli":
            return 2 * scipy.special.expit(a) - 1
        # The density is proportional to exp(a x) on [0, 1].
        weight = np.exp(a * grid)
        return 2 * np.mean(grid * weight) / np.mean(weight) - 1

    for k, sign in enumerate((1, -1)):
        mean = [expected(sign * a) for a in logits]
        np.testing.assert_allclose(found[k, 1, :, 0], mean, atol=1e-4)


# The E-step's samples and resampling.


def client_of(size, start=2):
    pool = Pool(jnp.arange(20.0)[:, None], jnp.arange(20))
    order = jnp.asarray(np.random.default_rng(0).permutation(20), jnp.int32)
    return Data(pool, order, jnp.int32(start), jnp.int32(size), jnp.float32(1))


def test_a_client_with_few_samples_uses_them_all():
    data = _vae_mixture.subset(KEY, client_of(7), 9)
    assert data.order.shape == (9,) and int(data.size) == 7
    np.testing.assert_array_equal(data.order[:7], client_of(7).order[2:9])


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
    # The guide and the clock; up, weights and what is told.
    assert down == itemsize * vaes[0] * (vae + classifier) + 3 * 4 * (D + 1) + 4
    index = 0 if vaes[1] == 3 else 2 * 4 * vaes[1]
    sent = itemsize * vaes[1] * (vae + classifier)
    assert up == sent + 2 * 4 * vaes[1] + index + 4 * (D + D**2 + 1)


# The survey.


def test_features_give_a_gaussian_kernel():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (60, 4, 5)).astype(np.float32)
    y = rng.integers(0, 3, 60)
    batch = Batch(jnp.asarray(x), jnp.asarray(y), jnp.ones(60))
    flat = x.reshape(60, -1)
    squared = np.sum((flat[:, None] - flat[None]) ** 2, -1) / (20 * 0.7**2)
    other = 2 * (y[:, None] != y[None]) / 0.7**2
    for classes, distance in ((0, squared), (3, squared + other)):
        z = np.asarray(_survey.random_features(20, classes)(batch))
        assert z.shape == (60, D)
        error = 2 / D * z @ z.T - np.exp(-distance / 2)
        # Of D independent terms, each between -2 and 2.
        assert np.sqrt(np.mean(error**2)) < 1.3 / np.sqrt(D)
        assert abs(np.mean(error)) < 0.6 / np.sqrt(D)


def by_entry(batch):
    return jnp.pad(batch.x, ((0, 0), (0, D - 1)))


def test_a_client_tells_mean_and_covariance():
    data = client_of(7)
    told = _survey.tell(by_entry, data, 4)
    x = np.asarray(data.pool.x)[np.asarray(data.order[2:9]), 0]
    np.testing.assert_allclose(told.mean[:2], [x.mean(), 0], rtol=1e-5)
    np.testing.assert_allclose(told.cov.value[0, 0], x.var(ddof=1), rtol=1e-4)
    assert float(told.cov.weight) == 6
    nothing = _survey.tell(by_entry, client_of(0), 4)
    assert float(nothing.cov.weight) == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(nothing))


def test_the_server_keeps_the_newest_word_of_everybody():
    rows = Rows(jnp.zeros(4, jnp.int32), jnp.zeros(4, jnp.int32))
    ids = jnp.asarray([7, 4, -1, 5])
    cohort = Cohort(mlp((2,), 2, 3), ids, ids, rows, rows, rows, 3)
    survey, _ = _survey.start(cohort, 2)
    assert survey.id.tolist() == [4, 5, 7]
    for ids, weights, means, cov in (
        ([7, 4], [2.0, 6.0], [1.0, 2.0], 3.0),
        # Client 7 again; 5 has failed; somebody unknown is heard by nobody.
        ([7, 5, 9], [2.0, 0.0, 3.0], [5.0, 8.0, 9.0], 5.0),
    ):
        told = _survey.Told(
            jnp.tile(jnp.asarray(means)[:, None], (1, D)),
            Mean(cov * jnp.eye(D), jnp.float32(sum(weights))),
        )
        survey = _survey.listen(survey, jnp.asarray(ids), jnp.asarray(weights), told)
    assert survey.count.tolist() == [6.0, 0.0, 2.0]
    np.testing.assert_allclose(survey.mean[:, 0], [2.0, 0.0, 5.0])
    np.testing.assert_allclose(survey.cov, (8 * 3 + 5 * 5) / 13 * np.eye(D), rtol=1e-5)


def domains(share, size, seed):
    """Deal normal samples about two far points of a plane; `share` of the first."""
    rng = np.random.default_rng(seed)
    first = np.concatenate([np.arange(size) < round(p * size) for p in share])
    x = np.where(first[:, None], [2.0, 0.0], [-2.0, 1.0]) + 0.3 * rng.normal(
        size=(len(first), 2)
    )
    n = len(share)
    rows = Rows(jnp.arange(n) * size, jnp.full(n, size))
    pool = Pool(jnp.asarray(x, jnp.float32), jnp.zeros(len(x), jnp.int32))
    return pool, Cohort(
        mlp((2,), 2, 3), jnp.arange(n), jnp.arange(len(x)), rows, rows, rows, n
    )


def test_the_guide_tells_components_apart():
    share = np.linspace(0, 1, 12)
    pool, cohort = domains(share, 100, 0)
    features = _survey.random_features(2, 0)
    survey, _ = _survey.start(cohort, 2)
    for id_, start in zip(cohort.ids, cohort.train.start, strict=True):
        data = Data(pool, cohort.order, start, jnp.int32(100), jnp.float32(1))
        told = _survey.tell(features, data, 50)
        told = told._replace(mean=told.mean[None])
        survey = _survey.listen(survey, id_[None], jnp.full(1, 100.0), told)
    guide = jax.jit(_survey.find_guide, static_argnums=1)(survey, 2)
    batch = Batch(pool.x, pool.y, jnp.ones(len(pool.y)))
    score = features(batch) @ guide.kernel + guide.bias[None]
    first = np.asarray(jnp.argmax(score, axis=1) == 0)
    agree = np.mean(first == (np.asarray(pool.x[:, 0]) > 0))
    assert max(agree, 1 - agree) > 0.99


def test_the_number_of_components_is_estimated():
    share = np.random.default_rng(0).uniform(0, 1, 12)
    for pure, k in ((share, 2), (np.ones(12), 1)):
        pool, cohort = domains(pure, 100, 0)
        federation = Federation(pool, (cohort,), 2)
        algorithm = fedgmi(optax.sgd(0.1), Schedule(4), hidden=3, latent=2)
        with pytest.raises(ValueError, match="num_components must be given, or est"):
            jax.eval_shape(algorithm.init, KEY, federation)
        prepared = algorithm.prepared(federation)
        assert prepared.prepared(federation) is prepared
        spread = place(federation, make_mesh(2))
        server, (clients,) = jax.eval_shape(prepared.init, KEY, federation)
        assert clients.shape == (12, k)
        assert server.shared.guide.bias.shape == (k,)
        init = algorithm.prepared(spread).init
        assert jax.eval_shape(init, KEY, spread)[1][0].shape == (12, k)
    few = fedgmi(optax.sgd(0.1), Schedule(4), upload="top", num_sent=2)
    with pytest.raises(ValueError, match="num_sent must be <= 1, the number of comp"):
        few.prepared(federation)


# Steps by hand, with normal distributions for VAEs and Adam's first step, +-RATE.


SETTINGS = dict(
    num_components=2,
    likelihood="normal",
    vae_epochs=1,
    vae_learning_rate=RATE,
    pretrain_rounds=1,
    max_samples=4,
    vae=any_normal,
)


@pytest.fixture(scope="module")
def by_hand(scalar_federation):
    federation = scalar_federation(
        [[11.0, 11.0, -10.5], [9.5, -9.0]], [[0, 1, 1], [0, 1]], w=0.5, v=1.0
    )
    optimizer, schedule = optax.sgd(0.1), Schedule(4)

    def first(algorithm):
        state = rounds.init_state(algorithm, federation, KEY)
        step = jax.jit(
            rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
        )
        return step, step(state, federation, KEY)[0]

    step, state = first(fedgmi(optimizer, schedule, **SETTINGS))
    _, expected = first(fedavg(optimizer, schedule))
    return federation, step, state, expected


def at(state, clock, means, guide=None):
    """Put a state at a round, with two VAEs at given means."""
    shared = state.server.shared
    vaes = shared.components.vaes | {"mean": jnp.asarray(means)[:, None]}
    shared = shared._replace(
        components=shared.components._replace(vaes=vaes),
        guide=guide or shared.guide,
        clock=jnp.int32(clock),
    )
    return state._replace(server=state.server._replace(shared=shared))


def test_the_shared_step(by_hand):
    _, _, state, fedavg_state = by_hand
    # Client means 11.5 / 3 and 0.25 are both positive.
    shared = state.server.shared
    vaes = shared.components.vaes
    np.testing.assert_allclose(vaes["mean"], [[RATE], [RATE]], rtol=1e-4)
    for k in range(2):
        own = jax.tree.map(lambda a, k=k: a[k], shared.components.classifiers)
        chex.assert_trees_all_close(own, fedavg_state.server.params, rtol=1e-6)
    np.testing.assert_array_equal(state.clients[0], np.full((2, 2), 0.5))
    assert int(shared.clock) == 1
    assert state.server.survey.count.tolist() == [3.0, 2.0]
    assert np.any(shared.guide.kernel != 0)


def test_the_guided_step(by_hand):
    federation, step, state, _ = by_hand
    # A guide that gives all to component 1, whatever the VAEs say.
    guide = Guide(jnp.zeros((D, 2)), jnp.asarray([0.0, 50.0]))
    before = at(state, 1, [10.0, -10.0], guide)
    after, report = step(before, federation, KEY)
    np.testing.assert_allclose(after.clients[0], [[0, 1], [0, 1]], atol=1e-5)
    mean = after.server.shared.components.vaes["mean"]
    np.testing.assert_allclose(mean, [[10.0], [-10 + RATE]], rtol=1e-5)
    assert float(report.metrics["needed_up"]) == 4 * (2 + 2)
    assert int(after.server.shared.clock) == 2
    # What was told is not forgotten, and the guide not made again.
    chex.assert_trees_all_equal(after.server.survey, state.server.survey)
    chex.assert_trees_all_equal(after.server.shared.guide, guide)


def test_the_em_step(by_hand):
    federation, step, state, _ = by_hand
    after, report = step(at(state, 2, [10.0, -10.0]), federation, KEY)
    np.testing.assert_allclose(
        after.clients[0], [[2 / 3, 1 / 3], [0.5, 0.5]], atol=1e-4
    )
    # Component 0: up by client 0 with two samples, down by client 1 with one.
    mean = after.server.shared.components.vaes["mean"]
    np.testing.assert_allclose(mean, [[10 + RATE / 3], [-10.0]], rtol=1e-5)
    # Two numbers a VAE and two a classifier; all four arrive.
    assert float(report.metrics["needed_up"]) == 4 * (2 * 2 + 2 * 2)


@pytest.mark.parametrize(
    ("settings", "up"),
    [
        ({"upload": "top"}, 4 * (2 + 2)),
        ({"upload": "top", "num_sent": 2}, 4 * 2 * (2 + 2)),
        ({"payload": "bfloat16"}, 2 * 2 * (2 + 2)),
    ],
    ids=str,
)
def test_frugal_steps(by_hand, settings, up):
    federation, _, state, _ = by_hand
    algorithm = fedgmi(optax.sgd(0.1), Schedule(4), **SETTINGS, **settings)
    step = jax.jit(
        rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
    )
    after, report = step(at(state, 2, [10.0, -10.0]), federation, KEY)
    # The EM step by hand; component 1 is nobody's largest, or goes up as much as down.
    mean = after.server.shared.components.vaes["mean"]
    np.testing.assert_allclose(mean, [[10 + RATE / 3], [-10.0]], rtol=1e-3)
    assert float(report.metrics["needed_up"]) == up


def test_a_client_weighs_all_it_holds_and_uses_some(by_hand):
    federation, _, state, _ = by_hand
    sign = jnp.asarray([1.0, 1.0, 1.0, -1.0, -1.0])[:, None]
    pool = federation.pool._replace(x=jnp.abs(federation.pool.x) * sign)
    federation = dataclasses.replace(federation, pool=pool)
    settings = SETTINGS | {"max_samples": 1}
    algorithm = fedgmi(optax.sgd(0.1), Schedule(4), **settings)
    step = jax.jit(
        rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
    )
    after, _ = step(at(state, 0, [0.0, 0.0]), federation, KEY)
    # Client 0, with three samples, up; client 1, with two, down.
    mean = after.server.shared.components.vaes["mean"]
    np.testing.assert_allclose(mean, [[RATE / 5], [RATE / 5]], rtol=1e-4)


@pytest.mark.parametrize("density", ["xy", "cvae"])
def test_labels_tell_components_apart_where_inputs_do_not(by_hand, density):
    federation, _, state, _ = by_hand
    algorithm = fedgmi(optax.sgd(0.1), Schedule(4), **SETTINGS, density=density)
    step = jax.jit(
        rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
    )
    before = at(state, 2, [0.0, 0.0])
    shared, labels = before.server.shared, ()
    body, head = np.array([1.0, 1.0]), np.array([0.3, -0.2])
    if density == "cvae":
        labels = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    shared = shared._replace(
        components=shared.components._replace(
            classifiers={"body": jnp.float32(body), "head": jnp.float32(head)},
            labels=labels,
        )
    )
    before = before._replace(server=before.server._replace(shared=shared))
    after, _ = step(before, federation, KEY)
    count = np.zeros((2, 2))
    x, y = np.asarray(federation.pool.x)[:, 0], np.asarray(federation.pool.y)
    for client, rows in enumerate((slice(0, 3), slice(3, 5))):
        if density == "xy":
            margin = np.outer(x[rows], body * head)
            table = scipy.special.log_expit(np.where(y[rows, None], margin, -margin))
        else:
            table = np.log(0.99 * labels + 0.005)[:, y[rows]].T
        share = np.full(2, 0.5)
        for _ in range(2000):
            r = scipy.special.softmax(np.log(share) + table, axis=1)
            share = r.mean(axis=0)
        np.testing.assert_allclose(after.clients[0][client], share, atol=2e-3)
        count += r.T @ np.eye(2)[y[rows]]
    if density == "cvae":
        frequency = count / count.sum(axis=1, keepdims=True)
        found = after.server.shared.components.labels
        np.testing.assert_allclose(found, frequency, atol=5e-3)


@pytest.mark.parametrize(
    "truth", [[0, 1], [0, 1, 2, 0, 1], [0, -1, 0, 0, 0], [0.0, 1.0, 0.0, 0.0, 1.0]]
)
def test_a_truth_that_does_not_fit_is_refused(by_hand, truth):
    algorithm = fedgmi(optax.sgd(0.1), Schedule(4), **SETTINGS, truth=np.array(truth))
    with pytest.raises(ValueError, match=r"truth must hold integers in \[0, 2\) for 5"):
        rounds.init_state(algorithm, by_hand[0], KEY)


def test_the_diagnosis_starts_at_the_truth(by_hand):
    federation, _, state, _ = by_hand
    truth = np.array([0, 1, 0, 1, 1])
    algorithm = fedgmi(optax.sgd(0.1), Schedule(4), **SETTINGS, truth=truth)
    step = jax.jit(
        rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
    )
    after, _ = step(at(state, 1, [10.0, -10.0]), federation, KEY)
    mean = np.asarray(after.server.shared.components.vaes["mean"])[:, 0]
    # Component 0 has 11 and -10.5 of client 0, which pull it down; component 1 has 11
    # of client 0 (weight 1) and 9.5, -9 of client 1 (weight 2), all of it upwards.
    np.testing.assert_allclose(mean, [10 - RATE, -10 + RATE], rtol=1e-5)
    after, _ = step(at(after, 2, [10.0, -10.0]), federation, KEY)
    np.testing.assert_allclose(
        after.clients[0], [[2 / 3, 1 / 3], [0.5, 0.5]], atol=1e-4
    )


@pytest.mark.parametrize(
    ("pretrain_rounds", "course"),  # round: do VAEs move, what comes down of how many
    [
        (1, [(1, 1, 2, 1), (2, 0, 2, 2), (3, 1, 1, 2), (4, 0, 2, 2)]),
        (3, [(0, 1, 2, 1), (1, 0, 2, 1), (2, 1, 1, 1), (3, 1, 2, 1), (4, 0, 2, 2)]),
    ],
)
def test_lazy_vaes_rest(by_hand, pretrain_rounds, course):
    federation, _, state, _ = by_hand
    settings = SETTINGS | {"pretrain_rounds": pretrain_rounds, "vae_every": 2}
    algorithm = fedgmi(optax.sgd(0.1), Schedule(4), **settings)
    step = jax.jit(
        rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
    )
    for clock, moved, parts, models in course:
        before = at(state, clock, [10.0, -10.0])
        after, report = step(before, federation, KEY)
        new, old = (s.server.shared.components for s in (after, before))
        assert bool(np.any(new.vaes["mean"][0] != old.vaes["mean"][0])) == moved
        assert np.any(new.classifiers["head"] != old.classifiers["head"])
        # VAEs come down in the round after they moved; the first round needs one.
        # Models have two numbers each, of four bytes.
        assert float(report.metrics["needed_down"]) == 4 * models * 2 * parts


def test_one_component_is_fedavg(by_hand, train):
    federation = by_hand[0]
    optimizer, schedule = optax.sgd(0.1), Schedule(4)
    settings = SETTINGS | {"num_components": 1}
    state = train(fedgmi(optimizer, schedule, **settings), federation, 4)
    expected = train(fedavg(optimizer, schedule), federation, 4)
    own = jax.tree.map(lambda a: a[0], state.server.shared.components.classifiers)
    chex.assert_trees_all_close(own, expected.server.params, rtol=1e-5)


def test_gates_by_hand(by_hand):
    federation, _, state, _ = by_hand
    shared = state.server.shared
    components = Components(
        shared.components.vaes | {"mean": jnp.asarray([[1.0], [-1.0]])},
        {"body": jnp.asarray([1.0, 1.0]), "head": jnp.asarray([2.0, -1.0])},
        (),
    )
    components.vaes["log_variance"] = jnp.zeros(2)
    server = state.server._replace(shared=shared._replace(components=components))
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
        own = fedgmi(optax.sgd(0.1), Schedule(4), gate=gate, **SETTINGS)
        logits = own.predict(
            federation.context(0), server, jnp.asarray(share, jnp.float32), x
        )
        np.testing.assert_allclose(
            jax.nn.softmax(logits)[:, 1], value, rtol=1e-4, err_msg=gate
        )


def test_a_gate_is_scored_apart_from_classifiers(by_hand):
    model, k, rng = by_hand[0].cohorts[0].model, 3, np.random.default_rng(0)
    mean, head = np.array([0.0, 2.0, -2.0]), np.array([1.0, -1.0, 2.0])
    components = Components(
        {"mean": jnp.asarray(mean)[:, None], "log_variance": jnp.zeros(k)},
        {"body": jnp.ones(k), "head": jnp.asarray(head)},
        (),
    )
    x, y = rng.normal(size=300) * 2, rng.integers(0, 2, 300)
    pool = Pool(jnp.asarray(x, jnp.float32)[:, None], jnp.asarray(y))
    # More than are scored at once, and not a multiple of that.
    row, true = rng.permutation(300)[:130], rng.integers(0, k, 130)
    pi = rng.dirichlet(np.ones(k), 130)
    pi[:, 2] = np.where(rng.random(130) < 0.2, 0, pi[:, 2])
    found, correct = fedgmi_estimates.score_gate(
        Density(normal(1), "normal", "x"),
        *(model, 2, components, pool, row, jnp.asarray(pi, jnp.float32), true),
    )
    log_density = -((x[row, None] - mean) ** 2) / 2
    posterior = np.log(np.maximum(pi, 1e-12)) + log_density
    np.testing.assert_array_equal(found, posterior.argmax(axis=1) == true)
    np.testing.assert_array_equal(correct, (head[true] * x[row] > 0) == y[row])


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
    share = np.array([0.9, 0.1, 0.5, 0.75, 0.3, 1.0])
    truth = np.stack([share, 1 - share], axis=1)
    pool, rows, domain = images(truth, 20, 0)
    model = toy_model(dim=3, features=16, num_classes=2)
    model = model._replace(embed=lambda p, x: toy_embed(model, p, x))
    n = len(share)
    cohort = Cohort(model, jnp.arange(n), jnp.arange(20 * n), rows, rows, rows, n)
    federation = Federation(pool, (cohort,), 2)
    algorithm = fedgmi(
        optax.sgd(0.1),
        Schedule(10),
        num_components=2,
        hidden=8,
        latent=2,
        vae_epochs=5,
        vae_learning_rate=0.02,
        pretrain_rounds=3,
        max_samples=20,
    )
    execution = Execution(chunk=1)
    block = simulate.make_block(
        rounds.make_round(algorithm, participation.full(), execution), 8
    )
    state = rounds.init_state(algorithm, federation, KEY)
    state, _ = block(state, federation, KEY, jnp.int32(2))
    proportions = jax.jit(fedgmi_estimates.make_proportions(algorithm, execution))
    early = proportions(state, federation, KEY)
    state, reports = block(state, federation, KEY, jnp.int32(8))
    return block, federation, state, reports, proportions, early, truth


def toy_embed(model, params, x):
    hidden = params["body"]["hidden"]
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ hidden["kernel"] + hidden["bias"][None])
    return x @ params["body"]["out"]["kernel"] + params["body"]["out"]["bias"][None]


def test_equal_components_share_equally(learned):
    early = learned[5]
    np.testing.assert_allclose(early, np.full((6, 2), 0.5), atol=1e-5)


def test_proportions_of_obvious_domains_are_found(learned):
    _, federation, state, _, proportions, _, truth = learned
    estimate = proportions(state, federation, KEY)
    error = fedgmi_estimates.proportion_error(estimate, jnp.asarray(truth, jnp.float32))
    assert float(error) < 0.04
    error = fedgmi_estimates.proportion_error(
        state.clients[0], jnp.asarray(truth, jnp.float32)
    )
    # Of the VAEs of a round before, with one sample of the code.
    assert float(error) < 0.06


def test_new_clients_take_e_and_pi_steps_only(learned):
    _, federation, state, _, proportions, _, _ = learned
    share = np.array([1.0, 0.3, 0.6, 0.0, 0.2, 0.5])
    truth = np.stack([share, 1 - share], axis=1)
    pool, _, _ = images(truth, 20, 1)
    newcomers = dataclasses.replace(federation, pool=pool)
    estimate = proportions(state, newcomers, KEY)
    error = fedgmi_estimates.proportion_error(estimate, jnp.asarray(truth, jnp.float32))
    assert float(error) < 0.04


def test_all_stages_share_one_compilation(learned):
    block, _, state, *_ = learned
    assert block._cache_size() == 1
    assert int(state.server.shared.clock) == 10


# Estimates.


def test_error_of_proportions_does_not_depend_on_their_order():
    truth = jnp.asarray([[0.2, 0.8], [0.6, 0.4]])
    estimate = jnp.asarray([[0.7, 0.3], [0.4, 0.6]])
    error = fedgmi_estimates.proportion_error(estimate, truth)
    np.testing.assert_allclose(error, 0.05, rtol=1e-5)


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
        ("guided_rounds", 0),
        ("concentration", 0.5),
        ("num_samples", 0),
        ("max_samples", 0),
        ("upload", "none"),
        ("num_sent", 0),
        ("vae_every", 0),
        ("hidden", 0),
        ("latent", 0),
        ("payload", "int8"),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        fedgmi(optax.sgd(0.1), Schedule(4), **{name: value})
    with pytest.raises(ValueError, match="num_sent must be <= 2, the number"):
        fedgmi(optax.sgd(0.1), Schedule(4), num_components=2, upload="top", num_sent=3)
