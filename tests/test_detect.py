import json
import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDP
from clipad.tools.cli import app
from clipad.tools.detect import Calibration, calibrate, detect, find_images, overlay


@pytest.fixture(scope="module")
def detector():
    return SDP(load_backbone("demo", device="cpu"), rvs="mean")


@pytest.fixture(scope="module")
def calibration(detector):
    normal = [s for s in load_dataset("demo_aux", categories=["cable", "pill"]) if s.label == 0]
    return calibrate(detector, normal, "forty images", progress=False)


@pytest.fixture
def photos(tmp_path):
    """Images of every size and mode, one broken, with names that HTML and shells dislike."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "a b").mkdir(parents=True)
    for name, size, mode in [
        ("wide.jpg", (1500, 40), "RGB"),
        ("grey.png", (33, 90), "L"),
        ("see-through.png", (64, 64), "RGBA"),
        ("a b/<ümlaut> & 'x'.png", (50, 50), "RGB"),
    ]:
        shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    "typed", ["photos", "photos/", "./photos", "elsewhere/../photos", ".", "link"]
)
def test_any_way_to_write_a_path(detector, calibration, photos, tmp_path, monkeypatch, typed):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    monkeypatch.chdir(photos if typed == "." else tmp_path)
    report = detect(detector, typed, "gear", tmp_path / "out", calibration, progress=False)
    assert set(report.scores["image"]) == {
        "wide.jpg",
        "grey.png",
        "see-through.png",
        "a b/<ümlaut> & 'x'.png",
    }


def test_a_folder_of_anything(detector, calibration, photos, tmp_path):
    report = detect(detector, photos, "gear", tmp_path / "out", calibration, progress=False)
    assert len(report.scores) == 4
    assert list(report.broken) == ["broken.png"]
    assert str(tmp_path) not in report.broken["broken.png"]
    assert report.metrics is None
    for name in report.scores["image"]:
        assert np.load(tmp_path / "out" / "maps" / f"{name}.npy").shape == (96, 96)
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg").size[0] <= 768
    stored = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert [row["image"] for row in stored["images"]] == list(report.scores["image"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;ümlaut&gt; &amp;" in page
    assert len(re.findall(r'<img [^>]*alt="[^"]+"', page)) == 4
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_a_score_does_not_depend_on_the_other_images(detector, calibration, photos, tmp_path):
    together = detect(
        detector, photos, "gear", tmp_path / "a", calibration, progress=False
    ).scores.set_index("image")
    alone = detect(
        detector, photos / "grey.png", "gear", tmp_path / "b", calibration, progress=False
    ).scores
    assert alone["score"][0] == pytest.approx(together["score"]["grey.png"], abs=1e-3)


def test_the_reference_scores_itself(calibration):
    assert np.mean(calibration.scores) == pytest.approx(0, abs=1e-6)
    middle = calibration.scores[len(calibration.scores) // 2]
    assert calibration.percentile(middle) == pytest.approx(0.5, abs=0.05)
    assert calibration.percentile(max(calibration.scores) + 1) == 1


def test_labels_and_masks_in_the_folder_give_metrics(detector, calibration, tmp_path):
    gear = load_dataset("demo").root / "gear"
    report = detect(detector, gear, "gear", tmp_path, calibration, progress=False)
    assert report.metrics["image_auroc"] > 0.6
    assert report.metrics["pixel_auroc"] > 0.6


def test_calibration_needs_images(detector):
    normal = [s for s in load_dataset("demo_aux") if s.label == 0][:5]
    with pytest.raises(ValueError, match="at least 8 normal images, mine has 5"):
        calibrate(detector, normal, "mine", progress=False)


def test_nothing_to_do_is_said_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_images(tmp_path / "nowhere", "nut")
    with pytest.raises(ValueError, match="no images"):
        find_images(tmp_path, "nut")


def test_an_overlay_keeps_what_is_below_the_scale():
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    heat = np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1
    mixed = np.asarray(overlay(picture, heat, (0.5, 1.0)))
    assert (mixed[10, 2] == (10, 200, 30)).all()
    assert (mixed[10, 37] != (10, 200, 30)).any()


def test_command(photos, tmp_path):
    result = CliRunner().invoke(
        app,
        [
            "detect",
            str(photos),
            "--object",
            "screw",
            "--out",
            str(tmp_path / "found"),
            "--detector",
            "direct",
        ],
    )
    assert result.exit_code == 1, result.output
    assert "not readable: broken.png" in result.output
    assert len(pd.read_csv(tmp_path / "found" / "scores.csv")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--object", " "], "no name"),
        (["--object", "nut", "--model", "ViT-B-32"], "needs --pretrained"),
        (["--object", "nut", "--detector", "sdp_plus"], "needs its linear layers"),
    ],
)
def test_wrong_usage(photos, arguments, message):
    result = CliRunner().invoke(app, ["detect", str(photos), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_calibration_is_frozen_data():
    calibration = Calibration("x", (0.5, 0.1), (0.0, 1.0), (0, 1), (0.0,))
    assert calibration.score(0.6, 1.0) == pytest.approx(2.0)
