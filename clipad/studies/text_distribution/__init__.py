"""Sentences as a distribution, and what one representative vector costs (notebook 01, paper section 3.1).

Two halves. The first looks at the embeddings alone: cosines, explained variance, spectrum, separability, what each
selection method picks. The second asks what counts: a :class:`Selection` is one way to come to the two text vectors
(some of the sentences, one method), and :func:`measure` scores hundreds of them on features that are computed once.

Shapes: M sentences, C joint embedding width, R selections. Embeddings are unit rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.spatial import procrustes
from sklearn.cluster import DBSCAN, MeanShift
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, silhouette_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from tqdm import tqdm

from clipad.detectors import Features
from clipad.evaluation import load_images, published_image_score, read_masks
from clipad.metrics import image_metrics, pixel_metrics
from clipad.text import check_method

STATES = ("normal", "anomalous")


# --- sentences ------------------------------------------------------------------------------------------------------


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
        """The sentences of one category, or of one of its states; ValueError if there are none."""
        rows = (self.table["category"] == category) & (
            state is None or self.table["state"] == state
        )
        return self.where(rows, f"{category!r} ({state or 'both states'})")

    def where(self, rows, what: str = "this choice") -> Sentences:
        """The sentences where a boolean column is true."""
        rows = np.broadcast_to(np.asarray(rows, bool), len(self.table))
        if not rows.any():
            raise ValueError(
                f"no sentences of {what}; categories: {', '.join(self.table['category'].unique())}"
            )
        return Sentences(self.table[rows].reset_index(drop=True), self.embeddings[rows])

    def one_article(self) -> Sentences:
        """Without the second of two templates that differ in the article only."""
        keys = self.table.assign(template=self.table["template"].map(without_articles))
        return self.where(~keys.duplicated(["category", "state", "word", "template"]))

    def __len__(self):
        return len(self.table)


def embed_sentences(backbone, prompts, categories: Sequence[str]) -> Sentences:
    """Encode every sentence of every category (states x templates; METHOD.md section 2)."""
    rows, parts = [], []
    for category in categories:
        groups = zip(
            STATES, (prompts.normal, prompts.anomalous), prompts.sentences(category), strict=True
        )
        for state, words, sentences in groups:
            parts.append(F.normalize(backbone.encode_text(sentences).double(), dim=-1).numpy())
            rows += [
                (category, state, word, template, sentence)
                for (word, template), sentence in zip(
                    product(words, prompts.templates), sentences, strict=True
                )
            ]
    columns = ["category", "state", "word", "template", "sentence"]
    return Sentences(pd.DataFrame(rows, columns=columns), np.concatenate(parts))


# --- the distribution -----------------------------------------------------------------------------------------------


def pairwise_cosines(sentences: Sentences) -> dict[str, np.ndarray]:
    """Cosine of every pair of different sentences of one category: within each state, and between the two."""
    e = [sentences.embeddings[sentences.table["state"] == state] for state in STATES]
    found = {
        f"within {state}": (x @ x.T)[np.triu_indices(len(x), 1)]
        for state, x in zip(STATES, e, strict=True)
    }
    return found | {"between": (e[0] @ e[1].T).ravel()}


def explained_variance(sentences: Sentences, seed: int = 0) -> pd.DataFrame:
    """Shares of the total sum of squares (multivariate analysis of variance of a complete design).

    The total is the sum of squared distances to the mean of all rows. A factor's share is what its group means
    explain; words lie within states, everything else is crossed, and the design is complete, so the shares add up to
    1. ``chance`` is the same for rows in random order, on average df / (M - 1).

    Rows: object and object x state (with more than one category), state, state word (within its state), template,
    rest (interactions). Columns: ``share``, ``df``, ``chance``.
    """
    table, e = sentences.table, sentences.embeddings
    count = table[["category", "state", "word", "template"]].nunique()
    objects, words, templates = (
        count["category"],
        table.groupby("state")["word"].nunique().sum(),
        count["template"],
    )

    def shares(e):
        e = e - e.mean(axis=0)
        total = (e**2).sum()

        def between(*columns):
            group = table.groupby(list(columns)).ngroup().to_numpy()
            sums = np.zeros((group.max() + 1, e.shape[1]))
            np.add.at(sums, group, e)
            return float(((sums**2).sum(axis=1) / np.bincount(group)).sum() / total)

        found = {}
        if objects > 1:
            found["object"] = between("category")
        found["state"] = between("state")
        if objects > 1:
            found["object × state"] = (
                between("category", "state") - found["object"] - found["state"]
            )
        found["state word"] = between("state", "word") - found["state"]
        found["template"] = between("template")
        return found | {"rest": 1 - sum(found.values())}

    df = {"object": objects - 1, "state": 1, "object × state": objects - 1, "state word": words - 2}
    df = {k: int(v) for k, v in (df | {"template": templates - 1}).items()}
    share = shares(e)
    df["rest"] = len(e) - 1 - sum(df[k] for k in share if k != "rest")
    shuffled = shares(np.random.default_rng(seed).permutation(e))
    return pd.DataFrame({"share": share, "df": {k: df[k] for k in share}, "chance": shuffled}).loc[
        list(share)
    ]


def spectrum(e: np.ndarray) -> np.ndarray:
    """Shares of variance along the principal components of M x C rows (about their mean), largest first."""
    values = np.linalg.svd(e - e.mean(axis=0), compute_uv=False) ** 2
    return values / values.sum()


def effective_dimension(shares: np.ndarray) -> float:
    """Participation ratio 1 / sum p^2 of a spectrum that sums to 1: how many directions share the variance.

    >>> effective_dimension(np.array([0.5, 0.5, 0.0]))
    2.0
    """
    return float(1 / (np.asarray(shares) ** 2).sum())


def without_articles(template: str) -> str:
    """Templates that differ in "a" and "the" only are one group: one of them in training would give the other away.

    >>> without_articles("a dark photo of the {}.") == without_articles("a dark photo of a {}.")
    True
    """
    return " ".join(word for word in template.split() if word not in ("a", "the", "an"))


def probe_accuracy(e: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Balanced accuracy of a linear probe (logistic regression) on M x C rows.

    Each group is predicted by a probe that saw none of it. NaN where leaving a group out leaves one label only.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    if pd.Series(groups).groupby(labels).nunique().min() < 2 or len(np.unique(labels)) < 2:
        return float("nan")
    folds = LeaveOneGroupOut()
    # liblinear: small problems, and it needs no iteration limit to be tuned.
    predicted = cross_val_predict(
        LogisticRegression(solver="liblinear"), e, labels, groups=groups, cv=folds
    )
    return float(balanced_accuracy_score(labels, predicted))


def separability(sentences: Sentences, draws: int = 10, seed: int = 0) -> pd.DataFrame:
    """How well the state can be told from a sentence's embedding, beside a control.

    Rows: silhouette (cosine distance; 1 = far apart, 0 = overlapping), and linear probes that hold out templates
    (variants in the article together), state words, phrasing (words with "with" or "without" against the others, so
    that the word "without" alone cannot give the state away), and, with more than one category, objects. The control
    gives the *state words* random states, ``draws`` times: a sentence keeps its neighbours, only the meaning goes.

    Columns: ``state``, ``control`` (mean), ``control_low``, ``control_high`` (smallest and largest of the draws).
    """
    table, e = sentences.table, sentences.embeddings
    # "with" in one state and the same words in the other never coincide, so a word names its state.
    words, position = np.unique(table["state"] + "|" + table["word"], return_inverse=True)
    truth = np.array([word.startswith(STATES[1]) for word in words])
    held_out = {
        "probe, held-out templates": table["template"].map(without_articles),
        "probe, held-out state words": position,
        "probe, held-out phrasing": table["word"]
        .str.split()
        .map(lambda w: bool({"with", "without"} & set(w))),
    }
    if table["category"].nunique() > 1:
        held_out["probe, held-out objects"] = table["category"]

    def judge(word_labels):
        labels = word_labels[position]
        found = {"silhouette": float(silhouette_score(e, labels, metric="cosine"))}
        return found | {
            name: probe_accuracy(e, labels, np.asarray(g)) for name, g in held_out.items()
        }

    rng = np.random.default_rng(seed)
    control = pd.DataFrame([judge(rng.permutation(truth)) for _ in range(draws)])
    return pd.DataFrame(
        {
            "state": judge(truth),
            "control": control.mean(),
            "control_low": control.min(),
            "control_high": control.max(),
        }
    )


def silhouettes(sentences: Sentences) -> dict[str, float]:
    """Silhouette (cosine distance) by state, state word, template (articles aside) and object; NaN for one group."""
    table = sentences.table
    keys = {
        "state": table["state"],
        "state word": table["state"] + table["word"],
        "template": table["template"].map(without_articles),
        "object": table["category"],
    }
    return {
        name: float(silhouette_score(sentences.embeddings, key.to_numpy(), metric="cosine"))
        if 1 < key.nunique() < len(key)
        else float("nan")
        for name, key in keys.items()
    }


def word_cosines(sentences: Sentences) -> pd.DataFrame:
    """Cosines between the mean embeddings of the state words, words x words, normal ones first."""
    groups = sentences.table.groupby(["state", "word"], sort=False).indices
    centres = np.stack([sentences.embeddings[rows].mean(axis=0) for rows in groups.values()])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    names = pd.MultiIndex.from_tuples(groups, names=["state", "word"])
    return pd.DataFrame(centres @ centres.T, index=names, columns=names)


def negation_pairs(words: pd.DataFrame) -> pd.DataFrame:
    """ "without x" beside "with x", for the words x that occur both ways (input: :func:`word_cosines`).

    Columns: ``negation`` (cosine of the two), ``same_state`` (mean cosine of "without x" with the other normal words).
    """
    rows = {}
    for word in words.index.get_level_values("word"):
        positive, normal = word.replace("without", "with"), ("normal", word)
        if "without" in word and ("anomalous", positive) in words.index and normal in words.index:
            others = words.loc[normal, "normal"].drop(word)
            rows[word.replace("{} without ", "")] = {
                "negation": words.loc[normal, ("anomalous", positive)],
                "same_state": others.mean(),
            }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["negation", "same_state"])


def extremes(sentences: Sentences, count: int = 3) -> pd.DataFrame:
    """The sentences nearest to and furthest from the centre of each state: ``sentence`` and its ``cosine``."""
    frames = []
    for state in STATES:
        rows = sentences.table["state"] == state
        e = sentences.embeddings[rows]
        centre = e.mean(axis=0)
        cosine = e @ centre / np.linalg.norm(centre)
        order = np.argsort(-cosine, kind="stable")
        for where, picked in (("nearest", order[:count]), ("furthest", order[-count:])):
            frame = sentences.table[rows].iloc[picked][["state", "sentence"]]
            frames.append(frame.assign(where=where, cosine=cosine[picked]))
    return pd.concat(frames)[["state", "where", "cosine", "sentence"]].reset_index(drop=True)


UMAP_OPTIONS = {
    "n_neighbors": 50,
    "min_dist": 0.4,
    "metric": "cosine",
    "n_epochs": 200,
    "init": "pca",
}


def umap_layout(e: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows in the plane, M x 2, by UMAP (McInnes et al., arXiv 1802.03426) with :data:`UMAP_OPTIONS`.

    Deterministic for a seed, hence one thread. Raises ValueError for fewer than 10 rows: nothing to lay out.
    """
    if len(e) < 10:
        raise ValueError(f"a layout of {len(e)} sentences says nothing: at least 10 are needed")
    # Late: compiling takes seconds, and the rest of the module does without it. By default numba takes torch's and
    # scikit-learn's OpenMP pool and changes its number of threads, after which both can be many times slower.
    import numba

    numba.config.THREADING_LAYER = "workqueue"
    from umap import UMAP

    options = UMAP_OPTIONS | {"n_neighbors": min(UMAP_OPTIONS["n_neighbors"], len(e) - 1)}
    return UMAP(**options, random_state=seed, n_jobs=1).fit_transform(e.astype(np.float32))


