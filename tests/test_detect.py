"""`clipad detect`: files in, verdicts and a report out. The statistics behind it: test_inspection."""

import csv
import errno
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDP
from clipad.io.files import file_name
from clipad.studies.inspection import without_specks
from clipad.tools.cli import app
from clipad.tools.detect import detect
from clipad.tools.photographs import collect
from clipad.tools.report import find_regions, region_mask


@pytest.fixture(scope="module")
def detector():
    return SDP(load_backbone("demo", device="cpu"), rvs="mean")


def shipped(category, label):
    return [s.image_path for s in load_dataset("demo", categories=[category]) if s.label == label]


@pytest.fixture(scope="module")
def flawless(tmp_path_factory):
    """Ten flawless screws."""
    folder = tmp_path_factory.mktemp("flawless")
    for path in shipped("screw", 0)[:10]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def screws(tmp_path):
    """Six pictures of screws, four of them with a defect."""
    folder = tmp_path / "screws"
    folder.mkdir()
    for number, path in enumerate([*shipped("screw", 0)[10:12], *shipped("screw", 1)[:4]]):
        shutil.copy(path, folder / f"{number}.png")
    return folder


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


def run(detector, path, out, normal=None, **options):
    rate = {"false_alarms": 0.1} if normal else {}
    images = collect(path, normal, options.pop("normal_folder", ""))
    return detect(detector, images, "screw", out, **rate | options)


def noise(path, size=(40, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# --- what is found ---


@pytest.mark.parametrize(
    "typed", ["photos", "photos/", "./photos", "elsewhere/../photos", ".", "link"]
)
def test_any_way_to_write_a_path(detector, photos, tmp_path, monkeypatch, typed):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    monkeypatch.chdir(photos if typed == "." else tmp_path)
    report = run(detector, typed, tmp_path / "out")
    assert set(report.scores["image"]) == {
        "wide.jpg",
        "grey.png",
        "see-through.png",
        "a b/<ümlaut> & 'x'.png",
    }
    assert list(report.unread) == ["broken.png"]
    assert str(tmp_path) not in report.unread["broken.png"]


def test_a_verdict_for_every_image(detector, screws, flawless, tmp_path):
    report = run(detector, screws, tmp_path / "out", flawless)
    rule = report.rule
    assert len(rule.scores) == 10
    assert sum(report.counts.values()) == 6
    for row in report.scores.itertuples():
        assert (row.verdict == "bad") == (row.score > rule.threshold)
        stands_out = row.map_max > rule.map_threshold
        assert stands_out or row.regions == 0
        assert (row.verdict == "check") == (row.verdict != "bad" and stands_out)
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{row.image}.png"))
        assert mask.any() == (row.regions > 0)
        assert (tmp_path / "out" / "images" / f"{row.image}.jpg").exists()
    assert report.scores["score"].is_monotonic_decreasing
    assert "bad" in set(report.scores["verdict"])


def test_without_flawless_images_there_is_no_verdict(detector, screws, tmp_path):
    report = run(detector, screws, tmp_path / "out")
    assert report.rule is None
    assert set(report.scores["verdict"]) == {""}
    assert (report.scores["score"] == report.scores["logit"]).all()
    assert np.isfinite(report.scores["score"]).all()


def test_a_score_does_not_depend_on_the_other_images(detector, screws, flawless, tmp_path):
    together = run(detector, screws, tmp_path / "a", flawless).scores.set_index("image")
    alone = run(detector, screws / "4.png", tmp_path / "b", flawless).scores
    assert alone["score"][0] == pytest.approx(together["score"]["4.png"], abs=1e-3)


@pytest.mark.parametrize("options", [{"neighbours": "alone"}, {"neighbours": "added", "tiles": 2}])
def test_neighbours_and_tiles(detector, screws, flawless, tmp_path, options):
    report = run(detector, screws, tmp_path / "out", flawless, **options)
    side = 96 * options.get("tiles", 1)
    for path in (tmp_path / "out" / "maps").iterdir():
        assert np.load(path)["map"].shape == (side, side)
    assert len(report.scores) == 6


def test_labels_are_taken_only_from_the_folder_that_was_named(detector, flawless, tmp_path):
    for number, path in enumerate(shipped("screw", 0)[10:14]):
        (tmp_path / "d" / "yes").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "d" / "yes" / f"{number}.png")
    for number, path in enumerate(shipped("screw", 1)[:4]):
        (tmp_path / "d" / "no").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "d" / "no" / f"{number}.png")
    report = run(detector, tmp_path / "d", tmp_path / "a", flawless)
    assert "label" not in report.scores
    assert not report.observed
    report = run(detector, tmp_path / "d", tmp_path / "b", flawless, normal_folder="yes")
    labels = {
        image.split("/")[0]: label for image, label in report.scores[["image", "label"]].values
    }
    assert labels == {"yes": 0, "no": 1}
    assert float(report.observed["AUROC"]) > 50
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", report.observed["false alarms"])
    with pytest.raises(ValueError, match="no folder is called 'ok'; found no, yes"):
        run(detector, tmp_path / "d", tmp_path / "c", flawless, normal_folder="ok")


