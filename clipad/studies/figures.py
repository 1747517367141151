"""Figures: functions from data to a matplotlib Figure, and ``show``, which displays one with its alt text.

Importing this module sets the look of all figures. Heat maps share their limits over all panels of a method; ground
truth is a white-on-black contour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import SVG, Image, Markdown, display
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from seaborn.utils import relative_luminance

from clipad.files import REPOSITORY
from clipad.studies.common import METRIC_NAMES, Interval

_PALETTE = sns.color_palette("colorblind")
_PLACES = {"blue": 0, "orange": 1, "green": 2, "red": 3, "purple": 4, "grey": 7}
COLOURS = {name: _PALETTE[i] for name, i in _PLACES.items()}
NORMAL, ANOMALOUS = COLOURS["blue"], COLOURS["orange"]
LOOKS = tuple(zip(COLOURS, "os^Dv*", strict=True))
"""colour and marker of the first, second, ... series of a chart"""
METHODS = {
    "Direct": ("grey", "s"),
    "CLIP Surgery": ("purple", "D"),
    "WinCLIP": ("orange", "^"),
    "SDP": ("blue", "o"),
    "SDP+": ("green", "P"),
}
"""method -> its colour and marker, wherever methods are compared"""
KINDS = {"textures": ("green", "s"), "objects": ("blue", "o")}
MAP = "inferno"

# At page width no label is below 9 points.
plt.rcParams.update(dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "axes.labelsize"), 9))
plt.rcParams.update({"legend.fontsize": 9, "legend.frameon": False, "figure.titlesize": 11})
plt.rcParams.update({"axes.titlesize": 10, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

LARGEST_SVG = 400_000
"""bytes; a chart with more marks than that is stored as a picture"""


def show(figure: Figure, caption: str, alt: str = "") -> None:
    """Display a figure with its caption below it, and close it. Charts are SVG, images and maps PNG at twice the size.

    ``caption``: what is to be seen, with numbers, the rule by which images were chosen, what lines and contours mean.
    ``alt``: for readers who do not see it, empty for the caption. Raises ValueError for an empty caption.
    """
    if not caption.strip():
        raise ValueError("a figure needs a caption that says what it shows")
    alt = alt or caption
    pictures = any(ax.images for ax in figure.axes)
    svg = None if pictures else _svg(figure, alt)
    if svg is not None and len(svg) <= LARGEST_SVG:
        display(SVG(svg), metadata={"image/svg+xml": {"alt": alt}})
    else:
        width = round(figure.get_size_inches()[0] * 100)
        image = Image(_png(figure), format="png", width=width, alt=alt)
        display(image, metadata={"image/png": {"alt": alt, "width": width}})
    plt.close(figure)
    display(Markdown(f"*{caption.strip()}*"))


def show_drawing(name: str, caption: str) -> None:
    """Display a drawing, an SVG file in ``notebooks/``, with its caption below it."""
    path = REPOSITORY / "notebooks" / name
    display(SVG(filename=path), metadata={"image/svg+xml": {"alt": caption}})
    display(Markdown(f"*{caption}*"))


def _svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    told = {"Date": None, "Title": alt}
    with plt.rc_context({"svg.hashsalt": "clipad", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=told)
    # A wide chart shrinks to the page's width instead of being cut off.
    return buffer.getvalue().replace("<svg ", '<svg style="max-width: 100%; height: auto" ', 1)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    picture = PIL.Image.open(buffer).convert("RGB")
    # 256 colours without dithering: a third of the space, and flat areas stay flat. Maximum coverage keeps rare ones.
    palette = picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=4)
    picture = picture.quantize(palette=palette, dither=PIL.Image.Dither.NONE)
    small = io.BytesIO()
    picture.save(small, "PNG", optimize=True)
    return small.getvalue()


# Parts of figures -----------------------------------------------------------------------------------------------


def subplots(rows: int, columns: int, size: tuple[float, float], title: str = "", **options):
    """A figure with a title over all of it, and its axes, always rows x columns."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    if title:
        figure.suptitle(title)
    return figure, axes


def picture_grid(
    names: Sequence[str], titles: Sequence[str], side: float, bars: tuple[float, float] = (0, 0)
):
    """A figure for pictures without ticks, ``side`` inches each, and its axes: rows have names, columns titles.

    ``bars``: inches for colour bars at the right and below, so that the pictures keep their side.
    """
    size = (side * len(titles) + 0.4 + bars[0], side * len(names) + 0.6 + bars[1])
    figure, axes = subplots(len(names), len(titles), size, layout="compressed")
    for ax in axes.flat:
        bare(ax)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
    return figure, axes


