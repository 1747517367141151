"""Image and pixel metrics (METHOD.md section 7): AUROC, F1-max, AP and PRO, exact, as fractions.

"Exact" means over all thresholds: no binning, ties counted as ties. AUROC and AP equal scikit-learn's
``roc_auc_score`` and ``average_precision_score``; F1-max is the largest F1 on its ``precision_recall_curve``.
(For plots, take the ROC and precision-recall curves from scikit-learn; ``pro_curve`` is here.)

PRO (per-region overlap; Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021): at each
threshold, the share that is detected of each 8-connected region of the masks, averaged over the regions of
all images. It is plotted against the false positive rate over all normal pixels; PRO is the area up to a rate
of 0.3, divided by 0.3.

Where a metric is undefined it is NaN, without a warning: all of them when nothing is anomalous or nothing is
normal. (With nothing normal AP and F1-max would be 1 whatever the scores are; they are NaN, too.)

What makes it fast: false positives matter only at the scores of anomalous pixels, and those are few (2-3 % in
the industrial data sets). So only the normal scores are sorted, in their own precision and in the one copy
that is made, and each distinct anomalous score is looked up among them. Memory besides the caller's arrays:
about 5 bytes for each pixel of float32 scores, and 75 for each anomalous pixel.

Intervals come from SciPy. For the AUROC over images, resample images together with their labels:

>>> from scipy.stats import bootstrap
>>> def auroc(scores, labels):
...     return image_metrics(scores, labels)["auroc"]
>>> labels = np.arange(40) % 2
>>> scores = labels + np.random.default_rng(0).normal(size=40)
>>> interval = bootstrap(
...     (scores, labels), auroc, paired=True, vectorized=False, method="percentile",
...     n_resamples=200, random_state=0,
... ).confidence_interval
>>> bool(interval.low < auroc(scores, labels) < interval.high)
True
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import integrate, ndimage

PRO_LIMIT = 0.3  # largest false positive rate that PRO looks at


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """AUROC, F1-max and AP of N image scores.

    Args:
        scores: N numbers, higher means more anomalous; array, list or tensor.
        labels: N times 0 (normal) or 1 (anomalous).

    Returns:
        ``auroc``, ``f1_max``, ``ap``; NaN when only one class is present.

    Raises:
        ValueError: empty input, shapes that do not fit, scores not finite, labels other than 0 and 1.

    >>> image_metrics([0.1, 0.4, 0.3, 0.9], [0, 0, 1, 1])["auroc"]
    0.75
    """
    scores, labels = _checked(scores, labels, "N", "labels")
    if labels.all() or not labels.any():
        return dict.fromkeys(("auroc", "f1_max", "ap"), float("nan"))
    return _ranking_metrics(_counts(scores, labels))


def pixel_metrics(scores: ArrayLike, masks: ArrayLike) -> dict[str, float]:
    """AUROC, F1-max, AP over all pixels of N maps, and PRO.

    Args:
        scores: N x H x W, higher means more anomalous; float32 is the fast case, float64 stays float64.
        masks: N x H x W, 1 (or True) on anomalous pixels and 0 elsewhere; all 0 for a normal image.

    Returns:
        ``auroc``, ``f1_max``, ``ap``, ``pro``; NaN when only one class is present.

    Raises:
        ValueError: empty input, shapes that do not fit, scores not finite, masks other than 0 and 1.

    >>> masks = np.zeros((1, 4, 4), bool)
    >>> masks[0, 1:3, 1:3] = True
    >>> pixel_metrics(masks.astype(np.float32), masks)
    {'auroc': 1.0, 'f1_max': 1.0, 'ap': 1.0, 'pro': 1.0}
    """
    scores, masks = _checked(scores, masks, "N x H x W", "masks")
    if masks.all() or not masks.any():
        return dict.fromkeys(("auroc", "f1_max", "ap", "pro"), float("nan"))
    counts = _counts(scores, masks, _region_weights(masks))
    return {**_ranking_metrics(counts), "pro": _area(*_pro_polyline(counts))}


def pro_curve(scores: ArrayLike, masks: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The whole curve whose area up to a false positive rate of 0.3 is PRO.

    Arguments and errors as in ``pixel_metrics``, but both classes must be present (ValueError).

    Returns:
        False positive rate and mean overlap with the regions: the corners of a polyline from (0, 0) to
        (1, 1), two for each distinct score of an anomalous pixel.
    """
    scores, masks = _checked(scores, masks, "N x H x W", "masks")
    if masks.all() or not masks.any():
        raise ValueError(
            "The curve needs anomalous and normal pixels; the masks hold only one of the two."
        )
    return _pro_polyline(_counts(scores, masks, _region_weights(masks)))


