"""The controls that need the model, around the image widget. They only say what is asked; the model answers."""

import hashlib
import html
import json
import re
import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import ipywidgets as w
import pandas as pd

from clipad.io.files import write_atomically
from clipad.io.images import read_image
from clipad.studies.experiments import DETECTORS
from clipad.studies.explorer import widget
from clipad.studies.explorer.model import Explorer, Settings, list_images
from clipad.text import METHODS

_INDENT = "6.5em"
"""width of the labels before the controls"""


def command(explorer: Explorer, first: Settings, second: Settings, base=None) -> str:
    """What to type in a shell to get A and B again: ``clipad run 06 ...``.

    ``base``: a mapping, parameters with which the notebook itself runs (preset, model, ...); empty ones are left out.
    """

    def changes(one: Settings, two: Settings) -> dict:
        old = asdict(one)
        return {name: value for name, value in asdict(two).items() if value != old[name]}

    values = {k: v for k, v in (base or {}).items() if v and (k, v) != ("preset", "demo")}
    values |= changes(explorer.settings(image=first.image), first)
    values["compare_with"] = changes(first, second) or {"image": second.image}
    text = json.dumps(values, ensure_ascii=False)  # which is YAML, too
    return shlex.join(["clipad", "run", "06", "-p", "image", first.image, "-y", text])


def _make_controls(explorer: Explorer) -> dict[str, w.Widget]:
    look = {"layout": {"width": "auto", "min_width": "0"}}
    look |= {"style": {"description_width": _INDENT}}
    menu, text = partial(w.Dropdown, **look), partial(w.Text, continuous_update=False, **look)
    methods = [(DETECTORS[name].name, name) for name in explorer.detectors]
    upload = w.FileUpload(accept="image/*", description="Upload an image", layout={"width": "14em"})
    return {
        "category": menu(description="category", options=explorer.run.dataset.categories),
        "image": menu(description="image"),
        "upload": upload,
        "folder": text(description="own folder", placeholder="path of a folder of images"),
        "flawless": text(description="flawless", placeholder="folder; else those of the category"),
        "object_name": text(description="object"),
        "normal_words": text(description="normal", placeholder="flawless, {} without scratch"),
        "anomalous_words": text(description="anomalous", placeholder="damaged, {} with scratch"),
        "detector": menu(description="method", options=methods),
        "rvs": menu(description="text vector", options=list(METHODS)),
    }


