import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip

from clipad.backbone import Backbone
from clipad.detectors import SDP, ClipSurgery, Direct, Features, class_probability
from clipad.dual_path import staged_features
from clipad.surgery import similarity_map


@pytest.fixture
def images():
    torch.manual_seed(5)
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("kind", [Direct, SDP, ClipSurgery])
def test_one_protocol(kind, tiny_backbone, images):
    detector = kind(tiny_backbone, rvs="mean")
    prediction = detector.predict(images, "bolt")
    assert prediction.maps.shape == (4, 32, 32)
    assert prediction.maps.dtype == prediction.probabilities.dtype == torch.float32
    assert ((prediction.probabilities > 0) & (prediction.probabilities < 1)).all()


@pytest.mark.parametrize("kind", [Direct, SDP, ClipSurgery])
def test_features_can_be_cut_and_put_together(kind, tiny_backbone, images):
    detector = kind(tiny_backbone, rvs="mean")
    whole = detector.features(images)
    parts = Features.cat([whole[:1], whole[1:]])
    assert torch.equal(parts.image_embedding, whole.image_embedding)
    assert all(torch.equal(a, b) for a, b in zip(parts.tokens, whole.tokens, strict=True))


def test_sdp_equals_the_released_program(golden):
    model = tiny_clip()
    model.visual = golden.visual()
    backbone = Backbone(model, None, name="golden", pretrained="", mean=(0, 0, 0), std=(1, 1, 1))
    detector = SDP(
        backbone, rvs="mean", stages=golden.config["stages"], smoothing=golden.config["smoothing"]
    )
    features = detector.features(golden["image"])
    text = golden["text"]
    for i in range(len(text)):  # the golden inputs have a text of their own per image
        found = detector.score_with(features[i : i + 1], text[i])
        torch.testing.assert_close(found.maps[0], golden["sdp_map"][i], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            found.probabilities[0], golden["class_probability"][i], atol=1e-5, rtol=0
        )


def test_direct_is_the_softmax_of_the_last_patches(tiny_backbone, images):
    detector = Direct(tiny_backbone, rvs="mean", smoothing=0)
    text = detector.text_vectors("bolt")
    visual = tiny_backbone.visual
    last = staged_features(visual, images, stages=[4]).ordinary[0]
    with torch.no_grad():
        patches = F.normalize(visual.ln_post(last[:, 1:]) @ visual.proj, dim=-1)
    expected = (100 * patches @ text).softmax(-1)[..., 1]
    torch.testing.assert_close(
        detector.predict(images, "bolt").maps, similarity_map(expected, 32, 0), atol=1e-5, rtol=0
    )


def test_clip_surgery_is_one_path_over_the_last_half(tiny_backbone, images):
    found = ClipSurgery(tiny_backbone, rvs="mean").features(images)
    assert len(found.tokens) == 1
    paths = staged_features(tiny_backbone.visual, images, [4], first_block=2, restart=False)
    torch.testing.assert_close(found.tokens[0], paths.surgery[0], atol=1e-5, rtol=0)


def test_class_probability_of_exchanged_states_adds_up_to_one():
    torch.manual_seed(0)
    text = F.normalize(torch.randn(8, 2), dim=0)
    embedding = torch.randn(5, 8)
    both = class_probability(embedding, text) + class_probability(embedding, text.flip(-1))
    torch.testing.assert_close(both, torch.ones(5))


def test_smoothing_scales_with_the_image(tiny_backbone):
    assert SDP(tiny_backbone).smoothing == pytest.approx(8 / 240 * 32)
    assert SDP(tiny_backbone, smoothing=0).smoothing == 0


def test_settings_tell_detectors_apart(tiny_backbone):
    base = SDP(tiny_backbone, rvs="mean").settings
    for other in (
        SDP(tiny_backbone, rvs="kde"),
        SDP(tiny_backbone, rvs="mean", as_released=False),
        SDP(tiny_backbone, rvs="mean", stages=[2, 4]),
        SDP(tiny_backbone, rvs="mean", smoothing=2),
        ClipSurgery(tiny_backbone, rvs="mean"),
    ):
        assert other.settings != base
    assert SDP(tiny_backbone, rvs="mean").settings == base


def test_wrong_options_are_refused_at_once(tiny_backbone):
    with pytest.raises(ValueError, match="median"):
        SDP(tiny_backbone, rvs="median")
    with pytest.raises(ValueError, match="-1"):
        SDP(tiny_backbone, smoothing=-1)


@pytest.mark.slow
def test_the_method_needs_nothing_but_the_method():
    heavy = ["pandas", "tqdm", "PIL", "open_clip", "matplotlib"]  # None: an import of it fails
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import clipad.detectors; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not run.returncode, run.stderr
    ours = [m for m in run.stdout.split() if m.split(".")[0] in ("clipad", "demo_world")]
    assert len(ours) <= 8, ours
