"""The explorer: its model against the detectors, its figure, and its controls driven without a kernel."""

import html
import io
import json
import shlex
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import clipad
from clipad.dual_path import attention_weights, embed_patches
from clipad.linear_layers import LinearLayers
from clipad.studies.experiments import DETECTORS, Experiment
from clipad.studies.explorer import panel
from clipad.studies.explorer.model import REFERENCES, Explorer, Settings, patch_values
from clipad.studies.explorer.panel import command
from clipad.surgery import feature_surgery
from clipad.text import METHODS
from clipad.tools import cli, notebooks, parameters, runner


@pytest.fixture
def run(tiny_backbone, tmp_path):
    dataset = clipad.load_dataset("demo", categories=["capsule", "screw"])
    return Experiment(
        "06_explorer", {}, tiny_backbone, dataset, clipad.protocol("demo"), clipad.load_prompts(),
        tmp_path, seed=0,
    )  # fmt: skip


@pytest.fixture
def explorer(run):
    return Explorer(run)


@pytest.fixture
def start(explorer):
    return explorer.settings()


@pytest.fixture
def controls(explorer, start, tmp_path):
    return panel.Controls(explorer, start, explorer.beside(start), uploads=tmp_path / "uploads")


def pixels(explorer, name):
    return explorer.backbone.preprocess(explorer.picture(name)[0])[None]


def upload(name: str, content: bytes):
    """What ipywidgets puts into the value of a FileUpload."""
    now = datetime(2024, 1, 1, tzinfo=UTC)
    file = {"name": name, "type": "image/png", "size": len(content), "last_modified": now}
    return (file | {"content": memoryview(content)},)


def picture(size=(50, 40), colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="png")
    return buffer.getvalue()


# --- model


def test_empty_settings_are_the_published_choice(explorer, start):
    assert start.image == explorer.example(label=1)
    assert explorer.samples[start.image].label == 1
    assert start.object_name == "capsule"
    assert (start.detector, start.rvs, start.stages) == ("sdp", "dbscan", (1, 2, 3, 4))
    assert start.smoothing == pytest.approx(8 / 240 * 32, abs=0.05)
    assert start.look[2] == 4
    assert explorer.settings(**asdict(start)) == start
    assert explorer.settings(smoothing=0.0, false_alarms=0.0).smoothing == 0


def test_beside_a_defective_image_stands_a_flawless_one(explorer, start):
    other = explorer.beside(start)
    assert explorer.samples[other.image].label == 0
    assert replace(other, image=start.image) == start
    assert explorer.beside(start, {"detector": "direct"}) == replace(start, detector="direct")


@pytest.mark.parametrize("name", ["direct", "clip_surgery", "sdp", "winclip", "sdp_plus"])
def test_the_model_shows_what_the_detector_predicts(run, name):
    layers = LinearLayers(*run.backbone.visual.proj.shape, 4)
    explorer = Explorer(run, layers)
    asked = explorer.settings(detector=name, smoothing=2.0, rvs="mean")
    found = explorer.show(asked)
    options = {} if name == "winclip" else {"rvs": "mean", "smoothing": 2.0}
    own = [layers] if name == "sdp_plus" else []
    detector = DETECTORS[name](run.backbone, *own, **options)
    expected = detector.predict(pixels(explorer, asked.image), "capsule")
    np.testing.assert_allclose(found.map, expected.maps[0], rtol=1e-4, atol=1e-5)
    assert found.answer.probability == pytest.approx(float(expected.probabilities[0]), rel=1e-4)
    assert explorer.picture(asked.image)[1].shape == found.map.shape == (32, 32)


def test_patch_values_are_feature_surgery():
    generator = np.random.default_rng(0)
    tokens = [torch.from_numpy(generator.normal(size=(2, 5, 8))).float() for _ in range(3)]
    text = torch.nn.functional.normalize(
        torch.from_numpy(generator.normal(size=(8, 2))).float(), dim=0
    )
    z = np.stack(
        [(torch.nn.functional.normalize(t, dim=-1) @ text).numpy() for t in tokens], axis=1
    )
    expected = feature_surgery(tokens, text)[:, 1:, 1]
    np.testing.assert_allclose(patch_values(z), expected, atol=1e-6)
    np.testing.assert_allclose(patch_values(z, surgery=False), z[:, :, 1:, 1].sum(axis=1))


