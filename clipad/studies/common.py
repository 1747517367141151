"""What all studies share: features kept, images by rule, paired intervals, claims.

An interval here is a percentile bootstrap at 95 %, of two kinds. *Images*: images are drawn with replacement within
category and label, so it speaks of other images of these categories. *Wide*: categories are drawn with replacement,
too, and within each its images, so it speaks of other categories as well. Methods see the same draws (paired).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from scipy.stats import binomtest

from clipad.datasets import Dataset
from clipad.detectors import Detector, Features
from clipad.evaluation import COLUMNS, batches, category_metrics, read_masks
from clipad.metrics import draw_counts, within_image

METRICS = tuple(COLUMNS)
METRIC_NAMES = {
    f"{level}_{metric}": f"{level} {name}"
    for level in ("image", "class", "pixel")
    for metric, name in (("auroc", "AUROC"), ("f1_max", "F1-max"), ("ap", "AP"))
} | {"pixel_pro": "PRO", "map_auroc": "AUROC of map maximum"}
RESAMPLES = 2000
"""bootstrap draws behind a verdict; 200 let verdicts depend on the seed"""
TEXTURES = frozenset({"carpet", "grid", "leather", "marble", "tile", "wood"})


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval, as a fraction."""

    estimate: float
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")
    """two-sided bootstrap p-value against 0, for the correction of many comparisons"""

    def verdict(self, level: float = 0.0) -> str:
        """``higher`` or ``lower`` where the interval leaves the level out, else ``no significant difference``."""
        if np.isnan([self.estimate, self.low, self.high]).any():
            return "not measured"
        higher, lower = self.low > level, self.high < level
        return "higher" if higher else "lower" if lower else "no significant difference"

    def __format__(self, spec: str) -> str:
        """Percent or points, with a sign for ``+``; what would be printed as 0.0 gets a further digit.

        >>> f"{Interval(0.009, 0.0004, 0.018):+}", f"{Interval(0.6)}"
        ('+0.9 [+0.04, +1.8]', '60.0')
        """
        estimate, low, high = (_percent(v, spec) for v in (self.estimate, self.low, self.high))
        return estimate if np.isnan([self.low, self.high]).any() else f"{estimate} [{low}, {high}]"


def _percent(value: float, sign: str) -> str:
    digits = 2 if 0.005 < abs(100 * value) < 0.05 else 1
    return "0.0" if abs(100 * value) <= 0.005 else f"{100 * value:{sign}.{digits}f}"


def from_draws(estimate: float, draws: np.ndarray) -> Interval:
    """The percentile interval of bootstrap draws; draws that are NaN (nothing to measure) are left out."""
    draws = np.asarray(draws)[~np.isnan(draws)]
    if not len(draws) or np.isnan(estimate):
        return Interval(float(estimate))
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (1 + tail) / (1 + len(draws)))
    return Interval(float(estimate), float(low), float(high), float(p))


def exact_share(count: int, of: int) -> Interval:
    """A share with its exact (Clopper-Pearson) interval: a bootstrap of 0 out of 20 has no width, this has.

    >>> f"{exact_share(0, 20)}"
    '0.0 [0.0, 16.8]'
    """
    found = binomtest(count, of).proportion_ci(0.95, method="exact")
    return Interval(count / of, float(found.low), float(found.high))


def groups(categories: Sequence[str]) -> dict[str, list[str]]:
    """The categories that are ``textures`` and those that are ``objects``; a group without members is left out."""
    found = {
        "textures": [c for c in categories if c in TEXTURES],
        "objects": [c for c in categories if c not in TEXTURES],
    }
    return {kind: members for kind, members in found.items() if members}


