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


def choose(
    scores: Scores, metric: str, spent: pd.Series, categories: Sequence[str]
) -> tuple[str, list[str], str]:
    """The highest method, those not significantly below it on these categories' images, and which of these to take:
    the highest of those that take at most one and a half times as long as the quickest.

    ``spent``: milliseconds per image by method.
    """
    means = {m: scores.interval(metric, m, None, categories)[0].estimate for m in spent.index}
    best = max(means, key=means.get)
    pairs = {m: scores.interval(metric, m, best, categories)[0] for m in spent.index}
    equals = [m for m in spent.index if pairs[m].verdict() != "lower"]
    quick = [m for m in equals if spent[m] <= 1.5 * spent[equals].min()]
    return best, equals, max(quick, key=means.get)


def advice(scores: Scores, spent: pd.Series) -> pd.DataFrame:
    """For maps of textures, maps of objects, and a decision per image without a map: a row per ``use`` with the
    ``metric`` that decides, and :func:`choose`'s ``best``, ``equals`` and ``take``."""
    measured = scores.table("SDP").drop("mean").notna()
    rows = []
    for kind, members in groups(measured.index[measured["pixel_pro"]]).items():
        rows.append((f"maps of {kind}", "pixel_pro", *choose(scores, "pixel_pro", spent, members)))
    if measured["class_auroc"].any():
        # The same number for every method but WinCLIP; the quickest way to it is Direct's.
        names = {"Direct": "CLIP's class probability", "WinCLIP": "WinCLIP's image score"}
        best, equals, take = choose(scores, "class_auroc", spent[list(names)], scores.categories)
        found = (names[best], [names[m] for m in equals], names[take])
        rows.append(("a decision per image without a map", "class_auroc", *found))
    return pd.DataFrame(rows, columns=["use", "metric", "best", "equals", "take"])


def median_images(
    detectors: Mapping[str, Detector], dataset: Dataset, categories: Sequence[str]
) -> tuple[list[Sample], list[np.ndarray | None], dict[str, np.ndarray]]:
    """The median anomalous image of SDP of each category (by the pixel AUROC inside the image, or the map's maximum
    without masks): samples, masks S x S (None where unknown), and method -> maps N x S x S.

    The maps are on a scale of the category's normal images: 0 is the median of their pixels, 1 % of these exceed 1.
    """
    samples, masks, shown = [], [], {name: [] for name in detectors}
    for category in categories:
        part = dataset.select(category)
        maps = {name: predict(d, part)[0] for name, d in detectors.items()}
        data = labelled(part, maps["SDP"].shape[-1])
        chosen = chosen_by_rule(data, maps["SDP"])
        pick = chosen.get("median", chosen.get("best", chosen.get("worst")))
        if pick is None:
            continue
        samples.append(part[pick])
        masks.append(None if data.masks is None else data.masks[pick])
        normal = data.labels == 0 if (data.labels == 0).any() else data.labels == 1
        for name, own in maps.items():
            low, high = np.quantile(own[normal], [0.5, 0.99])
            shown[name].append((own[pick] - low) / max(high - low, 1e-12))
    return samples, masks, {name: np.array(own) for name, own in shown.items()}


def beside_published(scores: Scores, dataset: Dataset) -> pd.DataFrame:
    """ours | interval | published | difference | kind of source, a row per published number of a method that was run.

    Published numbers of a category stand beside ours of that category, published means beside ours only if all
    categories of the data set took part. The interval is for other images of these categories.
    """
    complete = set(dataset.categories) >= expected_counts(dataset.name).keys()
    rows = []
    for row in published_results(dataset=dataset.name).itertuples():
        metric = f"{row.level}_{row.metric}"
        where = [c for c in dataset.categories if row.category in (c, "mean")]
        there = where and (complete or row.category != "mean")
        if there and metric in METRICS and row.method in scores.methods:
            ours, _ = scores.interval(metric, row.method, None, where)
            found = {"method": row.method, "category": row.category, "metric": metric}
            found |= {"ours": ours.estimate, "low": ours.low, "high": ours.high}
            found |= {"published": row.value, "difference": ours.estimate - row.value}
            rows.append(found | {"kind": row.kind})
    return pd.DataFrame(rows)