def pro_200_thresholds(scores: ArrayLike, masks: ArrayLike) -> float:
    """The approximation of PRO that many repositories share, for comparison with their tables only.

    It looks at 200 thresholds, evenly spaced between the smallest and the largest *score*, drops every point
    whose false positive rate is 0.3 or more, and stretches the remaining rates to [0, 1]. So it depends on
    how the scores are distributed, not only on their order, and it is close to PRO only where the thresholds
    happen to cover the rates below 0.3 densely. NaN where all remaining points have one rate, as for a
    perfect binary map, and where ``pixel_metrics`` gives NaN.

    Arguments and errors as in ``pixel_metrics``.
    """
    scores, masks = _checked(scores, masks, "N x H x W", "masks")
    if masks.all() or not masks.any():
        return float("nan")
    # In the dtype of the scores: to search float32 for float64 would copy all of it.
    thresholds = np.linspace(scores.min(), scores.max(), 200, endpoint=False, dtype=scores.dtype)
    weights = _region_weights(masks)
    normal, anomalous = np.sort(scores[~masks]), scores[masks]
    order = np.argsort(anomalous)
    # Detected means strictly above the threshold here.
    missed = np.append(0, np.cumsum(weights[order]))
    overlap = 1 - missed[np.searchsorted(anomalous[order], thresholds, side="right")]
    rate = (normal.size - np.searchsorted(normal, thresholds, side="right")) / normal.size
    overlap, rate = overlap[rate < PRO_LIMIT], rate[rate < PRO_LIMIT]
    if rate.size == 0 or rate.max() == rate.min():
        return float("nan")
    return float(integrate.trapezoid(overlap[::-1], rate[::-1]) / (rate.max() - rate.min()))


class _Counts(NamedTuple):
    """What is detected at each distinct anomalous score t, from the highest down (K of them)."""

    anomalous_at: np.ndarray  # K: anomalous scores >= t
    normal_at: np.ndarray  # K: normal scores >= t
    normal_above: np.ndarray  # K: normal scores > t; the difference to normal_at are ties
    overlap_at: np.ndarray  # K: sum of the weights of the anomalous scores >= t
    n_normal: int


def _counts(
    scores: np.ndarray, anomalous: np.ndarray, weights: np.ndarray | None = None
) -> _Counts:
    """Sort, look up, count. Weights: one for each anomalous score, in the order of ``scores[anomalous]``."""
    normal = scores[~anomalous]
    normal.sort()  # a copy, so in place; of float32, where NumPy has a vectorised sort
    found = scores[anomalous]
    order = np.argsort(found)
    found = found[order]
    first = np.flatnonzero(
        np.append(True, found[1:] != found[:-1])
    )  # the first of each run of equal scores
    thresholds = found[first]  # rising, because a search in the order of memory is faster
    anomalous_at = found.size - first
    overlap = anomalous_at if weights is None else np.cumsum(weights[order[::-1]])[anomalous_at - 1]
    below = np.searchsorted(normal, thresholds, side="left")
    # Only a threshold that ties with several normal scores needs a second search.
    last = normal.size - 1
    tied = np.flatnonzero(normal[np.minimum(below, last)] == thresholds)
    not_above = below.copy()
    not_above[tied] += 1
    several = tied[normal[np.minimum(not_above[tied], last)] == thresholds[tied]]
    not_above[several] = np.searchsorted(normal, thresholds[several], side="right")
    falling = (
        values[::-1]
        for values in (anomalous_at, normal.size - below, normal.size - not_above, overlap)
    )
    return _Counts(*falling, normal.size)