def layout_disparity(first: np.ndarray, second: np.ndarray) -> float:
    """Procrustes disparity of two layouts of the same rows: 0 = equal up to shift, scale, rotation; 1 = unrelated."""
    return float(procrustes(first, second)[2])


# --- what each method picks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What a method does with the M sentences of one state.

    ``weights``: M, sum 1; the vector is their weighted sum, normalised (PCA first takes a constant off each row).
    Clustering methods weigh their largest cluster evenly and the rest by 0. ``labels``: M cluster numbers, -1 for
    noise; None for methods that do not cluster. ``vector``: C, unit, equal to :func:`clipad.representative_vector`,
    which is the mean's where every sentence is noise (then the weights are all 0).
    """

    vector: np.ndarray
    weights: np.ndarray
    labels: np.ndarray | None = None

    @property
    def used(self) -> float:
        """Effective number of sentences, (sum |w|)^2 / sum w^2: of a cluster its size, 0 where all is noise."""
        return float(np.abs(self.weights).sum() ** 2 / max((self.weights**2).sum(), 1e-12))


def choose(e: np.ndarray, method: str, **options) -> Choice:
    """:func:`clipad.representative_vector` taken apart: which of the M x C unit rows it uses, and how much.

    Options as there, with the published defaults. Raises ValueError for a method or an option that does not exist.
    """
    check_method(method, options)
    weights, labels, rows = np.ones(len(e)), None, e
    if method == "pca":
        rows = e - e.mean(axis=1, keepdims=True)
        weights = np.linalg.eigh(rows @ rows.T)[1][:, -1]
        weights = weights * (1 if (weights @ rows) @ e.mean(axis=0) >= 0 else -1)
    elif method == "kde":
        # scikit-learn's KernelDensity gives the same up to a constant, twenty times slower for so few rows.
        squared = 2 - 2 * (e @ e.T).clip(-1, 1)
        weights = np.exp(-squared / (2 * options.get("bandwidth", 0.3) ** 2)).sum(axis=1)
    elif method != "mean":
        cluster = DBSCAN if method == "dbscan" else MeanShift
        defaults = {"eps": 0.5, "min_samples": 15} if method == "dbscan" else {"bandwidth": 2.0}
        labels = cluster(**defaults | options).fit_predict(e)
        largest = np.bincount(labels[labels >= 0], minlength=1).argmax()
        weights = (labels == largest).astype(float)
    vector = weights @ rows if weights.any() else e.mean(axis=0)
    total = weights.sum()
    return Choice(vector / np.linalg.norm(vector), weights / total if total else weights, labels)


def choose_all(
    sentences: Sentences, methods: Mapping[Any, tuple[str, dict]]
) -> dict[tuple[str, str, Any], Choice]:
    """:func:`choose` for every category and state and each of the methods (name -> method and options)."""
    groups = sentences.table.groupby(["category", "state"], sort=False).indices
    return {
        (*group, name): choose(sentences.embeddings[rows], method, **options)
        for group, rows in groups.items()
        for name, (method, options) in methods.items()
    }


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle of two vectors in degrees, exact for small ones, too (where the arc cosine would lose its digits).

    >>> round(float(np.radians(angle(np.array([1.0, 0.0]), np.array([1.0, 1e-6])))), 12)
    1e-06
    """
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))))


