"""Figures of notebook 04: the joint space before and after the layers, losses, and what training changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from clipad.studies.figures import ANOMALOUS, COLOURS, METRIC_NAMES, NORMAL, heatmap
from clipad.studies.sdp_plus_fine_tuning import SATURATED, JointSpace, Summands

LINES = {
    "SDP": (COLOURS["grey"], "s"),
    "SDP+": (COLOURS["green"], "o"),
    "layers alone": (COLOURS["purple"], "^"),
    "logit fusion": (COLOURS["red"], "D"),
}
STATES = (("normal", NORMAL, "o"), ("anomalous", ANOMALOUS, "^"))


def joint_space(space: JointSpace, before: str, after: str) -> Figure:
    """The paper's Figure 2: patches and text in the joint space under two mappings.

    Above, one PCA of both sets of patches and of the text vectors together, drawn once per mapping on equal axes.
    Below, the plane that the category's two text vectors span, where nothing is fitted.
    """
    text = np.concatenate([vectors.T.numpy() for vectors in space.text.values()])
    pca = PCA(2, svd_solver="full").fit(
        np.concatenate([*(space.patches[n] for n in (before, after)), text])
    )
    kept = 100 * pca.explained_variance_ratio_.sum()
    figure, axes = plt.subplots(
        2, 2, figsize=(8.6, 7.2), layout="constrained", sharex="row", sharey="row"
    )
    order = np.random.default_rng(0).permutation(
        len(space.labels)
    )  # so that neither state covers the other
    plane_text = _text_in_plane(space)
    for column, name in enumerate((before, after)):
        panels = (
            (pca.transform(space.patches[name].numpy()), pca.transform(text).reshape(-1, 2, 2)),
        )
        panels += ((space.in_text_plane(name), plane_text),)
        for row, (points, vectors) in enumerate(panels):
            ax = axes[row, column]
            for state, (label, colour, marker) in enumerate(STATES):
                own = order[space.labels[order] == state]
                ax.scatter(
                    *points[own].T,
                    s=9,
                    color=colour,
                    marker=marker,
                    alpha=0.35,
                    linewidth=0,
                    label=f"{label} patch",
                )
            for state, (label, colour, marker) in enumerate(STATES):
                ax.scatter(
                    *vectors[:, state].T, s=70, color=colour, marker=marker, edgecolor="black", linewidth=1,
                    label=f"{label} text",
                )  # fmt: skip
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes[1, column].set_xlabel("along $t_1 - t_0$  (right: nearer to anomalous)", fontsize=9)
        axes[0, column].set_xlabel("first component", fontsize=9)
    axes[0, 0].set_ylabel(
        f"second component\n(one PCA for both, {kept:.0f} % of variance)", fontsize=9
    )
    axes[1, 0].set_ylabel("along $t_0 + t_1$  (up: nearer to the text)", fontsize=9)
    legend = axes[0, 0].legend(fontsize=8, loc="best", framealpha=0.9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    sns.despine(figure)
    return figure


def _text_in_plane(space: JointSpace) -> np.ndarray:
    """Categories x 2 states x 2: where the text vectors lie in their own plane."""
    cosines = np.array([float(t[:, 0] @ t[:, 1]) for t in space.text.values()])
    x, y = np.sqrt((1 - cosines) / 2), np.sqrt((1 + cosines) / 2)
    return np.stack([np.stack([-x, y], axis=1), np.stack([x, y], axis=1)], axis=1)


def loss_curves(logs: Mapping[str, pd.DataFrame], used: int) -> Figure:
    """Focal and Dice loss per epoch, a line per training; the dashed line is the epoch that is used."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.1), layout="constrained")
    for ax, part in zip(axes, ("focal", "dice"), strict=True):
        for (name, log), (colour, marker) in zip(logs.items(), LINES.values(), strict=False):
            ax.plot(log["epoch"], log[part], color=colour, marker=marker, markersize=4, label=name)
        ax.axvline(used, color="0.5", linestyle="--", linewidth=1)
        ax.set(xlabel="epoch", ylabel=f"{part} loss, sum over stages")
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes[1].legend(fontsize=8)
    sns.despine(figure)
    return figure


def differences(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Paired differences in points with their 95 % intervals, a panel per comparison, a row per metric."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(1.2 + 4.0 * len(tables), 3.2), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        places = np.arange(len(table))[::-1]
        ax.axvline(0, color="0.4", linewidth=1)
        for suffix, width, colour, label in (
            ("_both", 2, "0.65", "images and categories drawn anew"),
            ("", 5, COLOURS["green"], "images drawn anew"),
        ):
            ax.hlines(
                places, 100 * table[f"low{suffix}"], 100 * table[f"high{suffix}"], color=colour, linewidth=width,
                label=label,
            )  # fmt: skip
        ax.plot(100 * table["difference"], places, "o", color="black", markersize=5)
        ax.set_yticks(places, [METRIC_NAMES[m] for m in table.index])
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("difference in points")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=2
    )
    sns.despine(figure)
    return figure


