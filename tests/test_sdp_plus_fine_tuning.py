from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from small_data import TRAINING, make_collection

from clipad.detectors import SDP, SDPPlus
from clipad.linear_layers import LinearLayers
from clipad.metrics import pixel_metrics
from clipad.prompts import CLIP_AD
from clipad.published import protocol
from clipad.studies import common
from clipad.studies import sdp_plus_fine_tuning as study
from clipad.training import load_layers, train


@pytest.fixture
def dataset(tmp_path):
    return make_collection(tmp_path / "data", per_kind=4)


@pytest.fixture
def layers():
    return LinearLayers(32, 24, 4, seed=3)


@pytest.fixture
def kept(tiny_backbone, dataset, layers):
    return common.keep(SDPPlus(tiny_backbone, layers, rvs="mean"), dataset, batch_size=3)


@pytest.fixture
def run(tiny_backbone, dataset, tmp_path):
    rule = protocol("mvtec")
    return SimpleNamespace(
        backbone=tiny_backbone, prompts=CLIP_AD, output_dir=tmp_path / "out", seed=3, protocol=rule,
        dataset=dataset, rvs={"prompts": CLIP_AD, "rvs": rule.rvs, "rvs_options": rule.rvs_options},
    )  # fmt: skip


def test_logit_fusion_is_the_mean_logit_plus_sdp_at_its_scale(tiny_backbone, kept, layers):
    detector = study.LogitFusion(tiny_backbone, layers, rvs="mean", smoothing=0)
    features, text = kept.features[:2], detector.text_vectors("bolt")
    unit = [torch.nn.functional.normalize(fc(x[:, 1:]), dim=-1)
            for fc, x in zip(layers.fc, features.ordinary, strict=True)]  # fmt: skip
    logits = sum(100 * (f @ text[:, 1] - f @ text[:, 0]) for f in unit) / 4
    sdp = SDP(tiny_backbone, rvs="mean").patch_values(features, text)
    # The first pixel of the corner patch is not blended with any other.
    found = detector.score_with(features, text).maps[:, 0, 0]
    torch.testing.assert_close(found, (logits + 25 * sdp)[:, 0].detach(), atol=1e-3, rtol=0)


def test_the_summands_add_up_to_sdp_plus(tiny_backbone, kept, layers):
    detector = SDPPlus(tiny_backbone, layers, rvs="mean")
    parts = study.summands(detector, kept)
    raw = SDPPlus(tiny_backbone, layers, rvs="mean", smoothing=0)
    np.testing.assert_allclose(parts.sdp + parts.layers, kept.maps(raw), atol=1e-5)
    curve = parts.weighted([0, 1]).set_index("weight")
    for weight, other in ((0, study.LayersAlone(tiny_backbone, layers, rvs="mean")), (1, detector)):
        expected = study.mean_metrics(other, kept)["pixel_auroc"]
        assert curve.loc[weight, "pixel_auroc"] == pytest.approx(expected, abs=1e-4)
    whole = pixel_metrics(parts.sdp + parts.layers, kept.masks)["auroc"]
    assert parts.table().loc["sum", "AUROC, all"] == pytest.approx(whole)


def test_training_aligns_the_difference_of_patches_with_that_of_the_texts(
    tiny_backbone, kept, tmp_path
):
    other = make_collection(tmp_path / "other", categories=("gear",), per_kind=4)
    layers = train(tiny_backbone, other, epochs=30, **TRAINING).layers
    detector = SDPPlus(tiny_backbone, layers, rvs="mean")
    margins, numbers = study.joint_space(detector, kept, stage=0, per_image=4)
    aurocs = numbers["auroc"]
    assert aurocs["trained layer"] > max(0.85, aurocs["untrained layer"])
    assert set(margins["label"]) == {0, 1}
    assert list(margins.columns) == ["label", *numbers.index]


def test_without_masks_images_are_still_scored(tiny_backbone, kept, layers):
    blind = common.Kept(kept.dataset, None, kept.reads, kept.features)
    detector = SDPPlus(tiny_backbone, layers, rvs="mean")
    found = study.mean_metrics(detector, blind)
    assert np.isnan(found["pixel_auroc"])
    assert 0 <= found["image_auroc"] <= 1


def test_without_training_data_there_are_no_layers_and_a_checkpoint_wins(run, layers, tmp_path):
    assert study.training_set(run) is None
    assert study.layers_for(run) is None
    trained = study.train_for(run, run.dataset, 1)
    assert study.layers_for(run, trained.checkpoints[-1]).hash == trained.layers.hash


def test_the_demo_model_learns_from_the_other_collection(run):
    run.backbone.name = "demo"
    assert study.training_set(run).name == "demo_aux"
    run.dataset = SimpleNamespace(name="demo_aux")
    assert study.training_set(run).name == "demo"


def test_trainings_are_kept_by_all_that_decides_them(run):
    first = study.train_for(run, run.dataset, 2)
    again = study.train_for(run, run.dataset, 3)  # an epoch more of the same training
    assert load_layers(again.checkpoints[1]).hash == first.layers.hash
    other = study.train_for(run, run.dataset, 2, seed=4)
    assert other.layers.hash != first.layers.hash


def test_rows_per_training(run, kept, tmp_path):
    other = make_collection(tmp_path / "other", categories=("gear", "nut"), per_kind=4)
    two = study.over_trainings(run, other, kept, [0, 1], epochs=1)
    assert list(two["order"]) == ["as released"] * 2 + ["shuffled"] * 2
    images = study.over_images(run, other, kept, [0], 1)
    assert images["images"].is_monotonic_increasing
    trained = study.train_for(run, other, 2)
    by_epoch = study.over_epochs(run, [trained], kept)
    assert list(by_epoch["epoch"]) == [1, 2]
    last = study.mean_metrics(study.build(run, trained.layers), kept)
    pd.testing.assert_series_equal(
        by_epoch.iloc[-1][list(common.METRICS)].astype(float), pd.Series(last), check_names=False
    )