def test_fewer_stages_are_another_map(explorer, start):
    one = explorer.show(replace(start, stages=(4,), smoothing=0.0))
    detector = clipad.SDP(explorer.backbone, stages=[4], smoothing=0)
    expected = detector.predict(pixels(explorer, start.image), "capsule").maps[0]
    np.testing.assert_allclose(one.map, expected, rtol=1e-4, atol=1e-5)


def test_cosines_are_those_of_the_chosen_patch(explorer, start):
    found = explorer.show(replace(start, look=(2, 3, 1)))
    detector = clipad.SDP(explorer.backbone, rvs_options={"eps": 0.5, "min_samples": 15})
    features = detector.features(pixels(explorer, start.image))
    text = detector.text_vectors("capsule")
    for values, tokens in zip(found.cosines.to_numpy(), features.tokens, strict=False):
        expected = torch.nn.functional.normalize(tokens[0, 1 + 4 + 2], dim=0) @ text
        np.testing.assert_allclose(values, expected, atol=1e-5)
    whole = torch.nn.functional.normalize(features.image_embedding[0], dim=0) @ text
    np.testing.assert_allclose(found.cosines.loc["whole image"], whole, atol=1e-5)
    # and the class probability follows from the last row
    assert found.answer.probability == pytest.approx(float((100 * whole).softmax(0)[1]), rel=1e-3)


def test_attention_is_the_chosen_block_s(explorer, start):
    found = explorer.show(replace(start, look=(1, 2, 2)))
    visual = explorer.backbone.visual
    with torch.no_grad():
        x = visual.ln_pre(embed_patches(visual, pixels(explorer, start.image)))
        first, second = visual.transformer.resblocks[:2]
        expected = attention_weights(second, first(x))
    for weights, kind in zip(expected, ("q-k", "v-v"), strict=True):
        np.testing.assert_allclose(found.attention[kind], weights[0, 1 + 1], atol=1e-6)
        assert found.attention[kind].sum() == pytest.approx(1, abs=1e-5)


def test_winclip_cosines_are_means_over_the_windows_that_cover_the_patch(explorer, start):
    corner = explorer.show(replace(start, detector="winclip", look=(1, 1, 1)))
    detector = clipad.WinCLIP(explorer.backbone)
    features = detector.features(pixels(explorer, start.image))
    text = detector.text_vectors("capsule")
    for tokens, values in zip(features.tokens, corner.cosines.to_numpy(), strict=False):
        expected = torch.nn.functional.normalize(tokens[0, 0], dim=0) @ text  # one window of each
        np.testing.assert_allclose(values, expected, atol=1e-5)


# --- threshold and scale


def test_the_threshold_lets_the_named_share_of_flawless_images_pass(explorer, start):
    for percent in (0.0, 10.0, 50.0):
        found = explorer.show(replace(start, false_alarms=percent))
        share = np.mean(found.maxima > found.threshold)
        assert share == pytest.approx(percent / 100, abs=1 / len(found.maxima))


def test_threshold_and_scale_come_from_flawless_images_without_the_shown_one(explorer, start):
    found = explorer.show(start)
    good = [n for n, s in explorer.samples.items() if s.category == "capsule" and s.label == 0]
    assert len(found.maxima) == min(REFERENCES, len(good))
    expected = [explorer.show(replace(start, image=name)).map for name in good]
    np.testing.assert_allclose(
        np.sort(found.maxima), np.sort([m.max() for m in expected]), atol=1e-5
    )
    assert found.middle == pytest.approx(np.median(expected), abs=1e-5)
    itself = explorer.show(replace(start, image=good[0]))
    assert len(itself.maxima) == len(found.maxima) - 1


def test_own_flawless_images_give_the_scale(explorer, start, tmp_path):
    for number, colour in enumerate(("grey", "silver", "navy")):
        (tmp_path / f"{number}.png").write_bytes(picture(colour=colour))
    found = explorer.show(replace(start, flawless=str(tmp_path)))
    assert len(found.maxima) == 3
    own = [
        explorer.show(replace(start, image=str(tmp_path / f"{i}.png"), object_name="capsule"))
        for i in range(3)
    ]
    np.testing.assert_allclose(found.maxima, [one.map.max() for one in own], atol=1e-5)


