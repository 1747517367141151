"""Both phenomena on maps drawn by hand, where the answer is known, and the network's parts against the detectors."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clipad.datasets import Dataset, Sample, read_image
from clipad.detectors import ClipSurgery, Direct
from clipad.dual_path import project
from clipad.prompts import CLIP_AD
from clipad.studies import opposite_predictions as phenomena
from clipad.studies.common import keep
from clipad.studies.experiments import RESULT_MIME
from clipad.studies.opposite_predictions import (
    attention_on_defect,
    beyond,
    contributions,
    count_phenomena,
    direct_maps,
    encoded,
    ground_truth,
    held_out_scores,
    highlight,
    image_phenomena,
    patch_auroc,
    random_states,
    rates_with,
    read,
    shuffled_states,
    text_scores,
    untrained,
    who_writes_what,
    written_by_block,
)
from clipad.tools.notebooks import find_notebook, read_notebook

SIZE = 20  # 5 % of 20 x 20 pixels are 20
SHARES = ["opposite", "opposite_on_object"]


@pytest.fixture
def scene():
    """The object is the left half, 200 pixels; two defects on it, 3 x 3 and 2 x 2; the rest is background."""
    whole = np.zeros((SIZE, SIZE), bool)
    whole[:, :10] = True
    mask = np.zeros_like(whole)
    mask[2:5, 2:5] = True
    mask[10:12, 2:4] = True
    return mask, whole


def test_a_map_that_is_right_shows_neither_phenomenon(scene):
    found = image_phenomena(scene[0].astype(np.float32), *scene)
    assert found["opposite"] == found["opposite_on_object"] == 0
    # 13 hot pixels on the defect; the 7 missing ones of the 20 are ties, spread over the 387 others, 200 of them off
    # the object.
    assert found["off_object"] == pytest.approx(7 * 200 / 387 / 20)
    assert found["off_defect"] == pytest.approx(7 / 20)
    assert (found["on_defect"], found["elsewhere"], found["on_rest"]) == (1, 0, 0)


def test_a_map_that_is_inverted_shows_both(scene):
    mask, whole = scene
    values = np.where(whole, 0.5, 0.9).astype(np.float32)
    values[mask] = 0.1
    found = image_phenomena(values, mask, whole)
    assert found["opposite"] == found["opposite_on_object"] == 1
    assert found["off_object"] == found["off_defect"] == 1
    assert found["off_object_area"] == 0.5
    assert found["off_defect_area"] == 1 - 13 / 400


@pytest.mark.parametrize(
    ("background", "rest", "defect", "expected"),
    [(0.9, 0.2, 0.3, (1, 0)), (0.0, 0.8, 0.5, (0, 1))],
    ids=["bright background", "dark background"],
)
def test_the_form_on_the_object_sees_through_the_background(
    scene, background, rest, defect, expected
):
    """A bright background looks like an opposite prediction, and a dark one hides one."""
    mask, whole = scene
    values = np.where(whole, rest, background).astype(np.float32)
    values[mask] = defect
    found = image_phenomena(values, mask, whole)
    assert (found["opposite"], found["opposite_on_object"]) == expected


@pytest.mark.parametrize("value", [0, 0.1, 1 / 3, 1e-8, 7e5])
def test_a_constant_map_is_exactly_at_chance(scene, value):
    found = image_phenomena(np.full((SIZE, SIZE), value, np.float32), *scene)
    assert found["opposite"] == found["opposite_on_object"] == 0.5
    assert found["off_object"] == found["off_object_area"]
    assert found["off_defect"] == found["off_defect_area"]


def test_random_maps_are_at_chance_on_average(scene):
    rng = np.random.default_rng(0)
    found = pd.DataFrame([image_phenomena(rng.random((SIZE, SIZE)), *scene) for _ in range(2000)])
    assert found[SHARES].mean().tolist() == pytest.approx([0.5, 0.5], abs=0.04)
    assert found["off_object"].mean() == pytest.approx(0.5, abs=0.01)


def test_highlights_are_the_hottest_share_of_the_pixels():
    values = np.arange(100.0).reshape(10, 10)
    region = values >= 97
    assert highlight(values, region) == 3 / 5
    assert highlight(values, region, top=0.02) == 1
    values[values >= 90] = 90  # ten tie for five places, three of them in the region
    assert highlight(values, region) == pytest.approx(3 / 10)


def test_what_cannot_be_counted_is_nan(scene):
    mask, whole = scene
    values = np.zeros(mask.shape, np.float32)
    for nothing in (np.zeros_like(mask), np.ones_like(mask)):
        assert np.isnan(list(image_phenomena(values, nothing, whole).values())).all()
    texture = image_phenomena(values, mask, np.ones_like(mask))
    assert np.isnan([texture["off_object"], texture["on_background"]]).all()
    assert texture["opposite_on_object"] == 0.5
    unknown = image_phenomena(values, mask)
    assert np.isnan([unknown["off_object"], unknown["opposite_on_object"]]).all()
    assert unknown["off_defect"] > 0


# A data set -----------------------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path):
    """Six images of two categories with made masks, 32 px; the last is normal."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(6):
        for name in ("image", "mask", "object"):
            pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
            if name != "image":
                pixels[:] = 0
                pixels[4 : 20 if name == "mask" else 32, 4 : 12 + i] = 255
            Image.fromarray(pixels).save(tmp_path / f"{i}_{name}.png")
        image, mask, whole = (tmp_path / f"{i}_{name}.png" for name in ("image", "mask", "object"))
        category, defect = ("nut", "dent") if i < 3 else ("screw", "hole")
        sample = Sample(image, mask, category, 1, defect, whole)
        samples.append(sample if i < 5 else Sample(image, None, category, 0, "good", whole))
    return Dataset("made", tmp_path, ("nut", "screw"), tuple(samples))


