"""A detector on a data set -> a tidy table (METHOD.md section 7), resumable.

With an ``output_dir`` every category leaves its results on disk, and a large one a part after every 64 images; a run
that was stopped anywhere continues there and ends with the same bytes. Memory holds the maps of one category at a time.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from clipad.datasets import Dataset, Sample
from clipad.io.files import Arrays, cached, claim, content_hash, file_name, write_atomically
from clipad.io.images import read_image, read_mask, require_mask_size
from clipad.metrics import METRICS, image_metrics, pixel_metrics, resampled_metrics

COLUMNS = [f"{level}_{metric}" for level in ("image", "class") for metric in METRICS[:3]]
COLUMNS += [f"pixel_{metric}" for metric in METRICS]
PART = 64
"""images in one part on disk: what a killed run loses at most"""
FORMAT = 2
"""of the files in an output folder: those of an earlier version are not taken for these"""
WORKERS = 4
"""threads that read"""


@dataclass
class Result:
    """``table``: a row per category and a last row ``mean`` (unweighted), fractions; ``image_*`` uses the published
    combination of class probability and map (for WinCLIP the class probability), ``class_*`` the class probability
    alone, ``pixel_*`` the maps; NaN where a data set has no such labels. ``images``: a row per image."""

    table: pd.DataFrame
    images: pd.DataFrame
    settings: dict


def published_image_score(probabilities, map_maxima) -> np.ndarray:
    """Min-max of the class probability plus min-max of the map's maximum, over one category's images (METHOD.md
    section 5). Where all values are equal that part is 0: the released program divides 0 by 0 there."""

    values = np.array([probabilities, map_maxima], dtype=np.float64)
    low, span = values.min(axis=1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    return ((values - low) / np.where(span > 0, span, 1)).sum(axis=0)


def evaluate(
    detector,
    dataset: Dataset,
    output_dir: str | Path | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Result:
    """Run a detector over a data set.

    ``output_dir``: where results are kept, None for memory only; ``batch_size``: halved by itself where a GPU runs out
    of memory.

    Raises ValueError for an empty data set, a mask of another size than its image, maps that are not finite, and an
    ``output_dir`` that holds results of other settings; OSError if it cannot be written; what
    :func:`clipad.read_image` raises for a broken image, with everything finished so far kept.
    """
    if not len(dataset) or batch_size < 1:
        raise ValueError(f"found {len(dataset)} images and batch_size={batch_size}: 1 or more each")
    with ThreadPoolExecutor(WORKERS) as pool:  # from the headers, so that no run stops at its end
        masked = [s for s in dataset if s.mask_path is not None]
        list(pool.map(lambda s: require_mask_size(s.mask_path, s.image_path), masked))
    settings = detector.settings | {"dataset": dataset.name, "samples": fingerprint(dataset)}
    folder = output_dir and Path(output_dir)
    if folder:
        claim(folder, settings | {"format": FORMAT}, ["categories", "parts"])

    rows, frames, title = {}, [], f"{detector.name} on {dataset.name}"
    with tqdm(total=len(dataset), desc=title, unit="image", disable=not progress) as bar:
        for category in dataset.categories:
            part = dataset.select(category)
            place, parts = None, folder and folder / "parts"
            if folder:
                place = folder / "categories" / f"{file_name(category)}.npz"
            found = cached(place, lambda: measure(detector, part, batch_size, None, bar, parts))
            if folder:
                shutil.rmtree(parts, ignore_errors=True)
            rows[category] = {name: float(found.pop(name, np.nan)) for name in COLUMNS}
            paths = [s.image_path.relative_to(dataset.root).as_posix() for s in part]
            own = {"category": category, "path": paths}
            own |= {name: [getattr(s, name) for s in part] for name in ("defect", "label")}
            frames.append(pd.DataFrame(own | found))
            bar.update(sum(map(len, frames)) - bar.n)

    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS).rename_axis("category")
    table.loc["mean"] = table.mean()
    images = pd.concat(frames, ignore_index=True)
    if folder:
        write_atomically(folder / "table.csv", table.to_csv())
        write_atomically(folder / "images.csv", images.to_csv(index=False))
    return Result(table, images, settings)


def fingerprint(dataset: Dataset) -> str:
    """16 hex digits over the samples: relative paths, labels, content of images and masks."""
    digest = hashlib.sha256()
    for s in dataset:
        files = (s.image_path, s.mask_path, s.object_mask_path)
        content = "|".join("" if path is None else content_hash(path) for path in files)
        path = s.image_path.relative_to(dataset.root).as_posix()
        digest.update(f"{path}|{s.category}|{s.label}|{content}\n".encode())
    return digest.hexdigest()[:16]


def category_metrics(
    maps, masks, probabilities, labels, map_in_image_score: bool = True, counts=None
) -> dict[str, float | np.ndarray]:
    """All metrics of one category that its labels allow: ``image_*``, ``class_*`` and, with masks, ``pixel_*``.

    ``maps``, ``masks``: N x S x S (without masks N x 1 x 1 maxima do); ``probabilities``, ``labels``: N, -1 where it is
    not known. ``map_in_image_score``: images are ranked by :func:`published_image_score`, else by the class
    probability. With ``counts`` (1 + R x N, from :func:`clipad.metrics.draw_counts`) each metric is an array: the
    estimate, then R resamples, for which the image score is not scaled anew.
    """

    def measured(level, scores, truth, plain):
        found = plain(scores, truth) if counts is None else resampled_metrics(scores, truth, counts)
        return {f"{level}_{name}": value for name, value in found.items()}

    metrics = {}
    if (labels >= 0).all():
        score = probabilities
        if map_in_image_score:
            score = published_image_score(probabilities, maps.max(axis=(1, 2)))
        metrics = measured("image", score, labels, image_metrics)
        metrics |= measured("class", probabilities, labels, image_metrics)
    if masks is not None:
        metrics |= measured("pixel", maps, masks, pixel_metrics)
    return metrics


def batches(
    backbone, samples: Iterable[Sample], batch_size: int = 16
) -> Iterator[tuple[str, torch.Tensor]]:
    """(category, pre-processed images B x 3 x S x S on the backbone's device), in order; a batch is of one category.

    Threads decode two more while the caller computes.
    """
    device, waiting = backbone.device, deque()

    def read(sample: Sample) -> torch.Tensor:
        return backbone.preprocess(read_image(sample.image_path))

    def stack(category: str, futures: list[Future]) -> tuple[str, torch.Tensor]:
        images = torch.stack([future.result() for future in futures])
        images = images.pin_memory() if device.type == "cuda" else images
        return category, images.to(device, non_blocking=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        for category, group in groupby(samples, key=lambda sample: sample.category):
            group = list(group)
            for start in range(0, len(group), batch_size):
                futures = [pool.submit(read, s) for s in group[start : start + batch_size]]
                waiting.append((category, futures))
                if len(waiting) > 2:
                    yield stack(*waiting.popleft())
        yield from (stack(*found) for found in waiting)


def in_parts(compute: Callable[[torch.Tensor], Any], images: torch.Tensor) -> list:
    """``compute(images)``, in a list of one; where GPU memory runs out, of both halves, or of parts that fit."""
    try:
        return [compute(images)]
    except RuntimeError as error:  # also where cuBLAS or cuDNN could not allocate
        full = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
        if len(images) == 1 or not full:
            raise
    torch.cuda.empty_cache()  # outside of the handler, which would keep what failed alive
    return [part for half in images.chunk(2) for part in in_parts(compute, half)]


def predict(
    detector,
    samples: Iterable[Sample],
    batch_size: int = 16,
    bar=None,
    parts: Path | None = None,
    keep_maps: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Maps N x S x S (or only their maxima, N x 1 x 1) and class probabilities N of samples, float32.

    ``parts``: where each part of more than ``PART`` images is kept, so that a stopped call continues. Raises ValueError
    for numbers that are not finite.
    """
    samples, side = list(samples), detector.backbone.image_size if keep_maps else 1
    maps = np.empty((len(samples), side, side), np.float32)
    probabilities = np.empty(len(samples), np.float32)
    for start in range(0, len(samples), PART):
        group, at = samples[start : start + PART], slice(start, start + PART)
        name = f"{file_name(group[0].category)}-{start:06d}.npz"
        path = parts / name if parts and len(samples) > PART else None
        found = cached(path, lambda: _predict(detector, group, batch_size, bar, keep_maps))
        maps[at], probabilities[at] = found["maps"], found["probabilities"]
    return maps, probabilities


def _predict(detector, samples: list[Sample], batch_size: int, bar, keep_maps: bool) -> Arrays:
    side, done = detector.backbone.image_size if keep_maps else 1, 0
    maps = np.empty((len(samples), side, side), np.float32)
    probabilities = np.empty(len(samples), np.float32)
    for category, images in batches(detector.backbone, samples, batch_size):
        for part in in_parts(lambda some: detector.predict(some, category), images):
            if not all(torch.isfinite(x).all() for x in (part.maps, part.probabilities)):
                raise ValueError(f"{detector.name}: not all numbers are finite for {category!r}")
            at = slice(done, done + len(part.maps))
            maps[at] = part.maps if keep_maps else part.maps.amax(dim=(1, 2), keepdim=True)
            probabilities[at], done = part.probabilities, at.stop
        if bar:
            bar.update(len(images))
    return {"maps": maps, "probabilities": probabilities}


def measure(
    detector, part: Dataset, batch_size=16, counts=None, bar=None, parts: Path | None = None
) -> Arrays:
    """One category by one detector: the metrics of :func:`category_metrics` by name, and ``probability``, ``map_max``
    and ``image_score`` of its N images, all float64. ``parts``: see :func:`predict`."""
    maps, probabilities = predict(detector, part, batch_size, bar, parts, part.has_masks)
    masks = read_masks(list(part), maps.shape[-1]) if part.has_masks else None
    labels, with_map = np.array([s.label for s in part]), detector.map_in_image_score
    found = category_metrics(maps, masks, probabilities, labels, with_map, counts)
    maxima = maps.max(axis=(1, 2))
    score = published_image_score(probabilities, maxima) if with_map else probabilities
    found |= {"probability": probabilities, "map_max": maxima, "image_score": score}
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def read_masks(samples: list[Sample], image_size: int) -> np.ndarray:
    """Ground truth of samples as bool, N x S x S; all False of a sample without a mask (a normal image)."""
    masks = np.zeros((len(samples), image_size, image_size), dtype=bool)

    def read(mask: np.ndarray, s: Sample) -> None:
        if s.mask_path is not None:
            require_mask_size(s.mask_path, s.image_path)
            mask[:] = read_mask(s.mask_path, image_size)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(read, masks, samples))
    return masks
