"""Figures: functions from data to a matplotlib Figure, and ``show``, which displays one with its alt text.

Importing this module sets the look of all figures.
"""

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

from clipad.io.files import REPOSITORY
from clipad.studies.common import METRIC_NAMES, Interval

_PLACES = {"blue": 0, "orange": 1, "green": 2, "red": 3, "purple": 4, "grey": 7}
COLOURS = {name: sns.color_palette("colorblind")[i] for name, i in _PLACES.items()}
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
plt.rcParams.update({"savefig.bbox": "tight", "svg.hashsalt": "clipad"})


def show(figure: Figure | str, caption: str) -> None:
    """Display a figure with its caption below it, and close it. Charts are SVG, images and maps PNG at twice the size.

    ``figure``: or the name of a drawing, an SVG file in ``notebooks/``. ``caption``: what is to be seen, with numbers;
    the alt text, too.
    """
    kind = "image/svg+xml"
    if isinstance(figure, str):
        picture = SVG(filename=REPOSITORY / "notebooks" / figure)
    elif any(ax.images for ax in figure.axes):
        kind = "image/png"
        picture = Image(_png(figure), width=round(100 * figure.get_figwidth()))
    else:
        picture = SVG(_svg(figure, caption))
    display(picture, metadata={kind: {"alt": caption}})
    plt.close(figure)
    display(Markdown(f"*{caption}*"))


def _svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": alt})
    # A wide chart shrinks to the page's width instead of being cut off.
    return buffer.getvalue().replace("<svg ", '<svg style="max-width: 100%; height: auto" ', 1)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    picture = PIL.Image.open(buffer).convert("RGB")
    # 256 colours without dithering: a third of the space, and flat areas stay flat. Maximum coverage keeps rare ones.
    picture = picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=4)
    small = io.BytesIO()
    picture.save(small, "PNG", optimize=True)
    return small.getvalue()


def subplots(rows: int, columns: int, size: tuple[float, float], title: str = "", **options):
    """A figure with a title over all of it, and its axes, rows x columns."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    if title:
        figure.suptitle(title)
    return figure, axes


def name_rows(ax, names: Sequence[str]) -> None:
    """Rows 0, 1, ... with names, the first one at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def image_array(image, size: int) -> np.ndarray:
    """A PIL image as the model sees its shape: RGB, squashed to size x size, values 0-1."""
    return np.asarray(image.convert("RGB").resize((size, size))) / 255


def contour(ax, mask: np.ndarray | None) -> None:
    """A region's edge as a white line on a black one, visible on any map."""
    if mask is not None and mask.any():
        for colour, width in (("black", 1.6), ("white", 0.8)):
            ax.contour(mask, levels=[0.5], colors=[colour], linewidths=width)


def mark_patch(ax, patch: int, grid: int, side: float, colour: str = "cyan") -> None:
    """A square around one of G x G patches of a picture that was drawn from 0 to ``side``."""
    row, column = divmod(patch, grid)
    corner, step = (column * side / grid, row * side / grid), side / grid
    ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor=colour, linewidth=1.5))


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
    """Images in the first column, a column of heat maps per method, a row per image; ``landscape``: transposed.

    ``images``: S x S x 3; ``maps``: per method N x S x S. ``limits``: of a method's colours, shown in its bar; 1st to
    99.8th percentile if not given, each map's own if (None, None). ``colours``: another colour map than ``MAP``.
    Outlined: ``masks`` (N x S x S) on "maps", "images" or "both", and per method ``regions`` (N x S x S) on its maps.
    ``below``: per method texts under its maps.
    """
    titles, lines = titles or [""] * len(images), {"image": images} | dict(maps)
    limits = {"image": (None, None)} | dict(limits or {})
    rows, columns = (lines, titles) if landscape else (titles, lines)
    side = min(2.2, 9.5 / len(images)) if landscape else 1.8
    right, under = (0.9, 0) if landscape else (0, 0.6)  # inches for the colour bars
    size = (side * len(columns) + 0.4 + right, side * len(rows) + 0.6 + under)
    figure, axes = subplots(len(rows), len(columns), size, layout="compressed")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=9)
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name)
    place = {"location": "right" if landscape else "bottom", "shrink": 0.85, "aspect": 14}
    for line, (name, pictures) in zip(axes if landscape else axes.T, lines.items(), strict=True):
        low, high = limits.get(name) or np.percentile(pictures, [1, 99.8])
        look = {"cmap": (colours or {}).get(name, MAP), "vmin": low, "vmax": high}
        for i, (ax, picture) in enumerate(zip(line, pictures, strict=True)):
            shown = ax.imshow(picture, **look)
            if masks is not None and masks_on in ("images" if name == "image" else "maps", "both"):
                contour(ax, masks[i])
            if regions and name in regions:
                contour(ax, regions[name][i])
            if below and name in below:
                ax.set_xlabel(below[name][i])
        bar = figure.colorbar(shown, ax=list(line), ticks=plt.MaxNLocator(3), **place)
        bar.ax.tick_params(labelsize=8)
        bar.ax.set_visible(low is not None)  # an empty bar keeps all pictures at one size
    return figure


