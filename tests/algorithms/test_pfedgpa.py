"""pFedGPA: its limits, its controls in closed form, who teaches and who is taught."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedgen.aggregators import diffusion
from fedgen.algorithms import _pfedgpa_population as population
from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedper import fedper
from fedgen.algorithms.local_only import local_only
from fedgen.algorithms.pfedgpa import pfedgpa
from fedgen.core import evaluate, fit, participation, rounds
from fedgen.core.algorithm import State, Uploads
from fedgen.core.execution import Execution
from fedgen.core.fit import Schedule

N, RANK = 12, 3
SMALL = {
    "rank": RANK,
    "denoiser_width": 8,
    "denoiser_steps": 2,
    "memory": 2,
    "newcomer_rounds": 0,
}
OPTIMIZER, SCHEDULE = optax.sgd(0.1, momentum=0.5), Schedule(4, 2)
KEY = jax.random.key(5)
SIZES = (7, 3, 9, 5)


@functools.cache
def build(**options):
    return pfedgpa(OPTIMIZER, SCHEDULE, **{**SMALL, **options})


@functools.cache
def compiled(algorithm):
    """Compile `aggregate` once for all tests that ask for the same algorithm."""
    return jax.jit(functools.partial(algorithm.aggregate, ()))


@pytest.fixture(scope="module")
def federation(toy_federation):
    return toy_federation((5,) * N)


@pytest.fixture(scope="module")
def ragged(toy_federation):
    return toy_federation(SIZES)


@pytest.fixture(scope="module")
def population_of(federation):
    """Return `seed -> [n, p]`: uploads around FedAvg's model, of falling variance."""
    (cohort,) = federation.cohorts
    mean = np.asarray(ravel_pytree(cohort.model.init(KEY))[0])

    def draw(seed=0, n=N):
        rng = np.random.default_rng(seed)
        scale = 0.1 * 0.8 ** np.arange(mean.size)
        return jnp.asarray(mean + scale * rng.normal(size=(n, mean.size)), jnp.float32)

    return draw


def serve(algorithm, federation, *batches, key=KEY, server=None):
    """Aggregate uploads `(vectors, weight, ids)`, one round after another."""
    step = compiled(algorithm)
    if server is None:
        server, _ = algorithm.init(KEY, federation)
    metrics = {}
    for vectors, weight, ids in batches:
        upload = Uploads(
            jnp.asarray(ids, jnp.int32), jnp.asarray(weight, jnp.float32), (vectors, ())
        )
        server, metrics = step(key, server, (upload,))
    return server, metrics


def everybody(x):
    return x, np.ones(len(x)), np.arange(len(x))


def distance(a, b):
    return np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2))


# Limits.


@pytest.mark.parametrize(
    ("rank", "center"), [(RANK, True), (RANK, False), (None, True)]
)
def test_with_gamma_one_clients_get_back_what_they_sent(
    federation, population_of, rank, center
):
    algorithm = build(warmup=0, gamma=1.0, rho=1.0, rank=rank, center=center, depth=900)
    x = population_of(1)
    batches = everybody(population_of()), everybody(x)
    server, metrics = serve(algorithm, federation, *batches)
    np.testing.assert_allclose(server.sent, x, atol=2e-5)
    assert metrics["rejected"] == 0 and metrics["moved"] < 1e-3


def test_without_a_code_nothing_comes_back(federation, population_of):
    # It is the code that carries clients through great depths, not the denoiser.
    algorithm = build(warmup=0, gamma=0.0, rho=0.0, depth=900, max_move=np.inf)
    x = population_of(1)
    server, _ = serve(algorithm, federation, everybody(population_of()), everybody(x))
    assert distance(server.sent, x) > 0.5 * distance(x, x.mean(0)[None])


def test_without_depth_nothing_moves(federation, population_of):
    x = population_of()
    spread = distance(x, x.mean(0)[None])
    moved = []
    for depth in (1, 400):
        algorithm = build(
            warmup=0,
            version="noising",
            denoiser_steps=0,
            depth=depth,
            steps=1,
            gamma=1.0,
            rho=1.0,
            max_move=np.inf,
        )
        server, _ = serve(algorithm, federation, everybody(x))
        moved.append(distance(server.sent, x) / spread)
    assert moved[0] < 0.02
    assert moved[1] > 0.2


