"""The released program's ways of choosing, measuring and drawing, quantified (notebook 05). Its side effect on the
features is :mod:`clipad.released`, its PRO :func:`clipad.pro_200_thresholds`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from clipad.datasets import Dataset, native_size, read_mask, resize_mask
from clipad.evaluation import published_image_score
from clipad.metrics import image_metrics
from clipad.text import representative_vectors

SELECTIONS = {
    "mean": ("mean", {}),
    "DBSCAN, eps 0.5, min_samples 15 (MVTec)": ("dbscan", {"eps": 0.5, "min_samples": 15}),
    "DBSCAN, eps 1.5, min_samples 25 (VisA)": ("dbscan", {"eps": 1.5, "min_samples": 25}),
    "mean shift, bandwidth 2": ("mean_shift", {"bandwidth": 2.0}),
    "KDE, bandwidth 0.3": ("kde", {"bandwidth": 0.3}),
    "PCA": ("pca", {}),
}


def without_one(images: pd.DataFrame) -> pd.DataFrame:
    """What becomes of the published image scores of a category when one of its *other* test images is taken away.

    ``images``: rows of one method, see :func:`clipad.studies.benchmark.benchmark`. Per category: ``largest change`` of
    a score (they run from 0 to 2), ``orders changed`` (share of the pairs of images whose order changes, largest over
    the images that can be taken away) and the range of the AUROC that other scaling alone makes, ``auroc low`` to
    ``auroc high``, relative to the same images with their old scores.
    """
    rows = {}
    for category, frame in images.groupby("category", sort=False):
        p, m, labels = (frame[column].to_numpy() for column in ("probability", "map_max", "label"))
        full, found = published_image_score(p, m), []
        for i in range(len(frame)):
            rest = np.delete(np.arange(len(frame)), i)
            old, new = full[rest], published_image_score(p[rest], m[rest])
            above = np.sign(np.subtract.outer(old, old)) != np.sign(np.subtract.outer(new, new))
            before, after = (image_metrics(s, labels[rest])["auroc"] for s in (old, new))
            found.append((np.abs(new - old).max(), above.mean(), after - before))
        change, orders, auroc = np.transpose(found)
        rows[category] = (change.max(), orders.max(), auroc.min(), auroc.max())
    columns = ["largest change", "orders changed", "auroc low", "auroc high"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("category")


def min_max(maps: np.ndarray, per_image: bool) -> np.ndarray:
    """Maps N x S x S to 0-1: over all of them, or, as the released program's pictures do after that, each by itself."""
    axes = (1, 2) if per_image else None
    low, high = maps.min(axis=axes, keepdims=True), maps.max(axis=axes, keepdims=True)
    return (maps - low) / np.maximum(high - low, 1e-12)


def vanished(dataset: Dataset, shrink: Sequence[float]) -> pd.DataFrame:
    """Ground truth after the published resize (bilinear, threshold 0.5), per factor by which the longer side shrinks.

    ``side``: median side in pixels; ``masks``, ``regions``: share of the anomalous masks, and of their 8-connected
    regions, of which not a pixel is left; ``area``: anomalous area left, as a share.
    """
    rows = []
    for sample in (s for s in dataset if s.label == 1 and s.mask_path is not None):
        native = max(native_size(sample.mask_path))
        mask = read_mask(sample.mask_path, native)
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for factor in shrink:
            side = round(native / factor)
            gone = sum(not resize_mask(labelled == r, side).any() for r in range(1, count + 1))
            left = resize_mask(mask, side).mean() / mask.mean() if count else np.nan
            rows.append((factor, side, not resize_mask(mask, side).any(), gone, count, left))
    columns = ["shrunk by", "side", "masks", "gone", "regions", "area"]
    by_factor = pd.DataFrame(rows, columns=columns).groupby("shrunk by")
    table = by_factor[["masks", "area"]].mean().assign(side=by_factor["side"].median())
    table["regions"] = by_factor["gone"].sum() / by_factor["regions"].sum()
    return table[["side", "masks", "regions", "area"]]


def vectors_of(run, name: str) -> dict[str, torch.Tensor]:
    """The text vectors per category of one of ``SELECTIONS``."""
    method, options = SELECTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DBSCAN that finds only noise is counted in notebook 01
        return {
            c: representative_vectors(run.backbone, c, run.prompts, method, **options)
            for c in run.dataset.categories
        }