SAME = 0.01
"""degrees: below this a vector counts as the mean's"""


def describe_choices(sentences: Sentences, choices: Mapping[tuple, Choice]) -> pd.DataFrame:
    """What was chosen, a row per category, state and method.

    Columns: ``angle`` (degrees to the mean's vector), ``used`` (effective number of sentences), ``of``, ``share``
    (used / of), ``clusters`` and ``noise`` (sentences in none; NaN for methods that do not cluster), and ``regime``:
    "finds nothing" (all noise, the mean is taken), "is the mean" (angle below 0.01 degrees), "selects".
    """
    rows = []
    means = choose_all(sentences, {"mean": ("mean", {})})
    for (category, state, name), choice in choices.items():
        tilt = angle(choice.vector, means[category, state, "mean"].vector)
        labels = choice.labels
        rows.append(
            {
                "category": category,
                "state": state,
                "method": name,
                "angle": tilt,
                "used": choice.used,
                "of": len(choice.weights),
                "share": choice.used / len(choice.weights),
                "clusters": np.nan if labels is None else labels.max() + 1,
                "noise": np.nan if labels is None else (labels < 0).sum(),
                "regime": "finds nothing"
                if not choice.used
                else "is the mean"
                if tilt < SAME
                else "selects",
            }
        )
    return pd.DataFrame(rows)


