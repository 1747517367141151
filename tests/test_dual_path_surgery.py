from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_data import make_folder

import clipad
from clipad.dual_path import attention_weights, embed_patches, staged_features
from clipad.evaluation import read_masks
from clipad.prompts import CLIP_AD
from clipad.studies import dual_path_surgery as study
from clipad.studies.dual_path_surgery import figures
from clipad.studies.opposite_predictions import (
    attention_of,
    attention_on_defect,
    example_of,
    ground_truth,
)
from clipad.studies.opposite_predictions.figures import attention_by_block, attention_of_patch
from clipad.surgery import feature_surgery

ALL, LAST = slice(None), slice(-1, None)


def total(values):
    found = 0
    for value in values:
        found = found + value  # a comment
    return found


def written(visual, images):
    return staged_features(visual, images, as_released=False).surgery


def surgery(features, text):
    return feature_surgery(features, text)[:, 1:, 1]


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data", categories=("bolt", "leather"))


@pytest.fixture
def run(tiny_backbone, data):
    options = {"rvs": "mean", "rvs_options": {}}
    return SimpleNamespace(
        backbone=tiny_backbone, dataset=data, seed=0, prompts=CLIP_AD,
        protocol=SimpleNamespace(**options),
    )  # fmt: skip


@pytest.fixture
def texts(run):
    sdp = clipad.SDP(run.backbone, rvs="mean")
    return {category: sdp.text_vectors(category) for category in run.dataset.categories}


def without_masks(data):
    return replace(data, samples=tuple(replace(s, mask_path=None) for s in data))


def test_one_line_is_changed_and_the_function_stays():
    product = study.with_line(total, "found = found + value", "found = found * value + 1")
    assert product([2, 3]) == 4
    assert total([2, 3]) == 5
    for line in ("found = found - value", "found"):  # not there, and there more than once
        with pytest.raises(ValueError, match="expected once"):
            study.with_line(total, line, "pass")


def test_variants_are_the_detectors_in_the_order_of_the_data(run, texts):
    """Also when categories take turns."""
    order = sorted(run.dataset, key=lambda s: s.image_path.name)
    dataset = replace(run.dataset, samples=tuple(order))
    calls = []

    def path(visual, images):
        calls.append(len(images))
        return written(visual, images)

    tries = {
        "sdp": (path, ALL, surgery, texts),
        "last": (path, LAST, surgery, texts),
        "swapped": (path, ALL, surgery, {c: t.flip(1) for c, t in texts.items()}),
    }
    values, probabilities = study.run_variants(run.backbone, dataset, tries)
    assert sum(calls) == len(dataset)  # once for all three
    sdp = clipad.SDP(run.backbone, rvs="mean", as_released=False)
    last = clipad.SDP(run.backbone, rvs="mean", as_released=False, stages=[4])
    for i in (0, 5, 9):
        image = run.backbone.preprocess(clipad.read_image(order[i].image_path))[None]
        for name, detector in (("sdp", sdp), ("last", last)):
            features = detector.features(image)
            expected = detector.patch_values(features, texts[order[i].category])[0]
            torch.testing.assert_close(values[name][i], expected, atol=1e-5, rtol=1e-4)
        found = sdp.predict(image, order[i].category)
        assert float(probabilities[i]) == pytest.approx(float(found.probabilities), abs=1e-5)
        maps = study.smooth_maps(values["sdp"][[i]], run.backbone.image_size)
        np.testing.assert_allclose(maps, found.maps, atol=1e-5)
    assert not torch.allclose(values["sdp"], values["swapped"])


def test_scores_are_those_of_evaluate_and_paired(run, texts):
    tries = {"as written": (written, ALL, surgery, texts), "last": (written, LAST, surgery, texts)}
    values, probabilities = study.run_variants(run.backbone, run.dataset, tries)
    scores = study.score_variants(run, values, probabilities, resamples=5)
    sdp = clipad.SDP(run.backbone, rvs="mean", as_released=False)
    expected = clipad.evaluate(sdp, run.dataset, progress=False).table
    metrics = ["pixel_pro", "pixel_auroc"]
    np.testing.assert_allclose(scores.table("as written")[metrics], expected[metrics], atol=1e-4)
    assert scores.interval("pixel_pro", "last", minus="last")[1].high == 0


