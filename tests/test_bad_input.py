"""Bad input that no other file of tests covers: each is refused by name, or handled by a rule that stands in the code.

Data sets and images: test_datasets. Checkpoints: test_backbone, test_fine_tuning. Scores: test_metrics. Parameters of
notebooks: test_runner, test_cli. Interrupted runs and full disks: test_evaluation.
"""

import warnings

import numpy as np
import pytest
import torch
from small_data import files_of, make_folder

import clipad
from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDP, ClipSurgery, Direct
from clipad.evaluation import evaluate
from clipad.prompts import load_prompts
from clipad.winclip import WinCLIP


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data")


@pytest.fixture
def detector(tiny_backbone):
    return SDP(tiny_backbone, rvs="mean")


# --- files that are none of the data set's ---


def test_what_systems_leave_behind_is_ignored(data):
    for folder in (data.root, data.root / "bolt", data.root / "bolt" / "test" / "good"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png"):
            (folder / name).write_bytes(b"\0\1\2")
        (folder / "__MACOSX").mkdir()
    assert load_dataset("folder", data.root) == data


ODD_NAMES = ["settings", "table", "images", "parts", "面" * 70, "a[0]*", "x" * 120]


@pytest.mark.filterwarnings("ignore:.*sentences fill")
@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_categories_of_any_name_have_files_of_their_own(detector, tmp_path, name):
    data = make_folder(tmp_path / "d", categories=[name, f"{name}_"])
    result = evaluate(detector, data, tmp_path / "out", progress=False)
    before = files_of(tmp_path / "out")
    again = evaluate(detector, data, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == before
    assert list(again.table.index) == [name, f"{name}_", "mean"]
    assert again.table.equals(result.table)


# --- classes and scores ---


def test_only_anomalous_images_have_pixel_metrics_only(detector, tmp_path):
    data = make_folder(tmp_path / "d", categories=["bolt"], normal=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = evaluate(detector, data, progress=False).table
    pixel = table.columns.str.startswith("pixel")
    assert table.loc[:, pixel].notna().all().all()
    assert table.loc[:, ~pixel].isna().all().all()


def test_a_detector_that_says_the_same_of_everything_is_at_chance(detector, data, monkeypatch):
    predict = SDP.predict

    def constant(self, images, category):
        found = predict(self, images, category)
        return type(found)(torch.zeros_like(found.maps), torch.full_like(found.probabilities, 0.5))

    monkeypatch.setattr(SDP, "predict", constant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(detector, data, progress=False)
    assert (result.table[["image_auroc", "class_auroc", "pixel_auroc"]] == 0.5).all().all()
    assert (result.images["image_score"] == 0).all()


# --- models ---


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_backbone(device="gpu")


@pytest.mark.parametrize("name", ["demo", "ViT-B-16-plus-240"])
@pytest.mark.parametrize("size", [100 + 1, 4, -16])
def test_image_sizes_that_patches_do_not_fill_are_refused(name, size):
    with pytest.raises(ValueError, match=rf"image_size={size} is no multiple .* of (8|16) pixels"):
        load_backbone(name, image_size=size, device="cpu")


@pytest.mark.parametrize("kind", [Direct, SDP, ClipSurgery, WinCLIP])
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 32, 32), (1, 1, 32, 32), (0, 3, 32, 32)])
def test_images_of_another_shape_are_refused(kind, shape, tiny_backbone):
    with pytest.raises(ValueError, match="images have to be B x 3 x 32 x 32 with B >= 1, found"):
        kind(tiny_backbone).features(torch.zeros(shape))


@pytest.mark.parametrize("smoothing", [-1, np.nan, np.inf])
def test_impossible_smoothing_is_refused(smoothing, tiny_backbone):
    with pytest.raises(ValueError, match="smoothing is a sigma"):
        SDP(tiny_backbone, smoothing=smoothing)


# --- text ---


def test_one_text_is_not_taken_for_a_list_of_letters(tiny_backbone):
    with pytest.raises(ValueError, match="takes a list of sentences, none empty; found 'bolt'"):
        tiny_backbone.encode_text("bolt")


def test_a_sentence_that_is_too_long_is_cut_with_a_warning(tiny_backbone):
    with pytest.warns(
        UserWarning, match=r"1 sentences fill the 32 tokens .* cut off; the first is 'bolt bolt"
    ):
        found = tiny_backbone.encode_text(["a bolt.", "bolt " * 50])
    assert torch.isfinite(found).all()


def test_prompts_in_another_encoding_are_named(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_bytes("normal: ['schönes {}']".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.yaml: not a YAML file in UTF-8"):
        load_prompts(path)


# --- results ---


def test_a_folder_whose_settings_are_damaged_is_not_continued(detector, data, tmp_path):
    evaluate(detector, data, tmp_path / "out", progress=False)
    (tmp_path / "out" / "settings.json").write_text('{"half')
    with pytest.raises(ValueError, match=r"settings\.json is missing or damaged"):
        evaluate(detector, data, tmp_path / "out", progress=False)


@pytest.mark.parametrize("length", [0, 100, None])
def test_a_damaged_category_is_computed_again(detector, data, tmp_path, length):
    evaluate(detector, data, tmp_path / "out", progress=False)
    before = files_of(tmp_path / "out")
    path = tmp_path / "out" / "categories" / "bolt.npz"
    if length is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:length])
    evaluate(detector, data, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == before


def test_a_folder_that_cannot_be_written_stops_a_notebook_in_its_first_cell(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(
        "clipad.studies.experiments.load_backbone",
        lambda *a, **k: pytest.fail("the model was loaded"),
    )
    with pytest.raises(
        OSError, match=r"output folder .*file cannot be written .*choose another output_dir"
    ):
        clipad.experiment("notebook", output_dir=str(tmp_path / "file"))
