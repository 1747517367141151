"""Figures of notebook 03: six tokens, the dual-path block, where a patch looks, and maps beside one another."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from clipad.studies.dual_path_surgery import Example
from clipad.studies.figures import COLOURS, MAP, box

DUAL_PATH_BLOCK = (
    "One block of the dual path. Ordinary path (grey): q-k attention gives a, added to x, then the MLP. Surgery path "
    "(green): the same v, mixed by v-v attention, through the same output projection (and ls_1) gives s, added to the "
    "path; the switch opens at blocks 0, L/4, L/2 and 3L/4, where the path restarts with s alone. A stage feature "
    "(blue) takes the class token from the ordinary path and the patch tokens from the surgery path."
)
KINDS = {"q-k": COLOURS["grey"], "v-v": COLOURS["green"]}
SIGNED = "RdBu_r"
"""for values with a sign: white is 0, red anomalous"""


DARK = "0.25"
_box = functools.partial(box, pad=0.3)


def _line(ax, *points, colour=DARK, head=True):
    xs, ys = zip(*points, strict=True)
    ax.plot(xs[: -1 if head else None], ys[: -1 if head else None], color=colour, linewidth=1.1)
    if head:
        style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": colour, "linewidth": 1.1}
        ax.add_patch(FancyArrowPatch(points[-2], points[-1], shrinkA=0, shrinkB=0, **style))


def _plus(ax, x, y, colour=DARK):
    ax.text(x, y, "+", ha="center", va="center", fontsize=10, zorder=3)
    ax.add_patch(plt.Circle((x, y), 1.25, facecolor="white", edgecolor=colour, zorder=2))


def dual_path_block() -> Figure:
    """One block of the dual path, and how a stage is read; drawn by us after METHOD.md section 4."""
    figure, ax = plt.subplots(figsize=(9.6, 4.0))
    ax.set(xlim=(0, 100), ylim=(0, 42))
    ax.axis("off")
    _ordinary_path(ax)
    _surgery_path(ax)
    _stage_reading(ax)
    return figure


def _ordinary_path(ax) -> None:
    # ordinary path
    ax.text(1, 40, "ordinary path = plain CLIP", fontsize=9, color=DARK)
    ax.text(0, 33, "$x$", fontsize=11, va="center")
    _line(ax, (2.5, 33), (69.5, 33), head=False)
    _line(ax, (69.5, 33), (75.5, 33))
    _box(ax, 6, 24, 6, 4, "ln_1", "grey")
    _box(ax, 16, 22, 8, 8, "in_proj\n$q,\\ k,\\ v$", "grey")
    _box(ax, 29, 23.5, 15, 5, "softmax($qk^T/\\sqrt{d}$) $v$", "grey")
    _box(ax, 48.5, 23.5, 7.5, 5, "out_proj\nls_1", "grey")
    _box(ax, 63, 23.5, 9, 5, "ln_2, MLP", "grey")
    _line(ax, (9, 33), (9, 28.5))
    _line(ax, (12.4, 26), (15.6, 26))
    _line(ax, (24.4, 26), (28.6, 26))
    _line(ax, (44.4, 26), (48.1, 26))
    _line(ax, (56.4, 26), (59, 26), (59, 31.7))
    _plus(ax, 59, 33)
    ax.text(57.6, 29.6, "$a$", fontsize=10, ha="right")
    _line(ax, (64.5, 33), (64.5, 29.1))
    _line(ax, (72.4, 26), (76.8, 26), (76.8, 31.7))
    _plus(ax, 76.8, 33)
    _line(ax, (78.1, 33), (97, 33))
    ax.text(98, 33, "$x$", fontsize=11, va="center")


def _surgery_path(ax) -> None:
    # surgery path
    colour = COLOURS["green"]
    _box(ax, 29, 11.5, 15, 5, "softmax($vv^T/\\sqrt{d}$) $v$", "green")
    _box(ax, 48.5, 11.5, 7.5, 5, "out_proj\nls_1", "green")
    _line(ax, (20, 21.6), (20, 14), (28.6, 14), colour=colour)
    ax.text(19, 17.5, "$v$", fontsize=10, ha="right", color=colour)
    _line(ax, (44.4, 14), (48.1, 14), colour=colour)
    _line(ax, (56.4, 14), (59, 14), (59, 7.3), colour=colour)
    ax.text(57.6, 9.2, "$s$", fontsize=10, ha="right", color=colour)
    _plus(ax, 59, 6, colour)
    ax.text(0, 6, "path", fontsize=10, va="center", color=colour)
    _line(ax, (5.5, 6), (33, 6), head=False, colour=colour)
    _line(ax, (39, 6), (57.7, 6), colour=colour)
    ax.plot([33, 38.3], [6, 9], color=colour, linewidth=1.6)
    ax.text(
        36,
        2.5,
        "restart: open at blocks $0,\\ L/4,\\ L/2,\\ 3L/4$",
        fontsize=8,
        ha="center",
        color=colour,
    )
    ax.text(48.2, 18.2, "same weights", fontsize=7.5, ha="left", color=DARK)
    ax.text(52.2, 20.1, "↕", fontsize=9, ha="center", va="center", color=DARK)
    _line(ax, (60.3, 6), (97, 6), colour=colour)
    ax.text(98, 6, "path", fontsize=10, va="center", color=colour)
    ax.text(64, 2.5, "no feed-forward part", fontsize=8, color=colour)


def _stage_reading(ax) -> None:
    # reading a stage
    _box(
        ax,
        80.5,
        13.5,
        16,
        9.5,
        "stage feature $F$\nln_post, projection\n$B\\times(N{+}1)\\times C$",
        "blue",
    )
    _line(ax, (90.5, 33), (90.5, 23.5), colour=DARK)
    ax.text(91.2, 28, "class\ntoken", fontsize=8, va="center")
    _line(ax, (84.5, 6), (84.5, 13), colour=COLOURS["green"])
    ax.text(85.2, 9.5, "patch tokens", fontsize=8, va="center", color=COLOURS["green"])


def six_tokens(v: np.ndarray, weights: Mapping[str, np.ndarray]) -> tuple[Figure, str]:
    """The six vectors v (6 x 2; the last two are the defect's) and attention weights, 6 x 6 each; and the caption."""
    n = len(weights)
    figure, axes = plt.subplots(
        1, 1 + n, figsize=(2.3 * (1 + n), 2.7), layout="constrained", width_ratios=[1.1] + [1] * n
    )
    for token, (x, y) in enumerate(v):
        colour = COLOURS["orange"] if token >= 4 else COLOURS["blue"]
        axes[0].annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour})
        axes[0].annotate(str(token), (x, y), fontsize=9, xytext=(3, 1), textcoords="offset points")
    axes[0].set(xlim=(-1, 2.7), ylim=(-0.8, 2.1), title="values $v$", aspect="equal")
    axes[0].title.set_fontsize(10)
    axes[0].tick_params(labelsize=8)
    sns.despine(ax=axes[0])
    for ax, (name, w) in zip(axes[1:], weights.items(), strict=True):
        sns.heatmap(
            100 * w, ax=ax, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".0f", cbar=False,
            square=True, annot_kws={"fontsize": 8},
        )  # fmt: skip
        for line in (ax.axhline, ax.axvline):
            line(4, color="white", linewidth=2)
        ax.set_title(name, fontsize=10)
        ax.tick_params(labelsize=8, length=0)
    axes[1].set_ylabel("token that looks", fontsize=9)
    axes[1].set_xlabel("token looked at", fontsize=9)
    told = ", ".join(
        f"{name} {100 * w[4:, 4:].sum(axis=1).mean():.0f}" for name, w in weights.items()
    )
    return figure, (
        "Left: the six values; 4 and 5 (orange) are the defect's. Then attention weights in percent, a row per token "
        f"that looks. Of the defect's own attention this stays on the defect, in percent: {told}."
    )


