from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_data import TRAINING, make_collection

from clipad.datasets import load_dataset
from clipad.detectors import SDP, ClipSurgery, Direct, SDPPlus
from clipad.evaluation import evaluate
from clipad.linear_layers import LinearLayers
from clipad.metrics import pixel_metrics
from clipad.prompts import CLIP_AD
from clipad.studies import sdp_plus_fine_tuning as transfer
from clipad.studies.sdp_plus_fine_tuning import (
    Direction,
    Held,
    LayersAlone,
    LogitFusion,
    by_defect,
    compare,
    hold,
    joint_space,
    layers_for,
    mean_metrics,
    summands,
    thinned,
    train_for,
)
from clipad.training import load_layers, train


@pytest.fixture
def dataset(tmp_path):
    return make_collection(tmp_path / "data", per_kind=4)


@pytest.fixture
def layers():
    return LinearLayers(32, 24, 4, seed=3)


@pytest.fixture
def held(tiny_backbone, dataset) -> Held:
    return hold(SDP(tiny_backbone, rvs="mean"), dataset, batch_size=3)


@pytest.mark.parametrize("kind", [Direct, SDP, SDPPlus, LayersAlone, LogitFusion])
def test_held_features_give_the_maps_and_metrics_of_evaluate(
    kind, tiny_backbone, dataset, held, layers
):
    extra = [layers] if issubclass(kind, SDPPlus) else []
    detector = kind(tiny_backbone, *extra, rvs="mean")
    expected = evaluate(detector, dataset, progress=False)
    found = compare([detector], held, n_resamples=2).table(detector.name)
    for metric in ("pixel_auroc", "pixel_pro", "image_auroc"):
        np.testing.assert_allclose(found[metric], expected.table[metric], atol=1e-4)
        assert mean_metrics(detector, held)[metric] == pytest.approx(
            found.loc["mean", metric], abs=1e-6
        )
    np.testing.assert_allclose(
        held.maps(detector).max(axis=(1, 2)), expected.images["map_max"], atol=1e-4
    )


def test_features_of_another_detector_are_not_taken_for_its_own(tiny_backbone, held):
    with pytest.raises(TypeError, match="CLIP Surgery"):
        held.score(ClipSurgery(tiny_backbone, rvs="mean"), "bolt")


def test_thinning_keeps_both_labels_of_each_category(dataset):
    for count in (2, 3, 5, 8, 99):
        few = thinned(dataset, count)
        assert len(few) == 2 * min(count, 8)
        for category in few.categories:
            labels = [s.label for s in few if s.category == category]
            assert abs(sum(labels) - len(labels) / 2) <= 0.5
    assert thinned(dataset, 99).samples == dataset.samples


def test_a_detector_differs_from_itself_by_nothing_and_from_another_as_the_tables_say(
    tiny_backbone, held, layers
):
    sdp, plus = SDP(tiny_backbone, rvs="mean"), SDPPlus(tiny_backbone, layers, rvs="mean")
    found = compare([sdp, plus], held, n_resamples=20)
    same = found.difference("SDP", "SDP")
    assert (same[["difference", "low", "high", "low_both", "high_both"]] == 0).all(axis=None)
    table = found.difference("SDP+", "SDP")
    expected = found.table("SDP+").loc["mean"] - found.table("SDP").loc["mean"]
    np.testing.assert_allclose(table["difference"], expected[table.index])
    assert (table["low"] <= table["high"]).all()
    np.testing.assert_allclose(found.difference("SDP", "SDP+")["difference"], -table["difference"])
    with pytest.raises(ValueError, match="2 resamples or more, found 1"):
        compare([sdp], held, n_resamples=1)


def test_logit_fusion_is_the_mean_logit_plus_sdp_at_its_scale(tiny_backbone, held, layers):
    detector = LogitFusion(tiny_backbone, layers, rvs="mean", smoothing=0)
    features, text = held.features[:2], detector.text_vectors("bolt")
    unit = [torch.nn.functional.normalize(fc(x[:, 1:]), dim=-1)
            for fc, x in zip(layers.fc, features.ordinary, strict=True)]  # fmt: skip
    logits = sum(100 * (f @ text[:, 1] - f @ text[:, 0]) for f in unit) / 4
    sdp = SDP(tiny_backbone, rvs="mean").patch_values(features, text)
    # The first pixel of the corner patch is not blended with any other.
    torch.testing.assert_close(
        detector.score_with(features, text).maps[:, 0, 0],
        (logits + 25 * sdp)[:, 0].detach(),
        atol=1e-3,
        rtol=0,
    )


