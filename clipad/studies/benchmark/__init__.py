"""All methods on one data set: metrics with paired intervals, curves, costs, the published numbers beside ours.

Shapes: N images of a category, S x S pixels, R bootstrap resamples.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import precision_recall_curve, roc_curve
from tqdm import tqdm

from clipad.backbone import load_backbone
from clipad.datasets import EXPECTED, Dataset, Sample
from clipad.detectors import SDP, ClipSurgery, Direct, SDPPlus
from clipad.evaluation import (
    fingerprint,
    load_images,
    predict_halving,
    published_image_score,
    read_masks,
)
from clipad.files import code_version, write_atomically
from clipad.metrics import (
    PRO_LIMIT,
    draw_counts,
    interval,
    pro_200_thresholds,
    pro_curve,
    resampled_metrics,
)
from clipad.published import protocol, published_results
from clipad.studies.figures import METRIC_NAMES
from clipad.studies.opposite_predictions import untrained
from clipad.studies.sdp_plus_fine_tuning import (
    METRICS,
    Comparison,
    hold,
    layers_for,
    mean_metrics,
    within_image,
)
from clipad.text import METHODS
from clipad.winclip import WinCLIP

RATES = np.concatenate([np.linspace(0, 0.05, 51), np.linspace(0.06, 1, 95)])
"""where curves are read: false positive rates (dense where few are allowed) and recalls"""
CURVES = ("image_roc", "image_pr", "pixel_roc", "pixel_pr", "pixel_pro")


@dataclass
class Benchmark:
    """What the methods found on a data set.

    ``comparison``: metrics per method, category and resample; ``curves``: methods x categories x ``CURVES`` x
    ``RATES`` (NaN where undefined, PRO beyond a rate of 0.3); ``pro``: a row per method and category with PRO exact, as
    the released program prints it, from 200 thresholds, and the last again after a strictly monotone map of the scores;
    ``images``: a row per method and image; ``prevalence``: share of anomalous images and pixels, mean over categories.
    """

    comparison: Comparison
    curves: np.ndarray
    pro: pd.DataFrame
    images: pd.DataFrame
    prevalence: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        return self.comparison.names

    def table(self, name: str) -> pd.DataFrame:
        """Category x metric with a last row ``mean``."""
        return self.comparison.table(name)

    def tables(self) -> dict[str, pd.DataFrame]:
        return {name: self.table(name) for name in self.names}

    def means(self) -> pd.DataFrame:
        """Method x metric, mean over categories; metrics that the data set does not have are left out."""
        return pd.DataFrame({n: t.loc["mean"] for n, t in self.tables().items()}).T.dropna(
            axis=1, how="all"
        )

    def curve(self, name: str, kind: str) -> np.ndarray:
        """One of ``CURVES`` at ``RATES``, averaged over categories: the area under it is the mean of the areas."""
        return self.curves[self.names.index(name), :, CURVES.index(kind)].mean(axis=0)


def benchmark(
    detectors: Sequence,
    dataset: Dataset,
    folder: str | Path | None = None,
    n_resamples: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Benchmark:
    """Run every detector on every category; all see the same bootstrap draws of the images.

    The metrics are those of :func:`clipad.evaluate`. With a ``folder`` each pair of method and category is kept there
    under a hash of all that decides it, so that a stopped benchmark continues. One category's maps are in memory.

    Raises ValueError for fewer than 2 resamples, no detector, or two detectors of one name.
    """
    names = tuple(detector.name for detector in detectors)
    if n_resamples < 2 or not names or len(set(names)) < len(names):
        raise ValueError(
            f"expected detectors with names of their own and 2 resamples or more; found {names}, {n_resamples}"
        )
    found: dict[tuple[str, str], dict] = {}
    with tqdm(
        total=len(names) * len(dataset.categories),
        desc=f"benchmark on {dataset.name}",
        disable=not progress,
    ) as bar:
        for number, category in enumerate(dataset.categories):
            part = dataset.select(category)
            counts = draw_counts(
                [s.label for s in part], n_resamples, np.random.default_rng([seed, number])
            )
            masks = None
            for detector in detectors:
                key = [
                    detector.settings,
                    dataset.name,
                    fingerprint(part),
                    code_version(),
                    n_resamples,
                ]
                path = (
                    folder
                    and Path(folder) / f"{_hash([*key, seed, number, str(counts.shape)])}.npz"
                )
                entry = _read(path)
                if entry is None:
                    if masks is None and part.has_masks:
                        masks = read_masks(list(part), detector.backbone.image_size)
                    entry = _measure(detector, part, category, masks, counts, batch_size)
                    if path:
                        write_atomically(path, _npz(entry))
                found[detector.name, category] = entry
                bar.update()

    def stacked(key):
        return np.array([[found[name, c][key] for c in dataset.categories] for name in names])

    images = pd.concat(
        pd.DataFrame(
            {
                "method": name,
                "category": category,
                "label": [s.label for s in dataset.select(category)],
                **{
                    column: found[name, category][column]
                    for column in ("probability", "map_max", "score")
                },
            }
        )
        for name in names
        for category in dataset.categories
    )
    index = pd.MultiIndex.from_product([names, dataset.categories], names=["method", "category"])
    columns = ["exact", "released", "200 thresholds", "200 thresholds, exp of the scores"]
    pro = pd.DataFrame(stacked("pro").reshape(len(index), -1), index, columns)
    return Benchmark(
        Comparison(names, dataset.categories, stacked("numbers")),
        stacked("curves"),
        pro,
        images.reset_index(drop=True),
        dict(zip(("image", "pixel"), stacked("prevalence")[0].mean(axis=0), strict=True)),
    )


def _measure(
    detector, part: Dataset, category: str, masks, counts, batch_size: int
) -> dict[str, np.ndarray]:
    batches = load_images(list(part), detector.backbone.preprocess, batch_size)
    predictions = [predict_halving(detector, images, category) for images in batches]
    maps, probabilities = (torch.cat(values).numpy() for values in zip(*predictions, strict=True))
    maxima = maps.max(axis=(1, 2))
    score = (
        published_image_score(probabilities, maxima)
        if detector.map_in_image_score
        else probabilities
    )
    labels = np.array([s.label for s in part])
    metrics, curves, pro, prevalence = {}, {}, [np.nan] * 4, [np.nan] * 2
    if part.has_image_labels:
        metrics |= {f"image_{k}": v for k, v in resampled_metrics(score, labels, counts).items()}
        curves |= {f"image_{k}": v for k, v in curves_of(score, labels).items()}
        prevalence[0] = labels.mean()
    if masks is not None:
        metrics |= {f"pixel_{k}": v for k, v in resampled_metrics(maps, masks, counts).items()}
        curves |= {f"pixel_{k}": v for k, v in curves_of(maps, masks).items()}
        prevalence[1] = masks.mean()
        # The released program has its PRO commented out and prints 0.0 in its place.
        heavy = np.exp(2 * (maps - maps.mean()) / maps.std())
        pro = [
            metrics["pixel_pro"][0],
            0.0,
            pro_200_thresholds(maps, masks),
            pro_200_thresholds(heavy, masks),
        ]
    return {
        "numbers": np.array([metrics.get(m, np.full(len(counts), np.nan)) for m in METRICS]),
        "curves": np.array([curves.get(c, np.full(len(RATES), np.nan)) for c in CURVES]),
        "pro": np.array(pro),
        "prevalence": np.array(prevalence),
        "probability": probabilities.astype(np.float64),
        "map_max": maxima.astype(np.float64),
        "score": np.asarray(score, np.float64),
    }


def curves_of(scores: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Curves of one category at ``RATES``: ``roc`` (true against false positive rate), ``pr`` (precision against
    recall) and, for maps N x S x S, ``pro`` (mean overlap against false positive rate, NaN beyond 0.3)."""
    flat, truth_flat = np.ravel(scores), np.ravel(truth)
    false, true, _ = roc_curve(truth_flat, flat)
    precision, recall, _ = precision_recall_curve(truth_flat, flat)
    # Recall falls along sklearn's curve; a recall of r is first reached by the last point that has at least r.
    reached = np.searchsorted(recall[::-1], RATES, side="left")
    curves = {"roc": np.interp(RATES, false, true), "pr": precision[::-1][reached]}
    if np.ndim(scores) == 3:
        curves["pro"] = np.where(
            RATES <= PRO_LIMIT, np.interp(RATES, *pro_curve(scores, truth)), np.nan
        )
    return curves


