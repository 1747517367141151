"""Figures: functions from data to a matplotlib Figure, and ``show``, which displays one with its alt text.

Heat maps share their limits over all panels of a method and use a perceptually uniform colour map; ground truth is a
white-on-black contour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import SVG, Image, Markdown, display
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from seaborn.utils import relative_luminance

from clipad.studies.common import METRIC_NAMES, Interval

_PALETTE = sns.color_palette("colorblind")
COLOURS = {
    name: _PALETTE[i]
    for name, i in (
        ("blue", 0),
        ("orange", 1),
        ("green", 2),
        ("red", 3),
        ("purple", 4),
        ("grey", 7),
    )
}
NORMAL, ANOMALOUS = COLOURS["blue"], COLOURS["orange"]
MAP = "inferno"


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


def _svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "clipad", "svg.fonttype": "path"}):
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Title": alt}
        )
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


def image_array(image, size: int) -> np.ndarray:
    """A PIL image as the model sees its shape: RGB, squashed to size x size, values 0-1."""
    return np.asarray(image.convert("RGB").resize((size, size))) / 255


def contour(ax, mask: np.ndarray) -> None:
    """Ground truth as a white line on a black one, visible on any map."""
    if mask is not None and mask.any():
        for colour, width in (("black", 1.6), ("white", 0.8)):
            ax.contour(mask, levels=[0.5], colors=[colour], linewidths=width)


def gallery(
    images: Sequence[np.ndarray],
    maps: Mapping[str, np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
    titles: Sequence[str] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Images in the first column, one column of heat maps per method, one row per image.

    ``images``: S x S x 3; ``maps``: per method N x S x S; ``masks``: N x S x S or None. The limits of a method are
    shared by its column (given, or 1st to 99.8th percentile of what is shown) and stand in its colour bar.
    """
    rows, columns = len(images), 1 + len(maps)
    figure = plt.figure(figsize=(1.75 * columns, 1.6 * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    # The colour bars have a row of their own, so that image and maps stand side by side at one size.
    axes = figure.subplots(rows + 1, columns, squeeze=False, height_ratios=[1] * rows + [0.05])
    for row in range(rows):
        axes[row, 0].imshow(images[row])
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], fontsize=8)
    axes[0, 0].set_title("image", fontsize=9)
    axes[rows, 0].axis("off")
    for column, (name, values) in enumerate(maps.items(), start=1):
        values = np.asarray(values)
        low, high = (limits or {}).get(name) or np.percentile(values, [1, 99.8])
        for row in range(rows):
            shown = axes[row, column].imshow(values[row], cmap=MAP, vmin=low, vmax=high)
            if masks is not None:
                contour(axes[row, column], masks[row])
        axes[0, column].set_title(name, fontsize=9)
        ticks = plt.MaxNLocator(3)
        bar = figure.colorbar(shown, cax=axes[rows, column], orientation="horizontal", ticks=ticks)
        bar.ax.tick_params(labelsize=7)
    for ax in axes[:rows].flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure


def columns(
    images: Sequence[np.ndarray],
    maps: Mapping[str, np.ndarray],
    masks: Sequence[np.ndarray] | None,
    titles: Sequence[str],
) -> Figure:
    """The same in landscape: a column per image, a row for the images and one per method, each with one scale."""
    figure, axes = plt.subplots(
        1 + len(maps), len(images), figsize=(2.15 * len(images) + 0.9, 2.05 * (1 + len(maps)) + 0.4),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, image, title in zip(axes[0], images, titles, strict=True):
        ax.imshow(image)
        ax.set_title(title, fontsize=9)
    for line, values in zip(axes[1:], maps.values(), strict=True):
        low, high = np.percentile(values, [1, 99.8])
        for ax, shown in zip(line, values, strict=True):
            drawn = ax.imshow(shown, cmap=MAP, vmin=low, vmax=high)
        figure.colorbar(drawn, ax=line, shrink=0.8, ticks=plt.MaxNLocator(3)).ax.tick_params(
            labelsize=8
        )
    for line, name in zip(
        axes, ["image, true defect", *(f"{name} map" for name in maps)], strict=True
    ):
        line[0].set_ylabel(name, fontsize=10)
        for k, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            if masks is not None:
                contour(ax, masks[k])
    return figure


def heatmap(values: pd.DataFrame, ax, fontsize: float = 8, **options) -> None:
    """seaborn's heat map with its numbers in black or white, whichever contrasts more with the colour below.

    seaborn writes white on half of all colours, which is hard to read on the lighter ones of them.
    """
    default = dict(
        vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".1f", cbar=False, linewidths=0.5
    )
    sns.heatmap(values, ax=ax, annot_kws={"fontsize": fontsize}, **default | options)
    colours = ax.collections[0]
    shown = np.asarray(values, dtype=float)
    for text in ax.texts:
        column, row = (int(place) for place in text.get_position())
        luminance = relative_luminance(colours.to_rgba(shown[row, column]))
        text.set_color("black" if luminance > 0.18 else "white")  # 0.18: equal contrast by WCAG 2
    ax.set(xlabel="", ylabel="")


def forest(
    table: pd.DataFrame,
    title: str,
    label: str = "method",
    baseline: str = "",
    highlight: Sequence[str] = (),
) -> Figure:
    """Paired differences with both intervals, a panel per metric; the numbers stand beside the marks, in points.

    ``table``: :meth:`clipad.studies.common.Scores.differences`. Thick: other images; thin: other categories as well;
    filled where the thin one leaves out 0. Rows far outside the others are cut off at the edge (arrow), so that they
    do not set the axis.
    """
    metrics, names = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table[label]))
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(1.8 + 3.1 * len(metrics), 0.36 * len(names) + 1.4),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric].set_index(label).loc[names]
        limit = _limit_of_most(rows)
        for place, (name, row) in enumerate(rows.iterrows()):
            colour = COLOURS["orange"] if name in highlight else COLOURS["blue"]
            _forest_row(ax, place, row, colour, limit)
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        ax.set(xlim=(-limit, limit), ylim=(len(names) - 0.4, -0.6))
        ax.set_title(METRIC_NAMES.get(metric, metric), fontsize=10)
        ax.set_xlabel(f"points{f' against {baseline}' if baseline else ''}", fontsize=9)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.tick_params(labelsize=9)
        sns.despine(ax=ax, left=True)
    figure.suptitle(title, fontsize=11)
    return figure


def _limit_of_most(rows: pd.DataFrame) -> float:
    """Half the width of the axis: the furthest end among rows of ordinary size, in points."""
    size = rows["estimate"].abs()
    ordinary = rows[size <= max(4 * size.median(), 0.02)]
    ends = ordinary[["low_wide", "high_wide", "low", "high"]].abs().to_numpy()
    return 115 * float(np.nanmax(ends)) if np.isfinite(ends).any() else 1.0


def _forest_row(ax, place: int, row: pd.Series, colour, limit: float) -> None:
    estimate = 100 * row["estimate"]
    told = f"{Interval(row['estimate'], row['low_wide'], row['high_wide']):+}"
    ax.annotate(
        told, (0.99, place - 0.36), xycoords=("axes fraction", "data"), ha="right", va="center",
        fontsize=7.5, color="0.3",
    )  # fmt: skip
    if abs(estimate) > limit:
        side = np.sign(estimate)
        ax.annotate(
            "", (side * limit, place), (side * 0.85 * limit, place),
            arrowprops={"arrowstyle": "-|>", "color": colour},
        )  # fmt: skip
        return
    for low, high, width in (("low_wide", "high_wide", 1.2), ("low", "high", 4)):
        ax.plot([100 * row[low], 100 * row[high]], [place] * 2, color=colour, linewidth=width)
    clear = row["low_wide"] > 0 or row["high_wide"] < 0
    ax.plot(estimate, place, "o", color=colour, mfc=colour if clear else "white", markersize=6)


def category_dots(
    table: pd.DataFrame, title: str, before: str, after: str, unit: str = "points"
) -> Figure:
    """Difference of two methods per category with its interval over images, textures and objects apart.

    ``table``: :meth:`clipad.studies.common.Scores.by_category` with a column ``metric``: a panel per metric.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    categories = table[table["metric"] == metrics[0]].sort_values(["group", "estimate"])
    order, group = (
        list(categories["category"]),
        dict(zip(categories["category"], categories["group"], strict=True)),
    )
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(1.6 + 3 * len(metrics), 0.3 * len(order) + 1.5),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("category").loc[order]
        for place, (name, row) in enumerate(rows.iterrows()):
            texture = group[name] == "textures"
            colour, marker = (COLOURS["green"], "s") if texture else (COLOURS["blue"], "o")
            ax.plot([100 * row["low"], 100 * row["high"]], [place] * 2, color=colour, linewidth=2)
            ax.plot(100 * row["estimate"], place, marker, color=colour, markersize=6)
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        ax.set_title(METRIC_NAMES.get(metric, metric), fontsize=10)
        ax.set_xlabel(f"{after} − {before}, {unit}", fontsize=9)
        ax.set_yticks(range(len(order)), [f"{c} ({group[c][:-1]})" for c in order], fontsize=9)
        ax.tick_params(labelsize=9)
        sns.despine(ax=ax)
    figure.suptitle(title, fontsize=11)
    return figure


def styled(table: pd.DataFrame, caption: str, name: str) -> pd.io.formats.style.Styler:
    """A results table for people: percent with one decimal, the mean row set off, identical in every run."""
    shown = (100 * table).rename(columns=METRIC_NAMES)
    last = {"selector": "tbody tr:last-child", "props": "border-top: 1px solid; font-weight: bold"}
    return (
        shown.style.format("{:.1f}", na_rep="–")
        .set_caption(f"{caption} (percent)")
        .set_uuid(name)
        .set_table_styles(
            [last, {"selector": "caption", "props": "text-align: left; padding: 4px 0"}]
        )
    )


def method_overview() -> Figure:
    """CLIP-AD in one figure, drawn by us after the paper's text and METHOD.md."""
    figure, ax = plt.subplots(figsize=(9.6, 4.5))
    ax.set(xlim=(0, 100), ylim=(0, 47))
    ax.axis("off")
    _text_side(ax)
    _image_side(ax)
    _combination(ax)
    return figure