def angles_between(choices: Mapping[tuple, Choice]) -> pd.DataFrame:
    """Angles in degrees between the vectors of every two methods, averaged over categories and states."""
    names = list(dict.fromkeys(name for _, _, name in choices))
    groups = list(dict.fromkeys(key[:2] for key in choices))
    angles = [
        [[angle(choices[*g, a].vector, choices[*g, b].vector) for b in names] for a in names]
        for g in groups
    ]
    return pd.DataFrame(np.mean(angles, axis=0), index=names, columns=names)


def kept(sentences: Sentences, choices: Mapping[tuple, Choice], method: Any) -> pd.DataFrame:
    """Which sentences have a weight above 0 in the choices of one method, a row per category and state.

    Columns: ``sentences``, ``state words``, ``templates`` (articles aside) as "3 of 13", ``names`` of the templates.
    """
    rows = {}
    for (category, state, name), choice in choices.items():
        if name != method:
            continue
        own = sentences.of(category, state).table
        own = own.assign(template=own["template"].map(without_articles))
        chosen = own[choice.weights > 0]
        counts = {k: f"{chosen[k].nunique()} of {own[k].nunique()}" for k in ("word", "template")}
        rows[category, state] = {
            "sentences": f"{len(chosen)} of {len(own)}",
            "state words": counts["word"],
            "templates": counts["template"],
            "names": ", ".join(t.rstrip(".") for t in chosen["template"].unique()) or "none",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["category", "state"])


