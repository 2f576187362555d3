"""Tests of the pictures of a run: that they are drawn, whole, and of the data."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb

from fedgen.runs import plots

MIB = 2**20
BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#767676", "#D55E00"


def rounds(accuracies, mib=1.0):
    """Return the history of one method."""
    return [
        {
            "round": 5 * (i + 1),
            "bytes": int(mib * MIB * (i + 1)),
            "personal_accuracy": accuracy,
            "global_accuracy": None,
            "validation_accuracy": accuracy,
            "loss": 1.0,
        }
        for i, accuracy in enumerate(accuracies)
    ]


def history():
    return {
        "pfedgm": rounds([0.3, 0.6, 0.8]),
        "local_only": rounds([0.5, 0.6, 0.7], mib=0),
        "fedavg": rounds([0.1, 0.2, 0.3]),
    }


def summary(mine, local=None):
    out = {"algorithm": "pfedgm", "personal_accuracy": {"per_client": mine}}
    if local is not None:
        out["baselines"] = {"local_only": {"personal_accuracy": {"per_client": local}}}
    return out


def pixels(path):
    """Return `[height, width, 3]` in [0, 1]."""
    return image.imread(path)[..., :3]


def found(picture, colour, tolerance=0.02):
    """Return the rows and the columns of all pixels of a colour."""
    return np.nonzero(np.all(abs(picture - to_rgb(colour)) < tolerance, axis=-1))


def has_margin(picture):
    """Tell whether nothing touches the border, as a clipped label would."""
    border = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    return all(np.all(line == 1) for line in border)


@pytest.mark.parametrize("draw", [plots.accuracy_by_round, plots.accuracy_by_bytes])
def test_lines_have_their_colours_and_order(draw, tmp_path):
    path = tmp_path / "plot.png"
    assert draw(history(), path) == path
    picture = pixels(path)
    assert picture.shape[1] == plots.WIDTH * plots.DPI
    assert has_margin(picture)
    # Left of the labels, the best method ends highest.
    top = {
        colour: found(picture[:, : picture.shape[1] // 2], colour)[0].min()
        for colour in (BLUE, ORANGE)
    }
    assert top[BLUE] < top[ORANGE]
    # The algorithm of the run is drawn heavier than any other.
    assert found(picture, BLUE)[0].size > 2 * found(picture, ORANGE)[0].size
    assert found(picture, GREY)[0].size > 50


def test_what_sends_nothing_is_a_level_line_by_bytes(tmp_path):
    silent = {"pfedgm": rounds([0.3, 0.8]), "local_only": rounds([0.2, 0.6], mib=0)}
    levels = {}
    for name, draw in (
        ("bytes", plots.accuracy_by_bytes),
        ("round", plots.accuracy_by_round),
    ):
        picture = pixels(draw(silent, tmp_path / f"{name}.png"))
        inside = picture[20:480, 120:500]  # no axis, no label
        levels[name] = np.ptp(found(inside, GREY)[0])
    assert levels["bytes"] < 10 < levels["round"]


def test_wide_traffic_gets_a_log_axis(tmp_path, monkeypatch):
    figures = []
    save = plots._save
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, path: figures.append(figure) or save(figure, path),
    )
    near = {"a": rounds([0.1, 0.2, 0.3], mib=10), "b": rounds([0.1, 0.2], mib=5)}
    far = {"a": rounds([0.1, 0.2, 0.3], mib=10), "b": rounds([0.1, 0.2], mib=0.01)}
    for case in (near, far):
        plots.accuracy_by_bytes(case, tmp_path / "plot.png")
    near_axes, far_axes = (figure.axes[0] for figure in figures)
    assert near_axes.get_xscale() == "linear"
    assert far_axes.get_xscale() == "log"
    assert near_axes.get_xlabel() == "traffic up and down, all clients, MiB"
    assert far_axes.get_xlabel().endswith("(log scale)")
    np.testing.assert_allclose(near_axes.lines[0].get_xdata(), [10, 20, 30])
    np.testing.assert_allclose(near_axes.lines[0].get_ydata(), [10, 20, 30])


def test_labels_name_every_method_with_its_last_finite_accuracy(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    data = history() | {"broken": rounds([0.4, math.nan]), "$x_1": rounds([None])}
    plots.accuracy_by_round(data, tmp_path / "plot.png")
    words = {text.get_text() for text in figures[0].axes[0].texts}
    assert words == {
        "pfedgm  80.0 %",
        "local_only  70.0 %",
        "fedavg  30.0 %",
        "broken  40.0 %",
        "$x_1  no accuracy",
    }


@pytest.mark.parametrize("draw", [plots.accuracy_by_round, plots.accuracy_by_bytes])
@pytest.mark.parametrize(
    "data",
    [
        {},
        {"pfedgm": []},
        {"pfedgm": rounds([0.5])},
        {"pfedgm": rounds([None, math.nan])},
        {"pfedgm": rounds([0.0, 1.0]), "local_only": rounds([], mib=0)},
        {"pfedgm": rounds([0.2, None, 0.4] * 40)},
        {f"a_method_with_a_long_name_{i}": rounds([0.5, 0.5]) for i in range(25)},
    ],
    ids=["nothing", "no rounds", "one round", "no score", "ends", "gaps", "many"],
)
def test_degenerate_histories_are_drawn(draw, data, tmp_path):
    picture = pixels(draw(data, tmp_path / "plot.png"))
    assert np.mean(picture < 0.9) > 0.002
    assert has_margin(picture)


def test_labels_do_not_overlap_and_stay_beside_the_axes():
    placed = plots._spread([0.5] * 8 + [0.98, 0.99], 0.1)
    assert np.diff(placed).min() >= 0.1 - 1e-12
    assert placed[-1] <= 1
    assert plots._spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]


def test_a_method_keeps_its_look_and_the_first_is_emphasised():
    small = plots.looks(["pfedgm", "local_only", "fedavg"])
    large = plots.looks(["pfedgm", "fedper", "fedavg", "ccvr", "local_only"])
    assert all(small[name] == large[name] for name in small)
    assert small["pfedgm"].width > 1.5 * small["fedavg"].width
    assert plots.looks(["fedavg"])["fedavg"].colour == small["fedavg"].colour
    many = plots.looks(map(str, range(16))).values()
    assert len({(look.colour, look.dash) for look in many}) == 16
    assert sum(look.colour == BLUE for look in many) == 1


def test_gains_are_sorted_and_losses_have_another_colour(tmp_path, monkeypatch):
    figures = []
    save = plots._save
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, path: figures.append(figure) or save(figure, path),
    )
    path = tmp_path / "gains.png"
    plots.client_gains(
        summary([0.5, 0.9, 0.7, None, 0.2], [0.6, 0.5, 0.7, 0.8, 0.1]), path
    )
    upper, lower = figures[0].axes
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["1", "4", "2", "0"]
    by_label = {line.get_label(): line.get_ydata() for line in upper.lines}
    np.testing.assert_allclose(by_label["pfedgm"], [90, 20, 70, 50])
    np.testing.assert_allclose(by_label["local_only"], [50, 10, 70, 60])
    assert lower.get_title(loc="left") == (
        "2 of 4 clients better than on their own, 1 worse, 1 equal; median +5.0 points"
    )
    assert lower.get_xlabel() == "client, sorted by gain; 1 without a score left out"
    picture = pixels(path)
    blue, red = found(picture, BLUE), found(picture, RED)
    assert blue[1].mean() < red[1].mean()
    assert blue[0].max() < red[0].max()
    assert has_margin(picture)


@pytest.mark.parametrize(
    ("mine", "local"),
    [
        ([0.5], [0.4]),
        ([0.5], None),
        ([None, math.nan], [0.1, 0.2]),
        ([None], None),
        ([], []),
        (list(np.linspace(0, 1, 1000)), list(np.linspace(1, 0, 1000))),
        ([0.5] * 40, [0.5] * 40),
    ],
    ids=["one", "alone", "no score", "alone, no score", "none", "1000", "equal"],
)
def test_degenerate_clients_are_drawn(mine, local, tmp_path):
    picture = pixels(plots.client_gains(summary(mine, local), tmp_path / "gains.png"))
    assert np.mean(picture < 0.9) > 0.002
    assert has_margin(picture)


def test_without_local_only_the_picture_says_so(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.client_gains(summary([0.5, 0.7]), tmp_path / "gains.png")
    (axes,) = figures[0].axes
    assert "no local_only baseline" in axes.get_title(loc="left")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [70, 50])


def test_methods_that_scored_different_clients_are_refused(tmp_path):
    path = tmp_path / "gains.png"
    with pytest.raises(ValueError, match="same clients, got 2 and 1"):
        plots.client_gains(summary([0.5, 0.6], [0.5]), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("n", "c"), [(1, 1), (5, 10), (20, 20), (41, 2), (1, 100), (1000, 100)]
)
def test_partitions_of_any_size_are_drawn_whole(n, c, tmp_path):
    counts = np.random.default_rng(0).integers(0, 300, (n, c))
    picture = pixels(plots.partition(counts, tmp_path / "partition.png"))
    assert picture.shape[1] == plots.WIDTH * plots.DPI
    assert picture.shape[0] < 1200
    assert has_margin(picture)
    assert np.unique(picture @ [1, 256, 65536]).size > 20


def test_a_partition_has_the_class_below_and_the_client_right(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    counts = np.array([[7, 0], [1, 30], [200, 4]])
    plots.partition(counts, tmp_path / "partition.png")
    upper, lower, _ = figures[0].axes
    np.testing.assert_array_equal(lower.images[0].get_array().filled(0), counts.T)
    written = {text.get_position(): text.get_text() for text in lower.texts}
    assert written == {
        (0, 0): "7",
        (1, 0): "1",
        (1, 1): "30",
        (2, 0): "200",
        (2, 1): "4",
    }
    assert [bar.get_height() for bar in upper.patches] == [7, 31, 204]
    assert upper.get_title(loc="left") == (
        "3 clients, 242 training samples, 7 to 204 a client"
    )


def test_many_clients_are_sorted_by_their_largest_class(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    counts = np.random.default_rng(0).multinomial(50, [0.2] * 5, 200)
    plots.partition(counts, tmp_path / "partition.png")
    shown = figures[0].axes[1].images[0].get_array().filled(0).T
    assert np.all(np.diff(shown.argmax(1)) >= 0)
    assert sorted(map(tuple, shown)) == sorted(map(tuple, counts))


def test_of_very_many_clients_some_are_drawn_evenly(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    n = 100_000
    counts = np.ones((n, 2), int)
    counts[: n // 4, 0] = 3  # a quarter has another largest class
    counts[n // 4 :, 1] = 2
    plots.partition(counts, tmp_path / "partition.png")
    upper, lower, _ = figures[0].axes
    shown = lower.images[0].get_array().filled(0)
    assert shown.shape == (2, 1000)
    assert np.sum(shown[0] == 3) == 250
    assert upper.get_title(loc="left").startswith("100,000 clients, 325,000 training")
    assert lower.get_xlabel().endswith("1,000 of 100,000 drawn, evenly spaced")

    gain = np.linspace(1, -1, 50_001)
    plots.client_gains(
        summary(list(0.5 + gain / 2), [0.5] * gain.size), tmp_path / "a.png"
    )
    upper, lower = figures[1].axes
    drawn = max(upper.lines, key=lambda line: np.ptp(line.get_ydata())).get_ydata()
    np.testing.assert_allclose(drawn, np.linspace(100, 0, 1000), atol=0.01)
    assert lower.get_title(loc="left").startswith("25,000 of 50,001 clients better")
    assert lower.get_xlabel().endswith("1,000 of 50,001 drawn, evenly spaced")


def test_clients_of_a_subset_go_by_their_ids(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    some = {**summary([0.5, 0.9], [0.4, 0.4]), "evaluated_clients": [7, 30]}
    plots.client_gains(some, tmp_path / "gains.png")
    labels = figures[0].axes[1].get_xticklabels()
    assert [label.get_text() for label in labels] == ["30", "7"]


def test_a_partition_of_nothing_is_drawn(tmp_path):
    picture = pixels(plots.partition(np.zeros((3, 2), int), tmp_path / "empty.png"))
    assert has_margin(picture)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros(3), r"\[n, c\] array, got \(3,\)"),
        (np.zeros((0, 10)), r"\[n, c\] array, got \(0, 10\)"),
        (np.array([[1, -2]]), "counts must be >= 0, got -2"),
        (np.array([[1.0, math.nan]]), "counts must be >= 0, got nan"),
    ],
)
def test_what_is_no_partition_is_refused(counts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plots.partition(counts, tmp_path / "partition.png")


def test_the_users_style_neither_changes_a_plot_nor_is_changed(tmp_path):
    plain = plots.accuracy_by_round(history(), tmp_path / "plain.png").read_bytes()
    changes = {"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}
    with matplotlib.rc_context(changes):
        before = dict(matplotlib.rcParams)
        styled = plots.accuracy_by_round(history(), tmp_path / "styled.png")
        assert dict(matplotlib.rcParams) == before
    assert styled.read_bytes() == plain


def paint(shape, colour):
    """Return images of one colour, with a corner of black and one of white."""
    images = np.ones((*shape, 4, 5, 3)) * to_rgb(colour)
    images[..., 0, 0, :], images[..., -1, -1, :] = 0, 1
    return images


def test_estimates_lie_where_they_should(tmp_path):
    path = tmp_path / "proportions.png"
    truth = np.array([[0.1, 0.9], [0.9, 0.1]])
    places = []
    for estimate in (truth, truth[::-1]):
        plots.proportions(truth, estimate, path)
        picture = pixels(path)
        assert picture.shape[1] == plots.WIDTH * plots.DPI and has_margin(picture)
        y, x = found(picture, "#0072B2")
        y, x = y[y > 60], x[y > 60]  # without the legend
        places.append(
            np.corrcoef(x[x < picture.shape[1] / 2], y[x < picture.shape[1] / 2])[0, 1]
        )
    # Down is larger: right estimates rise to the right, wrong ones fall.
    assert places[0] < -0.9 and places[1] > 0.9
    plots.proportions(truth, truth, path, newcomers=(truth, truth))
    assert found(pixels(path), "#D55E00")[0].size > 100
    with pytest.raises(ValueError, match="of new clients must both be"):
        plots.proportions(truth, truth, path, newcomers=(truth, truth[:1]))


def test_samples_stand_left_of_their_nearest_training_image(tmp_path):
    shape, path = (2, 3), tmp_path / "samples.png"
    generated, nearest = paint(shape, RED), paint(shape, BLUE)
    assert plots.samples(generated, nearest, path, titles=["one", "two $"]) == path
    picture = pixels(path)
    assert picture.shape[1] == plots.WIDTH * plots.DPI
    assert has_margin(picture)
    (red_y, red_x), (blue_y, blue_x) = found(picture, RED), found(picture, BLUE)
    # Three pairs in two rows, each image of 18 coloured cells.
    assert runs(red_x) == runs(blue_x) == 3
    assert runs(red_y) == runs(blue_y) == 2
    assert red_x.min() < blue_x.min() and red_x.max() < blue_x.max()
    assert red_x.size == pytest.approx(blue_x.size, rel=0.03)


def runs(places):
    """Count the runs of places that lie far apart."""
    return 1 + np.sum(np.diff(np.unique(places)) > 8)


def test_samples_have_the_scale_of_the_training_images(tmp_path):
    path = tmp_path / "samples.png"
    nearest = np.tile(np.linspace(10, 30, 16).reshape(4, 4), (1, 2, 1, 1))
    generated = np.full((1, 2, 4, 4, 1), 20.0)
    plots.samples(generated, nearest[..., None], path)
    # Grey of the middle of the scale, and what is beyond the scale at its end.
    assert found(pixels(path), "#7f7f7f")[0].size > 6000
    plots.samples(generated + 100, nearest[..., None], path)
    assert found(pixels(path), "#7f7f7f")[0].size < 600


def test_only_some_samples_are_drawn(tmp_path):
    paths = [tmp_path / f"{g}.png" for g in (8, 9)]
    for path, g in zip(paths, (8, 9), strict=True):
        plots.samples(paint((1, g), RED), paint((1, g), BLUE), path)
    assert np.array_equal(*map(pixels, paths))


@pytest.mark.parametrize(
    ("generated", "nearest", "titles", "message"),
    [
        (np.ones((2, 3, 4)), np.ones((2, 3, 4)), None, "generated must be images"),
        (np.ones((1, 1, 2, 2, 2)), np.ones((1, 1, 2, 2, 2)), None, "1 or 3"),
        (np.ones((1, 0, 2, 2)), np.ones((1, 0, 2, 2)), None, "generated must be"),
        (np.ones((1, 2, 2, 2)), np.ones((2, 1, 2, 2)), None, "nearest must have the"),
        (np.full((1, 1, 2, 2), np.nan), np.ones((1, 1, 2, 2)), None, "generated must"),
        (np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), ["a", "b"], "of 1, got 2"),
    ],
)
def test_samples_that_are_no_images_are_refused(
    generated, nearest, titles, message, tmp_path
):
    path = tmp_path / "samples.png"
    with pytest.raises(ValueError, match=message):
        plots.samples(generated, nearest, path, titles=titles)
    assert not path.exists()
