import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from small_data import make_folder

from clipad.detectors import SDP, Direct
from clipad.evaluation import evaluate
from clipad.metrics import pixel_metrics
from clipad.studies.benchmark import (
    RATES,
    benchmark,
    beside_published,
    costs,
    curves_of,
    in_words,
    typical,
)
from clipad.winclip import WinCLIP


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data")


@pytest.fixture
def detectors(tiny_backbone):
    return [
        Direct(tiny_backbone, rvs="mean"),
        WinCLIP(tiny_backbone),
        SDP(tiny_backbone, rvs="mean"),
    ]


@pytest.fixture
def result(detectors, data):
    return benchmark(detectors, data, n_resamples=10, progress=False)


def test_the_numbers_are_those_of_evaluate(result, detectors, data):
    for detector in detectors:
        expected = evaluate(detector, data, progress=False)
        found = result.table(detector.name)
        np.testing.assert_allclose(found, expected.table[found.columns], atol=1e-9)
        images = result.images[result.images["method"] == detector.name]
        np.testing.assert_allclose(images["score"], expected.images["image_score"], atol=1e-6)
    assert result.pro["exact"].notna().all()
    assert (result.pro["released"] == 0).all()


def test_a_stopped_benchmark_continues_and_ends_the_same(
    detectors, data, tmp_path, result, monkeypatch
):
    folder = tmp_path / "kept"
    benchmark(detectors[:1], data, folder, n_resamples=10, progress=False)
    monkeypatch.setattr(type(detectors[0]), "features", lambda *_: pytest.fail("computed again"))
    for other in detectors[
        1:
    ]:  # Detector.features was replaced for all: give the others theirs back
        monkeypatch.setattr(
            other, "features", lambda images, d=other: _features(d, images), raising=False
        )
    found = benchmark(detectors, data, folder, n_resamples=10, progress=False)
    np.testing.assert_allclose(found.comparison.numbers, result.comparison.numbers, atol=1e-9)


def _features(detector, images):
    with torch.no_grad():
        return detector.encode(images)


def test_data_without_masks_have_image_metrics_only(tiny_backbone, tmp_path):
    folder = make_folder(tmp_path / "x", ("bolt",))
    for mask in (folder.root).rglob("*_mask.png"):
        mask.unlink()
    for place in sorted((folder.root).rglob("ground_truth/*"), reverse=True):
        place.rmdir()
    (folder.root / "bolt" / "ground_truth").rmdir()
    from clipad.datasets import load_dataset

    result = benchmark(
        [SDP(tiny_backbone, rvs="mean")],
        load_dataset("folder", folder.root),
        n_resamples=5,
        progress=False,
    )
    assert set(result.means().columns) == {"image_auroc", "image_f1_max", "image_ap"}
    assert np.isnan(result.prevalence["pixel"])
    assert result.curve("SDP", "image_roc")[-1] == 1


def test_curves_have_the_areas_of_their_metrics():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 24, 24), bool)
    masks[:3, 4:12, 6:15] = True
    scores = (masks + rng.normal(size=masks.shape)).astype(np.float32)
    curves = curves_of(scores, masks)
    assert np.trapezoid(curves["roc"], RATES) == pytest.approx(
        roc_auc_score(masks.ravel(), scores.ravel()), abs=0.01
    )
    assert np.trapezoid(curves["pr"], RATES) == pytest.approx(
        average_precision_score(masks.ravel(), scores.ravel()), abs=0.02
    )
    inside = RATES <= 0.3
    area = np.trapezoid(curves["pro"][inside], RATES[inside]) / 0.3
    assert area == pytest.approx(pixel_metrics(scores, masks)["pro"], abs=0.02)
    assert np.isnan(curves["pro"][~inside]).all()


def test_published_numbers_stand_beside_ours(result, data, tmp_path, monkeypatch):
    """A stand-in for data/published_results.csv, for which the data set is called mvtec."""
    table = pd.DataFrame(
        [
            ["SDP", "mvtec", "bolt", "pixel", "auroc", 60.0, "published", "made up"],
            ["SDP", "mvtec", "mean", "pixel", "pro", 50.0, "derived", "made up"],
            ["MuSc", "mvtec", "bolt", "image", "auroc", 97.8, "run by others", "made up"],
            [
                "SDP",
                "mvtec",
                "cable",
                "pixel",
                "auroc",
                70.0,
                "published",
                "a category that was not run",
            ],
            ["SDP", "visa", "bolt", "pixel", "auroc", 70.0, "published", "another data set"],
        ],
        columns=["method", "dataset", "category", "level", "metric", "percent", "kind", "source"],
    )
    table.to_csv(tmp_path / "published_results.csv", index=False)
    monkeypatch.setenv("CLIPAD_DATA", str(tmp_path))
    named = type(data)("mvtec", data.root, data.categories, data.samples)
    found = beside_published(result, named)
    # The mean is left out: two of our own categories are not the fifteen of MVTec AD.
    assert found[["method", "category"]].to_numpy().tolist() == [["SDP", "bolt"], ["MuSc", "bolt"]]
    ours = result.table("SDP").loc["bolt", "pixel_auroc"]
    row = found.iloc[0]
    assert row["ours"] == ours
    assert row["difference"] == pytest.approx(ours - 0.6)
    assert row["low"] <= ours <= row["high"]
    assert row["kind"] == "published"
    assert np.isnan(found.iloc[1]["ours"])
    monkeypatch.setattr(
        "clipad.studies.benchmark.EXPECTED", {"mvtec": dict.fromkeys(data.categories)}
    )
    whole = beside_published(result, named).set_index("category")
    assert whole.loc["mean", "ours"] == result.table("SDP").loc["mean", "pixel_pro"]


def test_nothing_is_published_for_a_folder(result, data):
    assert beside_published(result, data).empty


def test_costs(detectors, data):
    table = costs(detectors, data, batch_size=2, repeats=2)
    assert table["relative"].min() == 1
    assert (table["ms per image"] > 0).all()
    assert table.loc["WinCLIP", "relative"] > 1


def test_wrong_calls_are_refused(detectors, data):
    with pytest.raises(ValueError, match="names of their own"):
        benchmark([detectors[0], detectors[0]], data)
    with pytest.raises(ValueError, match="2 resamples"):
        benchmark(detectors, data, n_resamples=1)


def test_one_typical_image_per_category(detectors, data):
    chosen, maps = typical({d.name: d for d in detectors}, data)
    assert [s.category for s in chosen] == list(data.categories)
    assert all(s.label == 1 for s in chosen)
    assert {name: values.shape for name, values in maps.items()} == dict.fromkeys(maps, (2, 32, 32))


def test_words_follow_the_interval():
    table = pd.DataFrame(
        {
            "difference": [0.1, -0.1, 0.1],
            "low_both": [0.05, -0.2, -0.1],
            "high_both": [0.2, -0.05, 0.2],
        }
    )
    table.index = ["pixel_auroc", "pixel_pro", "image_auroc"]
    said = in_words({"A": table}, ["pixel_auroc", "pixel_pro", "image_auroc", "pixel_ap"])["A"]
    assert said == (
        "pixel AUROC +10.0 [+5.0, +20.0] (higher), PRO -10.0 [-20.0, -5.0] (lower), "
        "image AUROC +10.0 [-10.0, +20.0] (not told apart)"
    )
