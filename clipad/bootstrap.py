"""Exact image and pixel metrics of many bootstrap resamples at once, and intervals from them.

What is resampled are whole images, within their category and separately for normal and anomalous ones. A resample is
then a count per image (how often it was drawn), and everything the metrics need is linear in these counts: at a
threshold t, the false positives of the resample are the counts times each image's own number of normal pixels >= t.
So the pixels are sorted once, not once per resample, and no threshold is left out or binned: the numbers equal
:func:`clipad.pixel_metrics` on the images written out as often as they were drawn.

Shapes: N images, R resamples, K distinct scores of anomalous pixels.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from clipad.metrics import PRO_LIMIT

METRICS = ("auroc", "f1_max", "ap", "pro")
_BLOCK = 300_000
"""entries of the largest array held at once (R x thresholds or N x thresholds): 2 MB stay in the cache of a core"""


def draw_counts(labels, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(1 + R) x N: row 0 is the sample itself (all 1), each further row one resample of the same size.

    Drawn with replacement within each label, so that no resample loses a class.

    >>> draw_counts([0, 0, 1], 2, np.random.default_rng(0)).sum(axis=1)
    array([3, 3, 3])
    """
    labels = np.asarray(labels)
    counts = np.ones((1 + n_resamples, len(labels)), dtype=np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        counts[1:, own] = rng.multinomial(
            len(own), np.full(len(own), 1 / len(own)), size=n_resamples
        )
    return counts


def resampled_metrics(
    scores: np.ndarray, truth: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """``auroc``, ``f1_max``, ``ap`` and ``pro`` of every resample, R numbers each.

    ``scores`` and ``truth``: N x H x W maps and bool masks, or N image scores and labels (without ``pro``);
    ``counts``: R x N, how often each image was drawn. NaN where nothing is anomalous or nothing normal, as in
    :func:`clipad.pixel_metrics`. Raises ValueError for shapes that do not fit.
    """
    scores, truth, counts = np.asarray(scores), np.asarray(truth).astype(bool), np.asarray(counts)
    if (
        scores.shape != truth.shape
        or scores.ndim not in (1, 3)
        or counts.shape[1:] != scores.shape[:1]
    ):
        raise ValueError(
            "scores and truth have to be N x H x W or N, counts R x N; "
            f"found {scores.shape}, {truth.shape} and {counts.shape}"
        )
    per_pixel = scores.ndim == 3
    if not per_pixel:
        scores, truth = scores[:, None, None], truth[:, None, None]
    names = METRICS if per_pixel else METRICS[:3]
    counts = counts.astype(np.float64)  # every sum below is a whole number far under 2^53, so exact
    total = counts @ truth.sum(axis=(1, 2))
    total_normal = counts @ (~truth).sum(axis=(1, 2))
    regions, weights = _regions(truth)
    n_regions = counts @ regions

    normal = [np.sort(image[~mask]) for image, mask in zip(scores, truth, strict=True)]
    owner = np.nonzero(truth)[0]
    order = np.argsort(scores[truth])[::-1]
    found_at, owner, weights = scores[truth][order], owner[order], weights[order]
    first = (
        np.flatnonzero(np.append(True, found_at[1:] != found_at[:-1]))
        if len(found_at)
        else np.array([], int)
    )

    n = len(counts)
    found, false, overlap = np.zeros((n, 1)), np.zeros((n, 1)), np.zeros((n, 1))
    wrong, best_f1, ap, area = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    limit = PRO_LIMIT * total_normal[:, None]
    step = max(1, _BLOCK // max(n, len(scores)))
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, len(first), step):  # thresholds from the highest down, in blocks
            own = slice(first[start], first[start + step] if start + step < len(first) else None)
            starts = first[start : start + step] - first[start]
            thresholds = found_at[own][starts]
            at, above = (
                counts @ np.stack([len(v) - np.searchsorted(v, thresholds, side) for v in normal])
                for side in ("left", "right")
            )
            new = np.add.reduceat(counts[:, owner[own]], starts, axis=1)
            now = found[:, -1:] + np.cumsum(new, axis=1)
            # A pair in the wrong order counts 1, a tie half.
            wrong += (new * (at + above)).sum(axis=1) / 2
            best_f1 = np.fmax(best_f1, (2 * now / (now + at + total[:, None])).max(axis=1))
            ap += np.where(new > 0, new * now / (now + at), 0).sum(axis=1)
            if per_pixel:
                gained = np.add.reduceat(counts[:, owner[own]] * weights[own], starts, axis=1)
                height = overlap[:, -1:] + np.cumsum(gained, axis=1)
                before = np.hstack([overlap[:, -1:], height[:, :-1]])
                last = np.hstack([false[:, -1:], at[:, :-1]])
                # The curve runs flat from the last false positives to `above`, then rises to `at` over the ties.
                area += (before * (np.minimum(above, limit) - np.minimum(last, limit))).sum(axis=1)
                inside = np.minimum(at, limit) - np.minimum(above, limit)
                share = np.where(at > above, inside / (at - above), 0)
                area += (inside * (before + gained * share / 2)).sum(axis=1)
                overlap = height[:, -1:]
            found, false = now[:, -1:], at[:, -1:]
        area += (overlap * (limit - np.minimum(false, limit)))[:, 0]
        results = [
            1 - wrong / (total * total_normal),
            best_f1,
            ap / total,
            area / (limit[:, 0] * n_regions),
        ]
    undefined = (total == 0) | (total_normal == 0)
    return {
        name: np.where(undefined, np.nan, values)
        for name, values in zip(METRICS, results, strict=True)
        if name in names
    }


def _regions(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regions (8-connected) per image, N; and for each anomalous pixel 1 / size of its region, as ``truth[truth]``."""
    numbers, weights = np.zeros(len(truth)), []
    for i, mask in enumerate(truth):
        labelled, numbers[i] = ndimage.label(mask, structure=np.ones((3, 3)))
        own = labelled[mask]
        weights.append(1 / np.bincount(own)[own] if len(own) else np.zeros(0))
    return numbers, np.concatenate(weights)


def interval(
    values: np.ndarray, level: float = 0.95, axis: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval: the middle ``level`` of resampled values."""
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=axis))
