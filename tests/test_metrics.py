"""Metrics against golden values, scikit-learn, and a brute force that follows the definitions."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clipad.metrics import (
    draw_counts,
    image_metrics,
    pixel_metrics,
    pro_200_thresholds,
    resampled_metrics,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "pixel_metrics.npz")
CASES = ["gaussian", "ties", "saturated", "heavy", "diagonal"]


# --- brute force: slow, and close to the definitions ---


def flood_regions(mask):
    """The 8-connected regions of one mask, as lists of (row, column)."""
    left, regions = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        region, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        regions.append(region)
    return regions


def brute_force(scores, masks):
    positive, negative = scores[masks], scores[~masks]
    regions = [(i, region) for i, mask in enumerate(masks) for region in flood_regions(mask)]
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    recall, precision, f1, rate, overlap = [0.0], [], [], [0.0], [0.0]
    for threshold in np.unique(scores)[::-1]:
        found = scores >= threshold
        tp, fp = (found & masks).sum(), (found & ~masks).sum()
        recall.append(tp / positive.size)
        precision.append(tp / (tp + fp))
        f1.append(2 * tp / (tp + fp + positive.size))
        rate.append(fp / negative.size)
        overlap.append(np.mean([np.mean([found[i][p] for p in region]) for i, region in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(rate, rate[1:], overlap, overlap[1:], strict=False):
        if x0 < 0.3 and x1 > x0:
            end = min(x1, 0.3)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    ap = np.sum(np.diff(recall) * precision)
    return {"auroc": np.mean(pairs), "f1_max": np.max(f1), "ap": ap, "pro": area / 0.3}


def brute_force_200(scores, masks):
    """The loop as it is usually written."""
    regions = [(i, region) for i, mask in enumerate(masks) for region in flood_regions(mask)]
    points = []
    for threshold in np.linspace(
        scores.min(), scores.max(), 200, endpoint=False, dtype=scores.dtype
    ):
        found = scores > threshold
        overlap = np.mean([np.mean([found[i][p] for p in region]) for i, region in regions])
        points.append(((found & ~masks).sum() / (~masks).sum(), overlap))
    points = np.array([p for p in points if p[0] < 0.3])[::-1]
    rate, overlap = (points[:, 0] - points[:, 0].min()) / np.ptp(points[:, 0]), points[:, 1]
    return np.sum(np.diff(rate) * (overlap[1:] + overlap[:-1]) / 2)


# --- made data ---


@st.composite
def maps_and_masks(draw):
    """Small maps, with many ties (few distinct scores) or hardly any, and masks from empty to full."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    ties = st.integers(0, 4).map(np.float32)
    numbers = st.floats(-1e6, 1e6, width=32)
    scores = draw(hnp.arrays(np.float32, shape, elements=draw(st.sampled_from([ties, numbers]))))
    return scores, draw(hnp.arrays(bool, shape))


def two_classes(masks):
    return masks.any() and not masks.all()


def smooth_case(n=6, side=48, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, side, side), bool)
    for mask in masks[::2]:
        y, x = rng.integers(0, side - 12, 2)
        mask[y : y + 9, x : x + 6] = True
    return (rng.normal(size=masks.shape) + masks).astype(dtype), masks


def assert_same(a, b, tolerance):
    assert a.keys() == b.keys()
    assert {k: a[k] for k in a} == pytest.approx(
        {k: b[k] for k in a}, abs=tolerance, rel=0, nan_ok=True
    )


# --- values ---


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    scores, masks = GOLDEN[f"{case}/scores"], GOLDEN[f"{case}/masks"]
    auroc, ap, f1_max, pro = GOLDEN[f"{case}/expected"]
    ours = pixel_metrics(scores, masks)
    assert ours["pro"] == pytest.approx(pro, abs=1e-6)  # recorded with the rate in float32
    assert_same({**ours, "pro": 0}, {"auroc": auroc, "f1_max": f1_max, "ap": ap, "pro": 0}, 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_scikit_learn(case):
    scores, masks = GOLDEN[f"{case}/scores"].ravel(), GOLDEN[f"{case}/masks"].ravel()
    precision, recall, _ = precision_recall_curve(masks, scores)
    expected = {
        "auroc": roc_auc_score(masks, scores),
        "f1_max": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)),
        "ap": average_precision_score(masks, scores),
    }
    assert_same(image_metrics(scores, masks), expected, 1e-12)
    ours = pixel_metrics(GOLDEN[f"{case}/scores"], GOLDEN[f"{case}/masks"])
    assert_same({k: ours[k] for k in expected}, expected, 1e-12)


