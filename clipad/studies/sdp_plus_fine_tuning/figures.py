"""Figures of notebook 04: losses, the joint space before and after the layers, chance in training, and two maps."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.common import METRIC_NAMES
from clipad.studies.figures import ANOMALOUS, COLOURS, NORMAL, dots, subplots


def loss_curve(focal: Sequence[float], dice: Sequence[float], per_epoch: int) -> Figure:
    """Both losses over the steps of a training, and their means per epoch (dots)."""
    figure, axes = subplots(1, 2, (8, 2.6), "Both losses fall (dots: mean of an epoch)")
    for ax, name, values in zip(axes[0], ("focal", "Dice"), (focal, dice), strict=True):
        ax.plot(values, color="0.75", linewidth=0.8)
        means = pd.Series(values).groupby(np.arange(len(values)) // per_epoch).mean()
        ax.plot(per_epoch * (means.index + 0.5), means, "o-", color=NORMAL, markersize=4)
        ax.set(xlabel="step", ylabel=f"{name} loss, sum over stages")
    return figure


def margins(table: pd.DataFrame, aurocs: pd.Series, title: str) -> Figure:
    """Per stage and mapping, how much nearer patches are to *anomalous* than to *normal*; dotted: halfway.

    ``table``: a row per patch with ``stage``, ``mapping``, ``label`` (1 of a defect) and ``margin``; ``aurocs``: of the
    margins, by stage and mapping.
    """
    stages, mappings = (table[column].unique() for column in ("stage", "mapping"))
    size = (2.3 * len(stages), 1.7 * len(mappings) + 0.5)
    figure, axes = subplots(len(mappings), len(stages), size, title, sharex="row")
    for line, (mapping, rows) in zip(axes, table.groupby("mapping"), strict=True):
        edges = np.linspace(*np.percentile(rows["margin"], [0.5, 99.5]), 36)
        for ax, (stage, own) in zip(line, rows.groupby("stage"), strict=True):
            look = {"histtype": "stepfilled", "alpha": 0.45}
            _two_kinds(ax, own["margin"], own["label"] == 1, edges, "patches", **look)
            ax.axvline(0, color="0.3", linestyle=":", linewidth=1)
            ax.set_title(f"{stage}, {mapping}: AUROC {aurocs[stage, mapping]:.2f}", size=9)
            ax.set_yticks([])
        line[0].set_ylabel("patches")
    for ax in axes[-1]:
        ax.set_xlabel("100 (cos $t_a$ − cos $t_n$)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _two_kinds(ax, values, defect, edges, what: str, **look) -> None:
    """Densities of values on and off a defect."""
    kinds, look = [values[~defect], values[defect]], look | {"color": [NORMAL, ANOMALOUS]}
    ax.hist(kinds, edges, density=True, label=[f"other {what}", f"{what} of a defect"], **look)


def chance(
    trainings: pd.DataFrame, baseline: Mapping[str, float], metrics: Sequence[str], title: str
) -> Figure:
    """A dot per training, a row per order of the images; dashed is SDP, which is not trained."""
    figure, axes = subplots(1, len(metrics), (3 * len(metrics), 1.8), title, sharey=True)
    for ax, metric in zip(axes[0], metrics, strict=True):
        table = trainings.rename(columns={"order": "row", metric: "estimate"})
        dots(ax, table.assign(series=table["row"]))
        ax.axvline(100 * baseline[metric], color="0.4", linestyle="--", linewidth=1)
        ax.set_xlabel(f"{METRIC_NAMES[metric]}, percent")
    return figure


def fusion(
    maps: Mapping[str, np.ndarray], masks: np.ndarray, curve: pd.DataFrame, title: str
) -> Figure:
    """Both summands on and off the defects, and pixel metrics over the weight of SDP's map in the sum.

    ``maps``: name -> N x S x S; ``masks``: the same shape; ``curve``: metrics over weights from 0 (the layers alone);
    1 is SDP+ (dotted).
    """
    figure, axes = subplots(1, 1 + len(maps), (10, 2.9), title)
    *others, right = axes[0]
    for ax, (name, values) in zip(others, maps.items(), strict=True):
        edges = np.linspace(*np.percentile(values, [0.05, 99.95]), 50)
        _two_kinds(ax, values, masks, edges, "pixels", histtype="step")
        ax.set(xlabel=name, yscale="log", ylabel="density of pixels")
    weights = [f"{weight:g}" for weight in curve.index]
    for metric, (colour, marker) in zip(curve, (("green", "s"), ("purple", "D")), strict=True):
        look = {"color": COLOURS[colour], "marker": marker, "label": METRIC_NAMES[metric]}
        right.plot(weights, 100 * curve[metric], markersize=4, **look)
    right.axvline("1", color="0.5", linestyle=":")
    right.set(xlabel="weight of SDP's map (0: layers alone, 1: SDP+)", ylabel="percent")
    for ax in (others[0], right):
        ax.legend()
    return figure
