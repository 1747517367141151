import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from seaborn.utils import relative_luminance

from clipad.studies import figures as plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize(("low", "colours"), [(0, "cividis"), (-100, "PuOr_r")])
def test_numbers_on_a_heat_map_can_be_read_on_every_colour(low, colours):
    values = pd.DataFrame([np.linspace(low, 100, 60), np.linspace(100, low, 60)])
    values.iloc[0, 7] = np.nan  # nothing is written there
    figure, ax = plt.subplots()
    plots.heatmap(values, ax, vmin=low, cmap=colours)
    figure.canvas.draw()
    assert len(ax.texts) == values.size - 1
    faces = ax.collections[0].get_facecolor().reshape(*values.shape, 4)
    for text in ax.texts:
        column, row = (int(place) for place in text.get_position())
        assert float(text.get_text()) == pytest.approx(values.iloc[row, column], abs=0.051)
        shades = sorted(
            relative_luminance(colour)
            for colour in (to_rgb(text.get_color()), faces[row, column, :3])
        )
        assert (shades[1] + 0.05) / (shades[0] + 0.05) > 4.5  # WCAG 2, level AA


@pytest.mark.parametrize("rows", [1, 3])
def test_images_and_maps_of_a_gallery_stand_in_line(rows):
    rng = np.random.default_rng(0)
    maps = {"Direct": rng.random((rows, 8, 8)), "SDP": rng.random((rows, 8, 8))}
    figure = plots.gallery(
        rng.random((rows, 8, 8, 3)), maps, rng.random((rows, 8, 8)) > 0.5, ["a\nb"] * rows
    )
    figure.canvas.draw()
    panels = np.array([ax.get_position().bounds for ax in figure.axes[: 3 * rows]]).reshape(
        rows, 3, 4
    )
    left, bottom, width, height = np.moveaxis(panels, -1, 0)
    np.testing.assert_allclose(bottom, np.broadcast_to(bottom[:, :1], bottom.shape), atol=1e-6)
    np.testing.assert_allclose(left, np.broadcast_to(left[:1], left.shape), atol=1e-6)
    assert np.ptp(width) < 1e-6
    assert np.ptp(height) < 1e-6


def contours(figure):
    """For each picture whether it has a contour, in the order of the axes."""
    return [bool(ax.collections) for ax in figure.axes if ax.images]


@pytest.mark.parametrize("landscape", [False, True])
@pytest.mark.parametrize(
    ("masks_on", "image", "heat"),
    [("maps", False, True), ("images", True, False), ("both", True, True)],
)
def test_contours_of_a_gallery_stand_where_they_are_promised(landscape, masks_on, image, heat):
    masks, maps = np.zeros((2, 8, 8), bool), np.random.default_rng(0).random((2, 8, 8))
    masks[0, 2:4, 2:4] = True  # the second image is flawless
    figure = plots.gallery(
        np.zeros((2, 8, 8, 3)), {"SDP": maps}, masks, landscape=landscape, masks_on=masks_on
    )
    first, second = [image, heat], [False, False]
    expected = np.array([first, second])
    assert contours(figure) == (expected.T if landscape else expected).ravel().tolist()


def test_regions_are_outlined_on_the_maps_of_their_method():
    masks, regions = np.zeros((1, 8, 8), bool), np.zeros((1, 8, 8), bool)
    masks[0, 2:4, 2:4] = regions[0, 5:7, 5:7] = True
    maps = {"SDP": np.eye(8)[None], "Direct": np.eye(8)[None]}
    figure = plots.gallery(
        np.zeros((1, 8, 8, 3)),
        maps,
        masks,
        masks_on="images",
        regions={"SDP": regions, "Direct": ~np.ones_like(regions)},
    )
    assert contours(figure) == [True, True, False]
    line = figure.axes[1].collections[0].get_paths()[0].vertices
    assert (line.min(axis=0) > 4).all()


def test_texts_stand_below_the_maps_of_their_method():
    maps = {"SDP": np.stack([np.eye(8)] * 2), "Direct": np.stack([np.eye(8)] * 2)}
    below = {"SDP": ["a", "b"], "Direct": ["c", "d"]}
    figure = plots.gallery(np.zeros((2, 8, 8, 3)), maps, below=below)
    assert [ax.get_xlabel() for ax in figure.axes[:6]] == ["", "a", "c", "", "b", "d"]


def test_a_column_of_a_gallery_has_one_scale_and_says_it():
    maps = {"SDP": np.stack([np.zeros((8, 8)), np.full((8, 8), 5.0)])}
    figure = plots.gallery(np.zeros((2, 8, 8, 3)), maps, limits={"SDP": (-1, 6)})
    shown = [ax.images[0] for ax in figure.axes if ax.images and ax.images[0].get_array().ndim == 2]
    assert [picture.get_clim() for picture in shown] == [(-1, 6)] * 2


