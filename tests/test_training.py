import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_clip
from small_data import TRAINING, make_collection

from clipad.backbone import Backbone
from clipad.datasets import Dataset
from clipad.detectors import SDP, SDPPlus
from clipad.dual_path import staged_features
from clipad.evaluation import evaluate
from clipad.linear_layers import (
    LinearLayers,
    dice_loss,
    focal_loss,
    linear_maps,
    require_separate,
    stage_losses,
)
from clipad.studies.sdp_plus_fine_tuning import LayersAlone
from clipad.training import load_layers, train


@pytest.fixture
def golden_layers(golden):
    layers = LinearLayers(
        golden.config["vision_cfg"]["width"],
        golden.config["embed_dim"],
        len(golden.config["stages"]),
    )
    layers.load_state_dict({key: golden[f"linear/{key}"] for key in layers.state_dict()})
    return layers


@pytest.fixture
def collection(tmp_path):
    return make_collection(tmp_path / "data")


def same(a: LinearLayers, b: LinearLayers) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# Against the released program -----------------------------------------------------------------------------------


def test_linear_maps_equal_the_released_program(golden, golden_layers):
    found = staged_features(golden.visual(), golden["image"], golden.config["stages"])
    tokens = [x[:, 1:] for x in found.ordinary]
    size = golden.config["vision_cfg"]["image_size"]
    maps = linear_maps(golden_layers, tokens, golden["text"], size)
    torch.testing.assert_close(maps, golden["linear_maps"], atol=1e-5, rtol=0)


def test_losses_equal_the_released_program(golden):
    focal, dice = stage_losses(golden["linear_maps"].float(), golden["mask"][:, 0])
    torch.testing.assert_close(
        focal.double(), golden["focal_per_stage"].double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(dice.double(), golden["dice_per_stage"].double(), atol=1e-5, rtol=0)


def test_sdp_plus_equals_the_released_program(golden, golden_layers):
    model = tiny_clip()
    model.visual = golden.visual()
    backbone = Backbone(model, None, name="golden", pretrained="", mean=(0, 0, 0), std=(1, 1, 1))
    options = {
        "rvs": "mean",
        "stages": golden.config["stages"],
        "smoothing": golden.config["smoothing"],
    }
    detector = SDPPlus(backbone, golden_layers, **options)
    features = detector.features(golden["image"])
    for i, text in enumerate(golden["text"]):
        found = detector.score_with(features[i : i + 1], text)
        torch.testing.assert_close(found.maps[0], golden["sdp_plus_map"][i], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            found.probabilities[0], golden["class_probability"][i], atol=1e-5, rtol=0
        )


# Losses by hand -------------------------------------------------------------------------------------------------


def test_losses_of_perfect_and_of_wrong_maps():
    mask = torch.zeros(2, 8, 8)
    mask[:, 2:4, 2:4] = 1
    assert focal_loss(mask, mask) < 1e-6
    assert dice_loss(mask, mask) < 1e-6
    # p is 1e-5 (target) + 1e-5 everywhere
    assert focal_loss(1 - mask, mask) == pytest.approx(-math.log(2e-5), rel=1e-3)
    assert dice_loss(1 - mask, mask) == pytest.approx(1 - 1 / 65)
    nothing = torch.zeros(1, 8, 8)
    assert dice_loss(nothing, nothing) == 0  # a flawless image without a prediction costs nothing


# Training -------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_leaves_the_backbone_alone(tiny_backbone, collection):
    before = {key: value.clone() for key, value in tiny_backbone.model.state_dict().items()}
    found = train(tiny_backbone, collection, epochs=8, **TRAINING)
    assert list(found.log.columns) == ["epoch", "loss", "focal", "dice"]
    assert found.log["loss"].iloc[-1] < 0.8 * found.log["loss"].iloc[0]
    np.testing.assert_allclose(found.log["loss"], found.log["focal"] + found.log["dice"], rtol=1e-5)
    after = tiny_backbone.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_trained_layers_find_the_defect_of_other_categories(tiny_backbone, collection, tmp_path):
    layers = train(tiny_backbone, collection, epochs=30, **TRAINING).layers
    other = make_collection(tmp_path / "other", categories=("gear",), per_kind=4)
    aurocs = {
        detector.name: evaluate(detector, other, progress=False).table.loc["mean", "pixel_auroc"]
        for detector in (
            SDP(tiny_backbone, rvs="mean"),
            LayersAlone(tiny_backbone, layers, rvs="mean"),
        )
    }
    assert aurocs["layers alone"] > max(0.85, aurocs["SDP"])


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_seed_gives_equal_weights_and_another_does_not(tiny_backbone, collection, shuffle):
    first, again, other = (
        train(tiny_backbone, collection, epochs=2, seed=seed, shuffle=shuffle, **TRAINING).layers
        for seed in (3, 3, 4)
    )
    assert same(first, again)
    assert first.hash == again.hash != other.hash


def test_shuffling_changes_the_order_in_each_epoch(tiny_backbone, collection):
    plain, mixed = (
        train(tiny_backbone, collection, epochs=1, shuffle=s, **TRAINING).layers
        for s in (False, True)
    )
    assert not same(plain, mixed)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resuming_gives_the_weights_of_an_unbroken_training(
    tiny_backbone, collection, tmp_path, shuffle
):
    unbroken = train(
        tiny_backbone, collection, tmp_path / "a", epochs=4, shuffle=shuffle, **TRAINING
    )
    train(tiny_backbone, collection, tmp_path / "b", epochs=2, shuffle=shuffle, **TRAINING)
    resumed = train(
        tiny_backbone, collection, tmp_path / "b", epochs=4, shuffle=shuffle, **TRAINING
    )
    assert same(unbroken.layers, resumed.layers)
    assert [p.name for p in resumed.checkpoints] == [
        f"epoch_{i:03d}.safetensors" for i in (1, 2, 3, 4)
    ]
    columns = ["epoch", "loss", "focal", "dice"]
    pd.testing.assert_frame_equal(unbroken.log[columns], resumed.log[columns])
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "b" / "log.csv")[columns], resumed.log[columns]
    )