# --- what counts: metrics of many selections ------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """One way to come to the two text vectors of a category: these sentences, this method.

    ``rows``: indices into the sentences of each state (all if None), the same for every category. ``draw``: number
    of the random draw, 0 for the full set; ``resample_images``: also judge it on a bootstrap sample of the images.
    """

    experiment: str
    value: Any
    draw: int = 0
    method: str = "mean"
    options: dict = field(default_factory=dict)
    rows: tuple[np.ndarray, np.ndarray] | None = None
    resample_images: bool = False


def _first_category(sentences: Sentences) -> list[pd.DataFrame]:
    table = sentences.of(sentences.table["category"].iloc[0]).table
    return [table[table["state"] == state].reset_index(drop=True) for state in STATES]


def bootstrap(
    sentences: Sentences, methods: Mapping[str, tuple[str, dict]], draws: int, seed: int = 0
) -> list[Selection]:
    """Every method on the full set (draw 0) and on ``draws`` bootstrap samples, the same for all methods.

    Sentences are drawn with replacement within their state, and the images as well (``resample_images``).
    """
    rng = np.random.default_rng(seed)
    sizes = [len(table) for table in _first_category(sentences)]
    samples = [None, *(tuple(rng.integers(n, size=n) for n in sizes) for _ in range(draws))]
    return [
        Selection("method", name, draw, method, options, rows, resample_images=draw > 0)
        for draw, rows in enumerate(samples)
        for name, (method, options) in methods.items()
    ]


def subsets(
    sentences: Sentences, column: str, sizes: Iterable[int], draws: int, seed: int = 0
) -> list[Selection]:
    """The mean of the sentences with ``size`` random templates (``column`` "template") or state words ("word").

    Words are drawn per state. Sizes above what there is are left out; the full size is taken once.
    """
    rng = np.random.default_rng(seed)
    tables = _first_category(sentences)
    names = [table[column].unique() for table in tables]
    largest = min(len(n) for n in names)
    found = []
    for size in sorted({size for size in sizes if size <= largest}):
        full = all(len(n) == size for n in names)
        for draw in range(1 if full else draws):
            if column == "template":  # the same templates for both states
                picked = [rng.choice(names[0], size, replace=False)] * 2
            else:
                picked = [rng.choice(n, size, replace=False) for n in names]
            rows = tuple(
                np.flatnonzero(t[column].isin(p)) for t, p in zip(tables, picked, strict=True)
            )
            found.append(Selection(f"{column}s", size, draw, rows=rows))
    return found


def leave_one_word_out(sentences: Sentences, method: str = "mean", **options) -> list[Selection]:
    """Without each state word in turn; a state with a single word keeps it. The value names state and word."""
    tables = _first_category(sentences)
    found = []
    for i, (state, table) in enumerate(zip(STATES, tables, strict=True)):
        for word in table["word"].unique() if table["word"].nunique() > 1 else ():
            rows = [np.arange(len(t)) for t in tables]
            rows[i] = np.flatnonzero(table["word"] != word)
            found.append(
                Selection(
                    f"leave out, {method}", f"{state}: {word}", 0, method, options, tuple(rows)
                )
            )
    return found


def curve(method: str, option: str, values: Iterable[float], **fixed) -> list[Selection]:
    """One method on all sentences over values of one of its options."""
    return [
        Selection(f"{method} {option}", float(value), 0, method, fixed | {option: float(value)})
        for value in values
    ]


def text_vectors(states: Sequence[np.ndarray], selection: Selection) -> tuple[torch.Tensor, bool]:
    """The text vectors of one selection and whether a state fell back to its mean because all was noise.

    ``states``: the embeddings of the normal and the anomalous sentences, M x C each. Returns C x 2 unit columns.
    """
    rows = [e if selection.rows is None else e[selection.rows[i]] for i, e in enumerate(states)]
    found = [choose(e, selection.method, **selection.options) for e in rows]
    text = torch.from_numpy(np.stack([choice.vector for choice in found], axis=1)).float()
    return text, any(not choice.used for choice in found)


def measure(
    sentences: Sentences,
    selections: Sequence[Selection],
    detectors,
    dataset,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Metrics of every selection on every category, exact, fractions.

    Images go through each detector once per category; a selection then costs two small products and the metrics. One
    category's features are in memory at a time. Where images are resampled, within each label and the same for all
    selections of a draw, a second row (``images`` "resampled") stands beside the first ("all").

    Columns: ``selection`` (index into ``selections``), ``experiment``, ``value``, ``draw``, ``category``, ``images``,
    ``fallback`` (a state was all noise), ``class_auroc`` (the same for all detectors), and per detector
    ``<name> image_auroc`` and, with masks, ``<name> pixel_auroc``, ``<name> pixel_pro``. NaN without both classes.
    """
    rows = []
    with tqdm(
        total=len(dataset.categories) * len(selections), desc="selections", disable=not progress
    ) as bar:
        for number, category in enumerate(dataset.categories):
            states = [sentences.of(category, state).embeddings for state in STATES]
            samples = [s for s in dataset if s.category == category]
            labels = np.array([s.label for s in samples])
            has_masks = any(s.mask_path is not None for s in samples)
            masks = read_masks(samples, detectors[0].backbone.image_size) if has_masks else None
            features = [_features(detector, samples, batch_size) for detector in detectors]
            for index, selection in enumerate(selections):
                text, fallback = text_vectors(states, selection)
                found = [d.score_with(f, text) for d, f in zip(detectors, features, strict=True)]
                picks = {"all": np.arange(len(samples))}
                if selection.resample_images:
                    picks["resampled"] = _resample(
                        labels, np.random.default_rng([seed, selection.draw, number])
                    )
                for images, pick in picks.items():
                    row = {
                        "selection": index, "experiment": selection.experiment, "value": selection.value,
                        "draw": selection.draw, "category": category, "images": images, "fallback": fallback,
                    }  # fmt: skip
                    row["class_auroc"] = _auroc(found[0].probabilities[pick].numpy(), labels[pick])
                    for detector, prediction in zip(detectors, found, strict=True):
                        row |= _detector_metrics(detector.name, prediction, labels, masks, pick)
                    rows.append(row)
                bar.update()
    return pd.DataFrame(rows)


