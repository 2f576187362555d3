"""One HTML file that says what a run found, and how to repeat it.

The file holds its style and its pictures, asks the network for nothing, needs no
script, follows the reader's light or dark setting, and prints.
"""

from __future__ import annotations

import base64
import html
import math
import os
import statistics
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from fedgen.runs import plots, tables

Path = str | os.PathLike[str]

_PNG = b"\x89PNG\r\n\x1a\n"
_CSS_DPI = 96
# What has a place of its own in the report.
_NOT_FLAGS = ("command", "environment", "hyperparameters")
_CAPTIONS = {
    "accuracy_by_round": "Mean over the clients of the accuracy of each client's own "
    "model on its own test rows.",
    "accuracy_by_bytes": "The same accuracy against all bytes sent so far, to and from "
    "the server.",
    "accuracy_by_client": "Each client's test accuracy, with what it reaches when "
    "it trains alone, and the difference.",
    "partition": "Training samples of every client and class; an empty cell is a class "
    "that the client has never seen.",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c63; --page: #fff;
  --line: #d9d9de; --mark: #eaf3fa; --code: #f5f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a9a9b2; --page: #17181b; --line: #3a3b41;
    --mark: #1d3243; --code: #222328; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.about { color: var(--soft); margin: .25rem 0 1.5rem; }
.headline { font-size: 1.2rem; font-weight: 600; line-height: 1.4; max-width: 46rem;
  margin: 0 0 .5rem; }
.note, figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid var(--line);
  text-align: right; font-weight: normal; white-space: nowrap; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; }
thead th[colspan] { text-align: center; border-left: 1px solid var(--line); }
tbody th { text-align: left; }
.main th, .main td { background: var(--mark); font-weight: 600; }
.config th, .config td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; }
figure h3 { font-size: 1rem; margin: 0 0 .5rem; }
figure img { max-width: 100%; height: auto; background: #fff; padding: .5rem;
  box-sizing: border-box; border-radius: .4rem; }