@dataclass
class Scores:
    """Numbers of several methods on the same images and the same bootstrap draws."""

    methods: tuple[str, ...]
    categories: tuple[str, ...]
    metrics: tuple[str, ...]
    values: np.ndarray
    """methods x categories x metrics x (1 + R); ``[..., 0]`` is the estimate, the others are draws of images"""
    seed: int = 0

    def table(self, method: str) -> pd.DataFrame:
        """Category x metric with a last row ``mean``."""
        values = self.values[self.methods.index(method), :, :, 0]
        table = pd.DataFrame(values, self.categories, self.metrics).rename_axis("category")
        table.loc["mean"] = table.mean()
        return table

    def means(self) -> pd.DataFrame:
        """Method x metric: the unweighted mean over categories."""
        return pd.DataFrame({m: self.table(m).loc["mean"] for m in self.methods}).T

    def interval(
        self, metric: str, method: str, minus: str | None = None, categories=None
    ) -> tuple[Interval, Interval]:
        """(images, wide) of a metric's mean over categories (None: all), or of a paired difference of two methods."""
        m = self.metrics.index(metric)
        values = self.values[self.methods.index(method), :, m]
        if minus is not None:
            values = values - self.values[self.methods.index(minus), :, m]
        if categories is not None:
            values = values[[self.categories.index(c) for c in categories]]
        return intervals_over_categories(values, self.seed)

    def differences(self, baseline: str, metrics: Sequence[str]) -> pd.DataFrame:
        """Method - baseline, a row per metric and method: ``method``, ``metric``, ``estimate``, ``low`` and ``high``
        (images), ``low_wide`` and ``high_wide``."""
        others = [m for m in self.methods if m != baseline]
        return pd.DataFrame(
            {"method": method, "metric": metric}
            | both_ends(*self.interval(metric, method, baseline))
            for metric, method in product(metrics, others)
        )

    def by_category(self, metric: str, method: str, minus: str | None = None) -> pd.DataFrame:
        """Textures, then objects, the highest first: ``row`` (such as "tile (texture)"), ``series`` (textures) and the
        interval over its images."""
        rows = [
            {"row": f"{category} ({group[:-1]})", "series": group}
            | vars(self.interval(metric, method, minus, [category])[0])
            for group, members in groups(self.categories).items()
            for category in members
        ]
        return pd.DataFrame(rows).sort_values(["series", "estimate"], ascending=False)


def both_ends(images: Interval, wide: Interval) -> dict[str, float]:
    """As tables and records have them."""
    ends = {"estimate": wide.estimate, "low": images.low, "high": images.high}
    return ends | {"low_wide": wide.low, "high_wide": wide.high}


def intervals_over_categories(values: np.ndarray, seed: int = 0) -> tuple[Interval, Interval]:
    """(images, wide) of the mean over categories, from K x (1 + R), the estimate first; NaN estimates are left out."""
    values = values[~np.isnan(values[:, 0])]
    if not len(values):
        return (Interval(np.nan),) * 2
    estimate, draws = values[:, 0].mean(), values.shape[1] - 1
    rng = np.random.default_rng(seed)
    picked = rng.integers(len(values), size=(RESAMPLES, len(values)))
    resample = rng.integers(1, draws + 1, size=picked.shape)
    wide = values[picked, resample].mean(axis=1)
    return from_draws(estimate, values[:, 1:].mean(axis=0)), from_draws(estimate, wide)


def scores_of(
    found: Mapping[str, Mapping], metrics: Sequence[str], resamples: int, seed: int = 0
) -> Scores:
    """From what was measured: method -> category -> metric -> the estimate, then draws; NaN where missing."""
    methods, categories = tuple(found), tuple(next(iter(found.values())))
    values = np.full((len(methods), len(categories), len(metrics), 1 + resamples), np.nan)
    for m, c, k in np.ndindex(values.shape[:3]):
        values[m, c, k] = found[methods[m]][categories[c]].get(metrics[k], np.nan)
    return Scores(methods, categories, tuple(metrics), values, seed)


def scores_of_images(
    frames: Mapping[str, pd.DataFrame], columns: Sequence[str], resamples=RESAMPLES, seed: int = 0
) -> Scores:
    """Means per category of numbers that each image has, such as whether its map is the wrong way round.

    ``frames``: per method a row per image, the same images in the same order, with ``category`` and ``columns``; NaN
    is left out.
    """
    first = next(iter(frames.values()))
    found = {name: {} for name in frames}
    rng = np.random.default_rng(seed)
    for category in first["category"].unique():
        rows = (first["category"] == category).to_numpy()
        counts = draw_counts(np.ones(rows.sum(), int), resamples, rng)
        for name, frame in frames.items():
            own = frame.loc[rows, list(columns)].to_numpy(float)
            known = ~np.isnan(own)
            with np.errstate(invalid="ignore"):
                means = (counts @ np.where(known, own, 0)) / (counts @ known)
            found[name][category] = dict(zip(columns, means.T, strict=True))
    return scores_of(found, columns, resamples, seed)


