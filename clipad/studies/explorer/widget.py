"""The image widget: what the model said, as data for the browser (``numbers.js``, ``widget.js``), which does the rest.

With a kernel it is an anywidget; without one the same module runs on the same data inside HTML that stands on its own.
"""

import base64
import hashlib
import io
import json
import zlib
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from clipad.studies.experiments import DETECTORS
from clipad.studies.explorer.model import Answer, Explorer, Settings
from clipad.studies.figures import ANOMALOUS, MAP, NORMAL

_HERE = Path(__file__).parent
MODULE = "".join((_HERE / n).read_text(encoding="utf-8") for n in ("numbers.js", "widget.js"))
STYLE = (_HERE / "widget.css").read_text(encoding="utf-8")


class Viewer(anywidget.AnyWidget):
    """Two images side by side with map, threshold, and the cosines and attention of a patch that one clicks on.

    ``setup`` never changes. ``pictures`` and ``answers``, one each for A and B, come from the model and can be set at
    any time; ``view`` holds what the browser can change by itself, and is sent back.
    """

    _esm = MODULE
    _css = STYLE
    setup = traitlets.Dict().tag(sync=True)
    pictures = traitlets.List().tag(sync=True)
    answers = traitlets.List().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, explorer: Explorer, sides: list[Settings]):
        colours = (colormaps[MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
        row, column, block = sides[0].look
        setup = {
            "size": explorer.size,
            "grid": explorer.grid,
            "stages": list(explorer.stages),
            "colours": colours.tobytes(),
            "normal": to_hex(NORMAL),
            "anomalous": to_hex(ANOMALOUS),
        }
        view = {
            "sides": [
                {"shows": i, "stages": list(s.stages)}
                | {"surgery": s.surgery, "smoothing": s.smoothing}
                for i, s in enumerate(sides)
            ],
            "patch": [row - 1, column - 1],
            "block": block,
            "falseAlarms": sides[0].false_alarms,
            "opacity": 0.55,
            "contour": True,
            "truth": True,
        }
        pictures = [picture(explorer, s.image) for s in sides]
        answers = [answer(explorer.answer(s), s) for s in sides]
        super().__init__(setup=setup, pictures=pictures, answers=answers, view=view)

    def html(self) -> str:
        """The figure as HTML that needs no kernel and no other file; the same data give the same text. Who runs no
        scripts reads a sentence."""
        state = {name: getattr(self, name) for name in ("setup", "pictures", "answers", "view")}
        data = json.dumps(
            state, default=lambda b: {"deflated": base64.b64encode(zlib.compress(b, 9)).decode()}
        ).replace("<", "\\u003c")  # no name ends the script
        name = f"clipad-{hashlib.sha256(data.encode()).hexdigest()[:12]}"
        module = MODULE.replace("export default ", "const widget = ").replace("export ", "")
        return (
            f'<div id="{name}"><p><em>An interactive figure stands here in a browser that runs scripts: in JupyterLab, '
            "once the notebook has been run, and in the book.</em></p></div>\n"
            f"<style>{STYLE}</style>\n"
            f'<script>(async () => {{\n{module}\nawait standAlone(widget, "{name}", {data});\n}})();</script>'
        )


def picture(explorer: Explorer, name: str) -> dict:
    """What depends on the image alone: its pixels, the true mask, attention 2 x J x N x T, float16 (first all lower
    bytes, then all upper ones, which compresses better)."""
    image, mask = explorer.picture(name)
    attention = explorer.attention(name).astype("<f2").view(np.uint8).reshape(-1, 2)
    image = image.copy()
    image.thumbnail((480, 480), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    known = explorer.samples.get(name)
    return {
        "name": name if known else Path(name).name,
        "what": f"{known.category}, {known.defect}" if known and known.defect != "unknown" else "",
        "width": image.width,
        "height": image.height,
        "png": png.getvalue(),
        "mask": None if mask is None else np.packbits(mask).tobytes(),
        "attention": attention.T.tobytes(),
    }


def answer(found: Answer, s: Settings) -> dict:
    """What depends on image and words. Cosines and maps as float32, those of the flawless images as 16-bit steps."""
    own, others = found.values[0], found.values[1:]
    low, high = float(others.min()), float(others.max())
    step = max(high - low, 1e-9) / 65535
    return {
        "title": f"{DETECTORS[s.detector].name} · {s.object_name}",
        "detector": s.detector,
        "rows": list(found.rows),
        "z": found.z.astype("<f4").tobytes(),
        "maps": None if own.ndim == 3 else own.astype("<f4").tobytes(),
        "references": np.round((others - low) / step).astype("<u2").tobytes(),
        "count": len(others),
        "low": low,
        "step": step,
        "whole": list(found.whole),
        "probability": found.probability,
    }