def attention_of_patch(
    example: Example, weights: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> tuple[Figure, str]:
    """Where the example's patch looks, q-k above v-v, in some blocks, and the caption.

    ``weights``: 0-based block -> the two rows of attention weights over all tokens, class token first.
    """
    grid = round((len(next(iter(weights.values()))[0]) - 1) ** 0.5)
    side, step = len(example.pixels), len(example.pixels) / grid
    extent = (0, side, side, 0)
    top = max(np.delete(row[1:], example.patch).max() for pair in weights.values() for row in pair)
    figure, axes = plt.subplots(
        2, 1 + len(weights), figsize=(2.2 * (1 + len(weights)), 4.6), layout="constrained"
    )
    for row, kind in enumerate(KINDS):
        axes[row, 0].imshow(example.pixels, extent=extent)
        axes[row, 0].set_ylabel(f"{kind} attention", fontsize=10)
        for ax, (block, pair) in zip(axes[row, 1:], weights.items(), strict=True):
            values = pair[row][1:].reshape(grid, grid)
            shown = ax.imshow(values, cmap=MAP, norm=PowerNorm(0.5, 0, top), extent=extent)
            ax.set_title("" if row else f"block {block}", fontsize=10)
        for ax in axes[row]:
            corner = (example.patch % grid * step, example.patch // grid * step)
            ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor="cyan", linewidth=1.5))
            _outline(ax, example.mask)
            ax.set(xticks=[], yticks=[], xlim=(0, side), ylim=(side, 0))
    bar = figure.colorbar(shown, ax=axes[:, 1:], location="bottom", shrink=0.6, aspect=40)
    bar.set_label("attention weight (square-root scale, one for all)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    caption = (
        f"What the marked patch (cyan) of a {example.category}, {example.defect}, takes from every other patch, "
        f"mean over heads; the defect is outlined. Blocks {', '.join(map(str, weights))}, counted from 0."
    )
    return figure, caption


