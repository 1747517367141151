"""The figure of notebook 05: quality against time."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from clipad.studies.common import METRIC_NAMES, Scores
from clipad.studies.figures import COLOURS, METHODS


def quality_and_time(scores: Scores, milliseconds: pd.Series, metric: str, title: str) -> Figure:
    """The mean of a metric with its wide interval, over the time per image (logarithmic)."""
    figure, ax = plt.subplots(figsize=(6.2, 3.2))
    for name, spent in milliseconds.items():
        (colour, marker), (_, wide) = METHODS[name], scores.interval(metric, name)
        ax.vlines(spent, 100 * wide.low, 100 * wide.high, color=COLOURS[colour])
        look = {"color": COLOURS[colour], "markersize": 8, "label": name}
        ax.plot(spent, 100 * wide.estimate, marker, **look)
    ax.set(xscale="log", xlabel="milliseconds per image", ylabel=f"{METRIC_NAMES[metric]}, percent")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.margins(x=0.15)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(title)
    return figure
