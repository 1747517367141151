import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import tiny_clip
from PIL import Image

import clipad
from clipad.backbone import Backbone
from clipad.dual_path import staged_features
from clipad.studies.dual_path_surgery import (
    COLUMNS,
    Variant,
    ablate,
    attention_of,
    attention_reach,
    chosen_by_rule,
    patch_values,
    stage_shift,
    variant_values,
    variants,
)
from clipad.studies.dual_path_surgery.figures import in_words

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("layers", [4, 12, 24])
def test_variants_differ_and_end_with_sdp(layers):
    found = variants(layers)
    assert (
        len({v.name for v in found})
        == len(found)
        == len({tuple(vars(v).values())[2:] for v in found})
    )
    assert found[-1].blocks == (layers // 4, layers // 2, 3 * layers // 4, layers)
    assert max(block for v in found for block in v.blocks) == layers


@pytest.fixture
def backbone():
    return Backbone(
        tiny_clip(layers=8), open_clip.SimpleTokenizer(context_length=32), name="tiny", pretrained="random",
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip


def test_variants_equal_the_detectors(backbone):
    images, text = (
        torch.randn(3, 3, 32, 32),
        torch.nn.functional.normalize(torch.randn(24, 2), dim=0),
    )
    values, probabilities = variant_values(backbone, images, text, variants(8))
    for name, detector in (
        ("Direct", clipad.Direct(backbone)),
        ("last 4", clipad.ClipSurgery(backbone)),
        ("SDP", clipad.SDP(backbone)),
        ("as written", clipad.SDP(backbone, as_released=False)),
    ):
        features = detector.features(images)
        torch.testing.assert_close(
            values[name], detector.patch_values(features, text), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(probabilities, detector.score_with(features, text).probabilities)


def test_the_last_quarter_on_one_path_is_the_last_stage(backbone):
    images, text = (
        torch.randn(2, 3, 32, 32),
        torch.nn.functional.normalize(torch.randn(24, 2), dim=0),
    )
    one_path = Variant("one path", "", (8,), first_block=6, restart=False)
    values, _ = variant_values(backbone, images, text, (*variants(8), one_path))
    torch.testing.assert_close(values["one path"], values["last 2 = stage 4"], atol=1e-6, rtol=1e-5)


def test_feature_surgery_with_equal_weights_is_the_difference():
    """A class token that sees both states alike has weights of 1."""
    tokens = torch.randn(2, 5, 8)
    tokens[:, 0] = 0
    text = torch.nn.functional.normalize(torch.randn(8, 2), dim=0)
    torch.testing.assert_close(
        patch_values([tokens], text, "surgery"), patch_values([tokens], text, "difference")
    )


def test_published_stages_move_in_the_class_token_only(backbone):
    images = torch.randn(2, 3, 32, 32)
    released, written = (
        staged_features(backbone.visual, images, as_released=flag) for flag in (True, False)
    )
    table = stage_shift(released, written)
    assert (table["patch tokens, surgery path"] == 0).all()
    assert (table["class token"].iloc[:-1] > 0.001).all()
    assert (table.iloc[-1] == 0).all()


@pytest.fixture
def dataset(tmp_path):
    """Two categories in MVTec's layout, with masks."""
    for category in ("nut", "wood"):
        for defect, count in (("good", 4), ("spot", 5)):
            (tmp_path / category / "test" / defect).mkdir(parents=True)
            (tmp_path / category / "ground_truth" / defect).mkdir(parents=True)
            for i in range(count):
                pixels = RNG.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                mask = np.zeros((32, 32), np.uint8)
                if defect == "spot":
                    mask[8 : 14 + i, 10:20] = 255
                    pixels[mask > 0] //= 4
                    Image.fromarray(mask).save(
                        tmp_path / category / "ground_truth" / defect / f"{i}_mask.png"
                    )
                Image.fromarray(pixels).save(tmp_path / category / "test" / defect / f"{i}.png")
    return clipad.load_dataset("folder", tmp_path)


def test_the_table_is_that_of_evaluate(backbone, dataset):
    sdp = clipad.SDP(backbone, rvs="mean")
    found = ablate(sdp, dataset, n_resamples=5)
    expected = clipad.evaluate(sdp, dataset, progress=False).table
    columns = [c for c in COLUMNS if not c.startswith("map_")]
    np.testing.assert_allclose(found.table("SDP")[columns], expected[columns], atol=1e-6)
    assert list(found.table("SDP").index) == list(expected.index)
    image = backbone.preprocess(clipad.read_image(dataset[7].image_path))[None]
    np.testing.assert_allclose(
        found.maps("SDP", [7]), sdp.predict(image, dataset[7].category).maps, atol=1e-6
    )


def test_intervals_are_paired_and_hold_the_estimate(backbone, dataset):
    found = ablate(clipad.SDP(backbone, rvs="mean"), dataset, n_resamples=100)
    table = found.intervals("pixel_auroc")
    assert (table.loc["SDP"].filter(like="difference") == 0).all()
    assert (table["difference"] + table.loc["SDP", "mean"]).to_numpy() == pytest.approx(
        table["mean"]
    )
    inside = (table["mean_low_images"] <= table["mean"]) & (
        table["mean"] <= table["mean_high_images"]
    )
    assert inside.mean() > 0.7
    # What both maps share cancels in a paired difference: it is known better than either mean.
    row = table.loc["as written"]
    assert (
        row["difference_high_both"] - row["difference_low_both"]
        < row["mean_high_both"] - row["mean_low_both"]
    )


def test_data_without_masks_have_image_metrics_only(backbone, dataset):
    samples = tuple(
        clipad.Sample(s.image_path, None, s.category, s.label, s.defect) for s in dataset
    )
    plain = clipad.Dataset("folder", dataset.root, dataset.categories, samples)
    means = ablate(clipad.SDP(backbone, rvs="mean"), plain, n_resamples=2).means()
    assert means.filter(like="pixel_").isna().all(axis=None)
    assert means.filter(like="image_").notna().all(axis=None)


def test_too_few_resamples_are_refused(backbone, dataset):
    with pytest.raises(ValueError, match="2 resamples or more, found 18 and 1"):
        ablate(clipad.SDP(backbone), dataset, n_resamples=1)


def test_images_are_chosen_by_rule(dataset):
    maps = np.zeros((len(dataset), 32, 32), np.float32)
    for i, sample in enumerate(dataset):
        if sample.mask_path:
            # The higher i, the more of the defect is found.
            maps[i] = clipad.read_mask(sample.mask_path, 32) * (
                np.arange(32)[:, None] < 8 + i % 5 * 2
            )
        else:
            maps[i, 0, 0] = i
    chosen = chosen_by_rule(dataset, maps)
    kinds = [dataset[i].label for i in chosen]
    assert kinds == [1, 1, 1, 0, 0, 0]
    aurocs = [
        clipad.pixel_metrics(maps[[i]], clipad.read_mask(dataset[i].mask_path, 32)[None])["auroc"]
        for i in chosen[:3]
    ]
    assert aurocs == sorted(aurocs)
    assert aurocs[0] < aurocs[2]
    peaks = [maps[i].max() for i in chosen[3:]]
    assert peaks == sorted(peaks, reverse=True)


def test_attention_reach_by_hand(backbone, dataset):
    """One image, one block: the weights on the other patches of the defect, averaged by the definition."""
    one = clipad.Dataset(
        "folder", dataset.root, ("nut",), tuple(s for s in dataset if s.mask_path)[:1]
    )
    coverage = torch.zeros(1, 16)
    coverage[0, [5, 6]] = 1
    table = attention_reach(backbone, one, coverage)
    assert list(table.index) == list(range(1, 9))
    image = backbone.preprocess(clipad.read_image(one[0].image_path))[None]
    for kind, place in (("q-k", 0), ("v-v", 1)):
        lifts = []
        for patch, other in ((5, 6), (6, 5)):
            row = attention_of(backbone.visual, image, patch, [3])[3][place][1:]
            lifts.append(row[other] / np.delete(row, patch).sum() * 15)
        assert table.loc[3, (kind, "lift")] == pytest.approx(
            min(lifts), rel=1e-4
        )  # torch's median of two
        assert 1 <= table.loc[3, (kind, "spread")] <= 15


def test_contrast_is_inside_minus_outside(backbone, dataset):
    study = ablate(clipad.SDP(backbone, rvs="mean"), dataset, n_resamples=2)
    contrast = study.contrast("SDP")
    normal = torch.tensor([s.label == 0 for s in dataset])
    assert contrast[normal].isnan().all()
    assert study.contrast(study.coverage)[~normal].gt(0).all()
    i = int(torch.nonzero(~normal)[0])
    values, cover = study.values["SDP"][i].double(), study.coverage[i].double()
    expected = (
        np.average(values, weights=cover) - np.average(values, weights=1 - cover)
    ) / values.std()
    assert float(contrast[i]) == pytest.approx(float(expected), rel=1e-4)


def test_words_follow_the_interval():
    columns = ["difference", "difference_low_both", "difference_high_both"]
    rows = {"a": [0.02, 0.01, 0.03], "b": [-0.02, -0.03, -0.001], "c": [0.02, -0.01, 0.03]}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    lines = in_words({"pixel_pro": table}, list(rows)).splitlines()
    assert lines[0] == "* **a** against SDP: PRO +2.0 [+1.0, +3.0] higher"
    assert lines[1].endswith("[-3.0, -0.1] lower")
    assert lines[2].endswith("not told apart")
