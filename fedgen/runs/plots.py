"""The pictures of a run: accuracy by round and by bytes, clients, partition, samples.

Every function draws from plain dictionaries or an array, writes a PNG and returns
its path. Nothing touches the state of `pyplot`, and a user's style changes nothing.

A method has the same colour, marker and dash in every picture. The colours are
those of Okabe and Ito, "Color Universal Design" (2008), which stay apart for
colour-blind readers; markers and dashes tell the same without colour.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fedgen.runs import tables

Path = str | os.PathLike[str]
History = Mapping[str, Sequence[Mapping[str, Any]]]

DPI = 150
WIDTH = 7.6  # inches; 730 CSS pixels, so that 9 pt in a picture are 9 pt on a page

_STYLE = [
    "default",
    {
        "font.size": 9,
        "axes.labelsize": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "axes.axisbelow": True,
        "xtick.color": "#333333",
        "ytick.color": "#333333",
        "grid.color": "#dddddd",
        "grid.linewidth": 0.8,
        "figure.dpi": DPI,
    },
]
_INK = "#222222"
_GAIN = "#0072B2"
_LOSS = "#D55E00"
# What every run is compared with keeps its look, whatever else takes part.
_FIXED = {
    tables.LOCAL_ONLY: ("#767676", "s", (0, (4, 2))),
    "fedavg": ("#E69F00", "^", (0, (1, 1))),
}
_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "D", "v", "P", "X", "*", "<", ">")
_DASHES = ("solid", (0, (6, 1.5)), (0, (3, 1, 1, 1)))
_WIDE = 30  # ratio of the largest to the smallest value that asks for a log axis
_NUMBERED = 40  # up to so many clients are named on an axis
_DRAWN = 1000  # up to so many clients are drawn; a picture has hardly more columns
_MARKED = 25  # up to so many rounds have a marker each
_PAIRS = 8  # samples of a component that are drawn
_PAIR = (
    "Left generated, right the nearest training image; below, the root mean squared "
    "difference."
)
_WRITTEN = 20  # up to so many clients and classes have their counts written out


class Look(NamedTuple):
    """How one method is drawn."""

    colour: str
    marker: str
    dash: Any
    width: float
    size: float
    order: int


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Give each method its colour, marker and dash; the first is emphasised."""
    out, free = {}, 0
    for i, name in enumerate(names):
        if name in _FIXED:
            colour, marker, dash = _FIXED[name]
        else:
            # Colours come back with another dash, the first one never.
            turn, place = divmod(max(free - 1, 0), len(_COLOURS) - 1)
            colour = _COLOURS[place + 1 if free else 0]
            marker = _MARKERS[free % len(_MARKERS)]
            dash = _DASHES[turn % len(_DASHES)]
            free += 1
        width, size, order = (2.6, 6.5, 4) if i == 0 else (1.4, 4.5, 3)
        out[name] = Look(colour, marker, dash, width, size, order)
    return out


def accuracy_by_round(history: History, path: Path) -> Path:
    """Draw the mean personal accuracy against rounds, one line a method.

    Args:
      history: Evaluated rounds by method, the algorithm of the run first.
      path: Where to write the PNG.

    Returns:
      The path.
    """
    with style.context(_STYLE):
        figure, axes = _axes_for(history)
        ends = []
        for name, look in looks(history).items():
            accuracy = _series(history[name], "personal_accuracy", 100)
            _line(axes, _series(history[name], "round"), accuracy, look)
            ends.append((name, look, accuracy))
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(_whole_numbers())
        _finish_accuracy(axes, ends)
        return _save(figure, path)


