"""The explorer: its model against the detectors, its figure, and its controls driven without a kernel."""

import base64
import io
import re
import shlex
from dataclasses import asdict, replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import clipad
from clipad.dual_path import attention_weights, embed_patches
from clipad.linear_layers import LinearLayers
from clipad.studies import explorer as widgets
from clipad.studies.experiments import Experiment
from clipad.studies.explorer import figures as view
from clipad.tools import cli, runner


@pytest.fixture
def run(tiny_backbone, tmp_path):
    dataset = clipad.load_dataset("demo", categories=["gear", "tile"])
    prompts = clipad.load_prompts()
    return Experiment(
        "06_explorer",
        {},
        tiny_backbone,
        dataset,
        clipad.protocol("demo"),
        prompts,
        tmp_path,
        seed=0,
    )


@pytest.fixture
def explorer(run):
    return widgets.Explorer(run)


@pytest.fixture
def start(explorer):
    return explorer.settings()


@pytest.fixture
def controls(explorer, start, tmp_path):
    return widgets.Controls(explorer, start, uploads=tmp_path / "uploads")


def upload(name: str, content: bytes):
    """What ipywidgets puts into the value of a FileUpload."""
    now = datetime(2024, 1, 1, tzinfo=UTC)
    return (
        {
            "name": name,
            "type": "image/png",
            "size": len(content),
            "content": memoryview(content),
            "last_modified": now,
        },
    )


def picture(size=(50, 40), colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="png")
    return buffer.getvalue()


# --- model


def test_empty_settings_are_the_published_choice(explorer, start):
    assert start.image == "gear/test/broken/000.png"
    assert start.object_name == "gear"
    assert (start.detector, start.rvs, start.stages) == ("sdp", "dbscan", (1, 2, 3, 4))
    assert start.smoothing == pytest.approx(8 / 240 * 32, abs=0.05)
    assert start.look[2] == explorer.depth == 4
    assert explorer.settings(**asdict(start)) == start


@pytest.mark.parametrize("name", ["direct", "clip_surgery", "sdp", "winclip", "sdp_plus"])
def test_the_model_shows_what_the_detector_predicts(run, name):
    layers = LinearLayers(*run.backbone.visual.proj.shape, 4)
    explorer = widgets.Explorer(run, layers)
    found = explorer.show(explorer.settings(detector=name, smoothing=2.0, rvs="mean"))
    options = {"rvs": "mean", "smoothing": 2.0}
    kind = widgets.DETECTORS[name]
    detector = kind(
        run.backbone,
        **(
            {}
            if name == "winclip"
            else {"layers": layers} | options
            if name == "sdp_plus"
            else options
        ),
    )
    sample = explorer.samples[found.settings.image]
    pixels = run.backbone.preprocess(clipad.read_image(sample.image_path))[None]
    expected = detector.predict(pixels, "gear")
    np.testing.assert_allclose(found.map, expected.maps[0], rtol=1e-4, atol=1e-5)
    assert found.probability == pytest.approx(float(expected.probabilities[0]), rel=1e-4)
    assert found.mask.shape == found.map.shape == (32, 32)


def test_fewer_stages_are_another_map(explorer, start):
    one = explorer.show(replace(start, stages=(4,), smoothing=widgets.NO_SMOOTHING))
    detector = clipad.SDP(explorer.backbone, stages=[4], smoothing=0)
    expected = detector.predict(explorer._pixels(start.image), "gear").maps[0]
    np.testing.assert_allclose(one.map, expected, rtol=1e-4, atol=1e-5)
    assert list(one.cosines.index) == ["after block 4", "whole image"]


def test_cosines_are_those_of_the_chosen_patch(explorer, start):
    found = explorer.show(replace(start, look=(2, 3, 1)))
    detector = clipad.SDP(explorer.backbone, rvs_options={"eps": 0.5, "min_samples": 15})
    features = detector.features(explorer._pixels(start.image))
    text = detector.text_vectors("gear")
    index = 1 + 1 * 4 + 2
    for name, tokens in zip(found.cosines.index, features.tokens, strict=False):
        expected = torch.nn.functional.normalize(tokens[0, index], dim=0) @ text
        np.testing.assert_allclose(found.cosines.loc[name], expected, atol=1e-5)
    whole = torch.nn.functional.normalize(features.image_embedding[0], dim=0) @ text
    np.testing.assert_allclose(found.cosines.loc["whole image"], whole, atol=1e-5)
    # and the class probability follows from the last row
    assert found.probability == pytest.approx(float((100 * whole).softmax(0)[1]), rel=1e-3)


