"""The statistics of notebook 07 and `clipad detect`: scale, threshold, promise, nearest neighbours."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import binom

from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDP, Direct
from clipad.studies.inspection import (
    BANK,
    Inspector,
    Rule,
    combined_score,
    conformal_threshold,
    nearest_patch,
    rate_interval,
    require_enough,
    robust_scale,
    stitch,
    tile,
    trials,
)


@pytest.mark.parametrize(("rate", "n"), [(0.25, 8), (0.1, 9), (0.05, 19), (0.01, 99), (0.03, 33)])
def test_how_many_images_a_rate_needs(rate, n):
    scores = np.arange(float(n))
    assert conformal_threshold(scores, rate) >= np.sort(scores)[-3]
    with pytest.raises(
        ValueError, match=rf"{n - 1} flawless images cannot promise .* at least {n}"
    ):
        conformal_threshold(scores[:-1], rate)


@pytest.mark.parametrize("rate", [0, -0.1, 0.3, float("nan")])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.25"):
        require_enough(100, rate)


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (20, 0.1), (45, 0.1)])
def test_the_promise_holds_for_exchangeable_images(n, rate):
    """Over many draws, the whole rule: two numbers, robust scale, leave-one-out scores, threshold."""
    rng = np.random.default_rng(0)
    alarms, rates = 0, []
    for _ in range(200):
        logits, maxima = rng.standard_t(3, n), rng.gamma(2, size=n)  # heavy tails, skewed
        rule = Rule(logits, maxima, rate)
        new = combined_score(rng.standard_t(3, 999), rng.gamma(2, size=999), logits, maxima)
        rates.append((new > rule.threshold).mean())
        alarms += new[0] > rule.threshold
    assert np.mean(rates) <= rate
    assert alarms <= binom.ppf(0.9999, 200, rate)
    assert np.mean(np.array(rates) > rate_interval(n, rate)[1]) < 0.05


def test_the_score_does_not_explode_where_the_probability_saturates():
    rng = np.random.default_rng(1)
    logits, maxima = rng.normal(-40, 2, 20), rng.normal(1, 0.1, 20)  # probabilities of 1e-18
    rule = Rule(logits, maxima, 0.1)
    assert -6 < rule.score(-40, 1.0) < 3
    assert 5 < rule.score(-10, 1.2) < 100


def test_one_odd_flawless_image_does_not_set_the_scale():
    rng = np.random.default_rng(2)
    logits, maxima = rng.normal(size=30), rng.normal(size=30)
    odd = logits.copy()
    odd[0] = 1e6
    assert Rule(odd, maxima, 0.1).score(4, 4) == pytest.approx(
        Rule(logits, maxima, 0.1).score(4, 4), rel=0.3
    )


def test_values_without_a_scale_are_refused():
    with pytest.raises(ValueError, match="the same map maximum"):
        Rule(np.arange(20.0), np.ones(20), 0.1)
    with pytest.raises(ValueError, match="copies of one picture"):
        robust_scale([1.0] * 9 + [2.0])


def test_verdicts_follow_from_both_thresholds():
    rng = np.random.default_rng(3)
    rule = Rule(rng.normal(size=40), rng.normal(size=40), 0.1)
    assert rule.verdict(rule.threshold + 1e-9, -9) == "bad"
    assert rule.verdict(rule.threshold, rule.map_threshold + 1e-9) == "check"
    assert rule.verdict(rule.threshold, rule.map_threshold) == "good"
    assert rule.p_value(rule.scores.max() + 1) == pytest.approx(1 / 41)
    assert rule.p_value(rule.scores.min()) == 1
    assert (rule.scores > rule.threshold).sum() == 3  # k - 1 of floor(0.1 * 41)


def test_nearest_patch_against_plain_loops():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 4, generator=generator)
    bank = torch.randn(3, 5, 4, generator=generator)

    def scaled(image):
        return (image - image.mean()) / (image.var(correction=0) + 1e-5).sqrt()

    def plain(image, images):
        others = [other for i in images for other in scaled(bank[i])]
        return [min(float((patch - other).norm()) for other in others) for patch in scaled(image)]

    expected = np.array([plain(image, range(3)) for image in tokens])
    np.testing.assert_allclose(nearest_patch(tokens, bank), expected, atol=1e-4)
    own = [plain(bank[i], [k for k in range(3) if k != i]) for i in range(3)]
    found = nearest_patch(torch.cat([bank, tokens]), bank, same=True)
    np.testing.assert_allclose(found, [*own, *expected], atol=1e-4)


def test_tiles_cover_the_image_in_order():
    image = Image.fromarray(np.arange(7 * 10, dtype=np.uint8).reshape(7, 10))
    pieces = [np.asarray(piece) for piece in tile(image, 3)]
    rows = [np.concatenate(pieces[i : i + 3], axis=1) for i in (0, 3, 6)]
    np.testing.assert_array_equal(np.concatenate(rows), np.asarray(image))
    maps = torch.arange(9.0).view(9, 1, 1).expand(9, 2, 2)
    assert stitch(maps, 3)[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


# --- with a model ---


def prepared(inspector, count, seed=0, side=40):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return torch.stack([inspector.prepare(Image.fromarray(p)) for p in pictures])


def test_the_plain_inspector_gives_the_detectors_own_map_and_logit(tiny_backbone):
    detector = SDP(tiny_backbone, rvs="mean")
    inspector = Inspector(detector, "bolt")
    images = prepared(inspector, 4)
    look = inspector.look(images)
    prediction = detector.predict(images[:, 0], "bolt")
    np.testing.assert_allclose(inspector.maps(look), prediction.maps, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-look.logits)), prediction.probabilities, atol=1e-5)


@pytest.mark.parametrize("neighbours", ["alone", "added"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_flawless_patch_has_distance_0_but_not_to_itself(tiny_backbone, neighbours, tiles):
    inspector = Inspector(SDP(tiny_backbone, rvs="mean"), "bolt", neighbours, tiles)
    images = prepared(inspector, 10)
    inspector.fit([inspector.look(images[:6]), inspector.look(images[6:])], 0.25)
    side = 32 * tiles
    assert inspector.flawless_maps.shape == (10, side, side)
    again = inspector.maps(inspector.look(images[:2]))
    assert again.shape == (2, side, side)
    assert (again < inspector.flawless_maps[:2] + 1e-6).all()  # more to compare with: never farther
    if neighbours == "alone":
        assert abs(again).max() < 0.01 < inspector.flawless_maps.min()


def test_flawless_images_beyond_the_bank_are_compared_as_new_ones(tiny_backbone, monkeypatch):
    assert BANK >= 50
    monkeypatch.setattr("clipad.studies.inspection.BANK", 6)
    inspector = Inspector(SDP(tiny_backbone, rvs="mean"), "bolt", "alone")
    images = prepared(inspector, 12)
    inspector.fit([inspector.look(images[i : i + 3]) for i in range(0, 12, 3)], 0.25)
    assert len(inspector.bank[0]) == 6
    expected = inspector.maps(inspector.look(images[9:]))
    np.testing.assert_allclose(inspector.flawless_maps[9:], expected, atol=1e-6)
    for few in ([], [inspector.look(images[:5])]):
        with pytest.raises(ValueError, match=f"{5 * len(few)} flawless images cannot promise"):
            inspector.fit(few, 0.25)


def test_impossible_options_are_refused(tiny_backbone):
    with pytest.raises(ValueError, match="one of no, alone, added"):
        Inspector(SDP(tiny_backbone, rvs="mean"), "bolt", "both")
    with pytest.raises(ValueError, match="sdp and sdp_plus"):
        Inspector(Direct(tiny_backbone, rvs="mean"), "bolt", "alone")


# --- notebook 07's analysis ---


@pytest.fixture(scope="module")
def products():
    detector = SDP(load_backbone("demo", device="cpu"), rvs="mean")
    dataset = load_dataset("demo", categories=["screw", "tile"])
    return detector, [trials.Product(detector, dataset, c) for c in dataset.categories]


def test_trials_keep_the_images_that_set_the_rule_out_of_the_count(products):
    _, both = products
    product = both[0]
    chosen = product.flawless[:10]
    inspector = product.fitted(chosen, 0.1)
    rest = np.setdiff1d(np.arange(40), chosen)
    decided = product.decide(inspector, rest)
    assert decided["label"].tolist() == product.labels[rest].tolist()
    assert (decided["verdict"] == "bad").sum() == (
        decided["score"] > inspector.rule.threshold
    ).sum()
    table = trials.trials(both, 10, 0.1, draws=4)
    assert table.groupby("category").size().tolist() == [4, 4]
    assert (table["in_sample"] >= table["false_alarms"]).mean() > 0.5
    assert trials.trials(both, 20, 0.1, draws=1).empty  # nobody is left to count
    assert (
        trials.over_categories(table, "found").verdict(0.1) == "not measured"
    )  # two categories only
    more = pd.concat([table, table.assign(category="a third one")])
    mean = trials.over_categories(more, "found")
    assert mean.low <= mean.estimate <= mean.high


def test_trays_hold_one_defect_or_none(products):
    _, both = products
    made = trials.trays(both[1], side=2, count=4, piece=48)
    assert [image.size for image in made["images"]] == [(96, 96)] * 4
    assert made["masks"].any(axis=(1, 2)).tolist() == [False, True, False, True]
    table, maps = trials.tiles_tried(both[1], made, (1, 2))
    assert table["tiles"].tolist() == [1, 2]
    assert maps[2].shape == (4, 96, 96)
