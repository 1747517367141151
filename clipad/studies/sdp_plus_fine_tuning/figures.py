"""Figures of notebook 04: the joint space before and after the layers, chance in training, and the sum of two maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.common import METRIC_NAMES
from clipad.studies.figures import ANOMALOUS, COLOURS, NORMAL, dots, legend_below, subplots
from clipad.studies.sdp_plus_fine_tuning import Summands


def loss_curve(focal: Sequence[float], dice: Sequence[float], per_epoch: int) -> Figure:
    """Both losses over the steps of a training, and their means per epoch (dots)."""
    figure, axes = subplots(1, 2, (8, 2.6), "Both losses fall (dots: mean of an epoch)")
    for ax, name, values in zip(axes[0], ("focal", "Dice"), (focal, dice), strict=True):
        values = pd.Series(values, index=range(1, len(values) + 1))
        ax.plot(values, color="0.75", linewidth=0.8)
        means = values.groupby((values.index - 1) // per_epoch).mean()
        ax.plot(per_epoch * (means.index + 0.5), means, "o-", color=NORMAL, markersize=4)
        ax.set(xlabel="step", ylabel=f"{name} loss, sum over stages")
    return figure


def margins(
    stages: Mapping[str, pd.DataFrame], numbers: pd.DataFrame, names: Sequence[str], title: str
) -> Figure:
    """Per stage and mapping, how much nearer patches are to *anomalous* than to *normal*; dotted: halfway.

    ``stages``: the margins of :func:`clipad.studies.sdp_plus_fine_tuning.joint_space`, ``numbers``: a row per stage and
    mapping, with ``auroc``.
    """
    size = (2.3 * len(stages), 1.7 * len(names) + 0.5)
    figure, axes = subplots(len(names), len(stages), size, title, sharex="row")
    for line, name in zip(axes, names, strict=True):
        found = np.concatenate([table[name] for table in stages.values()])
        edges = np.linspace(*np.percentile(found, [0.5, 99.5]), 36)
        for ax, (stage, table) in zip(line, stages.items(), strict=True):
            kinds = [own for _, own in table.groupby("label")[name]]
            look = {"label": ["other patches", "patches of a defect"], "color": [NORMAL, ANOMALOUS]}
            ax.hist(kinds, edges, density=True, histtype="stepfilled", alpha=0.45, **look)
            ax.axvline(0, color="0.3", linestyle=":", linewidth=1)
            auroc = numbers.loc[(stage, name), "auroc"]
            ax.set_title(f"{stage}, {name}: AUROC {auroc:.2f}", fontsize=9)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        line[0].set_ylabel("patches")
    for ax in axes[-1]:
        ax.set_xlabel("100 (cos $t_a$ − cos $t_n$)")
    legend_below(figure)
    return figure


def chance(
    trainings: pd.DataFrame, baseline: Mapping[str, float], metrics: Sequence[str], title: str
) -> Figure:
    """A dot per training, a row per order of the images; dashed is SDP, which is not trained."""
    figure, axes = subplots(1, len(metrics), (3 * len(metrics), 1.8), title, sharey=True)
    for ax, metric in zip(axes[0], metrics, strict=True):
        columns = {"order": "row", metric: "estimate"}
        dots(ax, trainings.rename(columns=columns).assign(series=trainings["order"]))
        level = 100 * baseline[metric]
        ax.axvline(level, color="0.4", linestyle="--", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        ax.annotate("SDP", (level, 1), fontsize=9, color="0.3", **place)
        ax.set_xlabel(f"{METRIC_NAMES[metric]}, percent")
    return figure


def fusion(parts: Summands, curve: pd.DataFrame, metrics: Sequence[str], title: str) -> Figure:
    """Both summands on and off the defects, and the pixel metrics over the weight of SDP's map in the sum.

    ``curve``: :meth:`Summands.weighted`, finite weights from 0 (the layers alone); 1 is SDP+ (dotted).
    """
    figure, axes = subplots(1, 3, (10, 2.9), title)
    *others, right = axes[0]
    masks, maps = (
        parts.kept.masks,
        {"SDP's map": parts.sdp, "sum of the layers' maps": parts.layers},
    )
    for ax, (name, values) in zip(others, maps.items(), strict=True):
        edges = np.linspace(*np.percentile(values, [0.05, 99.95]), 50)
        kinds, look = [values[~masks], values[masks]], {"color": [NORMAL, ANOMALOUS]}
        labels = ["off the defects", "on them"]
        ax.hist(kinds, edges, density=True, histtype="step", linewidth=1.6, label=labels, **look)
        ax.set(xlabel=name, yscale="log", ylabel="density of pixels")
    places = range(len(curve))
    for metric, colour in zip(metrics, ("blue", "green"), strict=True):
        look = {"color": COLOURS[colour], "markersize": 4, "label": METRIC_NAMES[metric]}
        right.plot(places, 100 * curve[metric], "o-", **look)
    right.set_xticks(places, [f"{w:g}" for w in curve["weight"]])
    right.axvline(list(curve["weight"]).index(1), color="0.5", linestyle=":")
    right.set(xlabel="weight of SDP's map (0: layers alone, 1: SDP+)", ylabel="percent")
    for ax in (others[0], right):
        ax.legend()
    return figure