def test_attention_is_the_chosen_block_s(explorer, start):
    found = explorer.show(replace(start, look=(1, 2, 2)))
    visual = explorer.backbone.visual
    with torch.no_grad():
        x = visual.ln_pre(embed_patches(visual, explorer._pixels(start.image)))
        first, second = visual.transformer.resblocks[:2]
        expected = attention_weights(second, first(x))
    for weights, kind in zip(expected, ("q-k", "v-v"), strict=True):
        np.testing.assert_allclose(found.attention[kind], weights[0, 1 + 1], atol=1e-6)
        assert found.attention[kind].sum() == pytest.approx(1, abs=1e-5)


def test_winclip_cosines_are_means_over_the_windows_that_cover_the_patch(explorer, start):
    corner = explorer.show(
        replace(start, detector="winclip", look=(1, 1, 1))
    )  # one window of each size covers it
    detector = widgets.WinCLIP(explorer.backbone)
    features = detector.features(explorer._pixels(start.image))
    text = detector.text_vectors("gear")
    for tokens, name in zip(features.tokens, ("2 × 2 windows", "3 × 3 windows"), strict=True):
        expected = torch.nn.functional.normalize(tokens[0, 0], dim=0) @ text
        np.testing.assert_allclose(corner.cosines.loc[name], expected, atol=1e-5)


def test_the_scale_does_not_depend_on_the_image(explorer, start):
    other = next(n for n in explorer.samples if n.startswith("gear/test/good"))
    one, two = explorer.show(start), explorer.show(replace(start, image=other))
    assert one.limits == pytest.approx(two.limits, abs=1e-5)
    assert one.cut == pytest.approx(two.cut, abs=1e-5)
    assert not np.allclose(one.map, two.map)
    assert all(name.startswith("gear/") for name in explorer.references(start.image))


def test_own_words_are_the_sentences_that_are_asked(explorer, start):
    own = explorer.show(
        replace(start, normal_words="clean", anomalous_words="{} with a hole, torn", rvs="mean")
    )
    prompts = replace(
        clipad.load_prompts(), normal=("clean {}",), anomalous=("{} with a hole", "torn {}")
    )
    detector = clipad.SDP(explorer.backbone, prompts, rvs="mean", smoothing=start.smoothing)
    expected = detector.predict(explorer._pixels(start.image), "gear")
    assert own.probability == pytest.approx(float(expected.probabilities[0]), rel=1e-4)


def test_notes_say_what_the_text_could_not_carry(explorer, start):
    explorer.backbone.known_words = {"gear"}
    noise = explorer.show(replace(start, object_name="metal gear", normal_words="clean"))
    said = " ".join(noise.notes)
    assert "metal" in said
    assert "never saw" in said
    again = explorer.show(replace(start, object_name="metal gear", normal_words="clean"))
    assert again.notes == noise.notes


def test_kept_features_are_not_computed_again(explorer, start, monkeypatch):
    explorer.show(start)
    monkeypatch.setattr(explorer.backbone.visual, "forward", None)
    monkeypatch.setattr("clipad.detectors.staged_features", None)
    monkeypatch.setattr("clipad.studies.explorer.attention_weights", None)
    changed = replace(
        start, smoothing=3.0, threshold=0.9, look=(1, 1, 1), object_name="tile", rvs="mean"
    )
    assert not np.allclose(explorer.show(changed).map, explorer.show(start).map)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"object_name": " "}, "no name"),
        ({"image": "gear/test/broken/0.png"}, r"nor a file; gear/test/broken/00\d.png\?"),
        ({"detector": "sdp_plus"}, "layers"),
        ({"detector": "sdb"}, "there are direct"),
        ({"rvs": "median"}, "unknown representative"),
        ({"stages": ()}, "choose one or more stages"),
        ({"stages": (2, 9)}, r"1\.\.4"),
        ({"smoothing": -1.0}, "sigma"),
        ({"look": (5, 1, 1)}, r"1\.\.4"),
        ({"look": (1, 1)}, "row and a column"),
        ({"threshold": 2.0}, r"0\.\.1"),
        ({"normal_words": "{clean}"}, "braces"),
        ({"normal_words": "damaged", "anomalous_words": "damaged"}, "normal and for the anomalous"),
        ({"normal_words": "a, a"}, "twice"),
    ],
)
def test_settings_that_cannot_be_shown_are_refused(explorer, start, change, words):
    with pytest.raises(ValueError, match=words):
        explorer.show(replace(start, **change))


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest(explorer):
    with pytest.raises(ValueError, match="detector"):
        explorer.settings(detectr="sdp")


def test_layers_are_not_shown_on_what_they_were_trained_on(run):
    layers = LinearLayers(*run.backbone.visual.proj.shape, 4)
    layers.settings = {"categories": ["gear"]}
    explorer = widgets.Explorer(run, layers)
    with pytest.raises(ValueError, match="trained on gear"):
        explorer.settings(detector="sdp_plus")


def test_latency_tells_model_from_view(explorer, start):
    table = widgets.latency(explorer, start, repeats=2)
    assert (table > 0).all(axis=None)
    assert (table["together"] >= table["model"]).all()