def test_a_finished_training_is_read_back_at_any_epoch(tiny_backbone, collection, tmp_path):
    whole = train(tiny_backbone, collection, tmp_path, epochs=3, **TRAINING)
    two = train(tiny_backbone, collection, tmp_path, epochs=2, **TRAINING)
    assert same(two.layers, load_layers(whole.checkpoints[1]))
    assert len(two.log) == 2


@pytest.mark.slow
def test_a_killed_training_loses_at_most_one_epoch(tiny_backbone, collection, tmp_path):
    """A process that is killed in its third epoch, without any chance to clean up."""
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import open_clip
        from conftest import tiny_clip
        from small_data import TRAINING
        from clipad import training as fine_tuning
        from clipad.backbone import Backbone
        from clipad.datasets import load_dataset

        calls = []
        def losses(*arguments, real=fine_tuning.stage_losses):
            calls.append(1)
            if len(calls) == 8:  # three batches an epoch: the second of the third epoch
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        fine_tuning.stage_losses = losses
        backbone = Backbone(
            tiny_clip(), open_clip.SimpleTokenizer(context_length=32), name="tiny", pretrained="random weights",
            mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28),
        )
        fine_tuning.train(backbone, load_dataset("folder", sys.argv[1]), sys.argv[2], epochs=4, **TRAINING)
    """)
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    folder = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", program, str(collection.root), str(folder)],
        env=environment,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert sorted(p.name for p in folder.glob("epoch*")) == [
        "epoch_001.safetensors",
        "epoch_002.safetensors",
    ]
    resumed = train(tiny_backbone, collection, folder, epochs=4, **TRAINING)
    unbroken = train(tiny_backbone, collection, epochs=4, **TRAINING)
    assert same(resumed.layers, unbroken.layers)


def test_a_damaged_checkpoint_is_named(tiny_backbone, collection, tmp_path):
    whole = train(tiny_backbone, collection, tmp_path, epochs=3, **TRAINING)
    whole.checkpoints[-1].write_bytes(whole.checkpoints[-1].read_bytes()[:500])
    with pytest.raises(ValueError, match="epoch_003"):
        train(tiny_backbone, collection, tmp_path, epochs=3, **TRAINING)


def test_a_folder_of_another_training_is_refused(tiny_backbone, collection, tmp_path):
    train(tiny_backbone, collection, tmp_path, epochs=1, **TRAINING)
    with pytest.raises(ValueError, match="learning_rate, seed"):
        train(
            tiny_backbone,
            collection,
            tmp_path,
            epochs=1,
            seed=1,
            **TRAINING | {"learning_rate": 1e-3},
        )


def test_a_full_disk_stops_the_training_and_keeps_the_earlier_epochs(
    tiny_backbone, collection, tmp_path, monkeypatch
):
    from clipad import training as fine_tuning

    real, calls = fine_tuning.write_atomically, []

    def full(path, content):
        calls.append(path)
        if path.name == "epoch_002.safetensors":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(fine_tuning, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_backbone, collection, tmp_path, epochs=3, **TRAINING)
    monkeypatch.undo()
    assert same(
        train(tiny_backbone, collection, tmp_path, epochs=3, **TRAINING).layers,
        train(tiny_backbone, collection, epochs=3, **TRAINING).layers,
    )


def test_what_cannot_train_is_refused_before_any_work(tiny_backbone, collection):
    without = Dataset("none", collection.root, collection.categories, tuple(
        type(s)(s.image_path, None, s.category, s.label, s.defect) for s in collection))  # fmt: skip
    with pytest.raises(ValueError, match="learn from masks"):
        train(tiny_backbone, without, **TRAINING)
    with pytest.raises(ValueError, match="epochs"):
        train(tiny_backbone, collection, epochs=0, **TRAINING)


def test_a_loss_that_is_not_finite_stops_with_advice(tiny_backbone, collection, monkeypatch):
    from clipad import linear_layers

    monkeypatch.setattr(linear_layers, "focal_loss", lambda p, mask: p.mean() / 0)
    with pytest.raises(ValueError, match="learning_rate"):
        train(tiny_backbone, collection, epochs=1, **TRAINING)


# The cross-data-set protocol ------------------------------------------------------------------------------------


def test_training_on_what_one_tests_needs_a_flag_and_is_marked(tiny_backbone, collection):
    layers = train(tiny_backbone, collection, epochs=1, **TRAINING).layers
    with pytest.raises(ValueError, match="bolt"):
        evaluate(SDPPlus(tiny_backbone, layers, rvs="mean"), collection, progress=False)
    allowed = SDPPlus(tiny_backbone, layers, rvs="mean", allow_overlap=True)
    assert evaluate(allowed, collection, progress=False).settings["allow_overlap"] is True
    assert allowed.name == "SDP+ (overlap allowed)"
    with pytest.raises(ValueError, match="b, c"):
        require_separate("abc", "bcd")
    require_separate("abc", "def")


def test_settings_name_the_layers(tiny_backbone, collection):
    one, two = (
        train(tiny_backbone, collection, epochs=1, seed=s, **TRAINING).layers for s in (0, 1)
    )
    settings = SDPPlus(tiny_backbone, one, rvs="mean").settings
    assert json.dumps(settings)
    assert settings["trained_on"] == "folder"
    assert settings["layers"] == one.hash
    assert settings != SDPPlus(tiny_backbone, two, rvs="mean").settings
    assert settings != LayersAlone(tiny_backbone, one, rvs="mean").settings


def test_layers_of_another_backbone_are_refused(tiny_backbone, collection):
    layers = train(tiny_backbone, collection, epochs=1, **TRAINING).layers
    other = Backbone(
        tiny_clip(width=48), None, name="wider", pretrained="", mean=(0, 0, 0), std=(1, 1, 1)
    )
    with pytest.raises(ValueError, match=r"32, 24"):
        SDPPlus(other, layers)
    with pytest.raises(ValueError, match="as_released"):
        SDPPlus(tiny_backbone, layers, as_released=False)
    larger = Backbone(
        tiny_clip(image_size=48), None, name="larger", pretrained="", mean=(0, 0, 0), std=(1, 1, 1)
    )
    with pytest.raises(ValueError, match=r"32.*48"):
        SDPPlus(larger, layers)
    tiny_backbone.__dict__["weights_hash"] = "something else"
    with pytest.raises(ValueError, match="weights"):
        SDPPlus(tiny_backbone, layers)


def test_sdp_plus_is_the_sum_of_both_maps(tiny_backbone):
    layers = LinearLayers(32, 24, 4, seed=1)
    images = torch.randn(3, 3, 32, 32)
    plus, alone, sdp = (
        kind(tiny_backbone, *extra, rvs="mean").predict(images, "bolt").maps
        for kind, extra in ((SDPPlus, [layers]), (LayersAlone, [layers]), (SDP, []))
    )
    torch.testing.assert_close(plus, sdp + alone, atol=1e-5, rtol=0)
    assert (alone >= 0).all()
    assert (alone <= 4).all()


# Checkpoints ----------------------------------------------------------------------------------------------------


def released(tmp_path, content, name="epoch_5.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_the_released_format_loads(tmp_path, golden_layers):
    loaded = load_layers(released(tmp_path, {"linear_layers": golden_layers.state_dict()}))
    assert same(loaded, golden_layers)
    assert loaded.settings == {}


def test_our_format_loads_with_its_settings(tiny_backbone, collection, tmp_path):
    found = train(tiny_backbone, collection, tmp_path, epochs=1, **TRAINING)
    loaded = load_layers(found.checkpoints[-1])
    assert same(loaded, found.layers)
    assert loaded.settings == found.layers.settings
    assert loaded.settings["categories"] == ["bolt", "nail"]


STATE = LinearLayers(6, 4, 2).state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": STATE}, "linear_layers.*layers"),
        ([1, 2], "list"),
        ({"linear_layers": {}}, "fc.0.weight"),
        ({"linear_layers": STATE | {"extra": torch.zeros(1)}}, "extra"),
        (
            {"linear_layers": {k.replace("fc.1", "fc.2"): v for k, v in STATE.items()}},
            "fc.1.bias",
        ),
        (
            {"linear_layers": STATE | {"fc.1.weight": torch.zeros(4, 5)}},
            r"fc.1.weight.*4, 5.*4, 6",
        ),
        (
            {"linear_layers": STATE | {"fc.0.bias": torch.full((4,), torch.nan)}},
            "fc.0.bias",
        ),
    ],
)
def test_wrong_checkpoints_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_layers(released(tmp_path, content))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickled_code_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, write in enumerate(
        (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing)))
    ):
        path = tmp_path / f"{number}.pth"
        write({"linear_layers": Evil()}, path)
        with pytest.raises(ValueError, match="executed"):
            load_layers(path)
    assert not (tmp_path / "executed").exists()


def test_other_files_are_no_checkpoints(tmp_path):
    for name, message in (("a.safetensors", "a.safetensors"), ("a.pth", "a.pth")):
        (tmp_path / name).write_bytes(b"something else entirely")
        with pytest.raises(ValueError, match=message):
            load_layers(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing.pth"):
        load_layers(tmp_path / "missing.pth")
