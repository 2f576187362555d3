"""Tests of the report: that it stands alone and says what the run found."""

from __future__ import annotations

import base64
import html.parser
import math

import numpy as np
import pytest

from fedgen.runs import plots, report, tables

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collect the tags, the words and the tables of a page, and check nesting."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.tables, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def result(accuracies, **changes):
    known = [a for a in accuracies if tables.is_number(a)]
    return {
        "personal_accuracy": {
            "mean": float(np.mean(known)) if known else None,
            "std": float(np.std(known)) if known else None,
            "worst_decile": min(known, default=None),
            "per_client": accuracies,
        },
        "best_round": 9,
        "best": {"personal_accuracy": {"mean": 0.8765}, "global_accuracy": None},
        "global_accuracy": 0.4321,
        "bytes_up": 5 * 2**20,
        "bytes_down": 7 * 2**20,
        "local_steps": 1234,
        "executed_steps": 5678,
        "seconds": {"compile": 3.21, "steady": 65.4, "evaluation": 1.2},
        "peak_memory_bytes": 321 * 2**20,
    } | changes


def summary(mine, **baselines):
    return {
        "algorithm": "pfedgm",
        "rounds": 10,
        **result(mine),
        "baselines": {name: result(values) for name, values in baselines.items()},
    }


def history(found):
    return {
        name: [
            {"round": r, "bytes": r, "personal_accuracy": r / 17 if r > 5 else None}
            for r in (5, 10)
        ]
        for name in tables.methods(found)
    }


CONFIG = {
    "algorithm": "pfedgm",
    "dataset": "<script>alert('x')</script>",
    "alpha": 0.1,
    "baselines": ["local_only", "fedavg"],
    "data_dir": None,
    "hyperparameters": {'gain"': "</td>&"},
    "command": "python -m experiments.run '--dataset=<script>'",
    "environment": {"jax": "0.10.2", "python": "3.11.7", "devices": "2 x <cpu>"},
}


@pytest.fixture
def found():
    return summary(
        [0.9, 0.8, 0.7, None], local_only=[0.8, 0.8, 0.75, 0.1], fedavg=[0.5] * 4
    )


@pytest.fixture
def figures(found, tmp_path):
    return {
        "Accuracy by round": plots.accuracy_by_round(
            history(found), tmp_path / "accuracy_by_round.png"
        ),
        'Clients "<b>"': plots.client_gains(found, tmp_path / "other.png"),
    }


