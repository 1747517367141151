"""Notebook 01: the sentences of a state as a distribution, what each method takes from it, and whether that counts.

Shapes: M sentences, C joint embedding width. Embeddings are unit rows.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN, MeanShift
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

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

    def of(self, category: str, state: str | None = None) -> Sentences:
        """The sentences of one category, or of one of its states."""
        rows = self.table["category"] == category
        if state is not None:
            rows &= self.table["state"] == state
        return Sentences(self.table[rows].reset_index(drop=True), self.embeddings[rows])

    def each(self) -> Iterator[tuple[str, str, Sentences]]:
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


def without_articles(template: str) -> str:
    """Templates that differ in "a" and "the" only are one group: one of them in training would give the other away."""
    return " ".join(word for word in template.split() if word not in ("a", "the", "an"))


def umap_layout(e: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows in the plane, M x 2, by UMAP (McInnes et al., arXiv 1802.03426) with :data:`UMAP_OPTIONS`.

    Deterministic for a seed, hence one thread. Raises ValueError for fewer than 10 rows: nothing to lay out.
    """
    if len(e) < 10:
        raise ValueError(f"a layout of {len(e)} sentences says nothing: at least 10 are needed")
    # Late: compiling takes seconds. By default numba takes torch's OpenMP pool and changes its number of threads,
    # after which both can be many times slower.
    import numba

    numba.config.THREADING_LAYER = "workqueue"
    from umap import UMAP

    options = UMAP_OPTIONS | {"n_neighbors": min(UMAP_OPTIONS["n_neighbors"], len(e) - 1)}
    return UMAP(**options, random_state=seed, n_jobs=1).fit_transform(e.astype(np.float32))


# The distribution -----------------------------------------------------------------------------------------------


def explained_variance(sentences: Sentences, seed: int = 0) -> pd.DataFrame:
    """Shares of the sum of squared distances to the overall mean, for the sentences of one category.

    A factor's share is what its group means explain; words lie within states, templates cross them, and every word
    stands in every template, so with ``rest`` (interactions) the shares add up to 1. ``chance``: the same for rows in
    random order.
    """
    table = sentences.table

    def shares(e):
        e = e - e.mean(axis=0)
        total = (e**2).sum()

        def between(*columns):
            group = table.groupby(list(columns)).ngroup().to_numpy()
            sums = np.zeros((group.max() + 1, e.shape[1]))
            np.add.at(sums, group, e)
            return float(((sums**2).sum(axis=1) / np.bincount(group)).sum() / total)

        found = {"state": between("state")}
        found["state word"] = between("state", "word") - found["state"]
        found["template"] = between("template")
        return found | {"rest": 1 - sum(found.values())}

    shuffled = np.random.default_rng(seed).permutation(sentences.embeddings)
    return pd.DataFrame({"share": shares(sentences.embeddings), "chance": shares(shuffled)})