@pytest.fixture
def truth(collection):
    return ground_truth(collection, 32)


@pytest.fixture
def direct(tiny_backbone):
    return Direct(tiny_backbone, rvs="mean", smoothing=0)


@pytest.fixture
def text(direct):
    return {category: direct.text_vectors(category) for category in ("nut", "screw")}


@pytest.fixture
def images(tiny_backbone, truth):
    return torch.stack([tiny_backbone.preprocess(read_image(s.image_path)) for s in truth.dataset])


def test_ground_truth_takes_the_anomalous_images(truth):
    assert len(truth.dataset) == 5
    assert truth.masks.shape == truth.objects.shape == (5, 32, 32)
    assert truth.categories.tolist() == ["nut"] * 3 + ["screw"] * 2


def test_patches_are_of_the_defect_or_of_the_rest_of_the_object(truth):
    # The mask is rows 4-19 and the object rows 4-31, columns 4-11, of patches of 8 pixels.
    labels = truth.patches(4)[0].reshape(4, 4)
    assert labels.tolist() == [[1, 1, -1, -1], [1, 1, -1, -1], [1, 1, -1, -1], [0, 0, -1, -1]]
    picked = truth.pick(4, per_image=2)
    assert picked.groupby(["image", "label"]).size().max() == 2
    assert not picked.duplicated(["image", "patch"]).any()
    assert (truth.patches(4)[picked["image"], picked["patch"]] == picked["label"]).all()
    pd.testing.assert_frame_equal(picked, truth.pick(4, per_image=2))


def test_without_objects_the_plain_forms_take_their_place(truth):
    assert phenomena.forms(truth)[::2] == ("opposite_on_object", "off_object")
    plain = phenomena.Truth(truth.dataset, truth.masks, None)
    assert phenomena.forms(plain)[::2] == ("opposite", "off_defect")
    assert (plain.patches(4) == 0).sum() > (truth.patches(4) == 0).sum()


def test_without_masks_nothing_is_counted(collection):
    normal_only = Dataset("made", collection.root, ("screw",), collection.samples[-1:])
    with pytest.raises(ValueError, match="made has no ground-truth masks"):
        ground_truth(normal_only, 32)


