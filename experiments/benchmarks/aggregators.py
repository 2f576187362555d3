"""Time and memory of the aggregators beside loops over clients in NumPy and SciPy.

At 1,000 clients: Gaussian fusion with 100 classes of 128 features, a mixture of 8
components with 600 samples a client, and 50 steps of diffusion up and down again with
100,000 parameters. Both sides get the same float32 arrays and compute the same; a
benchmark whose sides disagree fails.

Seconds are medians over repetitions, with the range in brackets. The sides take turns,
so that a busy machine slows down both; believe ratios rather than seconds. fedgen is
warm and its time to compile stands apart. A loop goes over `--sample` clients, spread
evenly, and its time is scaled to all: it has no cost but that of its clients.

Memory is what a call needs beyond its arguments, results included. Of fedgen it is
what the compiler allocates; of NumPy the peak that `tracemalloc` sees over two clients,
and the results of the others.

OpenBLAS has one thread: with two, batches of small matrices took 5 to 10 times longer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported

import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special
from absl import app, flags

from fedgen.aggregators import diffusion, gaussian, mixture

CLIENTS = flags.DEFINE_integer("clients", 1000, "Number of clients.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of repetitions.", lower_bound=1)
SAMPLE = flags.DEFINE_integer(
    "sample", 100, "Clients that a loop goes over; at most --clients.", lower_bound=1
)
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny arrays: does it run, do sides agree?")

MIB = 2**20
_CHUNK = 4  # clients at once where many would only fill memory
EM_TOLERANCE, EM_STEPS = 1e-5, 1000


class Case(NamedTuple):
    """One quantity for all clients, computed in several ways.

    Attributes:
      name: What is computed.
      arguments: Arrays; those of `own` have the clients in front.
      own: Which arguments are the clients' own.
      fedgen: Functions of all arguments, to be compiled, by name.
      numpy: Functions of the arguments of one client, by name.
      tolerance: Largest difference, in units of the largest entry of a result.
    """

    name: str
    arguments: tuple[np.ndarray, ...]
    own: tuple[bool, ...]
    fedgen: dict[str, Callable[..., Any]]
    numpy: dict[str, Callable[..., tuple[np.ndarray, ...]]]
    tolerance: float


class Row(NamedTuple):
    """What one way of computing a case takes; `ratio` is to the case's first row."""

    case: str
    way: str
    seconds: list[float]
    ratio: list[float]
    bytes: int
    compile_seconds: float | None


# What is computed.


def gaussian_cases(rng, clients: int, classes: int, dim: int) -> list[Case]:
    """Fuse class means, without and with covariances."""

    def covariance(scale: float) -> np.ndarray:
        root = rng.normal(size=(2 * dim, dim)) / np.sqrt(2 * dim)
        return np.float32(scale * (root.T @ root + 0.1 * np.eye(dim)))

    prior_cov, cov = covariance(0.3), covariance(1.0)
    prior_mean = rng.normal(size=(classes, dim)).astype(np.float32)
    count = rng.integers(0, 20, size=(clients, classes)).astype(np.float32)
    mean = rng.normal(size=(clients, classes, dim)).astype(np.float32)
    mean += prior_mean[None]
    arguments = prior_mean, prior_cov, mean, cov, count
    axes = None, None, 0, None, 0
    own = tuple(axis == 0 for axis in axes)

    def summed(prior_mean, prior_cov, mean, cov, count):
        def one(pair):
            fused, spread = gaussian.fuse(prior_mean, prior_cov, pair[0], cov, pair[1])
            return fused, (spread**2).sum((1, 2))

        # One client at a time: its 6 MB of covariances stay in the cache.
        return jax.lax.map(one, (mean, count))

    # A class without samples keeps its prior; of the others the textbook's update.
    def solve(prior_mean, prior_cov, mean, cov, count):
        held = count > 0
        total = prior_cov + cov / count[held, None, None]
        step = np.linalg.solve(total, (mean - prior_mean)[held, :, None])
        fused = prior_mean.copy()
        fused[held] += (prior_cov @ step)[..., 0]
        return (fused,)

    def invert(prior_mean, prior_cov, mean, cov, count):
        held = count > 0
        gain = prior_cov @ np.linalg.inv(prior_cov + cov / count[held, None, None])
        fused, spread = prior_mean.copy(), np.stack([prior_cov] * len(count))
        fused[held] += (gain @ (mean - prior_mean)[held, :, None])[..., 0]
        spread[held] = prior_cov - gain @ prior_cov
        return fused, (spread**2).sum((1, 2))

    size = f"{classes} classes, d = {dim}"
    fuse_mean = jax.vmap(gaussian.fuse_mean, axes)
    return [
        Case(
            f"`gaussian.fuse_mean`, {size}: means",
            arguments,
            own,
            {"fedgen, `vmap`": lambda *args: (fuse_mean(*args),)},
            {"NumPy, `solve`": solve},
            1e-4,
        ),
        Case(
            f"`gaussian.fuse`, {size}: means and covariances, these reduced to norms",
            arguments,
            own,
            {"fedgen, `lax.map`": summed},
            {"NumPy, `inv`": invert},
            1e-4,
        ),
    ]


