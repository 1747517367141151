"""The released program's ways of choosing, measuring and drawing, quantified (notebook 05). Its side effect on the
features is :mod:`clipad.released`, its PRO :func:`clipad.pro_200_thresholds`.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import torch

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


def vectors_of(run, name: str) -> dict[str, torch.Tensor]:
    """The text vectors per category of one of ``SELECTIONS``."""
    method, options = SELECTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DBSCAN that finds only noise is counted in notebook 01
        return {
            c: representative_vectors(run.backbone, c, run.prompts, method, **options)
            for c in run.dataset.categories
        }


def without_one(images: pd.DataFrame) -> pd.DataFrame:
    """What one *other* test image less makes of a category's image AUROC, by the new scaling of the scores alone.

    ``images``: rows of one method, see :func:`clipad.studies.benchmark.benchmark`. Per category ``auroc low`` and
    ``auroc high``, over the images that can be taken away, relative to the same images with their old scores.
    """
    rows = {}
    for category, frame in images.groupby("category", sort=False):
        p, m, labels = (frame[column].to_numpy() for column in ("probability", "map_max", "label"))
        full, found = published_image_score(p, m), []
        for i in range(len(frame)):
            rest = np.delete(np.arange(len(frame)), i)
            scores = full[rest], published_image_score(p[rest], m[rest])
            before, after = (image_metrics(s, labels[rest])["auroc"] for s in scores)
            found.append(after - before)
        rows[category] = {"auroc low": np.min(found), "auroc high": np.max(found)}
    return pd.DataFrame(rows).T.rename_axis("category")


def vanished(dataset: Dataset, factor: float) -> float:
    """Share of the anomalous masks of which the published resize (bilinear, threshold 0.5) leaves not a pixel.

    ``factor``: by which the longer side shrinks.
    """
    gone = []
    for path in (s.mask_path for s in dataset if s.label == 1 and s.mask_path is not None):
        side = max(native_size(path))
        gone.append(not resize_mask(read_mask(path, side), round(side / factor)).any())
    return float(np.mean(gone))
