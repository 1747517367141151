"""Image and pixel metrics (METHOD.md section 7): AUROC, F1-max, AP and PRO, exact, as fractions.

"Exact" means over all thresholds: no binning, ties counted as ties. AUROC and AP equal scikit-learn's
``roc_auc_score`` and ``average_precision_score``; F1-max is the largest F1 on its ``precision_recall_curve``.

PRO (per-region overlap; Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021): at each threshold, the
share that is detected of each 8-connected region of the masks, averaged over the regions of all images. It is plotted
against the false positive rate over all normal pixels; PRO is the area up to a rate of 0.3, divided by 0.3.

All metrics are NaN, without a warning, where nothing is anomalous or nothing is normal.

What makes it fast: false positives matter only at the scores of anomalous pixels, and those are few (2-3 % in the
industrial data sets). So only the normal scores are sorted, and each distinct anomalous score is looked up among them.
A bootstrap resample is a count per image, and all that the metrics need is linear in the counts: the pixels are sorted
once for all resamples. One sample is one long "image", counted once.

Shapes: N images, R resamples.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import integrate, ndimage

PRO_LIMIT = 0.3  # largest false positive rate that PRO looks at
METRICS = ("auroc", "f1_max", "ap", "pro")
_TALLIES = 1_000_000  # N x thresholds that are looked up at once
_BLOCK = 250_000  # resamples x thresholds that are held at once: they stay in the processor's cache


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """``auroc``, ``f1_max`` and ``ap`` of N image scores; NaN when only one class is present.

    ``scores``: N numbers, higher means more anomalous; array, list or tensor. ``labels``: N times 0 (normal) or 1.
    Raises ValueError for empty input, shapes that do not fit, scores that are not finite, other labels.

    >>> image_metrics([0.1, 0.4, 0.3, 0.9], [0, 0, 1, 1])["auroc"]
    0.75
    """
    return _of_one(*_checked(scores, labels, "N"), METRICS[:3])


def pixel_metrics(scores: ArrayLike, masks: ArrayLike) -> dict[str, float]:
    """``auroc``, ``f1_max``, ``ap`` over all pixels of N maps, and ``pro``; NaN when only one class is present.

    ``scores``: N x H x W, higher means more anomalous; float32 is the fast case. ``masks``: N x H x W, 1 (or True) on
    anomalous pixels and 0 elsewhere. Raises ValueError as :func:`image_metrics`.

    >>> masks = np.zeros((1, 4, 4), bool)
    >>> masks[0, 1:3, 1:3] = True
    >>> pixel_metrics(masks.astype(np.float32), masks)
    {'auroc': 1.0, 'f1_max': 1.0, 'ap': 1.0, 'pro': 1.0}
    """
    return _of_one(*_checked(scores, masks, "N x H x W"), METRICS)


def within_image(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Pixel AUROC inside each image, N; NaN where nothing, or everything, is anomalous."""
    pairs = zip(maps, masks, strict=True)
    return np.array([pixel_metrics(v[None], m[None])["auroc"] for v, m in pairs])


def pro_200_thresholds(scores: ArrayLike, masks: ArrayLike) -> float:
    """The approximation of PRO that many repositories share, for comparison with their tables only.

    It looks at 200 thresholds, evenly spaced between the smallest and the largest *score*, drops every point whose
    false positive rate is 0.3 or more, and stretches the remaining rates to [0, 1]: it depends on how the scores are
    distributed. NaN where ``pixel_metrics`` is, and where all remaining points have one rate, as for a perfect binary
    map. Arguments and errors as in ``pixel_metrics``.
    """
    scores, masks = _checked(scores, masks, "N x H x W")
    if masks.all() or not masks.any():
        return float("nan")
    # In the dtype of the scores: to search float32 for float64 would copy all of it.
    thresholds = np.linspace(scores.min(), scores.max(), 200, endpoint=False, dtype=scores.dtype)
    weights, regions = _region_weights(masks)
    weights = weights / regions.sum()
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


