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
    Look,
    Rule,
    alarms_allowed,
    nearest_patch,
    rate_interval,
    robust_scale,
    stitch,
    tile,
)
from clipad.studies.inspection.trials import Product, over_categories


@pytest.mark.parametrize(("rate", "n"), [(0.25, 8), (0.1, 9), (0.05, 19), (0.01, 99), (0.03, 33)])
def test_how_many_images_a_rate_needs(rate, n):
    assert 1 <= alarms_allowed(n, rate) <= 2
    with pytest.raises(
        ValueError, match=rf"{n - 1} flawless images cannot promise .* at least {n}"
    ):
        alarms_allowed(n - 1, rate)


@pytest.mark.parametrize("rate", [0, -0.1, 0.3, 5])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="above 0 and at most"):
        alarms_allowed(100, rate)


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (20, 0.1), (45, 0.1)])
def test_the_promise_holds_for_exchangeable_images(n, rate):
    """Over many draws, the whole rule: two numbers, robust scale, leave-one-out scores, threshold."""
    rng = np.random.default_rng(0)
    alarms, rates = 0, []
    for _ in range(200):
        logits, maxima = rng.standard_t(3, n), rng.gamma(2, size=n)  # heavy tails, skewed
        rule = Rule(logits, maxima, rate)
        new = rule.score(rng.standard_t(3, 999), rng.gamma(2, size=999))
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
    with pytest.raises(ValueError, match="logits, maxima or map values are 1"):
        Rule(np.arange(20.0), np.ones(20), 0.1)
    with pytest.raises(ValueError, match="are they copies"):
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
    inspector.fit(Look.cat([inspector.look(images[:6]), inspector.look(images[6:])]), 0.25)
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
    inspector.fit(inspector.look(images), 0.25)
    assert len(inspector.bank) == 6
    expected = inspector.maps(inspector.look(images[9:]))
    np.testing.assert_allclose(inspector.flawless_maps[9:], expected, atol=1e-6)
    with pytest.raises(ValueError, match="5 flawless images cannot promise"):
        inspector.fit(inspector.look(images[:5]), 0.25)


def test_neighbours_need_staged_tokens(tiny_backbone):
    with pytest.raises(ValueError, match="sdp and sdp_plus"):
        Inspector(Direct(tiny_backbone, rvs="mean"), "bolt", "alone")


# --- notebook 07's analysis ---


@pytest.fixture(scope="module")
def product():
    detector = SDP(load_backbone("demo", device="cpu"), rvs="mean")
    return Product(detector, load_dataset("demo"), "screw")


def test_images_that_set_the_rule_are_no_new_ones(product):
    chosen, rest = product.split(10, np.random.default_rng(0))
    assert sorted([*chosen, *rest]) == list(range(40))
    assert not product.labels[chosen].any()
    inspector = product.fitted(chosen, 0.1)
    decided = product.decide(inspector, rest)
    assert decided["label"].tolist() == product.labels[rest].tolist()
    bad = decided["score"] > inspector.rule.threshold
    assert (decided["verdict"] == "bad").tolist() == bad.tolist()


def test_two_categories_are_too_few_for_an_interval():
    table = pd.DataFrame({"category": list("aabbcc"), "found": [0.1, 0.3, 0.2, 0.4, 0.6, 0.6]})
    assert over_categories(table[:4], "found").verdict(0.1) == "not measured"
    mean = over_categories(table, "found")
    assert mean.estimate == pytest.approx(1.1 / 3)
    assert mean.low < mean.estimate < mean.high
    assert over_categories(table, "found", table).estimate == 0