def test_growth_draws_each_series_of_a_panel_in_its_look_with_its_intervals():
    rows = pd.DataFrame({"n": [10, 20, 10, 20], "series": ["a", "a", "b", "b"]})
    rows["found"], rows["low"], rows["high"] = [0.1, 0.2, 0.3, 0.4], 0.05, 0.5
    looks = {"a": ("blue", "o"), "b": ("orange", "s")}
    panels = {"number of images": rows.set_index("n")}
    (ax,) = plots.growth(panels, ["found"], None, "A title", looks).axes
    lines = {line.get_label(): line for line in ax.lines if line.get_label() in looks}
    for name, values in (("a", [10, 20]), ("b", [30, 40])):
        colour, marker = looks[name]
        np.testing.assert_allclose(lines[name].get_ydata(), values)
        assert lines[name].get_marker() == marker
        assert to_rgb(lines[name].get_color()) == plots.COLOURS[colour]
    ends = [segment[:, 1] for marks in ax.collections for segment in marks.get_segments()]
    np.testing.assert_allclose(ends, [[5, 50]] * 4)


@pytest.mark.parametrize("landscape", [False, True])
def test_maps_without_limits_have_scales_of_their_own_and_no_bar(landscape):
    maps = {
        "SDP": np.stack([np.eye(8), 5 * np.eye(8)]),
        "raw": np.stack([np.eye(8), 5 * np.eye(8)]),
    }
    limits = {"SDP": (0, 2), "raw": (None, None)}
    figure = plots.gallery(np.zeros((2, 8, 8, 3)), maps, limits=limits, landscape=landscape)
    scales = [
        ax.images[0].get_clim()
        for ax in figure.axes
        if ax.images and ax.images[0].get_array().ndim == 2
    ]
    assert sorted(scales) == [(0, 1), (0, 2), (0, 2), (0, 5)]
    assert [ax.get_visible() for ax in figure.axes if not ax.images] == [False, True, False]


def marks(ax, rows):
    """series -> row -> percent of a chart of dots, whose rows from the top are these."""
    return {
        line.get_label(): {
            rows[round(height)]: round(value, 6)
            for value, height in zip(*line.get_data(), strict=True)
        }
        for line in ax.get_lines()
    }


TABLE = pd.DataFrame({"a": [0.1, 0.2, 0.3], "b": [0.4, 0.5, 0.6]}, ["x", "y", "z"])


def test_dots_are_one_mark_per_series_and_row_at_its_value():
    _, ax = plt.subplots()
    plots.dots(ax, plots.rows_and_series(TABLE), rows=["z", "x", "y"])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["z", "x", "y"]
    assert marks(ax, ["z", "x", "y"]) == {
        "a": {"x": 10, "y": 20, "z": 30},
        "b": {"x": 40, "y": 50, "z": 60},
    }


@pytest.mark.parametrize("count", [1, 2, 6])
def test_marks_of_a_row_are_evenly_spread_and_rows_stay_apart(count):
    table = pd.DataFrame(0.5, ["x", "y"], [f"series {i}" for i in range(count)])
    _, ax = plt.subplots()
    plots.dots(ax, plots.rows_and_series(table))
    first, second = np.array([line.get_ydata() for line in ax.get_lines()]).T
    np.testing.assert_allclose(first.mean(), 0, atol=1e-9)
    np.testing.assert_allclose(second, first + 1)
    if count > 1:
        steps = np.diff(first)
        np.testing.assert_allclose(steps, steps[0])
        assert second.min() - first.max() > steps[0] > 0


def test_a_row_with_one_of_the_series_has_its_mark_in_the_middle():
    table = pd.DataFrame({"row": ["x", "y"], "series": ["a", "b"], "estimate": [0.1, 0.2]})
    table = table.assign(low=[0.05, 0.1], high=[0.2, 0.4])
    _, ax = plt.subplots()
    plots.dots(ax, table)
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[0], [1]]
    ends = [segment[:, 0].tolist() for lines in ax.collections for segment in lines.get_segments()]
    np.testing.assert_allclose(ends, [[5, 20], [10, 40]])


def test_panels_share_the_row_order_of_the_first_table():
    other = 1 - TABLE.loc[["z", "x", "y"]]
    figure = plots.dot_panels({"one": TABLE, "other": other}, "percent")
    first, second = (marks(ax, list(TABLE.index)) for ax in figure.axes)
    assert first["a"] == {"x": 10, "y": 20, "z": 30}
    assert second["a"] == {"x": 90, "y": 80, "z": 70}


def test_the_legend_names_the_series_of_every_panel_once():
    panels = {"one": TABLE, "other": TABLE.rename(columns={"b": "c"})}
    (legend,) = plots.dot_panels(panels, "percent", zero=True).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]


def test_the_arrow_of_a_cut_off_row_stays_inside_the_panel():
    near, far = (0.01, 0, 0.02, -0.01, 0.03), (-0.5, -0.6, -0.4, -0.7, -0.3)
    ends = ["estimate", "low", "high", "low_wide", "high_wide"]
    table = pd.DataFrame([near, near, far], columns=ends)
    table = table.assign(method=["a", "b", "far"], metric="pixel_pro")
    ax = plots.forest(table, "differences", "a").axes[0]
    arrow = next(line for line in ax.get_lines() if line.get_marker() == "<")
    low, _ = ax.get_xlim()
    assert low < arrow.get_xdata()[0] < 0.9 * low
    assert not any(line.get_marker() == ">" for line in ax.get_lines())
