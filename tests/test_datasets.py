import json
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from stand_ins import counts_of, make_stand_in
from torchvision import transforms

from clipad.backbone import Backbone
from clipad.datasets import expected_counts, load_dataset
from clipad.io.images import (
    MaskSizeError,
    read_image,
    read_mask,
    require_mask_size,
)
from clipad.tools.check_data import check_dataset

SHARED = Path(os.environ.get("CLIPAD_SHARED", Path(__file__).parents[2] / "shared"))
PAPER_SETS = ("mvtec", "visa", "isic", "clinicdb", "headct", "brainmri")
FRACTION = 0.04


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Read-only stand-ins of the six data sets, by name."""
    return {
        name: make_stand_in(name, tmp_path_factory.mktemp(name), FRACTION) for name in PAPER_SETS
    }


def png(path, size=(8, 6), colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def preprocess(image, size, mean, std):
    return Backbone.preprocess(SimpleNamespace(image_size=size, mean=mean, std=std), image)


def mask_png(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 255).save(path)
    return path


@pytest.fixture
def mvtec(tmp_path):
    """A writable MVTec root with one category: one normal and two anomalous images."""
    root = tmp_path / "mvtec"
    png(root / "bottle" / "test" / "good" / "000.png", colour=(1, 1, 1))
    for number in ("000", "001"):
        png(root / "bottle" / "test" / "broken" / f"{number}.png", colour=(int(number) + 2,) * 3)
        mask_png(root / "bottle" / "ground_truth" / "broken" / f"{number}_mask.png")
    return root


@pytest.mark.parametrize("name", PAPER_SETS)
def test_stand_in_is_listed_as_written(stand_ins, name):
    dataset = load_dataset(name, stand_ins[name])
    expected = counts_of(name, FRACTION)
    assert set(dataset.categories) == set(expected)
    for category, (normal, anomalous) in expected.items():
        labels = [s.label for s in dataset.select([category])]
        assert (labels.count(0), labels.count(1)) == (normal, anomalous)
    assert dataset.has_masks == (name not in ("headct", "brainmri"))
    assert dataset.has_image_labels == (name not in ("isic", "clinicdb"))
    assert not any(s.object_mask_path for s in dataset)
    assert all((s.defect == "good") == (s.label == 0) for s in dataset)
    assert not any(
        "litter" in str(s.image_path) or s.image_path.name.startswith(".") for s in dataset
    )


@pytest.mark.parametrize("name", PAPER_SETS)
def test_every_mask_lies_on_its_own_image(stand_ins, name):
    """The stand-ins mark an anomaly with a bright rectangle, so a mask of another image would show."""
    for sample in load_dataset(name, stand_ins[name]):
        pixels = np.asarray(read_image(sample.image_path).convert("L"))
        assert (pixels.max() > 200) == bool(sample.label)
        if sample.mask_path is not None:
            square = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)
            mask = read_mask(sample.mask_path, 64)
            assert 0.03 < mask.mean() < 0.1  # a quarter of each side
            overlap = (mask & (np.asarray(square) > 165)).sum() / mask.sum()
            assert overlap > 0.9


def test_object_names_of_the_medical_sets(stand_ins):
    names = {name: load_dataset(name, stand_ins[name]).categories for name in PAPER_SETS}
    assert names["headct"] == ("head ct",)
    assert names["brainmri"] == ("brain ct",)
    assert names["isic"] == ("skin",)
    assert names["clinicdb"] == ("colon",)
    assert "metal_nut" in names["mvtec"]
    assert "pipe_fryum" in names["visa"]


def test_listing_is_sorted_and_repeatable(stand_ins):
    first, second = (load_dataset("mvtec", stand_ins["mvtec"]) for _ in range(2))
    assert first == second
    assert list(first.categories) == sorted(expected_counts("mvtec"))
    paths = [s.image_path for s in first]
    assert paths == sorted(paths)


def test_visa_takes_the_test_split_only(stand_ins):
    root = stand_ins["visa"]
    listed = {s.image_path for s in load_dataset("visa", root)}
    on_disk = {p for p in root.rglob("*.JPG")}
    assert listed < on_disk
    assert len(on_disk - listed) == 12  # one training image per category


def test_brainmri_ignores_the_second_copy_in_the_archive(stand_ins):
    root = stand_ins["brainmri"]
    assert (root / "yes").is_dir()
    assert (root / "brain_tumor_dataset" / "yes").is_dir()
    dataset = load_dataset("brainmri", root)
    assert all("brain_tumor_dataset" in s.image_path.parts for s in dataset)


def test_a_list_that_does_not_fit_is_named(tmp_path):
    root = make_stand_in("headct", tmp_path, 0.02)
    labels = root / "labels.csv"
    text = labels.read_text()
    labels.write_text(text + "77,1\n")
    with pytest.raises(FileNotFoundError, match=r"077\.png is missing"):
        load_dataset("headct", root)
    labels.write_text(text.replace("0,1", "0,yes"))
    with pytest.raises(ValueError, match=r"not as expected, labels\.csv \(id, hemorrhage\).*'yes'"):
        load_dataset("headct", root)
    labels.write_text(text.replace("hemorrhage", "bleeding"))
    with pytest.raises(ValueError, match=r"\(id, hemorrhage\).*'hemorrhage'"):
        load_dataset("headct", root)


def test_wrong_layout_says_what_was_expected_and_found(stand_ins):
    with pytest.raises(ValueError, match=r"Expected Original/N.tif.*found .*bottle"):
        load_dataset("clinicdb", stand_ins["mvtec"])


def test_unknown_names_get_the_nearest_one(mvtec):
    with pytest.raises(ValueError, match="did you mean 'clinicdb'"):
        load_dataset("CVC-ClinicDB", mvtec)
    with pytest.raises(ValueError, match="did you mean 'bottle'"):
        load_dataset("mvtec", mvtec, categories=["botle"])
    with pytest.raises(ValueError, match=r"data/README\.md"):
        load_dataset("mvtec")


def test_missing_empty_and_file_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset("visa", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="an empty folder"):
        load_dataset("visa", tmp_path)
    with pytest.raises(ValueError, match="an empty folder"):
        load_dataset("folder", tmp_path)
    (tmp_path / "visa.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="unpack"):
        load_dataset("visa", tmp_path / "visa.zip")


def test_categories_select_in_the_order_given(stand_ins):
    dataset = load_dataset("mvtec", stand_ins["mvtec"], categories=["screw", "bottle", "screw"])
    assert dataset.categories == ("screw", "bottle")
    assert [s.category for s in dataset][:1] == ["screw"]
    assert load_dataset("mvtec", stand_ins["mvtec"], categories=[]).categories == tuple(
        sorted(expected_counts("mvtec"))
    )
    assert dataset.select("bottle").categories == ("bottle",)


def test_missing_mask_is_named(mvtec):
    missing = mvtec / "bottle" / "ground_truth" / "broken" / "000_mask.png"
    missing.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"000_mask\.png, the mask of .*000\.png, is missing"
    ):
        load_dataset("mvtec", mvtec)


def test_masks_pair_by_stem_not_by_position(mvtec):
    folder = mvtec / "bottle" / "ground_truth" / "broken"
    mask_png(
        folder / "0000_mask.png"
    )  # an orphan that comes first would shift a pairing by position
    for sample in load_dataset("mvtec", mvtec):
        if sample.mask_path:
            assert sample.mask_path.stem == f"{sample.image_path.stem}_mask"


@pytest.mark.parametrize("name", ["label", "masks", "gt"])
def test_a_product_may_be_called_as_a_folder_of_masks(tmp_path, name):
    for product in (name, "screw"):
        png(tmp_path / product / "test" / "good" / "0.png")
        png(tmp_path / product / "test" / "bad" / "0.png")
    assert set(load_dataset("folder", tmp_path).categories) == {name, "screw"}


def test_a_linked_product_is_a_product(tmp_path):
    for part in ("good", "bad"):
        png(tmp_path / "metal_nut" / "test" / part / "0.png")
    (tmp_path / "metal nut").symlink_to(tmp_path / "metal_nut", target_is_directory=True)
    assert load_dataset("folder", tmp_path).categories == ("metal nut", "metal_nut")


def test_two_folders_of_one_name_are_asked_about(tmp_path):
    for part in ("good", "Good", "bad"):
        png(tmp_path / "nut" / "test" / part / "0.png")
    with pytest.raises(ValueError, match="which one holds flawless images"):
        load_dataset("folder", tmp_path / "nut")


def test_a_known_data_set_without_its_ground_truth_is_refused(mvtec):
    (mvtec / "bottle" / "ground_truth").rename(mvtec / "bottle" / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"_mask\.png, the mask of .*, is missing"):
        load_dataset("mvtec", mvtec)


@pytest.mark.parametrize("part", ["test/broken/000.png", "ground_truth/broken/000_mask.png"])
def test_links_that_lead_outside_are_refused(mvtec, tmp_path, part):
    inside = mvtec / "bottle" / part
    outside = tmp_path / "secret.png"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(
        ValueError, match=rf"{inside.name} leads to .*secret\.png, outside the root"
    ):
        load_dataset("mvtec", mvtec)


def test_linked_folder_that_leads_outside_is_refused(mvtec, tmp_path):
    (mvtec / "bottle" / "test").rename(tmp_path / "elsewhere")
    (mvtec / "bottle" / "test").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ValueError, match="outside the root"):
        load_dataset("mvtec", mvtec)


def test_links_inside_and_a_linked_root_are_fine(mvtec, tmp_path):
    (mvtec / "bottle" / "test" / "good" / "001.png").symlink_to(
        mvtec / "bottle" / "test" / "good" / "000.png"
    )
    (tmp_path / "link").symlink_to(mvtec, target_is_directory=True)
    assert len(load_dataset("mvtec", tmp_path / "link")) == 4


def test_broken_and_circular_links_are_named(mvtec):
    link = mvtec / "bottle" / "test" / "good" / "loop.png"
    link.symlink_to(link)
    with pytest.raises(FileNotFoundError, match=r"loop\.png is a broken link"):
        load_dataset("mvtec", mvtec)
    link.unlink()
    link.symlink_to(mvtec / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"loop\.png is a broken link"):
        load_dataset("mvtec", mvtec)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "candle/../../secret.png"])
def test_paths_in_a_list_that_lead_outside_are_refused(tmp_path, path):
    root = make_stand_in("visa", tmp_path / "visa", 0.01)
    png(tmp_path / "secret.png")
    table = root / "split_csv" / "1cls.csv"
    table.write_text(table.read_text().replace("candle/Data/Images/Normal/0000.JPG", path))
    with pytest.raises(ValueError, match="outside the root"):
        load_dataset("visa", root)


def test_visa_categories_that_were_not_unpacked_are_left_out(tmp_path):
    root = make_stand_in("visa", tmp_path, 0.01)
    (root / "candle").rename(tmp_path.parent / "moved_away")
    assert "candle" not in load_dataset("visa", root).categories
    (root / "pcb1" / "Data" / "Images" / "Normal" / "0000.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"pcb1.*0000\.JPG is missing"):
        load_dataset("visa", root)


def test_folder_in_mvtec_layout_takes_any_category(tmp_path):
    name = "Schräubchen größer 5 mm"
    root = tmp_path / "eigene Daten"
    folder = root / unicodedata.normalize("NFD", name)  # as macOS writes it
    png(folder / "test" / "good" / "ä 1.png")
    png(folder / "test" / "Riß" / "ö 2.png")
    mask_png(folder / "ground_truth" / "Riß" / "ö 2.png")  # a mask named like its image
    mask_png(folder / "object" / "Riß" / "ö 2_object.png")
    mask_png(folder / "object" / "good" / "ä 1_object.png")
    dataset = load_dataset("folder", root, categories=[name])
    assert dataset.categories == (name,)
    assert dataset.has_masks
    assert all(s.object_mask_path for s in dataset)
    assert dataset.has_image_labels
    assert read_mask(next(s.mask_path for s in dataset if s.label), 4).all()


def test_folder_without_masks(tmp_path):
    png(tmp_path / "nuts" / "test" / "good" / "0.png")
    png(tmp_path / "nuts" / "test" / "bent" / "0.png")
    dataset = load_dataset("folder", tmp_path)
    assert [(s.category, s.label, s.defect) for s in dataset] == [
        ("nuts", 1, "bent"),
        ("nuts", 0, "good"),
    ]
    assert dataset.has_image_labels
    assert not dataset.has_masks
    # Some masks but not all: the missing one would silently count as "no anomalous pixel".
    (tmp_path / "nuts" / "ground_truth").mkdir()
    with pytest.raises(FileNotFoundError, match=r"0_mask\.png, the mask of .*0\.png, is missing"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize(
    ("names", "given", "normal"),
    [
        (("OK", "ko"), "", "OK"),
        (("good", "bent", "cut"), "", "good"),
        (("yes", "no"), "YES", "yes"),
        (("yes", "no"), "no", "no"),
        (("good", "nominal"), "nominal", "nominal"),
        (("yes", "no"), "none", None),
    ],
)
@pytest.mark.parametrize("parent", ["", "nuts/test"])
def test_folder_of_sub_folders_with_a_normal_one(tmp_path, names, given, normal, parent):
    for name in names:
        png(tmp_path / parent / name / "0.png")
    dataset = load_dataset("folder", tmp_path, normal_folder=given)
    assert {s.image_path.parent.name: s.label for s in dataset} == {
        n: int(n != normal) for n in names
    }
    assert dataset.categories == ("nuts" if parent else tmp_path.name,)


@pytest.mark.parametrize(
    "names",
    [
        ("yes", "no"),
        ("ok_front", "def_front"),
        ("healthy", "sick"),
        ("good", "ok"),
        ("pass", "fail"),
    ],
)
@pytest.mark.parametrize("parent", ["", "nuts/test"])
def test_labels_are_asked_for_where_names_do_not_say_them(tmp_path, names, parent):
    for name in names:
        png(tmp_path / parent / name / "0.png")
    with pytest.raises(ValueError, match=rf"{sorted(names)[0]}, .*which one .* normal_folder=NAME"):
        load_dataset("folder", tmp_path)
    with pytest.raises(ValueError, match="no folder 'flawless'"):
        load_dataset("folder", tmp_path, normal_folder="flawless")
    with pytest.raises(ValueError, match="normal_folder is for data set 'folder'"):
        load_dataset("mvtec", tmp_path, normal_folder="yes")


def test_a_folder_without_defects_or_without_flawless_images(tmp_path):
    png(tmp_path / "a" / "good" / "0.png")
    assert [s.label for s in load_dataset("folder", tmp_path)] == [0]
    png(tmp_path / "b" / "test" / "bent" / "0.png")
    with pytest.raises(ValueError, match="which one holds flawless images"):
        load_dataset("folder", tmp_path)
    dataset = load_dataset("folder", tmp_path / "b", normal_folder="none")
    assert [(s.label, s.category) for s in dataset] == [(1, "b")]


def test_a_category_without_the_named_normal_folder_is_anomalous(tmp_path):
    for folder in ("a/test/flawless", "a/test/bent", "b/test/cut"):
        png(tmp_path / folder / "0.png")
    dataset = load_dataset("folder", tmp_path, normal_folder="Flawless")
    found = {(s.category, s.defect): s.label for s in dataset}
    assert found == {("a", "good"): 0, ("a", "bent"): 1, ("b", "cut"): 1}


def test_masks_among_the_images_are_left_out(tmp_path):
    png(tmp_path / "good" / "0.jpg")
    png(tmp_path / "bent" / "1.jpg")
    mask_png(tmp_path / "bent" / "1.png")
    mask_png(tmp_path / "bent" / "1_mask.png")
    mask_png(tmp_path / "Masks" / "1.png")
    assert [s.image_path.name for s in load_dataset("folder", tmp_path)] == ["1.jpg", "0.jpg"]
    notes = "\n".join(check_dataset("folder", tmp_path, progress=False).notes)
    assert "beside a photograph of the same name, so a mask or copy: 2" in notes
    assert "in a folder of masks: 1 (Masks/1.png)" in notes


def test_a_stray_picture_does_not_hide_the_others(tmp_path):
    png(tmp_path / "stray.png")
    for number in range(2):
        png(tmp_path / "line 1" / "camera 2" / f"{number}.png")
    with pytest.raises(ValueError, match="only 1 of the 3 images"):
        load_dataset("folder", tmp_path)


def test_mvtec_ad_2_is_read_by_its_public_test(tmp_path):
    for part in ("train/good", "validation/good", "test_private", "test_private_mixed"):
        for number in range(5):
            png(tmp_path / "can" / part / f"{number}.png")
    png(tmp_path / "can" / "test_public" / "good" / "000_regular.png")
    png(tmp_path / "can" / "test_public" / "bad" / "000_regular.png")
    truth = tmp_path / "can" / "test_public" / "ground_truth" / "bad"
    mask = mask_png(truth / "000_regular_mask.png")
    dataset = load_dataset("folder", tmp_path)
    assert dataset.categories == ("can",)
    assert [(s.label, s.mask_path) for s in dataset] == [(1, mask), (0, None)]
    with pytest.raises(ValueError, match="dataset='folder'"):
        load_dataset("mvtec", tmp_path)


def test_mvtec_loco_with_its_folders_of_masks_is_refused(tmp_path):
    for kind in ("good", "logical_anomalies"):
        png(tmp_path / "box" / "test" / kind / "000.png")
    mask_png(tmp_path / "box" / "ground_truth" / "logical_anomalies" / "000" / "000.png")
    with pytest.raises(FileNotFoundError, match=r"000_mask\.png, the mask of .* is missing"):
        load_dataset("folder", tmp_path)


def test_visa_as_its_own_script_converts_it(tmp_path):
    png(tmp_path / "candle" / "test" / "good" / "0.png")
    png(tmp_path / "candle" / "test" / "bad" / "1.png")
    mask = mask_png(tmp_path / "candle" / "ground_truth" / "bad" / "1.png")
    dataset = load_dataset("visa", tmp_path)
    assert [(s.category, s.label, s.mask_path) for s in dataset] == [
        ("candle", 1, mask),
        ("candle", 0, None),
    ]


def test_names_that_tables_cannot_hold_are_refused(tmp_path):
    png(tmp_path / "a" / "mean" / "0.png")
    with pytest.raises(ValueError, match="a category cannot be called 'mean'"):
        load_dataset("folder", tmp_path / "a")
    os.rename(
        png(tmp_path / "b" / "0.png"), os.path.join(os.fsencode(tmp_path / "b"), b"caf\xe9.png")
    )
    with pytest.raises(ValueError, match="not UTF-8"):
        load_dataset("folder", tmp_path / "b")


def test_other_data_does_not_run_under_the_demo_s_name(tmp_path):
    png(tmp_path / "nuts" / "test" / "good" / "0.png")
    with pytest.raises(ValueError, match="dataset='folder'"):
        load_dataset("demo", tmp_path)


def test_pipes_are_never_opened(tmp_path):
    png(tmp_path / "a" / "0.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert len(load_dataset("folder", tmp_path)) == 1


def test_folder_never_guesses_labels(tmp_path):
    png(tmp_path / "nuts" / "0.png")
    png(tmp_path / "bolts" / "0.png")
    dataset = load_dataset("folder", tmp_path)
    assert dataset.categories == ("bolts", "nuts")
    assert {(s.label, s.defect) for s in dataset} == {(-1, "unknown")}
    assert not dataset.has_image_labels
    assert not dataset.has_masks
    flat = load_dataset("folder", tmp_path / "nuts")
    assert flat.categories == ("nuts",)
    assert len(flat) == 1


def test_folder_refuses_images_beside_labelled_sub_folders(tmp_path):
    png(tmp_path / "good" / "0.png")
    png(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"holds images \(1\.png, \.\.\.\) beside sub-folders"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_l_or_rgb_before_the_resize(tmp_path, mode):
    noise = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    original = Image.fromarray(noise).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    original.save(path)
    image = read_image(path)
    assert image.mode == (mode if mode in ("L", "RGB") else "RGB")
    assert image.size == (34, 21)
    np.testing.assert_array_equal(
        np.asarray(image.convert("RGB")), np.asarray(original.convert("RGB"))
    )
    # The order matters: converting after the resize gives a palette image nearest-neighbour pixels.
    expected = original.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    tensor = preprocess(original, 16, [0, 0, 0], [1, 1, 1])
    if mode != "L":  # L is resized as it is
        np.testing.assert_array_equal(
            (tensor * 255).round().numpy(), np.asarray(expected).transpose(2, 0, 1)
        )


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "x.png", transparency=bytes([255, 0]))
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (200, 100, 50)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], np.round(values * (255 / 65535)))


@pytest.mark.parametrize("values", [np.ones((3, 3), np.float32), np.full((3, 3), 70000, np.int32)])
def test_pixels_without_a_defined_scale_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(OSError, match=r"x\.tif: the pixels are"):
        read_image(tmp_path / "x.tif")


def test_preprocessing_squashes_as_the_released_program_did():
    """Against torchvision's transforms: both sides to S, bicubic, no crop."""
    noise = np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    reference = transforms.Compose(
        [
            transforms.Resize((24, 24), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )(Image.fromarray(noise))
    tensor = preprocess(Image.fromarray(noise), 24, mean, std)
    assert tensor.shape == (3, 24, 24)
    assert (tensor - reference).abs().max() < 1e-6


def test_mask_is_binarised_at_native_size_then_resized(tmp_path):
    # Class index 1 of 255: resizing before binarising would lose it.
    classes = np.zeros((40, 60), np.uint8)
    classes[8:30, 10:40] = 1
    Image.fromarray(classes).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", 24)
    binary = Image.fromarray((classes > 0).astype(np.uint8) * 255)
    reference = transforms.ToTensor()(transforms.Resize((24, 24))(binary))[0].numpy()
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, reference > 0.5)
    assert 0 < mask.mean() < 1


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA"])
def test_masks_of_any_mode(tmp_path, mode):
    binary = np.zeros((16, 16), bool)
    binary[:, 8:] = True
    if mode == "I;16":
        image = Image.fromarray(binary.astype(np.uint16))  # value 1 of 65535
    elif mode == "P":
        image = Image.new("P", (16, 16))
        image.putdata(binary.ravel().astype(int).tolist())
        image.putpalette([0, 0, 0, 0, 0, 1])  # the darkest blue: its grey value rounds to 0
    else:
        image = Image.fromarray(binary.astype(np.uint8) * 255).convert(mode)
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 16), binary)