def bare(ax) -> None:
    """No ticks and no frame, as around a picture."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def name_rows(ax, names: Sequence[str]) -> None:
    """Rows 0, 1, ... with names, the first one at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def legend_below(figure: Figure, columns: int = 3) -> None:
    """One legend below all axes, each name once."""
    drawn = {}
    for ax in figure.axes:
        marks, names = ax.get_legend_handles_labels()
        drawn |= dict(zip(names, marks, strict=True))
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=columns)


def image_array(image, size: int) -> np.ndarray:
    """A PIL image as the model sees its shape: RGB, squashed to size x size, values 0-1."""
    return np.asarray(image.convert("RGB").resize((size, size))) / 255


def contour(ax, mask: np.ndarray | None, colour: str = "white") -> None:
    """A region's edge as a white line on a black one, visible on any map."""
    if mask is not None and mask.any():
        for line, width in (("black", 1.6), (colour, 0.8)):
            ax.contour(mask, levels=[0.5], colors=[line], linewidths=width)


def mark_patch(ax, patch: int, grid: int, side: float, colour: str = "cyan") -> None:
    """A square around one of G x G patches of a picture that was drawn from 0 to ``side``."""
    row, column = divmod(patch, grid)
    corner, step = (column * side / grid, row * side / grid), side / grid
    ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor=colour, linewidth=1.5))


# Images and maps ------------------------------------------------------------------------------------------------


def draw(axes, images: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None, **look):
    """Images on axes, one each, with the contours of their masks; returns the last one, for a colour bar."""
    for i, (ax, image) in enumerate(zip(axes, images, strict=True)):
        shown = ax.imshow(image, **look)
        contour(ax, None if masks is None else masks[i])
    return shown