def _hash(key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def _npz(entry: dict) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **entry)
    return buffer.getvalue()


def _read(path: Path | None) -> dict | None:
    try:
        with np.load(path) as stored:
            return dict(stored)
    except Exception:  # no folder, not there yet, or damaged: measured (again)
        return None


def in_words(differences: Mapping[str, pd.DataFrame], metrics: Sequence[str]) -> dict[str, str]:
    """Method -> its differences in points with the wide interval, and what that interval says.

    ``differences``: method -> :meth:`Comparison.difference`.
    """

    def said(row):
        verdict = (
            "higher"
            if row["low_both"] > 0
            else "lower"
            if row["high_both"] < 0
            else "not told apart"
        )
        low, high = 100 * row["low_both"], 100 * row["high_both"]
        return f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}] ({verdict})"

    return {
        name: ", ".join(
            f"{METRIC_NAMES[m]} {said(table.loc[m])}" for m in metrics if m in table.index
        )
        for name, table in differences.items()
    }


# The methods, and what else can be varied -----------------------------------------------------------------------


def methods(
    run, layers: str | Path = "", train_root: str | Path = "", dataset: str = ""
) -> dict[str, Any]:
    """Direct, CLIP Surgery, WinCLIP, SDP and, where there are layers for it, SDP+, for a data set by its name.

    ``run``: the :class:`clipad.Experiment`; ``dataset``: empty for the run's own. ``layers``, ``train_root``: see
    :func:`layers_for`. WinCLIP has prompts of its own unless the run was given some.
    """
    found = [
        Direct(run.backbone, **run.rvs),
        ClipSurgery(run.backbone, **run.rvs),
        WinCLIP(run.backbone, run.prompts if run.parameters["prompts"] else None),
        SDP(run.backbone, **run.rvs),
    ]
    dataset = dataset or run.dataset.name
    trained = layers_for(run, dataset, layers, train_root)
    if trained is not None:
        sigma = protocol(dataset).smoothing_240_sdp_plus / 240 * run.backbone.image_size
        found.append(SDPPlus(run.backbone, trained, smoothing=sigma, **run.rvs))
    return {detector.name: detector for detector in found}