class Controls(w.VBox):
    """Controls for A and B, the image widget, which phrase speaks, and the command that repeats what is shown.

    ``base``: see :func:`command`; ``uploads``: folder that keeps uploaded images, so that the command finds them.

    What cannot be shown is said beside its control, and what was shown stays. Without a kernel the image widget alone
    stays alive, as HTML.
    """

    def __init__(
        self, explorer: Explorer, settings: Settings, other: Settings, base=None, uploads="uploads"
    ):
        self.explorer, self.base, self.uploads = explorer, base, Path(uploads)
        self.asked = [settings, other]
        self.viewer = widget.Viewer(explorer, self.asked)
        self._own = [s.image for s in self.asked if s.image not in explorer.samples]
        self._held = False  # while the controls change without being heard
        sides = {"A and B": (0, 1), "A": (0,), "B": (1,)}
        self.sides = w.ToggleButtons(options=sides, description="change")
        self.sides.style.description_width = _INDENT
        self.controls = _make_controls(explorer)
        self.messages = {name: w.HTML() for name in self.controls}
        spoken = {"the whole image": False, "the patch": True}
        self.speaker = w.Dropdown(description="cosine of", options=spoken)
        self.phrases, self.command, self.notes = w.HTML(), w.HTML(), w.HTML()
        rows = [w.VBox([self.controls[name], self.messages[name]]) for name in self.controls]
        image = [w.HTML("<b>Image (of A, unless B is chosen)</b>"), *rows[:5]]
        question = [w.HTML("<b>Question</b>"), *rows[5:], self.notes]
        column = w.Layout(flex="1 1 280px", min_width="0")
        wrap = w.Layout(display="flex", flex_flow="row wrap", grid_gap="0 24px")
        columns = w.Box([w.VBox(part, layout=column) for part in (image, question)], layout=wrap)
        told = [w.HTML("<b>Which phrase speaks</b>"), self.speaker, self.phrases, self.command]
        super().__init__([self.sides, columns, self.viewer, *told])
        self._show()
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self._changed(name), "value")
        for control, what in (
            (self.sides, "value"),
            (self.speaker, "value"),
            (self.viewer, "view"),
        ):
            control.observe(lambda _: self._show(), what)

    def _repr_mimebundle_(self, **options):
        found = super()._repr_mimebundle_(**options)
        about = "[An interactive explorer: open this notebook in JupyterLab and run it to use it.]"
        return found | {"text/html": self.viewer.html(), "text/plain": about}

    def settings(self) -> list[Settings]:
        """What A and B show: what was asked, with what was changed in the browser."""
        view = self.viewer.view
        row, column = view["patch"]
        return [
            replace(
                self.asked[side["shows"]],
                stages=tuple(side["stages"]),
                surgery=side["surgery"],
                smoothing=float(side["smoothing"]),
                false_alarms=float(view["falseAlarms"]),
                look=(row + 1, column + 1, int(view["block"])),
            )
            for side in view["sides"]
        ]

    def _changed(self, name: str) -> None:
        """A control has a new value: ask, or say beside it why that cannot be shown."""
        if self._held:
            return
        self._say(name, "")
        value, sides = self.controls[name].value, self.sides.value
        try:
            if name == "category":  # A its first anomalous image, B its first flawless one
                images = [self.explorer.example(label, category=value) for label in (1, 0)]
                self._ask({n: {"image": images[n], "object_name": value} for n in sides})
            elif name not in ("upload", "folder", "image"):
                self._ask({side: {name: value} for side in sides})
            elif value:  # two images side by side, not one twice
                find = {"upload": self._upload, "folder": self._folder, "image": str}
                self._ask({sides[0]: {"image": find[name](value)}})
        except (ValueError, OSError) as error:
            self._say(name, f"{error}. What was shown stays.")

    def _ask(self, changes: dict[int, dict]) -> None:
        """Change what sides (0 for A, 1 for B) ask, if all of it can be shown; then show it."""
        asked = [replace(s, **changes.get(side, {})) for side, s in enumerate(self.asked)]
        answers = [widget.answer(self.explorer.answer(s), s) for s in asked]
        old, self.asked = self.asked, asked
        with self.viewer.hold_sync():  # pictures and answers arrive together
            if [s.image for s in asked] != [s.image for s in old]:
                self.viewer.pictures = [widget.picture(self.explorer, s.image) for s in asked]
            self.viewer.answers = answers
            if asked[0].image != old[0].image:
                row, column = self.explorer.highest_patch(asked[0])
                self.viewer.view = self.viewer.view | {"patch": [row - 1, column - 1]}
        self._show()

    def _upload(self, files) -> str:
        """Keep an uploaded image; its path."""
        file = files[-1]
        content = bytes(file["content"])
        self.controls["upload"].value = ()  # so that the same file can be chosen again
        name = re.sub(r"[^A-Za-z0-9.-]", "_", file["name"])[-60:]  # a path, or dots, lead nowhere
        path = (self.uploads / f"{hashlib.sha256(content).hexdigest()[:8]}-{name}").resolve()
        write_atomically(path, content)
        read_image(path)  # before it stands in the list
        self._own.append(str(path))
        named = repr(self.asked[self.sides.value[0]].object_name)
        self._say("upload", f"Asked about as {named}: type under object what it shows.")
        return str(path)

    def _folder(self, name: str) -> str:
        """Put a folder's images into the list; the path of the first."""
        found = list_images(name)
        self._own += found
        self._say("folder", f"{len(found)} images, now in the list above.")
        return found[0]

    def _say(self, name: str, text: str) -> None:
        """A message below a control; an empty text removes it."""
        style = f"border-left: 4px solid #d9480f; padding-left: 6px; line-height: 1.3; margin: 2px 0 4px {_INDENT}"
        told = f'<div role="alert" style="{style}">{html.escape(text)}</div>'
        self.messages[name].value = told if text else ""

    def _show(self) -> None:
        """The controls say what the chosen side asks (A where both are chosen), but for a text that was refused;
        below stand notes, which phrase speaks (five per state, A beside B), and the command."""
        asked = self.asked[self.sides.value[0]]
        category = self.explorer.category(asked.image)
        names = [n for n, s in self.explorer.samples.items() if s.category == category]
        options = [(Path(path).name, path) for path in dict.fromkeys(self._own)]
        options += [(name.removeprefix(f"{category}/"), name) for name in names]
        self._held = True
        self.controls["category"].value = category
        self.controls["image"].options = options
        for name, value in asdict(asked).items():
            if name in self.controls and not self.messages[name].value:
                self.controls[name].value = value
        self.controls["rvs"].disabled = asked.detector == "winclip"
        self._held = False
        shown = self.settings()
        notes = dict.fromkeys(note for s in shown for note in self.explorer.answer(s).notes)
        paragraph = '<p role="status" style="margin: 2px 0; line-height: 1.3">{}.</p>'
        self.notes.value = "".join(paragraph.format(html.escape(note)) for note in notes)
        tables = [self.explorer.speaking(s, self.speaker.value) for s in shown]
        best = [t.groupby("state").head(5).sort_values("state", kind="stable") for t in tables]
        table = pd.concat([t.reset_index(drop=True) for t in best], axis=1, keys=["A", "B"])
        with pd.option_context("display.max_colwidth", None):
            self.phrases.value = table.to_html(float_format="{:.3f}".format, index=False, border=0)
        again = html.escape(command(self.explorer, *shown, base=self.base))
        self.command.value = (
            "<b>To repeat this, in a terminal:</b>"
            f'<pre style="white-space: pre-wrap; user-select: all">{again}</pre>'
        )
