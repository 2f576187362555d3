"""Who holds which sample: partitions of a pool over clients, and their splits.

A partition is an array `owner [s]` that names the one client of every sample, so
it is exhaustive and disjoint by construction. All of them run on the host, are
seeded, and end on any input: a draw that misses a condition is repeated a bounded
number of times and then repaired by moving samples.

`dirichlet` is the per-class protocol of Yurochkin et al. (ICML 2019) and Li et al.
(ICDE 2022); its option `balance` follows the published code of pFedFDA (Mclaughlin
and Su, NeurIPS 2024), where a client with an even share of the pool is dealt
nothing of later classes. `dirichlet_client` draws a class distribution per client,
as Hsu et al. (arXiv:1909.06335); `pathological` deals shards of sorted labels, as
McMahan et al. (AISTATS 2017). The repairs are this library's own.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedgen.core.federation import Rows

_MAX_DRAWS = 100
_MAX_DRAWN = 1_000_000  # clients over all draws; of many, one always holds too little
_TOGETHER = 5_000  # clients whose samples are spread side by side, in the cache


class Split(NamedTuple):
    """Train, validation and test rows of every client, in one order.

    Client after client, and within a client train, then validation, then test:
    each part is a run of `order`.
    """

    order: np.ndarray  # [s] int32 pool rows
    train: Rows  # start [n], size [n] int32
    validation: Rows
    test: Rows


def iid(labels: np.ndarray, num_clients: int, *, seed: int) -> np.ndarray:
    """Deal the shuffled samples to clients of equal size, give or take one.

    Args:
      labels: `[s]` class of every sample.
      num_clients: Number of clients `n`.
      seed: Seed of the shuffle.

    Returns:
      `[s]` int32, the client that holds each sample.
    """
    rng = np.random.default_rng(seed)
    owner = np.arange(len(labels), dtype=np.int32) % num_clients
    return rng.permutation(owner)


def dirichlet(
    labels: np.ndarray,
    num_clients: int,
    *,
    seed: int,
    alpha: float = 0.1,
    min_size: int = 10,
    balance: bool = True,
) -> np.ndarray:
    """Divide each class over the clients in proportions drawn from Dir(alpha).

    The whole draw is repeated, up to 100 times (less often beyond 10,000 clients),
    until the smallest client holds `min_size` samples; then samples are moved from the
    largest clients.

    Args:
      labels: `[s]` class of every sample.
      num_clients: Number of clients `n`.
      seed: Seed of the draw.
      alpha: Concentration; small means few classes per client.
      min_size: Fewest samples of a client, at most an even share of the pool.
      balance: Deal nothing more to clients that already hold an even share.

    Returns:
      `[s]` int32, the client that holds each sample.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    rows_of_class = _groups(labels)
    share = len(labels) / num_clients
    wanted = min(min_size, int(share))
    best, best_smallest = [], -1
    for _ in range(max(1, min(_MAX_DRAWS, _MAX_DRAWN // num_clients))):
        held = np.zeros(num_clients, np.int64)
        table = []
        for rows in rows_of_class:
            proportion = _dirichlet(rng, alpha, num_clients)
            if balance:
                proportion = _masked(proportion, held < share)
            table.append(_apportion(proportion, len(rows)))
            held += table[-1]
        if held.min() > best_smallest:
            best, best_smallest = table, held.min()
        if best_smallest >= wanted:
            break
    owner = np.empty(len(labels), np.int32)
    for rows, sizes in zip(rows_of_class, best, strict=True):
        owner[rng.permutation(rows)] = np.repeat(np.arange(num_clients), sizes)
    return _repair(owner, num_clients, wanted, rng)


def dirichlet_client(
    labels: np.ndarray, num_clients: int, *, seed: int, alpha: float = 0.1
) -> np.ndarray:
    """Draw every client's class distribution from Dir(alpha); equal client sizes.

    Clients take turns in a random order. Each draws its share of the pool without
    replacement: the counts per class follow its distribution as far as the class
    lasts, and what is missing comes from the classes that are left, in the same
    proportions where it has any and by availability where it has none.

    Args:
      labels: `[s]` class of every sample.
      num_clients: Number of clients `n`.
      seed: Seed of the draw.
      alpha: Concentration; small means few classes per client.

    Returns:
      `[s]` int32, the client that holds each sample.
    """
    rng = np.random.default_rng(seed)
    rows_of_class = [rng.permutation(rows) for rows in _groups(labels)]
    stock = np.array([len(rows) for rows in rows_of_class], np.int64)
    clients = rng.permutation(num_clients)
    draws = [_draw_dirichlet(rng, alpha, len(stock)) for _ in clients]
    proportion = _to_simplex(alpha, *np.stack(draws, axis=1))
    sizes = _even_sizes(len(labels), num_clients)[clients]
    counts = _fill_all(proportion, stock, sizes)
    owner = np.empty(len(labels), np.int32)
    for rows, taken in zip(rows_of_class, counts.T, strict=True):
        owner[rows] = np.repeat(clients, taken)
    return owner


def pathological(
    labels: np.ndarray, num_clients: int, *, seed: int, classes_per_client: int = 2
) -> np.ndarray:
    """Give every client shards of `classes_per_client` classes.

    Every class is cut into the same number of shards, give or take one, and a client
    gets shards of different classes. A class of fewer samples than shards leaves
    some of its clients with fewer classes; where there are fewer shards than
    classes, a class without any goes whole to some client.

    Args:
      labels: `[s]` class of every sample.
      num_clients: Number of clients `n`.
      seed: Seed of the draw.
      classes_per_client: Number of different classes that a client holds.

    Returns:
      `[s]` int32, the client that holds each sample.
    """
    rng = np.random.default_rng(seed)
    rows_of_class = [rng.permutation(rows) for rows in _groups(labels)]
    num_classes = len(rows_of_class)
    per_client = min(classes_per_client, num_classes)
    clients_of_class = [[] for _ in rows_of_class]
    shards = _even_sizes(num_clients * per_client, num_classes)
    shards = rng.permutation(shards)
    for client in rng.permutation(num_clients):
        # Most plentiful first is what keeps the last clients from facing
        # several shards of one class.
        chosen = np.lexsort((rng.random(num_classes), -shards))[:per_client]
        shards[chosen] -= 1
        for label in chosen:
            clients_of_class[label].append(client)
    owner = np.empty(len(labels), np.int32)
    for rows, clients in zip(rows_of_class, clients_of_class, strict=True):
        # A class without a shard would be lost: any client takes it.
        clients = clients or [int(rng.integers(num_clients))]
        owner[rows] = np.repeat(clients, _even_sizes(len(rows), len(clients)))
    return _repair(owner, num_clients, min(1, len(labels) // num_clients), rng)


def quantity(
    labels: np.ndarray,
    num_clients: int,
    *,
    seed: int,
    alpha: float = 0.5,
    min_size: int = 10,
) -> np.ndarray:
    """Deal shuffled samples to clients whose sizes are drawn from Dir(alpha).

    Args:
      labels: `[s]` class of every sample.
      num_clients: Number of clients `n`.
      seed: Seed of the draw.
      alpha: Concentration; small means very unequal sizes.
      min_size: Fewest samples of a client, at most an even share of the pool.

    Returns:
      `[s]` int32, the client that holds each sample.
    """
    rng = np.random.default_rng(seed)
    floor = min(min_size, len(labels) // num_clients)
    spare = len(labels) - floor * num_clients
    sizes = floor + _apportion(_dirichlet(rng, alpha, num_clients), spare)
    owner = np.repeat(np.arange(num_clients, dtype=np.int32), sizes)
    return rng.permutation(owner)


def mixture(
    labels: np.ndarray,
    num_clients: int,
    *,
    seed: int,
    domain: np.ndarray,
    alpha: float = 0.4,
) -> np.ndarray:
    """Draw every client's mixture over inherent distributions from Dir(alpha).

    The setting of FedEM (Marfoq et al., NeurIPS 2021) and FedGMM: a sample belongs
    to a domain (a rotation, a group of classes, a data set) and a client's data are
    a mixture of domains.

    Args:
      labels: `[s]` class of every sample; only its length is used.
      num_clients: Number of clients `n`.
      seed: Seed of the draw.
      domain: `[s]` inherent distribution of every sample.
      alpha: Concentration; small means one domain per client.

    Returns:
      `[s]` int32, the client that holds each sample.
    """
    if np.shape(domain) != np.shape(labels):
        raise ValueError(
            f"domain must have one entry per sample, {np.shape(labels)}, "
            f"got {np.shape(domain)}"
        )
    return dirichlet_client(domain, num_clients, seed=seed, alpha=alpha)


def by_user(users: Sequence | np.ndarray) -> np.ndarray:
    """Make each user (writer, patient, device) a client.

    Args:
      users: `[s]` name or number of the user of every sample.

    Returns:
      `[s]` int32, clients numbered in the sorted order of the users.
    """
    return np.unique(np.asarray(users), return_inverse=True)[1].astype(np.int32)


PARTITIONS: dict[str, Callable[..., np.ndarray]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "dirichlet_client": dirichlet_client,
    "pathological": pathological,
    "quantity": quantity,
    "mixture": mixture,
}


def flags(name: str) -> tuple[str, ...]:
    """Return the names of the options that a partition reads beside the seed.

    Args:
      name: A key of `PARTITIONS`.

    Raises:
      ValueError: If there is no such partition.
    """
    if name not in PARTITIONS:
        near = difflib.get_close_matches(name, PARTITIONS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown partition {name!r}; did you mean {near[0]!r}? "
            f"Known: {', '.join(PARTITIONS)}"
        )
    parameters = inspect.signature(PARTITIONS[name]).parameters
    return tuple(p for p in parameters if p not in ("labels", "num_clients", "seed"))


def partition(
    name: str,
    labels: np.ndarray,
    num_clients: int,
    *,
    seed: int,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    min_size: int | None = None,
    domain: np.ndarray | None = None,
    balance: bool | None = None,
) -> np.ndarray:
    """Check the options and partition the samples.

    Options that are None take the partition's own default; options that the
    partition does not read (see `flags`) are checked and then ignored.

    Args:
      name: A key of `PARTITIONS`.
      labels: `[s]` class of every sample.
      num_clients: Number of clients `n`.
      seed: Seed of the draw.
      alpha: Concentration of a Dirichlet distribution.
      classes_per_client: Number of different classes that a client holds.
      min_size: Fewest samples of a client.
      domain: `[s]` inherent distribution of every sample.
      balance: Deal nothing more to clients that already hold an even share.

    Returns:
      `[s]` int32, the client that holds each sample.

    Raises:
      ValueError: If an option is out of its range, or missing.
    """
    read = flags(name)
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [s], got {list(labels.shape)}")
    if not 1 <= num_clients <= len(labels):
        raise ValueError(
            f"num_clients must be between 1 and the {len(labels)} samples, "
            f"got {num_clients}"
        )
    if alpha is not None and not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"alpha must be > 0 and finite, got {alpha}")
    if min_size is not None and min_size < 0:
        raise ValueError(f"min_size must be >= 0, got {min_size}")
    if classes_per_client is not None:
        num_classes = len(np.unique(labels))
        if not 1 <= classes_per_client <= num_classes:
            raise ValueError(
                f"classes_per_client must be between 1 and the {num_classes} classes "
                f"present, got {classes_per_client}"
            )
    if "domain" in read and domain is None:
        raise ValueError(f"partition {name!r} needs the domain of every sample")
    given = {
        "alpha": alpha,
        "classes_per_client": classes_per_client,
        "min_size": min_size,
        "domain": domain,
        "balance": balance,
    }
    options = {k: v for k, v in given.items() if k in read and v is not None}
    return PARTITIONS[name](labels, num_clients, seed=seed, **options)


def split(
    owner: np.ndarray,
    labels: np.ndarray,
    num_clients: int,
    *,
    seed: int,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
) -> Split:
    """Divide every client's samples into train, validation and test rows.

    Stratified: a class's samples at a client are spread over the parts, and
    leftovers are dealt so that the parts' sizes come out as asked for too. A client
    of three samples or more has at least one in each part; of one or two, the first
    trains and the second tests.

    Args:
      owner: `[s]` the client of every sample.
      labels: `[s]` the class of every sample.
      num_clients: Number of clients `n`; clients without samples are allowed.
      seed: Seed of the draw.
      fractions: Of train, validation and test; they sum to 1.

    Returns:
      The rows, with `order` over all samples.

    Raises:
      ValueError: If the arrays or the fractions do not fit.
    """
    owner, labels = np.asarray(owner), np.asarray(labels)
    if owner.shape != labels.shape or owner.ndim != 1:
        raise ValueError(
            f"owner and labels must have one shape [s], got {list(owner.shape)} and "
            f"{list(labels.shape)}"
        )
    if len(owner) and not (owner.min() >= 0 and owner.max() < num_clients):
        raise ValueError(
            f"owner must lie in [0, {num_clients}), got {owner.min()}..{owner.max()}"
        )
    fraction = np.asarray(fractions, float)
    positive = fraction.shape == (3,) and (fraction > 0).all()
    if not positive or abs(fraction.sum() - 1) > 1e-6:
        raise ValueError(
            f"fractions must be three positive numbers that sum to 1, got {fractions}"
        )
    rng = np.random.default_rng(seed)
    shuffle = rng.permutation(len(owner))
    order = shuffle[np.lexsort((labels[shuffle], owner[shuffle]))]
    size = np.bincount(owner, minlength=num_clients)
    start = np.cumsum(size) - size
    part_sizes = _part_sizes(size, fraction)
    part = np.empty(len(owner), np.int8)
    low = np.arange(0, num_clients, _TOGETHER)
    runs = [slice(*ends) for ends in itertools.pairwise([*start[low], len(owner)])]
    for first, run in zip(low, runs, strict=True):
        held, sizes = order[run], part_sizes[first : first + _TOGETHER]
        part[run] = _spread(owner[held] - first, labels[held], sizes, rng)
    tie = rng.random(len(owner))
    for run in runs:
        within = np.lexsort((tie[run], part[run], owner[order[run]]))
        order[run] = order[run][within]
    starts = start[:, None] + np.cumsum(part_sizes, axis=1) - part_sizes
    return Split(
        order.astype(np.int32),
        *(
            Rows(starts[:, i].astype(np.int32), part_sizes[:, i].astype(np.int32))
            for i in range(3)
        ),
    )


def redraw(drawn: Split, wanted: np.ndarray, kind: np.ndarray, *, seed: int) -> Split:
    """Let clients draw their samples from the pool with replacement.

    What is divided then are not samples but draws, of which there may be any number.
    Each is of a kind, its class and whatever else partitions go by, and comes to stand
    for any row of its kind. The pool is divided once, stratified and as `split` does by
    default, so that no row trains one client and tests another, or the same.

    Args:
      drawn: Train, validation and test draws of every client.
      wanted: `[s]` kind of every draw.
      kind: `[rows]` kind of every row of the pool, from 0.
      seed: Seed of the draws.

    Returns:
      The same with rows of the pool in its order.

    Raises:
      ValueError: If a part of the pool has no row of a kind that it is to draw.
    """
    rng = np.random.default_rng((seed, 2))
    pool = split(np.zeros(len(kind), int), kind, 1, seed=seed)

    def cells(parts, kind):
        sizes = np.stack([rows.size for rows in parts[1:]], axis=1)
        part = np.repeat(np.tile(np.arange(3), len(sizes)), sizes.ravel())
        return 3 * kind[parts.order] + part

    cell = cells(pool, kind)
    rows = pool.order[np.argsort(cell, kind="stable")]
    size = np.bincount(cell, minlength=3 * (int(kind.max()) + 1))
    start = np.cumsum(size) - size
    cell = cells(drawn, wanted)
    if not size[cell].all():
        number, part = divmod(int(cell[np.argmin(size[cell])]), 3)
        raise ValueError(
            f"of {np.sum(kind == number)} samples of kind {number}, none is left for "
            f"{('training', 'validation', 'test')[part]}; draw from more samples"
        )
    return drawn._replace(order=rows[start[cell] + rng.integers(0, size[cell])])


def counts(
    owner: np.ndarray, labels: np.ndarray, num_clients: int, num_classes: int
) -> np.ndarray:
    """Count samples, `[n, c]`: the table behind a picture of the partition.

    Args:
      owner: `[s]` the client of every sample.
      labels: `[s]` the class of every sample.
      num_clients: Number of clients `n`.
      num_classes: Number of classes `c`.
    """
    cell = np.asarray(owner, np.int64) * num_classes + np.asarray(labels)
    table = np.bincount(cell, minlength=num_clients * num_classes)
    return table.reshape(num_clients, num_classes)


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    """List the rows of each label that occurs, in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(np.asarray(labels)[order])) + 1
    return np.split(order, cuts)


def _even_sizes(total: int, parts: int) -> np.ndarray:
    """Divide a number into parts that differ by at most one, the larger first."""
    return total // parts + (np.arange(parts) < total % parts)


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> np.ndarray:
    """Draw from a symmetric Dirichlet, whole also where all gammas underflow."""
    return _to_simplex(alpha, *_draw_dirichlet(rng, alpha, size))


def _draw_dirichlet(
    rng: np.random.Generator, alpha: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw what `_to_simplex` makes a vector of proportions of."""
    return rng.random(size), rng.standard_gamma(max(alpha, 1e-300) + 1.0, size)


def _to_simplex(alpha: float, uniform: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Turn draws `[..., c]` into proportions `[..., c]`."""
    # In logarithms, where Gamma(alpha) = Gamma(alpha + 1) * uniform^(1 / alpha).
    log_gamma = np.log(gamma) + np.log(1.0 - uniform) / max(alpha, 1e-300)
    weight = np.exp(log_gamma - log_gamma.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def _masked(proportion: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Renormalise over `keep`, evenly where nothing of the proportions is left."""
    kept = np.where(keep, proportion, 0.0)
    kept = kept if kept.sum() > 0 else keep.astype(float)
    return kept / kept.sum()


def _apportion(proportion: np.ndarray, total: int | np.ndarray) -> np.ndarray:
    """Round `[..., c]` to whole numbers that sum to `total [...]`, by remainder."""
    total = np.asarray(total)[..., None]
    exact = proportion * total
    sizes = np.floor(exact).astype(np.int64)
    missing = total - sizes.sum(axis=-1, keepdims=True)
    largest = np.argmax(sizes, axis=-1)[..., None]
    sizes += _rank(sizes - exact) < missing
    # Rounding can also give too much, by a unit in the last place.
    excess = np.take_along_axis(sizes, largest, -1) + np.minimum(missing, 0)
    np.put_along_axis(sizes, largest, excess, -1)
    return sizes


def _rank(values: np.ndarray) -> np.ndarray:
    """Rank the entries along the last axis from 0, the first of equals first."""
    return np.argsort(np.argsort(values, axis=-1, kind="stable"), axis=-1)


def _fill(proportion: np.ndarray, left: np.ndarray, total: int) -> np.ndarray:
    """Take `total` from stocks of `left`, as nearly in proportion as they last."""
    taken = np.zeros_like(left)
    while (missing := total - taken.sum()) > 0:
        stock = left - taken
        weight = np.where(stock > 0, proportion, 0.0)
        weight = weight if weight.sum() > 0 else stock
        taken += np.minimum(_apportion(weight / weight.sum(), missing), stock)
    return taken


def _fill_all(
    proportion: np.ndarray, stock: np.ndarray, totals: np.ndarray
) -> np.ndarray:
    """Let `_fill` serve clients `[n]` one after another; `proportion [n, c]`."""
    counts = np.zeros(proportion.shape, np.int64)
    left, done, many = stock.copy(), 0, 1
    while done < len(totals):
        # As long as no class runs out, a client takes what it wants.
        some = slice(done, done + many)
        weight = np.where(left > 0, proportion[some], 0.0)
        whole = weight.sum(axis=-1, keepdims=True)
        wanted = _apportion(weight / np.where(whole > 0, whole, 1.0), totals[some])
        after = left - np.cumsum(wanted, axis=0)
        before = after + wanted
        served = (whole > 0) & (after >= 0) & ((before > 0) | (left == 0))
        many = int(np.logical_and.accumulate(served.all(axis=1)).sum())
        if many:
            counts[done : done + many] = wanted[:many]
        else:
            counts[done], many = _fill(proportion[done], left, totals[done]), 1
        left = left - counts[done : done + many].sum(axis=0)
        done += many
        many *= 2
    return counts


def _repair(
    owner: np.ndarray, num_clients: int, min_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Move samples from the largest clients until each holds `min_size`."""
    held = np.bincount(owner, minlength=num_clients)
    short = np.flatnonzero(held < min_size)
    if not len(short):
        return owner
    needed = int((min_size - held[short]).sum())
    # Lowering the ceiling takes from the largest first; bisection finds the highest
    # ceiling that frees enough.
    low, high = min_size, int(held.max())
    while low < high:
        middle = (low + high + 1) // 2
        if np.maximum(held - middle, 0).sum() >= needed:
            low = middle
        else:
            high = middle - 1
    surplus = np.maximum(held - low, 0)
    shuffle = rng.permutation(len(owner))
    order = shuffle[np.argsort(owner[shuffle], kind="stable")]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(held) - held, held)
    free = order[rank < surplus[owner[order]]][:needed]
    repaired = owner.copy()
    repaired[free] = np.repeat(short, min_size - held[short])
    return repaired


def _part_sizes(size: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Divide client sizes `[n]` into parts `[n, 3]` by largest remainder."""
    exact = size[:, None] * fraction
    parts = np.floor(exact + 1e-9).astype(np.int64)
    parts += _rank(parts - exact) < (size - parts.sum(axis=1))[:, None]
    for column in range(3):
        lacking = np.flatnonzero((size >= 3) & (parts[:, column] == 0))
        parts[lacking, np.argmax(parts[lacking], axis=1)] -= 1
        parts[lacking, column] += 1
    parts[size == 1] = (1, 0, 0)
    parts[size == 2] = (1, 0, 1)
    return parts


def _spread(
    owner: np.ndarray,
    labels: np.ndarray,
    part_sizes: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Assign the parts of samples `[s]` that are sorted by client and label.

    The floor of the share of each class of a client is certain; the rest is dealt,
    largest remainder first, to parts of the client that still have room. Ties go at
    random: by label, the rare classes of all clients would train on low labels and
    test on high ones. Clients are dealt to side by side.
    """
    # A group is what a client holds of a class; each has a cell for every part.
    begins = (np.diff(owner, prepend=-1) != 0) | (np.diff(labels, prepend=-1) != 0)
    first = np.flatnonzero(begins)
    size, client = np.diff(first, append=len(owner)), owner[first]
    share = part_sizes / np.maximum(part_sizes.sum(axis=1, keepdims=True), 1)
    exact = size[:, None] * share[client]
    table = np.floor(exact + 1e-9).astype(np.int64)
    open_group = size - table.sum(axis=1)
    certain = [np.bincount(client, column, len(part_sizes)) for column in table.T]
    open_part = part_sizes - np.stack(certain, axis=1).astype(np.int64)

    def move(group, column, most):
        moved = np.minimum(open_group[group], open_part[client[group], column])
        moved = np.minimum(moved, most)
        table[group, column] += moved
        open_group[group] -= moved
        open_part[client[group], column] -= moved

    remainder = np.round(exact - table, 9).ravel()
    tie = rng.random(remainder.size)
    cells = np.lexsort((tie, -remainder, np.repeat(client, 3)))
    count = 3 * np.bincount(client, minlength=len(part_sizes))
    turn = np.cumsum(count) - count
    end = turn + count
    active = np.flatnonzero(open_part.any(axis=1))
    while active.size:
        group, column = divmod(cells[turn[active]], 3)
        move(group, column, 1)
        turn[active] += 1
        more = (turn[active] < end[active]) & open_part[active].any(axis=1)
        active = active[more]
    # One pass gives each cell one sample at most; what is left goes anywhere.
    while (left := np.flatnonzero(open_group)).size:
        group = left[np.unique(client[left], return_index=True)[1]]
        for column in range(3):
            move(group, column, open_group[group])
    return np.repeat(np.tile(np.arange(3, dtype=np.int8), len(size)), table.ravel())