def accuracy_by_bytes(history: History, path: Path) -> Path:
    """Draw the mean personal accuracy against traffic, one line a method.

    A method that sends nothing, such as local-only training, has no place on the
    axis and is drawn as a level line at its last accuracy.

    Args:
      history: Evaluated rounds by method, the algorithm of the run first.
      path: Where to write the PNG.

    Returns:
      The path.
    """
    with style.context(_STYLE):
        figure, axes = _axes_for(history)
        mib = {k: _series(v, "bytes", 2**-20) for k, v in history.items()}
        sent = _finite(mib.values())
        sent = sent[sent > 0]
        log = sent.size > 0 and sent.max() > _WIDE * sent.min()
        ends = []
        for name, look in looks(history).items():
            accuracy = _series(history[name], "personal_accuracy", 100)
            x = mib[name]
            if np.any(x > 0):
                # Zero has no place on a logarithmic axis.
                _line(axes, np.where(x > 0, x, np.nan) if log else x, accuracy, look)
                ends.append((name, look, accuracy))
            else:
                look = look._replace(marker="")
                level = _last(accuracy)
                if math.isfinite(level):
                    axes.axhline(
                        level, color=look.colour, ls=look.dash, lw=look.width, zorder=2
                    )
                ends.append((f"{name} (sends nothing)", look, accuracy[-1:]))
        axes.set_xlabel(
            "traffic up and down, all clients, MiB" + (" (log scale)" if log else "")
        )
        if log:
            axes.set_xscale("log")
            few = math.log10(sent.max() / sent.min()) < 3
            axes.xaxis.set_major_locator(
                ticker.LogLocator(subs=(1, 2, 5) if few else (1,))
            )
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(_plain))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.set_xlim(left=0)
        _finish_accuracy(axes, ends)
        return _save(figure, path)


def client_gains(summary: Mapping[str, Any], path: Path) -> Path:
    """Draw every client's test accuracy against what it reaches on its own.

    Clients are sorted by what the algorithm gains on local-only training; those
    without test rows are left out, and the picture says how many. Where the run has
    no local-only baseline, the accuracies stand alone, and the picture says so. Of more
    than 1,000 clients, 1,000 at even distances are drawn.

    Args:
      summary: What a run writes to `summary.json`.
      path: Where to write the PNG.

    Returns:
      The path.

    Raises:
      ValueError: If the two methods scored different numbers of clients.
    """
    results = tables.methods(summary)
    name = summary["algorithm"]
    accuracy = _per_client(results[name])
    if name == tables.LOCAL_ONLY or tables.LOCAL_ONLY not in results:
        local = None
        scored = np.isfinite(accuracy)
        order = np.flatnonzero(scored)[np.argsort(-accuracy[scored], kind="stable")]
    else:
        local = _per_client(results[tables.LOCAL_ONLY])
        if local.shape != accuracy.shape:
            raise ValueError(
                f"{name} and {tables.LOCAL_ONLY} must score the same clients, got "
                f"{accuracy.size} and {local.size}"
            )
        gain = accuracy - local
        scored = np.isfinite(gain)
        order = np.flatnonzero(scored)[np.argsort(-gain[scored], kind="stable")]

    drawn = _thinned(order)
    with style.context(_STYLE):
        figure = Figure(
            figsize=(WIDTH, 3.4 if local is None else 5.0), layout="constrained"
        )
        if local is None:
            upper = figure.subplots()
            lowest = upper
            upper.set_title(f"This run has no {tables.LOCAL_ONLY} baseline.")
        else:
            upper, lowest = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        if order.size:
            _client_accuracy(upper, results, name, accuracy, local, drawn)
            if local is not None:
                _gain_bars(lowest, gain[drawn])
                lowest.set_title(_balance(gain[order]))
            upper.set_xlim(-0.7, drawn.size - 0.3)
        else:
            _say(upper, "No client has a finite test accuracy.")
        upper.set_ylabel("test accuracy (%)")
        missing = accuracy.size - order.size
        lowest.set_xlabel(
            f"client, sorted by {'accuracy' if local is None else 'gain'}"
            + (f"; {missing:,} without a score left out" if missing else "")
            + _how_many(drawn, order)
        )
        if 0 < order.size <= _NUMBERED:
            ids = summary.get("evaluated_clients") or range(accuracy.size)
            lowest.set_xticks(range(order.size), [str(ids[i]) for i in order])
        else:
            lowest.xaxis.set_major_locator(_whole_numbers())
        return _save(figure, path)


def grid(rows: Sequence[Mapping[str, Any]], best: int | None, path: Path) -> Path:
    """Draw the accuracy at every point of a grid, each seed and their mean.

    Args:
      rows: Of a sweep's `sweep.json`.
      best: Which of them validation chose, if any.
      path: Where to write the PNG.

    Returns:
      The path.
    """
    names = [
        ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        for row in rows
    ]
    with style.context(_STYLE):
        height = min(1.0 + 0.25 * len(rows), 30.0)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(rows):
            colour = _GAIN if i == best else _INK
            seeds = 100 * np.array(row["personal_accuracy"]["per_seed"], np.float64)
            axes.plot(seeds, np.full(seeds.size, i), "o", color=colour, alpha=0.4)
            if seeds.size:  # none if one diverged
                axes.plot(seeds.mean(), i, "|", color=colour, markersize=12)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), names)
        axes.grid(axis="x")
        axes.set_xlabel("test accuracy (%) by seed, mean |; blue: best on validation")
        return _save(figure, path)