def growth(
    frames: Mapping[str, pd.DataFrame], metrics: Sequence[str], baseline: Mapping[str, float]
) -> Figure:
    """Scores over what grows: a column per frame (its first column is the axis), a row per metric.

    ``frames``: rows per step and ``method``; ``baseline``: the untrained SDP per metric, a dashed line.
    """
    figure, axes = plt.subplots(
        len(metrics), len(frames), figsize=(4.2 * len(frames), 2.4 * len(metrics) + 0.3), squeeze=False,
        sharey="row", sharex="col", layout="constrained",
    )  # fmt: skip
    for column, (title, frame) in enumerate(frames.items()):
        what = frame.columns[0]
        for row, metric in enumerate(metrics):
            ax = axes[row, column]
            for name, own in frame.groupby("method", sort=False):
                colour, marker = LINES[name.removesuffix(" (overlap allowed)")]
                ax.plot(
                    own[what],
                    100 * own[metric],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=name,
                )
            ax.axhline(
                100 * baseline[metric],
                color=LINES["SDP"][0],
                linestyle="--",
                label="SDP, untrained",
            )
            axes[row, 0].set_ylabel(f"{METRIC_NAMES[metric]}, percent", fontsize=9)
        axes[0, column].set_title(title, fontsize=10)
        axes[-1, column].set_xlabel(f"training {what}" if what == "images" else what)
        if what == "images":
            axes[-1, column].set_xscale("log", base=2)
            axes[-1, column].set_xticks(frame[what].unique(), frame[what].unique())
            axes[-1, column].minorticks_off()
    axes[0, 0].legend(fontsize=8)
    sns.despine(figure)
    return figure


def fusion(
    parts: Summands, curve: pd.DataFrame, others: Mapping[str, pd.Series], metrics: Sequence[str]
) -> Figure:
    """How the two summands are distributed on and off the defects, and what becomes of a weight between them.

    ``curve``: :meth:`Summands.weighted`, weights from 0; ``others``: more methods' metrics as horizontal lines.
    """
    figure, axes = plt.subplots(
        1, 2 + len(metrics), figsize=(3.1 * (2 + len(metrics)), 3.0), layout="constrained"
    )
    for ax, (name, values) in zip(
        axes, (("SDP", parts.sdp), ("layers", parts.layers)), strict=False
    ):
        edges = np.linspace(*np.percentile(values, [0.05, 99.95]), 50)
        for region, (label, colour, _) in zip(
            (~parts.held.masks, parts.held.masks), STATES, strict=True
        ):
            where = "off the defects" if label == "normal" else "on the defects"
            ax.hist(
                values[region],
                edges,
                density=True,
                histtype="step",
                color=colour,
                linewidth=1.6,
                label=where,
            )
        ax.set(
            title=f"{name}, spread {values.std():.2f}",
            xlabel="value before smoothing",
            yscale="log",
        )
    axes[1].axvline(SATURATED, color="0.5", linestyle=":")
    axes[0].set_ylabel("density of pixels (log)")
    axes[0].legend(fontsize=7)
    for ax, metric in zip(axes[2:], metrics, strict=True):
        finite = curve[np.isfinite(curve["weight"])]
        places = np.arange(len(finite))
        ax.plot(places, 100 * finite[metric], color="black", marker=".", linewidth=1)
        for weight, name in ((0, "layers alone"), (1, "SDP+")):
            at = np.flatnonzero(finite["weight"] == weight)
            colour, marker = LINES[name]
            ax.plot(
                at, 100 * finite[metric].iloc[at], marker, color=colour, markersize=9, label=name
            )
        for name, row in others.items():
            ax.axhline(
                100 * row[metric], color=LINES[name][0], linestyle="--", linewidth=1.2, label=name
            )
        ax.set_xticks(places, [f"{w:g}" for w in finite["weight"]], fontsize=7)
        ax.set(title=f"{METRIC_NAMES[metric]}, percent", xlabel="weight of SDP's map")
    axes[2].legend(fontsize=7)
    sns.despine(figure)
    return figure


def defects(table: pd.DataFrame) -> Figure:
    """Type of defect x method: pixel AUROC within the image, percent, on one scale; the hardest first."""
    values = 100 * table.drop(columns="n")
    values.index = [f"{name} (n={n})" for name, n in table["n"].items()]
    figure, ax = plt.subplots(
        figsize=(1.9 + 1.05 * values.shape[1], 0.34 * len(values) + 1.2), layout="constrained"
    )
    heatmap(values, ax, cbar=True, cbar_kws={"label": "pixel AUROC within the image"})
    ax.tick_params(labelsize=8, length=0)
    return figure