@settings(max_examples=150, deadline=None)
@given(maps_and_masks())
def test_brute_force(data):
    scores, masks = data
    assume(two_classes(masks))
    assert_same(pixel_metrics(scores, masks), brute_force(scores, masks), 1e-12)


def test_diagonal_neighbours_are_one_region():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 1, 1] = masks[0, 2, 2] = True  # one 8-connected region of 2 pixels
    masks[0, 6, 6] = True  # and one of a single pixel
    scores = np.zeros((1, 8, 8), np.float32)
    scores[0, 1, 1] = 1
    # At rate 0 the overlap is (1/2 + 0) / 2; then one slope to (1, 1), cut at 0.3.
    assert pixel_metrics(scores, masks)["pro"] == pytest.approx(0.25 + 0.75 * 0.3 / 2)


def test_large_and_small_regions_weigh_the_same():
    masks = np.zeros((2, 16, 16), bool)
    masks[0, :8, :8] = True
    masks[1, 3, 3] = True
    only_large, only_small = np.zeros((2, 2, 16, 16), np.float32)
    only_large[0, :8, :8] = 1
    only_small[1, 3, 3] = 1
    assert pixel_metrics(only_large, masks)["pro"] == pytest.approx(
        pixel_metrics(only_small, masks)["pro"]
    )


# --- rules ---


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int32, st.tuples(*[st.integers(1, 6)] * 3), elements=st.integers(-20, 20)),
    st.integers(0, 2**32 - 1),
)
def test_strictly_monotone_maps_change_nothing(steps, seed):
    masks = np.random.default_rng(seed).random(steps.shape) < 0.3
    assume(two_classes(masks))
    scores = steps.astype(np.float64)
    expected = pixel_metrics(scores, masks)
    for changed in (
        3 * scores - 7,
        np.exp(scores / 4),
        np.cbrt(scores),
        scores.astype(np.float32),
        steps,
    ):
        assert_same(pixel_metrics(changed, masks), expected, 1e-9)