def _features(detector, samples, batch_size) -> Features:
    batches = load_images(samples, detector.backbone.preprocess, batch_size)
    return Features.cat([detector.features(images) for images in batches])


def _resample(labels, rng) -> np.ndarray:
    return np.concatenate(
        [rng.choice(np.flatnonzero(labels == k), (labels == k).sum()) for k in np.unique(labels)]
    )


def _auroc(scores, labels) -> float:
    return image_metrics(scores, labels)["auroc"] if (labels >= 0).all() else float("nan")


def _detector_metrics(name, prediction, labels, masks, pick) -> dict[str, float]:
    maps, probabilities = prediction.maps[pick], prediction.probabilities[pick].numpy()
    score = published_image_score(probabilities, maps.flatten(1).max(dim=1).values.numpy())
    found = {f"{name} image_auroc": _auroc(score, labels[pick])}
    if masks is not None:
        pixels = pixel_metrics(maps.numpy(), masks[pick])
        found |= {f"{name} pixel_{metric}": pixels[metric] for metric in ("auroc", "pro")}
    return found


def metric_columns(measured: pd.DataFrame) -> list[str]:
    """The columns of :func:`measure` that are metrics and defined somewhere."""
    columns = [c for c in measured if c.endswith(("_auroc", "_pro"))]
    return [c for c in columns if measured[c].notna().any()]