def test_twelve_bits_in_sixteen_are_said(detector, tmp_path):
    (tmp_path / "d").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (40, 40)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "d" / "x.png")
    assert any("12-bit" in note for note in run(detector, tmp_path / "d", tmp_path / "out").notes)


def test_exif_orientation_is_applied_and_said(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    (tmp_path / "d").mkdir()
    Image.fromarray(pixels).save(tmp_path / "d" / "x.jpg", exif=exif)
    report = run(detector, tmp_path / "d", tmp_path / "out")
    assert report.scores[["width", "height"]].values.tolist() == [[40, 80]]
    assert any("EXIF" in note for note in report.notes)
    assert Image.open(tmp_path / "out" / "images" / "x.jpg.jpg").size == (40, 80)


# --- what is refused, before anything is computed ---


def test_too_few_flawless_images_are_refused_with_the_number_needed(
    detector, screws, flawless, tmp_path
):
    with pytest.raises(ValueError, match=r"10 flawless images cannot promise .* at least 19"):
        run(detector, screws, tmp_path / "out", flawless, false_alarms=0.05)
    assert not (tmp_path / "out").exists()


def test_images_in_both_folders_are_refused(detector, screws, flawless, tmp_path):
    with pytest.raises(ValueError, match=r"6 images are among"):  # before: six are too few
        run(detector, screws, tmp_path / "out", screws)
    shutil.copy(next(flawless.iterdir()), screws / "again.png")
    with pytest.raises(ValueError, match=r"1 images are among the flawless ones"):
        run(detector, screws, tmp_path / "out", flawless)


def test_flawless_images_come_from_folders_that_say_so(tmp_path):
    for folder in ("ok", "scratch"):
        for i in range(2):
            noise(tmp_path / "d" / folder / f"{i}.png", seed=2 * len(folder) + i)

    def flawless(name=""):
        return collect(noise(tmp_path / "x.png", seed=9), tmp_path / "d", name)

    assert {path.parent.name for path in flawless().flawless} == {"ok"}
    assert "2 of 4 images" in flawless().notes[-1]
    (tmp_path / "d" / "ok").rename(tmp_path / "d" / "pass")
    with pytest.raises(ValueError, match="sub-folders pass, scratch: which of them are flawless"):
        flawless()
    assert len(flawless("Pass").flawless) == 2
    assert len(flawless(".").flawless) == 4


def test_copies_among_the_flawless_images_count_once(tmp_path):
    shutil.copy(noise(tmp_path / "d" / "a.png"), tmp_path / "d" / "b.png")
    found = collect(noise(tmp_path / "x.png", seed=9), tmp_path / "d")
    assert len(found.flawless) == 1
    assert "1 of 2 images" in found.notes[-1]


def test_folders_of_other_settings_or_other_files_are_refused(detector, screws, flawless, tmp_path):
    run(detector, screws, tmp_path / "out")
    with pytest.raises(ValueError, match=r"other settings \(different: false_alarms, flawless\)"):
        run(detector, screws, tmp_path / "out", flawless)
    noise(tmp_path / "mine" / "images" / "holiday.png")
    with pytest.raises(ValueError, match="files that are not ours"):
        run(detector, screws, tmp_path / "mine")
    with pytest.raises(ValueError, match="files that are not ours"):
        run(detector, screws, screws)
    (tmp_path / "out" / "settings.json").unlink()  # maps of nobody knows which settings
    with pytest.raises(ValueError, match=r"missing or damaged.*choose another --out"):
        run(detector, screws, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        run(detector, screws, tmp_path / "file")


def test_maps_that_are_not_finite_are_refused(detector, screws, tmp_path, monkeypatch):
    score = SDP.score_with

    def broken(self, features, text):
        found = score(self, features, text)
        found.maps[0, 0, 0] = np.nan
        return found

    monkeypatch.setattr(SDP, "score_with", broken)
    with pytest.raises(ValueError, match="not finite"):
        run(detector, screws, tmp_path / "out")


def test_nothing_to_do_is_said_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        collect(tmp_path / "nowhere")
    (tmp_path / "list.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"no images; left out of .*: in a format .* \(list\.txt\)"
    ):
        collect(tmp_path)


# --- going on ---


def test_a_stopped_run_continues_and_changed_images_are_done_again(
    detector, screws, flawless, tmp_path, monkeypatch
):
    whole = run(detector, screws, tmp_path / "whole", flawless)
    out = tmp_path / "out"
    run(detector, screws, out, flawless)
    (out / "maps" / "0.png.npz").write_bytes(b"half a file")
    (out / "images" / "1.png.jpg").unlink()
    (out / "overlays" / "2.png.jpg").unlink()
    shutil.copy(screws / "2.png", screws / "3.png")
    (screws / "5.png").unlink()
    looked = []
    score = SDP.score_with
    monkeypatch.setattr(
        SDP,
        "score_with",
        lambda self, f, t: looked.append(len(f.image_embedding)) or score(self, f, t),
    )
    report = run(detector, screws, out, flawless)
    assert any(note.startswith("2 of 5 ") for note in report.notes)
    assert sum(looked) == 10 + 3  # the flawless ones, 0 and 1, and 3, whose content is another
    assert (out / "overlays" / "2.png.jpg").exists()
    after = report.scores.set_index("image")["score"]
    before = whole.scores.set_index("image")["score"]
    assert after["0.png"] == pytest.approx(before["0.png"], abs=1e-3)
    assert after["3.png"] == pytest.approx(before["2.png"], abs=1e-3)
    assert not [path for path in out.rglob("*") if path.name.startswith("5.png")]


def test_results_are_never_scored_and_a_full_disk_is_named(detector, screws, tmp_path, monkeypatch):
    run(detector, screws, screws / "found")
    report = run(detector, screws, tmp_path / "out")
    assert len(report.scores) == 6
    assert any("results of clipad" in line for line in report.notes)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"other.* cannot be written .*No space left .*free space"):
        run(detector, screws, tmp_path / "other")


# --- odd files ---


def test_what_is_no_photograph_is_left_out_and_counted(detector, tmp_path):
    folder = tmp_path / "d"
    noise(folder / "a.jpg")
    noise(folder / "a.png", seed=1)
    noise(folder / "deep" / "deeper" / "b.png", seed=2)
    noise(folder / "deep" / "deeper" / "b_mask.png", seed=3)
    noise(folder / "Ground Truth" / "c.png", seed=4)
    noise(folder / ".hidden" / "d.png", seed=5)
    noise(folder / "e.jfif.jpg", seed=6).rename(folder / "e.jfif")
    Image.new("L", (20, 20), 255).save(folder / "blank.png")
    (folder / "f.heic").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    report = run(detector, folder, tmp_path / "out")
    assert set(report.scores["image"]) == {"a.jpg", "deep/deeper/b.png", "e.jfif"}
    assert report.unread == {"blank.png": "at most two grey levels, so a mask or empty"}
    said = "\n".join(report.notes)
    for part in (
        "beside a photograph of the same name, so a mask or copy: 2 (a.png, deep/deeper/b_mask.png)",
        "in a folder of masks: 1 (Ground Truth/c.png)",
        "hidden: 1 (.hidden)",
        "in a format that is not read (.heic): 1 (f.heic)",
        "in a format that is not read (.txt): 1 (notes.txt)",
        "broken link: 1 (gone.png)",
        "no file but a pipe or device: 1 (pipe.png)",
    ):
        assert part in said


def test_names_that_file_systems_allow(detector, tmp_path):
    folder = tmp_path / "d"
    first = noise(folder / "first.png")
    names = [
        b"caf\xe9.png",
        b"x" * 245 + b".png",
        "面".encode() * 80 + b".png",
        b"=1+2.png",
        b"new\nline.png",
    ]
    for name in names:
        shutil.copy(first, os.path.join(os.fsencode(folder), name))
    report = run(detector, folder, tmp_path / "out")
    assert len(report.scores) == 6
    assert report.scores["file"].is_unique
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=1+2.png" in cells
    assert not [
        c for c in cells if c.startswith(("=", "+", "@")) or (c[:1] == "-" and not float(c))
    ]
    json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))


