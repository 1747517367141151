"""Figures of notebook 03: six tokens, maps beside one another, and controls."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.figures import ANOMALOUS, MAP, NORMAL, dots, gallery, heatmap, subplots
from clipad.studies.opposite_predictions import Example

SIGNED = "RdBu_r"
"""for values with a sign: white is 0, red anomalous"""


def six_tokens(v: np.ndarray, weights: Mapping[str, np.ndarray]) -> tuple[Figure, str]:
    """The six vectors v (6 x 2; the last two are the defect's) and attention weights, 6 x 6 each; and the caption."""
    n, colours = len(weights), [NORMAL] * 4 + [ANOMALOUS] * 2
    figure, axes = subplots(1, 1 + n, (2.3 * (1 + n), 2.7), width_ratios=[1.1] + [1] * n)
    values, *tables = axes[0]
    values.quiver(*np.zeros((2, 6)), *v.T, color=colours, angles="xy", scale_units="xy", scale=1)
    for token, end in enumerate(v):
        values.annotate(str(token), end, (3, 1), textcoords="offset points", fontsize=9)
    values.set(xlim=(-1, 2.7), ylim=(-0.8, 2.1), title="values $v$", aspect="equal")
    for ax, (name, w) in zip(tables, weights.items(), strict=True):
        heatmap(pd.DataFrame(100 * w), ax, fmt=".0f", square=True)
        ax.axhline(4, color="white", linewidth=2)
        ax.axvline(4, color="white", linewidth=2)
        ax.set_title(name)
    tables[0].set(ylabel="token that looks", xlabel="token looked at")
    stays = {name: 100 * w[4:, 4:].sum(axis=1).mean() for name, w in weights.items()}
    told = ", ".join(f"{name} {share:.0f}" for name, share in stays.items())
    return figure, (
        "Left: the six values; 4 and 5 (orange) are the defect's. Then attention weights in percent, a row per token "
        f"that looks. Of the defect's own attention this stays on the defect, in percent: {told}."
    )


def beside(examples: Sequence[Example], maps: Mapping[str, np.ndarray]) -> tuple[Figure, str]:
    """Maps of one or several images side by side, a row per image, and their caption with the numbers.

    ``maps``: name -> E x S x S. Values with a sign are drawn around 0 (red: anomalous), sums of probabilities, which
    are never negative, from 0 on. Every column has its own scale.
    """
    limits, colours, below, told = {}, {}, {}, []
    for name, values in maps.items():
        top, signed = np.abs(values).max(), values.min() < 0
        limits[name] = (-top, top) if signed else (0, np.ceil(top))
        colours[name] = SIGNED if signed else MAP
        aurocs = [example.auroc(heat) for example, heat in zip(examples, values, strict=True)]
        below[name] = ["" if auroc is None else f"AUROC {auroc:.0f}" for auroc in aurocs]
        told.append(f"{name} {', '.join(text.removeprefix('AUROC ') for text in below[name])}")
    known = examples[0].mask is not None
    figure = gallery(
        [example.pixels for example in examples],
        maps,
        [example.mask for example in examples] if known else None,
        [f"{example.category},\n{example.defect}" for example in examples],
        limits,
        colours,
        masks_on="images",
        below=below,
    )
    caption = (
        "Where a map has negative values red is anomalous, white 0 and blue normal; elsewhere bright is anomalous. "
        "Each column has its own scale."
    )
    if known:
        caption = f"White line in the image: the defect. {caption}"
        shown = ", ".join(example.category for example in examples)
        caption += f" Pixel AUROC inside the image ({shown}): {'; '.join(told)}."
    return figure, caption


def chance(controls: pd.DataFrame) -> tuple[Figure, str]:
    """Mean pixel AUROC of variants, found and under ignorance, and the caption.

    ``controls``: :func:`clipad.studies.dual_path_surgery.control_aurocs`.
    """
    looks = {"found": ("orange", "D"), "shuffled states": ("grey", "o"), "untrained": ("blue", "^")}
    table = controls.melt("control", var_name="row", value_name="estimate")
    figure, ax = plt.subplots(figsize=(7.2, 0.55 * table["row"].nunique() + 1.2))
    dots(ax, table.rename(columns={"control": "series"}), looks)
    ax.axvline(50, color="0.3", linewidth=0.8, linestyle="--")
    ax.set(xlim=(0, 100), xlabel="pixel AUROC, mean over categories")
    ax.set(title="What a map reaches that knows nothing")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    told = []
    for (name, row), values in table.groupby(["control", "row"], sort=False)["estimate"]:
        ends = dict.fromkeys(f"{100 * value:.0f}" for value in (values.min(), values.max()))
        told.append(f"{row}, {name}: {' to '.join(ends)}")
    return figure, (
        "Found: this CLIP with its text. Shuffled states: the same features with the sentences dealt to the states at "
        f"random. Untrained: networks with random weights. Dashed: 50. {'; '.join(told)}."
    )