def mixture_case(rng, clients: int, samples: int, components: int) -> Case:
    """Fit proportions by EM to one tolerance, and compute responsibilities."""
    centre = 2 * rng.normal(size=(components, 2))
    share = rng.dirichlet(np.full(components, 0.5), size=clients)
    drawn = np.stack([rng.choice(components, samples, p=p) for p in share])
    x = centre[drawn] + rng.normal(size=(clients, samples, 2))
    square = np.stack([((x - c[None, None]) ** 2).sum(-1) for c in centre], axis=-1)
    table = np.float32(-square / 2)

    def one(table):
        mask = np.ones(samples, bool)
        proportions = mixture.fit_proportions(
            table, mask, tolerance=EM_TOLERANCE, max_steps=EM_STEPS
        )
        return proportions, mixture.responsibilities(table, proportions, mask)

    def growth(new, old):
        return np.max(new[old > 0] / old[old > 0]) - 1

    def textbook(table):
        proportions = np.full(components, 1 / components, np.float32)
        for _ in range(EM_STEPS):
            with np.errstate(divide="ignore"):  # a proportion may come to be 0
                logits = table + np.log(proportions)
            share = scipy.special.softmax(logits, axis=1)
            old, proportions = proportions, share.mean(0)
            if growth(proportions, old) <= EM_TOLERANCE:
                break
        with np.errstate(divide="ignore"):
            logits = table + np.log(proportions)
        return proportions, scipy.special.softmax(logits, axis=1)

    def products(table):
        density = np.exp(table - table.max(1, keepdims=True))
        proportions = np.full(components, 1 / components, np.float32)
        for _ in range(EM_STEPS):
            old = proportions
            proportions = old * ((1 / (density @ old)) @ density) / samples
            if growth(proportions, old) <= EM_TOLERANCE:
                break
        share = density * proportions
        return proportions, share / share.sum(1, keepdims=True)

    return Case(
        f"`mixture.fit_proportions` and `responsibilities`, {samples} samples, "
        f"k = {components}",
        (table,),
        (True,),
        {
            "fedgen, `lax.map`": lambda table: jax.lax.map(one, table),
            "fedgen, `vmap`": jax.vmap(one),
        },
        {
            "SciPy, `softmax` a step": textbook,
            "NumPy, fedgen's own formulas": products,
        },
        2e-3,
    )


def diffusion_case(rng, clients: int, parameters: int, steps: int) -> Case:
    """Invert by DDIM and generate again, under a Gaussian denoiser."""
    schedule = diffusion.linear_schedule()
    signal, noise = np.asarray(schedule.signal), np.asarray(schedule.noise)
    depth, refinements, gamma = 500, 3, np.float32(0.9)
    times = np.arange(steps + 1) * depth // steps
    mean = rng.normal(size=parameters).astype(np.float32)
    variance = rng.uniform(0.5, 2, size=parameters).astype(np.float32)
    x = rng.standard_normal(size=(clients, parameters), dtype=np.float32)

    def ours(mean, variance, x):
        denoise = diffusion.gaussian_denoiser(schedule, mean, variance)

        def one(x):
            code = diffusion.invert(denoise, schedule, x, depth=depth, steps=steps)
            return diffusion.generate(denoise, schedule, code, gamma=gamma)

        return (jax.lax.map(one, x, batch_size=_CHUNK),)

    def loop(mean, variance, x):
        def predict(x, t):
            gain = noise[t] / (signal[t] ** 2 * variance + noise[t] ** 2)
            return gain * (x - signal[t] * mean)

        for u, t in zip(times[:-1], times[1:], strict=True):
            ratio = signal[t] / signal[u]
            rest = noise[t] - ratio * noise[u]
            high = ratio * x + rest * predict(x, max(u, 1))
            for _ in range(refinements):
                high = ratio * x + rest * predict(high, t)
            x = high
        x = gamma * x
        for t, u in zip(times[:0:-1], times[-2::-1], strict=True):
            eps = predict(x, t)
            x = signal[u] * (x - noise[t] * eps) / signal[t] + noise[u] * eps
        return (x,)

    return Case(
        f"`diffusion.invert` and `generate`, p = {parameters:,}, {steps} steps each, "
        f"{refinements} refinements",
        (mean, variance, x),
        (False, False, True),
        {"fedgen, `lax.map`": ours},
        {"NumPy": loop},
        1e-3,
    )


