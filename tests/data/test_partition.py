import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen.data import partition as partition_lib
from fedgen.data.partition import (
    PARTITIONS,
    by_user,
    counts,
    partition,
    redraw,
    split,
)

LABELS = np.repeat(np.arange(10, dtype=np.int32), 100)


@st.composite
def problems(draw):
    """Draw labels and a number of clients that any partition must cope with."""
    labels = draw(st.lists(st.integers(0, 6), min_size=1, max_size=80))
    num_clients = draw(st.integers(1, len(labels)))
    return np.array(labels, np.int32), num_clients


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=25, deadline=None)
@given(
    problem=problems(),
    seed=st.integers(0, 2**31),
    alpha=st.sampled_from([1e-308, 1e-6, 0.01, 0.5, 10.0, 1e12]),
    min_size=st.integers(0, 20),
)
def test_every_sample_has_one_client_and_the_draw_is_seeded(
    name, problem, seed, alpha, min_size
):
    labels, num_clients = problem
    options = {"alpha": alpha, "min_size": min_size, "domain": labels % 3}
    options["classes_per_client"] = len(np.unique(labels))
    before = labels.copy()
    owner = partition(name, labels, num_clients, seed=seed, **options)
    assert owner.shape == labels.shape
    assert owner.dtype == np.int32
    assert owner.min() >= 0
    assert owner.max() < num_clients
    np.testing.assert_array_equal(labels, before)
    again = partition(name, labels, num_clients, seed=seed, **options)
    np.testing.assert_array_equal(owner, again)
    size = np.bincount(owner, minlength=num_clients)
    if name in ("dirichlet", "quantity"):
        assert size.min() >= min(min_size, len(labels) // num_clients)
    elif name == "pathological":
        assert size.min() >= 1
    else:
        assert np.ptp(size) <= 1


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_seed_is_another_partition(name):
    first, second = (
        partition(name, LABELS, 10, seed=seed, domain=LABELS % 3) for seed in (0, 1)
    )
    assert (first != second).any()


def test_iid_clients_have_the_classes_of_the_pool():
    table = counts(partition("iid", LABELS, 2, seed=0), LABELS, 2, 10)
    # Hypergeometric: standard deviation of a cell 5 samples of 50.
    np.testing.assert_allclose(table, 50, atol=25)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_client"])
def test_dirichlet_with_a_huge_alpha_is_even(name):
    owner = partition(name, LABELS, 10, seed=0, alpha=1e9)
    np.testing.assert_allclose(counts(owner, LABELS, 10, 10), 10, atol=1)


def test_dirichlet_with_a_tiny_alpha_gives_whole_classes():
    owner = partition(
        "dirichlet", LABELS, 5, seed=0, alpha=1e-6, min_size=0, balance=False
    )
    table = counts(owner, LABELS, 5, 10)
    assert ((table == 0) | (table == 100)).all()


def test_dirichlet_client_with_a_tiny_alpha_gives_one_class_while_it_lasts():
    owner = partition("dirichlet_client", LABELS, 100, seed=0, alpha=1e-6)
    table = counts(owner, LABELS, 100, 10)
    # The tenth client that wants a class takes its end; only later ones mix.
    assert ((table == 10).sum(axis=1) == 1).mean() > 0.5


def test_dirichlet_proportions_have_the_mean_and_variance_of_the_distribution():
    labels = np.zeros(10_000, np.int32)
    alpha, n = 0.7, 4
    shares = np.array(
        [
            np.bincount(
                partition("dirichlet", labels, n, seed=seed, alpha=alpha, min_size=0),
                minlength=n,
            )
            / len(labels)
            for seed in range(2000)
        ]
    )
    variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / n, atol=0.02)
    np.testing.assert_allclose(shares.var(axis=0), variance, rtol=0.1)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 1.0])
def test_balance_deals_nothing_to_clients_with_an_even_share(alpha):
    owner = partition("dirichlet", LABELS, 8, seed=3, alpha=alpha, min_size=0)
    table = counts(owner, LABELS, 8, 10)
    held_before = np.cumsum(table, axis=1) - table
    assert not table[held_before >= len(LABELS) / 8].any()


def test_draws_are_repeated_before_anything_is_repaired(monkeypatch):
    monkeypatch.setattr(partition_lib, "_repair", lambda owner, *rest: owner)
    smallest = [
        np.bincount(
            partition("dirichlet", LABELS, 8, seed=seed, alpha=0.5, min_size=40),
            minlength=8,
        ).min()
        for seed in range(20)
    ]
    assert min(smallest) >= 40


