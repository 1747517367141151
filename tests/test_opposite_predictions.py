"""Both phenomena on maps drawn by hand, where the answer is known, and the network's parts against the detectors."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clipad.datasets import Dataset, Sample
from clipad.detectors import Direct
from clipad.studies import opposite_predictions as phenomena
from clipad.studies.experiments import RESULT_MIME
from clipad.studies.opposite_predictions import (
    count_phenomena,
    ground_truth,
    highlight,
    image_phenomena,
    pick,
    shuffled_states,
    untrained,
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


def test_ground_truth_takes_the_anomalous_images(truth):
    assert len(truth.dataset) == 5
    assert truth.masks.shape == truth.objects.shape == (5, 32, 32)
    assert truth.categories.tolist() == ["nut"] * 3 + ["screw"] * 2


def test_patches_are_of_the_defect_or_of_the_rest_of_the_object(truth):
    # The mask is rows 4-19 and the object rows 4-31, columns 4-11, of patches of 8 pixels.
    labels = truth.patches(4)[0].reshape(4, 4)
    assert labels.tolist() == [[1, 1, -1, -1], [1, 1, -1, -1], [1, 1, -1, -1], [0, 0, -1, -1]]
    picked = pick(truth.patches(4), per_image=2)
    assert picked.groupby(["image", "label"]).size().max() == 2
    assert not picked.duplicated(["image", "patch"]).any()
    assert (truth.patches(4)[picked["image"], picked["patch"]] == picked["label"]).all()
    pd.testing.assert_frame_equal(picked, pick(truth.patches(4), per_image=2))


def test_without_objects_every_patch_off_the_defect_is_normal(truth):
    plain = phenomena.Truth(truth.dataset, truth.masks, None)
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


def test_shuffled_states_are_a_new_deal_of_the_same_sentences(tiny_backbone):
    dealt = shuffled_states(Direct(tiny_backbone, rvs="mean"), ["nut"], (0, 0, 1))
    one, same, other = (vectors["nut"] for vectors in dealt)
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