def over_categories(measured: pd.DataFrame) -> pd.DataFrame:
    """Unweighted mean of the metrics over categories: one row per selection and kind of images."""
    keys = ["selection", "experiment", "value", "draw", "images"]
    return measured.groupby(keys, sort=False)[metric_columns(measured)].mean().reset_index()


def bands(measured: pd.DataFrame, method: str = "mean", level: float = 0.95) -> pd.DataFrame:
    """One method's metrics, mean over categories: ``full`` and the percentile interval over resampled sentences."""
    rows = over_categories(
        measured[(measured["experiment"] == "method") & (measured["images"] == "all")]
    )
    rows = rows[rows["value"] == method].set_index("draw")[metric_columns(measured)]
    drawn, tail = rows.drop(index=0), (1 - level) / 2
    return pd.DataFrame(
        {"full": rows.loc[0], "low": drawn.quantile(tail), "high": drawn.quantile(1 - tail)}
    )


def beyond_band(
    described: pd.DataFrame, curve: pd.DataFrame, bands: pd.DataFrame, metrics
) -> pd.DataFrame:
    """Where a curve over an option leaves the mean's bootstrap band while the method selects for some state.

    ``described``: of choices named by the option's value; ``curve``: mean over categories, a row per ``value``;
    ``bands``: of :func:`bands`. A row per metric: ``values`` (of the option where it selects), ``from``, ``to``, and
    at how many of them the curve is ``above`` or ``below`` the band.
    """
    selects = described["regime"].eq("selects").groupby(described["method"]).any()
    values = list(selects.index[selects])
    at = curve.set_index("value").loc[values]
    ends = (min(values), max(values)) if values else (np.nan, np.nan)
    rows = {
        metric: {
            "values": len(values),
            "from": ends[0],
            "to": ends[1],
            "above": int((at[metric] > bands.loc[metric, "high"]).sum()),
            "below": int((at[metric] < bands.loc[metric, "low"]).sum()),
        }
        for metric in metrics
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def differences(
    measured: pd.DataFrame, baseline: str = "mean", level: float = 0.95
) -> pd.DataFrame:
    """Every method minus the baseline, mean over categories, with two paired bootstrap intervals (percentile).

    ``sentences_low``, ``sentences_high``: over resampled sentences, on the same images; ``both_low``, ``both_high``:
    over resampled sentences and images. ``difference``: on the full set. ``verdict``: "better" or "worse" where the
    interval over both leaves out 0, otherwise "no difference shown". Fractions; one row per method and metric.
    """
    means = over_categories(measured[measured["experiment"] == "method"])
    tail = (1 - level) / 2
    rows = []
    for metric in metric_columns(means):
        wide = means.pivot(index=["draw", "images"], columns="value", values=metric)
        order = [name for name in means["value"].unique() if name != baseline]
        gap = wide[order].sub(wide[baseline], axis=0)
        for method in gap:
            row = {"method": method, "metric": metric, "difference": gap.loc[(0, "all"), method]}
            for name, images in (("sentences", "all"), ("both", "resampled")):
                drawn = gap.xs(images, level="images")[method].drop(index=0, errors="ignore")
                row |= {
                    f"{name}_low": drawn.quantile(tail),
                    f"{name}_high": drawn.quantile(1 - tail),
                }
            row["verdict"] = (
                "better"
                if row["both_low"] > 0
                else "worse"
                if row["both_high"] < 0
                else "no difference shown"
            )
            rows.append(row)
    return pd.DataFrame(rows)