def test_mask_of_another_size_names_both(tmp_path):
    path = mask_png(tmp_path / "m.png", (8, 6))
    with pytest.raises(MaskSizeError, match=r"m\.png has 8 x 6 pixels, its image i.png 6 x 8"):
        require_mask_size(path, png(tmp_path / "i.png", (6, 8)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_ignored_for_image_and_mask(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    stored = np.zeros((16, 32), np.uint8)
    stored[:, :16] = 255
    Image.fromarray(stored).save(
        tmp_path / f"x.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.size == (32, 16)
    np.testing.assert_array_equal(np.asarray(image.convert("L")) > 128, stored > 128)
    if suffix != "jpg":
        np.testing.assert_array_equal(read_mask(tmp_path / f"x.{suffix}", 16)[:, :8], True)


def test_content_decides_not_the_suffix(tmp_path):
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "x.jpg", format="PNG")
    assert read_image(tmp_path / "x.jpg").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_truncated_files_are_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=rf"cut\.{suffix}"):
        read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]
)
def test_non_images_are_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(OSError, match=r"x\.png"):
        read_image(tmp_path / "x.png")
    with pytest.raises(OSError, match=r"x\.png"):
        read_mask(tmp_path / "x.png", 4)


@pytest.mark.parametrize("kind", ["GIF", "EPS", "PPM"])
def test_other_formats_stay_closed(tmp_path, kind):
    """Pillow would hand an EPS file to a PostScript interpreter, whatever its suffix."""
    Image.new("RGB", (5, 5)).save(tmp_path / "x.png", format=kind)
    with pytest.raises(OSError, match=r"x\.png.*Expected a complete PNG, JPEG, BMP, TIFF, WEBP"):
        read_image(tmp_path / "x.png")


