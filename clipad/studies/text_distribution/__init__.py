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
from sklearn.cluster import DBSCAN
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity
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

    def take(self, rows: np.ndarray) -> Sentences:
        """Some of the sentences: their positions, or M bool."""
        return Sentences(self.table.iloc[rows].reset_index(drop=True), self.embeddings[rows])

    def of(self, category: str, state: str | None = None) -> Sentences:
        """The sentences of one category, or of one of its states."""
        rows = self.table["category"] == category
        if state is not None:
            rows &= self.table["state"] == state
        return self.take(rows.to_numpy())

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
        e = pd.DataFrame(e - e.mean(axis=0))

        def between(*columns):
            means = e.groupby([table[column] for column in columns]).transform("mean")
            return (means**2).to_numpy().sum() / (e**2).to_numpy().sum()

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
    words = [sentences.table["state"], sentences.table["word"]]
    centres = pd.DataFrame(sentences.embeddings).groupby(words, sort=False).mean()
    return pd.DataFrame(cosine_similarity(centres), index=centres.index, columns=centres.index)


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


def largest_cluster(e: np.ndarray, **options) -> np.ndarray:
    """M bool: the sentences that DBSCAN averages; none where all are noise."""
    found = DBSCAN(**options).fit_predict(e)
    clusters = found[found >= 0]
    return found == np.bincount(clusters).argmax() if len(clusters) else np.zeros(len(e), bool)


def kept_by_dbscan(sentences: Sentences, **options) -> pd.DataFrame:
    """Which sentences DBSCAN averages, a row per category and state: how many, how many state words and templates
    (articles aside) occur in them ("3 of 11"), and which templates."""
    rows = {}
    for category, state, own in sentences.each():
        table = own.table.assign(template=own.table["template"].map(without_articles))
        kept = table[largest_cluster(own.embeddings, **options)]
        row = {"sentences": f"{len(kept)} of {len(table)}"}
        for name, column in (("state words", "word"), ("templates", "template")):
            row[name] = f"{kept[column].nunique()} of {table[column].nunique()}"
        names = ", ".join(name.rstrip(".") for name in kept["template"].unique())
        rows[category, state] = row | {"which templates": names or "none"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["category", "state"])


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


def shared_templates(found: pd.DataFrame) -> pd.Series:
    """Per eps of :func:`what_dbscan_does`, the templates that both states keep / those that either keeps, mean over
    categories; NaN for nothing."""

    def share(templates):
        one, other = map(set, templates)
        return len(one & other) / len(one | other) if one | other else np.nan

    shares = found.groupby(["eps", "category"])["templates"].agg(share)
    return shares.groupby("eps").mean()


# What counts ----------------------------------------------------------------------------------------------------


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


# Choices of sentences, the same in every category: their positions.


def resampled(sentences: Sentences, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Bootstrap samples of the sentences, with replacement within each state."""
    rng, found = np.random.default_rng(seed), []
    groups = sentences.table.groupby(["category", "state"], sort=False).indices
    sizes = {state: len(own) for (_, state), own in groups.items()}
    for _ in range(draws):
        drawn = {state: rng.integers(size, size=size) for state, size in sizes.items()}
        found.append(np.concatenate([own[drawn[state]] for (_, state), own in groups.items()]))
    return found


def subsets(
    sentences: Sentences, column: str, sizes: Iterable[int], draws: int, seed: int = 0
) -> dict[tuple[int, int], np.ndarray]:
    """(size, draw) -> the sentences with ``size`` random templates (``column`` "template", the same for both states) or
    state words ("word", drawn per state). Sizes above what there is are left out; the full size is taken once."""
    rng, table = np.random.default_rng(seed), sentences.table
    names = [table[column][table["state"] == state].unique() for state in STATES]
    found = {}
    for size in sorted(size for size in set(sizes) if size <= min(map(len, names))):
        full = all(len(n) == size for n in names)
        for draw in range(1 if full else draws):
            normal, anomalous = (set(rng.choice(n, size, replace=False)) for n in names)
            of_state = {
                "normal": normal,
                "anomalous": normal if column == "template" else anomalous,
            }
            pairs = zip(table["state"], table[column], strict=True)
            found[size, draw] = np.flatnonzero([name in of_state[state] for state, name in pairs])
    return found


def leave_one_word_out(sentences: Sentences) -> dict[str, np.ndarray]:
    """ "state: word" -> all sentences but those with that word; a state with a single word keeps it."""
    table = sentences.table
    found = {}
    for state in STATES:
        words = table["word"][table["state"] == state].unique()
        for word in words if len(words) > 1 else ():
            left = (table["state"] != state) | (table["word"] != word)
            found[f"{state}: {word}"] = np.flatnonzero(left)
    return found
