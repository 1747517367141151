from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap
from small_data import make_folder

from clipad.detectors import SDP, ClipSurgery, Direct, SDPPlus
from clipad.evaluation import evaluate
from clipad.linear_layers import LinearLayers
from clipad.studies import common, figures
from clipad.studies.common import Interval, Scores
from clipad.studies.experiments import Experiment


class Run:
    """What a claim needs of an experiment."""

    def __init__(self):
        self.results = {}

    def record(self, name, value):
        self.results[name] = value


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data", categories=("bolt", "leather"))


@pytest.fixture
def kept(tiny_backbone, data):
    return common.keep(SDP(tiny_backbone, rvs="mean"), data, batch_size=3)


@pytest.mark.parametrize("kind", [SDP, Direct, ClipSurgery])
def test_scores_of_kept_features_are_those_of_evaluate(tiny_backbone, data, kind):
    detector = kind(tiny_backbone, rvs="mean")
    kept = common.keep(detector, data, batch_size=3)
    scores = common.score({"it": kept.predict_all(detector)}, kept, resamples=3)
    expected = evaluate(detector, data, progress=False).table
    found = scores.table("it")
    for metric in common.METRICS:
        np.testing.assert_allclose(found[metric], expected[metric], atol=1e-4)


def test_features_of_another_detector_are_refused(tiny_backbone, data, kept):
    for other in (
        ClipSurgery(tiny_backbone),
        Direct(tiny_backbone),
        SDP(tiny_backbone, stages=[2, 4]),
    ):
        with pytest.raises(ValueError, match="reads"):
            kept.maps(other)
    plus = SDPPlus(tiny_backbone, LinearLayers(32, 24, 4), rvs="mean")
    with pytest.raises(ValueError, match="reads"):
        kept.maps(plus)
    more = common.keep(plus, data, batch_size=3)
    sdp = SDP(tiny_backbone, rvs="mean")
    np.testing.assert_allclose(more.maps(sdp), kept.maps(sdp), atol=1e-6)


def test_a_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.1, (1, 4, 1, 501))
    values = np.concatenate([base, base + 0.01])
    scores = Scores(("a", "b"), ("w", "x", "y", "z"), ("pixel_pro",), values)
    for interval in scores.interval("pixel_pro", "b", minus="a"):
        assert interval.low == pytest.approx(0.01)
        assert interval.high == pytest.approx(0.01)
        assert interval.verdict() == "higher"
    images, wide = scores.interval("pixel_pro", "b")
    assert images.estimate == pytest.approx(values[1, :, 0, 0].mean()) == wide.estimate
    one = scores.interval("pixel_pro", "b", categories=["w"])[0]
    assert one.estimate == pytest.approx(values[1, 0, 0, 0])


def test_the_wide_interval_knows_that_categories_differ():
    values = np.full((1, 8, 1, 201), 0.0)
    values += np.linspace(0, 1, 8)[None, :, None, None]  # no noise within a category
    images, wide = Scores(("a",), tuple("abcdefgh"), ("m",), values).interval("m", "a")
    assert images.high - images.low == 0
    assert wide.high - wide.low > 0.3