def test_quantity_sizes_are_skewed_and_classes_are_not():
    owner = partition("quantity", LABELS, 4, seed=0, alpha=0.3, min_size=20)
    table = counts(owner, LABELS, 4, 10)
    size = table.sum(axis=1)
    assert size.min() >= 20
    assert size.max() > 2 * size.min()
    largest = table[np.argmax(size)] / size.max()
    np.testing.assert_allclose(largest, 0.1, atol=0.03)


@settings(max_examples=25, deadline=None)
@given(num_classes=st.integers(1, 8), num_clients=st.integers(1, 12), data=st.data())
def test_pathological_clients_hold_as_many_classes_as_asked(
    num_classes, num_clients, data
):
    k = data.draw(st.integers(1, num_classes))
    labels = np.repeat(np.arange(num_classes), 24)
    owner = partition("pathological", labels, num_clients, seed=0, classes_per_client=k)
    table = counts(owner, labels, num_clients, num_classes)
    if num_clients * k >= num_classes:
        np.testing.assert_array_equal((table > 0).sum(axis=1), k)
        clients_of_class = (table > 0).sum(axis=0)
        assert np.ptp(clients_of_class) <= 1
        for column in table.T:
            assert np.ptp(column[column > 0]) <= 1
    else:
        assert ((table > 0).sum(axis=1) >= k).all()


def test_mixture_follows_the_domain_and_not_the_label():
    domain = np.tile(np.arange(4), 250)
    owner = partition("mixture", LABELS, 20, seed=0, alpha=1e-6, domain=domain)
    by_domain = counts(owner, domain, 20, 4)
    assert (by_domain.max(axis=1) == 50).mean() > 0.7
    assert counts(owner, LABELS, 20, 10).max() < 20
    owner = partition("mixture", LABELS, 20, seed=0, alpha=1e9, domain=domain)
    np.testing.assert_allclose(counts(owner, domain, 20, 4), 12.5, atol=6)


def test_the_repair_takes_from_the_largest():
    owner = np.repeat([0, 1, 2], [50, 30, 4]).astype(np.int32)
    repaired = partition_lib._repair(owner, 4, 5, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(repaired), [44, 30, 5, 5])
    kept = repaired == owner
    assert kept.sum() == 84 - 6
    assert (owner[~kept] == 0).all()


def test_users_become_clients():
    owner = by_user(["bea", "al", "bea", "cy"])
    np.testing.assert_array_equal(owner, [1, 0, 1, 2])
    assert owner.dtype == np.int32


def test_counts_by_hand():
    table = counts(np.array([0, 2, 2, 2]), np.array([1, 0, 1, 1]), 4, 2)
    np.testing.assert_array_equal(table, [[0, 1], [0, 0], [1, 2], [0, 0]])


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    seed=st.integers(0, 100),
    fractions=st.sampled_from([(0.7, 0.1, 0.2), (0.98, 0.01, 0.01), (0.2, 0.2, 0.6)]),
)
def test_a_split_is_exhaustive_and_as_large_as_asked(problem, seed, fractions):
    labels, num_clients = problem
    owner = np.random.default_rng(seed).integers(0, num_clients, len(labels))
    parts = split(owner, labels, num_clients, seed=seed, fractions=fractions)
    np.testing.assert_array_equal(np.sort(parts.order), np.arange(len(labels)))
    end = 0
    for client, size in enumerate(np.bincount(owner, minlength=num_clients)):
        sizes = [rows.size[client] for rows in parts[1:]]
        assert sum(sizes) == size
        for rows in parts[1:]:
            assert rows.start[client] == end
            run = parts.order[end : end + rows.size[client]]
            assert (owner[run] == client).all()
            end += rows.size[client]
        if size >= 3:
            assert min(sizes) >= 1
            floor = np.maximum(1, np.floor(size * np.array(fractions) - 1e-9))
            assert (np.array(sizes) <= floor + 2).all()
    again = split(owner, labels, num_clients, seed=seed, fractions=fractions)
    np.testing.assert_array_equal(parts.order, again.order)


def spread_one(labels, sizes, rng):
    """Assign the parts of one client, cell after cell."""
    _, size = np.unique(labels, return_counts=True)
    exact = size[:, None] * (sizes / sizes.sum())
    table = np.floor(exact + 1e-9).astype(np.int64)
    open_class = size - table.sum(axis=1)
    open_part = sizes - table.sum(axis=0)
    remainder = np.round(exact - table, 9).ravel()
    order = np.lexsort((rng.random(remainder.size), -remainder))
    once = [(*divmod(cell, 3), 1) for cell in order]
    rest = [(label, column, len(labels)) for label, column in np.ndindex(len(size), 3)]
    for label, column, most in once + rest:
        moved = min(open_class[label], open_part[column], most)
        table[label, column] += moved
        open_class[label] -= moved
        open_part[column] -= moved
    return np.repeat(np.tile(np.arange(3), len(size)), table.ravel())