@dataclass
class Labelled:
    """The images of a data set, in its order: ``labels`` (N; 0 normal, 1 anomalous, -1 not known), ``categories``."""

    dataset: Dataset
    masks: np.ndarray | None
    """N x S x S, None where the data set has no masks"""

    def __post_init__(self):
        self.labels = np.array([s.label for s in self.dataset])
        self.categories = np.array([s.category for s in self.dataset])

    def where(self, category: str) -> np.ndarray:
        """Positions of a category's images."""
        return np.flatnonzero(self.categories == category)

    def mean_metrics(self, maps: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        """``METRICS``, mean over categories, without intervals; NaN where undefined."""
        return score({"": (maps, probabilities)}, self, resamples=0).means().loc[""].to_dict()


def labelled(dataset: Dataset, image_size: int) -> Labelled:
    """Read the masks, where there are any."""
    masks = read_masks(list(dataset), image_size) if dataset.has_masks else None
    return Labelled(dataset, masks)


@dataclass
class Kept(Labelled):
    """What a detector's backbone made of a data set: other texts and heads are then tried in no time."""

    reads: tuple
    features: Features

    def predict_all(
        self, detector: Detector, texts: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Maps N x S x S and class probabilities N; ``texts``: other text vectors C x 2 per category. ValueError for a
        detector that reads other features."""
        if self.reads[: len(detector.reads)] != detector.reads:
            raise ValueError(
                f"{detector.name} reads {detector.reads}, but {self.reads} were kept: keep its own features"
            )
        size, device = detector.backbone.image_size, detector.backbone.device
        maps = np.empty((len(self.dataset), size, size), np.float32)
        probabilities = np.empty(len(self.dataset), np.float32)
        for category in self.dataset.categories:
            at = self.where(category)
            text = detector.text_vectors(category) if texts is None else texts[category]
            found = detector.score_with(self.features[torch.from_numpy(at)].to(device), text)
            maps[at], probabilities[at] = found.maps, found.probabilities
        return maps, probabilities

    def maps(self, detector: Detector) -> np.ndarray:
        """The maps of all images, N x S x S."""
        return self.predict_all(detector)[0]


def keep(detector: Detector, dataset: Dataset, batch_size: int = 16) -> Kept:
    """Run the backbone once over a data set. The features stay on the CPU."""
    found = batches(detector.backbone, list(dataset), batch_size)
    parts = [detector.features(images).to("cpu") for _, images in found]
    masks = labelled(dataset, detector.backbone.image_size).masks
    return Kept(dataset, masks, detector.reads, Features.cat(parts))


def thinned(dataset: Dataset, per_category: int) -> Dataset:
    """At most that many images of each category, normal and anomalous in their proportion, evenly spaced."""
    kept = []
    for category in dataset.categories:
        own = [i for i, s in enumerate(dataset) if s.category == category]
        own.sort(key=lambda i: dataset[i].label)  # stable: even spacing takes its share of both
        take = min(per_category, len(own))
        kept += [own[(2 * k + 1) * len(own) // (2 * take)] for k in range(take)]
    return replace(dataset, samples=tuple(dataset[i] for i in sorted(kept)))


def score(
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]] | Iterable[tuple],
    data: Labelled,
    resamples: int = RESAMPLES,
    seed: int = 0,
    without_map: Collection[str] = (),
) -> Scores:
    """``METRICS`` of several methods on the same draws: name -> maps N x S x S and class probabilities N.

    ``predictions``: a mapping, or pairs that are made one after the other, where all maps would fill the memory.
    ``resamples`` 0: no draws; else for a seed always the same ones. ``without_map``: methods whose image score is the
    class probability alone.
    """
    found = {}
    pairs = predictions.items() if isinstance(predictions, Mapping) else predictions
    for name, (maps, p) in pairs:
        found[name], with_map = {}, name not in without_map
        for c, category in enumerate(data.dataset.categories):
            at, counts = data.where(category), None
            labels, masks = data.labels[at], None if data.masks is None else data.masks[at]
            if resamples:
                counts = draw_counts(labels, resamples, np.random.default_rng([seed, c]))
            found[name][category] = category_metrics(
                maps[at], masks, p[at], labels, with_map, counts
            )
    return scores_of(found, METRICS, resamples, seed)


def worst_median_best(values: Sequence[float]) -> list[int]:
    """Positions of the lowest, the (upper) median and the highest value; NaN is left out, few give few.

    >>> worst_median_best([3, 1, float("nan"), 2]), worst_median_best([5, 4])
    ([1, 3, 0], [1, 0])
    """
    order = pd.Series(list(values), dtype=float).dropna().sort_values(kind="stable").index
    places = [0, len(order) // 2, len(order) - 1] if len(order) >= 3 else range(len(order))
    return [int(order[place]) for place in places]


def chosen_by_rule(data: Labelled, maps: np.ndarray) -> dict[str, int]:
    """Up to four positions: *worst*, *median* and *best* anomalous image, and *flawless*, the one with the highest map.

    Anomalous images are ranked by the pixel AUROC inside the image or, without masks, by the map's maximum; two have no
    median. Without labels: *lowest*, *median* and *highest* maximum of all.
    """
    labels, maxima = data.labels, maps.max(axis=(1, 2))
    if (labels < 0).all():
        names, values = ("lowest", "median", "highest"), maxima
    else:
        rank = maxima if data.masks is None else within_image(maps, data.masks)
        names, values = ("worst", "median", "best"), np.where(labels == 1, rank, np.nan)
    positions = worst_median_best(values)
    found = dict(zip(names if len(positions) == 3 else names[::2], positions, strict=False))
    if (labels == 0).any():
        found["flawless"] = int(np.where(labels == 0, maxima, -np.inf).argmax())
    return found


def claim(
    run,
    id: str,
    sentence: str,
    found: tuple[Interval, Interval] | Interval,
    *,
    metric: str = "",
    source: str = "ours",
    level: float | None = None,
    then: Mapping[str, str] | str = "",
    scope: str = "",
) -> None:
    """State a finding in the notebook (*Found here:*) and keep it for the record of the run.

    ``sentence``: what is compared or measured. ``found``: (images, wide) of :meth:`Scores.interval`, the verdict is the
    wide one's, or one interval and its ``scope`` ("these categories"). ``level``: None for a difference (against 0,
    signed points), a number for a rate or metric held against it. ``source``: who says so: "paper 3.2", "released
    program", "ours". ``then``: what follows, one text or one per verdict.
    """
    both = isinstance(found, tuple)
    images, wide = found if both else (found, found)
    scope = scope or ("other images and categories" if both else "other images")
    sign, against = "+", ""
    if level is not None:
        sign, against, wide = "", f", against {100 * level:g}", replace(wide, p=np.nan)
    verdict, narrow = wide.verdict(level or 0.0), images.verdict(level or 0.0)
    told = f"{METRIC_NAMES.get(metric, metric)} {wide:{sign}}{against}".strip()
    about = scope if verdict == "not measured" else f"95 %, {scope}"
    text = f"{sentence}: **{verdict}**, {told} ({about})."
    if narrow != verdict:
        text += f" For other images of these categories alone: {images:{sign}}, {narrow}."
    follows = then if isinstance(then, str) else then.get(verdict, "")
    kept = {"id": id, "sentence": sentence, "source": source, "metric": metric}
    kept["measured"] = "" if np.isnan(wide.estimate) else told
    kept |= {"verdict": verdict, "scope": scope, "level": level or 0.0, "p": wide.p}
    _state(run, kept | both_ends(images, wide), text, follows)


def fact(run, id: str, sentence: str, holds: bool, *, source: str = "ours", then: str = "") -> None:
    """The same for what is exact and needs no interval, such as an identity: ``holds`` or ``does not hold``."""
    verdict, unmeasured = "holds" if holds else "does not hold", Interval(np.nan)
    kept = {"id": id, "sentence": sentence, "source": source, "metric": "", "measured": ""}
    kept |= {"verdict": verdict, "scope": "as computed", "level": 0.0, "p": np.nan}
    kept |= both_ends(unmeasured, unmeasured)
    _state(run, kept, f"{sentence}: **{verdict}**.", then)


def _state(run, kept: dict, text: str, follows: str) -> None:
    display(Markdown(f"**Found here:** {text} {follows}".strip()))
    others = [c for c in run.results.get("claims", []) if c["id"] != kept["id"]]
    run.record("claims", [*others, kept])


def show_claims(run) -> None:
    """The notebook's claims and facts as a table, with Holm's correction over the claims: shown at its end."""
    claims: list[dict[str, Any]] = run.results.get("claims", [])
    ordered = pd.Series([c["p"] for c in claims], dtype=float).dropna().sort_values()
    adjusted = (ordered * np.arange(len(ordered), 0, -1)).cummax()  # Holm's step-down correction
    holds = adjusted.lt(0.05).map({True: "significant", False: "not significant"})
    rows = ["| | verdict | 95 % | about | after Holm |", "|---|---|---|---|---|"]
    for i, entry in enumerate(claims):
        source = "" if entry["source"] == "ours" else f" ({entry['source']})"
        cells = (entry["sentence"] + source, entry["verdict"], entry["measured"], entry["scope"])
        rows.append(f"| {' | '.join(cells)} | {holds.get(i, '')} |")
    rows.append(
        f"\n*After Holm*: still significant at 95 % when the {len(adjusted)} differences of this "
        "notebook are tested together (Holm 1979); a blank was not tested against 0. A fact *holds* or not for what "
        "was computed; nothing is tested."
    )
    display(Markdown("\n".join(rows)))