def separability(sentences: Sentences, draws: int = 10, seed: int = 0) -> pd.DataFrame:
    """Balanced accuracy of a linear probe that tells the states apart, beside a control; a row per hold-out.

    Held out are templates (variants in the article together), state words, or the phrasing (words with "with" or
    "without" against the others). The control gives the *state words* random states, ``draws`` times: a sentence keeps
    its neighbours, only the meaning goes. Columns: ``state``, ``control``, ``control_low``, ``control_high``.
    """
    table, e = sentences.table, sentences.embeddings
    words, position = np.unique(table["state"] + "|" + table["word"], return_inverse=True)
    truth = np.array([word.startswith(STATES[1]) for word in words])
    groups = {
        "templates": table["template"].map(without_articles),
        "state words": position,
        "phrasing": table["word"].str.contains(r"\b(?:with|without)\b"),
    }
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(truth) for _ in range(draws)]
    rows = {}
    for name, group in groups.items():
        group = np.asarray(group)
        control = [probe_accuracy(e, labels[position], group) for labels in shuffled]
        ends = (np.mean(control), np.min(control), np.max(control))
        rows[name] = (probe_accuracy(e, truth[position], group), *ends)
    columns = ["state", "control", "control_low", "control_high"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("held out")


def probe_accuracy(e: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Balanced accuracy of a logistic regression on M x C rows; each group is predicted by a probe that saw none of it.

    NaN where leaving a group out leaves one label only.
    """
    if pd.Series(groups).groupby(labels).nunique().min() < 2 or len(np.unique(labels)) < 2:
        return float("nan")
    model = LogisticRegression(solver="liblinear")  # small problems; no iteration limit to tune
    predicted = cross_val_predict(model, e, labels, groups=groups, cv=LeaveOneGroupOut())
    return float(balanced_accuracy_score(labels, predicted))


def word_cosines(sentences: Sentences) -> pd.DataFrame:
    """Cosines between the mean embeddings of the state words, words x words, normal ones first."""
    groups = sentences.table.groupby(["state", "word"], sort=False).indices
    centres = np.stack([sentences.embeddings[rows].mean(axis=0) for rows in groups.values()])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    names = pd.MultiIndex.from_tuples(groups, names=["state", "word"])
    return pd.DataFrame(centres @ centres.T, index=names, columns=names)


def negation_pairs(words: pd.DataFrame) -> pd.DataFrame:
    """For each x that occurs as "with x" and "without x" (input: :func:`word_cosines`): the cosine of the two,
    ``negation``, and the mean cosine of "without x" with the other normal words, ``same_state``."""
    rows = {}
    for state, word in words.index:
        positive = ("anomalous", word.replace("without", "with"))
        if state == "normal" and "without" in word and positive in words.index:
            own = words[state, word]
            name = word.replace("{} without ", "")
            rows[name] = (own[positive], own["normal"].drop(word).mean())
    return pd.DataFrame.from_dict(rows, orient="index", columns=["negation", "same_state"])


# What each method takes -----------------------------------------------------------------------------------------


def largest_cluster(e: np.ndarray, method: str, **options) -> np.ndarray:
    """M bool: the sentences that ``dbscan`` or ``mean_shift`` averages; none where all are noise."""
    found = {"dbscan": DBSCAN, "mean_shift": MeanShift}[method](**options).fit_predict(e)
    clusters = found[found >= 0]
    return found == np.bincount(clusters).argmax() if len(clusters) else np.zeros(len(e), bool)


def angle_to_mean(e: np.ndarray, method: str, **options) -> float:
    """Degrees between a method's vector and the mean's."""
    vector, mean = (_vector(e, m, **o) for m, o in ((method, options), ("mean", {})))
    # Through the chord: the arc cosine of nearly 1 has no digits left.
    return float(torch.rad2deg(2 * torch.asin(((vector - mean).norm() / 2).clamp(max=1))))


def _vector(e: np.ndarray, method: str, **options) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all noise: the mean is taken, as what_dbscan_does tells
        return representative_vector(torch.from_numpy(e), method, **options)


def what_dbscan_does(
    sentences: Sentences, grid: Iterable[float], min_samples: int = 15
) -> pd.DataFrame:
    """A row per eps, category and state: ``share`` of the sentences used, ``angle`` to the mean in degrees and
    ``regime``: finds nothing, selects, is the mean."""
    rows = []
    for category, state, own in sentences.each():
        for eps in grid:
            options = {"eps": eps, "min_samples": min_samples}
            share = float(largest_cluster(own.embeddings, "dbscan", **options).mean())
            angle = angle_to_mean(own.embeddings, "dbscan", **options)
            regime = {0: "finds nothing", 1: "is the mean"}.get(share, "selects")
            rows.append((category, state, eps, share, angle, regime))
    columns = ["category", "state", "eps", "share", "angle", "regime"]
    return pd.DataFrame(rows, columns=columns)


def shared_templates(
    sentences: Sentences, grid: Iterable[float], min_samples: int = 15
) -> pd.Series:
    """Per eps, the templates that both states keep / those that either keeps, mean over categories; NaN for nothing."""
    found = {}
    for eps in grid:
        kept = defaultdict(list)
        for category, _, own in sentences.each():
            mask = largest_cluster(own.embeddings, "dbscan", eps=eps, min_samples=min_samples)
            kept[category].append(set(own.table["template"][mask]))
        shares = [len(a & b) / len(a | b) for a, b in kept.values() if a | b]
        found[eps] = np.mean(shares) if shares else np.nan
    return pd.Series(found, name="shared templates")


def kept_by_dbscan(sentences: Sentences, **options) -> pd.DataFrame:
    """Which sentences DBSCAN averages, a row per category and state: how many, how many state words and templates
    (articles aside) occur in them, and which templates."""
    rows = {}
    for category, state, own in sentences.each():
        table = own.table.assign(template=own.table["template"].map(without_articles))
        kept = table[largest_cluster(own.embeddings, "dbscan", **options)]
        row = {"sentences": f"{len(kept)} of {len(table)}"}
        for name, column in (("state words", "word"), ("templates", "template")):
            row[name] = f"{kept[column].nunique()} of {table[column].nunique()}"
        names = ", ".join(t.rstrip(".") for t in kept["template"].unique())
        rows[category, state] = row | {"which templates": names or "none"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["category", "state"])


# What counts ----------------------------------------------------------------------------------------------------

Rows = tuple[np.ndarray, np.ndarray]
"""indices into the normal and the anomalous sentences of a category, the same for every category"""


def vectors(
    sentences: Sentences, method: str = "mean", rows: Rows | None = None, **options
) -> dict[str, torch.Tensor]:
    """Per category the two text vectors, C x 2 unit columns, from all or from some of the sentences."""
    found = defaultdict(list)
    for category, state, own in sentences.each():
        chosen = slice(None) if rows is None else rows[STATES.index(state)]
        found[category].append(_vector(own.embeddings[chosen], method, **options))
    return {category: torch.stack(pair, dim=1).float() for category, pair in found.items()}


def measure(
    detector, kept: Kept, texts: Mapping[object, Mapping[str, torch.Tensor]]
) -> pd.DataFrame:
    """Metrics of a detector with each of many sets of text vectors: means over categories, from features kept."""
    rows = {name: kept.mean_metrics(*kept.predict_all(detector, t)) for name, t in texts.items()}
    return pd.DataFrame(rows).T


def _words_and_templates(sentences: Sentences) -> list[pd.DataFrame]:
    table = sentences.of(sentences.table["category"].iloc[0]).table
    return [table[table["state"] == state].reset_index(drop=True) for state in STATES]


def resampled(sentences: Sentences, draws: int, seed: int = 0) -> list[Rows]:
    """Bootstrap samples of the sentences, with replacement within each state."""
    rng = np.random.default_rng(seed)
    sizes = [len(table) for table in _words_and_templates(sentences)]
    return [tuple(rng.integers(n, size=n) for n in sizes) for _ in range(draws)]


def subsets(
    sentences: Sentences, column: str, sizes: Iterable[int], draws: int, seed: int = 0
) -> dict[tuple[int, int], Rows]:
    """(size, draw) -> the sentences with ``size`` random templates (``column`` "template", the same for both states) or
    state words ("word", drawn per state). Sizes above what there is are left out; the full size is taken once."""
    rng = np.random.default_rng(seed)
    tables = _words_and_templates(sentences)
    names = [table[column].unique() for table in tables]
    found = {}
    for size in sorted(size for size in set(sizes) if size <= min(map(len, names))):
        full = all(len(n) == size for n in names)
        for draw in range(1 if full else draws):
            picked = [rng.choice(n, size, replace=False) for n in names]
            picked = [picked[0]] * 2 if column == "template" else picked
            pairs = zip(tables, picked, strict=True)
            found[size, draw] = tuple(np.flatnonzero(t[column].isin(p)) for t, p in pairs)
    return found


def leave_one_word_out(sentences: Sentences) -> dict[str, Rows]:
    """ "state: word" -> all sentences but those with that word; a state with a single word keeps it."""
    tables = _words_and_templates(sentences)
    found = {}
    for k, (state, table) in enumerate(zip(STATES, tables, strict=True)):
        for word in table["word"].unique() if table["word"].nunique() > 1 else ():
            rows = [np.arange(len(t)) for t in tables]
            rows[k] = np.flatnonzero(table["word"] != word)
            found[f"{state}: {word}"] = tuple(rows)
    return found
