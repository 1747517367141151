"""Figures of notebook 04: the joint space before and after the layers, chance in training, and the sum of two maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from clipad.studies.common import METRIC_NAMES
from clipad.studies.figures import ANOMALOUS, COLOURS, NORMAL
from clipad.studies.sdp_plus_fine_tuning import JointSpace, Summands

STATES = (("other patches", NORMAL), ("patches of a defect", ANOMALOUS))


def loss_curve(focal: Sequence[float], dice: Sequence[float], per_epoch: int) -> Figure:
    """Both losses over the steps of a training, and their means per epoch (dots)."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for ax, name, values in zip(axes, ("focal", "Dice"), (focal, dice), strict=True):
        values = np.asarray(values)
        ax.plot(np.arange(1, len(values) + 1), values, color="0.75", linewidth=0.8)
        means = [part.mean() for part in np.split(values, range(per_epoch, len(values), per_epoch))]
        middles = per_epoch * (np.arange(len(means)) + 0.5)
        ax.plot(middles, means, "o-", color=COLOURS["blue"], markersize=4)
        ax.set(xlabel="step", ylabel=f"{name} loss, sum over stages")
    figure.suptitle("Both losses fall (dots: mean of an epoch)", fontsize=11)
    sns.despine(figure)
    return figure


def margins(spaces: Mapping[str, JointSpace], names: Sequence[str], title: str) -> Figure:
    """Per stage and mapping, how much nearer patches are to *anomalous* than to *normal*; dotted: halfway."""
    figure, axes = plt.subplots(
        len(names), len(spaces), figsize=(2.3 * len(spaces), 1.7 * len(names) + 0.5), squeeze=False,
        sharex="row", layout="constrained",
    )  # fmt: skip
    for row, name in enumerate(names):
        found = {stage: space.margins(name) for stage, space in spaces.items()}
        edges = np.linspace(*np.percentile(np.concatenate(list(found.values())), [0.5, 99.5]), 36)
        for ax, (stage, values) in zip(axes[row], found.items(), strict=True):
            labels = spaces[stage].labels
            for state, (label, colour) in enumerate(STATES):
                ax.hist(
                    values[labels == state], edges, density=True, histtype="stepfilled", alpha=0.45,
                    color=colour, edgecolor=colour, label=label,
                )  # fmt: skip
            ax.axvline(0, color="0.3", linestyle=":", linewidth=1)
            auroc = spaces[stage].numbers().loc[name, "auroc"]
            ax.set_title(f"{stage}, {name}: AUROC {auroc:.2f}", fontsize=9)
            ax.set_yticks([])
            ax.tick_params(labelsize=8)
        axes[row, 0].set_ylabel("patches", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("100 (cos $t_a$ − cos $t_n$)", fontsize=9)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=9, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=11)
    sns.despine(figure, left=True)
    return figure


def chance(
    trainings: pd.DataFrame, baseline: Mapping[str, float], metrics: Sequence[str], title: str
) -> Figure:
    """A dot per training (colour and marker: order of the images); the line is SDP, which is not trained."""
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(2.7 * len(metrics), 2.6), squeeze=False, layout="constrained"
    )
    looks = {"as released": (COLOURS["blue"], "o"), "shuffled": (COLOURS["orange"], "^")}
    for ax, metric in zip(axes[0], metrics, strict=True):
        for place, (order, own) in enumerate(trainings.groupby("order", sort=False)):
            colour, marker = looks[order]
            shift = np.linspace(-0.15, 0.15, len(own))
            ax.plot(place + shift, 100 * own[metric], marker, color=colour, linestyle="none")
        ax.axhline(100 * baseline[metric], color="0.4", linestyle="--", linewidth=1)
        ax.annotate(
            "SDP", (1.45, 100 * baseline[metric]), ha="right", va="bottom", fontsize=8, color="0.3"
        )
        ax.set_xticks([0, 1], ["order as\nreleased", "shuffled"], fontsize=9)
        ax.set(xlim=(-0.5, 1.5))
        ax.set_title(f"{METRIC_NAMES[metric]}, percent", fontsize=10)
        ax.tick_params(labelsize=9)
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
    return figure


def growth(
    frames: Mapping[str, pd.DataFrame],
    metrics: Sequence[str],
    baseline: Mapping[str, float],
    title: str,
) -> Figure:
    """SDP+ over what grows, a panel per frame and metric: dots are trainings, the line their mean, dashed is SDP.

    ``frames``: title -> rows per training; the first column is the axis.
    """
    figure, axes = plt.subplots(
        len(metrics), len(frames), figsize=(3.9 * len(frames), 2.2 * len(metrics) + 0.4), squeeze=False,
        sharey="row", sharex="col", layout="constrained",
    )  # fmt: skip
    for column, (name, frame) in enumerate(frames.items()):
        what = frame.columns[0]
        for row, metric in enumerate(metrics):
            ax = axes[row, column]
            ax.plot(
                frame[what],
                100 * frame[metric],
                "o",
                color=COLOURS["blue"],
                alpha=0.5,
                markersize=4,
            )
            means = 100 * frame.groupby(what)[metric].mean()
            ax.plot(means.index, means, color=COLOURS["blue"])
            ax.axhline(100 * baseline[metric], color="0.4", linestyle="--", linewidth=1)
            axes[row, 0].set_ylabel(f"{METRIC_NAMES[metric]}, percent", fontsize=9)
            ax.tick_params(labelsize=9)
        axes[-1, column].set_xlabel(name, fontsize=9)
        if what == "images":
            axes[-1, column].set_xscale("log", base=2)
            axes[-1, column].set_xticks(sorted(frame[what].unique()), sorted(frame[what].unique()))
            axes[-1, column].minorticks_off()
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
    return figure


def fusion(parts: Summands, curve: pd.DataFrame, metrics: Sequence[str], title: str) -> Figure:
    """Both summands on and off the defects, and the pixel metrics over the weight of SDP's map in the sum.

    ``curve``: :meth:`Summands.weighted`, finite weights from 0 (the layers alone); 1 is SDP+ (dotted).
    """
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    masks = parts.kept.masks
    for ax, (name, values) in zip(
        axes, (("SDP's map", parts.sdp), ("sum of the layers' maps", parts.layers)), strict=False
    ):
        edges = np.linspace(*np.percentile(values, [0.05, 99.95]), 50)
        for region, label, colour in (
            (~masks, "off the defects", NORMAL),
            (masks, "on them", ANOMALOUS),
        ):
            ax.hist(
                values[region], edges, density=True, histtype="step", color=colour, linewidth=1.6,
                label=label,
            )  # fmt: skip
        ax.set(xlabel=name, yscale="log", ylabel="density of pixels")
    axes[0].legend(fontsize=8)
    places = np.arange(len(curve))
    for (metric, name), colour in zip(
        ((m, METRIC_NAMES[m]) for m in metrics), ("blue", "green", "purple"), strict=False
    ):
        axes[2].plot(
            places, 100 * curve[metric], "o-", color=COLOURS[colour], markersize=4, label=name
        )
    axes[2].set_xticks(places, [f"{w:g}" for w in curve["weight"]], fontsize=8)
    axes[2].axvline(list(curve["weight"]).index(1), color="0.5", linestyle=":")
    axes[2].set(xlabel="weight of SDP's map (0: layers alone, 1: SDP+)", ylabel="percent")
    axes[2].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
    return figure