def heatmap(values: pd.DataFrame, ax, fontsize: float = 8, **options) -> None:
    """seaborn's heat map with its numbers in black or white, whichever contrasts more with the colour below."""
    options = {"vmin": 0, "vmax": 100, "cmap": "cividis", "fmt": ".1f", "linewidths": 0.5} | options
    sns.heatmap(values, ax=ax, annot=True, cbar=False, annot_kws={"fontsize": fontsize}, **options)
    colours, shown = ax.collections[0], np.asarray(values, dtype=float)
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
    """Fractions as dots in percent, with their intervals as lines; the series of a row stand below one another.

    ``table``: columns ``row``, ``series``, ``estimate`` and perhaps ``low`` and ``high``. ``looks``: series -> colour
    and marker. ``rows``: their order, from the top.
    """
    rows = list(table["row"].unique() if rows is None else rows)
    looks = looks or dict(zip(table["series"].unique(), cycle(LOOKS), strict=False))
    # The series of a row share 0.6 of its height, so that neighbouring rows stay apart.
    series = table.groupby("row")["series"]
    number, count = series.transform(lambda s: pd.factorize(s)[0]), series.transform("nunique")
    heights = table["row"].map(rows.index) + 0.6 * ((number + 0.5) / count - 0.5)
    for name, own in table.assign(at=heights).groupby("series", sort=False):
        (colour, marker), at = looks[name], own["at"]
        if "low" in own:
            ends = 100 * own["low"], 100 * own["high"]
            ax.hlines(at, *ends, color=COLOURS[colour], linewidth=2, alpha=0.6)
        look = {"color": COLOURS[colour], "markersize": 6, "alpha": 0.85, "label": name}
        ax.plot(100 * own["estimate"], at, marker, **look)
    name_rows(ax, rows)
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)


def rows_and_series(table: pd.DataFrame) -> pd.DataFrame:
    """What :func:`dots` takes, from a table of rows x series."""
    table = table.rename_axis(index="row", columns="series")
    return table.stack(future_stack=True).rename("estimate").reset_index()


def dot_panels(
    panels: Mapping[str, pd.DataFrame],
    xlabel: str,
    title: str = "",
    looks: Mapping[str, tuple[str, str]] | None = None,
    rows: Sequence[str] | None = None,
    zero: bool = False,
) -> Figure:
    """A panel of :func:`dots` per table (or rows x series), with the same rows, as in the first one or as given.
    ``zero``: with a line at 0, for differences."""
    tables = {n: t if "series" in t else rows_and_series(t) for n, t in panels.items()}
    first = next(iter(tables.values()))
    rows = list(first["row"].unique() if rows is None else rows)
    size = (2 + 2.9 * len(tables), 0.34 * len(rows) + 1.6)
    figure, axes = subplots(1, len(tables), size, title, sharey=True)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        dots(ax, table, looks, rows)
        ax.set(title=name, xlabel=xlabel)
    if len(first) > len(rows):  # else the rows name the series
        drawn = {line.get_label(): line for ax in axes[0] for line in ax.lines}
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3)
    for ax in axes[0] if zero else ():
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    return figure


