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


def test_a_figure_without_words_is_refused():
    with pytest.raises(ValueError, match="caption"):
        plots.show(plt.figure(), " ")