@settings(max_examples=40, deadline=None)
@given(
    problem=problems(),
    seed=st.integers(0, 100),
    fraction=st.sampled_from([(0.7, 0.1, 0.2), (0.98, 0.01, 0.01), (0.3, 0.3, 0.4)]),
)
def test_clients_side_by_side_are_spread_as_one_after_another(problem, seed, fraction):
    labels, num_clients = problem
    owner = np.sort(np.random.default_rng(seed).integers(0, num_clients, len(labels)))
    labels = labels[np.lexsort((labels, owner))]
    size = np.bincount(owner, minlength=num_clients)
    sizes = partition_lib._part_sizes(size, np.array(fraction))
    one, all_ = (np.random.default_rng(seed) for _ in range(2))
    expected = [
        spread_one(labels[owner == client], sizes[client], one)
        for client in np.flatnonzero(size)
    ]
    found = partition_lib._spread(owner, labels, sizes, all_)
    np.testing.assert_array_equal(found, np.concatenate(expected))
    # The streams go on alike, so blocks of clients change nothing either.
    assert one.random() == all_.random()


def test_a_split_does_not_depend_on_how_many_are_spread_together(monkeypatch):
    owner = partition("dirichlet", LABELS, 30, seed=0, alpha=0.3)
    whole = split(owner, LABELS, 30, seed=0)
    monkeypatch.setattr(partition_lib, "_TOGETHER", 7)
    np.testing.assert_array_equal(split(owner, LABELS, 30, seed=0).order, whole.order)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(100))
def test_clients_served_together_get_what_they_get_in_turn(alpha, seed):
    rng = np.random.default_rng(seed)
    stock = rng.integers(0, 31, rng.integers(2, 7))
    num_clients = max(1, int(rng.uniform(0.05, 0.5) * stock.sum()))
    totals = partition_lib._even_sizes(stock.sum(), num_clients)
    proportion = np.stack(
        [partition_lib._dirichlet(rng, alpha, len(stock)) for _ in totals]
    )
    left, expected = stock.copy(), []
    for each, total in zip(proportion, totals, strict=True):
        expected.append(partition_lib._fill(each, left, total))
        left = left - expected[-1]
    found = partition_lib._fill_all(proportion, stock, totals)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    num_clients=st.integers(1, 40),
    per_client=st.integers(1, 30),
    seed=st.integers(0, 100),
)
def test_what_is_drawn_with_replacement_trains_nobody_and_tests_another(
    num_clients, per_client, seed
):
    kind = np.random.default_rng(seed).permutation(np.repeat(np.arange(4), 10))
    wanted = kind[np.arange(num_clients * per_client) * 7 % len(kind)]
    owner = partition("dirichlet", wanted, num_clients, seed=seed, min_size=1)
    drawn = split(owner, wanted, num_clients, seed=seed)
    found = redraw(drawn, wanted, kind, seed=seed)
    np.testing.assert_array_equal(kind[found.order], wanted[drawn.order])
    roles = []
    for before, after in zip(drawn[1:], found[1:], strict=True):
        np.testing.assert_array_equal(before, after)
        runs = [found.order[s : s + n] for s, n in zip(*after, strict=True)]
        roles.append(set(np.concatenate(runs).tolist()))
    train, validation, test = roles
    assert not train & validation and not train & test and not validation & test
    again = redraw(drawn, wanted, kind, seed=seed)
    np.testing.assert_array_equal(found.order, again.order)


def test_every_row_of_its_part_and_kind_is_as_likely_to_be_drawn():
    kind = np.repeat([0, 1], [100, 50])
    wanted = np.repeat([0, 1], 30_000)
    drawn = split(np.zeros(60_000, int), wanted, 1, seed=0)
    found = redraw(drawn, wanted, kind, seed=0)
    trains = np.bincount(found.order[: drawn.train.size[0]], minlength=150)
    for rows, each in ((slice(0, 100), 300), (slice(100, 150), 600)):
        held = trains[rows][trains[rows] > 0]
        assert held.size == 0.7 * (rows.stop - rows.start)
        np.testing.assert_allclose(held, each, atol=5 * each**0.5)