def attention_by_block(tables: Mapping[str, pd.DataFrame]) -> tuple[Figure, str]:
    """Share of a defect patch's attention on the rest of the defect, per block: mean over images; and the caption.

    ``tables``: ``trained`` and ``untrained``, :func:`clipad.studies.dual_path_surgery.defect_attention`.
    """
    figure, ax = plt.subplots(figsize=(7.2, 3.1), layout="constrained")
    for network, table in tables.items():
        by_block = 100 * table.groupby("block")[["q-k", "v-v", "uniform"]].mean()
        for (kind, colour), marker in zip(KINDS.items(), "os", strict=True):
            blind = network == "untrained"
            ax.plot(
                by_block.index, by_block[kind], color=colour, marker=marker, markersize=5,
                linestyle=":" if blind else "-", mfc="white" if blind else colour,
                label=f"{kind}{', untrained' if blind else ''}",
            )  # fmt: skip
    ax.axhline(
        by_block["uniform"].mean(), color="0.3", linewidth=0.8, linestyle="--",
        label="everywhere alike",
    )  # fmt: skip
    ax.set(xlabel="block", ylabel="attention on the\nrest of the defect, %", ylim=(0, None))
    ax.set_xticks(by_block.index)
    ax.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title("How much a defect's patch takes from the rest of the defect", fontsize=11)
    sns.despine(ax=ax)
    images = len(table[["category", "image"]].drop_duplicates())
    return figure, (
        f"Mean over {images} anomalous images, per block. Solid: this CLIP. Dotted: the same architecture with random "
        "weights. Dashed: the share if a patch looked everywhere alike."
    )