def test_file_names_are_one_to_one_and_short():
    names = ["a/b.png", "a_b.png", "A/b.png", "é" * 120, "é" * 119 + "e", ".x", "_x", "a%2Fb.png"]
    found = [file_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(name.encode()) <= 150 and "/" not in name for name in found)


# --- pictures and tables ---


def test_regions_lie_on_the_image_at_its_own_size():
    heat = np.zeros((8, 8), np.float32)
    heat[0:2, 6:8] = 1
    heat[4:6, 1:3] = 2
    heat[0, 0] = 3  # a speck
    heat = without_specks(heat, 0.5)
    boxes, outlines = find_regions(heat, 0.5, (160, 80))
    assert boxes == [(20, 40, 60, 60), (120, 0, 160, 20)]  # the highest first
    x, y = np.array(outlines[0]).T
    assert (x.min(), x.max(), y.min()) == (pytest.approx(125, abs=6), 160, 0)
    mask = np.asarray(region_mask(heat, 0.5, (160, 80)))
    assert mask.shape == (80, 160)
    assert mask[5, 150]
    assert not mask[40, 80]
    assert not mask[0, 0]
    assert find_regions(heat, 2.5, (160, 80)) == ([], [])


def test_the_demo_model_on_other_pictures_is_said_first(detector, photos, screws, tmp_path):
    assert run(detector, screws, tmp_path / "demo").warning == ""
    report = run(detector, photos, tmp_path / "out")
    assert "demo model" in report.warning
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("toy") < page.index("<h1>")
    assert pd.read_csv(tmp_path / "out" / "scores.csv")["warning"].str.contains("demo model").all()