def forest(table: pd.DataFrame, title: str, baseline: str) -> Figure:
    """Paired differences with both intervals, a panel per metric; the numbers stand beside the marks, in points.

    ``table``: :meth:`clipad.studies.common.Scores.differences`. Thick: other images; thin: other categories as well;
    filled where the thin one leaves out 0. Rows far outside the others are cut off at the edge (arrow).
    """
    metrics, names = table["metric"].unique(), list(table["method"].unique())
    size = (1.8 + 3.1 * len(metrics), 0.36 * len(names) + 1.4)
    figure, axes = subplots(1, len(metrics), size, title, sharey=True)
    right = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("method").loc[names]
        size = rows["estimate"].abs()
        ordinary = rows[size <= max(4 * size.median(), 0.02)]
        ends = ordinary[["low_wide", "high_wide", "low", "high"]].abs().to_numpy()
        limit = 115 * float(np.nanmax(ends)) if np.isfinite(ends).any() else 1.0
        edge = 0.93 * limit  # a cut-off row's arrow stays in the panel
        for low, high, width in (("low_wide", "high_wide", 1.2), ("low", "high", 4)):
            ends = 100 * rows[low], 100 * rows[high]
            ax.hlines(range(len(rows)), *ends, color=NORMAL, linewidth=width)
        for place, row in enumerate(rows.itertuples()):
            wide, at = Interval(row.estimate, row.low_wide, row.high_wide), 100 * row.estimate
            ax.annotate(f"{wide:+}", (0.99, place - 0.36), fontsize=7.5, color="0.3", **right)
            marker = "o" if abs(at) <= edge else ">" if at > 0 else "<"
            fill = NORMAL if wide.verdict() in ("higher", "lower") else "white"
            ax.plot(np.clip(at, -edge, edge), place, marker, color=NORMAL, ms=6, mfc=fill)
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        ax.set(xlim=(-limit, limit), title=METRIC_NAMES.get(metric, metric))
        ax.set(xlabel=f"points against {baseline}")
        name_rows(ax, names)
        ax.spines["left"].set_visible(False)
    return figure


def growth(
    frames: Mapping[str, pd.DataFrame],
    metrics: Sequence[str],
    base: Mapping | None,
    title: str,
    looks: Mapping[str, tuple[str, str]] | None = None,
    unit: str = "percent",
) -> Figure:
    """Metrics (x 100) over a size, a column per frame, a row per metric: a dot per row, a line through their means.

    ``frames``: name of the axis -> rows, with the size as index; a "number of" something has a logarithmic axis.
    Columns ``low`` and ``high`` are the ends of intervals. ``base``: metric -> what the dashed line shows. ``looks``:
    series -> colour and marker; the frames' column ``series`` then says which a row belongs to.
    """
    size = (max(4 * len(frames), 5) + (1.6 if looks else 0), 2.1 * len(metrics) + 0.5)
    figure, axes = subplots(len(metrics), len(frames), size, title, sharey="row", sharex="col")
    looks = looks or {"": ("blue", "o")}
    for column, (name, frame) in zip(axes.T, frames.items(), strict=True):
        counted = name.startswith("number of")
        for ax, metric in zip(column, metrics, strict=True):
            for place, (series, (colour, marker)) in enumerate(looks.items()):
                own = frame[frame["series"] == series] if series else frame
                beside = 1.04 ** (place - (len(looks) - 1) / 2) if counted else 1
                own, colour = own.set_axis(own.index * beside), COLOURS[colour]
                means = 100 * own.groupby(level=0)[metric].mean()
                ax.plot(own.index, 100 * own[metric], marker, color=colour, alpha=0.4, ms=4)
                ax.plot(means, color=colour, marker=marker if series else "", label=series)
                if "low" in own:
                    ax.vlines(
                        own.index, 100 * own["low"], 100 * own["high"], color=colour, alpha=0.6
                    )
            if base is not None and metric in base:
                ax.axhline(100 * base[metric], color="0.4", linestyle="--", linewidth=1)
        ax.set_xlabel(name)
        if counted:
            sizes = sorted(set(frame.index))
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, sizes)
            ax.minorticks_off()
    for ax, metric in zip(axes[:, 0], metrics, strict=True):
        ax.set_ylabel(f"{METRIC_NAMES.get(metric, metric)},\n{unit}")
    if len(looks) > 1:
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
