"""The image widget: its numbers in a browser's language against the module's, what it carries, and its HTML."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import clipad
from clipad.linear_layers import LinearLayers
from clipad.studies.experiments import Experiment
from clipad.studies.explorer import widget
from clipad.studies.explorer.model import Explorer

MODULE = Path(widget.__file__).with_name("numbers.js")
SCRIPT = """
import fs from "node:fs";
const [module, folder] = process.argv.slice(2);
const { computeMap, float16, quantile } = await import(module);
const revive = (_, v) => v && v.file ? new DataView(fs.readFileSync(`${folder}/${v.file}`).buffer.slice(0)) : v;
fs.readFileSync = ((read) => (path, ...rest) => rest.length ? read(path, ...rest)
  : new Uint8Array(read(path)))(fs.readFileSync); // own memory, not Node's pool
const state = JSON.parse(fs.readFileSync(`${folder}/state.json`, "utf-8"), revive);
const found = state.answers.map((answer, i) => {
  const { map, maxima, maximum, low, high } = computeMap(state.setup, answer, state.view.sides[i]);
  const threshold = quantile(maxima, 1 - state.view.falseAlarms / 100);
  return { map: [...map], maxima: [...maxima], maximum, low, high, threshold };
});
const attention = [...float16(state.pictures[0].attention)];
console.log(JSON.stringify({ found, attention }));
"""


@pytest.fixture
def explorer(tiny_backbone, tmp_path):
    dataset = clipad.load_dataset("demo", categories=["capsule", "screw"])
    run = Experiment(
        "06_explorer", {}, tiny_backbone, dataset, clipad.protocol("demo"), clipad.load_prompts(),
        tmp_path, seed=0,
    )  # fmt: skip
    return Explorer(run, LinearLayers(*run.backbone.visual.proj.shape, 4))


def in_javascript(state: dict, folder: Path) -> dict:
    """What the module computes from a widget's state."""
    if not (node := shutil.which("node")):
        pytest.skip("there is no node")

    def stored(value):
        if isinstance(value, bytes):
            name = f"{len(list(folder.iterdir()))}.bin"
            (folder / name).write_bytes(value)
            return {"file": name}
        if isinstance(value, dict):
            return {k: stored(v) for k, v in value.items()}
        return [stored(v) for v in value] if isinstance(value, list) else value

    (folder / "state.json").write_text(json.dumps(stored(state)))
    shutil.copy(MODULE, folder / "numbers.mjs")
    (folder / "script.mjs").write_text(SCRIPT)
    done = subprocess.run(
        [node, folder / "script.mjs", folder / "numbers.mjs", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def state_of(explorer, sides) -> dict:
    viewer = widget.Viewer(explorer, sides)
    return {name: getattr(viewer, name) for name in ("setup", "pictures", "answers", "view")}


def test_the_browser_computes_what_the_model_computes(explorer, tmp_path):
    start = explorer.settings(false_alarms=10.0)
    every = [
        start,
        replace(start, stages=(2, 4), smoothing=0.0),
        replace(start, stages=(1,), surgery=False, smoothing=3.7),
        replace(start, image=explorer.example(0, "screw"), smoothing=8.0),
        replace(start, detector="clip_surgery"),
        replace(start, detector="direct"),
        replace(start, detector="winclip"),
        replace(start, detector="sdp_plus", smoothing=2.0),
    ]
    found = in_javascript(state_of(explorer, every), tmp_path)
    for settings, own in zip(every, found["found"], strict=True):
        shown = explorer.show(settings)
        np.testing.assert_allclose(own["map"], shown.map.ravel(), atol=1e-4)
        np.testing.assert_allclose(own["maxima"], np.sort(shown.maxima), atol=1e-4)
        assert own["maximum"] == pytest.approx(shown.map.max(), abs=1e-4)
        assert own["threshold"] == pytest.approx(shown.threshold, abs=1e-4)
        high = 2 * shown.maxima.max() - shown.middle  # the maximum is the middle of the colours
        assert (own["low"], own["high"]) == pytest.approx((shown.middle, high), abs=1e-4)
    weights = np.reshape(found["attention"], (2, 4, 16, 17))
    np.testing.assert_allclose(weights, explorer.attention(start.image), atol=1e-3, rtol=1e-3)


def test_an_image_of_the_demo_takes_less_than_400_kb():
    backbone = clipad.load_backbone("demo")
    dataset = clipad.load_dataset("demo", categories=["screw"])
    run = Experiment(
        "06_explorer", {}, backbone, dataset, clipad.protocol("demo"), clipad.load_prompts(),
        Path("."), seed=0,
    )  # fmt: skip
    explorer = Explorer(run)
    start = explorer.settings()
    viewer = widget.Viewer(explorer, [start])
    packed = len(viewer.html()) - len(widget.MODULE) - len(widget.STYLE)
    assert 0.75 * packed < 400_000  # base64 writes three bytes as four letters


def test_the_html_stands_on_its_own(explorer):
    start = explorer.settings()
    text = widget.Viewer(explorer, [start, start]).html()
    assert text == widget.Viewer(explorer, [start, start]).html()
    assert "export " not in text
    assert text.count("</script>") == text.count("<script>") == 1
    for word in ("http://", "https://", "import "):
        assert word not in text
    assert "<p>" in text.split("<style>")[0]  # what is read where no script runs