def test_a_scale_from_other_objects_is_said(explorer, tmp_path):
    (tmp_path / "own.png").write_bytes(picture())
    found = explorer.show(explorer.settings(image=str(tmp_path / "own.png"), object_name="thing"))
    assert any("other objects" in note for note in found.answer.notes)


# --- words


def test_own_words_are_the_sentences_that_are_asked(explorer, start):
    own = explorer.show(
        replace(start, normal_words="clean", anomalous_words="{} with a hole, torn", rvs="mean")
    )
    prompts = replace(
        clipad.load_prompts(), normal=("clean {}",), anomalous=("{} with a hole", "torn {}")
    )
    detector = clipad.SDP(explorer.backbone, prompts, rvs="mean", smoothing=start.smoothing)
    expected = detector.predict(pixels(explorer, start.image), "capsule")
    assert own.answer.probability == pytest.approx(float(expected.probabilities[0]), rel=1e-4)


def test_which_phrase_speaks(explorer, start):
    table = explorer.speaking(start)
    normal, anomalous = clipad.load_prompts().sentences("capsule")
    assert len(table) == len(normal) + len(anomalous) == 418
    assert table["cosine"].is_monotonic_decreasing
    best = table.iloc[0]
    embedding = (
        clipad.SDP(explorer.backbone).features(pixels(explorer, start.image)).image_embedding
    )
    expected = torch.cosine_similarity(
        embedding[0], explorer.backbone.encode_text([best.sentence])[0], dim=0
    )
    assert best.cosine == pytest.approx(float(expected), abs=1e-5)
    assert best.state == ("normal" if best.sentence in normal else "anomalous")
    assert not np.allclose(explorer.speaking(start, patch=True)["cosine"], table["cosine"])


def test_notes_say_what_the_text_could_not_carry(explorer, start):
    explorer.backbone.known_words = {"capsule"}
    asked = replace(start, object_name="metal", normal_words="clean")
    said = " ".join(explorer.answer(asked).notes)
    assert "metal" in said
    assert "never saw" in said
    assert explorer.answer(asked).notes == explorer.answer(asked).notes


def test_kept_features_are_not_computed_again(explorer, start, monkeypatch):
    explorer.show(start)
    monkeypatch.setattr(explorer.backbone.visual, "forward", None)
    monkeypatch.setattr("clipad.detectors.staged_features", None)
    monkeypatch.setattr("clipad.studies.explorer.model.attention_by_block", None)
    changed = replace(start, smoothing=3.0, look=(1, 1, 1), object_name="wood", rvs="mean")
    assert not np.allclose(explorer.show(changed).map, explorer.show(start).map)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"object_name": " "}, "no name"),
        ({"image": "capsule/test/broken/0.png"}, r"nor a file .*capsule/test/broken/00\d.png"),
        ({"detector": "sdp_plus"}, "layers"),
        ({"detector": "sdb"}, "direct, clip_surgery"),
        ({"rvs": "median"}, "unknown representative"),
        ({"stages": (2, 9)}, r"some of \[1, 2, 3, 4\]"),
        ({"look": (5, 1, 1)}, r"1\.\.4"),
        ({"flawless": "nowhere"}, "no folder"),
        ({"normal_words": "{clean}"}, "braces"),
    ],
)
def test_settings_that_cannot_be_shown_are_refused(explorer, start, change, words):
    with pytest.raises(ValueError, match=words):
        explorer.show(explorer.settings(**asdict(start) | change))


def test_layers_are_not_shown_on_what_they_were_trained_on(run):
    layers = LinearLayers(*run.backbone.visual.proj.shape, 4)
    layers.settings = {"categories": ["capsule"]}
    explorer = Explorer(run, layers)
    settings = explorer.settings(detector="sdp_plus")
    with pytest.raises(ValueError, match="trained on capsule"):
        explorer.show(settings)


# --- command


def read_back(explorer, text):
    """Typed into a shell, read by the command line, checked by the runner, resolved as the notebook does."""
    words = shlex.split(text)
    assert words[:3] == ["clipad", "run", "06"]
    pairs = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "-p"]
    texts = [words[i + 1] for i, word in enumerate(words) if word == "-y"]
    given = parameters.read_parameters(pairs, texts, [])
    values = runner.plan([notebooks.find_notebook("06")], given)[0][1]
    compared = values.pop("compare_with", {})
    values = {name: value for name, value in values.items() if name in asdict(Settings())}
    first = explorer.settings(**values)
    return first, explorer.beside(first, compared)