# --- view


def test_figure_has_a_row_per_setting_and_words_with_the_numbers(explorer, start):
    one = explorer.show(start)
    two = explorer.show(
        replace(start, detector="winclip", object_name="a name that is far too long for its panel")
    )
    single, double = view.panels([one]), view.panels([one, two])
    assert len(double.axes[0].images) == 2 * len(single.axes[0].images) == 8
    assert double.get_figheight() > 1.5 * single.get_figheight()
    words = view.describe([one, two])
    assert f"class probability {one.probability:.2f}" in words
    assert "WinCLIP" in words


def test_the_figure_changes_with_what_is_shown(explorer, start):
    pictures = {
        view.png(view.panels([explorer.show(replace(start, **change))]))
        for change in (
            {},
            {"threshold": 0.9},
            {"look": (1, 1, 1)},
            {"look": (1, 1, 2)},
            {"detector": "direct"},
            {"smoothing": 4.0},
        )
    }
    assert len(pictures) == 6
    same = {view.png(view.panels([explorer.show(start)])) for _ in range(2)}
    assert len(same) == 1


def test_figure_of_a_constant_map_and_no_mask(explorer, start):
    one = explorer.show(start)
    flat = replace(one, map=np.zeros_like(one.map), limits=(0.0, 0.0), mask=None)
    assert "true defect" not in str([t.get_text() for t in view.panels([flat]).axes[0].texts])
    assert view.png(view.panels([flat]))


# --- command


def test_the_command_brings_the_settings_back(explorer, start):
    """Typed into a shell, read by the command line, checked by the runner, resolved by the notebook."""
    first = replace(
        start, object_name="3", detector="direct", stages=(2, 4), smoothing=1.5, rvs="mean",
        normal_words="it's {}, fine", look=(1, 2, 3), threshold=0.25,
    )  # fmt: skip
    second = replace(first, detector="winclip", anomalous_words="bad: {}", object_name="tile")
    words = shlex.split(
        widgets.command(
            explorer, first, second, {"preset": "demo", "dataset": "demo", "layers": ""}
        )
    )
    assert words[:3] == ["clipad", "run", "06"]
    pairs = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "-p"]
    texts = [words[i + 1] for i, word in enumerate(words) if word == "-y"]
    values = runner.check_parameters(
        runner.find_notebook("06"), cli.read_parameters(pairs, texts, [])
    )
    assert values.pop("dataset") == "demo"
    compared = values.pop("compare_with")
    again = explorer.settings(**values)
    assert again == first
    assert explorer.settings(**asdict(first) | compared) == second


def test_defaults_need_no_words(explorer, start):
    assert (
        widgets.command(explorer, start, replace(start, detector="direct"))
        == f"clipad run 06 -p image {start.image}"
    )
    assert "compare_with: {}" in widgets.command(explorer, start)


def test_parameters_and_settings_have_the_same_names():
    known = runner.inspect_parameters(runner.find_notebook("06"))
    assert set(asdict(widgets.Settings("", ""))) <= set(known)
    assert set(known["detector"].choices) == set(widgets.DETECTORS)
    assert set(known["rvs"].choices) == set(widgets.METHODS)
    result = CliRunner().invoke(cli.app, ["run", "06", "-p", "detector", "sdb"])
    assert result.exit_code == 2
    assert "did you mean 'sdp'" in result.output


# --- controls


def image_of(controls) -> bytes:
    return base64.b64decode(re.search(r'base64,([^"]+)"', controls.figure.value)[1])


def test_controls_show_the_same_as_the_cell_above(explorer, start, controls):
    assert controls.settings() == [start]
    assert image_of(controls) == view.png(view.panels([explorer.show(start)]))
    assert view.describe([explorer.show(start)]).split(":")[0] in controls.figure.value
    assert 'alt="' in controls.figure.value
    assert controls.message.value == ""
    assert f"-p image {start.image}" in controls.command.value
    assert "JupyterLab" in repr(controls.panel)


@pytest.mark.parametrize(
    ("move", "change"),
    [
        (lambda c: setattr(c.threshold, "value", 0.9), {"threshold": 0.9}),
        (lambda c: setattr(c.rows[0].smoothing, "value", 3.0), {"smoothing": 3.0}),
        (lambda c: setattr(c.rows[0].stages, "value", (1, 4)), {"stages": (1, 4)}),
        (lambda c: setattr(c.rows[0].detector, "value", "direct"), {"detector": "direct"}),
        (lambda c: setattr(c.rows[0].rvs, "value", "pca"), {"rvs": "pca"}),
        (
            lambda c: setattr(c.rows[0].object_name, "value", "metal nut"),
            {"object_name": "metal nut"},
        ),
        (lambda c: setattr(c.rows[0].normal_words, "value", "clean"), {"normal_words": "clean"}),
        (
            lambda c: setattr(c.rows[0].anomalous_words, "value", "torn"),
            {"anomalous_words": "torn"},
        ),
        (
            lambda c: setattr(c.image, "value", "gear/test/good/000.png"),
            {"image": "gear/test/good/000.png"},
        ),
    ],
)
def test_each_control_changes_the_figure(explorer, start, controls, move, change):
    before = image_of(controls)
    move(controls)
    assert controls.settings() == [replace(start, **change)]
    assert (
        image_of(controls)
        == view.png(view.panels([explorer.show(replace(start, **change))]))
        != before
    )


