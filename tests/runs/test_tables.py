"""Tests of the table of a run."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from fedgen.runs import tables


def result(mean, **changes):
    """Return one method's part of a summary, with numbers of a usual size."""
    return {
        "personal_accuracy": {
            "mean": mean,
            "std": 0.123,
            "worst_decile": 0.4567,
            "per_client": [mean, mean],
        },
        "best_round": 15,
        "best": {"personal_accuracy": {"mean": 0.9011}, "global_accuracy": 0.3},
        "global_accuracy": 0.3141,
        "bytes_up": 3 * 2**20,
        "bytes_down": 512 * 2**20,
        "local_steps": 123_456,
        "executed_steps": 234_567,
        "seconds": {"compile": 12.34, "steady": 345.6, "evaluation": 2.3},
        "peak_memory_bytes": 2**31,
    } | changes


def summary(**baselines):
    return {
        "algorithm": "pfedgm",
        "rounds": 20,
        **result(0.861),
        "baselines": baselines,
    }


def rendered(table, width=80):
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return buffer.getvalue()


def test_rows_hold_every_number_of_the_summary_in_its_unit():
    main, local = tables.rows(summary(local_only=result(0.811, global_accuracy=None)))
    assert main == {
        "method": "pfedgm",
        "personal_mean": pytest.approx(86.1),
        "personal_std": pytest.approx(12.3),
        "worst_decile": pytest.approx(45.67),
        "received": None,
        "gain": pytest.approx(5.0),
        "global_accuracy": pytest.approx(31.41),
        "new_clients": None,
        "best_round": 15,
        "best_personal": pytest.approx(90.11),
        "mib_up": 3.0,
        "mib_down": 512.0,
        "local_steps": 123_456,
        "executed_steps": 234_567,
        "compile_seconds": 12.34,
        "steady_seconds": 345.6,
        "evaluation_seconds": 2.3,
        "peak_mib": 2048.0,
    }
    assert local["method"] == "local_only"
    assert local["gain"] == 0.0
    assert local["global_accuracy"] is None


def test_the_algorithm_stands_first_and_the_baselines_keep_their_order():
    names = ["zeta", "local_only", "alpha"]
    rows = tables.rows(summary(**{name: result(0.5) for name in names}))
    assert [row["method"] for row in rows] == ["pfedgm", *names]


def test_an_algorithm_among_its_own_baselines_is_one_row():
    rows = tables.rows(summary(pfedgm=result(0.1), fedavg=result(0.2)))
    assert [row["method"] for row in rows] == ["pfedgm", "fedavg"]
    assert rows[0]["personal_mean"] == pytest.approx(86.1)


def test_without_local_only_there_is_no_gain():
    assert [row["gain"] for row in tables.rows(summary(fedavg=result(0.5)))] == [
        None,
        None,
    ]


def test_local_only_as_the_algorithm_is_what_others_are_compared_with():
    rows = tables.rows(
        summary(fedavg=result(0.9)) | {"algorithm": "local_only", **result(0.8)}
    )
    assert [row["gain"] for row in rows] == [0.0, pytest.approx(10.0)]


def test_a_summary_of_nothing_but_a_name_gives_a_row_of_gaps():
    (row,) = tables.rows({"algorithm": "pfedgm", "best": None})
    assert row.pop("method") == "pfedgm"
    assert set(row.values()) == {None}


def test_a_summary_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"'algorithm', got the keys \['rounds'\]"):
        tables.rows({"rounds": 3})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(5.0, "+5.0"), (-3.14, "-3.1"), (0.04, "0.0"), (-0.04, "0.0"), (None, "–")],
)
def test_points_carry_a_sign_unless_they_round_to_zero(value, shown):
    assert tables.points(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0"), (99.94, "99.9"), (99.96, "100"), (12_345.6, "12,346"), (None, "–")],
)
def test_quantities_keep_about_three_digits(value, shown):
    assert tables.quantity(value) == shown


def test_non_finite_numbers_are_shown_as_such():
    (row,) = tables.rows(summary() | result(math.nan))
    assert tables.percent(row["personal_mean"]) == "nan"
    assert tables.points(math.nan) == "+nan"


def test_markdown_has_one_cell_a_column_and_the_same_numbers():
    rows = tables.rows(summary(**{"a|b": result(0.8)}))
    header, rule, main, other = (
        [cell.strip() for cell in line.replace(r"\|", "¦").strip("|\n").split(" | ")]
        for line in tables.to_markdown(rows).splitlines()
    )
    assert len(header) == len(main) == len(other) == len(tables.COLUMNS) - 2
    assert rule == [":--"] + ["--:"] * (len(header) - 1)
    shown = dict(zip(header, main, strict=True))
    assert shown["Method"] == "pfedgm"
    assert shown["Personal accuracy (%): mean"] == "86.1"
    assert shown["Traffic (MiB): down"] == "512"
    assert shown["Local steps: executed"] == "234,567"
    assert other[0] == "a¦b"


def test_new_clients_have_a_column_only_where_a_run_has_some():
    plain, with_new = summary(), summary()
    with_new["new_clients"] = {"personal_accuracy": {"mean": 0.7654}}
    assert "New clients" not in tables.to_markdown(tables.rows(plain))
    assert "New clients" in tables.to_markdown(tables.rows(with_new))
    assert "| 76.5 |" in tables.to_markdown(tables.rows(with_new))
    assert "76.5" in rendered(tables.comparison(with_new))
    assert len(tables.comparison(plain).columns) == 10


def test_models_as_received_have_a_column_only_where_a_run_has_some():
    plain, with_some = summary(), summary(fedavg_ft=result(0.8))
    received = {"mean": 0.6543, "std": 0.1}
    with_some["baselines"]["fedavg_ft"]["received_accuracy"] = received
    assert "as received" not in tables.to_markdown(tables.rows(plain))
    main, other = tables.to_markdown(tables.rows(with_some)).splitlines()[2:]
    assert main.split(" | ")[4] == "–" and other.split(" | ")[4] == "65.4"
    out = rendered(tables.comparison(with_some))
    assert "65.4" in out and "as rec." in out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert "as rec.\n" not in rendered(tables.comparison(plain))


def test_the_terminal_table_fits_80_columns_and_cuts_nothing():
    everything = summary(
        local_only=result(0.811, global_accuracy=None),
        fedavg_ft=result(0.7, local_steps=12_345_678, executed_steps=987_654_321),
    )
    out = rendered(tables.comparison(everything))
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for words in ("pfedgm", "local_only", "fedavg_ft", "86.1", "± 12.3", "+5.0"):
        assert words in out
    for words in ("31.4", "@ 15", "512", "123,456", "987.7M", "12.3", "346", "2,048"):
        assert words in out


def test_markup_in_a_name_is_shown_and_not_obeyed():
    out = rendered(tables.comparison(summary(**{"[red]x": result(0.5)})))
    assert "[red]x" in out
