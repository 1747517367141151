import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import files_of, make_folder

from clipad.datasets import load_dataset
from clipad.detectors import SDP, Direct
from clipad.evaluation import (
    COLUMNS,
    PART,
    batches,
    evaluate,
    fingerprint,
    in_parts,
    predict,
    published_image_score,
)
from clipad.winclip import WinCLIP


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data")


@pytest.fixture
def detector(tiny_backbone):
    return SDP(tiny_backbone, rvs="mean")


def test_table_and_images(detector, data):
    result = evaluate(detector, data, progress=False)
    assert list(result.table.index) == ["bolt", "câble noir", "mean"]
    assert list(result.table.columns) == COLUMNS
    assert result.table.notna().all().all()
    np.testing.assert_allclose(result.table.loc["mean"], result.table.iloc[:2].mean())
    assert set(result.images.columns) >= {
        "category",
        "path",
        "label",
        "probability",
        "map_max",
        "image_score",
    }
    assert len(result.images) == len(data)


def test_a_detector_says_whether_its_image_score_uses_the_map(detector, data):
    with_map = evaluate(detector, data, progress=False)
    assert not with_map.table["image_auroc"].equals(with_map.table["class_auroc"])
    without = evaluate(WinCLIP(detector.backbone), data, progress=False)
    np.testing.assert_array_equal(without.images["image_score"], without.images["probability"])
    for metric in ("auroc", "f1_max", "ap"):
        assert without.table[f"image_{metric}"].equals(without.table[f"class_{metric}"])


def test_batch_sizes_give_the_same_scores(detector, data):
    tables = [evaluate(detector, data, batch_size=b, progress=False) for b in (1, 3, 16)]
    for other in tables[1:]:
        for column in ("probability", "map_max", "image_score"):
            np.testing.assert_allclose(other.images[column], tables[0].images[column], atol=1e-5)