def test_maps_have_to_be_finite(truth):
    maps = np.zeros((5, 32, 32))
    maps[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        count_phenomena(maps, truth)


# Controls -------------------------------------------------------------------------------------------------------


def test_exchanged_states_turn_the_rate_around(truth, direct, text):
    kept = keep(direct, truth.dataset)
    exchanged = {category: vectors.flip(-1) for category, vectors in text.items()}
    rate, turned = (rates_with(kept, direct, t, truth) for t in (text, exchanged))
    counted = count_phenomena(kept.maps(direct), truth)
    for form in SHARES:
        assert rate[form] + turned[form] == pytest.approx(1)
        assert rate[form] == pytest.approx(counted.groupby("category")[form].mean().mean())


def test_random_states_are_directions():
    vectors = random_states(24, ["nut", "screw"], seed=1)
    assert vectors["nut"] is vectors["screw"]
    np.testing.assert_allclose(vectors["nut"].norm(dim=0), 1, atol=1e-6)
    assert not torch.equal(vectors["nut"], random_states(24, ["nut"], seed=2)["nut"])


def test_shuffled_states_are_a_new_deal_of_the_same_sentences(tiny_backbone):
    sentences = encoded(tiny_backbone, CLIP_AD, ["nut"])
    one, same, other = (shuffled_states(sentences, "mean", {}, k)["nut"] for k in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.allclose(one.norm(dim=0), torch.ones(2))


def test_an_untrained_encoder_leaves_the_trained_one_alone(tiny_backbone):
    before = tiny_backbone.weights_hash
    one, same, other = (untrained(tiny_backbone, k).weights_hash for k in (7, 7, 8))
    assert tiny_backbone.weights_hash == before != one == same != other
    for name, weight in untrained(tiny_backbone, 7).visual.named_parameters():
        if weight.ndim > 1:  # biases and LayerNorm start where they start
            assert not torch.equal(weight, tiny_backbone.visual.get_parameter(name)), name


def test_beyond_a_control_means_beyond_its_draws():
    draws = np.linspace(0.2, 0.8, 101)
    assert beyond(0.75, draws).verdict() == "no significant difference"
    assert beyond(0.85, draws).verdict() == "higher"
    assert beyond(0.1, draws).verdict() == "lower"
    assert beyond(0.85, draws).estimate == pytest.approx(0.35)


# What the patches know ------------------------------------------------------------------------------------------


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels, fold = np.arange(200) % 2, np.arange(200) // 4 % 5
    features = rng.normal(size=(200, 5))

    def auroc(scores):
        return (scores[labels == 1][:, None] > scores[labels == 0]).mean()

    assert auroc(held_out_scores(features, labels, fold)) == pytest.approx(0.5, abs=0.12)
    features[:, 2] -= 4 * labels  # whatever the sign
    assert auroc(held_out_scores(features, labels, fold)) > 0.97
    assert np.isnan(held_out_scores(features, labels, np.zeros(200))).all()


def test_a_hold_out_keeps_away_everything_alike():
    """A feature that marks the label only within a category is no use for other categories, nor for other pairs."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    category, defect = np.arange(400) % 2, np.arange(400) // 2 % 2
    features = rng.normal(size=(400, 3))
    features[:, 0] += (
        6 * labels * np.where(category == 0, 1, -1)
    )  # the other category says the opposite
    scores = held_out_scores(features, labels, category, defect)
    assert scores[labels == 1].mean() < scores[labels == 0].mean()
    features[:, 1] += 6 * labels * np.where(category == defect, 1, -1)
    # Held out: category and defect; what is left differs in both, so the second feature keeps its sign.
    features[:, 0] = 0
    scores = held_out_scores(features, labels, category, defect)
    assert scores[labels == 1].mean() > scores[labels == 0].mean()


def test_patch_auroc_is_taken_inside_each_image(truth):
    picked = pd.DataFrame({"image": [0, 0, 0, 1, 1, 2], "label": [1, 0, 0, 1, 0, 1]})
    scores = np.array([0.5, 0.1, 0.5, 90.0, 91.0, 7.0])  # the images' offsets do not matter
    found = patch_auroc(scores, picked, truth)
    np.testing.assert_equal(found["patch AUROC"].to_numpy(), [0.75, 0, np.nan, np.nan, np.nan])
    assert found["category"].tolist() == truth.categories.tolist()


# The parts of the network ---------------------------------------------------------------------------------------


def test_the_parts_add_up_to_the_network(tiny_backbone, direct, images):
    start, attention, feed_forward, surgery, _ = written_by_block(tiny_backbone.visual, images)
    tokens = project(tiny_backbone.visual, start + attention.sum(0) + feed_forward.sum(0))
    torch.testing.assert_close(tokens, direct.features(images).tokens[0], atol=1e-4, rtol=1e-4)
    half = ClipSurgery(tiny_backbone, rvs="mean").features(images).tokens[0]
    last_half = project(tiny_backbone.visual, surgery[-2:].sum(0))
    torch.testing.assert_close(last_half[:, 1:], half[:, 1:], atol=1e-4, rtol=1e-4)


def test_contributions_make_up_the_difference_of_the_cosines(tiny_backbone, images, text):
    visual = tiny_backbone.visual
    with torch.no_grad():
        visual.ln_post.bias.normal_()
        start, attention, feed_forward, *_ = written_by_block(visual, images)
        x = start + attention.sum(0) + feed_forward.sum(0)
        parts = torch.cat([start[None], attention, feed_forward])
        difference = text["nut"][:, 1] - text["nut"][:, 0]
        projected = project(visual, x)
        bias = visual.ln_post.bias @ visual.proj @ difference / projected.norm(dim=-1)
        found = contributions(visual, parts, x, text["nut"]).sum(0) + bias
        expected = projected @ difference / projected.norm(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_reading_all_parts_is_the_direct_map(tiny_backbone, truth, direct, text):
    picked = truth.pick(4, per_image=3)

    def variants(x0, a, m, s, o):
        return {"all": x0 + a.sum(0) + m.sum(0), "v-v": s.sum(0)}

    cosines, features = read(tiny_backbone, truth, text, variants, picked)
    maps = keep(direct, truth.dataset).maps(direct)
    np.testing.assert_allclose(direct_maps(cosines["all"], 32), maps, atol=1e-4)
    at = picked["image"].tolist(), picked["patch"].tolist()
    for name, values in features.items():
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
        z = cosines[name][at].numpy()
        np.testing.assert_allclose(text_scores(values, text, picked), z[:, 1] - z[:, 0], atol=1e-5)
    assert read(tiny_backbone, truth, text, variants)[1] == {}


def test_who_writes_what_is_a_row_per_image_part_and_block(tiny_backbone, truth, text, images):
    labels = truth.patches(4)
    labels[1] = -1  # no patches to compare in this image
    found = who_writes_what(tiny_backbone, truth, text, labels)
    assert len(found) == 5 * 3 * 4
    assert found.groupby("category")["patches"].apply(lambda p: p.isna().sum()).tolist() == [12, 0]
    start, a, m, *_ = written_by_block(tiny_backbone.visual, images[:1])
    x = start + a.sum(0) + m.sum(0)
    expected = contributions(tiny_backbone.visual, a, x, text["nut"])[:, 0]
    own = found[(found["part"] == "q-k attention")][:4]  # the first image's four blocks
    np.testing.assert_allclose(own["class token"], expected[:, 0].detach(), atol=1e-5)
    label = labels[0]
    gain = expected[:, 1:][:, label == 1].mean(1) - expected[:, 1:][:, label == 0].mean(1)
    np.testing.assert_allclose(own["patches"], gain.detach(), atol=1e-5)


def test_attention_is_a_share_of_what_other_patches_get(tiny_backbone, truth, monkeypatch):
    labels = truth.patches(4)
    found = attention_on_defect(tiny_backbone, truth, labels)
    assert found.groupby("block").size().tolist() == [5] * 4
    assert found["even"][0] == ((labels[0] == 1).sum() - 1) / 15

    def even(block, x):
        return (torch.full((len(x), 17, 17), 1 / 17),) * 2

    monkeypatch.setattr(phenomena, "attention_weights", even)
    found = attention_on_defect(tiny_backbone, truth, labels)
    np.testing.assert_allclose(found["q-k"], found["even"], atol=1e-6)


# The notebook ---------------------------------------------------------------------------------------------------


def test_the_recap_says_what_the_stored_run_found():
    notebook = read_notebook(find_notebook("02"))
    record = notebook.cells[-1].outputs[0]["data"][RESULT_MIME]["results"]

    def numbers(value):
        if isinstance(value, dict):
            return [n for v in value.values() for n in numbers(v)]
        if isinstance(value, list):
            return [n for v in value for n in numbers(v)]
        return [value] if isinstance(value, float) else []

    found = {f"{100 * n:.0f}" for n in numbers(record)}
    (recap,) = (c.source.split("## Recap")[1] for c in notebook.cells if "## Recap" in c.source)
    stated = re.findall(r"(\d+) %|\[(\d+), (\d+)\]|(?:objects|textures) (\d+)", recap)
    stated = [n for match in stated for n in match if n]
    assert len(stated) > 15
    assert set(stated) <= found