def test_the_command_brings_the_settings_back(explorer, start):
    first = replace(
        start, object_name="3", detector="direct", stages=(2, 4), smoothing=0.0, rvs="mean",
        normal_words="it's {}, fine", look=(1, 2, 3), false_alarms=0.0, surgery=False,
    )  # fmt: skip
    second = replace(first, detector="winclip", anomalous_words="bad: {}", object_name="wood")
    base = {"preset": "demo", "dataset": "demo", "layers": ""}
    text = command(explorer, first, second, base)
    assert "\n" not in text
    assert '"dataset": "demo"' in text
    assert read_back(explorer, text) == (first, second)
    assert read_back(explorer, command(explorer, first, first)) == (first, first)


def test_defaults_need_no_words(explorer, start):
    other = explorer.beside(start)
    text = command(explorer, start, other)
    assert shlex.split(text)[:6] == ["clipad", "run", "06", "-p", "image", start.image]
    assert shlex.split(text)[7:] == [json.dumps({"compare_with": {"image": other.image}})]


def test_parameters_and_settings_have_the_same_names():
    known = notebooks.inspect_parameters(notebooks.find_notebook("06"))
    assert set(asdict(Settings())) <= set(known)
    assert set(known["detector"].limits.split("|")) == set(DETECTORS)
    assert set(known["rvs"].limits.split("|")) == set(METHODS)
    result = CliRunner().invoke(cli.app, ["run", "06", "-p", "detector", "sdb"])
    assert result.exit_code == 2
    assert "did you mean 'sdp'" in result.output


# --- controls


def message(controls, name):
    return controls.messages[name].value


def test_controls_show_the_same_as_the_cell_above(explorer, start, controls):
    assert controls.settings() == [start, explorer.beside(start)]
    assert f"-p image {start.image}" in controls.command.value
    assert controls.controls["object_name"].value == "capsule"
    assert "a photo of" in controls.phrases.value
    shown = controls._repr_mimebundle_()
    assert controls.viewer.html() == shown["text/html"]  # what stays where no kernel runs
    assert "JupyterLab" in shown["text/plain"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("detector", "direct"),
        ("rvs", "pca"),
        ("object_name", "metal nut"),
        ("normal_words", "clean"),
        ("anomalous_words", "torn"),
    ],
)
def test_each_control_changes_what_the_browser_draws(explorer, start, controls, name, value):
    before = controls.viewer.answers
    controls.controls[name].value = value
    for settings, answer, old in zip(controls.asked, controls.viewer.answers, before, strict=True):
        assert getattr(settings, name) == value
        assert answer == panel.widget.answer(explorer.answer(settings), settings) != old
    assert message(controls, name) == ""


def test_a_side_can_be_changed_alone(controls, start):
    b = controls.viewer.answers[1]
    controls.sides.value = (0,)
    controls.controls["detector"].value = "direct"
    assert [s.detector for s in controls.settings()] == ["direct", "sdp"]
    assert controls.viewer.answers[1] == b
    controls.sides.value = (1,)
    assert controls.controls["detector"].value == "sdp"  # the controls say what B asks


def test_an_image_is_chosen_for_one_side(controls):
    before = [s.image for s in controls.asked]
    for sides, side, name in (((0, 1), 0, "000"), ((1,), 1, "001")):
        controls.sides.value = sides
        controls.controls["image"].value = f"capsule/test/good/{name}.png"
        before[side] = f"capsule/test/good/{name}.png"
        assert [s.image for s in controls.asked] == before
        assert [p["name"] for p in controls.viewer.pictures] == before