def draw_counts(labels: ArrayLike, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image is in each bootstrap resample, (1 + R) x N: row 0 is the sample itself (all 1).

    Drawn with replacement within each label, so that no resample loses a class. ``labels``: N values of any kind.

    >>> draw_counts([0, 0, 1], 2, np.random.default_rng(0)).sum(axis=1)
    array([3, 3, 3])
    """
    labels = np.asarray(labels)
    counts = np.ones((1 + n_resamples, len(labels)), dtype=np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        shares = np.full(len(own), 1 / len(own))
        counts[1:, own] = rng.multinomial(len(own), shares, size=n_resamples)
    return counts


def resampled_metrics(scores: ArrayLike, truth: ArrayLike, counts: ArrayLike) -> dict:
    """The metrics of many resamples of the images: R numbers for each.

    ``scores``, ``truth``: as in ``pixel_metrics`` (N x H x W), or as in ``image_metrics`` (N; then without ``pro``);
    ``counts``: R x N, how often each image was drawn (``draw_counts``). Raises ValueError as these. A resample with one
    class only (an anomalous image's mask can be empty) is NaN; where others are not, a warning says how many.
    """
    per_pixel = np.ndim(scores) == 3
    scores, truth = _checked(scores, truth, "N x H x W" if per_pixel else "N")
    counts = np.asarray(counts, dtype=np.float64)  # sums of them are whole numbers far below 2^53
    weights, regions = _region_weights(truth)
    scores, truth = scores.reshape(len(scores), -1), truth.reshape(len(truth), -1)
    found = _measure(scores, truth, weights, regions, counts)
    undefined = np.isnan(found["auroc"]).sum()
    if 0 < undefined < len(counts):
        message = f"{undefined} of {len(counts)} resamples hold one class only and are NaN"
        warnings.warn(message, stacklevel=2)
    return {name: found[name] for name in (METRICS if per_pixel else METRICS[:3])}


def _of_one(scores, truth, names: Sequence[str]) -> dict[str, float]:
    weights, regions = _region_weights(truth)
    one, once = (scores.reshape(1, -1), truth.reshape(1, -1)), np.ones((1, 1))
    found = _measure(*one, weights, regions.sum(keepdims=True), once)
    return {name: float(found[name][0]) for name in names}


def _measure(scores, truth, weights, regions, counts) -> dict[str, np.ndarray]:
    """The metrics of R samples: ``scores``, ``truth`` N x P; ``weights``, ``regions`` from :func:`_region_weights`;
    ``counts`` R x N. (The PRO of labels means nothing.)"""
    of_image = np.count_nonzero(truth, axis=1)
    anomalous, normal = counts @ of_image, counts @ (truth.shape[1] - of_image)
    undefined = (anomalous == 0) | (normal == 0)
    anomalous[undefined] = normal[undefined] = np.nan  # and so are the metrics

    images, own_weights = [], np.split(weights, np.cumsum(of_image)[:-1])
    for image, mask, weight in zip(scores, truth, own_weights, strict=True):
        below, found = image[~mask], image[mask]
        below.sort()  # a copy, so in place; of float32, where NumPy has a vectorised sort
        order = np.argsort(found)
        images.append((below, found[order], np.append(0, np.cumsum(weight[order[::-1]]))))

    sums = np.zeros((4, len(counts)))
    for tied, *tallies in _tallies(images, np.unique(scores[truth])[::-1]):
        step = max(1, _BLOCK // tallies[0].shape[1])
        for start in range(0, len(counts), step):
            rows = slice(start, start + step)
            of_rows = (counts[rows] @ tally for tally in tallies)
            new = _sums(tied, *of_rows, anomalous[rows], PRO_LIMIT * normal[rows])
            sums[[0, 2, 3], rows] += new[[0, 2, 3]]
            sums[1, rows] = np.maximum(sums[1, rows], new[1])
    wrong, f1_max, precisions, area = sums
    auroc = 1 - wrong / (anomalous * normal)
    pro = area / (PRO_LIMIT * normal * (counts @ regions))
    return {"auroc": auroc, "f1_max": f1_max, "ap": precisions / anomalous, "pro": pro}


def _tallies(images: Sequence[tuple], thresholds: np.ndarray) -> Iterator[tuple]:
    """What is detected in each of N images at falling thresholds t: one above all scores, ``thresholds``, one below.

    ``images``: per image its normal scores and its anomalous scores, both rising, and the sum of the weights of the
    highest 0, 1, 2, ... anomalous scores. Yields, for consecutive thresholds, the positions T of those that equal a
    normal score, then N x ...: anomalous scores >= t, normal scores >= t, how many normal scores equal those T, and the
    weights of the anomalous scores >= t.
    """
    thresholds = np.concatenate([[np.inf], thresholds, [-np.inf]]).astype(thresholds.dtype)
    step = max(1, _TALLIES // max(10, len(images)))  # in pieces for one long image, too
    for start in range(0, len(thresholds) - 1, step):
        piece = thresholds[start : start + step + 1]
        tp, fp, ties, overlap = np.empty((4, len(images), len(piece)))
        for i, (normal, anomalous, weight) in enumerate(images):
            fp[i] = normal.size - np.searchsorted(normal, piece, side="left")
            ties[i] = fp[i] - normal.size + np.searchsorted(normal, piece, side="right")
            found = anomalous.size - np.searchsorted(anomalous, piece, side="left")
            tp[i], overlap[i] = found, weight[found]
        tied = np.flatnonzero(ties[:, 1:].any(axis=0)) + 1
        yield tied, tp, fp, ties[:, tied], overlap


def _sums(tied, tp, fp, ties, overlap, anomalous, limit) -> np.ndarray:
    """4 x R: pairs in the wrong order, F1-max, the sum of AP, the area of PRO; over consecutive thresholds.
    ``anomalous``: how many there are; ``limit``: the false positives at which PRO ends; R each."""
    new = np.diff(tp)  # anomalous scores equal to the threshold
    # A pair (anomalous, normal) is in the wrong order when the normal score is higher; a tie is half a pair.
    wrong = _dot(new, fp[:, 1:]) - _dot(new[:, tied - 1], ties) / 2
    detected = tp[:, 1:] + fp[:, 1:]
    precisions = _dot(new, tp[:, 1:] / np.maximum(detected, 1))
    # F1 = 2 TP / (2 TP + FP + FN) can only fall between two anomalous scores: its maximum is at one.
    f1_max = (tp[:, 1:] / (detected + anomalous[:, None])).max(axis=1) * 2
    # The overlap stays while false positives are added, and rises along a line where they tie with a threshold.
    limit = limit[:, None]
    rate = np.minimum(fp, limit)
    inside = rate[:, tied] - np.minimum(fp[:, tied] - ties, limit)
    rise = overlap[:, tied] - overlap[:, tied - 1]
    area = _dot(overlap[:, :-1], np.diff(rate))
    area = area + _dot(inside * inside / np.maximum(ties, 1), rise) / 2
    return np.stack([wrong, f1_max, precisions, area])


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...k,...k->...", a, b)


def _region_weights(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 / size of its own region (8-connected) for each anomalous pixel, ordered as masks[masks]; regions per image.
    Of labels (N) every anomalous one is a region of its own."""
    if masks.ndim == 1:
        return np.ones(masks.sum()), masks.astype(int)
    weights, numbers = [np.zeros(0)], np.zeros(len(masks), dtype=np.int64)
    for i, mask in enumerate(masks):
        if mask.any():
            rows = np.flatnonzero(mask.any(axis=1))
            cut = mask[rows[0] : rows[-1] + 1]  # labelling is slow, and the rest is empty
            regions, numbers[i] = ndimage.label(cut, structure=np.ones((3, 3)))
            own_region = regions[cut]
            weights.append(1 / np.bincount(own_region)[own_region])
    return np.concatenate(weights), numbers


def _checked(scores: ArrayLike, truth: ArrayLike, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, the caller's own memory where possible: float32 or float64, and bool."""
    scores, truth = (_array(values) for values in (scores, truth))
    if len(shape.split(" x ")) != scores.ndim or scores.shape != truth.shape or not scores.size:
        raise ValueError(
            f"scores and truth must both be {shape}, of one shape and not empty, found {scores.shape} and {truth.shape}"
        )
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64, copy=False)
    # min and max need no memory, and both are NaN when any score is.
    if not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
        raise ValueError("scores must be finite, found NaN or infinity")
    binary = truth if truth.dtype == bool else truth != 0
    if binary is not truth and not np.array_equal(truth, binary):
        raise ValueError(
            f"masks and labels must hold only 0 (normal) and 1 (anomalous), found {truth[truth != binary].flat[0]}; "
            "binarise them first, for instance with `> 0`"
        )
    return scores, binary


def _array(values: ArrayLike) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has none
    return np.asarray(values)