def test_the_summands_add_up_to_sdp_plus(tiny_backbone, held, layers):
    detector = SDPPlus(tiny_backbone, layers, rvs="mean")
    parts = summands(detector, held)
    raw = SDPPlus(tiny_backbone, layers, rvs="mean", smoothing=0)
    np.testing.assert_allclose(parts.sdp + parts.layers, held.maps(raw), atol=1e-5)
    curve = parts.weighted([0, 1, np.inf]).set_index("weight")
    alone, sdp = LayersAlone(tiny_backbone, layers, rvs="mean"), SDP(tiny_backbone, rvs="mean")
    for weight, other in ((0, alone), (1, detector), (np.inf, sdp)):
        assert curve.loc[weight, "pixel_auroc"] == pytest.approx(
            mean_metrics(other, held)["pixel_auroc"], abs=1e-4
        )
    assert parts.table().loc["sum", "AUROC, all"] == pytest.approx(
        pixel_metrics(parts.sdp + parts.layers, held.masks)["auroc"]
    )
    assert "of all pixels" in parts.in_words()
    nowhere = replace(parts, layers=parts.layers + 1).in_words()
    assert nowhere == "the layers are silent in 0% of all pixels and in 0% of the defects'"


def test_training_aligns_the_difference_of_patches_with_that_of_the_texts(
    tiny_backbone, held, tmp_path
):
    other = make_collection(tmp_path / "other", categories=("gear",), per_kind=4)
    layers = train(tiny_backbone, other, epochs=30, **TRAINING).layers
    space = joint_space(SDPPlus(tiny_backbone, layers, rvs="mean"), held, stage=0, per_image=4)
    numbers = space.numbers()
    assert numbers.loc["trained layer", "auroc"] > numbers.loc["untrained layer", "auroc"]
    assert numbers.loc["trained layer", "auroc"] > 0.85
    for name, patches in space.patches.items():
        torch.testing.assert_close(patches.norm(dim=-1), torch.ones(len(patches)))
        plane = space.in_text_plane(name)
        assert (np.linalg.norm(plane, axis=1) <= 1 + 1e-5).all()
        # The first coordinate has the sign of the difference of the cosines.
        text = torch.stack([space.text[c] for c in space.categories])
        cosines = torch.einsum("pc,pcs->ps", patches, text)
        np.testing.assert_array_equal(plane[:, 0] > 0, (cosines[:, 1] > cosines[:, 0]).numpy())


def test_defects_are_ranked_by_the_last_method(held):
    truth = held.masks.astype(np.float32)
    table = by_defect({"wrong": -truth, "right": truth}, held)
    assert table.loc["square"].tolist() == [0, 1, 8]


def test_without_masks_pixels_are_refused_and_images_still_scored(tiny_backbone, held, layers):
    blind = Held(held.dataset, held.features, None, held.labels)
    detector = SDPPlus(tiny_backbone, layers, rvs="mean")
    for function in (lambda: joint_space(detector, blind, 0), lambda: summands(detector, blind)):
        with pytest.raises(ValueError, match="has no masks"):
            function()
    table = compare([detector], blind, n_resamples=2).difference("SDP+", "SDP+")
    assert list(table.index) == ["image_auroc", "image_f1_max", "image_ap"]


def test_a_direction_takes_the_settings_of_the_data_set_that_is_tested(
    tiny_backbone, tmp_path, layers
):
    from types import SimpleNamespace

    run = SimpleNamespace(backbone=tiny_backbone, prompts=None)
    make_collection(tmp_path / "demo", per_kind=1)
    direction = Direction(
        run, load_dataset("folder", tmp_path / "demo"), "elsewhere", per_category=1
    )
    assert str(direction) == "elsewhere → folder"
    assert len(direction.few) == 2
    plus, alone = direction.build(layers, smoothing=0)
    assert (plus.rvs_options, plus.smoothing, alone.name) == (
        {"eps": 0.5, "min_samples": 15},
        0,
        "layers alone",
    )
    table, changed = direction.phenomena(layers)
    assert list(table.index) == ["Direct", "SDP", "SDP+", "layers alone"]
    expected = table.loc["SDP+", "opposite"] - table.loc["SDP", "opposite"]
    assert changed.loc["opposite", "difference"] == pytest.approx(expected)


def test_layers_come_from_the_protocols_other_data_set_and_are_those_of_notebook_04(
    tiny_backbone, dataset, tmp_path, monkeypatch
):
    run = SimpleNamespace(
        backbone=tiny_backbone, prompts=CLIP_AD, output_dir=tmp_path / "out", seed=3
    )
    assert layers_for(run, "mvtec") is None
    asked = []
    monkeypatch.setattr(
        transfer, "load_dataset", lambda name, root: asked.append((name, root)) or dataset
    )
    found = layers_for(run, "mvtec", train_root="data/visa")
    assert asked == [("visa", "data/visa")]
    # As notebook 04 trains, with an epoch more
    again = train_for(run, dataset, 6, False, learning_rate=1e-4, shuffle=False, seed=3)
    assert load_layers(again.checkpoints[4]).hash == found.hash
    assert len(list((tmp_path / "out" / "training").iterdir())) == 1