@pytest.fixture
def page(found, figures, tmp_path):
    path = tmp_path / "report.html"
    assert report.write_report(path, CONFIG, found, history(found), figures) == path
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_asks_for_nothing_outside_itself(page, tmp_path):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base"), tag
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_every_figure_is_embedded_whole_with_words_for_it(page, figures):
    images = page.named("img")
    assert len(images) == len(figures)
    for attributes, (title, path) in zip(images, figures.items(), strict=True):
        kind, content = attributes["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True) == path.read_bytes()
        assert attributes["alt"].startswith(title)
        # 9 pt at 150 dots an inch are 9 pt at the 96 of a page.
        assert int(attributes["width"]) == round(plots.WIDTH * 96)
        assert int(attributes["height"]) > 100
        assert title in page.text
    assert "own model on its own test rows" in images[0]["alt"]


def test_the_table_holds_every_method_and_every_number(page, found):
    upper, lower, *body = page.tables[0]
    rows = tables.rows(found)
    columns = tables.columns(rows)
    expected = [[c.show(row[c.key]) for c in columns] for row in rows]
    assert body == expected
    assert [line[0] for line in body] == ["pfedgm", "local_only", "fedavg"]
    assert body[0][1:5] == ["80.0", "8.2", "70.0", "+18.8"]
    assert body[0][5:8] == ["43.2", "9", "87.6"]
    assert body[0][8:12] == ["5.0", "7.0", "1,234", "5,678"]
    assert body[0][12:] == ["3.2", "65.4", "1.2", "321"]
    spans = [
        int(attributes.get("colspan", 1))
        for attributes in page.named("th")[: len(upper)]
    ]
    assert sum(spans) == len(columns)
    assert sum(span for span in spans if span > 1) == len(lower)


def test_every_heading_of_a_table_says_its_scope(page):
    scopes = {attributes.get("scope") for attributes in page.named("th")}
    assert scopes == {"col", "colgroup", "row"}
    assert page.named("html") == [{"lang": "en"}]


def test_whatever_the_user_wrote_is_shown_and_not_obeyed(page):
    config = dict(page.tables[2][1:])
    assert config == {
        "algorithm": "pfedgm",
        "dataset": "<script>alert('x')</script>",
        "alpha": "0.1",
        "baselines": "local_only,fedavg",
        "data_dir": "None",
        'set gain"': "</td>&",
    }
    assert dict(page.tables[3][1:]) == CONFIG["environment"]
    assert CONFIG["command"] in page.text
    assert not page.named("script")
    assert not page.named("b")


def test_the_numbers_behind_the_picture_are_there(page):
    assert page.tables[1] == [
        ["Round", "pfedgm", "local_only", "fedavg"],
        ["5", "–", "–", "–"],
        ["10", "58.8", "58.8", "58.8"],
    ]


def test_the_page_follows_dark_mode_and_prints(tmp_path, page):
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


@pytest.mark.parametrize(
    ("mine", "baselines", "words"),
    [
        (
            [0.9],
            {"local_only": [0.8], "fedavg": [0.85]},
            "pfedgm leads: 90.0 % mean personal accuracy after 10 rounds, 5.0 points "
            "above fedavg (85.0 %), the best baseline.",
        ),
        (
            [0.7],
            {"local_only": [0.8], "fedavg": [0.5]},
            "pfedgm does not lead: 70.0 % mean personal accuracy after 10 rounds, 10.0 "
            "points below local_only (80.0 %), the best baseline.",
        ),
        (
            [0.8002],
            {"fedavg": [0.8]},
            "pfedgm ties with fedavg (80.0 %), the only baseline: 80.0 % mean personal "
            "accuracy after 10 rounds.",
        ),
        (
            [0.81],
            {"fedavg": [0.8], "broken": [None]},
            "pfedgm leads: 81.0 % mean personal accuracy after 10 rounds, 1.0 point "
            "above fedavg (80.0 %), the only baseline.",
        ),
        (
            [0.8],
            {},
            "pfedgm reaches 80.0 % mean personal accuracy after 10 rounds; there is no "
            "baseline to compare it with.",
        ),
        ([None], {"fedavg": [0.8]}, "pfedgm has no finite personal accuracy."),
    ],
    ids=["leads", "loses", "ties", "one point", "alone", "no score"],
)
def test_the_headline_says_who_leads_by_how_much(mine, baselines, words):
    assert report.headline(summary(mine, **baselines)) == words


def test_a_broken_baseline_cannot_win_and_is_named(tmp_path):
    found = summary([0.5], broken=[0.5], fedavg=[0.4])
    found["baselines"]["broken"]["personal_accuracy"]["mean"] = math.nan
    assert report.headline(found).startswith("pfedgm leads")
    path = report.write_report(tmp_path / "r.html", {}, found, {}, {})
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Without a finite personal accuracy: broken." in text


def test_the_balance_over_clients_is_paired_with_the_best_baseline(page):
    # Gains on local_only over the three clients that both scored: 10, 0 and -5
    # points, of mean 5/3 and standard error sqrt(175 / 3 / 3) = 4.41.
    assert (
        "Client by client, pfedgm is better than local_only for 1, worse for 1 and "
        "equal for 1; the mean difference has a standard error of 4.4 points"
    ) in page.text


@pytest.mark.parametrize("config", [{}, {"hyperparameters": None, "environment": {}}])
def test_the_least_of_a_run_still_makes_a_page(config, tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, config, {"algorithm": "x"}, {}, {})
    page = Page(path.read_text(encoding="utf-8"))
    assert "x has no finite personal accuracy." in page.text
    assert "Repeat this run" not in page.text
    assert "Environment" not in page.text


def test_what_is_no_png_is_refused_before_anything_is_written(found, tmp_path):
    wrong = tmp_path / "figure.png"
    wrong.write_bytes(b"GIF89a")
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="figure 'Clients' must be a PNG, got"):
        report.write_report(path, CONFIG, found, {}, {"Clients": wrong})
    assert not path.exists()


def test_a_thousand_clients_make_a_page(tmp_path):
    values = list(np.linspace(0, 1, 1000))
    found = summary(values, local_only=values[::-1])
    found["evaluated_clients"] = list(range(0, 2000, 2))
    path = report.write_report(tmp_path / "r.html", CONFIG, found, history(found), {})
    text = Page(path.read_text(encoding="utf-8")).text
    assert "pfedgm ties with local_only" in text
    assert "Accuracies are over 1,000 clients, drawn once." in text
    assert "better than local_only for 500, worse for 500 and equal for 0" in text
