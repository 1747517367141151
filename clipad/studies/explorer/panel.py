"""The controls that need the model, around the image widget. They only say what is asked; the model answers."""

from __future__ import annotations

import contextlib
import hashlib
import html
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import ipywidgets as w
from IPython.display import Image, display

from clipad.datasets import read_image
from clipad.files import write_atomically
from clipad.studies.explorer import widget
from clipad.studies.explorer.figures import DETECTOR_NAMES
from clipad.studies.explorer.model import Explorer
from clipad.studies.explorer.settings import Settings, command, list_images
from clipad.text import METHODS

_ABOUT = "[An interactive explorer: open this notebook in JupyterLab and run it to use it.]"
_VECTORS = {"mean_shift": "mean shift", "dbscan": "DBSCAN", "pca": "PCA", "kde": "KDE"}


def show_still() -> None:
    """A picture of the panel, for readers without a kernel and without scripts."""
    alt = (
        "Screenshot of the explorer. At the top fields for category, image, upload, folders, object, words, method "
        "and text vector. Below, A and B side by side: the image under its map with the threshold line and the chosen "
        "patch; q-k and v-v attention and the cosines of that patch; a histogram of the flawless images' maxima with "
        "threshold and this image as lines. At the bottom the phrases with the highest cosines and a command to "
        "repeat the view."
    )
    picture = Path(__file__).with_name("still.png").read_bytes()
    display(Image(picture, format="png", alt=alt), metadata={"image/png": {"alt": alt}})


class Panel(w.VBox):
    """All of it. Where no kernel runs, the image widget alone stays alive, as HTML."""

    def __init__(self, viewer: widget.Viewer, children):
        super().__init__(children)
        self._viewer = viewer

    def _repr_mimebundle_(self, **options):
        found = super()._repr_mimebundle_(**options)
        return found | {"text/html": self._viewer.html(), "text/plain": _ABOUT}


class _Field(w.VBox):
    """A control with the place for what is wrong with it."""

    def __init__(self, control):
        self.control, self.message = control, w.HTML()
        super().__init__([control, self.message])

    def say(self, text: str, wrong: bool = True) -> None:
        role, edge = ("alert", "#d9480f") if wrong else ("status", "#1971c2")
        style = f"border-left: 4px solid {edge}; padding-left: 6px; line-height: 1.3; margin: 2px 0 4px 6.5em"
        told = f'<div role="{role}" style="{style}">{html.escape(text)}</div>'
        self.message.value = told if text else ""


def _make_controls(explorer: Explorer) -> dict[str, w.Widget]:
    look = {"style": {"description_width": "6.5em"}}
    look["layout"] = w.Layout(width="auto", min_width="0")

    def text(label: str, hint: str = "") -> w.Text:
        return w.Text(description=label, placeholder=hint, continuous_update=False, **look)

    def menu(label: str, options=()) -> w.Dropdown:
        return w.Dropdown(description=label, options=options, **look)

    upload = w.FileUpload(accept="image/*", description="Upload an image")
    upload.layout.width = "14em"
    return {
        "category": menu("category", explorer.dataset.categories),
        "image": menu("image"),
        "upload": upload,
        "folder": text("own folder", "path of a folder of images"),
        "flawless": text("flawless", "folder; else those of the category"),
        "object_name": text("object"),
        "detector": menu("method", [(DETECTOR_NAMES[n], n) for n in explorer.detectors]),
        "rvs": menu("text vector", [(_VECTORS.get(n, n), n) for n in METHODS]),
        "normal_words": text("normal", "flawless, {} without scratch"),
        "anomalous_words": text("anomalous", "damaged, {} with scratch"),
    }


