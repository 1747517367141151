"""Figures of notebook 01: the sentences in the plane, what DBSCAN does over eps, and what it is worth."""

import html
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from clipad.studies.figures import (
    ANOMALOUS,
    NORMAL,
    dots,
    growth,
    heatmap,
    rows_and_series,
    subplots,
)
from clipad.studies.text_distribution import STATES, Sentences

LOOKS = {"normal": (NORMAL, "o"), "anomalous": (ANOMALOUS, "^")}


def find_a_sentence(layout: np.ndarray, sentences: Sentences, alt: str) -> HTML:
    """The sentences in the plane as inline SVG: pointing at a mark says which sentence it is. No script is needed."""
    low, high = layout.min(axis=0), layout.max(axis=0)
    places = (20 + 720 * (layout - low) / (high - low)) * (1, 0.55)
    shapes = {"normal": '<circle r="5"', "anomalous": '<polygon points="0,-6 -5,4 5,4"'}
    marks = []
    rows = sentences.table[["state", "sentence"]].itertuples(index=False)
    for (x, y), (state, text) in zip(places, rows, strict=True):
        look = f'fill="{to_hex(LOOKS[state][0])}" transform="translate({x:.0f} {y:.0f})"'
        shape, tag = shapes[state], shapes[state].split()[0][1:]
        marks.append(f"{shape} {look}><title>{html.escape(text)}</title></{tag}>")
    return HTML(
        f'<svg viewBox="0 0 760 430" role="img" aria-label="{html.escape(alt)}" style="max-width:760px;'
        f'background:white" fill-opacity="0.7">{"".join(marks)}</svg>'
    )


def layout_and_variance(
    layout: np.ndarray, sentences: Sentences, variance: pd.DataFrame, title: str
) -> Figure:
    """Left the sentences in the plane by state; right what explains their spread in the full space."""
    figure, axes = subplots(1, 2, (9.6, 3.6), title, width_ratios=[1.5, 1])
    plane, bars = axes[0]
    for state, (colour, marker) in LOOKS.items():
        own = layout[(sentences.table["state"] == state).to_numpy()]
        plane.scatter(*own.T, s=16, color=colour, marker=marker, alpha=0.6, label=state, lw=0)
    plane.legend()
    plane.set(xticks=[], yticks=[], xlabel="UMAP: neither axes nor distances have a meaning")
    dots(bars, rows_and_series(variance))
    bars.set(xlabel="share of the spread, percent", xlim=(-3, 100))
    bars.legend()
    return figure


def eps_curves(
    curves: pd.DataFrame, base: Mapping, published: Mapping[float, str], title: str
) -> Figure:
    """Fractions over eps, a panel per column of ``curves``; ``base``: what the mean has (dashed); dotted: ``published``
    values of eps and their names."""
    figure = growth({"eps": curves}, list(curves.columns), base, title)
    for ax in figure.axes[:2]:  # shares
        ax.set_ylim(0, 105)
    figure.axes[-1].set_xticks(curves.index, [f"{eps:g}" for eps in curves.index], fontsize=8)
    for eps, name in published.items():
        for ax in figure.axes:
            ax.axvline(eps, color="0.4", linestyle=":", linewidth=1)
        above = figure.axes[0].get_xaxis_transform()
        figure.axes[0].text(eps, 1, name, ha="center", va="bottom", fontsize=9, transform=above)
    return figure


def word_matrix(words: pd.DataFrame, title: str) -> Figure:
    """Cosines between state words (index: state and word) as a heat map; a line parts the states."""
    names = [word.replace("{}", "…") for word in words.index.get_level_values("word")]
    size = 2.4 + 0.3 * len(names)
    figure, ax = plt.subplots(figsize=(size, size - 0.4))
    values = pd.DataFrame(words.to_numpy(), names, names)
    heatmap(values, ax, fontsize=7, vmin=None, vmax=1, fmt=".2f")
    border = (words.index.get_level_values("state") == STATES[0]).sum()
    for line in (ax.axhline, ax.axvline):
        line(border, color="white", linewidth=3)
    ax.set_title(title)
    return figure
