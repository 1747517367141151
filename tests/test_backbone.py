import json
import shutil
import warnings

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import clipad.backbone
from clipad.backbone import Backbone, load_backbone
from clipad.detectors import SDP, ClipSurgery, Direct
from clipad.dual_path import staged_features
from clipad.published import data_dir
from clipad.winclip import WinCLIP

MODEL = data_dir() / "demo" / "model"


@pytest.fixture(scope="module")
def demo():
    return load_backbone("demo", device="cpu")


def test_demo_is_frozen_and_says_what_it_is(demo):
    assert demo.image_size == 96
    assert not any(p.requires_grad for p in demo.model.parameters())
    assert not demo.model.training
    assert "shipped weights" in repr(demo)
    assert demo.weights_hash == load_backbone("demo", device="cpu").weights_hash


def test_preprocess_squashes_and_normalises(demo):
    image = Image.new("RGB", (30, 200), (255, 0, 128))
    found = demo.preprocess(image)
    assert found.shape == (3, 96, 96)
    expected = (np.array([255, 0, 128]) / 255 - demo.mean) / demo.std
    np.testing.assert_allclose(found[:, 40, 40], expected, atol=1e-5)


def test_text_equals_open_clips_encode_text(demo):
    sentences = [
        "a photo of a flawless screw.",
        "screw",
        "a jpeg corrupted photo of the nut with contamination.",
    ]
    with torch.no_grad():
        expected = demo.model.encode_text(demo.tokenizer(sentences))
    torch.testing.assert_close(demo.encode_text(sentences), expected, atol=1e-5, rtol=1e-5)