def cases(clients: int, *, smoke: bool = False) -> list[Callable[[], list[Case]]]:
    """List what makes the cases, so that arrays live while they are needed."""
    rng = np.random.default_rng(0)
    sizes = ((3, 4), (20, 3), (7, 5)) if smoke else ((100, 128), (600, 8), (10**5, 50))
    return [
        lambda: gaussian_cases(rng, clients, *sizes[0]),
        lambda: [mixture_case(rng, clients, *sizes[1])],
        lambda: [diffusion_case(rng, clients, *sizes[2])],
    ]


# How it is measured.


def measure(case: Case, repeats: int, sample: int) -> list[Row]:
    """Run all ways of a case in turn, check that they agree, and measure them.

    Args:
      case: What to compute.
      repeats: Timed turns, after one that is not.
      sample: Clients that loops go over.

    Raises:
      AssertionError: If two ways give different results.
    """
    clients = next(
        len(a) for a, own in zip(case.arguments, case.own, strict=True) if own
    )
    sampled = np.linspace(0, clients - 1, min(sample, clients)).round().astype(int)
    arguments = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, case.arguments))
    ways, compiling, memory = {}, {}, {}
    for way, fn in case.fedgen.items():
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(*arguments).compile()
        compiling[way] = time.perf_counter() - start
        needs = compiled.memory_analysis()
        memory[way] = needs.temp_size_in_bytes + needs.output_size_in_bytes
        ways[way] = lambda compiled=compiled: jax.block_until_ready(
            compiled(*arguments)
        )
    for way, fn in case.numpy.items():

        def over(clients, fn=fn):
            results = []
            for i in clients:
                pairs = zip(case.arguments, case.own, strict=True)
                results.append(fn(*(a[i] if own else a for a, own in pairs)))
            return results

        ways[way] = lambda over=over: over(sampled)
        compiling[way], memory[way] = None, _peak_bytes(over, clients)

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    expected = None
    for turn in range(repeats + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            result = run()
            taken = time.perf_counter() - start
            if turn:
                own = way in case.fedgen
                seconds[way].append(taken if own else taken * clients / len(sampled))
                continue
            # The first turn warms up, and shows whether the results are the same.
            if way in case.fedgen:
                result = [np.asarray(a)[sampled] for a in result]
            else:
                result = [np.stack(a) for a in zip(*result, strict=True)]
            expected = result if expected is None else expected
            for a, b in zip(result, expected, strict=True):
                np.testing.assert_allclose(
                    a, b, atol=case.tolerance * np.abs(b).max(), err_msg=way
                )
    first = seconds[next(iter(ways))]
    return [
        Row(
            case.name,
            way,
            taken,
            [a / b for a, b in zip(taken, first, strict=True)],
            memory[way],
            compiling[way],
        )
        for way, taken in seconds.items()
    ]


def _peak_bytes(over: Callable[[range], list], clients: int) -> int:
    """Measure a loop over two clients and add the results of the others."""
    few = min(clients, 2)
    tracemalloc.start()
    results = over(range(few))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak + (clients - few) * sum(a.nbytes for a in results[0])


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the table."""
    lines = [
        "| what, all clients | how | seconds | times the first | MiB | compile, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    known = None
    for row in rows:
        compiling = row.compile_seconds
        cells = [
            "" if row.case == known else row.case,
            row.way,
            _spread(row.seconds),
            _spread(row.ratio),
            f"{row.bytes / MIB:,.3g}" if row.bytes < 1e9 else f"{row.bytes / MIB:,.0f}",
            "" if compiling is None else f"{compiling:.2f}",
        ]
        known = row.case
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    rows = []
    for make in cases(CLIENTS.value, smoke=SMOKE.value):
        for case in make():
            rows += measure(case, REPEATS.value, SAMPLE.value)
            print(f"measured {case.name}", file=sys.stderr)
    sys.stdout.write(to_markdown(rows))


if __name__ == "__main__":
    app.run(main)
