"""Notebook 05: the methods on the same images and draws, what they cost, which to take, and what is published."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from clipad.datasets import Dataset, Sample, expected_counts
from clipad.detectors import Detector
from clipad.evaluation import batches, fingerprint, measure, predict
from clipad.io.files import address, cached, code_version
from clipad.metrics import draw_counts
from clipad.published import published_results
from clipad.studies.common import (
    METRICS,
    RESAMPLES,
    Scores,
    chosen_by_rule,
    groups,
    labelled,
    scores_of,
)


def benchmark(
    detectors: Sequence[Detector],
    dataset: Dataset,
    folder: Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Scores, pd.DataFrame]:
    """All of ``METRICS`` for every detector and category, on the same bootstrap draws of the images; and a row per
    method and image: ``method``, ``category``, ``label``, ``probability``, ``map_max``.

    Memory holds the maps of one category and detector at a time; with a ``folder`` each of these is kept there by all
    that decides it, so a stopped run continues.
    """
    found, frames = {detector.name: {} for detector in detectors}, []
    for c, category in enumerate(tqdm(dataset.categories, f"benchmark on {dataset.name}")):
        part = dataset.select(category)
        labels = np.array([s.label for s in part])
        counts = draw_counts(labels, resamples, np.random.default_rng([seed, c]))
        for detector in detectors:
            key = [detector.settings, fingerprint(part), code_version(), resamples, seed, c]
            path = folder and folder / f"{address(key)}.npz"
            entry = cached(path, lambda: measure(detector, part, counts=counts))
            found[detector.name][category] = entry
            own = {name: entry[name] for name in ("probability", "map_max")}
            frame = pd.DataFrame({"category": category, "label": labels} | own)
            frames.append(frame.assign(method=detector.name))
    return scores_of(found, METRICS, resamples, seed), pd.concat(frames, ignore_index=True)


def costs(detectors: Sequence[Detector], dataset: Dataset, repeats: int = 3) -> pd.Series:
    """Milliseconds per image for the first 16 images of a category: the median of runs that take turns."""
    category = dataset.categories[0]
    part = list(dataset.select(category))[:16]
    _, images = next(iter(batches(detectors[0].backbone, part)))
    seconds = {detector.name: [] for detector in detectors}
    for _ in range(1 + repeats):
        for detector in detectors:
            start = time.perf_counter()
            detector.predict(images, category)
            seconds[detector.name].append(time.perf_counter() - start)
    after_first = pd.DataFrame(seconds)[1:]  # which warms up
    return (1000 / len(images) * after_first.median()).rename("ms per image")


def advice(scores: Scores, spent: pd.Series) -> pd.DataFrame:
    """Which method to take for maps of textures, for maps of objects, and for a decision per image without a map.

    ``spent``: milliseconds per image by method. A row per ``use``: the ``metric`` that decides, the ``best`` method,
    ``equals``, which are not significantly below it on these categories' images, and which of them to ``take``: the
    highest of those that need at most one and a half times as long as the quickest.
    """
    measured = scores.table("SDP").drop("mean").notna()
    kinds = groups(measured.index[measured["pixel_pro"]]).items()
    uses = [(f"maps of {kind}", "pixel_pro", own, list(spent.index)) for kind, own in kinds]
    if measured["class_auroc"].any():
        # The same number for every method but WinCLIP; the quickest way to it is Direct's.
        alone = ("a decision per image without a map", "class_auroc", None, ["Direct", "WinCLIP"])
        uses.append(alone)
    rows = []
    for use, metric, categories, methods in uses:
        means = {m: scores.interval(metric, m, None, categories)[0].estimate for m in methods}
        best = max(means, key=means.get)
        pairs = {m: scores.interval(metric, m, best, categories)[0] for m in methods}
        equals = [m for m in methods if pairs[m].verdict() != "lower"]
        quick = [m for m in equals if spent[m] <= 1.5 * spent[equals].min()]
        rows.append((use, metric, best, equals, max(quick, key=means.get)))
    return pd.DataFrame(rows, columns=["use", "metric", "best", "equals", "take"])


def median_images(
    detectors: Mapping[str, Detector], dataset: Dataset, categories: Sequence[str]
) -> tuple[list[Sample], list[np.ndarray | None], dict[str, np.ndarray]]:
    """The median anomalous image of SDP of each category (:func:`clipad.studies.common.chosen_by_rule`): samples, masks
    S x S (None where unknown), and method -> maps N x S x S. Categories without a median or without flawless images are
    left out.

    The maps are on a scale of the category's flawless images: 0 is the median of their pixels, 1 % of these exceed 1.
    """
    samples, masks, shown = [], [], {name: [] for name in detectors}
    for category in categories:
        part = dataset.select(category)
        maps = {name: predict(d, part)[0] for name, d in detectors.items()}
        data = labelled(part, maps["SDP"].shape[-1])
        chosen = chosen_by_rule(data, maps["SDP"])
        if {"median", "flawless"} <= chosen.keys():
            pick = chosen["median"]
            samples.append(part[pick])
            masks.append(None if data.masks is None else data.masks[pick])
            for name, own in maps.items():
                low, high = np.quantile(own[data.labels == 0], [0.5, 0.99])
                shown[name].append((own[pick] - low) / max(high - low, 1e-12))
    return samples, masks, {name: np.array(own) for name, own in shown.items()}


def beside_published(scores: Scores, dataset: Dataset) -> pd.DataFrame:
    """ours | interval | published | difference | kind of source, a row per published number of a method that was run.

    Published numbers of a category stand beside ours of that category, published means beside ours only if all
    categories of the data set took part. The interval is for other images of these categories.
    """
    complete = set(dataset.categories) >= expected_counts(dataset.name).keys()
    known = published_results(dataset=dataset.name)
    known["metric"] = known["level"] + "_" + known["metric"]
    known = known[known["category"].isin([*dataset.categories, *["mean"] * complete])]
    known = known[known["metric"].isin(METRICS) & known["method"].isin(scores.methods)]
    rows = []
    for row in known.itertuples():
        where = None if row.category == "mean" else [row.category]
        ours, _ = scores.interval(row.metric, row.method, None, where)
        rows.append((ours.estimate, ours.low, ours.high, row.value, ours.estimate - row.value))
    columns = ["ours", "low", "high", "published", "difference"]
    numbers = pd.DataFrame(rows, known.index, columns, dtype=float)
    return known[["method", "category", "metric"]].join(numbers).join(known["kind"])