def test_text_is_cached_and_a_damaged_cache_is_noticed(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPAD_CACHE", str(tmp_path))
    sentences = ["a photo of a gear."]
    first = demo.encode_text(sentences)
    (file,) = tmp_path.rglob("*.npz")
    monkeypatch.setattr(Backbone, "_encode_tokens", lambda *a: pytest.fail("computed again"))
    assert torch.equal(demo.encode_text(sentences), first)
    monkeypatch.undo()
    monkeypatch.setenv("CLIPAD_CACHE", str(tmp_path))
    content = bytearray(file.read_bytes())
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for damage in (content[:40], content[:-8] + b"\0" * 8, changed, b""):
        file.write_bytes(bytes(damage))
        assert torch.equal(demo.encode_text(sentences), first)


def test_a_cache_that_cannot_be_written_costs_time_only(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPAD_CACHE", str(tmp_path / "file"))
    assert demo.encode_text(["a photo of a pill."]).shape == (1, 128)


def test_unknown_words_are_named_once():
    backbone = load_backbone("demo", device="cpu")
    with pytest.warns(UserWarning, match="never saw the words spaceship"):
        backbone.encode_text(["a photo of a spaceship."])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.encode_text(["a dark photo of the spaceship with crack."])


@pytest.mark.parametrize("sentences", [[], [""], ["a", " "], [3]])
def test_empty_sentences_are_refused(demo, sentences):
    with pytest.raises(ValueError, match="list of sentences, none empty"):
        demo.encode_text(sentences)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'ViT-B16' .did you mean 'ViT-B-16'"):
        load_backbone("ViT-B16")
    with pytest.raises(
        ValueError, match=r"neither a file nor a tag of ViT-B-32; its tags are .*laion400m_e31"
    ):
        load_backbone("ViT-B-32", pretrained="laion_400m")


@pytest.mark.parametrize(
    "name", ["RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "xlm-roberta-base-ViT-B-32"]
)
def test_other_towers_are_refused_before_a_model_is_built(name, monkeypatch):
    monkeypatch.setattr(open_clip, "CLIP", lambda **k: pytest.fail("built"))
    with pytest.raises(ValueError, match="not a plain CLIP vision transformer"):
        load_backbone(name)


def test_the_hash_and_the_text_cache_know_activation_and_pre_processing(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPAD_CACHE", str(tmp_path))

    def backbone(quick_gelu=False, mean=0.5):
        torch.manual_seed(0)
        config = json.loads((MODEL / "open_clip_config.json").read_text())["model_cfg"]
        model = open_clip.CLIP(**config, quick_gelu=quick_gelu)
        tokenizer = open_clip.SimpleTokenizer(context_length=32)
        return Backbone(
            model, tokenizer, name="t", pretrained="", mean=(mean,) * 3, std=(0.25,) * 3
        )

    plain, quick, grey = backbone(), backbone(quick_gelu=True), backbone(mean=0.4)
    assert len({plain.weights_hash, quick.weights_hash, grey.weights_hash}) == 3
    assert plain.weights_hash == backbone().weights_hash
    sentences = ["a photo of a gear."]
    assert not torch.equal(plain.encode_text(sentences), quick.encode_text(sentences))


def small_config(tmp_path, monkeypatch):
    """A stand-in of the published model: the same structure and file format, a fraction of its width."""
    config = open_clip.get_model_config("ViT-B-16-plus-240")
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"width": 64, "head_width": 32}
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
    (tmp_path / "ViT-small-240.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-small-240.json")
    return "ViT-small-240"


@pytest.fixture
def small(tmp_path, monkeypatch):
    name = small_config(tmp_path, monkeypatch)
    torch.manual_seed(3)
    return name, open_clip.create_model(name).state_dict()


def test_a_local_checkpoint_is_loaded(small, tmp_path):
    name, state = small
    save_file(state, tmp_path / "w.safetensors")
    backbone = load_backbone(name, pretrained=tmp_path / "w.safetensors", device="cpu")
    assert "checkpoint file w.safetensors" in repr(backbone)
    torch.testing.assert_close(backbone.visual.proj, state["visual.proj"])


def test_random_weights_say_so_and_follow_the_seed(small):
    name, _ = small
    a, b, c = (load_backbone(name, device="cpu", seed=seed) for seed in (1, 1, 2))
    assert a.weights_hash == b.weights_hash != c.weights_hash
    assert "random weights (seed 1)" in repr(a)


SIZES = pytest.mark.parametrize("size", [224, 240, 336, 448])


@pytest.fixture
def at_size(small, tmp_path):
    """Size -> the small model from a checkpoint file at that image size."""
    name, state = small
    save_file(state, tmp_path / "w.safetensors")
    return lambda size: load_backbone(
        name, tmp_path / "w.safetensors", device="cpu", image_size=size
    )


@SIZES
def test_other_image_sizes_interpolate_the_position_embedding(small, at_size, size):
    backbone, given = at_size(size), small[1]["visual.positional_embedding"]
    grid = size // 16
    assert backbone.image_size == size
    assert backbone.visual.grid_size == (grid, grid)
    expected = F.interpolate(
        given[None, 1:].unflatten(1, (15, 15)).permute(0, 3, 1, 2), (grid, grid),
        mode="bicubic", antialias=True, align_corners=False,
    ).flatten(2)[0].T  # fmt: skip
    found = backbone.visual.positional_embedding
    torch.testing.assert_close(found[:1], given[:1], atol=0, rtol=0)
    torch.testing.assert_close(found[1:], expected, atol=1e-6, rtol=0)


def test_the_native_size_asked_for_changes_nothing(at_size):
    assert at_size(240).weights_hash == at_size(None).weights_hash != at_size(224).weights_hash


@SIZES
def test_staged_features_at_other_sizes_are_open_clips(small, at_size, size, tmp_path):
    model = open_clip.create_model(
        small[0], pretrained=str(tmp_path / "w.safetensors"), force_image_size=size
    ).eval()
    images = torch.randn(2, 3, size, size)
    found = staged_features(at_size(size).visual, images, as_released=False)
    blocks = []
    for block in (model.visual.transformer.resblocks[i] for i in (2, 5, 8, 11)):
        block.register_forward_hook(lambda module, given, out: blocks.append(out))
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(found.image_embedding, expected, atol=1e-5, rtol=1e-5)
    for stage, block in zip(found.ordinary, blocks, strict=True):
        torch.testing.assert_close(stage, block, atol=1e-4, rtol=1e-5)
    assert all(stage.shape == (2, (size // 16) ** 2 + 1, 32) for stage in found.surgery)


@SIZES
@pytest.mark.parametrize("kind", [Direct, SDP, ClipSurgery, WinCLIP])
def test_maps_and_smoothing_follow_the_image_size(at_size, size, kind):
    detector = kind(at_size(size))
    text = F.normalize(torch.randn(32, 2), dim=0)
    found = detector.score_with(detector.features(torch.randn(1, 3, size, size)), text)
    assert found.maps.shape == (1, size, size)
    assert detector.smoothing == pytest.approx(0 if kind is WinCLIP else 8 * size / 240)


@pytest.mark.parametrize(("name", "size"), [("ViT-B-32", 240), ("ViT-B-16", 225)])
def test_sizes_that_patches_do_not_fill_are_refused_before_a_model_is_built(
    name, size, monkeypatch
):
    monkeypatch.setattr(open_clip, "CLIP", lambda **k: pytest.fail("built"))
    with pytest.raises(
        ValueError, match=rf"image_size={size} is no multiple .* of {name[-2:]} pixels"
    ):
        load_backbone(name, image_size=size, device="cpu")


def test_demo_at_another_size():
    assert load_backbone(
        "demo", image_size=128, device="cpu"
    ).visual.positional_embedding.shape == (257, 96)


def test_a_damaged_demo_says_so(tmp_path, monkeypatch):
    copy = tmp_path / "data" / "demo" / "model"
    shutil.copytree(MODEL, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(clipad.backbone, "data_dir", lambda: tmp_path / "data")
    with pytest.raises(ValueError, match=r"cannot be loaded into demo"):
        load_backbone("demo")