class Controls:
    """Controls for A and B, the image widget, which phrase speaks, and the command that repeats what is shown.

    ``base``: see :func:`command`; ``uploads``: folder that keeps uploaded images, so that the command finds them.

    What a user cannot have (a name without letters, an unreadable file) is said beside the control, and what was shown
    stays. Anything else that is raised in a callback is a fault of ours: said there, too, and raised on.
    """

    def __init__(
        self,
        explorer: Explorer,
        settings: Settings,
        other: Settings,
        base: Mapping | None = None,
        uploads: str | Path = "uploads",
    ):
        self.explorer, self.base, self.uploads = explorer, dict(base or {}), Path(uploads)
        self.asked = [settings, other]
        self.viewer = widget.Viewer(explorer, self.asked)
        self._own = {n: Path(n).name for n in (settings.image, other.image)}
        self._own = {n: label for n, label in self._own.items() if n not in explorer.samples}
        self._held = False
        sides = {"A and B": (0, 1), "A": (0,), "B": (1,)}
        self.sides = w.ToggleButtons(options=sides, description="change")
        self.sides.style.description_width = "6.5em"
        self.controls = _make_controls(explorer)
        self.fields = {name: _Field(control) for name, control in self.controls.items()}
        spoken = {"the whole image": False, "the patch": True}
        self.speaker = w.Dropdown(description="cosine of", options=spoken)
        self.phrases, self.command, self.notes = w.HTML(), w.HTML(), w.HTML()
        self._show_settings()
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self._changed(name), "value")
        self.sides.observe(lambda _: self._show_settings(), "value")
        self.speaker.observe(lambda _: self._tell(), "value")
        self.viewer.observe(lambda _: self._tell(), "view")
        self.panel = Panel(self.viewer, self._layout())
        self._tell()

    def _layout(self) -> list:
        def column(title, *names):
            children = [w.HTML(f"<b>{title}</b>"), *(self.fields[name] for name in names)]
            return w.VBox(children, layout=w.Layout(flex="1 1 280px", min_width="0"))

        image = column("Image (of A, unless B is chosen)", *list(self.fields)[:5])
        question = column("Question", *list(self.fields)[5:])
        question.children = [*question.children, self.notes]
        wrap = w.Layout(display="flex", flex_flow="row wrap", grid_gap="0 24px")
        columns = w.Box([image, question], layout=wrap)
        told = [w.HTML("<b>Which phrase speaks</b>"), self.speaker, self.phrases, self.command]
        return [self.sides, columns, self.viewer, *told]

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

    # ------------------------------------------------------------------------------------------ changes

    def _changed(self, name: str) -> None:
        if self._held:
            return
        field = self.fields[name]
        field.say("")
        try:
            value, first = self.controls[name].value, self.sides.value[0]
            images = {"upload": self._upload, "folder": self._folder, "image": str}
            if name == "category":
                self._ask(self._category(value))
            elif name in images:  # two images side by side, not one twice
                self._ask({first: {"image": images[name](value)}} if value else {})
            else:
                self._ask({side: {name: value} for side in self.sides.value})
        except (ValueError, OSError) as error:
            field.say(f"{error}. What was shown stays.")
        except Exception as error:
            field.say(f"a fault of this program, {type(error).__name__}: {error}")
            raise

    def _ask(self, changes: dict[int, dict]) -> None:
        """Change what sides (0 for A, 1 for B) ask, if all of it can be shown; then show it."""
        asked = list(self.asked)
        for side, change in changes.items():
            asked[side] = replace(asked[side], **change)
            self.explorer.check(asked[side])
        answers = [widget.answer(self.explorer.answer(s), s) for s in asked]
        with self.viewer.hold_sync():  # pictures and answers arrive together
            if [s.image for s in asked] != [s.image for s in self.asked]:
                self.viewer.pictures = [widget.picture(self.explorer, s.image) for s in asked]
            if asked[0].image != self.asked[0].image:
                row, column = self.explorer.highest_patch(asked[0])
                self.viewer.view = self.viewer.view | {"patch": [row - 1, column - 1]}
            self.viewer.answers = answers
        self.asked = asked
        self._show_settings()
        self._tell()

    def _category(self, name: str) -> dict[int, dict]:
        """A its first anomalous image, B its first flawless one; the object follows unless it was typed."""
        changes = {}
        for side in self.sides.value:
            old = self.asked[side]
            follows = old.object_name == self.explorer.category(old.image)
            image = self.explorer.example(label=1 - side, category=name)
            changes[side] = {"image": image, "object_name": name if follows else old.object_name}
        return changes

    def _upload(self, files) -> str:
        file = files[-1]
        content = bytes(file["content"])
        with self._hold():
            self.controls["upload"].value = ()  # so that the same file can be chosen again
        name = re.sub(r"[^A-Za-z0-9.-]", "_", file["name"])[-60:]  # a path, or dots, lead nowhere
        path = (self.uploads / f"{hashlib.sha256(content).hexdigest()[:8]}-{name}").resolve()
        write_atomically(path, content)
        try:
            read_image(path)
        except OSError as error:
            path.unlink()
            raise OSError(str(error).replace(str(path), file["name"])) from None
        self._own[str(path)] = f"uploaded: {file['name']}"
        named = repr(self.asked[self.sides.value[0]].object_name)
        told = f"asked about as {named}: type under object what it shows"
        self.fields["upload"].say(told, wrong=False)
        return str(path)

    def _folder(self, name: str) -> str:
        found = list_images(name.strip())
        self._own |= {path: f"own: {Path(path).name}" for path in found}
        self.fields["folder"].say(f"{len(found)} images, now in the list above", wrong=False)
        return found[0]

    @contextlib.contextmanager
    def _hold(self):
        """Controls change without being heard."""
        held, self._held = self._held, True
        try:
            yield
        finally:
            self._held = held

    # -------------------------------------------------------------------------------------------- texts

    def _show_settings(self) -> None:
        """The controls say what the chosen side asks (A where both are chosen); a text that is refused stays."""
        asked = self.asked[self.sides.value[0]]
        samples, category = self.explorer.samples, self.explorer.category(asked.image)
        names = [n for n, s in samples.items() if s.category == category]
        options = [(label, name) for name, label in self._own.items()]
        options += [(name.removeprefix(f"{category}/"), name) for name in names]
        with self._hold():
            self.controls["category"].value = category
            if list(self.controls["image"].options) != options:
                self.controls["image"].options = options
            for name, value in asdict(asked).items():
                if name in self.controls and 'role="alert"' not in self.fields[name].message.value:
                    self.controls[name].value = value
            self.controls["rvs"].disabled = asked.detector == "winclip"

    def _tell(self) -> None:
        """Notes, which phrase speaks, and the command."""
        shown = self.settings()
        notes = dict.fromkeys(note for s in shown for note in self.explorer.answer(s).notes)
        paragraph = '<p role="status" style="margin: 2px 0; line-height: 1.3">{}.</p>'
        self.notes.value = "".join(paragraph.format(html.escape(note)) for note in notes)
        tables = ""
        for name, s in zip("AB", shown, strict=True):
            table = self.explorer.speaking(s, self.speaker.value)
            tables += _phrase_table(f"{name}: {Path(s.image).name}", table)
        row = '<div style="display: flex; flex-wrap: wrap; gap: 8px 32px">{}</div>'
        self.phrases.value = row.format(tables)
        again = html.escape(command(self.explorer, *shown, base=self.base))
        self.command.value = (
            "<b>To repeat this, in a terminal:</b>"
            f'<pre style="white-space: pre-wrap; user-select: all">{again}</pre>'
        )


def _phrase_table(caption: str, table) -> str:
    """The five highest sentences of each state, as HTML."""
    rows = "<tr><th>state</th><th>sentence</th><th>cosine</th></tr>"
    for state, part in table.groupby("state", sort=False):
        for row in part.head(5).itertuples():
            cells = (state, html.escape(row.sentence), f"{row.cosine:.3f}")
            rows += f"<tr><td>{'</td><td>'.join(cells)}</td></tr>"
    style = "line-height: 1.4; border-spacing: 10px 0; text-align: left"
    caption = f"<caption style='text-align: left'>{html.escape(caption)}</caption>"
    return f'<table style="{style}">{caption}{rows}</table>'