def test_the_report_needs_nothing_from_elsewhere(detector, photos, flawless, tmp_path):
    run(detector, photos, tmp_path / "out", flawless)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    assert "<ümlaut>" not in page
    assert page.count("<img src=") == 4
    stored = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert len(stored["scores"]) == 4
    assert stored["settings"]["false_alarms"] == 0.1


# --- the command ---


def test_command(photos, tmp_path):
    out = str(tmp_path / "found")
    result = CliRunner().invoke(
        app, ["detect", str(photos), "--object", "screw", "--out", out, "--detector", "direct"]
    )
    assert result.exit_code == 1, result.output
    assert "not readable: broken.png" in result.output
    assert "demo model" in result.output
    assert "model: demo" in result.output
    assert len(pd.read_csv(tmp_path / "found" / "scores.csv")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--object", " "], "no name"),
        (["--object", "nut", "--model", "ViT-B-32"], "needs --pretrained"),
        (["--object", "nut", "--detector", "sdp_plus"], "needs its linear layers"),
        (["--object", "nut", "--neighbours", "alone"], "need flawless images"),
        (["--object", "nut", "--false-alarms", "0"], "not in the range"),
    ],
)
def test_wrong_usage(photos, arguments, message, tmp_path):
    result = CliRunner().invoke(
        app, ["detect", str(photos), "--out", str(tmp_path / "o"), *arguments]
    )
    assert result.exit_code == 2
    assert message in result.output
