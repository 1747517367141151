"""Figures of notebook 03: six tokens, where a patch looks, maps beside one another, and controls."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.metrics import within_image
from clipad.studies.common import Labelled
from clipad.studies.figures import (
    ANOMALOUS,
    MAP,
    NORMAL,
    dot_panels,
    gallery,
    heatmap,
    mark_patch,
    subplots,
)


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


def attention_of_patch(
    picture: np.ndarray, mask: np.ndarray | None, patch: int, rows: Mapping[int, np.ndarray]
) -> Figure:
    """Where one patch of a picture looks, a row per block: q-k and v-v weights of all patches, 2 x N by block, drawn in
    square roots on one scale; the patch is cyan, ``mask`` (S x S) outlined."""
    values, count, side = np.sqrt(list(rows.values())), len(rows), len(picture)
    top, grid = np.delete(values, patch, axis=-1).max(), round(values.shape[-1] ** 0.5)
    squares = values.reshape(count, 2, grid, grid).repeat(side // grid, 2).repeat(side // grid, 3)
    maps = {"q-k attention": squares[:, 0], "v-v attention": squares[:, 1]}
    masks, titles = None if mask is None else [mask] * count, [f"block {block}" for block in rows]
    limits = dict.fromkeys(maps, (0, top))
    figure = gallery([picture] * count, maps, masks, titles, limits, masks_on="both")
    for ax in figure.axes:
        if ax.images:
            mark_patch(ax, patch, grid, side)
    return figure


def beside(
    pictures: Sequence[np.ndarray], data: Labelled, maps: Mapping[str, np.ndarray]
) -> tuple[Figure, str]:
    """Maps (name -> E x S x S) of E images side by side, a row per image, and their caption with the numbers.

    Values with a sign are drawn around 0 (red: anomalous), sums of probabilities, which are never negative, from 0 on.
    Every column has its own scale.
    """
    limits, colours, below, told = {}, {}, {}, []
    for name, values in maps.items():
        top, signed = np.abs(values).max(), values.min() < 0
        limits[name] = (-top, top) if signed else (0, np.ceil(top))
        colours[name] = "RdBu_r" if signed else MAP
        if data.masks is not None:
            found = within_image(values, data.masks)  # NaN of a flawless image
            aurocs = ["–" if np.isnan(auroc) else f"{100 * auroc:.0f}" for auroc in found]
            below[name] = [f"AUROC {auroc}" for auroc in aurocs]
            told.append(f"{name} {', '.join(aurocs)}")
    titles = [f"{sample.category},\n{sample.defect}" for sample in data.dataset]
    look = {"limits": limits, "colours": colours, "below": below, "masks_on": "images"}
    figure = gallery(pictures, maps, data.masks, titles, **look)
    caption = (
        "Where a map has negative values red is anomalous, white 0 and blue normal; elsewhere bright is anomalous. "
        "Each column has its own scale."
    )
    if told:
        caption = f"White line in the image: the defect. {caption}"
        shown = ", ".join(data.categories)
        caption += f" Pixel AUROC inside the image ({shown}): {'; '.join(told)}."
    return figure, caption


def chance(controls: pd.DataFrame) -> tuple[Figure, str]:
    """Mean pixel AUROC of variants (columns), found and by ``control``, and the caption."""
    looks = {"found": ("orange", "D"), "shuffled states": ("grey", "o"), "untrained": ("blue", "^")}
    table = controls.melt("control", var_name="row", value_name="estimate")
    table = table.rename(columns={"control": "series"})
    title = "What a map reaches that knows nothing"
    figure = dot_panels({title: table}, "pixel AUROC, mean over categories", looks=looks)
    (ax,) = figure.axes
    ax.axvline(50, color="0.3", linewidth=0.8, linestyle="--")
    ax.set_xlim(0, 100)
    told = []
    for (name, row), values in table.groupby(["series", "row"], sort=False)["estimate"]:
        ends = dict.fromkeys(f"{100 * value:.0f}" for value in (values.min(), values.max()))
        told.append(f"{row}, {name}: {' to '.join(ends)}")
    return figure, (
        "Found: this CLIP with its text. Shuffled states: the same features with the sentences dealt to the states at "
        f"random. Untrained: networks with random weights. Dashed: 50. {'; '.join(told)}."
    )