def test_means_of_images_agree_with_scipy():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"category": ["a"] * 40 + ["b"] * 40, "x": rng.random(80)})
    scores = common.scores_of_images({"m": frame}, ["x"], resamples=4000)
    images, _ = scores.interval("x", "m")
    sets = [frame["x"][:40].to_numpy(), frame["x"][40:].to_numpy()]
    expected = bootstrap(
        sets, lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2, method="percentile",
        n_resamples=4000, random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert images.estimate == pytest.approx(frame["x"].groupby(frame["category"]).mean().mean())
    assert (images.low, images.high) == pytest.approx(tuple(expected), abs=0.005)


def test_images_with_nothing_to_count_are_left_out():
    frame = pd.DataFrame({"category": ["a", "a", "b", "b"], "x": [1.0, np.nan, np.nan, np.nan]})
    images, wide = common.scores_of_images({"m": frame}, ["x"], resamples=50).interval("x", "m")
    assert images.estimate == 1
    assert images.verdict() == wide.verdict() == "higher"


def test_a_notebook_without_both_labels_keeps_its_record_and_ends(data, capsys):
    finished = []
    run = Experiment("00", {}, None, data, None, None, None, 0)
    run.finish = lambda: finished.append(True)
    run.need_both_labels("this notebook")  # goes on
    run.dataset = replace(data, samples=tuple(s for s in data if s.label == 0))
    with pytest.raises(SystemExit) as stop:
        run.need_both_labels("this notebook")
    assert not stop.value.code
    assert finished == [True]
    assert "normal and anomalous images" in capsys.readouterr().out


def test_verdicts_say_what_the_interval_says():
    assert Interval(0.1, -0.1, 0.3).verdict() == "no significant difference"
    assert Interval(0.4, 0.3, 0.45).verdict(level=0.5) == "lower"
    assert Interval(np.nan, np.nan, np.nan).verdict() == "not measured"


def test_claims_are_kept_once_and_say_their_verdict(monkeypatch):
    run, shown = Run(), []
    monkeypatch.setattr(common, "display", lambda markdown: shown.append(markdown.data))
    narrow, wide = Interval(0.02, 0.01, 0.03), Interval(0.02, -0.01, 0.05, p=0.2)
    for _ in range(2):
        common.claim(
            run, "first", "A against B", (narrow, wide), metric="pixel_pro", then={"higher": "no"}
        )
    common.claim(run, "second", "C against D", (narrow, Interval(0.02, 0.01, 0.05, p=0.03)))
    common.claim(run, "third", "E against F", (narrow, Interval(0.02, 0.01, 0.05, p=0.001)))
    common.fact(run, "fourth", "G is H", True)
    first, second, *_, last = run.results["claims"]
    assert [c["id"] for c in run.results["claims"]] == ["first", "second", "third", "fourth"]
    assert first["verdict"] == "no significant difference"
    assert (first["low"], first["low_wide"]) == (0.01, -0.01)
    assert (second["verdict"], last["verdict"]) == ("higher", "holds")
    common.show_claims(run)
    table = shown[-1].splitlines()
    assert "| C against D | higher | +2.0 [+1.0, +5.0] | other images and categories |" in table[3]
    assert [line.split("|")[-2].strip() for line in table[2:6]] == [
        "not significant", "not significant", "significant", "",
    ]  # fmt: skip


def test_worst_median_and_best():
    rng = np.random.default_rng(0)
    values = rng.permutation(9).astype(float)
    assert [values[i] for i in common.worst_median_best(values)] == [0, 4, 8]


def test_a_chart_is_svg_and_a_picture_png_both_with_alt_text_and_caption(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda what, **more: shown.append((what, more)))
    chart, ax = plt.subplots()
    ax.plot([1, 2])
    figures.show(chart, "a line")
    picture, ax = plt.subplots()
    ax.imshow(np.eye(3))
    figures.show(picture, "an image")
    kinds = [next(iter(more["metadata"])) for _, more in shown if more]
    alts = [next(iter(more["metadata"].values()))["alt"] for _, more in shown if more]
    assert (kinds, alts) == (["image/svg+xml", "image/png"], ["a line", "an image"])
    assert "a line" in shown[1][0].data
    plt.close("all")


def test_images_by_rule_have_names_and_two_have_no_median():
    def rule(labels, tops):
        maps = np.zeros((len(labels), 2, 2))
        maps[:, 0, 0] = tops
        return common.chosen_by_rule(SimpleNamespace(labels=np.array(labels), masks=None), maps)

    found = rule([1, 0, 1, 1, 0], [5, 1, 3, 4, 2])
    assert found == {"worst": 2, "median": 3, "best": 0, "flawless": 4}
    assert rule([0, 1, 1], [1, 3, 2]) == {"worst": 2, "best": 1, "flawless": 0}
    assert rule([-1, -1, -1], [3, 1, 2]) == {"lowest": 1, "median": 2, "highest": 0}
    assert rule([0, 0], [1, 2]) == {"flawless": 1}


def test_the_guard_of_a_cell_says_that_it_is_skipped_only_without_masks(data, capsys):
    run = Experiment("00", {}, None, data, None, None, None, 0)
    assert run.has_masks()
    assert not capsys.readouterr().out
    run.dataset = replace(data, samples=tuple(replace(s, mask_path=None) for s in data))
    assert not run.has_masks()
    assert "no masks" in capsys.readouterr().out