pre { background: var(--code); padding: .75rem 1rem; border-radius: .4rem;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { --ink: #000; --soft: #444; --page: #fff; --line: #bbb; --mark: #eee;
    --code: #f5f5f5; color-scheme: light; }
  body { max-width: none; padding: 0; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: .7rem; }
}
"""


def write_report(
    path: Path,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    history: plots.History,
    figures: Mapping[str, Path],
) -> Path:
    """Write the report of a run.

    Args:
      path: Where to write the HTML.
      config: The flags of the run, with `hyperparameters` as a dictionary. An entry
        `environment` (versions and devices by name) gets a table of its own, and
        an entry `command` is the command line that repeats the run.
      summary: What a run writes to `summary.json`.
      history: Evaluated rounds by method, the algorithm of the run first.
      figures: PNG files by title, in the order in which they appear.

    Returns:
      The path.

    Raises:
      ValueError: If a figure is not a PNG.
    """
    name = str(summary.get("algorithm"))
    data = ", ".join(
        f"{key} {config[key]}"
        for key in ("dataset", "partition", "alpha", "num_clients", "rounds", "seed")
        if config.get(key) is not None
    )
    sections = [
        _section("Results", _results(summary)),
        _section(
            "Pictures",
            _join(_figure(*item) for item in figures.items()) + _rounds(history),
        ),
    ]
    if config.get("command"):
        again = f"<pre>{_escape(config['command'])}</pre>"
        sections.append(_section("Repeat this run", again))
    sections.append(_section("Configuration", _pairs(_settings(config))))
    if config.get("environment"):
        sections.append(_section("Environment", _pairs(config["environment"])))
    title = f"fedgen: {name}"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_escape(title)}</h1>
<p class="about">{_escape(data)}</p>
</header>
<main>
{_join(_paragraph(*item) for item in _story(summary))}
{_join(sections)}
</main>
</body>
</html>
"""
    epath.Path(path).write_text(page, encoding="utf-8")
    return path


def headline(summary: Mapping[str, Any]) -> str:
    """Say in one sentence how the algorithm compares with the best baseline.

    Compared is the mean personal accuracy on test rows after the last round. What
    rounds to 0.0 points is called a tie.
    """
    first, *others = tables.rows(summary)
    name, mean = first["method"], first["personal_mean"]
    if not tables.is_number(mean):
        return f"{name} has no finite personal accuracy."
    scored = [row for row in others if tables.is_number(row["personal_mean"])]
    reached = f"{tables.percent(mean)} % mean personal accuracy"
    rounds = summary.get("rounds")
    if rounds is not None:
        reached += f" after {rounds:,} round{'' if rounds == 1 else 's'}"
    if not scored:
        return f"{name} reaches {reached}; there is no baseline to compare it with."
    best = max(scored, key=lambda row: row["personal_mean"])
    lead = mean - best["personal_mean"]
    gap, plural = tables.percent(abs(lead)), "" if round(abs(lead), 1) == 1 else "s"
    rival = f"{best['method']} ({tables.percent(best['personal_mean'])} %)"
    among = "the best baseline" if len(scored) > 1 else "the only baseline"
    if round(lead, 1) == 0:
        return f"{name} ties with {rival}, {among}: {reached}."
    if lead > 0:
        return f"{name} leads: {reached}, {gap} point{plural} above {rival}, {among}."
    return (
        f"{name} does not lead: {reached}, {gap} point{plural} below {rival}, {among}."
    )


def _story(summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the paragraphs below the title, as class and words."""
    yield "headline", headline(summary)
    name = summary["algorithm"]
    rival = _best_baseline(summary)
    pairs = _paired(summary, rival) if rival else []
    if len(pairs) > 1:
        gains = [100 * (a - b) for a, b in pairs]
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        yield (
            "note",
            f"Client by client, {name} is better than {rival} for {better:,}, worse "
            f"for {worse:,} and equal for {len(gains) - better - worse:,}; the mean "
            f"difference has a standard error of {tables.percent(error)} points over "
            "the clients. This is one seed: another one draws other clients.",
        )
    if some := summary.get("evaluated_clients"):
        yield "note", f"Accuracies are over {len(some):,} clients, drawn once."
    failed = [
        row["method"]
        for row in tables.rows(summary)[1:]
        if not tables.is_number(row["personal_mean"])
    ]
    if failed:
        yield "note", f"Without a finite personal accuracy: {', '.join(failed)}."


def _best_baseline(summary: Mapping[str, Any]) -> str | None:
    """Name the baseline of the highest mean personal accuracy, if any has one."""
    scored = {
        row["method"]: row["personal_mean"]
        for row in tables.rows(summary)[1:]
        if tables.is_number(row["personal_mean"])
    }
    return max(scored, key=scored.get) if scored else None


def _paired(summary: Mapping[str, Any], rival: str) -> list[tuple[float, float]]:
    """Pair the accuracies of the clients that both methods scored."""
    results = tables.methods(summary)
    mine, other = (
        results[name]["personal_accuracy"].get("per_client") or ()
        for name in (summary["algorithm"], rival)
    )
    return [
        pair
        for pair in zip(mine, other, strict=True)
        if all(map(tables.is_number, pair))
    ]


def _results(summary: Mapping[str, Any]) -> str:
    """Write the table of the methods, with a heading over columns that belong."""
    rows = tables.rows(summary)
    shown = tables.columns(rows)
    groups: dict[str, list[tables.Column]] = {}
    for column in shown:
        groups.setdefault(column.group, []).append(column)
    upper = _join(
        f'<th scope="col" rowspan="2">{_escape(group)}</th>'
        if len(columns) == 1
        else f'<th scope="colgroup" colspan="{len(columns)}">{_escape(group)}</th>'
        for group, columns in groups.items()
    )
    lower = _join(
        f'<th scope="col">{_escape(column.title)}</th>'
        for columns in groups.values()
        for column in columns
        if len(columns) > 1
    )
    body = []
    for i, row in enumerate(rows):
        name, *cells = (_escape(column.show(row[column.key])) for column in shown)
        body.append(
            f'<tr class="{"other" if i else "main"}"><th scope="row">{name}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return f"""<div class="scroll"><table class="results">
<thead>
<tr>{upper}</tr>
<tr>{lower}</tr>
</thead>
<tbody>
{_join(body)}
</tbody>
</table></div>
<p class="note">Accuracies are on test rows after the last round, but for those at
the round that the validation rows chose. The worst decile is the mean over the
tenth of the clients with the lowest accuracy. Executed steps count what the machine
computed beside the real ones; peak memory is that of the process so far.</p>"""


def _figure(title: str, path: Path) -> str:
    """Embed a PNG at the size at which its letters match those of the page."""
    path = epath.Path(path)
    content = path.read_bytes()
    if content[:8] != _PNG:
        raise ValueError(f"figure {title!r} must be a PNG, got {path}")
    # The header chunk stands first and begins with width and height.
    size = [
        round(pixels * _CSS_DPI / plots.DPI)
        for pixels in struct.unpack(">II", content[16:24])
    ]
    caption = _CAPTIONS.get(path.stem, "")
    alt = _escape(f"{title}. {caption}".strip())
    return f"""<figure>
<h3>{_escape(title)}</h3>
<img width="{size[0]}" height="{size[1]}" alt="{alt}"
src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">
<figcaption>{_escape(caption)}</figcaption>
</figure>"""


def _rounds(history: plots.History) -> str:
    """Write the personal accuracies by round, the numbers behind the picture."""
    by_round: dict[int, dict[str, float | None]] = {}
    for name, records in history.items():
        for record in records:
            cell = by_round.setdefault(record["round"], {})
            cell[name] = record.get("personal_accuracy")
    heads = _join(f'<th scope="col">{_escape(name)}</th>' for name in history)
    body = _join(
        f'<tr><th scope="row">{number:,}</th>'
        + "".join(f"<td>{_accuracy(cells.get(name))}</td>" for name in history)
        + "</tr>"
        for number, cells in sorted(by_round.items())
    )
    return f"""<details>
<summary>Mean personal accuracy (%) of every evaluated round</summary>
<div class="scroll"><table class="rounds">
<thead><tr><th scope="col">Round</th>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
</details>"""


def _accuracy(value: float | None) -> str:
    """Format a share as percent."""
    return tables.percent(None if value is None else 100 * value)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the flags and the hyper-parameters."""
    flags = {k: v for k, v in config.items() if k not in _NOT_FLAGS}
    hyperparameters = config.get("hyperparameters") or {}
    return flags | {f"set {name}": v for name, v in hyperparameters.items()}


def _pairs(values: Mapping[str, Any]) -> str:
    """Write names and values as a table."""
    cells = ((_escape(name), _escape(_plain(value))) for name, value in values.items())
    body = _join(
        f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in cells
    )
    return f"""<div class="scroll"><table class="config">
<thead><tr><th scope="col">Name</th><th scope="col">Value</th></tr></thead>
<tbody>
{body}
</tbody>
</table></div>"""


def _plain(value: Any) -> str:
    """Write a value, a list as the command line takes it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value)
    return ",".join(map(str, value))


def _section(title: str, content: str) -> str:
    """Put content under a heading."""
    return f"<section>\n<h2>{_escape(title)}</h2>\n{content}\n</section>"


def _paragraph(kind: str, words: str) -> str:
    """Write a paragraph of a class."""
    return f'<p class="{kind}">{_escape(words)}</p>'


def _escape(value: Any) -> str:
    """Make any value safe in HTML, within quotes too."""
    return html.escape(str(value), quote=True)


def _join(parts: Iterable[str]) -> str:
    """Join the parts of a page, one below the other."""
    return "\n".join(part for part in parts if part)