def gallery(
    images: Sequence[np.ndarray],
    maps: Mapping[str, np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
    titles: Sequence[str] | None = None,
    limits: Mapping[str, tuple[float | None, float | None]] | None = None,
    colours: Mapping[str, str] | None = None,
    landscape: bool = False,
    masks_on: str = "maps",
    regions: Mapping[str, np.ndarray] | None = None,
    below: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Images in the first column, one column of heat maps per method, one row per image; ``landscape``: transposed.

    ``images``: S x S x 3; ``maps``: per method N x S x S. The limits of a method are shared by its maps (given, or 1st
    to 99.8th percentile of what is shown) and stand in its colour bar; with (None, None) every map has a scale of its
    own. ``colours``: another colour map than ``MAP``. ``below``: per method a text under each map.

    Contours: those of ``masks`` (N x S x S, or None) are drawn where ``masks_on`` says, in any layout: on the "maps",
    on the "images", or on "both". ``regions`` (what each method marks, N x S x S) are drawn on the method's maps.
    """
    titles, lines = titles or [""] * len(images), ["image", *maps]
    if landscape:
        figure, axes = picture_grid(lines, titles, min(2.2, 9.5 / len(images)), bars=(0.9, 0))
    else:
        figure, axes = picture_grid(titles, lines, 1.8, bars=(0, 0.6))
        axes = axes.T
    on_images, on_maps = (
        masks if masks_on in (place, "both") else None for place in ("images", "maps")
    )
    place = {"location": "right" if landscape else "bottom", "shrink": 0.85, "aspect": 14}
    for line, name in zip(axes, lines, strict=True):
        if name == "image":
            shown, low = draw(line, images, on_images), None
        else:
            low, high = (limits or {}).get(name) or np.percentile(maps[name], [1, 99.8])
            look = {"cmap": (colours or {}).get(name, MAP), "vmin": low, "vmax": high}
            shown = draw(line, maps[name], on_maps, **look)
            for i, ax in enumerate(line):
                contour(ax, regions[name][i] if regions else None)
                ax.set_xlabel(below[name][i] if below else "")
        bar = figure.colorbar(shown, ax=list(line), ticks=plt.MaxNLocator(3), **place)
        bar.ax.tick_params(labelsize=8)
        bar.ax.set_visible(low is not None)  # an empty bar keeps all pictures at one size
    return figure


# Charts ---------------------------------------------------------------------------------------------------------


def heatmap(values: pd.DataFrame, ax, fontsize: float = 8, **options) -> None:
    """seaborn's heat map with its numbers in black or white, whichever contrasts more with the colour below.

    seaborn writes white on half of all colours, which is hard to read on the lighter ones of them.
    """
    options = {"vmin": 0, "vmax": 100, "cmap": "cividis", "fmt": ".1f", "linewidths": 0.5} | options
    sns.heatmap(values, ax=ax, annot=True, cbar=False, annot_kws={"fontsize": fontsize}, **options)
    colours = ax.collections[0]
    shown = np.asarray(values, dtype=float)
    for text in ax.texts:
        column, row = (int(place) for place in text.get_position())
        luminance = relative_luminance(colours.to_rgba(shown[row, column]))
        text.set_color("black" if luminance > 0.18 else "white")  # 0.18: equal contrast by WCAG 2
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0)


def dots(
    ax,
    table: pd.DataFrame,
    looks: Mapping[str, tuple[str, str]] | None = None,
    rows: Sequence[str] | None = None,
) -> None:
    """Fractions as dots in percent, with their intervals as lines: a row per compared thing, a look per series.

    ``table``: columns ``row``, ``series``, ``estimate`` and, where there are intervals, ``low`` and ``high``. Series of
    a row stand below one another. ``looks``: series -> colour and marker. ``rows``: their order, from the top.
    """
    rows = list(table["row"].unique() if rows is None else rows)
    looks = looks or dict(zip(table["series"].unique(), cycle(LOOKS), strict=False))
    heights = _heights(table, rows)
    for name, own in table.groupby("series", sort=False):
        colour, marker = looks[name]
        at = [heights[row, name] for row in own["row"]]
        if "low" in own:
            ends = 100 * own["low"], 100 * own["high"]
            ax.hlines(at, *ends, color=COLOURS[colour], linewidth=2, alpha=0.6)
        look = {"color": COLOURS[colour], "markersize": 6, "alpha": 0.85, "label": name}
        ax.plot(100 * own["estimate"], at, marker, **look)
    name_rows(ax, rows)
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)


def _heights(table: pd.DataFrame, rows: Sequence[str]) -> dict[tuple[str, str], float]:
    """(row, series) -> its height on the axis: the series of a row share 0.6 of it, so neighbouring rows stay apart."""
    heights = {}
    for place, row in enumerate(rows):
        series = table.loc[table["row"] == row, "series"].unique()
        for number, name in enumerate(series):
            heights[row, name] = place + 0.6 * ((number + 0.5) / len(series) - 0.5)
    return heights


def rows_and_series(table: pd.DataFrame) -> pd.DataFrame:
    """What :func:`dots` takes, from a table of rows x series."""
    table = table.rename_axis(index="row", columns="series")
    return table.stack(future_stack=True).rename("estimate").reset_index()


def dot_panels(
    panels: Mapping[str, pd.DataFrame],
    xlabel: str,
    title: str = "",
    looks: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:
    """A panel per table of fractions: a row per index (in the first table's order) and a dot per column, in percent.

    ``looks``: column -> colour and marker.
    """
    first = next(iter(panels.values()))
    size = (2 + 2.9 * len(panels), 0.34 * len(first) + 1.6)
    figure, axes = subplots(1, len(panels), size, title, sharey=True)
    for ax, (name, table) in zip(axes[0], panels.items(), strict=True):
        dots(ax, rows_and_series(table), looks, list(first.index))
        ax.set(title=name, xlabel=xlabel)
    legend_below(figure, len(first.columns))
    return figure


def forest(
    table: pd.DataFrame, title: str, baseline: str = "", highlight: Sequence[str] = ()
) -> Figure:
    """Paired differences with both intervals, a panel per metric; the numbers stand beside the marks, in points.

    ``table``: :meth:`clipad.studies.common.Scores.differences`. Thick: other images; thin: other categories as well;
    filled where the thin one leaves out 0. Rows far outside the others are cut off at the edge (arrow), so that they
    do not set the axis.
    """
    metrics, names = table["metric"].unique(), list(table["method"].unique())
    size = (1.8 + 3.1 * len(metrics), 0.36 * len(names) + 1.4)
    figure, axes = subplots(1, len(metrics), size, title, sharey=True)
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("method").loc[names]
        limit = _limit_of_most(rows)
        for place, (name, row) in enumerate(rows.iterrows()):
            _forest_row(ax, place, row, "orange" if name in highlight else "blue", limit)
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        against = f" against {baseline}" if baseline else ""
        ax.set(xlim=(-limit, limit), title=METRIC_NAMES.get(metric, metric))
        ax.set(xlabel=f"points{against}")
        name_rows(ax, names)
        ax.spines["left"].set_visible(False)
    return figure


def _limit_of_most(rows: pd.DataFrame) -> float:
    """Half the width of the axis: the furthest end among rows of ordinary size, in points."""
    size = rows["estimate"].abs()
    ordinary = rows[size <= max(4 * size.median(), 0.02)]
    ends = ordinary[["low_wide", "high_wide", "low", "high"]].abs().to_numpy()
    return 115 * float(np.nanmax(ends)) if np.isfinite(ends).any() else 1.0


def _forest_row(ax, place: int, row: pd.Series, colour: str, limit: float) -> None:
    wide = Interval(row["estimate"], row["low_wide"], row["high_wide"])
    look = {"color": COLOURS[colour]}
    at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
    ax.annotate(f"{wide:+}", (0.99, place - 0.36), fontsize=7.5, color="0.3", **at)
    ax.plot([100 * wide.low, 100 * wide.high], [place] * 2, linewidth=1.2, **look)
    ax.plot([100 * row["low"], 100 * row["high"]], [place] * 2, linewidth=4, **look)
    estimate, edge = 100 * wide.estimate, 0.93 * limit  # a cut-off row's arrow stays in the panel
    marker = "o" if abs(estimate) <= edge else ">" if estimate > 0 else "<"
    filled = wide.verdict() in ("higher", "lower")
    look["markerfacecolor"] = COLOURS[colour] if filled else "white"
    ax.plot(np.clip(estimate, -edge, edge), place, marker, markersize=6, **look)


def category_dots(table: pd.DataFrame, title: str, before: str, after: str) -> Figure:
    """Difference of two methods per category with its interval over images, textures and objects apart.

    ``table``: :meth:`clipad.studies.common.Scores.by_category` with a column ``metric``: a panel per metric.
    """
    metrics = table["metric"].unique()
    row = table["category"] + " (" + table["group"].str[:-1] + ")"
    table = table.assign(row=row, series=table["group"])
    first = table[table["metric"] == metrics[0]].sort_values(["group", "estimate"], ascending=False)
    size = (1.6 + 3 * len(metrics), 0.3 * len(first) + 1.5)
    figure, axes = subplots(1, len(metrics), size, title, sharey=True)
    for ax, metric in zip(axes[0], metrics, strict=True):
        dots(ax, table[table["metric"] == metric], KINDS, first["row"])
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        ax.set(title=METRIC_NAMES.get(metric, metric), xlabel=f"{after} − {before}, points")
    return figure


def growth(
    frames: Mapping[str, pd.DataFrame],
    metrics: Sequence[str],
    base: Mapping | None,
    title: str,
    looks: Mapping[str, tuple[str, str]] | None = None,
    unit: str = "percent",
) -> Figure:
    """Metrics over a size, a column per frame and a row per metric: a dot per row, a line through their means.

    ``frames``: name of the axis -> rows, with the size as index; a "number of" something has a logarithmic axis.
    Columns ``low`` and ``high`` are the ends of intervals. ``base``: metric -> what the dashed line shows. ``looks``:
    series -> colour and marker; the frames' column ``series`` then says which a row belongs to. Drawn is 100 x.
    """
    size = (max(4 * len(frames), 5) + (1.6 if looks else 0), 2.1 * len(metrics) + 0.5)
    figure, axes = subplots(len(metrics), len(frames), size, title, sharey="row", sharex="col")
    looks = looks or {"": ("blue", "o")}
    for column, (name, frame) in enumerate(frames.items()):
        apart = 1.04 if name.startswith("number of") else 1
        for ax, metric in zip(axes[:, column], metrics, strict=True):
            for place, (series, look) in enumerate(looks.items()):
                own = frame[frame["series"] == series] if series else frame
                beside = apart ** (place - (len(looks) - 1) / 2)
                _grow(ax, own.set_axis(own.index * beside), metric, *look, label=series)
            if base is not None and metric in base:
                ax.axhline(100 * base[metric], color="0.4", linestyle="--", linewidth=1)
        ax.set_xlabel(name)
        if name.startswith("number of"):
            sizes = sorted(set(frame.index))
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, sizes)
            ax.minorticks_off()
    for ax, metric in zip(axes[:, 0], metrics, strict=True):
        ax.set_ylabel(f"{METRIC_NAMES.get(metric, metric)},\n{unit}")
    if len(looks) > 1:
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _grow(ax, rows: pd.DataFrame, metric: str, colour: str, marker: str, label: str = "") -> None:
    colour, means = COLOURS[colour], 100 * rows.groupby(level=0)[metric].mean()
    ax.plot(rows.index, 100 * rows[metric], marker, color=colour, alpha=0.4, markersize=4)
    ax.plot(means.index, means, color=colour, marker=marker if label else "", label=label)
    if "low" in rows:
        ax.vlines(rows.index, 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.6)


def styled(table: pd.DataFrame, caption: str, name: str) -> pd.io.formats.style.Styler:
    """A results table for people: percent with one decimal, the mean row set off, identical in every run."""
    shown = (100 * table).rename(columns=METRIC_NAMES).style.format("{:.1f}", na_rep="–")
    last = {"selector": "tbody tr:last-child", "props": "border-top: 1px solid; font-weight: bold"}
    above = {"selector": "caption", "props": "text-align: left; padding: 4px 0"}
    shown.set_caption(f"{caption} (percent)").set_table_styles([last, above])
    return shown.set_uuid(name)
