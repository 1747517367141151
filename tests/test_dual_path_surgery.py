from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small_data import make_folder

import clipad
from clipad.dual_path import attention_weights, staged_features
from clipad.studies import dual_path_surgery as study
from clipad.studies.common import labelled
from clipad.studies.dual_path_surgery import figures
from clipad.surgery import feature_surgery

ALL, LAST = slice(None), slice(-1, None)


def total(values):
    found = 0
    for value in values:
        found = found + value  # a comment
    return found


def written(visual, images):
    return staged_features(visual, images, as_released=False).surgery


def surgery(features, text):
    return feature_surgery(features, text)[:, 1:, 1]


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data", categories=("bolt", "leather"))


def test_one_line_is_changed_and_the_function_stays():
    product = study.with_line(total, "found = found + value", "found = found * value + 1")
    assert product([2, 3]) == 4
    assert total([2, 3]) == 5
    for line in ("found = found - value", "found"):  # not there, and there more than once
        with pytest.raises(ValueError, match="expected once"):
            study.with_line(total, line, "pass")


def test_attention_is_that_of_the_ordinary_path(tiny_backbone):
    visual = tiny_backbone.visual
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = list(study.attention_by_block(visual, images))
    seen = []  # what open_clip's own pass gives each block

    def keep(block, inputs):
        seen.append((block, inputs[0]))

    hooks = [block.register_forward_pre_hook(keep) for block in visual.transformer.resblocks]
    with torch.no_grad():
        visual(images)
    for hook in hooks:
        hook.remove()
    for weights, (block, x) in zip(found, seen, strict=True):
        for kind, expected in zip(weights, attention_weights(block, x), strict=True):
            np.testing.assert_allclose(kind, expected.detach(), atol=1e-5)


def test_variants_are_the_detectors_in_the_order_of_the_data(tiny_backbone, data):
    """Also when categories take turns."""
    order = sorted(data, key=lambda s: s.image_path.name)
    dataset = replace(data, samples=tuple(order))
    sdp = clipad.SDP(tiny_backbone, rvs="mean", as_released=False)
    last = clipad.SDP(tiny_backbone, rvs="mean", as_released=False, stages=[4])
    texts, calls = {category: sdp.text_vectors(category) for category in data.categories}, []

    def path(visual, images):
        calls.append(len(images))
        return written(visual, images)

    tries = {
        "sdp": (path, ALL, surgery, texts),
        "last": (path, LAST, surgery, texts),
        "swapped": (path, ALL, surgery, {c: t.flip(1) for c, t in texts.items()}),
    }
    values, probabilities = study.run_variants(tiny_backbone, dataset, tries)
    assert sum(calls) == len(dataset)  # once for all three
    for i in (0, 5, 9):
        image = tiny_backbone.preprocess(clipad.read_image(order[i].image_path))[None]
        for name, detector in (("sdp", sdp), ("last", last)):
            features = detector.features(image)
            expected = detector.patch_values(features, texts[order[i].category])[0]
            torch.testing.assert_close(values[name][i], expected, atol=1e-5, rtol=1e-4)
        found = sdp.predict(image, order[i].category)
        assert float(probabilities[i]) == pytest.approx(float(found.probabilities), abs=1e-5)
    assert not torch.allclose(values["sdp"], values["swapped"])


def test_maps_beside_one_another_say_their_aurocs(data):
    anomalous = [s for s in data if s.label == 1][:2]
    few = labelled(replace(data, samples=tuple(anomalous)), 32)
    maps = {"noise": np.random.default_rng(0).random((2, 32, 32)), "it": few.masks * 1.0}
    figure, caption = figures.beside(np.zeros((2, 32, 32, 3)), few, maps)
    assert "it 100, 100" in caption
    plt.close(figure)
    few.masks = None
    figure, caption = figures.beside(np.zeros((2, 32, 32, 3)), few, maps)
    assert "AUROC" not in caption
    plt.close(figure)


def test_figures_say_their_numbers():
    toy, caption = figures.six_tokens(np.eye(6)[:, :2], {"all alike": np.full((6, 6), 1 / 6)})
    assert "all alike 33" in caption
    mask = np.arange(32)[:, None] < np.full(32, 9)
    looks = dict.fromkeys((0, 3), np.full((2, 16), 1 / 16))
    patch = figures.attention_of_patch(np.zeros((32, 32, 3)), mask, 5, looks)
    controls = pd.DataFrame({"as written": [0.9, 0.4, 0.6], "last": 0.5})
    controls["control"] = ["found", "shuffled states", "shuffled states"]
    chance, caption = figures.chance(controls)
    assert "as written, shuffled states: 40 to 60" in caption
    for drawn in (toy, patch, chance):
        drawn.canvas.draw()
        plt.close(drawn)