def test_a_slider_s_rounding_error_does_not_reach_the_command(controls):
    controls.rows[0].smoothing.value = 3.3000000000000003
    assert "smoothing 3.3 " in controls.command.value


def test_patch_and_block(start, controls):
    controls.row.value, controls.column.value, controls.rows[0].block.value = 4, 1, 2
    assert controls.settings()[0].look == (4, 1, 2)


def test_a_category_brings_its_images_and_its_name(controls, monkeypatch):
    updates = []
    show = controls.explorer.show
    monkeypatch.setattr(controls.explorer, "show", lambda s: updates.append(s) or show(s))
    controls.category.value = "tile"
    assert len(updates) == 1  # not one for every widget that changes
    assert controls.settings()[0].object_name == "tile"
    assert all(name.startswith("tile/") for _, name in controls.image.options)
    assert controls.explorer.samples[controls.image.value].label == 1


def test_two_settings(controls):
    one = Image.open(io.BytesIO(image_of(controls))).height
    assert controls.rows[1].box.layout.display == "none"
    controls.compare.value = True
    assert controls.rows[1].box.layout.display is None
    assert Image.open(io.BytesIO(image_of(controls))).height > 1.5 * one
    before = image_of(controls)
    controls.rows[1].detector.value = "direct"
    assert image_of(controls) != before
    assert [s.detector for s in controls.settings()] == ["sdp", "direct"]


def test_controls_that_a_method_does_not_heed_are_disabled(controls):
    row = controls.rows[0]
    row.detector.value = "winclip"
    assert row.stages.disabled
    assert row.smoothing.disabled
    assert row.rvs.disabled
    row.detector.value = "sdp"
    assert not any(widget.disabled for widget in (row.stages, row.smoothing, row.rvs))


def test_an_uploaded_image_is_shown_and_can_be_shown_again(explorer, controls, tmp_path):
    before = image_of(controls)
    controls.upload.value = upload("../my photo.png", picture())
    settings = controls.settings()[0]
    path = tmp_path / "uploads"
    assert image_of(controls) != before
    assert [p.name.split("-", 1)[1] for p in path.iterdir()] == [".._my_photo.png"]
    assert settings.image == str(next(path.iterdir()).resolve())
    assert explorer.show(settings).mask is None
    assert settings.image in controls.command.value
    controls.category.value = "tile"
    assert ("uploaded: ../my photo.png", settings.image) in controls.image.options


@pytest.mark.parametrize("content", [b"", b"no image", picture()[:60]])
def test_a_broken_upload_is_told_and_leaves_everything(controls, tmp_path, content):
    before, settings = image_of(controls), controls.settings()
    controls.upload.value = upload("broken.png", content)
    assert "broken.png" in controls.message.value
    assert "BytesIO" not in controls.message.value
    assert (image_of(controls), controls.settings()) == (before, settings)
    assert not (tmp_path / "uploads").exists()


def test_an_empty_name_is_told_and_mended(controls):
    before = image_of(controls)
    controls.rows[0].object_name.value = ""
    assert "no name" in controls.message.value
    assert "role=" in controls.message.value
    assert image_of(controls) == before
    controls.rows[0].object_name.value = "tile"
    assert "no name" not in controls.message.value
    assert image_of(controls) != before


def test_a_fault_of_ours_is_shown_and_raised(controls, monkeypatch):
    def broken(settings):
        raise RuntimeError("<a fault>")

    monkeypatch.setattr(controls.explorer, "show", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        controls.threshold.value = 0.9
    assert "RuntimeError: &lt;a fault&gt;" in controls.message.value


def test_words_of_a_user_are_shown_as_text_not_as_html(controls):
    controls.rows[0].object_name.value = '<img src=x onerror="alert(1)">'
    assert (
        "<img src=x" not in controls.figure.value + controls.command.value + controls.message.value
    )


def test_an_image_of_one_s_own_from_the_start(explorer, tmp_path):
    path = tmp_path / "own.png"
    path.write_bytes(picture(colour="grey"))
    settings = explorer.settings(image=str(path), object_name="thing")
    controls = widgets.Controls(explorer, settings, uploads=tmp_path)
    assert controls.settings() == [settings]
