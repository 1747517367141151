"""Both phenomena on maps drawn by hand, where the answer is known, and the probe against the detectors."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from clipad.datasets import Dataset, Sample, read_image
from clipad.detectors import Direct
from clipad.studies import opposite_predictions as phenomena
from clipad.studies.opposite_predictions import (
    all_features,
    change,
    control_rates,
    count_phenomena,
    direct_maps,
    gap_closed,
    ground_truth,
    highlight_share,
    image_phenomena,
    linear_probe_auroc,
    modality_gap,
    opposite_prediction,
    patch_auroc,
    probe,
    random_states,
    rates,
    raw_maps,
    scale_effect,
    shuffled_states,
    untrained,
)

SIZE = 20  # 5 % of 20 x 20 pixels are 20


@pytest.fixture
def scene():
    """The object is the left half, 200 pixels; two defects on it, 3 x 3 and 2 x 2; the rest is background."""
    objects = np.zeros((SIZE, SIZE), bool)
    objects[:, :10] = True
    mask = np.zeros_like(objects)
    mask[2:5, 2:5] = True
    mask[10:12, 2:4] = True
    return mask, objects


def test_a_map_that_is_right_shows_neither_phenomenon(scene):
    mask, objects = scene
    found = image_phenomena(mask.astype(np.float32), mask, objects)
    assert found["opposite"] == found["opposite_regions"] == found["opposite_on_object"] == 0
    # 13 hot pixels on the defect; the 7 missing ones of the 20 are ties, spread over the 387 others, 200 of them off
    # the object.
    assert found["off_object"] == pytest.approx(7 * 200 / 387 / 20)
    assert found["off_defect"] == pytest.approx(7 / 20)
    assert (found["inside"], found["outside"]) == (1, 0)


def test_a_map_that_is_inverted_shows_both(scene):
    mask, objects = scene
    values = np.where(objects, 0.5, 0.9).astype(np.float32)
    values[mask] = 0.1
    found = image_phenomena(values, mask, objects)
    assert found["opposite"] == found["opposite_regions"] == found["opposite_on_object"] == 1
    assert found["off_object"] == found["off_defect"] == 1
    assert found["off_object_chance"] == 0.5
    assert found["off_defect_chance"] == 1 - 13 / 400


def test_the_on_object_form_sees_through_a_bright_background(scene):
    """The defect is the hottest part of the object, the background hotter still."""
    mask, objects = scene
    values = np.where(objects, 0.2, 0.9).astype(np.float32)
    values[mask] = 0.3
    found = image_phenomena(values, mask, objects)
    assert (found["opposite"], found["opposite_on_object"]) == (1, 0)


def test_regions_are_counted_one_by_one(scene):
    mask, objects = scene
    values = np.full(mask.shape, 0.5, np.float32)
    values[2:5, 2:5], values[10:12, 2:4] = 0.9, 0.1  # larger region right, smaller one wrong
    found = image_phenomena(values, mask, objects)
    assert (found["opposite"], found["opposite_regions"]) == (0, 0.5)


def test_regions_touching_at_a_corner_are_one():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[0, 0] = mask[1, 1] = True
    values = np.zeros(mask.shape, np.float32)
    values[0, 0], values[1, 1] = 1, -0.5  # apart they would be half wrong
    assert image_phenomena(values, mask)["opposite_regions"] == 0


@pytest.mark.parametrize("value", [0, 0.1, 1 / 3, 1e-8, 7e5])
def test_a_constant_map_is_exactly_at_chance(scene, value):
    mask, objects = scene
    found = image_phenomena(np.full(mask.shape, value, np.float32), mask, objects)
    assert found["opposite"] == found["opposite_regions"] == found["opposite_on_object"] == 0.5
    assert found["off_object"] == found["off_object_chance"]
    assert found["off_defect"] == found["off_defect_chance"]


def test_random_maps_are_at_chance_on_average(scene):
    mask, objects = scene
    generator = np.random.default_rng(0)
    found = pd.DataFrame(
        [image_phenomena(generator.random(mask.shape), mask, objects) for _ in range(2000)]
    ).mean()
    assert found["opposite"] == pytest.approx(0.5, abs=0.04)
    assert found["off_object"] == pytest.approx(found["off_object_chance"], abs=0.01)
    assert found["off_defect"] == pytest.approx(found["off_defect_chance"], abs=0.01)


def test_a_tie_counts_half():
    assert [opposite_prediction(*pair) for pair in ((0, 1), (1, 0), (1, 1))] == [1, 0, 0.5]
    assert np.isnan(opposite_prediction(np.nan, 0))


def test_highlights_are_the_hottest_share_of_the_pixels():
    values = np.arange(100.0).reshape(10, 10)
    region = values >= 97
    assert highlight_share(values, region) == 3 / 5
    assert highlight_share(values, region, top=0.02) == 1
    values[values >= 90] = 90  # ten tie for five places, three of them in the region
    assert highlight_share(values, region) == pytest.approx(3 / 10)


def test_what_cannot_be_counted_is_nan(scene):
    mask, objects = scene
    values = np.zeros(mask.shape, np.float32)
    for nothing in (np.zeros_like(mask), np.ones_like(mask)):
        assert np.isnan(list(image_phenomena(values, nothing, objects).values())).all()
    texture = image_phenomena(values, mask, np.ones_like(mask))
    assert np.isnan(texture["off_object"])
    assert not np.isnan(texture["opposite_on_object"])
    unknown = image_phenomena(values, mask)
    assert np.isnan(unknown["off_object"])
    assert np.isnan(unknown["opposite_on_object"])
    assert not np.isnan(unknown["off_defect"])


def test_each_image_on_its_own_scale_makes_flawless_ones_glow():
    ramp = np.linspace(0, 1, 100, dtype=np.float32).reshape(1, 10, 10)
    maps, flawless = np.concatenate([ramp, ramp]), np.concatenate([0.1 * ramp, 0.2 * ramp])
    found = scale_effect(maps, flawless)
    assert (found["shared"], found["released"], found["auroc"]) == (0, 0.1, 1)


# ------------------------------------------------------------------------------------------------------- rates


@pytest.fixture
def frame():
    values = {"a": [1, 1, 1, 1], "b": [0, 1, 0, 1, np.nan], "c": [np.nan]}
    return pd.DataFrame(
        [{"category": c, "opposite": v} for c, column in values.items() for v in column]
    )


def test_rates_are_means_over_images_then_over_categories(frame):
    table = rates(frame, ["opposite"])["opposite"]
    assert list(table.index) == ["a", "b", "c", "mean"]
    assert table["rate"].tolist()[:2] == [1, 0.5]
    assert np.isnan(table.loc["c", "rate"])
    assert table.loc["mean", "rate"] == 0.75
    assert table["n"].tolist() == [4, 4, 0, 8]


def test_intervals_hold_the_rate_and_are_reproducible(frame):
    table = rates(frame, ["opposite"], seed=3)["opposite"]
    assert table.loc["a", ["low", "high"]].tolist() == [1, 1]
    assert 0 <= table.loc["b", "low"] < 0.5 < table.loc["b", "high"] <= 1
    assert 0.5 <= table.loc["mean", "low"] < 0.75 < table.loc["mean", "high"] <= 1
    pd.testing.assert_frame_equal(
        rates(frame, ["opposite"], seed=3), rates(frame, ["opposite"], seed=3)
    )


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        drawn = pd.DataFrame({"category": "a", "opposite": generator.random(60) < 0.3})
        table = rates(drawn, ["opposite"], n_resamples=300, seed=trial)["opposite"]
        hits += table.loc["a", "low"] <= 0.3 <= table.loc["a", "high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_a_change_is_taken_image_by_image():
    before = pd.DataFrame(
        {"category": "a", **{name: [1.0, 1.0, 0.0] for name in phenomena.PHENOMENA}}
    )
    after = pd.DataFrame(
        {"category": "a", **{name: [0.0, 1.0, 1.0] for name in phenomena.PHENOMENA}}
    )
    assert change(before, after)["opposite"].tolist() == [-1, 0, 1]


# ---------------------------------------------------------------------------------------- models and data sets


@pytest.fixture
def collection(tmp_path):
    """Six images of two categories with made masks, 32 px; the last is normal."""
    from PIL import Image

    generator = np.random.default_rng(0)
    samples = []
    for i in range(6):
        for name in ("image", "mask", "object"):
            pixels = generator.integers(0, 255, (32, 32, 3), np.uint8)
            if name != "image":
                pixels[:] = 0
                pixels[4 : 20 if name == "mask" else 28, 4 : 12 + i] = 255
            Image.fromarray(pixels).save(tmp_path / f"{i}_{name}.png")
        paths = [tmp_path / f"{i}_{name}.png" for name in ("image", "mask", "object")]
        label = int(i < 5)
        samples.append(
            Sample(
                paths[0],
                paths[1] if label else None,
                "nut" if i < 3 else "screw",
                label,
                "dent",
                paths[2],
            )
        )
    return Dataset("made", tmp_path, ("nut", "screw"), tuple(samples))


@pytest.fixture
def text(tiny_backbone):
    return {
        category: Direct(tiny_backbone, rvs="mean").text_vectors(category)
        for category in ("nut", "screw")
    }


def test_ground_truth_takes_the_anomalous_images(collection):
    truth = ground_truth(collection, 32)
    assert len(truth.samples) == 5
    assert truth.masks.shape == truth.objects.shape == (5, 32, 32)
    labels = truth.patches(4)[0].reshape(
        4, 4
    )  # the mask is rows 4-19, columns 4-11 of patches of 8 pixels
    assert labels.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_without_masks_nothing_is_counted(collection):
    normal_only = Dataset("made", collection.root, ("screw",), collection.samples[-1:])
    with pytest.raises(ValueError, match="made has no ground-truth masks"):
        ground_truth(normal_only, 32)


def test_maps_and_masks_have_to_fit(collection):
    truth = ground_truth(collection, 32)
    with pytest.raises(ValueError, match=r"\(5, 32, 32\).*found \(5, 16, 16\)"):
        count_phenomena(np.zeros((5, 16, 16)), truth)


def test_raw_maps_are_the_detectors_without_its_smoothing(collection, tiny_backbone):
    smooth, sharp = (Direct(tiny_backbone, rvs="mean", smoothing=sigma) for sigma in (3, 0))
    samples = list(collection)
    images = torch.stack([tiny_backbone.preprocess(read_image(s.image_path)) for s in samples])
    expected = torch.cat(
        [sharp.predict(images[:3], "nut").maps, sharp.predict(images[3:], "screw").maps]
    )
    np.testing.assert_allclose(raw_maps(smooth, samples, batch_size=2), expected, atol=1e-5)
    assert smooth.smoothing == 3


def test_the_probe_ends_where_the_direct_detector_starts(collection, tiny_backbone, text):
    detector = Direct(tiny_backbone, rvs="mean")
    truth = ground_truth(collection, 32)
    found = probe(
        tiny_backbone, truth.samples, text, truth.patches(4), last_blocks=(1, 2), per_image=3
    )
    assert list(found.cosines) == [
        ("q-k", 1),
        ("q-k", 2),
        ("q-k", 3),
        ("q-k", 4),
        ("v-v", 1),
        ("v-v", 2),
        ("v-v", 4),
    ]
    maps = direct_maps(found.cosines["q-k", 4], 32)
    np.testing.assert_allclose(maps, raw_maps(detector, truth.samples), atol=1e-5)

    pairs = found.picked[:, 0] * 16 + found.picked[:, 1]
    assert len(set(pairs.tolist())) == len(pairs) == 5 * 3 * 2
    assert found.picked[:, 0].tolist() == sorted(found.picked[:, 0].tolist())
    for key, features in found.features.items():
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
        row, (image, patch) = 17, found.picked[17]
        words = text[truth.samples[image].category].numpy()
        np.testing.assert_allclose(
            features[row] @ words, found.cosines[key][image, patch], atol=1e-5
        )


def test_attention_is_a_share_of_what_others_get(collection, tiny_backbone, text):
    truth = ground_truth(collection, 32)
    labels = truth.patches(4)
    attention = probe(tiny_backbone, truth.samples, text, labels).attention
    assert len(attention) == 4 * 5  # blocks x images
    assert attention["layer"].value_counts().tolist() == [5] * 4
    np.testing.assert_allclose(attention["chance"][0], ((labels[0] == 1).sum() - 1) / 15)
    even = phenomena.attention_to_defect(
        (torch.full((1, 17, 17), 1 / 17),) * 2, labels[:1], 1
    ).iloc[0]
    np.testing.assert_allclose([even["q-k"], even["v-v"]], even["chance"], atol=1e-6)
    assert probe(tiny_backbone, truth.samples, text).attention is None


def test_the_gap_is_a_distance_of_means():
    sentences = torch.tensor(
        [[2.0, 0.0], [0.0, 5.0]]
    )  # normalised they have their mean at (1/2, 1/2)
    gap = modality_gap(
        {("q-k", 1): torch.tensor([0.5, 0.5]), ("q-k", 2): torch.tensor([-0.5, 0.5])}, sentences
    )
    np.testing.assert_allclose(gap, [0, 1])


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    labels, groups = np.arange(200) % 2, np.arange(200) // 4
    features = generator.normal(size=(200, 5))
    assert linear_probe_auroc(features, labels, groups) == pytest.approx(0.5, abs=0.12)
    features[:, 2] -= 4 * labels  # whatever the sign
    assert linear_probe_auroc(features, labels, groups) > 0.97
    assert np.isnan(linear_probe_auroc(features, labels, np.zeros(200)))


def test_patch_auroc_leaves_out_mixed_patches():
    cosines = torch.tensor([[[0.0, 0.1], [0.0, 0.5], [0.9, 0.0]]])
    assert patch_auroc(cosines, np.array([[0, 1, -1]])) == 1
    assert patch_auroc(cosines, np.array([[1, 0, -1]])) == 0


def test_exchanged_states_turn_the_rate_around(collection, tiny_backbone, text):
    truth = ground_truth(collection, 32)
    detector = Direct(tiny_backbone, rvs="mean")
    features = detector.features(
        torch.stack([tiny_backbone.preprocess(read_image(s.image_path)) for s in truth.samples])
    )
    exchanged = {category: vectors.flip(-1) for category, vectors in text.items()}
    found = control_rates(detector, features, [text, exchanged], truth)["opposite"]
    assert found[0] + found[1] == pytest.approx(1)
    counted = count_phenomena(raw_maps(detector, truth.samples), truth)
    assert found[0] == pytest.approx(rates(counted).loc["mean", ("opposite", "rate")])


def test_random_states_are_directions():
    vectors = random_states(24, ["nut", "screw"], seed=1)
    assert vectors["nut"] is vectors["screw"]
    np.testing.assert_allclose(vectors["nut"].norm(dim=0), 1, atol=1e-6)
    assert not torch.equal(vectors["nut"], random_states(24, ["nut"], seed=2)["nut"])


def test_a_closed_gap_is_one_mean_for_both(collection, tiny_backbone, text):
    detector = Direct(tiny_backbone)
    features, moved = gap_closed(all_features(detector, collection.samples, batch_size=2), text)
    assert features.tokens[0].shape == (6, 17, 24)
    assert features.tokens[0][:, 1:].mean(dim=(0, 1)).abs().max() < 1e-6
    centre = torch.stack(list(text.values())).mean(dim=(0, 2))
    np.testing.assert_allclose(
        moved["nut"][:, 1], F.normalize(text["nut"][:, 1] - centre, dim=0), atol=1e-5
    )


def test_shuffled_states_are_a_new_deal_of_the_same_sentences(tiny_backbone):
    from clipad.prompts import CLIP_AD

    one, same, other = (
        shuffled_states(tiny_backbone, ["nut"], CLIP_AD, "mean", {}, seed)["nut"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.allclose(one.norm(dim=0), torch.ones(2))
    sentences = F.normalize(
        tiny_backbone.encode_text([s for state in CLIP_AD.sentences("nut") for s in state]), dim=-1
    )
    assert torch.linalg.lstsq(sentences.T, one).residuals.sum() < 1e-6


def test_an_untrained_encoder_leaves_the_trained_one_alone(tiny_backbone):
    before = tiny_backbone.weights_hash
    one, same, other = (
        untrained(tiny_backbone, 7),
        untrained(tiny_backbone, 7),
        untrained(tiny_backbone, 8),
    )
    assert (
        tiny_backbone.weights_hash
        == before
        != one.weights_hash
        == same.weights_hash
        != other.weights_hash
    )
    for name, weight in one.visual.named_parameters():
        if weight.ndim > 1:  # biases and LayerNorm start where they start
            assert not torch.equal(weight, tiny_backbone.visual.get_parameter(name)), name


def test_controls_know_nothing_of_the_labels(collection, tiny_backbone):
    truth = ground_truth(collection, 32)
    drawn = phenomena.controls(Direct(tiny_backbone, rvs="mean"), truth, draws=20, seed=5)
    assert [len(frame) for frame in drawn.values()] == [20, 20, 1]
    for frame in drawn.values():
        assert frame["opposite"].between(0, 1).all()
    assert drawn["random text"]["opposite"].nunique() > 1
    shares = phenomena.reached(drawn, drawn["random text"]["opposite"].max(), "opposite")
    assert shares["random text"] >= 2 / 21
    assert phenomena.reached(drawn, 1.1, "opposite")["random text"] == pytest.approx(1 / 21)


def test_block_attention_has_rows_that_sum_to_one(tiny_backbone):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for matrix in phenomena.block_attention(tiny_backbone, images[0], 3):
        assert matrix.shape == (17, 17)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)


def test_what_patches_know_is_a_table_of_aurocs(collection, tiny_backbone, text):
    truth = ground_truth(collection, 32)
    found, blind = (
        probe(backbone, truth.samples, text, truth.patches(4))
        for backbone in (tiny_backbone, untrained(tiny_backbone, 7))
    )
    np.testing.assert_array_equal(found.picked, blind.picked)
    table = phenomena.what_patches_know(found, blind)
    assert list(table.columns) == ["q-k", "v-v"]
    assert ((table >= 0) & (table <= 1)).all(axis=None)
