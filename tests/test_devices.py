"""What can be known of GPUs without one: which devices are taken, and that nothing mixes devices (on fake tensors)."""

import copy

import pytest
import torch
from conftest import tiny_clip
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from clipad.backbone import Backbone, find_device, load_backbone
from clipad.detectors import SDP, ClipSurgery, Direct, SDPPlus
from clipad.dual_path import attention_weights, embed_patches, staged_features
from clipad.io.images import read_image
from clipad.linear_layers import LinearLayers
from clipad.studies.experiments import experiment
from clipad.studies.sdp_plus_fine_tuning import LayersAlone
from clipad.winclip import WinCLIP


@pytest.fixture
def machine(monkeypatch):
    """Pretends that torch sees ``count`` accelerators of a kind."""

    def set_up(kind=None, count=0):
        device = torch.device(kind) if kind else None
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return set_up


@pytest.mark.parametrize(
    ("kind", "count", "asked", "expected"),
    [
        (None, 0, None, "cpu"),
        (None, 0, "", "cpu"),
        (None, 0, "cpu", "cpu"),
        ("cuda", 2, None, "cuda"),
        ("cuda", 2, "cpu", "cpu"),
        ("cuda", 2, "cuda", "cuda"),
        ("cuda", 2, "cuda:1", "cuda:1"),
        ("mps", 1, None, "mps"),
        ("mps", 1, "mps", "mps"),
        ("xpu", 4, "xpu:3", "xpu:3"),
    ],
)
def test_what_torch_sees_is_taken(machine, kind, count, asked, expected):
    machine(kind, count)
    assert find_device(asked) == torch.device(expected)


@pytest.mark.parametrize(
    ("kind", "count", "asked", "said"),
    [
        (None, 0, "cuda", "torch sees cpu"),
        (None, 0, "mps", "torch sees cpu"),
        ("cuda", 2, "cuda:2", "sees cuda, cuda:0, cuda:1, cpu"),
        ("mps", 1, "cuda", "sees mps, mps:0, cpu"),
        ("cuda", 1, "meta", "sees cuda, cuda:0, cpu"),
        ("cuda", 1, "gpu", "unknown device 'gpu'"),
        ("cuda", 1, "cuda:x", "unknown device 'cuda:x'"),
    ],
)
def test_the_rest_is_refused_in_one_line(machine, kind, count, asked, said):
    machine(kind, count)
    with pytest.raises(ValueError, match=said) as refused:
        load_backbone("demo", device=asked)
    assert "\n" not in str(refused.value)


# Older ones ask the driver of a GPU, fake tensors or not.
needs_fake_cuda = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="fake CUDA tensors without a GPU need torch 2.7",
)


@pytest.fixture
def on_cuda(monkeypatch, tiny_backbone):
    """The tiny backbone with fake CUDA tensors as weights: shapes, types and devices of every step, no values."""
    # Autocast asks whether there is a GPU; modules move by swapping, which fake tensors refuse.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(LinearLayers, "to", lambda self, device: self)

    def fake():
        with torch.device("cuda"):
            model = tiny_clip()
        return Backbone(
            model, tiny_backbone.tokenizer, name="fake", pretrained="none", mean=(0.5,) * 3, std=(0.2,) * 3
        )  # fmt: skip

    return fake


def prediction(kind, backbone):
    """Features, maps and probabilities of two images."""
    backbone.__dict__["weights_hash"] = "the same"
    if issubclass(kind, SDPPlus):
        with backbone.device:
            layers = LinearLayers(*backbone.visual.proj.shape, 4, seed=0)
        layers.settings = {
            "image_size": 32, "weights": "the same", "stages": [1, 2, 3, 4], "as_released": True
        }  # fmt: skip
        detector = SDPPlus(backbone, layers)
    else:
        detector = kind(backbone)
    features = detector.features(torch.randn(2, 3, 32, 32))
    return features, detector.score_with(features, torch.randn(24, 2))


@needs_fake_cuda
@pytest.mark.parametrize("kind", [Direct, SDP, ClipSurgery, WinCLIP, SDPPlus, LayersAlone])
def test_no_detector_mixes_devices(kind, tiny_backbone, on_cuda):
    prediction(kind, tiny_backbone)  # constant matrices are made once, and not from fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        features, found = prediction(kind, on_cuda())
    assert features.image_embedding.device.type == "cuda"
    assert {t.dtype for t in [features.image_embedding, *features.tokens]} == {torch.float32}
    assert found.maps.shape == (2, 32, 32)
    assert found.maps.device.type == found.probabilities.device.type == "cpu"


@needs_fake_cuda
def test_weights_are_cast_once_and_the_float32_ones_stay(on_cuda):
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = on_cuda()
        tower = backbone.tower
        assert tower is backbone.tower
        block, plain = tower.transformer.resblocks[0], backbone.visual.transformer.resblocks[0]
        assert block.attn.in_proj_weight.dtype == tower.proj.dtype == torch.float16
        assert block.ln_1.weight.dtype == plain.attn.in_proj_weight.dtype == torch.float32


def test_cast_once_or_in_every_call_gives_the_same_numbers(tiny_backbone, monkeypatch):
    """By the CPU's autocast, which follows the same rules."""
    visual, images = tiny_backbone.visual, torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    tower = tiny_backbone.tower
    monkeypatch.undo()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tower.proj.dtype == torch.bfloat16
        once, every = (staged_features(t, images) for t in (tower, visual))
    assert all(torch.equal(a, b) for a, b in zip(once.surgery, every.surgery, strict=True))
    assert torch.equal(once.image_embedding, every.image_embedding)


def test_on_the_cpu_nothing_is_cast(tiny_backbone):
    assert tiny_backbone.tower is tiny_backbone.visual


def test_attention_weights_hold_where_float16_products_would_not(tiny_backbone):
    block = copy.deepcopy(tiny_backbone.visual.transformer.resblocks[0])
    with torch.no_grad():
        x = embed_patches(tiny_backbone.visual, torch.randn(1, 3, 32, 32))
        block.attn.in_proj_weight.mul_(0)
        block.attn.in_proj_bias.fill_(100.0)  # q k^T = 16 * 100^2 > 65504, the largest float16
        for weights in attention_weights(block.half(), x.half()):
            assert torch.isfinite(weights).all()


@pytest.mark.parametrize("kind", [Direct, SDP])
def test_half_precision_stays_within_what_the_notebooks_allow(kind, monkeypatch, tmp_path):
    run = experiment("half", categories=["tile"], output_dir=str(tmp_path))
    image = run.backbone.preprocess(read_image(run.dataset[0].image_path))[None]
    detector = kind(run.backbone, rvs="mean")
    exact, strict = detector.predict(image, "tile").maps, run.tolerance
    monkeypatch.setattr(Backbone, "autocast", lambda self: torch.autocast("cpu", torch.float16))
    apart = (detector.predict(image, "tile").maps - exact).abs().max()
    assert 0 < apart < run.tolerance
    assert strict < run.tolerance
