import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, tiny_clip

from clipad.backbone import Backbone
from clipad.dual_path import embed_patches
from clipad.prompts import WINCLIP
from clipad.winclip import WinCLIP, harmonic_mean, window_embeddings, windows


@pytest.fixture
def images():
    torch.manual_seed(5)
    return torch.randn(3, 3, 32, 32)


def test_equals_the_golden_file():
    golden = Golden("winclip")
    model = tiny_clip()
    model.visual = golden.visual()
    backbone = Backbone(model, None, name="golden", pretrained="", mean=(0, 0, 0), std=(1, 1, 1))
    detector = WinCLIP(backbone)
    features = detector.features(golden["image"])
    for found, key in zip(
        (features.image_embedding, *features.tokens),
        ("image_embedding", "window2", "window3"),
        strict=True,
    ):
        torch.testing.assert_close(found, golden[key], atol=1e-5, rtol=0)
    prediction = detector.score_with(features, F.normalize(golden["text"].T, dim=0))
    torch.testing.assert_close(prediction.probabilities, golden["image_score"], atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction.maps, golden["map"], atol=1e-5, rtol=0)


def test_a_window_with_all_patches_is_the_image(tiny_backbone, images):
    """With open_clip 2.26.1 or newer other programs fail here without a message (cosine 0.64): tokens came first."""
    visual = tiny_backbone.visual
    with torch.no_grad():
        (everything,) = window_embeddings(visual, embed_patches(visual, images), [windows(4, 4)])
        expected = visual(images)
    assert everything.shape == (3, 1, 24)
    torch.testing.assert_close(everything[:, 0], expected, atol=1e-5, rtol=0)
    assert F.cosine_similarity(everything[:, 0], expected).min() > 1 - 1e-6


def brute_force(backbone, image, text):
    """WinCLIP as its paper describes it, window after window and patch after patch; one image, 3 x S x S."""

    def score(embedding):
        cosines = [float(F.cosine_similarity(embedding, column, dim=0)) for column in text.T]
        return 1 / (1 + np.exp((cosines[0] - cosines[1]) / 0.07))

    visual = backbone.visual
    patches = visual.conv1(image[None])[0]  # D x G x G
    grid = patches.shape[-1]
    position = visual.positional_embedding
    whole = score(visual(image[None])[0])
    value = np.zeros((grid, grid))
    inverse_scales = np.full((grid, grid), 1 / whole)
    for k in (2, 3):
        covering = [[[] for _ in range(grid)] for _ in range(grid)]
        for top in range(grid - k + 1):
            for left in range(grid - k + 1):
                inside = [(top + i, left + j) for i in range(k) for j in range(k)]
                tokens = [visual.class_embedding + position[0]]
                tokens += [patches[:, r, c] + position[1 + r * grid + c] for r, c in inside]
                x = visual.transformer(visual.ln_pre(torch.stack(tokens)[None]))
                found = score(visual.ln_post(x[0, 0]) @ visual.proj)
                for r, c in inside:
                    covering[r][c].append(found)
        for r in range(grid):
            for c in range(grid):
                inverse_scales[r, c] += np.mean(1 / np.array(covering[r][c]))
    value = torch.from_numpy(3 / inverse_scales)[None, None]
    return F.interpolate(value, size=image.shape[-1], mode="bilinear", align_corners=False)[
        0, 0
    ], whole


@torch.no_grad()
def test_agrees_with_a_brute_force_form(tiny_backbone, images):
    detector = WinCLIP(tiny_backbone)
    found = detector.predict(images, "bolt")
    for i, image in enumerate(images):
        expected, score = brute_force(tiny_backbone, image, detector.text_vectors("bolt"))
        np.testing.assert_allclose(found.maps[i], expected, atol=1e-5)
        assert float(found.probabilities[i]) == pytest.approx(score, abs=1e-5)


def test_harmonic_mean_by_hand():
    # On a 3 x 3 grid the four 2 x 2 windows all cover the middle; a corner belongs to one of them.
    found = harmonic_mean(torch.tensor([[0.1, 0.2, 0.4, 0.5]]), 3, 2)[0]
    assert found[0] == pytest.approx(0.1)
    assert found[8] == pytest.approx(0.5)
    assert found[1] == pytest.approx(2 / (1 / 0.1 + 1 / 0.2))
    assert found[4] == pytest.approx(4 / (1 / 0.1 + 1 / 0.2 + 1 / 0.4 + 1 / 0.5))


def test_windows_are_gathered_in_pieces_of_any_size(tiny_backbone, images, monkeypatch):
    visual = tiny_backbone.visual
    with torch.no_grad():
        tokens = embed_patches(visual, images)
        (whole,) = window_embeddings(visual, tokens, [windows(4, 3)])
        monkeypatch.setattr("clipad.winclip._TOKENS", 25)
        (pieces,) = window_embeddings(visual, tokens, [windows(4, 3)])
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)


def test_text_is_the_mean_of_sentences_that_are_not_normalised(tiny_backbone):
    detector = WinCLIP(tiny_backbone)
    normal, anomalous = WINCLIP.sentences("bolt")
    assert (len(normal), len(anomalous)) == (7 * 21, 4 * 21)
    text = detector.text_vectors("bolt")
    for column, sentences in zip(text.T, (normal, anomalous), strict=True):
        expected = F.normalize(tiny_backbone.encode_text(sentences).mean(dim=0), dim=0)
        torch.testing.assert_close(column, expected)


def test_features_do_not_depend_on_the_text_and_can_be_cut(tiny_backbone, images):
    detector = WinCLIP(tiny_backbone)
    features = detector.features(images)
    for category in ("bolt", "nut"):
        whole = detector.predict(images, category).maps
        torch.testing.assert_close(
            detector.score_with(features[1:], detector.text_vectors(category)).maps,
            whole[1:],
            atol=1e-6,
            rtol=0,
        )
    bolt, nut = (
        detector.score_with(features, detector.text_vectors(name)).maps for name in ("bolt", "nut")
    )
    assert not torch.equal(bolt, nut)


def test_settings_are_its_own(tiny_backbone):
    settings = WinCLIP(tiny_backbone).settings
    assert settings["smoothing"] == 0
    assert settings["prompts"]["normal"][0] == "{}"