def test_data_without_masks_are_compared_by_images(run, texts):
    run.dataset = without_masks(run.dataset)
    tries = {"as written": (written, ALL, surgery, texts)}
    values, probabilities = study.run_variants(run.backbone, run.dataset, tries)
    scores = study.score_variants(run, values, probabilities, resamples=2)
    assert scores.means()[["image_auroc", "image_ap"]].notna().all(axis=None)
    assert scores.interval("pixel_pro", "as written")[1].verdict() == "not measured"


def test_attention_on_the_defect_by_hand(run):
    for number, sample in enumerate(s for s in run.dataset if s.label == 1):
        mask = np.zeros((40, 48), np.uint8)
        mask[: 5 + 5 * number, :37] = 255  # the first are too small for two patches
        Image.fromarray(mask).save(sample.mask_path)
    visual, size = run.backbone.visual, run.backbone.image_size
    truth = ground_truth(run.dataset, size)
    table = attention_on_defect(run.backbone, truth, (truth.shares(4) > 0.5).astype(int))
    samples = [s for s in run.dataset if s.label == 1]
    coverage = F.adaptive_avg_pool2d(torch.tensor(read_masks(samples, size)).float(), 4).flatten(1)
    seen = table[["category", "image"]].drop_duplicates()
    assert 0 < len(seen) == int(((coverage > 0.5).sum(dim=1) >= 2).sum()) < len(samples)
    row = table[table["block"] == 1].iloc[-1]
    sample = samples[int(row["image"])]
    assert sample.category == row["category"]
    x = visual.ln_pre(
        embed_patches(visual, run.backbone.preprocess(clipad.read_image(sample.image_path))[None])
    )
    with torch.no_grad():
        weights = attention_weights(
            visual.transformer.resblocks[1], visual.transformer.resblocks[0](x)
        )
    inside = torch.nonzero(coverage[int(row["image"])] > 0.5)[:, 0].tolist()
    for kind, w in zip(("q-k", "v-v"), weights, strict=True):
        shares = []
        for patch in inside:
            own = w[0, 1 + patch, 1:].clone()
            own[patch] = 0
            shares.append(float(own[inside].sum() / own.sum()))
        assert row[kind] == pytest.approx(np.mean(shares), rel=1e-4)
    assert row["even"] == pytest.approx((len(inside) - 1) / 15)


def test_controls_know_nothing_and_the_found_row_does(run, texts):
    asked = {"as written": (written, ALL, surgery), "last": (written, LAST, surgery)}
    once, again = (
        study.control_aurocs(run, asked, texts, draws=3, per_category=100) for _ in range(2)
    )
    pd.testing.assert_frame_equal(once, again)
    assert once["control"].value_counts().to_dict() == {
        "shuffled states": 3, "untrained": 3, "found": 1,
    }  # fmt: skip
    sdp = clipad.SDP(run.backbone, rvs="mean", as_released=False)
    expected = clipad.evaluate(sdp, run.dataset, progress=False).table["pixel_auroc"]["mean"]
    assert once.loc[0, "as written"] == pytest.approx(expected, abs=1e-4)
    assert once["last"].nunique() > 3
    figure, caption = figures.chance(once)
    assert f"{100 * expected:.0f}" in caption
    plt.close(figure)


def test_an_example_without_masks(run):
    run.dataset = without_masks(run.dataset)
    example = example_of(run, run.dataset[0])
    values = np.zeros((1, 32, 32), np.float32)
    assert example.auroc(values[0]) is None
    assert example.mask is None
    figure, caption = figures.beside([example], {"a": values})
    assert "AUROC" not in caption
    plt.close(figure)


def test_figures_say_their_numbers(run, texts):
    example = example_of(run, next(s for s in run.dataset if s.label == 1))
    maps = {"Direct": np.random.default_rng(0).random((1, 32, 32)), "it": example.mask[None] * 1.0}
    figure, caption = figures.beside([example], maps)
    assert "it 100" in caption
    weights = attention_of(run.backbone.visual, example, (0, 3))
    assert [len(row) for row in weights[3]] == [17, 17]
    another, _ = attention_of_patch(example, weights)
    truth = ground_truth(run.dataset, 32)
    table = attention_on_defect(run.backbone, truth, truth.patches(4))
    tables = dict.fromkeys(("trained", "untrained"), table)
    by_block, _ = attention_by_block(tables)
    toy, caption = figures.six_tokens(np.eye(6)[:, :2], {"all alike": np.full((6, 6), 1 / 6)})
    assert "all alike 33" in caption
    for drawn in (figure, another, by_block, toy):
        drawn.canvas.draw()
        plt.close(drawn)
