"""Notebook 05: the methods on the same images and draws, what they cost, which to take, and what is published."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from clipad.datasets import EXPECTED, Dataset
from clipad.detectors import SDP, ClipSurgery, Detector, Direct
from clipad.evaluation import (
    batches,
    category_metrics,
    fingerprint,
    image_score,
    predict_halving,
    read_masks,
)
from clipad.files import address, cached, code_version
from clipad.metrics import draw_counts
from clipad.published import published_results
from clipad.studies.common import (
    METRIC_NAMES,
    METRICS,
    RESAMPLES,
    Interval,
    Scores,
    groups,
    within_image,
)
from clipad.studies.sdp_plus_fine_tuning import build, layers_for
from clipad.surgery import smooth
from clipad.winclip import WinCLIP


class SmoothedWinCLIP(WinCLIP):
    """WinCLIP with the Gaussian that the other methods' maps get: so that smoothing alone makes no difference."""

    name = "WinCLIP, smoothed"

    def maps(self, features, text):
        return smooth(super().maps(features, text), 8 / 240 * self.backbone.image_size)


def methods(run, layers: str | Path = "", train_root: str | Path = "") -> dict[str, Detector]:
    """Direct, CLIP Surgery, WinCLIP, SDP and, where there are layers for it, SDP+.

    ``layers``, ``train_root``: see :func:`clipad.studies.sdp_plus_fine_tuning.layers_for`. WinCLIP has prompts of its
    own unless the run was given some.
    """
    found = [
        Direct(run.backbone, **run.rvs),
        ClipSurgery(run.backbone, **run.rvs),
        WinCLIP(run.backbone, run.prompts if run.parameters["prompts"] else None),
        SDP(run.backbone, **run.rvs),
    ]
    trained = layers_for(run, layers, train_root)
    if trained is not None:
        found.append(build(run, trained))
    return {detector.name: detector for detector in found}


@dataclass
class Benchmark:
    """``scores`` of the methods on the same draws, and ``images``, a row per method and image."""

    scores: Scores
    images: pd.DataFrame