def partition(counts: np.ndarray, path: Path) -> Path:
    """Draw how many training samples of each class every client holds.

    Above, the samples of each client; below, clients x classes on a logarithmic
    colour scale, where a class that a client lacks stays empty. Few clients are in
    their own order and have the numbers written out; many are sorted by their
    largest class, so that the structure shows; of more than 1,000,
    1,000 at even distances are drawn.

    Args:
      counts: `[n, c]` samples.
      path: Where to write the PNG.

    Returns:
      The path.

    Raises:
      ValueError: If the counts are not a `[n, c]` array of numbers from 0 up.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be a filled [n, c] array, got {counts.shape}")
    if not np.all(counts >= 0):
        raise ValueError(f"counts must be >= 0, got {counts[~(counts >= 0)][0]}")
    n, c = counts.shape
    order = np.arange(n)
    if n > _NUMBERED:
        order = np.lexsort((-counts.max(1), counts.argmax(1)))
    drawn = _thinned(order)
    shown = counts[drawn]

    with style.context(_STYLE):
        height = min(max(0.24 * c, 1.6), 5.0)
        figure = Figure(figsize=(WIDTH, height + 1.8), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(0.8, height))

        total = shown.sum(1)
        _bars(upper, total, "#8c8c8c")
        held = total[total > 0]
        if held.size and held.max() > _WIDE * held.min():
            upper.set_yscale("log")
            upper.set_ylim(bottom=0.7)
            upper.yaxis.set_major_locator(ticker.LogLocator(numticks=4))
            upper.yaxis.set_minor_locator(ticker.NullLocator())
        else:
            upper.yaxis.set_major_locator(_whole_numbers(3))
        upper.yaxis.set_major_formatter(ticker.FuncFormatter(_plain))
        upper.set_ylabel("samples")
        upper.set_title(_sizes(counts.sum(1)))
        upper.tick_params(axis="x", length=0, labelbottom=False)

        image = lower.imshow(
            np.ma.masked_equal(shown.T, 0),
            aspect="auto",
            interpolation="nearest",
            cmap="viridis_r",
            norm=LogNorm(vmin=1, vmax=max(2, counts.max())),
        )
        lower.set_facecolor("#f4f4f4")
        lower.spines[:].set_visible(False)
        lower.set_ylabel("class")
        lower.set_xlabel(
            ("client" if n <= _NUMBERED else "client, by its largest class")
            + _how_many(drawn, order)
        )
        if n <= _NUMBERED:
            lower.set_xticks(range(n))
        else:
            lower.xaxis.set_major_locator(_whole_numbers())
        if c <= _WRITTEN:
            lower.set_yticks(range(c))
        else:
            lower.yaxis.set_major_locator(_whole_numbers())
        if n <= _WRITTEN and c <= _WRITTEN:
            _write_counts(lower, shown)
        bar = figure.colorbar(image, ax=lower, pad=0.01, aspect=25)
        bar.set_label("samples (log scale)")
        bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(_plain))
        bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        bar.outline.set_visible(False)
        return _save(figure, path)


def proportions(
    truth: np.ndarray,
    estimate: np.ndarray,
    path: Path,
    *,
    newcomers: tuple[np.ndarray, np.ndarray] | None = None,
) -> Path:
    """Draw estimated against true proportions, a panel for every component.

    Its title says how far the estimates of trained clients are off on average.

    Args:
      truth: `[n, k]` what clients hold, components in the order of `estimate`.
      estimate: `[n, k]`.
      path: Where to write the PNG.
      newcomers: The same two of clients that did not train.

    Returns:
      The path.

    Raises:
      ValueError: If the shapes differ.
    """
    groups = [("trained", "o", _COLOURS[0], truth, estimate)]
    if newcomers is not None:
        groups.append(("new", "D", _COLOURS[2], *newcomers))
    for what, _, _, *pair in groups:
        shapes = [np.shape(a) for a in pair]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2:
            raise ValueError(
                f"proportions of {what} clients must both be [n, k], got {shapes}"
            )
    k = np.shape(truth)[1]
    columns = min(k, 4)
    rows = -(-k // columns)
    with style.context(_STYLE):
        side = WIDTH / columns
        height = 0.9 + rows * (side + 0.1)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number >= k:
                axes.set_axis_off()
                continue
            axes.plot([0, 1], [0, 1], color="0.6", lw=0.8, zorder=1)
            for what, marker, colour, true, found in groups:
                axes.plot(
                    np.asarray(true)[:, number],
                    np.asarray(found)[:, number],
                    marker,
                    ms=4,
                    color=colour,
                    mec="white",
                    mew=0.5,
                    label=f"{what} clients",
                    zorder=2,
                )
            error = np.mean(np.abs(np.subtract(truth, estimate)[:, number]))
            axes.set_title(f"{number}: off by {error:.3f}")
            axes.set_aspect("equal")
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        figure.supxlabel("true proportion of the component", size=9)
        figure.supylabel("estimated proportion", size=9)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
        return _save(figure, path)


def samples(
    generated: np.ndarray,
    nearest: np.ndarray,
    path: Path,
    *,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw what components generate, each sample beside its nearest training image.

    A component is a row of pairs, generated on the left and training on the right,
    with their root mean squared difference below. Colours span the training images.

    Args:
      generated: `[k, g, h, w]` or `[k, g, h, w, 1 or 3]`; at most 8 of a component
        are drawn.
      nearest: The same shape.
      path: Where to write the PNG.
      titles: One line above each component; its number by default.

    Returns:
      The path.

    Raises:
      ValueError: If the shapes differ or are not of images, a value is not finite, or
        there are not as many titles as components.
    """
    generated, nearest = np.float64(generated), np.float64(nearest)
    grey = generated.ndim == 4 or (generated.ndim == 5 and generated.shape[-1] == 1)
    if not (grey or generated.shape[4:] == (3,)) or 0 in generated.shape:
        raise ValueError(
            "generated must be images [k, g, h, w] or [k, g, h, w, 1 or 3], got shape "
            f"{generated.shape}"
        )
    if nearest.shape != generated.shape:
        raise ValueError(
            f"nearest must have the shape of generated, {generated.shape}, got "
            f"{nearest.shape}"
        )
    for name, array in (("generated", generated), ("nearest", nearest)):
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    k, pairs = generated.shape[0], min(generated.shape[1], _PAIRS)
    titles = [f"component {i}" for i in range(k)] if titles is None else list(titles)
    if len(titles) != k:
        raise ValueError(f"titles must be one for each of {k}, got {len(titles)}")
    if generated.ndim == 5 and grey:
        generated, nearest = generated[..., 0], nearest[..., 0]
    low, high = nearest.min(), nearest.max()
    span = high - low if high > low else 1.0

    with style.context(_STYLE):
        # A gap within a pair is a tenth of an image, between pairs four.
        side = WIDTH / (_PAIRS * 2.5)
        height, width = generated.shape[2:4]
        tall = side * height / width
        figure = Figure(figsize=(WIDTH, k * (tall + 0.46) + 0.24))
        total = figure.get_figheight()
        for i, j in np.ndindex(k, pairs):
            left = (0.2 + 2.5 * j) * side
            bottom = total - (i + 1) * (tall + 0.46) + 0.18
            for step, image in enumerate((generated[i, j], nearest[i, j])):
                place = (left + 1.1 * step * side, bottom, side, tall)
                box = np.array(place) / ([WIDTH, total] * 2)
                axes = figure.add_axes(box)
                axes.imshow(
                    np.clip((image - low) / span, 0, 1),
                    cmap="gray",
                    vmin=0,
                    vmax=1,
                    interpolation="nearest",
                    aspect="auto",
                )
                axes.set_axis_off()
            gap = np.sqrt(np.mean((generated[i, j] - nearest[i, j]) ** 2))
            figure.text(
                (left + 1.05 * side) / WIDTH,
                (bottom - 0.03) / total,
                f"{gap:.2g}",
                size=7,
                color="#555555",
                ha="center",
                va="top",
            )
            if j == 0:
                figure.text(
                    left / WIDTH,
                    (bottom + tall + 0.05) / total,
                    titles[i],
                    color=_INK,
                    va="bottom",
                    parse_math=False,
                )
        start = 0.2 * side / WIDTH
        figure.text(start, 0.08 / total, _PAIR, color="#555555", va="bottom")
        return _save(figure, path)


