"""The controls that need the model, around the image widget. They only say what is asked; the model answers."""

from __future__ import annotations

import contextlib
import hashlib
import html
import re
from collections.abc import Mapping
from dataclasses import replace
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

FIVE = 5
_ABOUT = "[An interactive explorer: open this notebook in JupyterLab and run it to use it.]"
_VECTORS = {"mean_shift": "mean shift", "dbscan": "DBSCAN", "pca": "PCA", "kde": "KDE"}
_STYLE = {"description_width": "6.5em"}
_WIDE = w.Layout(width="auto", min_width="0")


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
        role = "alert" if wrong else "status"
        edge = "#d9480f" if wrong else "#1971c2"
        text = html.escape(text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text)
        self.message.value = (
            f'<div role="{role}" style="border-left: 4px solid {edge}; padding-left: 6px; '
            f'line-height: 1.3; margin: 2px 0 4px 6.5em">{text}</div>'
            if text
            else ""
        )


def _make_controls(explorer: Explorer) -> dict[str, w.Widget]:
    look = {"style": _STYLE, "layout": _WIDE}
    text = look | {"continuous_update": False}
    return {
        "category": w.Dropdown(description="category", options=explorer.dataset.categories, **look),
        "image": w.Dropdown(description="image", **look),
        "upload": w.FileUpload(
            accept="image/*", description="Upload an image", layout=w.Layout(width="14em")
        ),
        "folder": w.Text(
            description="own folder", placeholder="path of a folder of images", **text
        ),
        "flawless": w.Text(
            description="flawless", placeholder="folder; else those of the category", **text
        ),
        "object_name": w.Text(description="object", **text),
        "detector": w.Dropdown(
            description="method",
            options=[(DETECTOR_NAMES[n], n) for n in explorer.detectors],
            **look,
        ),
        "rvs": w.Dropdown(
            description="text vector",
            options=[(_VECTORS.get(n, n), n) for n in METHODS],
            **look,
        ),
        "normal_words": w.Text(
            description="normal", placeholder="flawless, {} without scratch", **text
        ),
        "anomalous_words": w.Text(
            description="anomalous", placeholder="damaged, {} with scratch", **text
        ),
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
        self.sides = w.ToggleButtons(
            options={"A and B": (0, 1), "A": (0,), "B": (1,)}, description="change", style=_STYLE
        )
        self.controls = _make_controls(explorer)
        self.fields = {name: _Field(control) for name, control in self.controls.items()}
        self.speaker = w.Dropdown(
            description="cosine of", options={"the whole image": False, "the patch": True}
        )
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
        def column(title, *children):
            title = w.HTML(f"<b>{title}</b>")
            return w.VBox([title, *children], layout=w.Layout(flex="1 1 280px", min_width="0"))

        f = self.fields
        names = ("object_name", "normal_words", "anomalous_words", "detector", "rvs")
        images = ("category", "image", "upload", "folder", "flawless")
        wrap = w.Layout(display="flex", flex_flow="row wrap", grid_gap="0 24px")
        question = column("Question", *(f[name] for name in names), self.notes)
        image = column("Image (of A, unless B is chosen)", *(f[name] for name in images))
        return [
            self.sides,
            w.Box([image, question], layout=wrap),
            self.viewer,
            w.HTML("<b>Which phrase speaks</b>"),
            self.speaker,
            self.phrases,
            self.command,
        ]

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
            own = {"upload": self._upload, "folder": self._folder}
            if name == "category":
                self._ask(self._category(value))
            elif name in own:
                self._ask({first: {"image": own[name](value)}} if value else {})
            elif name == "image":  # two images side by side, not one twice
                self._ask({first: {"image": value}})
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
        named = self.asked[self.sides.value[0]].object_name
        self.fields["upload"].say(
            f"asked about as {named!r}: type under object what it shows", wrong=False
        )
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
            for name in ("image", "object_name", "detector", "rvs", "normal_words"):
                self._fill(name, getattr(asked, name))
            for name in ("anomalous_words", "flawless"):
                self._fill(name, getattr(asked, name))
            self.controls["rvs"].disabled = asked.detector == "winclip"

    def _fill(self, name: str, value) -> None:
        if 'role="alert"' not in self.fields[name].message.value:
            self.controls[name].value = value

    def _tell(self) -> None:
        """Notes, which phrase speaks, and the command."""
        shown = self.settings()
        answers = [self.explorer.answer(s) for s in shown]
        notes = dict.fromkeys(note for one in answers for note in one.notes)
        self.notes.value = "".join(
            f'<p role="status" style="margin: 2px 0; line-height: 1.3">{html.escape(note)}.</p>'
            for note in notes
        )
        tables = []
        for name, s in zip("AB", shown, strict=True):
            table = self.explorer.speaking(s, self.speaker.value)
            tables.append(_phrase_table(f"{name}: {Path(s.image).name}", table))
        self.phrases.value = (
            f'<div style="display: flex; flex-wrap: wrap; gap: 8px 32px">{"".join(tables)}</div>'
        )
        again = command(self.explorer, *shown, base=self.base)
        self.command.value = (
            "<b>To repeat this, in a terminal:</b>"
            f'<pre style="white-space: pre-wrap; user-select: all">{html.escape(again)}</pre>'
        )


def _phrase_table(caption: str, table) -> str:
    """The five highest sentences of each state, as HTML."""
    rows = []
    for state, part in table.groupby("state", sort=False):
        rows += [
            f"<tr><td>{state}</td><td>{html.escape(r.sentence)}</td><td>{r.cosine:.3f}</td></tr>"
            for r in part.head(FIVE).itertuples()
        ]
    head = "<tr><th>state</th><th>sentence</th><th>cosine</th></tr>"
    return (
        '<table style="line-height: 1.4; border-spacing: 10px 0; text-align: left">'
        f"<caption style='text-align: left'>{html.escape(caption)}</caption>"
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    )
