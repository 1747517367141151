"""Still figure of the explorer: image, map, attention and cosines of one patch, a row for A and one for B."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from clipad.studies.experiments import DETECTORS
from clipad.studies.explorer.model import Shown
from clipad.studies.figures import (
    ANOMALOUS,
    MAP,
    NORMAL,
    bare,
    contour,
    image_array,
    mark_patch,
    subplots,
)

CUT, PATCH = "#00d0e0", "#37ff37"


def panels(shown: Sequence[Shown]) -> Figure:
    """A row for A and one for B: the image; its map; q-k attention of the patch; its v-v attention; its cosines."""
    widths = [1, 1.18, 1, 1, 1.2]
    figure, axes = subplots(len(shown), 5, (10.5, 2.6 * len(shown)), width_ratios=widths)
    for name, (picture, heat, *attention, bars), one in zip("AB", axes, shown, strict=False):
        size, grid = len(one.map), round((len(one.attention["q-k"]) - 1) ** 0.5)
        picture.imshow(image_array(one.image, size))
        picture.set_title(f"{name}: {one.settings.object_name}")
        drawn = heat.imshow(one.map, MAP, vmin=one.limits[0], vmax=one.limits[1])
        figure.colorbar(drawn, ax=heat, fraction=0.05, pad=0.03)
        heat.set_title(f"{DETECTORS[one.settings.detector].name} map")
        for ax in (picture, heat):
            contour(ax, one.mask)
            contour(ax, one.map > one.threshold, CUT)
        top = max(np.delete(weights[1:], one.patch).max() for weights in one.attention.values())
        look = {"extent": (0, size, size, 0), "cmap": MAP, "vmin": 0, "vmax": top**0.5}
        for ax, (kind, weights) in zip(attention, one.attention.items(), strict=True):
            ax.imshow(np.sqrt(weights[1:].reshape(grid, grid)), **look)
            ax.set_title(f"{kind} attention")
        for ax in (picture, heat, *attention):
            mark_patch(ax, one.patch, grid, size, PATCH)
            bare(ax)
        one.cosines.plot.barh(ax=bars, color=[NORMAL, ANOMALOUS], width=0.8, legend=False)
        bars.invert_yaxis()
        bars.set_title("cosines of the patch")
    axes[0, -1].legend()
    return figure


def describe(shown: Sequence[Shown]) -> str:
    """The figure in words, with its numbers."""
    said = [
        f"{name}, {DETECTORS[one.settings.detector].name} asked about {one.settings.object_name!r}: class "
        f"probability {100 * one.answer.probability:.0f} %; highest value of the map {one.map.max():.2f}, threshold "
        f"{one.threshold:.2f} (cyan), which {(one.maxima > one.threshold).sum()} of {len(one.maxima)} flawless images "
        "pass."
        for name, one in zip("AB", shown, strict=False)
    ]
    row, column, block = shown[0].settings.look
    return (
        f"{' '.join(said)} White: true defect, where known. Green: the patch in row {row}, column {column}; attention "
        f"of block {block}. Colours start at the median of the flawless images' maps; the middle is their maximum."
    )