def by_representative_vector(run, dataset: Dataset) -> pd.DataFrame:
    """SDP with each of the five representative vectors: a row each, ``METRICS`` averaged over categories.

    The features are computed once and held in memory (:func:`clipad.studies.sdp_plus_fine_tuning.hold`).
    """
    held = hold(SDP(run.backbone, **run.rvs), dataset)
    own = {run.protocol.rvs: run.protocol.rvs_options}
    rows = {m: mean_metrics(SDP(run.backbone, run.prompts, m, own.get(m)), held) for m in METHODS}
    return pd.DataFrame.from_dict(rows, orient="index").dropna(axis=1, how="all")


def by_backbone(run, dataset: Dataset, further: Sequence[str] = ()) -> pd.DataFrame:
    """SDP with other backbones: a row each, the means of :func:`clipad.evaluate`.

    ``further``: open_clip models as "name" (random weights) or "name/tag". The demo model is also tried at 72 and 120
    pixels. The last row is a control: an image encoder that was never trained.
    """
    device = run.backbone.device.type
    backbones = [
        run.backbone,
        *(load_backbone(*name.split("/", 1), device=device) for name in further),
    ]
    if run.backbone.name == "demo":
        backbones += [load_backbone("demo", device=device, image_size=size) for size in (72, 120)]
    sentences = [
        text for c in dataset.categories for state in run.prompts.sentences(c) for text in state
    ]
    rows = {}
    for backbone in [*backbones, untrained(run.backbone, run.seed)]:
        backbone.expect_words(backbone.unknown_words(sentences))  # the run said so at its start
        table = run.evaluate(SDP(backbone, **run.rvs), dataset, progress=False).table
        rows[f"{backbone.name}, {backbone.pretrained}, {backbone.image_size} px"] = table.loc[
            "mean"
        ]
    return pd.DataFrame.from_dict(rows, orient="index").dropna(axis=1, how="all")


