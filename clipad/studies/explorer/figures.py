"""Still figure of the explorer: image, map, attention and cosines of one patch, a row for A and one for B."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clipad.studies.figures import ANOMALOUS, MAP, NORMAL, contour, image_array

CUT, PATCH = "#00d0e0", "#37ff37"
DETECTOR_NAMES = {
    "direct": "Direct",
    "clip_surgery": "CLIP Surgery",
    "sdp": "SDP",
    "sdp_plus": "SDP+",
    "winclip": "WinCLIP",
}


def panels(shown: Sequence) -> Figure:
    """A row per entry of ``shown`` (:class:`clipad.studies.explorer.model.Shown`).

    Columns: the image; its map; q-k attention of the patch; its v-v attention; its cosines.
    """
    figure, axes = plt.subplots(
        len(shown), 5, figsize=(10.5, 2.6 * len(shown)), squeeze=False, layout="constrained",
        width_ratios=[1, 1.18, 1, 1, 1.2],
    )  # fmt: skip
    for name, row, one in zip("AB", axes, shown, strict=False):
        _row(name, row, one)
    return figure


def describe(shown: Sequence) -> str:
    """The figure in words, with its numbers."""
    said = [
        f"{name}, {DETECTOR_NAMES[one.settings.detector]} asked about {one.settings.object_name!r}: class "
        f"probability {100 * one.probability:.0f} %; highest value of the map {one.map.max():.2f}, "
        f"{'above' if one.flagged else 'not above'} the threshold {one.threshold:.2f} (cyan line), which "
        f"{(one.maxima > one.threshold).sum()} of {len(one.maxima)} flawless images pass."
        for name, one in zip("AB", shown, strict=False)
    ]
    row, column, block = shown[0].settings.look
    known = any(one.mask is not None for one in shown)
    key = f"Green square: the patch in row {row}, column {column}; attention of block {block}. "
    return (
        " ".join(said)
        + " White line: true defect. " * known
        + " " * (not known)
        + key
        + "Colours start at the median of the flawless images' maps and have their maximum in the middle."
    )


def _row(name: str, axes: Sequence[Axes], one) -> None:
    s, size = one.settings, len(one.map)
    row, column, _ = s.look
    grid = round((len(one.attention["q-k"]) - 1) ** 0.5)
    picture, heat, *attention, bars = axes
    picture.imshow(image_array(one.image, size))
    picture.set_title(f"{name}: {s.object_name}", fontsize=10)
    low, high = one.limits
    drawn = heat.imshow(one.map, cmap=MAP, vmin=low, vmax=max(high, low + 1e-6))
    heat.figure.colorbar(drawn, ax=heat, fraction=0.05, pad=0.03)
    heat.set_title(f"{DETECTOR_NAMES[s.detector]} map", fontsize=10)
    for ax in (picture, heat):
        contour(ax, one.mask)
        if one.map.min() < one.threshold < one.map.max():
            ax.contour(one.map, levels=[one.threshold], colors=[CUT], linewidths=1)
        _square(ax, row, column, size / grid)
    own = 1 + (row - 1) * grid + column - 1
    top = max(np.delete(weights, [0, own]).max() for weights in one.attention.values())
    for ax, (kind, weights) in zip(attention, one.attention.items(), strict=True):
        ax.imshow(np.sqrt(weights[1:].reshape(grid, grid)), cmap=MAP, vmin=0, vmax=top**0.5)
        ax.set_title(f"{kind} attention", fontsize=10)
        ax.set_xlabel(f"to itself {100 * weights[own]:.1f} %", fontsize=9)
        _square(ax, row, column, 1)
    for ax in (picture, heat, *attention):
        ax.set(xticks=[], yticks=[])
    place = np.arange(len(one.cosines))
    for side, state, colour in ((-0.2, "normal", NORMAL), (0.2, "anomalous", ANOMALOUS)):
        bars.barh(place + side, one.cosines[state], 0.38, color=colour, label=state)
    bars.set_yticks(place, one.cosines.index, fontsize=9)
    bars.invert_yaxis()
    bars.axvline(0, color="0.4", linewidth=0.8)
    bars.set_title("cosines of the patch", fontsize=10)
    if name == "A":
        bars.legend(fontsize=9, frameon=False, loc="best")
    bars.spines[["top", "right"]].set_visible(False)


def _square(ax: Axes, row: int, column: int, side: float) -> None:
    corner = ((column - 1) * side - 0.5, (row - 1) * side - 0.5)
    ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=PATCH, linewidth=1.4))
