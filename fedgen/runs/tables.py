"""The table of a run: one row a method, the same numbers on every surface.

`rows` reads `summary.json` once; the terminal, the report and the README all
format its result through `COLUMNS`, so no two of them can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box, table, text

Row = dict[str, Any]

LOCAL_ONLY = "local_only"
MISSING = "–"
_MIB = 2**20


def percent(value: float | None) -> str:
    """Format a number of percent with one decimal."""
    return MISSING if value is None else f"{value:.1f}"


def points(value: float | None) -> str:
    """Format a difference of percentages with its sign."""
    if value is None:
        return MISSING
    # Adding 0.0 turns a rounded -0.0 into 0.0, which takes no minus sign.
    rounded = round(value, 1) + 0.0
    return f"{rounded:+.1f}" if rounded else f"{rounded:.1f}"


def quantity(value: float | None) -> str:
    """Format a size or a duration with about three digits."""
    if value is None:
        return MISSING
    return f"{value:,.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def count(value: int | None) -> str:
    """Format a whole number with thousands separators."""
    return MISSING if value is None else f"{value:,}"


class Column(NamedTuple):
    """One column of the table.

    Attributes:
      key: Where a row holds the value.
      group: Heading that several columns share, with the unit.
      title: The column's own heading, empty if the group says it all.
      show: Formats a value.
    """

    key: str
    group: str
    title: str
    show: Callable[[Any], str]

    @property
    def heading(self) -> str:
        """The group and the title in one line."""
        return f"{self.group}: {self.title}" if self.title else self.group


COLUMNS = (
    Column("method", "Method", "", str),
    Column("personal_mean", "Personal accuracy (%)", "mean", percent),
    Column("personal_std", "Personal accuracy (%)", "std", percent),
    Column("worst_decile", "Personal accuracy (%)", "worst decile", percent),
    Column("received", "Personal accuracy (%)", "as received", percent),
    Column("gain", "Personal accuracy (%)", f"vs {LOCAL_ONLY} (points)", points),
    Column("global_accuracy", "Global accuracy (%)", "", percent),
    Column("new_clients", "New clients (%)", "", percent),
    Column("best_round", "Best on validation", "round", count),
    Column("best_personal", "Best on validation", "accuracy (%)", percent),
    Column("mib_up", "Traffic (MiB)", "up", quantity),
    Column("mib_down", "Traffic (MiB)", "down", quantity),
    Column("local_steps", "Local steps", "real", count),
    Column("executed_steps", "Local steps", "executed", count),
    Column("compile_seconds", "Time (s)", "compile", quantity),
    Column("steady_seconds", "Time (s)", "steady", quantity),
    Column("evaluation_seconds", "Time (s)", "evaluation", quantity),
    Column("peak_mib", "Peak memory (MiB)", "", quantity),
)

# New clients, and models before `Algorithm.personalise`, are not for every run.
OPTIONAL = ("new_clients", "received")


def methods(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the results by method, the algorithm of the run first.

    Raises:
      ValueError: If the summary does not name its algorithm.
    """
    if "algorithm" not in summary:
        raise ValueError(
            f"a summary must name its 'algorithm', got the keys {sorted(summary)}"
        )
    name = summary["algorithm"]
    baselines = summary.get("baselines") or {}
    return {name: summary} | {k: v for k, v in baselines.items() if k != name}


def columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Return `COLUMNS`, without those of `OPTIONAL` that no row has a value for."""
    empty = {key for key in OPTIONAL if all(row[key] is None for row in rows)}
    return tuple(column for column in COLUMNS if column.key not in empty)


def rows(summary: Mapping[str, Any]) -> list[Row]:
    """Read the table off a summary: one row a method, the run's algorithm first.

    Accuracies are in percent, traffic and memory in MiB; what the summary does not
    hold is None.
    """
    results = methods(summary)
    local = _get(results.get(LOCAL_ONLY, {}), "personal_accuracy", "mean")
    return [_row(name, result, local) for name, result in results.items()]


def to_markdown(rows: Sequence[Row]) -> str:
    """Write rows as a pipe table, with numbers aligned to the right."""
    shown = columns(rows)
    lines = [
        [column.heading for column in shown],
        [":--", *["--:"] * (len(shown) - 1)],
        *([column.show(row[column.key]) for column in shown] for row in rows),
    ]
    return "".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n"
        for line in lines
    )


def comparison(summary: Mapping[str, Any]) -> table.Table:
    """Build the table that a run ends with; it fits a terminal of 80 columns.

    What belongs together stands on two lines of one cell. The algorithm of the run
    is bold.
    """
    out = table.Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption="accuracy in % of test rows; vs local: gain on local_only in points;\n"
        "best: at the round that validation chose; MiB: all clients",
    )
    out.add_column("method", overflow="fold", min_width=10)
    lines = rows(summary)
    present = {column.key for column in columns(lines)}
    whole = ("global", "{global_accuracy}")
    if "received" in present:
        whole = ("as rec.\nglobal", "{received}\n{global_accuracy}")
        out.caption += "\nas rec.: before personalising"
    fields = {
        "personal\n± std": "{personal_mean}\n± {personal_std}",
        "worst\ndecile": "{worst_decile}",
        "vs\nlocal": "{gain}",
        whole[0]: whole[1],
        "new": "{new_clients}",
        "best\n@ round": "{best_personal}\n@ {best_round}",
        "MiB\nup\ndown": "{mib_up}\n{mib_down}",
        "steps\nreal\nexecuted": "{local_steps}\n{executed_steps}",
        "seconds\ncompile\nsteady\nevaluate": "{compile_seconds}\n{steady_seconds}"
        "\n{evaluation_seconds}",
        "peak\nMiB": "{peak_mib}",
    }
    if "new_clients" not in present:
        del fields["new"]
    for heading in fields:
        out.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(lines):
        shown = {column.key: column.show(row[column.key]) for column in COLUMNS}
        for key in ("local_steps", "executed_steps"):
            shown[key] = _short(row[key])
        cells = [shown["method"], *(f.format_map(shown) for f in fields.values())]
        # Text, since a plain string would be read as markup.
        out.add_row(*map(text.Text, cells), style="bold" if i == 0 else "")
    return out


def is_number(value: float | None) -> bool:
    """Tell whether a value of a summary is there and finite."""
    return value is not None and math.isfinite(value)


def _row(name: str, result: Mapping[str, Any], local: float | None) -> Row:
    """Read one method's row; `local` is the accuracy of local-only training."""
    mean = _get(result, "personal_accuracy", "mean")
    return {
        "method": name,
        "personal_mean": _scaled(mean, 100),
        "personal_std": _scaled(_get(result, "personal_accuracy", "std"), 100),
        "worst_decile": _scaled(_get(result, "personal_accuracy", "worst_decile"), 100),
        "received": _scaled(_get(result, "received_accuracy", "mean"), 100),
        "gain": None if mean is None or local is None else 100 * (mean - local),
        "global_accuracy": _scaled(_get(result, "global_accuracy"), 100),
        "new_clients": _scaled(
            _get(result, "new_clients", "personal_accuracy", "mean"), 100
        ),
        "best_round": _get(result, "best_round"),
        "best_personal": _scaled(
            _get(result, "best", "personal_accuracy", "mean"), 100
        ),
        "mib_up": _scaled(_get(result, "bytes_up"), 1 / _MIB),
        "mib_down": _scaled(_get(result, "bytes_down"), 1 / _MIB),
        "local_steps": _get(result, "local_steps"),
        "executed_steps": _get(result, "executed_steps"),
        "compile_seconds": _get(result, "seconds", "compile"),
        "steady_seconds": _get(result, "seconds", "steady"),
        "evaluation_seconds": _get(result, "seconds", "evaluation"),
        "peak_mib": _scaled(_get(result, "peak_memory_bytes"), 1 / _MIB),
    }


def _short(value: int | None) -> str:
    """Format a whole number in at most eight characters."""
    if value is None or value < 1_000_000:
        return count(value)
    return f"{value / 1e6:,.1f}M"


def _get(tree: Any, *path: str) -> Any:
    """Follow keys into nested dictionaries; None where one is missing."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _scaled(value: float | None, factor: float) -> float | None:
    """Change the unit of a value that may be missing."""
    return None if value is None else value * factor
