"""Notebook 05: the methods on the same images and draws, what they cost, which to take, and what is published."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from clipad.datasets import EXPECTED, Dataset, Sample
from clipad.detectors import SDP, ClipSurgery, Detector, Direct
from clipad.evaluation import batches, category_metrics, fingerprint, predict_halving
from clipad.files import address, cached, code_version
from clipad.metrics import draw_counts, within_image
from clipad.published import published_results
from clipad.studies.common import (
    METRIC_NAMES,
    METRICS,
    RESAMPLES,
    Interval,
    Scores,
    groups,
    labelled,
    scores_of,
    worst_median_best,
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
            entry = cached(path, lambda: _measure(detector, part, category, labels, counts))
            found[detector.name][category] = entry
            own = {"method": detector.name, "category": category, "label": labels}
            own |= {name: entry[name] for name in ("probability", "map_max")}
            frames.append(pd.DataFrame(own))
    return scores_of(found, METRICS, resamples, seed), pd.concat(frames, ignore_index=True)


def _measure(detector, part: Dataset, category: str, labels, counts) -> dict[str, np.ndarray]:
    maps, probabilities = predict(detector, part, category)
    masks = labelled(part, maps.shape[-1]).masks
    entry = category_metrics(
        maps, masks, probabilities, labels, detector.map_in_image_score, counts
    )
    entry |= {"probability": probabilities, "map_max": maps.max(axis=(1, 2))}
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


def told(row) -> str:
    """A row of :func:`advice` in words."""
    others = ", ".join(name for name in row.equals if name != row.best)
    tied = f"; not significantly below it: {others}" if others else ""
    highest = f"{METRIC_NAMES[row.metric]} is highest with {row.best}"
    return f"**{row.use}: {row.take}** ({highest}{tied})"


# A gallery ------------------------------------------------------------------------------------------------------


def median_images(
    detectors: Mapping[str, Detector], dataset: Dataset, categories: Sequence[str]
) -> tuple[list[Sample], list[np.ndarray], dict[str, np.ndarray]]:
    """The median anomalous image of SDP of each category (by the pixel AUROC inside the image, or the map's maximum
    without masks): samples, masks S x S (all False where unknown), and method -> maps N x S x S.

    The maps are on a scale of the category's normal images: 0 is the median of their pixels, 1 % of these exceed 1.
    """
    samples, masks, shown = [], [], {name: [] for name in detectors}
    for category in categories:
        part = dataset.select(category)
        maps = {name: predict(d, part, category)[0] for name, d in detectors.items()}
        data = labelled(part, maps["SDP"].shape[-1])
        rank = maps["SDP"].max(axis=(1, 2))
        if data.masks is not None:
            rank = within_image(maps["SDP"], data.masks)
        ranked = worst_median_best(np.where(data.labels == 1, rank, np.nan))
        if not ranked:
            continue
        pick = ranked[len(ranked) // 2]
        samples.append(part[pick])
        masks.append(
            np.zeros_like(maps["SDP"][pick], bool) if data.masks is None else data.masks[pick]
        )
        normal = data.labels == 0 if (data.labels == 0).any() else data.labels == 1
        for name, own in maps.items():
            low, high = np.quantile(own[normal], [0.5, 0.99])
            shown[name].append((own[pick] - low) / max(high - low, 1e-12))
    return samples, masks, {name: np.array(own) for name, own in shown.items()}


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