def test_missing_file_stays_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.png"):
        read_image(tmp_path / "x.png")


def bomb(path, width, height):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8001, 8000), (60000, 60000)])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, size):
    bomb(tmp_path / "bomb.png", *size)
    for read in (read_image, read_mask, lambda path: require_mask_size(path, path)):
        with pytest.raises(OSError, match=r"bomb\.png.*at most 64,000,000"):
            read(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", PAPER_SETS)
def test_check_reads_all_and_misses_what_the_fraction_left_out(stand_ins, name):
    report = check_dataset(name, stand_ins[name])
    assert not report.ok
    assert all("expected" in problem for problem in report.problems)
    assert len(report.problems) == len(expected_counts(name))
    table = report.table.set_index("category")
    assert list(table.index) == list(expected_counts(name))
    assert not table["faults"].any()


@pytest.mark.parametrize("name", ["headct", "brainmri"])
def test_check_of_a_complete_stand_in_is_ok(tmp_path, name):
    report = check_dataset(name, make_stand_in(name, tmp_path, width=16))
    assert report.ok, report.problems
    assert report.table["duplicates"].sum() == (25 if name == "brainmri" else 0)
    assert str(report).endswith("ok")


def test_check_collects_every_problem(mvtec):
    broken = mvtec / "bottle" / "test" / "broken"
    truth = mvtec / "bottle" / "ground_truth" / "broken"
    for number in range(2, 8):
        png(broken / f"{number:03d}.png", size=(60, 60), colour=(number + 9,) * 3)
        mask_png(truth / f"{number:03d}_mask.png", size=(60, 60))
    (broken / "002.png").write_bytes(b"no image")
    (truth / "003_mask.png").unlink()
    mask_png(truth / "004_mask.png", size=(60, 59))
    (truth / "005_mask.png").write_bytes(b"no image")
    Image.new("L", (60, 60), 0).save(truth / "006_mask.png")
    (broken / "008.png").symlink_to("/etc/hostname")
    png(mvtec / "bottle" / "test" / "good" / "001.png", colour=(1, 1, 1))  # a copy of 000.png
    report = check_dataset("mvtec", mvtec)
    row = report.table.set_index("category").loc["bottle"]
    assert (row["faults"], row["duplicates"]) == (7, 1)
    text = "\n".join(report.problems)
    for part in (
        "002.png",
        "is missing",
        "60 x 59",
        "005_mask.png",
        "006_mask.png has no pixel",
        "outside the root",
    ):
        assert part in text
    assert "bottle: found 2 normal + 9 anomalous images, expected 20 + 63" in text
    assert "zipper: found 0 normal + 0" in text
    assert "PROBLEM" in str(report)


def test_check_says_what_is_left_out(tmp_path):
    png(tmp_path / "a.jpg")
    (tmp_path / "photo.heic").write_bytes(b"x")
    png(tmp_path / "deep" / "deeper" / "c.png")
    report = check_dataset("folder", tmp_path)
    assert report.ok, report.problems
    notes = "\n".join(report.notes)
    assert "no layout takes: 1 (deep/deeper/c.png)" in notes
    assert "in a format that is not read (.heic)" in notes
    assert report.table["unlabelled"].tolist() == [1]


def test_check_of_data_without_a_usable_image(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "0.png").symlink_to(tmp_path / "gone.png")
    report = check_dataset("folder", tmp_path, progress=False)
    assert report.table["faults"].tolist() == [1]
    assert "broken link" in str(report)


def test_check_looks_at_the_masks(mvtec):
    report = check_dataset("mvtec", mvtec, progress=False)
    row = report.table.set_index("category").loc["bottle"]
    assert row["masks"] == 2
    assert row["anomalous_pixels"] > 0.9
    assert "the wrong way round" in "\n".join(report.problems)


@pytest.mark.parametrize("name", ["demo", "demo_aux"])
def test_shipped_collections(name):
    dataset = load_dataset(name)
    assert dataset.has_masks
    assert all(s.object_mask_path for s in dataset)
    assert dataset.has_image_labels
    report = check_dataset(name)
    assert report.ok, report.problems
    other = load_dataset("demo_aux" if name == "demo" else "demo")
    assert not set(dataset.categories) & set(other.categories)


@pytest.mark.parametrize(
    ("name", "normal", "anomalous"), [("headct", 100, 100), ("brainmri", 98, 155)]
)
def test_real_data_sets(name, normal, anomalous):
    root = SHARED / "data" / name
    if not root.is_dir():
        pytest.skip(f"{root} is absent")
    dataset = load_dataset(name, root)
    assert [s.label for s in dataset].count(0) == normal
    assert [s.label for s in dataset].count(1) == anomalous
    report = check_dataset(name, root)
    assert report.ok, report.problems
    assert report.table["duplicates"].tolist() == [25 if name == "brainmri" else 0]


def test_what_would_be_lost_or_chosen_without_a_word_is_refused(tmp_path):
    """A misspelt category, two masks for one image."""
    root = tmp_path / "mvtec"
    for place in ("bottle/test/good/000.png", "bottle/test/cut/000.png"):
        png(root / place)
    for name in ("000_mask.png", "000.png"):
        mask_png(root / "bottle/ground_truth/cut" / name)
    with pytest.raises(ValueError, match="two masks"):
        load_dataset("mvtec", root)
    (root / "bottle/ground_truth/cut/000.png").unlink()
    shutil.copytree(root / "bottle", root / "screww")
    with pytest.raises(ValueError, match=r"screww.*'screw'"):
        load_dataset("mvtec", root)


@pytest.mark.parametrize("place", ["train/good", "masks", "object/cut"])
def test_a_folder_of_other_images_is_not_taken_for_a_category(tmp_path, place):
    png(tmp_path / place / "0.png")
    with pytest.raises(ValueError, match="no test images"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("name", PAPER_SETS)
def test_root_may_be_the_folder_above(stand_ins, name):
    root = stand_ins[name]
    shallow = root.parent / f"above_{name}"
    shallow.mkdir(exist_ok=True)
    link = shallow / "data_set"
    if not link.exists():
        link.symlink_to(root, target_is_directory=True)
    assert len(load_dataset(name, shallow)) == len(load_dataset(name, root))


@pytest.mark.parametrize("asked", PAPER_SETS)
def test_wrong_layout_says_which_data_set_it_is(stand_ins, asked):
    for other in PAPER_SETS:
        if other != asked:
            with pytest.raises(ValueError, match=f"layout for dataset='{other}'"):
                load_dataset(asked, stand_ins[other])


def test_lists_of_the_field_are_read(tmp_path):
    png(tmp_path / "a" / "1.png")
    png(tmp_path / "a" / "2.png")
    mask = mask_png(tmp_path / "m" / "2.png")
    row = {
        "cls_name": "nut",
        "specie_name": "bent",
        "anomaly": 1,
        "img_path": "a/2.png",
        "mask_path": "m/2.png",
    }
    flawless = row | {"anomaly": 0, "specie_name": "good", "img_path": "a/1.png", "mask_path": ""}
    listed = tmp_path / "meta.json"
    listed.write_text(json.dumps({"train": {}, "test": {"nut": [row, flawless]}}))
    dataset = load_dataset("folder", tmp_path)
    assert [(s.category, s.label, s.defect, s.mask_path) for s in dataset] == [
        ("nut", 0, "good", None),
        ("nut", 1, "bent", mask),
    ]
    listed.write_text(json.dumps({"test": {"nut": [{"file": "a/1.png"}]}}))
    with pytest.raises(ValueError, match=r"meta\.json.*anomaly"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".png"])
def test_a_mask_of_another_format_is_no_photograph(tmp_path, suffix):
    for name in ("good", "bad"):
        png(tmp_path / name / "a.png").rename(tmp_path / name / "a.jpg")
    mask_png(tmp_path / "bad" / "m.png").rename(tmp_path / "bad" / f"a{suffix}")
    assert [s.image_path.name for s in load_dataset("folder", tmp_path)] == ["a.jpg", "a.jpg"]