def _ranking_metrics(counts: _Counts) -> dict[str, float]:
    found, false = counts.anomalous_at, counts.normal_at
    n_anomalous = int(found[-1])
    new = np.diff(found, prepend=0)  # anomalous scores equal to the threshold
    # A pair (anomalous, normal) is in the wrong order when the normal score is higher; a tie is half a pair.
    wrong_pairs = int(new @ (false + counts.normal_above)) / 2
    return {
        "auroc": 1 - wrong_pairs / (n_anomalous * counts.n_normal),
        # F1 = 2 TP / (2 TP + FP + FN) can only fall between two anomalous scores: its maximum is at one.
        "f1_max": float(np.max(2 * found / (found + false + n_anomalous))),
        "ap": float(new @ (found / (found + false)) / n_anomalous),
    }


def _pro_polyline(counts: _Counts) -> tuple[np.ndarray, np.ndarray]:
    """Corners (rate, overlap): flat between two anomalous scores, sloped where normal scores tie with one."""
    k = counts.overlap_at.size
    rate, overlap = np.zeros(2 * k + 2), np.zeros(2 * k + 2)
    rate[1:-1:2], rate[2:-1:2] = counts.normal_above, counts.normal_at
    rate[-1] = counts.n_normal
    rate /= counts.n_normal
    overlap[2:-1:2] = overlap[3::2] = counts.overlap_at
    return rate, overlap


def _area(rate: np.ndarray, overlap: np.ndarray) -> float:
    """Area under the polyline up to PRO_LIMIT, linearly interpolated there, divided by PRO_LIMIT."""
    end = np.searchsorted(rate, PRO_LIMIT, side="right")
    at_limit = np.interp(PRO_LIMIT, rate[end - 1 : end + 1], overlap[end - 1 : end + 1])
    rate, overlap = np.append(rate[:end], PRO_LIMIT), np.append(overlap[:end], at_limit)
    return float(integrate.trapezoid(overlap, rate) / PRO_LIMIT)


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """1 / (number of regions x size of its own region) for each anomalous pixel, ordered as masks[masks]."""
    weights, n_regions = [], 0
    for mask in masks:
        if mask.any():
            rows = np.flatnonzero(mask.any(axis=1))
            cut = mask[rows[0] : rows[-1] + 1]  # labelling is slow, and the rest is empty
            # SciPy's default would be 4-connected.
            regions, n = ndimage.label(cut, structure=np.ones((3, 3)))
            own_region = regions[cut]
            weights.append(1 / np.bincount(own_region)[own_region])
            n_regions += n
    return np.concatenate(weights) / n_regions


def _checked(
    scores: ArrayLike, truth: ArrayLike, shape: str, truth_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, the caller's own memory where possible: float32 or float64, and bool."""
    scores, truth = _array(scores, "scores"), _array(truth, truth_name)
    if scores.ndim != len(shape.split(" x ")):
        raise ValueError(f"scores must have the shape {shape}, found {scores.shape}.")
    if scores.shape != truth.shape:
        raise ValueError(
            f"scores and {truth_name} must have one shape, found {scores.shape} and {truth.shape}."
        )
    if scores.size == 0:
        raise ValueError(
            f"Nothing to evaluate: scores and {truth_name} are empty, shape {scores.shape}."
        )
    if scores.dtype not in (np.float32, np.float64):
        # float16 fits into float32; integers and booleans into float64.
        scores = scores.astype(np.float32 if scores.dtype == np.float16 else np.float64)
    # min and max need no memory, and both are NaN when any score is.
    if not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
        bad = ~np.isfinite(scores)
        first = tuple(np.argwhere(bad)[0].tolist())
        raise ValueError(
            f"scores must be finite, found {bad.sum()} that are NaN or infinite, the first at {first}."
        )
    if truth.dtype != bool:
        binary = truth != 0
        if not np.array_equal(truth, binary):
            other = truth[(truth != binary)].flat[0]
            raise ValueError(
                f"{truth_name} must hold only 0 (normal) and 1 (anomalous), found {other}; "
                "binarise them first, for instance with `> 0`."
            )
        truth = binary
    return scores, truth


def _array(values: ArrayLike, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.dtype == torch.bfloat16:  # NumPy has none
            values = values.float()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, found an array of {array.dtype}.")
    return array