def principal(x, rank):
    """Find mean, directions and variances in float64."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    _, s, v = np.linalg.svd(x - mean, full_matrices=False)
    return mean, v[:rank], s[:rank] ** 2 / len(x)


@pytest.mark.parametrize(
    ("version", "eta", "power"),
    [("noise_maps", 0.0, None), ("noising", 0.0, 0.5), ("noising", 1.0, 1.0)],
)
def test_linear_is_pca_shrinkage(federation, population_of, version, eta, power):
    depth, rho = 200, 0.3
    algorithm = build(
        warmup=0,
        generator="linear",
        version=version,
        eta=eta,
        depth=depth,
        gamma=0.7,
        rho=rho,
        memory=1,
    )
    x = population_of()
    server, _ = serve(algorithm, federation, everybody(x))

    mean, v, variance = principal(x, RANK)
    beta = np.linspace(1e-4, 2e-2, 1000)
    alpha_bar = np.prod(1 - beta[:depth])
    variance = variance / variance.mean()  # in units of all codes
    k = alpha_bar * variance / (alpha_bar * variance + 1 - alpha_bar)
    factor = 0.7 + 0.3 * k if power is None else 0.7 * k**power
    deviation = np.asarray(x, np.float64) - mean
    code = deviation @ v.T
    expected = mean + (factor * code) @ v + rho * (deviation - code @ v)
    np.testing.assert_allclose(server.sent, expected, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"version": "noise_maps"},
        {"version": "ddim", "gamma": 0.8},
        {"version": "ddim", "gamma": 0.8, "eta": 1.0},
        {"version": "noising", "gamma": 1.0},
        {"version": "noising", "gamma": 1.0, "eta": 1.0},
        {"version": "noising", "gamma": 1.0, "eta": 0.5},
    ],
)
def test_linear_is_the_mean_of_diffusion_in_closed_form(options):
    options = {"eta": 0.0, "gamma": 0.5, "depth": 250, **options}
    times, variance = diffusion.linear_schedule(), jnp.array([0.3, 0.8, 2.0])
    denoise = diffusion.gaussian_denoiser(times, jnp.zeros(3), variance)
    z = jnp.array([0.6, -1.0, 1.5])

    @jax.jit
    @jax.vmap
    def drawn(key):
        keys = jax.random.split(key)
        return population.regenerate(denoise, times, z, *keys, steps=25, **options)

    codes = drawn(jax.random.split(KEY, 2000))
    factor = population.linear_factor(times, variance, **options)
    error = jnp.std(codes, axis=0) / 2000**0.5
    # Steps of a finite length, and five standard errors.
    assert jnp.all(jnp.abs(codes.mean(0) - factor * z) < 0.02 * abs(z) + 5 * error)


def test_linear_is_the_mean_of_diffusion_without_a_network(federation, population_of):
    # An untrained network predicts nothing, which leaves the best linear denoiser.
    options = {"warmup": 0, "depth": 250, "steps": 25, "max_move": np.inf}
    x = population_of()
    linear, _ = serve(build(generator="linear", **options), federation, everybody(x))
    algorithm = build(denoiser_steps=0, **options)
    server, _ = algorithm.init(KEY, federation)
    upload = Uploads(jnp.arange(N), jnp.ones(N), (x, ()))

    @jax.jit
    @jax.vmap
    def sent(key):
        return algorithm.aggregate((), key, server, (upload,))[0].sent

    drawn = sent(jax.random.split(KEY, 400))
    spread = distance(x, x.mean(0)[None])
    error = jnp.std(drawn, axis=0) / 20
    gap = jnp.abs(drawn.mean(0) - linear.sent)
    # Steps of a finite length, and five standard errors.
    assert jnp.all(gap < 0.03 * spread + 5 * error)
    assert distance(drawn.mean(0), x) > 0.1 * spread


# Other algorithms.


def start(algorithm, federation):
    return rounds.init_state(algorithm, federation, KEY)


@functools.cache
def stepping(algorithm):
    """Compile rounds once for all tests that ask for the same algorithm."""
    return jax.jit(
        rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
    )


def run(algorithm, federation, state, count):
    step = stepping(algorithm)
    before = step._cache_size()
    for _ in range(count):
        state, report = step(state, federation, KEY)
    assert step._cache_size() <= before + 1, "a stage was compiled"
    return state, report


def downloads(algorithm, federation, state, ids):
    context = federation.context(0)
    return [
        ravel_pytree(algorithm.download(context, state.server, jnp.int32(i)))[0]
        for i in ids
    ]


@pytest.mark.parametrize("layers", ["all", "head"])
def test_warm_up_is_fedavg_and_then_each_trains_alone(toy_federation, layers):
    federation = toy_federation((*SIZES, 0))
    algorithm = build(warmup=2, generator="none", layers=layers)
    plain = fedavg(OPTIMIZER, SCHEDULE)
    ours, _ = run(algorithm, federation, start(algorithm, federation), 2)
    theirs, _ = run(plain, federation, start(plain, federation), 2)
    chex.assert_trees_all_close(
        ours.server.params, theirs.server.params, rtol=1e-5, atol=1e-6
    )
    assert not np.any(ours.server.known)
    mean = ravel_pytree(ours.server.params)[0]
    for sent in downloads(algorithm, federation, ours, range(5)):
        np.testing.assert_array_equal(sent, mean)

    ours, _ = run(algorithm, federation, ours, 2)
    if layers == "head":
        other = fedper(OPTIMIZER, SCHEDULE)
        server = theirs.server.params["body"]
        clients = jax.tree.map(
            lambda a: jnp.stack([a] * 5), theirs.server.params["head"]
        )
        context = federation.context(0)
    else:
        other, server = local_only(OPTIMIZER, SCHEDULE), ()
        clients = jax.tree.map(lambda a: jnp.stack([a] * 5), theirs.server.params)
    reference = State(jnp.int32(2), server, (clients,))
    reference, _ = run(other, federation, reference, 2)
    expected = jax.vmap(lambda c: ravel_pytree(c)[0])(reference.clients[0])
    np.testing.assert_allclose(ours.server.sent[:4], expected[:4], rtol=1e-4, atol=1e-5)
    if layers == "head":
        chex.assert_trees_all_close(
            ours.server.params["body"], reference.server, rtol=1e-4, atol=1e-5
        )
        message = algorithm.download(context, ours.server, jnp.int32(1))
        chex.assert_trees_all_equal(message["body"], ours.server.params["body"])
    # Who has no data was never generated for.
    assert ours.server.known.tolist() == [True] * 4 + [False]


def test_without_averaging_or_diffusion_it_is_local_training(ragged):
    algorithm, alone = (
        build(warmup=0, generator="none"),
        local_only(OPTIMIZER, SCHEDULE),
    )
    ours, _ = run(algorithm, ragged, start(algorithm, ragged), 3)
    theirs, _ = run(alone, ragged, start(alone, ragged), 3)
    expected = jax.vmap(lambda c: ravel_pytree(c)[0])(theirs.clients[0])
    np.testing.assert_allclose(ours.server.sent, expected, rtol=1e-5, atol=1e-6)


def test_a_denoiser_in_warm_up_changes_nothing_of_it(ragged):
    plain = fedavg(OPTIMIZER, SCHEDULE)
    algorithm = build(warmup=3)
    ours, report = run(algorithm, ragged, start(algorithm, ragged), 3)
    theirs, expected = run(plain, ragged, start(plain, ragged), 3)
    chex.assert_trees_all_close(
        ours.server.params, theirs.server.params, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        report.metrics["loss"], expected.metrics["loss"], rtol=1e-4
    )
    assert not np.any(ours.server.sent)
    learner, before = ours.server.learner, start(algorithm, ragged).server.learner
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), learner.params, before.params
    )
    assert any(jax.tree.leaves(moved)), "the denoiser trains in the warm-up"

    context, x = ragged.context(0), ragged.pool.x[:6]
    np.testing.assert_allclose(
        algorithm.predict_global(context, ours.server, x),
        plain.predict_global(context, theirs.server, x),
        atol=1e-4,
    )


def test_scored_are_what_was_sent_and_what_a_local_update_makes_of_it(
    ragged, client_data
):
    algorithm = build(warmup=3)
    state, _ = run(algorithm, ragged, start(algorithm, ragged), 5)
    context, data = ragged.context(0), client_data(ragged, 2)
    message = algorithm.download(context, state.server, jnp.int32(2))
    received = algorithm.receive(context, (), message)
    np.testing.assert_array_equal(ravel_pytree(received)[0], state.server.sent[2])
    _, (vector, _), _ = algorithm.local(context, KEY, (), message, data)
    updated = algorithm.personalise(context, KEY, (), message, data)
    np.testing.assert_array_equal(ravel_pytree(updated)[0], vector)
    assert distance(vector, state.server.sent[2]) > 1e-3

    scores = jax.jit(evaluate.make_evaluate(algorithm, Execution()))(
        state, ragged, KEY
    ).test
    (cohort,) = ragged.cohorts
    rows = cohort.order[cohort.test.start[2] :][: cohort.test.size[2]]
    logits = algorithm.predict(context, state.server, received, ragged.pool.x[rows])
    hits = np.sum(np.argmax(logits, -1) == ragged.pool.y[rows])
    assert scores.received_correct[2] == hits


# Who counts.


def test_the_order_of_uploads_is_no_matter(federation, population_of):
    algorithm, x = build(warmup=1), population_of()
    weight, places = 1.0 + np.arange(N), np.random.default_rng(3).permutation(N)
    plain = x, weight, np.arange(N)
    mixed = x[places], weight[places], places
    a, _ = serve(algorithm, federation, plain, plain)
    b, _ = serve(algorithm, federation, mixed, mixed)
    chex.assert_trees_all_equal(a, b)


def test_other_numbers_for_the_clients_permute_what_they_get(federation, population_of):
    algorithm, x = build(warmup=0, generator="linear"), population_of()
    places = np.random.default_rng(3).permutation(N)
    a, _ = serve(algorithm, federation, everybody(x))
    b, _ = serve(algorithm, federation, (x, np.ones(N), places))
    np.testing.assert_allclose(np.asarray(b.sent)[places], a.sent, atol=1e-5)


def test_keys_decide_and_nothing_else_does(federation, population_of):
    algorithm, x = build(warmup=1), everybody(population_of())
    a, _ = serve(algorithm, federation, x, x)
    b, _ = serve(algorithm, federation, x, x)
    chex.assert_trees_all_equal(a, b)
    c, _ = serve(algorithm, federation, x, x, key=jax.random.key(6))
    assert np.all(np.any(np.asarray(a.sent != c.sent), axis=1))


@pytest.mark.parametrize("generator", ["diffusion", "linear", "none"])
def test_absent_clients_leave_no_trace(federation, population_of, generator):
    algorithm, x = build(warmup=1, generator=generator), population_of()
    # Last of the participants are the clients 3 to 0, of whom nothing arrives.
    number, here = np.arange(N)[::-1], np.arange(N) < 8
    ids, weight = np.where(here, number, -1), here.astype(float)
    empty = np.where(number == 2, 2, ids)  # drawn, without a sample
    junk = jnp.where(here[:, None], x, 1e3)
    a, _ = serve(algorithm, federation, *[(x, weight, ids)] * 2)
    b, _ = serve(algorithm, federation, *[(junk, weight, empty)] * 2)
    chex.assert_trees_all_equal(a, b)
    np.testing.assert_array_equal(a.known, np.arange(N) > 3)
    assert not np.any(a.sent[:4]) and np.all(np.any(a.sent[4:] != 0, axis=1))
    if generator == "none":
        np.testing.assert_array_equal(a.sent[4:], x[:8][::-1])
    else:
        np.testing.assert_array_equal(a.replay.pushes, np.where(a.known, 2, 0))
        assert not np.any(a.replay.rows[:4])

    # What they got in an earlier round stays theirs, and a round of nobody is none.
    everyone = x, np.ones(N), np.arange(N)
    server, _ = serve(algorithm, federation, everyone, everyone)
    after, _ = serve(algorithm, federation, (junk, weight, ids), server=server)
    np.testing.assert_array_equal(after.sent[:4], server.sent[:4])
    nobody, _ = serve(
        algorithm, federation, (junk, np.zeros(N), -np.ones(N)), server=server
    )
    chex.assert_trees_all_equal(nobody.params, server.params)
    np.testing.assert_array_equal(nobody.sent, server.sent)


@pytest.mark.parametrize("generator", ["diffusion", "linear"])
def test_a_round_of_two_after_the_warm_up(federation, population_of, generator):
    algorithm, x = build(warmup=1, generator=generator), population_of()
    two = np.isin(np.arange(N), (3, 8))
    before, _ = serve(algorithm, federation, *[everybody(x)] * 2)
    junk = jnp.where(two[:, None], x, jnp.nan)
    after, metrics = serve(
        algorithm,
        federation,
        (junk, two.astype(float), np.where(two, np.arange(N), -1)),
        server=before,
    )
    chex.assert_tree_all_finite((after, metrics))
    np.testing.assert_array_equal(after.sent[~two], before.sent[~two])
    assert np.all(np.any(after.sent[two] != before.sent[two], axis=1))
    assert metrics["rejected"] == 0
    np.testing.assert_array_equal(after.replay.pushes, 2 + two)
    mean = ravel_pytree(after.params)[0]  # of these two: the documented limit
    np.testing.assert_allclose(mean, x[two].mean(0), atol=1e-6)


def test_a_round_before_anybody_came_is_finite(federation, population_of):
    nobody = population_of(), np.zeros(N), -np.ones(N)
    algorithm = build(warmup=1)
    server, metrics = serve(algorithm, federation, nobody)
    chex.assert_tree_all_finite((server, metrics))
    start, _ = algorithm.init(KEY, federation)
    chex.assert_trees_all_equal(server.learner, start.learner)
    chex.assert_trees_all_equal(server.params, start.params)


def test_the_replay_keeps_the_newest_of_each_client():
    replay = population.Replay(jnp.zeros((3, 2, 1)), jnp.zeros(3, jnp.int32))
    rng = np.random.default_rng(0)
    kept = [[], [], []]
    for t in range(1, 10):
        mask = rng.random(3) < [1.0, 0.5, 0.0]
        x = jnp.full((3, 1), float(t)) + jnp.arange(3)[:, None] / 10
        replay = replay.push(x, jnp.asarray(mask))
        for client in np.flatnonzero(mask):
            kept[client].append(float(x[client, 0]))
        rows, weight = replay.flat()
        for client in range(3):
            mine = slice(2 * client, 2 * client + 2)
            stored = np.asarray(rows[mine, 0])[np.asarray(weight[mine]) > 0]
            assert sorted(stored.tolist()) == kept[client][-2:]
    assert not kept[2] and 2 < len(kept[1]) < 9


def test_what_strays_is_not_sent(federation, population_of):
    x = population_of()
    still, metrics = serve(
        build(warmup=0, max_move=0.0, denoiser_steps=0), federation, everybody(x)
    )
    np.testing.assert_array_equal(still.sent, x)
    assert metrics["rejected"] == N and metrics["moved"] == 0
    wild = build(warmup=0, denoiser_rate=1e30, decay=0.0)
    server, metrics = serve(wild, federation, everybody(x))
    np.testing.assert_array_equal(server.sent, x)
    assert metrics["rejected"] == N
    free, metrics = serve(build(warmup=0, max_move=np.inf), federation, everybody(x))
    assert metrics["rejected"] == 0
    spread = distance(x, x.mean(0)[None])
    each = np.sqrt(np.mean(np.square(free.sent - x), axis=1))
    np.testing.assert_allclose(metrics["moved"], each.mean() / spread, rtol=1e-3)


# Newcomers.


NEW = N - 1  # the client that comes late
ALL, OTHERS = np.ones(N), (np.arange(N) != NEW).astype(float)


def arrive(federation, population_of, algorithm, visits):
    """Return the server after two rounds without client NEW and some with it."""
    x = population_of()
    ids = np.where(OTHERS > 0, np.arange(N), -1)
    early = [(x, OTHERS, ids)] * 2
    server, _ = serve(algorithm, federation, *early)
    news, metrics = serve(
        algorithm, federation, *[(x, ALL, np.arange(N))] * visits, server=server
    )
    without, _ = serve(
        algorithm, federation, *[(x, OTHERS, ids)] * visits, server=server
    )
    return server, news, without, metrics


def test_newcomers_learn_first_and_teach_later(federation, population_of):
    algorithm = build(warmup=1, newcomer_rounds=2)
    before, after, without, metrics = arrive(federation, population_of, algorithm, 2)
    assert metrics["newcomers"] == 1
    assert not before.known[NEW] and after.known[NEW]
    for name in ("params", "replay", "directions", "learner"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(without, name))
    np.testing.assert_array_equal(after.sent[:NEW], without.sent[:NEW])

    _, third, _, metrics = arrive(federation, population_of, algorithm, 3)
    assert metrics["newcomers"] == 0
    assert third.replay.pushes[NEW] == 1
    # Nobody is new to a server that has no population yet.
    literal = build(warmup=0, newcomer_rounds=2)
    server, metrics = serve(literal, federation, everybody(population_of()))
    assert metrics["newcomers"] == 0 and np.all(server.replay.pushes == 1)


@pytest.mark.parametrize("omega", [-1.0, 0.5])
def test_a_newcomer_is_denoised_along_its_own_update(federation, population_of, omega):
    algorithm = build(
        warmup=1,
        denoiser_steps=0,
        newcomer_rounds=2,
        omega=omega,
        depth=60,
        steps=3,
        max_move=np.inf,
    )
    before, after, _, _ = arrive(federation, population_of, algorithm, 1)
    # By hand: the untrained network leaves the Gaussian denoiser of the replay.
    rows, weight = after.replay.flat()
    codec, codes = population.fit_codec(
        rows, weight, rank=RANK, scale="scalar", previous=before.directions
    )
    times = diffusion.linear_schedule()
    base = diffusion.gaussian_denoiser(times, jnp.zeros(RANK), codec.cov)
    centre = ravel_pytree(after.params)[0]
    own = population_of()[NEW] - centre
    first = codec.encode(ravel_pytree(before.params)[0] - centre)
    last = codec.encode(own)
    x, grid = last, (60, 40, 20, 0)
    for t, u in zip(grid[:-1], grid[1:], strict=True):
        eps = base(x, t)
        eps += (1 + omega) * times.noise[t] * (first - last)
        clean = (x - times.noise[t] * eps) / times.signal[t]
        x = times.signal[u] * clean + times.noise[u] * eps
    expected = centre + codec.decode(own, x, 0.5)
    np.testing.assert_allclose(after.sent[NEW], expected, atol=2e-5)


def test_guidance_lowers_a_newcomers_loss(federation, population_of, client_data):
    data, context = client_data(federation, NEW), federation.context(0)
    batch = data.take(jnp.arange(5), jnp.ones(5, bool))
    ids = np.where(OTHERS > 0, np.arange(N), -1)
    losses = []
    for omega in (-1.0, 2.0):
        algorithm = build(
            warmup=1,
            denoiser_steps=0,
            newcomer_rounds=1,
            omega=omega,
            rank=None,
            max_move=np.inf,
        )
        server, _ = serve(algorithm, federation, *[(population_of(), OTHERS, ids)] * 2)
        message = algorithm.download(context, server, jnp.int32(NEW))
        _, (vector, _), _ = algorithm.local(context, KEY, (), message, data)
        x = population_of().at[NEW].set(vector)
        server, _ = serve(algorithm, federation, everybody(x), server=server)
        params = algorithm.download(context, server, jnp.int32(NEW))
        losses.append(fit.cross_entropy(context.model.apply(params, batch.x), batch))
    assert losses[1] < losses[0]


def test_strangers_start_from_the_mean(ragged):
    algorithm = build(warmup=3)
    state, _ = run(algorithm, ragged, start(algorithm, ragged), 5)
    mean = ravel_pytree(state.server.params)[0]
    own, *strangers = downloads(algorithm, ragged, state, (0, 4, 99, -1))
    np.testing.assert_array_equal(own, state.server.sent[0])
    for sent in strangers:
        np.testing.assert_array_equal(sent, mean)
    (cohort,) = ragged.cohorts
    unseen = dataclasses.replace(
        ragged, cohorts=(dataclasses.replace(cohort, ids=cohort.ids + 4),)
    )
    adapt = jax.jit(evaluate.make_adapt(algorithm, Execution()))
    after = adapt(state, unseen, KEY)
    chex.assert_trees_all_equal(after.server, state.server)


# What the denoiser learns, and what becomes of groups.


def test_the_denoiser_learns_what_no_linear_one_can():
    # Two points: the best linear denoiser sees a Gaussian, whose loss stays.
    from fedgen.models import denoiser

    times = diffusion.linear_schedule(100)
    codes = jnp.asarray([[-1.0], [1.0]] * 8)
    base = diffusion.gaussian_denoiser(times, jnp.zeros(1), jnp.ones(1))
    network, adam = denoiser.residual_mlp(1, width=32), optax.adam(3e-3)
    begin = population.init_learner(network.init(KEY), adam)
    train = functools.partial(
        population.learn,
        network,
        adam,
        times,
        base,
        begin,
        KEY,
        codes,
        jnp.ones(16),
        batch_size=64,
        jitter=0.0,
    )
    learner, _ = jax.jit(functools.partial(train, steps=200, decay=0.9))()

    def loss(params):
        def denoise(x, t):
            return base(x, t) + network.apply(params, x, t)

        return diffusion.simple_loss(denoise, times, jnp.tile(codes, (100, 1)), key=KEY)

    assert loss(learner.average) < 0.8 * loss(begin.average)
    same, _ = train(steps=2, decay=0.0)
    chex.assert_trees_all_equal(same.average, same.params)
    frozen, _ = train(steps=2, decay=1.0)
    chex.assert_trees_all_equal(frozen.average, begin.average)


@pytest.fixture(scope="module")
def opposites(toy_federation):
    """Build clients of which every second one has its labels reversed."""
    federation = toy_federation((20,) * 10, seed=1)
    (cohort,) = federation.cohorts
    y = np.array(federation.pool.y)
    order = np.asarray(cohort.order)
    for part in (cohort.train, cohort.validation, cohort.test):
        for i in range(1, 10, 2):
            mine = order[int(part.start[i]) :][: int(part.size[i])]
            y[mine] = 3 - y[mine]
    pool = federation.pool._replace(y=jnp.asarray(y))
    return dataclasses.replace(federation, pool=pool)


def test_opposite_groups_keep_their_mode(opposites):
    algorithm = build(warmup=2, denoiser_steps=30, depth=100, gamma=0.5, rho=1.0)
    state, _ = run(algorithm, opposites, start(algorithm, opposites), 3)
    control = build(warmup=2, generator="none")
    apart, _ = run(control, opposites, start(control, opposites), 3)

    # After one round of generation the control's are what was uploaded to it.
    sent, uploads = np.asarray(state.server.sent), np.asarray(apart.server.sent)
    means = np.stack([uploads[i::2].mean(0) for i in range(2)])
    gap = np.linalg.norm(sent[:, None] - means[None], axis=2)
    own = np.take_along_axis(gap, np.arange(10)[:, None] % 2, axis=1)[:, 0]
    # The uploads themselves have 0.62, and modes that merge have 1.
    assert np.mean(own / (gap.sum(axis=1) - own)) < 0.75

    def within(x):
        return sum(np.var(x[i::2], axis=0).sum() for i in range(2))

    assert within(sent) < within(uploads)


def test_deep_and_without_a_code_clients_lose_their_mode(opposites):
    algorithm = build(
        warmup=2, denoiser_steps=30, depth=900, gamma=0.0, rho=0.0, max_move=np.inf
    )
    state, _ = run(algorithm, opposites, start(algorithm, opposites), 3)
    sent = np.asarray(state.server.sent)
    before = np.asarray(
        run(
            (control := build(warmup=2, generator="none")),
            opposites,
            start(control, opposites),
            3,
        )[0].server.sent
    )
    means = np.stack([before[i::2].mean(0) for i in range(2)])
    gap = np.linalg.norm(sent[:, None] - means[None], axis=2)
    assert np.any(gap.argmin(axis=1) != np.arange(10) % 2)


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "gan"}, "generator must be one of diffusion, linear, none"),
        ({"version": "A"}, "version must be one of noise_maps"),
        ({"layers": "body"}, "layers must be one of all, head"),
        ({"scale": "layer"}, "scale must be one of"),
        ({"warmup": -1}, "warmup must be >= 0"),
        ({"memory": 0}, "memory must be >= 1"),
        ({"rank": 0}, "rank must be >= 1"),
        ({"rho": 1.1}, "rho must be in"),
        ({"gamma": -0.1}, "gamma must be in"),
        ({"eta": 2.0}, "eta must be in"),
        ({"decay": float("nan")}, "decay must be in"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"depth": 5}, r"depth must be in .* = \[6, 1000\], got 5"),
        ({"depth": 1001}, "depth must be in"),
        ({"denoiser_steps": -1}, "denoiser_steps must be >= 0"),
        ({"denoiser_rate": 0.0}, "denoiser_rate must be > 0"),
        ({"max_move": -1.0}, "max_move must be >= 0"),
        ({"omega": -1.5}, "omega must be >= -1"),
        ({"newcomer_rounds": -1}, "newcomer_rounds must be >= 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pfedgpa(OPTIMIZER, SCHEDULE, **options)