def _axes_for(history: History) -> tuple[Figure, Axes]:
    """Make axes high enough for a label a method, one below the other."""
    height = max(3.8, 0.2 * len(history) + 0.8)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure in one go, to wherever `epath` can write."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    epath.Path(path).write_bytes(buffer.getvalue())
    return path


def _series(
    rounds: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0
) -> np.ndarray:
    """Read one number a round, NaN where it is missing."""
    values = [record.get(key) for record in rounds]
    return factor * np.array([np.nan if v is None else v for v in values], np.float64)


def _per_client(result: Mapping[str, Any]) -> np.ndarray:
    """Read the test accuracies in percent, `[n]`, NaN for clients without rows."""
    values = result["personal_accuracy"].get("per_client") or ()
    return 100 * np.array([np.nan if v is None else v for v in values], np.float64)


def _finite(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Join what is finite."""
    joined = np.concatenate([np.zeros(0), *arrays])
    return joined[np.isfinite(joined)]


def _last(values: np.ndarray) -> float:
    """Return the last finite value, or NaN."""
    values = values[np.isfinite(values)]
    return values[-1] if values.size else math.nan


def _plain(value: float, position: int | None = None) -> str:
    """Format a tick without powers of ten."""
    del position
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _whole_numbers(most: int = 10) -> ticker.Locator:
    """Put ticks at round whole numbers."""
    return ticker.MaxNLocator(most, integer=True, steps=(1, 2, 5, 10))


def _bars(axes: Axes, heights: np.ndarray, colour: str) -> None:
    """Draw a bar a client, without gaps where clients are many."""
    if heights.size <= _NUMBERED:
        axes.bar(np.arange(heights.size), heights, width=0.75, color=colour)
    else:
        edges = np.arange(heights.size + 1) - 0.5
        axes.stairs(heights, edges, fill=True, color=colour)


def _say(axes: Axes, words: str) -> None:
    """Write words where there is nothing to draw."""
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look) -> None:
    """Draw one method; markers thin out where rounds are many."""
    axes.plot(
        x,
        y,
        color=look.colour,
        ls=look.dash,
        lw=look.width,
        marker=look.marker,
        ms=look.size,
        mec="white",
        mew=0.7,
        markevery=1 if len(x) <= _MARKED else 0.07,
        zorder=look.order,
    )


def _finish_accuracy(axes: Axes, ends: Sequence[tuple[str, Look, np.ndarray]]) -> None:
    """Scale the accuracy axis and label each line beside its end.

    Args:
      axes: Where the lines are drawn.
      ends: Label, look and accuracies of each line.
    """
    axes.set_ylabel("mean personal accuracy (%)")
    axes.grid(axis="y")
    values = _finite(accuracy for _, _, accuracy in ends)
    if not values.size:
        axes.set_ylim(0, 100)
        _say(axes, "No finite accuracy to draw.")
        return
    margin = max(1.0, 0.06 * np.ptp(values))
    low, high = max(0.0, values.min() - margin), min(100.0, values.max() + margin)
    axes.set_ylim(low, high)
    # A line at the very edge of the scale is drawn whole.
    for line in axes.lines:
        line.set_clip_on(False)

    ends = sorted(ends, key=lambda end: np.nan_to_num(_last(end[2]), nan=-1.0))
    heights = [
        (np.nan_to_num(_last(accuracy), nan=low) - low) / (high - low)
        for _, _, accuracy in ends
    ]
    gap = 14 / (72 * 0.82 * axes.figure.get_figheight())
    for (name, look, accuracy), at in zip(ends, _spread(heights, gap), strict=True):
        axes.plot(
            [1.02, 1.055, 1.09],
            [at] * 3,
            color=look.colour,
            ls=look.dash,
            lw=look.width,
            marker=look.marker,
            ms=look.size,
            mec="white",
            mew=0.7,
            markevery=[1],
            transform=axes.transAxes,
            clip_on=False,
        )
        value = _last(accuracy)
        shown = f"{value:.1f} %" if math.isfinite(value) else "no accuracy"
        axes.text(
            1.105,
            at,
            f"{name}  {shown}",
            va="center",
            color=_INK,
            weight="bold" if look.width > 2 else "normal",
            transform=axes.transAxes,
            parse_math=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights within [0, 1] apart until `gap` lies between any two."""
    out = []
    for height in heights:
        out.append(max(height, out[-1] + gap) if out else height)
    top = 1.0
    for i in reversed(range(len(out))):
        out[i] = min(out[i], top)
        top = out[i] - gap
    return out


def _client_accuracy(
    axes: Axes,
    results: Mapping[str, Any],
    name: str,
    accuracy: np.ndarray,
    local: np.ndarray | None,
    order: np.ndarray,
) -> None:
    """Draw the accuracies of the clients in `order`, joined where there are two."""
    look = looks(results)
    x = np.arange(order.size)
    few = order.size <= _NUMBERED
    if local is not None:
        if few:
            axes.vlines(x, local[order], accuracy[order], color="#bbbbbb", lw=1.5)
        _dots(axes, x, local[order], tables.LOCAL_ONLY, look[tables.LOCAL_ONLY], few)
    _dots(axes, x, accuracy[order], name, look[name], few)
    axes.set_ylim(-3, 103)
    axes.grid(axis="y")
    handles, _ = axes.get_legend_handles_labels()
    legend = axes.legend(
        handles=handles[::-1],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        borderaxespad=0.2,
    )
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    for handle in legend.legend_handles:
        handle.set(markersize=6, alpha=1)


def _dots(
    axes: Axes, x: np.ndarray, y: np.ndarray, name: str, look: Look, few: bool
) -> None:
    """Draw one method's clients as markers."""
    axes.plot(
        x,
        y,
        ls="none",
        color=look.colour,
        marker=look.marker,
        ms=look.size if few else 2.5,
        mec="white" if few else "none",
        mew=0.7,
        alpha=1 if few else 0.7,
        label=name,
        clip_on=False,
        zorder=look.order,
    )


def _gain_bars(axes: Axes, gain: np.ndarray) -> None:
    """Draw the gains as bars, in points."""
    better = gain > 0
    _bars(axes, np.where(better, gain, 0), _GAIN)
    _bars(axes, np.where(better, 0, gain), _LOSS)
    axes.axhline(0, color="#555555", lw=0.8)
    axes.grid(axis="y")
    axes.set_ylabel("gain (points)")


def _balance(gain: np.ndarray) -> str:
    """Say how many clients gain and how many lose."""
    better, worse, equal = (np.sum(test) for test in (gain > 0, gain < 0, gain == 0))
    return (
        f"{better:,} of {gain.size:,} clients better than on their own, "
        f"{worse:,} worse, {equal:,} equal; median {tables.points(np.median(gain))} "
        "points"
    )


def _thinned(order: np.ndarray) -> np.ndarray:
    """Keep the clients that are drawn, evenly spaced and both ends among them."""
    if order.size <= _DRAWN:
        return order
    return order[np.linspace(0, order.size - 1, _DRAWN).round().astype(int)]


def _how_many(drawn: np.ndarray, order: np.ndarray) -> str:
    """Say how many clients are drawn where that is not all of them."""
    if drawn.size == order.size:
        return ""
    return f"; {drawn.size:,} of {order.size:,} drawn, evenly spaced"


def _sizes(total: np.ndarray) -> str:
    """Say how many clients hold how many samples, `total [n]`."""
    n, least, most = total.size, total.min(), total.max()
    spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f"{n:,} {'client' if n == 1 else 'clients'}, "
        f"{total.sum():,} training samples, {spread} a client"
    )


def _write_counts(axes: Axes, counts: np.ndarray) -> None:
    """Write the counts `[n, c]` into their cells."""
    shown = {
        (i, j): str(v) if v < 10_000 else f"{v / 1000:.0f}k"
        for (i, j), v in np.ndenumerate(counts)
        if v
    }
    if not shown:
        return
    # A digit is about 0.64 of the font size wide; the cells share 6 inches.
    cell = 6.0 * 72 / counts.shape[0]
    size = min(8.5, cell / (0.64 * max(map(len, shown.values())) + 0.3))
    dark = np.sqrt(max(2, counts.max()))  # the middle of the logarithmic scale
    for (i, j), words in shown.items():
        colour = "white" if counts[i, j] > dark else _INK
        axes.text(i, j, words, ha="center", va="center", size=size, color=colour)