def beside(
    examples: Example | Sequence[Example],
    maps: Mapping[str, np.ndarray],
) -> tuple[Figure, str]:
    """Maps of one or several images side by side, a row per image, and their caption with the numbers.

    ``maps``: name -> E x S x S. Values with a sign are drawn around 0 (red: anomalous), sums of probabilities, which
    are never negative, from 0 on. Every column has its own scale.
    """
    examples = [examples] if isinstance(examples, Example) else list(examples)
    rows, columns = len(examples), 1 + len(maps)
    figure = plt.figure(figsize=(1.85 * columns, 2.05 * rows + 0.5), layout="constrained")
    # The colour bars have a row of their own, so that image and maps stand side by side at one size.
    *axes, bars = figure.subplots(
        rows + 1, columns, squeeze=False, height_ratios=[1] * rows + [0.05]
    )
    axes = np.stack(axes)
    bars[0].axis("off")
    told = []
    for row, example in enumerate(examples):
        axes[row, 0].imshow(example.pixels)
        _outline(axes[row, 0], example.mask)
        axes[row, 0].set_ylabel(f"{example.category}, {example.defect}", fontsize=9)
    for column, (name, values) in enumerate(maps.items(), start=1):
        top = np.abs(values).max()
        limits = {"vmin": -top, "vmax": top, "cmap": SIGNED}
        if values.min() >= 0:
            limits = {"vmin": 0, "vmax": np.ceil(top), "cmap": MAP}
        for row, example in enumerate(examples):
            shown = axes[row, column].imshow(values[row], **limits)
            auroc = example.auroc(values[row])
            if auroc is not None:
                axes[row, column].set_xlabel(f"AUROC {auroc:.0f}", fontsize=9)
                told.append(f"{example.category + ' ' if rows > 1 else ''}{name} {auroc:.0f}")
        axes[0, column].set_title(name, fontsize=10)
        ticks = plt.MaxNLocator(3)
        bar = figure.colorbar(shown, cax=bars[column], orientation="horizontal", ticks=ticks)
        bar.ax.tick_params(labelsize=8)
    axes[0, 0].set_title("image", fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    numbers = f" Pixel AUROC inside the image: {', '.join(told)}." if told else ""
    outlined = "Defect outlined in the image. " if told else ""
    colours = []
    if any(values.min() < 0 for values in maps.values()):
        colours.append("red is anomalous, white 0, blue normal")
    if any(values.min() >= 0 for values in maps.values()):
        colours.append("bright is anomalous")
    told = f"In the maps {', or '.join(colours)}. Each column has its own scale."
    return figure, outlined + told + numbers


def _outline(ax, mask) -> None:
    """The defect's edge as one thin line just outside it."""
    if mask is not None and mask.any():
        ax.contour(mask, levels=[0.01], colors=["black"], linewidths=1.6)
        ax.contour(mask, levels=[0.01], colors=["white"], linewidths=0.8)


def chance(controls: pd.DataFrame) -> tuple[Figure, str]:
    """Mean pixel AUROC of variants, found and under ignorance, and the caption.

    ``controls``: :func:`clipad.studies.dual_path_surgery.control_aurocs`.
    """
    names = [column for column in controls.columns if column != "control"]
    marks = {
        "shuffled states": ("o", COLOURS["grey"], 5), "untrained": ("^", COLOURS["blue"], 6),
        "found": ("D", COLOURS["orange"], 8),
    }  # fmt: skip
    figure, ax = plt.subplots(figsize=(7.2, 0.55 * len(names) + 1.2), layout="constrained")
    told = []
    for control, (marker, colour, size) in marks.items():
        rows = controls[controls["control"] == control]
        for place, name in enumerate(names):
            shift = {"untrained": 0.2, "found": 0}.get(control, -0.2)
            ax.plot(
                100 * rows[name], [place + shift] * len(rows), marker, color=colour,
                markersize=size, alpha=0.8, label=control if not place else None,
            )  # fmt: skip
            low, high = 100 * rows[name].min(), 100 * rows[name].max()
            many = f"{low:.0f} to {high:.0f}" if len(rows) > 1 else f"{low:.0f}"
            told.append(f"{name}, {control}: {many}")
    ax.axvline(50, color="0.3", linewidth=0.8, linestyle="--")
    ax.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="pixel AUROC, mean over categories")
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title("What a map reaches that knows nothing", fontsize=11)
    sns.despine(ax=ax)
    return figure, (
        "Diamond: this CLIP with its text. Dots: the same features with the sentences dealt to the states at random. "
        f"Triangles: untrained networks. Dashed: 50. {'; '.join(told)}."
    )