def benchmark(
    detectors: Sequence[Detector],
    dataset: Dataset,
    folder: Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Benchmark:
    """All of ``METRICS`` for every detector and category, with bootstrap draws of the images.

    Memory holds the maps of one category and detector at a time; with a ``folder`` each of these is kept there by all
    that decides it, so a stopped run continues.
    """
    names, categories = tuple(d.name for d in detectors), tuple(dataset.categories)
    values = np.full((len(names), len(categories), len(METRICS), 1 + resamples), np.nan)
    frames = []
    for c, category in enumerate(tqdm(categories, f"benchmark on {dataset.name}")):
        part = dataset.select(category)
        labels = np.array([s.label for s in part])
        counts = draw_counts(labels, resamples, np.random.default_rng([seed, c]))
        for d, detector in enumerate(detectors):
            key = [detector.settings, fingerprint(part), code_version(), resamples, seed, c]
            path = folder and folder / f"{address(key)}.npz"
            entry = cached(path, lambda: _measure(detector, part, category, labels, counts))
            for m, metric in enumerate(METRICS):
                values[d, c, m] = entry.get(metric, np.nan)
            own = {k: entry[k] for k in ("probability", "map_max", "score")}
            own |= {"method": detector.name, "category": category, "label": labels}
            frames.append(pd.DataFrame(own))
    scores = Scores(names, categories, METRICS, values, seed)
    return Benchmark(scores, pd.concat(frames, ignore_index=True))


def _measure(detector, part: Dataset, category: str, labels, counts) -> dict[str, np.ndarray]:
    maps, probabilities = predict(detector, part, category)
    masks = read_masks(list(part), detector.backbone.image_size) if part.has_masks else None
    with_map = detector.map_in_image_score
    entry = category_metrics(maps, masks, probabilities, labels, with_map, counts)
    maxima = maps.max(axis=(1, 2))
    entry |= {"probability": probabilities, "map_max": maxima}
    entry["score"] = image_score(probabilities, maxima, with_map)
    return {name: np.asarray(value, dtype=float) for name, value in entry.items()}


def predict(detector, part: Dataset, category: str) -> tuple[np.ndarray, np.ndarray]:
    """Maps N x S x S and class probabilities N of one category's images."""
    found = [predict_halving(detector, x, category) for _, x in batches(detector.backbone, part)]
    maps, probabilities = (torch.cat(values).numpy() for values in zip(*found, strict=True))
    return maps, probabilities


# Which to take --------------------------------------------------------------------------------------------------


def costs(detectors: Sequence[Detector], dataset: Dataset, repeats: int = 3) -> pd.Series:
    """Milliseconds per image for the first 16 images of a category: the median of runs that take turns."""
    category = dataset.categories[0]
    part = list(dataset.select(category))[:16]
    _, images = next(iter(batches(detectors[0].backbone, part)))
    seconds: dict[str, list[float]] = {detector.name: [] for detector in detectors}
    for repeat in range(1 + repeats):  # the first warms up
        for detector in detectors:
            start = time.perf_counter()
            detector.predict(images, category)
            if repeat:
                seconds[detector.name].append(time.perf_counter() - start)
    found = {name: 1000 * float(np.median(s)) / len(images) for name, s in seconds.items()}
    return pd.Series(found, name="ms per image")


@dataclass(frozen=True)
class Advice:
    """What follows from the intervals for one use: the highest method, those not significantly below it, and which of
    these to take: the highest of those that take at most one and a half times as long as the quickest."""

    use: str
    metric: str
    best: str
    equals: tuple[str, ...]
    take: str

    def __str__(self) -> str:
        others = [name for name in self.equals if name != self.best]
        tied = f"; not significantly below it: {', '.join(others)}" if others else ""
        return f"**{self.use}: {self.take}** ({METRIC_NAMES[self.metric]} is highest with {self.best}{tied})"


def advice(
    scores: Scores, metric: str, spent: pd.Series, use: str, categories: Sequence[str]
) -> Advice:
    """Which method to take for these categories' images; ``spent``: milliseconds per image by method."""
    means = {m: scores.interval(metric, m, None, categories)[0].estimate for m in spent.index}
    best = max(means, key=means.get)
    pairs = {m: scores.interval(metric, m, best, categories)[0] for m in spent.index}
    equals = [m for m in spent.index if pairs[m].verdict() != "lower"]
    quick = [m for m in equals if spent[m] <= 1.5 * spent[equals].min()]
    return Advice(use, metric, best, tuple(equals), max(quick, key=means.get))


def all_advice(scores: Scores, spent: pd.Series) -> list[Advice]:
    """Advice for maps of textures, for maps of objects, and for a decision per image without a map."""
    found = []
    table = scores.table("SDP").drop("mean")
    for name, members in groups(table["pixel_pro"].dropna().index).items():
        found.append(advice(scores, "pixel_pro", spent, f"maps of {name}", members))
    if table["class_auroc"].notna().any():
        # The same number for every method but WinCLIP; the quickest way to it is Direct's.
        names = {"Direct": "CLIP's class probability", "WinCLIP": "WinCLIP's image score"}
        use = "a decision per image without a map"
        own = advice(scores, "class_auroc", spent[list(names)], use, scores.categories)
        equals = tuple(names[m] for m in own.equals)
        found.append(replace(own, best=names[own.best], equals=equals, take=names[own.take]))
    return found


# A gallery ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One image with its maps by every method, and per method the value that few normal pixels exceed."""

    title: str
    path: Path
    mask: np.ndarray | None
    maps: dict[str, np.ndarray]
    thresholds: dict[str, float]


def gallery_rows(
    detectors: Mapping[str, Detector], dataset: Dataset, categories: Sequence[str]
) -> list[Row]:
    """The median anomalous image of SDP of each category (by the pixel AUROC inside the image, or the map's maximum
    without masks). The thresholds are exceeded by 1 % of the pixels of the category's normal images."""
    rows = []
    for category in categories:
        part = dataset.select(category)
        labels = np.array([s.label for s in part])
        if not (labels == 1).any():
            continue
        size, masks = detectors["SDP"].backbone.image_size, None
        found = {name: predict(d, part, category)[0] for name, d in detectors.items()}
        rank = found["SDP"].max(axis=(1, 2))
        if part.has_masks:
            masks = read_masks(list(part), size)
            rank = within_image(found["SDP"], masks)
        order = np.argsort(np.where(labels == 1, rank, np.inf))
        pick = int(order[(labels == 1).sum() // 2])
        normal = labels == 0 if (labels == 0).any() else labels == 1
        limits = {name: float(np.quantile(maps[normal], 0.99)) for name, maps in found.items()}
        own = {name: maps[pick] for name, maps in found.items()}
        mask, sample = None if masks is None else masks[pick], part[pick]
        title = f"{category}\n{sample.defect}"
        rows.append(Row(title, sample.image_path, mask, own, limits))
    return rows


# Beside the published numbers -----------------------------------------------------------------------------------

SHOWN = ("image_auroc", "pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_pro")


def published_means(dataset: str) -> pd.DataFrame:
    """What is published of a data set's means: a row per method and kind of source, ``SHOWN`` as fractions.

    For the demo and for folders nothing is published; there MVTec-AD's stand for orientation.
    """
    for name in (dataset, "mvtec"):
        known = published_results(dataset=name)
        # few-shot methods ("..., 4 flawless") are notebook 08's
        known = known[(known["category"] == "mean") & ~known["method"].str.contains("flawless")]
        if len(known):
            break
    known = known.assign(metric=known["level"] + "_" + known["metric"])
    table = known.pivot_table("value", ["method", "kind"], "metric", sort=False)
    return table.reindex(columns=[m for m in SHOWN if m in table.columns])


def beside_published(scores: Scores, dataset: Dataset) -> pd.DataFrame:
    """ours | interval | published | difference | kind of source, a row per published number; empty where there is none.

    Published numbers of a category stand beside ours of that category, published means beside ours only if all
    categories of the data set took part. Methods that were not run have NaN in ``ours``. The interval is for other
    images of these categories.
    """
    complete = set(dataset.categories) >= set(EXPECTED.get(dataset.name, dataset.categories))
    rows = []
    for row in published_results(dataset=dataset.name).itertuples():
        metric = f"{row.level}_{row.metric}"
        where = [c for c in dataset.categories if row.category in (c, "mean")]
        if not where or (row.category == "mean" and not complete) or metric not in METRICS:
            continue
        ours = Interval(np.nan, np.nan, np.nan)
        if row.method in scores.methods:
            ours, _ = scores.interval(metric, row.method, None, where)
        numbers = (ours.estimate, ours.low, ours.high, row.value, ours.estimate - row.value)
        rows.append((row.method, row.category, metric, *numbers, row.kind, row.source))
    columns = ["method", "category", "metric", "ours", "low", "high", "published", "difference"]
    return pd.DataFrame(rows, columns=[*columns, "kind", "source"])