def typical(
    detectors: Mapping[str, Any], dataset: Dataset
) -> tuple[list[Sample], dict[str, np.ndarray]]:
    """One anomalous image per category and its maps by every detector.

    By rule: the median of SDP, ranked by the pixel AUROC inside the image, or by the maximum of the map without masks.
    """
    chosen, maps = [], {name: [] for name in detectors}
    sdp = detectors["SDP"]
    for category in dataset.categories:
        own = [s for s in dataset if s.category == category and s.label == 1]
        if not own:
            continue
        images = torch.cat(list(load_images(own, sdp.backbone.preprocess, 16)))
        found = torch.cat([sdp.predict(part, category).maps for part in images.split(16)]).numpy()
        rank = found.max(axis=(1, 2))
        if dataset.has_masks:
            rank = within_image(found, read_masks(own, sdp.backbone.image_size))
        pick = int(np.argsort(rank)[len(rank) // 2])
        chosen.append(own[pick])
        for name, detector in detectors.items():
            maps[name].append(detector.predict(images[[pick]], category).maps[0].numpy())
    return chosen, {name: np.stack(values) for name, values in maps.items()}


# Speed and memory -----------------------------------------------------------------------------------------------


def costs(
    detectors: Sequence, dataset: Dataset, batch_size: int = 16, repeats: int = 5
) -> pd.DataFrame:
    """Per method, for the first images of the first category: ``ms per image`` (median of runs that take turns),
    ``relative`` to the fastest, and ``peak MB``: what predicting the batch needs beyond what is held before it.

    Memory is that of the GPU where there is one, else of the process (Linux; NaN where the system does not tell).
    """
    category = dataset.categories[0]
    samples = list(dataset.select(category))[:batch_size]
    images = next(iter(load_images(samples, detectors[0].backbone.preprocess, batch_size)))
    for detector in detectors:
        detector.predict(images, category)
    seconds: dict[str, list[float]] = {detector.name: [] for detector in detectors}
    for _ in range(repeats):
        for detector in detectors:
            start = time.perf_counter()
            detector.predict(images, category)
            seconds[detector.name].append(time.perf_counter() - start)
    table = pd.DataFrame(
        {"ms per image": {n: 1000 * np.median(s) / len(images) for n, s in seconds.items()}}
    )
    table["relative"] = table["ms per image"] / table["ms per image"].min()
    table["peak MB"] = [_peak_megabytes(detector, images, category) for detector in detectors]
    return table


def _peak_megabytes(detector, images: torch.Tensor, category: str) -> float:
    device = detector.backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        detector.predict(images, category)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # else the prediction finds room in what earlier ones gave back
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        before = _status("VmRSS")
        detector.predict(images, category)
        return (_status("VmHWM") - before) / 1e6
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return float("nan")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


# Beside the published numbers -----------------------------------------------------------------------------------


def beside_published(result: Benchmark, dataset: Dataset, level: float = 0.95) -> pd.DataFrame:
    """ours | interval | published | difference | kind of source, a row per published number; empty where there is none.

    Published numbers of a category stand beside ours of that category, published means beside ours only if all
    categories of the data set took part. Methods that were not run have NaN in ``ours``. The interval is for other
    images of the same kind (bootstrap within the categories).
    """
    known = published_results(dataset=dataset.name)
    complete = set(dataset.categories) >= set(EXPECTED.get(dataset.name, dataset.categories))
    comparison, rows = result.comparison, []
    for row in known.itertuples():
        where = [c for c, name in enumerate(dataset.categories) if row.category in (name, "mean")]
        metric = f"{row.level}_{row.metric}"
        if not where or (row.category == "mean" and not complete) or metric not in METRICS:
            continue
        ours = low = high = np.nan
        if row.method in result.names:
            numbers = comparison.numbers[
                result.names.index(row.method), where, METRICS.index(metric)
            ].mean(axis=0)
            ours, (low, high) = numbers[0], interval(numbers[1:], level)
        rows.append(
            [
                row.method,
                row.category,
                metric,
                ours,
                low,
                high,
                row.value,
                ours - row.value,
                row.kind,
                row.source,
            ]
        )
    columns = [
        "method",
        "category",
        "metric",
        "ours",
        "low",
        "high",
        "published",
        "difference",
        "kind",
        "source",
    ]
    return pd.DataFrame(rows, columns=columns)
