import numpy as np
import pandas as pd
import pytest
from small_data import make_folder

from clipad.detectors import SDP, Direct
from clipad.evaluation import evaluate, predict
from clipad.studies import benchmark as study
from clipad.studies.common import METRICS, Scores
from clipad.studies.figures import COLOURS, METHODS, dot_panels
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
    return study.benchmark(detectors, data, resamples=10)


def test_the_numbers_are_those_of_evaluate(result, detectors, data):
    scores, images = result
    for detector in detectors:
        expected = evaluate(detector, data, progress=False)
        found = scores.table(detector.name)
        np.testing.assert_allclose(found, expected.table[found.columns], atol=1e-9)
        own = images[images["method"] == detector.name]
        for column in ("label", "probability", "map_max"):
            np.testing.assert_allclose(own[column], expected.images[column], atol=1e-6)


def test_a_stopped_benchmark_continues_and_ends_the_same(
    detectors, data, tmp_path, result, monkeypatch
):
    folder = tmp_path / "kept"
    study.benchmark(detectors[:1], data, folder, resamples=10)
    monkeypatch.setattr(type(detectors[0]), "features", lambda *_: pytest.fail("computed again"))
    again, _ = study.benchmark(detectors, data, folder, resamples=10)
    np.testing.assert_array_equal(again.values, result[0].values)
    damaged = sorted(folder.glob("*.npz"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    monkeypatch.undo()
    again, _ = study.benchmark(detectors, data, folder, resamples=10)
    np.testing.assert_array_equal(again.values, result[0].values)


def scores_of(means):
    """Scores without noise but for one draw in ten: categories a (texture) and b."""
    values = np.full((len(means), 2, len(METRICS), 51), np.nan)
    for m, (low, noise) in enumerate(means.values()):
        draws = np.full(51, low)
        draws[1::2] += noise
        draws[2::2] -= noise
        values[m, :, :, :] = draws
    return Scores(tuple(means), ("leather", "bolt"), METRICS, values)


def test_advice_prefers_quick_methods_that_are_not_significantly_worse():
    spent = pd.Series({"SDP": 1.0, "equal": 1.2, "slow": 10.0, "worse": 0.5})
    scores = scores_of(
        {"SDP": (0.80, 0.1), "equal": (0.81, 0.1), "slow": (0.85, 0.0), "worse": (0.4, 0.0)}
    )
    scores.values[:, :, METRICS.index("class_auroc")] = np.nan
    textures, objects = study.advice(scores, spent).itertuples()
    assert (textures.use, objects.use) == ("maps of textures", "maps of objects")
    assert (objects.best, objects.take) == ("slow", "equal")
    assert set(objects.equals) == {"SDP", "equal", "slow"}


def test_a_decision_per_image_needs_no_map():
    spent = pd.Series({"Direct": 1.0, "SDP": 1.2, "WinCLIP": 9.0})
    scores = scores_of({"Direct": (0.8, 0.1), "SDP": (0.8, 0.1), "WinCLIP": (0.81, 0.0)})
    *_, image = study.advice(scores, spent).itertuples()
    assert (image.best, image.take) == ("WinCLIP", "Direct")
    assert image.equals == ["Direct", "WinCLIP"]


def test_a_method_has_its_own_colour_and_marker():
    means = {"SDP": (0.8, 0.1), "WinCLIP": (0.7, 0.0), "Direct": (0.6, 0.0)}  # in another order
    scores = scores_of(means)
    table = pd.DataFrame({name: scores.table(name)["pixel_pro"] for name in means})
    figure = dot_panels({"PRO": table}, "percent", looks=METHODS)
    marks = {line.get_label(): line for ax in figure.axes for line in ax.lines}
    for name in means:
        colour, marker = METHODS[name]
        assert marks[name].get_marker() == marker
        assert marks[name].get_color() == COLOURS[colour]


def test_the_gallery_shows_anomalous_images_on_the_scale_of_flawless_ones(detectors, data):
    samples, masks, maps = study.median_images(
        {d.name: d for d in detectors}, data, data.categories
    )
    assert [s.category for s in samples] == list(data.categories)
    assert {s.label for s in samples} == {1}
    assert len(masks) == len(samples)
    maps_of_sdp = predict(detectors[-1], data.select("bolt"))[0]
    labels = np.array([s.label for s in data.select("bolt")])
    at = list(data.select("bolt")).index(samples[list(data.categories).index("bolt")])
    limit = np.quantile(maps_of_sdp[labels == 0], 0.99)
    found = maps["SDP"][list(data.categories).index("bolt")] > 1
    np.testing.assert_array_equal(found, maps_of_sdp[at] > limit)


def test_published_numbers_stand_beside_ours_of_the_same_categories(monkeypatch):
    from types import SimpleNamespace

    categories = ("bottle", "screw")
    values = np.full((1, 2, len(METRICS), 3), 0.9)
    scores = Scores(("WinCLIP",), categories, METRICS, values)
    part = study.beside_published(scores, SimpleNamespace(name="mvtec", categories=categories))
    assert set(part["category"]) == set(
        categories
    )  # means of all 15 do not stand beside two of ours
    winclip = part[(part["method"] == "WinCLIP") & (part["metric"] == "pixel_auroc")]
    np.testing.assert_allclose(winclip["difference"], 0.9 - winclip["published"])
    monkeypatch.setattr(study, "expected_counts", lambda name: dict.fromkeys(categories))
    whole = study.beside_published(scores, SimpleNamespace(name="mvtec", categories=categories))
    assert "mean" in set(whole["category"])
    assert study.beside_published(scores, SimpleNamespace(name="demo", categories=("screw",))).empty
