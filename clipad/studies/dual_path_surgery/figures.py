"""Figures of notebook 03: the dual-path block, where a patch looks, and the ablation with its intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from clipad.datasets import Dataset, Sample, read_image
from clipad.evaluation import read_masks
from clipad.studies.figures import COLOURS, MAP, METRIC_NAMES, contour, gallery, image_array

DUAL_PATH_BLOCK = (
    "Flow chart of one block. The ordinary path adds q-k attention a, then the MLP, to x. The surgery path takes v, "
    "mixes it by v-v attention and the same output projection to s, adds s to the path, and restarts at blocks 0, L/4, "
    "L/2 and 3L/4. A stage feature joins the ordinary class token and the surgery path's patch tokens; ln_post and "
    "projection follow."
)
KINDS = {"q-k": COLOURS["grey"], "v-v": COLOURS["green"]}


def dual_path_block() -> Figure:
    """One block of the dual path, and how a stage is read; drawn by us after METHOD.md section 4."""
    figure, ax = plt.subplots(figsize=(9.6, 4.0))
    ax.set(xlim=(0, 100), ylim=(0, 42))
    ax.axis("off")
    grey, green, blue = (sns.light_palette(COLOURS[c], 5)[1] for c in ("grey", "green", "blue"))
    dark = "0.25"

    def box(x, y, w, h, text, colour):
        ax.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.3", facecolor=colour, edgecolor=dark)
        )
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8)

    def line(*points, colour=dark, head=True):
        xs, ys = zip(*points, strict=True)
        ax.plot(xs[: -1 if head else None], ys[: -1 if head else None], color=colour, linewidth=1.1)
        if head:
            style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": colour, "linewidth": 1.1}
            ax.add_patch(FancyArrowPatch(points[-2], points[-1], shrinkA=0, shrinkB=0, **style))

    def plus(x, y, colour=dark):
        ax.text(x, y, "+", ha="center", va="center", fontsize=10, zorder=3)
        ax.add_patch(plt.Circle((x, y), 1.25, facecolor="white", edgecolor=colour, zorder=2))

    # ordinary path
    ax.text(1, 40, "ordinary path = plain CLIP", fontsize=9, color=dark)
    ax.text(0, 33, "$x$", fontsize=11, va="center")
    line((2.5, 33), (69.5, 33), head=False)
    line((69.5, 33), (75.5, 33))
    box(6, 24, 6, 4, "ln_1", grey)
    box(16, 22, 8, 8, "in_proj\n$q,\\ k,\\ v$", grey)
    box(29, 23.5, 15, 5, "softmax($qk^T/\\sqrt{d}$) $v$", grey)
    box(48.5, 23.5, 7.5, 5, "out_proj", grey)
    box(63, 23.5, 9, 5, "ln_2, MLP", grey)
    line((9, 33), (9, 28.5))
    line((12.4, 26), (15.6, 26))
    line((24.4, 26), (28.6, 26))
    line((44.4, 26), (48.1, 26))
    line((56.4, 26), (59, 26), (59, 31.7))
    plus(59, 33)
    ax.text(57.6, 29.6, "$a$", fontsize=10, ha="right")
    line((64.5, 33), (64.5, 29.1))
    line((72.4, 26), (76.8, 26), (76.8, 31.7))
    plus(76.8, 33)
    line((78.1, 33), (97, 33))
    ax.text(98, 33, "$x$", fontsize=11, va="center")
    # surgery path
    colour = COLOURS["green"]
    box(29, 11.5, 15, 5, "softmax($vv^T/\\sqrt{d}$) $v$", green)
    box(48.5, 11.5, 7.5, 5, "out_proj", green)
    line((20, 21.6), (20, 14), (28.6, 14), colour=colour)
    ax.text(19, 17.5, "$v$", fontsize=10, ha="right", color=colour)
    line((44.4, 14), (48.1, 14), colour=colour)
    line((56.4, 14), (59, 14), (59, 7.3), colour=colour)
    ax.text(57.6, 9.2, "$s$", fontsize=10, ha="right", color=colour)
    plus(59, 6, colour)
    ax.text(0, 6, "path", fontsize=10, va="center", color=colour)
    line((5.5, 6), (33, 6), head=False, colour=colour)
    line((39, 6), (57.7, 6), colour=colour)
    ax.plot([33, 38.3], [6, 9], color=colour, linewidth=1.6)
    ax.text(
        36,
        2.5,
        "restart: open at blocks $0,\\ L/4,\\ L/2,\\ 3L/4$",
        fontsize=8,
        ha="center",
        color=colour,
    )
    ax.text(48.2, 18.2, "same weights", fontsize=7.5, ha="left", color=dark)
    ax.text(52.2, 20.1, "↕", fontsize=9, ha="center", va="center", color=dark)
    line((60.3, 6), (97, 6), colour=colour)
    ax.text(98, 6, "path", fontsize=10, va="center", color=colour)
    ax.text(64, 2.5, "no feed-forward part", fontsize=8, color=colour)
    # reading a stage
    box(
        80.5,
        13.5,
        16,
        9.5,
        "stage feature $f^{\\,j}$\nln_post, projection\n$B\\times(N{+}1)\\times C$",
        blue,
    )
    line((90.5, 33), (90.5, 23.5), colour=dark)
    ax.text(91.2, 28, "class\ntoken", fontsize=8, va="center")
    line((84.5, 6), (84.5, 13), colour=colour)
    ax.text(85.2, 9.5, "patch tokens", fontsize=8, va="center", color=colour)
    return figure


def attention_of_patch(
    sample: Sample,
    image_size: int,
    patch: int,
    weights: Mapping[int, tuple[np.ndarray, np.ndarray]],
    reach: pd.DataFrame | None = None,
) -> Figure:
    """Where one patch looks, q-k above v-v, in some blocks; beside it medians over many patches, block by block.

    ``patch``: its index row by row; ``weights``: 1-based block -> the
    two rows of attention weights over all tokens, class token first; ``reach``: the table of
    :func:`attention_reach`, or None where there are no masks. All maps share one square-root scale
    that ends at the largest weight on another patch.
    """
    image, mask = (
        image_array(read_image(sample.image_path), image_size),
        read_masks([sample], image_size)[0],
    )
    grid = round((len(next(iter(weights.values()))[0]) - 1) ** 0.5)
    step = len(image) / grid
    top = max(np.delete(row[1:], patch).max() for pair in weights.values() for row in pair)
    n = 1 + len(weights)
    width = 1.55 * n + (3.2 if reach is not None else 0)
    figure = plt.figure(figsize=(width, 3.9), layout="constrained")
    left, right = (
        figure.subfigures(1, 2, width_ratios=[1.55 * n, 3.2], wspace=0.02)
        if reach is not None
        else (figure, None)
    )
    if reach is None:
        left.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    axes = left.subplots(2, n, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for row, kind in enumerate(KINDS):
        axes[row, 0].imshow(image, extent=(0, len(image), len(image), 0))
        contour(axes[row, 0], mask)
        axes[row, 0].set_ylabel(f"{kind} attention", fontsize=9)
        for ax, (block, pair) in zip(axes[row, 1:], weights.items(), strict=True):
            shown = ax.imshow(
                pair[row][1:].reshape(grid, grid),
                cmap=MAP,
                norm=PowerNorm(0.5, 0, top),
                extent=(0, len(image), len(image), 0),
            )
            if mask.any():
                ax.contour(mask, levels=[0.5], colors="white", linewidths=0.7)
            axes[0, 0].set_title("image", fontsize=9)
            if row == 0:
                ax.set_title(f"block {block}", fontsize=9)
        for ax in axes[row]:
            corner = (patch % grid * step, patch // grid * step)
            ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor="cyan", linewidth=1.6))
            ax.set(xticks=[], yticks=[], xlim=(0, len(image)), ylim=(len(image), 0))
    bar = left.colorbar(shown, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.locator = plt.MaxNLocator(4)
    bar.update_ticks()
    bar.set_label("attention weight, one scale for all", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if reach is not None:
        _reach_curves(right, reach)
    return figure


def _reach_curves(figure, reach: pd.DataFrame) -> None:
    labels = {
        "lift": "attention on rest of\ndefect (1 = chance)",
        "spread": "number of patches\nlooked at",
    }
    axes = figure.subplots(2, 1, sharex=True)
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for (kind, colour), marker in zip(KINDS.items(), "os", strict=True):
            ax.plot(
                reach.index,
                reach[kind, column],
                color=colour,
                marker=marker,
                markersize=4,
                label=kind,
            )
        if column == "lift":
            ax.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
        ax.set_ylim(bottom=0)
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
        sns.despine(ax=ax)
    axes[0].legend(fontsize=8, frameon=False, ncol=2, loc="lower right", bbox_to_anchor=(1, 0.98))
    axes[1].set_xlabel("block", fontsize=8)


def reach_in_words(reach: pd.DataFrame | None) -> str:
    """Medians over blocks of :func:`attention_reach`, as a sentence."""
    if reach is None:
        return "No masks: no curves."
    m = reach.median()
    return (
        f"Medians over blocks: {m['q-k', 'lift']:.1f} times chance on the defect with q-k, {m['v-v', 'lift']:.1f} with "
        f"v-v attention; {m['q-k', 'spread']:.0f} against {m['v-v', 'spread']:.0f} patches looked at."
    )


def ablation_forest(
    tables: Mapping[str, pd.DataFrame], groups: Mapping[str, str], baseline: str = "SDP"
) -> Figure:
    """Difference of every variant to SDP with both intervals, one panel per metric; the mean stands beside it.

    ``tables``: metric -> :meth:`Ablation.intervals`; ``groups``: variant -> group, in order. Thick:
    other images of the same categories; thin: other categories as well.
    """
    names = list(groups)
    colours = dict(
        zip(
            dict.fromkeys(groups.values()),
            ("grey", "blue", "purple", "orange", "green"),
            strict=False,
        )
    )
    markers = dict(zip(colours, "Xosd*", strict=False))
    y, at = {}, 0.0
    for i, name in enumerate(names):  # a gap between groups
        at += 1.0 + (0.6 if i and groups[name] != groups[names[i - 1]] else 0)
        y[name] = at
    figure, axes = plt.subplots(
        1, len(tables), figsize=(3.0 + 2.6 * len(tables), 0.25 * at + 1.1), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (metric, table) in zip(axes[0], tables.items(), strict=True):
        ax.axvline(0, color="0.35", linewidth=1, linestyle="--", zorder=0)
        for name in names:
            row, group = 100 * table.loc[name], groups[name]
            colour = COLOURS[colours[group]]
            for kind, width in (("both", 1.1), ("images", 3.6)):
                ends = [row[f"difference_low_{kind}"], row[f"difference_high_{kind}"]]
                ax.plot(ends, [y[name]] * 2, color=colour, linewidth=width, solid_capstyle="butt")
            size = 12 if name == baseline else 7
            ax.plot(
                row["difference"],
                y[name],
                markers[group],
                color=colour,
                markersize=size,
                markeredgecolor="white",
            )
            ax.text(
                1.0, y[name], f"{row['mean']:.1f}", transform=ax.get_yaxis_transform(), fontsize=7.5, ha="right",
                va="center", color="0.3",
            )  # fmt: skip
        low, high = ax.get_xlim()
        ax.set_xlim(low, high + 0.22 * (high - low))  # room for the means
        ax.text(
            1.0,
            -0.1,
            "mean, %",
            transform=ax.get_yaxis_transform(),
            fontsize=7.5,
            ha="right",
            color="0.3",
        )
        ax.set_title(METRIC_NAMES[metric], fontsize=10)
        ax.set_xlabel(f"difference to {baseline}, points", fontsize=8)
        ax.grid(axis="x", color="0.92")
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
        ax.tick_params(axis="y", length=0)
        sns.despine(ax=ax, left=True)
    axes[0, 0].set_yticks(list(y.values()), names)
    axes[0, 0].set_ylim(at + 0.7, -0.4)
    for group, colour in colours.items():
        own = [y[name] for name in names if groups[name] == group]
        place = {
            "transform": axes[0, -1].get_yaxis_transform(),
            "va": "center",
            "color": COLOURS[colour],
        }
        axes[0, -1].text(1.06, np.mean(own), textwrap.fill(group, 20), fontsize=8, **place)
    return figure


def in_words(
    tables: Mapping[str, pd.DataFrame],
    names: Sequence[str],
    baseline: str = "SDP",
    kind: str = "both",
) -> str:
    """Differences to the baseline as a Markdown list, in points: estimate, interval, and whether it leaves out 0.

    ``tables``: metric -> :meth:`Ablation.intervals`; ``kind`` of interval: ``both`` or ``images``.
    """
    lines = []
    for name in names:
        said = []
        for metric, table in tables.items():
            row = 100 * table.loc[name]
            low, high = row[f"difference_low_{kind}"], row[f"difference_high_{kind}"]
            verdict = "higher" if low > 0 else "lower" if high < 0 else "not told apart"
            label = METRIC_NAMES[metric]
            said.append(f"{label} {row['difference']:+.1f} [{low:+.1f}, {high:+.1f}] {verdict}")
        lines.append(f"* **{name}** against {baseline}: {'; '.join(said)}")
    return "\n".join(lines)


def gallery_of(
    dataset: Dataset,
    indices: Sequence[int],
    maps: Mapping[str, np.ndarray],
    limits: tuple | None = None,
) -> Figure:
    """:func:`gallery` for images of a data set; ``limits`` are shared by all columns of maps, if given."""
    samples = [dataset[i] for i in indices]
    size = next(iter(maps.values())).shape[-1]
    return gallery(
        [image_array(read_image(s.image_path), size) for s in samples],
        maps,
        read_masks(samples, size),
        [f"{s.category}\n{s.defect}" for s in samples],
        dict.fromkeys(maps, limits) if limits else None,
    )


def shared_limits(maps: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """One scale for several columns of maps."""
    return tuple(np.percentile(np.stack(list(maps.values())), [1, 99.8]))
