"""Notebook 01: the sentences of a state as a distribution, what each method takes from it, and whether that counts.

Shapes: M sentences, C joint embedding width. Embeddings are unit rows.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN

from clipad.studies.common import Kept
from clipad.text import representative_vector

STATES = ("normal", "anomalous")
UMAP_OPTIONS = {"n_neighbors": 50, "min_dist": 0.4, "metric": "cosine", "n_epochs": 200}
UMAP_OPTIONS |= {"init": "pca"}


@dataclass(frozen=True)
class Sentences:
    """All sentences of some categories with their embeddings.

    ``table``: M rows, columns ``category``, ``state``, ``word`` (the state word, such as "{} with flaw"),
    ``template``, ``sentence``; every category has the same words x templates in the same order.
    ``embeddings``: M x C unit rows.
    """

    table: pd.DataFrame
    embeddings: np.ndarray

    def take(self, rows: np.ndarray) -> Self:
        """Some of the sentences: their positions, or M bool."""
        return Sentences(self.table.iloc[rows].reset_index(drop=True), self.embeddings[rows])

    def of(self, category: str, state: str | None = None) -> Self:
        """The sentences of one category, or of one of its states."""
        rows = self.table["category"] == category
        if state is not None:
            rows &= self.table["state"] == state
        return self.take(rows.to_numpy())

    def each(self) -> Iterator[tuple[str, str, Self]]:
        """Category, state and its sentences, one after the other."""
        for category in self.table["category"].unique():
            for state in STATES:
                yield category, state, self.of(category, state)

    def __len__(self):
        return len(self.table)


def embed_sentences(backbone, prompts, categories: Sequence[str]) -> Sentences:
    """Encode every sentence of every category (states x templates; METHOD.md section 2)."""
    rows, parts = [], []
    for category in categories:
        words = (prompts.normal, prompts.anomalous)
        for state, own, texts in zip(STATES, words, prompts.sentences(category), strict=True):
            parts.append(F.normalize(backbone.encode_text(texts).double(), dim=-1).cpu().numpy())
            pairs = zip(product(own, prompts.templates), texts, strict=True)
            rows += [(category, state, *pair, text) for pair, text in pairs]
    columns = ["category", "state", "word", "template", "sentence"]
    return Sentences(pd.DataFrame(rows, columns=columns), np.concatenate(parts))


def umap_layout(e: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows in the plane, M x 2, by UMAP (McInnes et al., arXiv 1802.03426) with :data:`UMAP_OPTIONS`.

    Deterministic for a seed, hence one thread.
    """
    # Late: compiling takes seconds. By default numba takes torch's OpenMP pool and changes its number of threads,
    # after which both can be many times slower.
    import numba

    numba.config.THREADING_LAYER = "workqueue"
    from umap import UMAP

    options = UMAP_OPTIONS | {"n_neighbors": min(UMAP_OPTIONS["n_neighbors"], len(e) - 1)}
    return UMAP(**options, random_state=seed, n_jobs=1).fit_transform(e.astype(np.float32))


def largest_cluster(e: np.ndarray, **options) -> np.ndarray:
    """M bool: the sentences that DBSCAN averages; none where all are noise."""
    found = DBSCAN(**options).fit_predict(e)
    clusters = found[found >= 0]
    return found == np.bincount(clusters).argmax() if len(clusters) else np.zeros(len(e), bool)


def what_dbscan_does(
    sentences: Sentences, grid: Iterable[float], min_samples: int = 15
) -> pd.DataFrame:
    """A row per category, state and eps: ``share`` of the sentences averaged, ``angle`` of their mean to that of all in
    degrees, ``regime`` (finds nothing, selects, is the mean), ``words``, the share of the state words that occur in
    them, and their ``templates``. Where all is noise the mean is taken."""
    rows = []
    for category, state, own in sentences.each():
        e, words = own.embeddings, own.table["word"]
        for eps in grid:
            options = {"eps": eps, "min_samples": min_samples}
            kept = largest_cluster(e, **options)
            share = kept.mean()
            vector, mean = _vector(e, "dbscan", **options), _vector(e, "mean")
            # Through the chord: the arc cosine of nearly 1 has no digits left.
            angle = np.degrees(2 * np.arcsin(min(1, float((vector - mean).norm()) / 2)))
            row = {"category": category, "state": state, "eps": eps, "share": share, "angle": angle}
            row["regime"] = {0: "finds nothing", 1: "is the mean"}.get(share, "selects")
            row["words"] = words[kept].nunique() / words.nunique()
            rows.append(row | {"templates": tuple(own.table["template"][kept].unique())})
    return pd.DataFrame(rows)


def vectors(
    sentences: Sentences, method: str = "mean", rows: np.ndarray | None = None, **options
) -> dict[str, torch.Tensor]:
    """Per category the two text vectors, C x 2 unit columns, from all or from some of the sentences (``rows``)."""
    found = defaultdict(list)
    for category, _, own in (sentences if rows is None else sentences.take(rows)).each():
        found[category].append(_vector(own.embeddings, method, **options))
    return {category: torch.stack(pair, dim=1).float() for category, pair in found.items()}


def _vector(e: np.ndarray, method: str, **options) -> torch.Tensor:
    with warnings.catch_warnings():
        # All noise: the mean is taken, as what_dbscan_does tells.
        warnings.simplefilter("ignore")
        return representative_vector(torch.from_numpy(e), method, **options)


def measure(
    detector, kept: Kept, texts: Mapping[object, Mapping[str, torch.Tensor]]
) -> pd.DataFrame:
    """Metrics of a detector with each of many sets of text vectors: means over categories, from features kept."""
    rows = {name: kept.mean_metrics(*kept.predict_all(detector, t)) for name, t in texts.items()}
    return pd.DataFrame(rows).T


def subsets(
    sentences: Sentences, column: str, sizes: Iterable[int], draws: int, seed: int = 0
) -> dict[tuple[int, int], np.ndarray]:
    """(size, draw) -> positions of the sentences with ``size`` random templates (``column`` "template", the same for
    both states) or state words ("word", drawn per state). Sizes above what there is are left out; all is taken once."""
    rng, table, found = np.random.default_rng(seed), sentences.table, {}
    names = {state: table[column][table["state"] == state].unique() for state in STATES}
    fewest, most = sorted(map(len, names.values()))
    for size in sorted(size for size in set(sizes) if size <= fewest):
        for draw in range(draws if size < most else 1):
            chosen = {state: rng.choice(n, size, replace=False) for state, n in names.items()}
            if column == "template":
                chosen["anomalous"] = chosen["normal"]
            taken = [table[column].isin(chosen[s]) & (table["state"] == s) for s in STATES]
            found[size, draw] = np.flatnonzero(taken[0] | taken[1])
    return found
