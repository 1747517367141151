"""Notebook 01: the sentences of a state as a distribution, what DBSCAN takes from it, and whether that counts.

``sentences`` is always a table with a row per sentence: its unit embedding (C columns) under an index of ``category``,
``state``, ``word`` (the state word, such as "{} with flaw"), ``template`` and ``sentence``.
"""

import html
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.cluster import DBSCAN

from clipad.studies.common import Kept
from clipad.studies.figures import ANOMALOUS, NORMAL, dots, rows_and_series, subplots
from clipad.text import representative_vector

STATES = ("normal", "anomalous")
LOOKS = {"normal": (NORMAL, "o"), "anomalous": (ANOMALOUS, "^")}
UMAP_OPTIONS = {"n_neighbors": 50, "min_dist": 0.4, "metric": "cosine", "n_epochs": 200}
UMAP_OPTIONS |= {"init": "pca"}


def embed_sentences(backbone, prompts, categories: Sequence[str]) -> pd.DataFrame:
    """Every sentence of every category (states x templates; METHOD.md section 2), the same words and templates in the
    same order for each."""
    rows, parts = [], []
    for category in categories:
        words = (prompts.normal, prompts.anomalous)
        for state, own, texts in zip(STATES, words, prompts.sentences(category), strict=True):
            parts.append(F.normalize(backbone.encode_text(texts).double(), dim=-1).cpu().numpy())
            pairs = zip(product(own, prompts.templates), texts, strict=True)
            rows += [(category, state, *pair, text) for pair, text in pairs]
    names = ["category", "state", "word", "template", "sentence"]
    return pd.DataFrame(np.concatenate(parts), pd.MultiIndex.from_tuples(rows, names=names))


def umap_layout(sentences: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """The sentences in the plane, M x 2, by UMAP (McInnes et al., arXiv 1802.03426) with :data:`UMAP_OPTIONS`.

    Deterministic for a seed, hence one thread.
    """
    # Late: compiling takes seconds. By default numba takes torch's OpenMP pool and changes its number of threads,
    # after which both can be many times slower.
    import numba

    numba.config.THREADING_LAYER = "workqueue"
    from umap import UMAP

    options = UMAP_OPTIONS | {"n_neighbors": min(UMAP_OPTIONS["n_neighbors"], len(sentences) - 1)}
    return UMAP(**options, random_state=seed, n_jobs=1).fit_transform(sentences.to_numpy("float32"))


def largest_cluster(e, **options) -> np.ndarray:
    """M bool: which of the unit rows M x C DBSCAN averages; none where all are noise."""
    found = DBSCAN(**options).fit_predict(e)
    clusters = found[found >= 0]
    return found == np.bincount(clusters).argmax() if len(clusters) else np.zeros(len(e), bool)


def what_dbscan_keeps(
    sentences: pd.DataFrame, grid: Iterable[float], min_samples: int = 15
) -> pd.DataFrame:
    """A row per category, state and eps: ``share`` of the sentences averaged (0: all is noise, and the mean is taken),
    ``words``, the share of the state words that occur in them, and their ``templates``."""
    rows = []
    for key, own in sentences.groupby(level=["category", "state"], sort=False):
        for eps in grid:
            kept = own.index[largest_cluster(own, eps=eps, min_samples=min_samples)]
            words = len(kept.unique("word")) / len(own.index.unique("word"))
            share, templates = len(kept) / len(own), tuple(kept.unique("template"))
            rows.append((*key, eps, share, words, templates))
    columns = ["category", "state", "eps", "share", "words", "templates"]
    return pd.DataFrame(rows, columns=columns)


def vectors(sentences: pd.DataFrame, method: str = "mean", **options) -> dict[str, torch.Tensor]:
    """Per category the two text vectors, C x 2 unit columns."""
    found = {}
    with warnings.catch_warnings(action="ignore"):  # all noise: as what_dbscan_keeps tells
        for category in sentences.index.unique("category"):
            states = [sentences.loc[category].loc[state].to_numpy() for state in STATES]
            pair = [representative_vector(torch.tensor(e), method, **options) for e in states]
            found[category] = torch.stack(pair, dim=1).float()
    return found


def measure(
    detector, kept: Kept, texts: Mapping[object, Mapping[str, torch.Tensor]]
) -> pd.DataFrame:
    """Metrics of a detector with each of many sets of text vectors: means over categories, from features kept."""
    rows = {name: kept.mean_metrics(*kept.predict_all(detector, t)) for name, t in texts.items()}
    return pd.DataFrame(rows).T


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