def box(ax, x, y, width, height, text, colour, size=8, pad=0.4) -> None:
    """A rounded box with text, of a drawing: x, y is its lower left corner, colour a name of COLOURS."""
    face = sns.light_palette(COLOURS[colour], 5)[1]
    style = {"boxstyle": f"round,pad={pad}", "facecolor": face, "edgecolor": "0.25", "linewidth": 1}
    ax.add_patch(FancyBboxPatch((x, y), width, height, **style))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def _arrow(ax, start, end, colour="0.25"):
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": colour, "linewidth": 1.1}
    ax.add_patch(FancyArrowPatch(start, end, **style))


def _text_side(ax) -> None:
    box(ax, 1, 36, 16, 8, "198 normal +\n220 anomalous\nsentences", "orange")
    box(ax, 24, 36, 13, 8, "text encoder\n(frozen)", "grey")
    box(ax, 44, 36, 19, 8, "RVS: one vector\nper state\n(notebook 01)", "orange")
    _arrow(ax, (17.6, 40), (23.4, 40))
    _arrow(ax, (37.6, 40), (43.4, 40))


def _image_side(ax) -> None:
    green = COLOURS["green"]
    box(ax, 1, 12, 9, 14, "image\nS × S", "blue")
    _arrow(ax, (10.6, 24), (16.4, 24))
    for k in range(4):
        x = 17 + 12.5 * k
        blocks = f"blocks {3 * k + 1}–{3 * k + 3}\nq-k attention"
        path = "v-v attention\nrestarts here" if k else "v-v attention\nstarts here"
        box(ax, x, 21, 9.5, 6, blocks, "grey", 7)
        box(ax, x, 10, 9.5, 6, path, "green", 7)
        _arrow(ax, (x + 4.75, 20.4), (x + 4.75, 16.6), green)
        if k:
            _arrow(ax, (x - 2.4, 24), (x - 0.6, 24))
        _arrow(ax, (x + 4.75, 9.4), (x + 4.75, 6.2), green)
        ax.text(x + 4.75, 4.4, f"stage {k + 1}", ha="center", va="center", fontsize=7.5)
    ax.text(39.5, 29.4, "ordinary path = plain CLIP", ha="center", fontsize=8, color="0.25")
    ax.plot([17, 64.6], [2.6, 2.6], color=green, linewidth=1.1)
    ax.text(39.5, 0.4, "surgery path, staged (notebook 03)", ha="center", fontsize=8, color=green)


def _combination(ax) -> None:
    surgery = "feature surgery:\nsimilarities minus\nwhat both states\nshare, summed"
    box(ax, 70, 21, 12, 9, "class token\n× text =\nclass probability", "orange", 7.5)
    box(ax, 70, 4, 12, 12, surgery, "green", 7.5)
    box(ax, 87.5, 4, 11.5, 12, "anomaly map\nSDP\n+ linear layers\n= SDP+ (04)", "blue", 7.5)
    box(ax, 87.5, 21, 11.5, 9, "image score", "blue", 7.5)
    _arrow(ax, (64.6, 24), (69.4, 25))
    _arrow(ax, (64.6, 2.6), (69.4, 8), COLOURS["green"])
    _arrow(ax, (82.6, 10), (86.9, 10))
    _arrow(ax, (82.6, 25.5), (86.9, 25.5))
    _arrow(ax, (93.2, 16.6), (93.2, 20.4))
    _arrow(ax, (63.6, 40), (76, 30.6))
    ax.plot([66.7, 66.7, 69.4], [37.6, 13, 13], color="0.25", linewidth=1.1)
    _arrow(ax, (68.8, 13), (69.4, 13))