def test_what_is_changed_in_the_browser_reaches_the_command(controls):
    view = controls.viewer.view
    side = view["sides"][0] | {"stages": [1, 4], "smoothing": 2.5}
    controls.viewer.view = view | {
        "patch": [0, 3], "falseAlarms": 20, "sides": [side, view["sides"][1]],
    }  # fmt: skip
    first, second = controls.settings()
    assert (first.stages, first.smoothing, first.look[:2]) == ((1, 4), 2.5, (1, 4))
    assert second.stages == (1, 2, 3, 4)
    assert second.false_alarms == 20
    assert '"stages": [1, 4]' in html.unescape(controls.command.value)
    swapped = [s | {"shows": 0} for s in view["sides"]]
    controls.viewer.view = view | {"sides": swapped}
    assert len({s.image for s in controls.settings()}) == 1


def test_a_category_brings_its_images_and_its_name(controls, explorer):
    controls.controls["category"].value = "screw"
    assert [s.object_name for s in controls.asked] == ["screw", "screw"]
    assert [explorer.samples[s.image].label for s in controls.asked] == [1, 0]
    assert all(name.startswith("screw/") for _, name in controls.controls["image"].options)


def test_the_last_of_many_changes_is_shown(controls, explorer):
    for number in range(40):
        controls.controls["object_name"].value = f"nut {'abcd'[number % 4]}"
    last = controls.asked[0]
    assert last.object_name == "nut d"
    assert controls.viewer.answers[0] == panel.widget.answer(explorer.answer(last), last)


def test_an_uploaded_image_is_shown_and_can_be_shown_again(explorer, controls, tmp_path):
    before = controls.viewer.pictures
    for _ in range(2):  # the same file twice
        controls.controls["upload"].value = upload("../my photo.png", picture())
    path = next((tmp_path / "uploads").iterdir()).resolve()
    assert path.name.split("-", 1)[1] == ".._my_photo.png"
    assert controls.asked[0].image == str(path)
    assert controls.asked[1].image != str(path)  # B stays beside it
    assert controls.viewer.pictures != before
    assert "type under object" in message(controls, "upload")
    assert explorer.picture(str(path))[1] is None
    assert str(path) in controls.command.value
    controls.controls["category"].value = "screw"
    assert (path.name, str(path)) in controls.controls["image"].options


@pytest.mark.parametrize("content", [b"", b"no image", picture()[:60]])
def test_a_broken_upload_is_told_and_leaves_everything(controls, content):
    before, settings = controls.viewer.pictures, controls.settings()
    controls.controls["upload"].value = upload("broken.png", content)
    assert "broken.png" in message(controls, "upload")
    assert (controls.viewer.pictures, controls.settings()) == (before, settings)


def test_an_empty_name_is_told_beside_it_and_mended(controls):
    before = controls.viewer.answers
    controls.controls["object_name"].value = ""
    assert "no name" in message(controls, "object_name")
    assert "alert" in message(controls, "object_name")
    controls.controls["rvs"].value = "mean"  # another control does not hide it
    assert "no name" in message(controls, "object_name")
    assert controls.controls["object_name"].value == ""
    controls.controls["object_name"].value = "wood"
    assert message(controls, "object_name") == ""
    assert controls.viewer.answers != before


def test_words_of_a_user_are_shown_as_text_not_as_html(controls):
    controls.controls["object_name"].value = '<img src=x onerror="alert(1)">'
    texts = (controls.phrases, controls.command, controls.notes)
    assert "<img src=x" not in "".join(text.value for text in texts)


def test_an_image_of_one_s_own_from_the_start(explorer, tmp_path):
    path = tmp_path / "own.png"
    path.write_bytes(picture(colour="grey"))
    settings = explorer.settings(image=str(path), object_name="thing")
    controls = panel.Controls(explorer, settings, settings, uploads=tmp_path)
    assert controls.settings() == [settings, settings]
    assert controls.controls["image"].value == str(path)


def test_the_page_of_make_app_is_the_panel():
    notebook = Path(panel.__file__).with_name("app.ipynb")
    (cell,) = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = {}
    exec("".join(cell["source"]), names)
    assert isinstance(names["controls"], panel.Controls)
    assert names["first"].image != names["controls"].explorer.beside(names["first"]).image


def test_a_folder_of_one_s_own(controls, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture())
    controls.controls["folder"].value = str(tmp_path)
    assert "2 images" in message(controls, "folder")
    controls.controls["image"].value = str((tmp_path / "b.png").resolve())
    assert controls.asked[0].image.endswith("b.png")
    controls.controls["folder"].value = "nowhere"
    assert "no folder" in message(controls, "folder")
