"""Figures of notebook 01: the sentences in the plane."""

import html

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from clipad.studies.figures import ANOMALOUS, NORMAL, dots, rows_and_series, subplots

LOOKS = {"normal": (NORMAL, "o"), "anomalous": (ANOMALOUS, "^")}


def find_a_sentence(layout: np.ndarray, sentences: pd.DataFrame, alt: str) -> HTML:
    """The sentences in the plane as inline SVG: pointing at a mark says which sentence it is. No script is needed."""
    low, high = layout.min(axis=0), layout.max(axis=0)
    places = (20 + 720 * (layout - low) / (high - low)) * (1, 0.55)
    shapes = {"normal": "M-5 0a5 5 0 1 1 10 0a5 5 0 1 1-10 0", "anomalous": "M0-6-5 4 5 4"}
    marks = []
    for (x, y), (_, state, _, _, text) in zip(places, sentences.index, strict=True):
        look = f'd="{shapes[state]}" fill="{to_hex(LOOKS[state][0])}"'
        told = f"<title>{html.escape(text)}</title>"
        marks.append(f'<path {look} transform="translate({x:.0f} {y:.0f})">{told}</path>')
    return HTML(
        f'<svg viewBox="0 0 760 430" role="img" aria-label="{html.escape(alt)}" style="max-width:760px;'
        f'background:white" fill-opacity="0.7">{"".join(marks)}</svg>'
    )


def layout_and_variance(
    layout: np.ndarray, sentences: pd.DataFrame, variance: pd.DataFrame, title: str
) -> Figure:
    """Left the sentences in the plane by state; right what explains their spread in the full space."""
    figure, axes = subplots(1, 2, (9.6, 3.6), title, width_ratios=[1.5, 1])
    plane, bars = axes[0]
    for state, (colour, marker) in LOOKS.items():
        own = layout[sentences.index.get_level_values("state") == state]
        plane.scatter(*own.T, s=16, color=colour, marker=marker, alpha=0.6, label=state, lw=0)
    plane.legend()
    plane.set(xticks=[], yticks=[], xlabel="UMAP: neither axes nor distances have a meaning")
    dots(bars, rows_and_series(variance))
    bars.set(xlabel="share of the spread, percent", xlim=(-3, 100))
    bars.legend()
    return figure