def test_a_kind_of_too_few_rows_cannot_be_drawn():
    kind = np.array([0] * 20 + [1])
    wanted = np.ones(10, int)
    drawn = split(np.zeros(10, int), wanted, 1, seed=0)
    with pytest.raises(ValueError, match="of 1 samples of kind 1, none is left for"):
        redraw(drawn, wanted, kind, seed=0)


def test_a_split_keeps_the_classes_of_each_client():
    owner = partition("dirichlet", LABELS, 5, seed=0, alpha=0.5)
    parts = split(owner, LABELS, 5, seed=0)
    table = counts(owner, LABELS, 5, 10)
    for rows, fraction in zip(parts[1:], (0.7, 0.1, 0.2), strict=True):
        for client in range(5):
            start = rows.start[client]
            run = parts.order[start : start + rows.size[client]]
            held = np.bincount(LABELS[run], minlength=10)
            np.testing.assert_allclose(held, fraction * table[client], atol=1.01)


def test_a_split_is_exact_where_it_can_be():
    labels = np.repeat([0, 1], [40, 60])
    parts = split(np.zeros(100, int), labels, 1, seed=0)
    found = [
        np.bincount(labels[parts.order[s[0] : s[0] + n[0]]]).tolist()
        for s, n in parts[1:]
    ]
    assert found == [[28, 42], [4, 6], [8, 12]]


def test_rare_classes_do_not_always_train():
    # Ten classes of one sample at each of 200 clients: 70 % of each class trains.
    labels = np.tile(np.arange(10), 200)
    owner = np.repeat(np.arange(200), 10)
    parts = split(owner, labels, 200, seed=0)
    rows = np.concatenate(
        [parts.order[s : s + n] for s, n in zip(*parts.train, strict=True)]
    )
    np.testing.assert_allclose(np.bincount(labels[rows]) / 200, 0.7, atol=0.12)


def test_small_and_empty_clients_are_split_by_rule():
    parts = split(np.array([1, 2, 2]), np.zeros(3, int), 4, seed=0)
    np.testing.assert_array_equal(parts.train.size, [0, 1, 1, 0])
    np.testing.assert_array_equal(parts.validation.size, [0, 0, 0, 0])
    np.testing.assert_array_equal(parts.test.size, [0, 0, 1, 0])


def test_flags_name_what_a_partition_reads():
    assert partition_lib.flags("iid") == ()
    assert partition_lib.flags("dirichlet") == ("alpha", "min_size", "balance")
    assert partition_lib.flags("pathological") == ("classes_per_client",)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dirichlett", {}, "did you mean 'dirichlet'"),
        ("dirichlet", {"alpha": 0}, "alpha must be > 0 and finite, got 0"),
        ("dirichlet", {"alpha": -1.0}, "alpha must be > 0"),
        ("dirichlet", {"alpha": float("nan")}, "alpha must be > 0"),
        ("dirichlet", {"alpha": float("inf")}, "finite, got inf"),
        ("iid", {"num_clients": 0}, "num_clients must be between 1 and the 1000"),
        ("iid", {"num_clients": 1001}, "got 1001"),
        ("quantity", {"min_size": -1}, "min_size must be >= 0, got -1"),
        ("pathological", {"classes_per_client": 0}, "between 1 and the 10 classes"),
        ("pathological", {"classes_per_client": 11}, "got 11"),
        ("mixture", {}, "needs the domain"),
        ("mixture", {"domain": np.zeros(3)}, "one entry per sample"),
        ("iid", {"labels": LABELS[:, None]}, r"shape \[s\], got \[1000, 1\]"),
    ],
)
def test_bad_options_are_named(name, options, message):
    options = {"labels": LABELS, "num_clients": 10, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        partition(name, **options)


@pytest.mark.parametrize(
    ("owner", "fractions", "message"),
    [
        ([0, 1], (0.7, 0.1, 0.2), "one shape"),
        ([0, 0, 2], (0.7, 0.1, 0.2), r"owner must lie in \[0, 2\), got 0..2"),
        ([0, -1, 1], (0.7, 0.1, 0.2), "got -1..1"),
        ([0, 1, 1], (0.7, 0.1, 0.1), "sum to 1"),
        ([0, 1, 1], (1.0, 0.0, 0.0), "positive"),
        ([0, 1, 1], (0.5, 0.5), "three"),
    ],
)
def test_bad_splits_are_named(owner, fractions, message):
    with pytest.raises(ValueError, match=message):
        split(np.array(owner), np.zeros(3, int), 2, seed=0, fractions=fractions)