def test_two_runs_give_the_same_bytes(detector, data, tmp_path):
    for name in ("a", "b"):
        evaluate(detector, data, tmp_path / name, progress=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not any("part" in name for name in files_of(tmp_path / "a"))


def test_memory_and_disk_give_the_same_result(detector, data, tmp_path):
    kept, loose = (
        evaluate(detector, data, tmp_path / "out", progress=False),
        evaluate(detector, data, progress=False),
    )
    np.testing.assert_array_equal(kept.table.to_numpy(), loose.table.to_numpy())
    np.testing.assert_array_equal(kept.images["image_score"], loose.images["image_score"])


def test_a_failed_run_continues_without_computing_again(detector, data, tmp_path, monkeypatch):
    expected = evaluate(detector, data, tmp_path / "whole", progress=False)
    calls = []
    predict = type(detector).predict

    def counted(self, images, category):
        calls.append(category)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, images, category)

    monkeypatch.setattr(type(detector), "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(detector, data, tmp_path / "cut", progress=False)
    found = evaluate(detector, data, tmp_path / "cut", progress=False)
    assert calls == ["bolt", "câble noir", "câble noir"]
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert found.table.equals(expected.table)


KILLED = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import clipad, clipad.evaluation
    from conftest import tiny_clip
    import open_clip
    from clipad.backbone import Backbone
    clipad.evaluation.PART = 4
    backbone = Backbone(tiny_clip(), open_clip.SimpleTokenizer(context_length=32), name="tiny", pretrained="random",
                        mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    detector = clipad.SDP(backbone, rvs="mean")
    slow = detector.predict
    def predict(images, category):
        time.sleep({delay})
        print("batch", flush=True)
        return slow(images, category)
    detector.predict = predict
    clipad.evaluate(detector, clipad.load_dataset("folder", {data!r}), {out!r}, batch_size=2, progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_finished_and_ends_with_the_same_bytes(data, tmp_path):
    def start(out, delay):
        code = textwrap.dedent(KILLED).format(
            tests=str(Path(__file__).parent),
            data=str(data.root),
            out=str(tmp_path / out),
            delay=delay,
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    whole = start("whole", 0)
    batches = len(whole.communicate()[0].splitlines())
    assert whole.returncode == 0
    cut = start("cut", 0.05)
    for _ in range(3):
        cut.stdout.readline()
    os.kill(cut.pid, signal.SIGKILL)
    cut.communicate()
    again = start("cut", 0)
    left = len(again.communicate()[0].splitlines())
    assert again.returncode == 0
    assert left < batches
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_results_of_unknown_settings_are_not_taken(detector, data, tmp_path):
    evaluate(detector, data, tmp_path, progress=False)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"missing or damaged.*choose another output_dir"):
        evaluate(detector, data, tmp_path, progress=False)


def test_other_settings_do_not_mix(detector, data, tmp_path):
    evaluate(detector, data, tmp_path, progress=False)
    with pytest.raises(ValueError, match="smoothing"):
        evaluate(SDP(detector.backbone, rvs="mean", smoothing=3), data, tmp_path, progress=False)
    with pytest.raises(ValueError, match="samples"):
        evaluate(detector, data.select(["bolt"]), tmp_path, progress=False)


@pytest.mark.parametrize("kind", ["ground_truth", "test"])
def test_files_changed_in_place_are_other_data(data, kind):
    before = fingerprint(data)
    path = next(data.root.rglob(f"{kind}/dent/*.png"))
    pixels = np.asarray(Image.open(path))
    Image.fromarray(np.ascontiguousarray(pixels[::-1])).save(path)
    assert fingerprint(load_dataset("folder", data.root)) != before


def test_corrected_masks_do_not_leave_old_metrics(detector, data, tmp_path):
    evaluate(detector, data, tmp_path / "a", progress=False)
    for path in data.root.rglob("*_mask.png"):
        Image.fromarray(np.ascontiguousarray(np.asarray(Image.open(path))[::-1])).save(path)
    with pytest.raises(ValueError, match="samples"):
        evaluate(detector, load_dataset("folder", data.root), tmp_path / "a", progress=False)


def test_an_output_folder_that_cannot_be_written_is_noticed_first(
    detector, data, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(type(detector), "predict", lambda *a: pytest.fail("work started"))
    with pytest.raises(OSError):  # noqa: PT011  (which one depends on the system)
        evaluate(detector, data, blocked / "out", progress=False)


def test_a_full_disk_leaves_no_half_file(detector, data, tmp_path, monkeypatch):
    import clipad.io.files

    def full(*_):
        raise OSError(28, "No space left on device")

    evaluate(detector, data.select(["bolt"]), tmp_path / "before", progress=False)
    monkeypatch.setattr(clipad.io.files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(detector, data, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == {}


def test_a_broken_image_is_named_and_the_rest_is_kept(detector, data, tmp_path, monkeypatch):
    # A photograph that breaks off: its header is fine, so only decoding it can tell.
    path = data.root / "câble noir" / "test" / "dent" / "002.png"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(OSError, match=r"002\.png"):
        evaluate(detector, data, tmp_path / "out", progress=False)
    calls, predict = [], type(detector).predict
    monkeypatch.setattr(
        type(detector), "predict", lambda self, x, c: calls.append(c) or predict(self, x, c)
    )
    with pytest.raises(OSError, match=r"002\.png"):
        evaluate(detector, data, tmp_path / "out", batch_size=2, progress=False)
    assert "bolt" not in calls


def test_only_normal_images_have_no_metrics(detector, tmp_path):
    data = make_folder(tmp_path / "d", categories=["bolt"], anomalous=0)
    table = evaluate(detector, data, progress=False).table
    assert table.isna().all().all()


def test_not_finite_maps_are_refused(detector, data, monkeypatch):
    bad = SDP.predict

    def predict(self, images, category):
        prediction = bad(self, images, category)
        prediction.maps[0, 0, 0] = torch.nan
        return prediction

    monkeypatch.setattr(SDP, "predict", predict)
    with pytest.raises(ValueError, match=r"finite.*bolt"):
        evaluate(detector, data, progress=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_the_batch(detector, data, error):
    samples = [data[0]] * 5
    expected, sizes = predict(detector, samples), []
    real = detector.predict

    def small(images, category):
        sizes.append(len(images))
        if len(images) > 2:
            raise error
        return real(images, category)

    detector.predict = small
    found = predict(detector, samples)
    assert sizes[0] == 5
    assert max(sizes[-2:]) <= 2
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_other_errors_and_one_image_too_much_are_raised():
    calls = []

    def fails(images):
        calls.append(len(images))
        raise RuntimeError("shapes do not fit" if len(images) > 1 else "CUDNN_STATUS_ALLOC_FAILED")

    for count in (4, 1):
        with pytest.raises(RuntimeError):
            in_parts(fails, torch.zeros(count, 3))
    assert calls == [4, 1]


def test_a_batch_is_of_one_category_and_in_order(tiny_backbone, data):
    found = [(c, len(images)) for c, images in batches(tiny_backbone, data, batch_size=5)]
    assert found == [("bolt", 5), ("bolt", 2), ("câble noir", 5), ("câble noir", 2)]


def test_constant_scores_and_one_image_do_not_divide_by_zero():
    assert published_image_score([0.3], [0.7]).tolist() == [0.0]
    assert published_image_score([0.5, 0.5], [1.0, 2.0]).tolist() == [0.0, 1.0]


def test_a_mask_of_another_size_stops_the_run_before_it_starts(detector, data, monkeypatch):
    Image.new("L", (7, 9)).save(data.root / "bolt" / "ground_truth" / "dent" / "001_mask.png")
    monkeypatch.setattr(type(detector), "predict", lambda *a: pytest.fail("work started"))
    with pytest.raises(ValueError, match=r"001_mask\.png has 7 x 9"):
        evaluate(detector, data, progress=False)


def test_a_damaged_part_is_computed_again(detector, data, tmp_path, monkeypatch):
    evaluate(detector, data, tmp_path / "whole", progress=False)
    monkeypatch.setattr("clipad.evaluation.PART", 4)
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "bolt-000000.npz").write_bytes(b"half a file")
    shutil.copy(tmp_path / "whole" / "settings.json", tmp_path / "out")
    evaluate(detector, data, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_empty_data_set_and_wrong_sizes_are_refused(detector, data):
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(detector, data, batch_size=0)
    with pytest.raises(ValueError, match="0 images"):
        evaluate(detector, type(data)(data.name, data.root, (), ()))


def test_more_images_than_a_part(tiny_backbone, tmp_path):
    data = make_folder(tmp_path / "d", categories=["bolt"], normal=PART, anomalous=3, side=8)
    detector = Direct(tiny_backbone, rvs="mean")
    kept = evaluate(detector, data, tmp_path / "out", progress=False)
    assert kept.table.equals(evaluate(detector, data, progress=False).table)