@settings(max_examples=60, deadline=None)
@given(maps_and_masks(), st.randoms(use_true_random=False))
def test_order_of_the_images_changes_nothing(data, random):
    scores, masks = data
    order = list(range(len(masks)))
    random.shuffle(order)
    assert_same(pixel_metrics(scores[order], masks[order]), pixel_metrics(scores, masks), 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_single_pixel(height, width, data):
    """One anomalous pixel: everything follows from the number of normal scores above it."""
    rank = data.draw(st.integers(0, height * width - 1))
    scores = np.arange(height * width, dtype=np.float32)[::-1].reshape(1, height, width)
    masks = np.zeros(scores.shape, bool)
    masks.flat[rank] = True
    normal = height * width - 1
    expected = {
        "auroc": 1 - rank / normal,
        "f1_max": 2 / (rank + 2),
        "ap": 1 / (rank + 1),
        "pro": max(0, 0.3 - rank / normal) / 0.3,
    }
    assert_same(pixel_metrics(scores, masks), expected, 1e-12)


def test_perfect_inverted_and_constant_scores():
    _, masks = smooth_case()
    assert pixel_metrics(masks, masks) == {
        "auroc": 1,
        "f1_max": 1,
        "ap": 1,
        "pro": pytest.approx(1),
    }
    share = masks.mean()
    inverted = pixel_metrics(1.0 - masks, masks)
    assert (inverted["auroc"], inverted["pro"]) == (0, 0)
    constant = pixel_metrics(np.full(masks.shape, 0.5), masks)
    expected = {"auroc": 0.5, "f1_max": 2 * share / (1 + share), "ap": share, "pro": 0.15}
    assert_same(constant, expected, 1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_gives_nan_without_a_warning(value):
    scores = np.random.default_rng(0).random((2, 5, 5))
    masks = np.full(scores.shape, value, bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixel = pixel_metrics(scores, masks)
        image = image_metrics([0.1, 0.2], [value, value])
        assert np.isnan(pro_200_thresholds(scores, masks))
    assert pixel.keys() == {"auroc", "f1_max", "ap", "pro"}
    assert image.keys() == {"auroc", "f1_max", "ap"}
    assert np.isnan([*pixel.values(), *image.values()]).all()


# --- the approximation with 200 thresholds ---


@pytest.mark.parametrize("case", CASES)
def test_200_thresholds_are_the_usual_loop(case):
    scores, masks = GOLDEN[f"{case}/scores"], GOLDEN[f"{case}/masks"]
    assert pro_200_thresholds(scores, masks) == pytest.approx(
        brute_force_200(scores, masks), abs=1e-12
    )


def test_200_thresholds_are_not_pro():
    scores, masks = GOLDEN["heavy/scores"], GOLDEN["heavy/masks"]
    exact = pixel_metrics(scores, masks)["pro"]
    assert (
        pro_200_thresholds(scores, masks) < exact - 0.3
    )  # heavy tails: nearly all thresholds are above the bulk
    # A strictly monotone map moves it, but not PRO.
    ranks = np.unique(scores, return_inverse=True)[1].reshape(scores.shape)
    assert pro_200_thresholds(ranks, masks) == pytest.approx(exact, abs=0.02)
    assert pixel_metrics(ranks, masks)["pro"] == pytest.approx(exact, abs=1e-9)


def test_200_thresholds_undefined():
    _, masks = smooth_case()
    assert np.isnan(pro_200_thresholds(masks, masks))
    assert np.isnan(pro_200_thresholds(np.ones(masks.shape), masks))


# --- resamples ---


def written_out(scores, truth, row):
    drawn = np.repeat(np.arange(len(scores)), row)
    return (pixel_metrics if scores.ndim == 3 else image_metrics)(scores[drawn], truth[drawn])


def assert_as_written_out(scores, truth, counts):
    found = resampled_metrics(scores, truth, counts)
    for r, row in enumerate(counts):
        assert_same(
            {name: values[r] for name, values in found.items()},
            written_out(scores, truth, row),
            1e-12,
        )


@pytest.mark.parametrize("ties", [False, True])
def test_counts_give_the_metrics_of_the_images_written_out(ties):
    """7 images: one normal, one anomalous in every pixel, several with two regions."""
    rng = np.random.default_rng(0)
    masks = np.zeros((7, 12, 10), bool)
    masks[1] = True
    masks[2:, 2:5, 3:7] = True
    masks[4:, 8:10, 1:3] = True
    scores = (rng.normal(size=masks.shape) + masks).astype(np.float32)
    scores = np.round(scores) if ties else scores
    assert_as_written_out(scores, masks, draw_counts([0, 1, 1, 1, 1, 1, 1], 20, rng))


def test_more_thresholds_than_are_looked_up_at_once_change_nothing():
    rng = np.random.default_rng(0)
    masks = rng.random((60, 40, 40)) < 0.5  # 48,000 thresholds of 60 images
    scores = (rng.normal(size=masks.shape) + masks).astype(np.float32)
    assert_as_written_out(scores, masks, draw_counts(np.ones(60), 2, rng))


def test_counts_of_image_scores():
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 2
    scores = np.round(labels + rng.normal(size=30), 1)
    assert set(resampled_metrics(scores, labels, np.ones((1, 30)))) == {"auroc", "f1_max", "ap"}
    assert_as_written_out(scores, labels, draw_counts(labels, 10, rng))


def test_resamples_keep_the_size_of_both_classes():
    labels = np.array([0, 1, 1, 0, 1])
    counts = draw_counts(labels, 50, np.random.default_rng(1))
    assert (counts[0] == 1).all()
    assert (counts[:, labels == 1].sum(axis=1) == 3).all()
    assert len(np.unique(counts, axis=0)) > 10


def test_resamples_of_one_class_are_nan_and_said():
    scores, masks = smooth_case(n=4, side=16)
    masks[2] = False  # an anomalous image whose mask is empty
    counts = np.array([[1, 1, 1, 1], [0, 1, 2, 1], [2, 1, 0, 1]])
    with pytest.warns(UserWarning, match="1 of 3 resamples"):
        found = resampled_metrics(scores, masks, counts)
    assert all(np.isnan(values).tolist() == [False, True, False] for values in found.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resampled_metrics(scores, np.zeros_like(masks), counts)
    assert np.isnan(list(found.values())).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_resampled_scores_have_to_be_finite(value):
    scores, masks = smooth_case(n=2, side=16)
    scores[1, 3, 3] = value
    for function in (resampled_metrics, lambda s, m, _: pixel_metrics(s, m)):
        with pytest.raises(ValueError, match="finite"):
            function(scores, masks, np.ones((3, 2)))


# --- input ---


def test_arrays_lists_and_tensors():
    scores, masks = smooth_case(n=2, side=16)
    expected = pixel_metrics(scores, masks)
    assert pixel_metrics(torch.tensor(scores, requires_grad=True), torch.tensor(masks)) == expected
    assert pixel_metrics(scores.tolist(), masks.astype(int).tolist()) == expected
    assert pixel_metrics(np.asfortranarray(scores), masks.astype(np.float32)) == expected
    half = torch.tensor(scores).half()
    assert pixel_metrics(half, masks) == pixel_metrics(half.float(), masks)


def test_float64_differences_below_float32_count():
    scores = np.array([1.0, 1.0 + 1e-12])
    assert image_metrics(scores, [0, 1])["auroc"] == 1
    assert image_metrics(scores[::-1], [0, 1])["auroc"] == 0


def test_the_callers_arrays_stay_as_they_were():
    scores, masks = smooth_case()
    before = scores.copy(), masks.copy()
    scores.flags.writeable = masks.flags.writeable = False
    pixel_metrics(scores, masks)
    pro_200_thresholds(scores, masks)
    assert np.array_equal(scores, before[0])
    assert np.array_equal(masks, before[1])


@pytest.mark.parametrize("function", [pixel_metrics, pro_200_thresholds])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: (s[0], m[0]), r"N x H x W.*\(48, 48\)"),
        (lambda s, m: (s, m[:, :40]), r"\(6, 48, 48\).*\(6, 40, 48\)"),
        (lambda s, m: (s[:0], m[:0]), r"\(0, 48, 48\)"),
        (lambda s, m: (np.where(m, np.nan, s), m), "finite"),
        (lambda s, m: (np.where(m, np.inf, s), m), "finite"),
        (lambda s, m: (np.where(m, -np.inf, s), m), "finite"),
        (lambda s, m: (s, m * 255), "masks.*255"),
        (lambda s, m: (s, m * 0.5), r"masks.*0\.5"),
        (lambda s, m: (s, np.where(m, np.nan, 0)), "masks.*nan"),
        (lambda s, m: (s, m - 1.0), "masks.*-1"),
    ],
)
def test_bad_input(function, change, message):
    scores, masks = smooth_case()
    with pytest.raises(ValueError, match=message):
        function(*change(scores, masks))


def test_bad_image_input():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        image_metrics(np.ones((2, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        image_metrics([1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="empty"):
        image_metrics([], [])
    with pytest.raises(ValueError, match=r"labels.*2"):
        image_metrics([1, 2, 3], [0, 1, 2])


def test_memory_besides_the_callers_arrays():
    scores, masks = smooth_case(n=40, side=200)
    assert masks.mean() < 0.03
    tracemalloc.start()
    pixel_metrics(scores, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / masks.size < 8


def test_tensors_in_half_precision():
    scores, masks = smooth_case()
    tensor = torch.from_numpy(scores).bfloat16()
    assert pixel_metrics(tensor, masks) == pixel_metrics(tensor.float().numpy(), masks)
