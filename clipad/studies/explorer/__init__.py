"""The explorer of notebook 06: a model, and controls that are thin. The view is ``figures.py``.

*Model*: :class:`Explorer` turns :class:`Settings` into :class:`Shown`, a function of the settings alone; what is
expensive (features of an image, vectors of a text) is kept, so that most changes cost milliseconds. *View*: ``Shown``
-> Figure. *Controls*: :class:`Controls` reads its widgets into settings, and shows model and view of them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import os
import re
import shlex
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import ipywidgets as w
import numpy as np
import pandas as pd
import torch
import yaml

from clipad.datasets import read_image, read_mask
from clipad.detectors import Detector, Features
from clipad.dual_path import attention_weights, default_stages, embed_patches
from clipad.files import write_atomically
from clipad.linear_layers import LinearLayers, require_separate
from clipad.prompts import WINCLIP, Prompts
from clipad.studies.experiments import DETECTORS, Experiment
from clipad.studies.explorer import figures as view
from clipad.studies.figures import image_array
from clipad.surgery import cosine
from clipad.text import METHODS, check_method, representative_vectors
from clipad.tools.cli import guess_type
from clipad.winclip import SIZES, WinCLIP, windows

REFERENCES = 4
"""images of the data set whose maps, with the same settings, give the colour scale and the unit of the threshold"""
NO_SMOOTHING = 0.1
"""pixels: the Gaussian of so small a sigma has one entry, 1"""


@dataclass(frozen=True)
class Settings:
    """What one row of the figure shows. The fields are parameters of notebook 06, under the same names.

    ``image``: its path within the data set's folder, or the path of any file. ``stages``: 1-based blocks.
    ``smoothing``: sigma in pixels. ``normal_words``, ``anomalous_words``: phrases with commas between them, ``{}`` for
    the object (behind the phrase if left out); empty for the ensemble. ``look``: row and column of a
    patch and the block of its attention, all from 1. ``threshold``: of the contour, 0-1 on the colour scale.
    """

    image: str
    object_name: str
    detector: str = "sdp"
    rvs: str = "dbscan"
    stages: tuple[int, ...] = ()
    smoothing: float = 0.0
    normal_words: str = ""
    anomalous_words: str = ""
    look: tuple[int, ...] = ()
    threshold: float = 0.5


@dataclass
class Shown:
    """What there is to see with some settings; S pixels a side, G patches a side."""

    settings: Settings
    image: np.ndarray
    """S x S x 3, 0-1"""
    mask: np.ndarray | None
    """S x S bool; None where no ground truth is known"""
    map: np.ndarray
    """S x S, higher = more anomalous"""
    limits: tuple[float, float]
    """ends of the colour scale: lowest and highest value of the reference images' maps"""
    probability: float
    """class probability of 'anomalous' (METHOD.md section 3)"""
    cosines: pd.DataFrame
    """cosine of the chosen patch, and of the whole image, with the vectors ``normal`` and ``anomalous``"""
    attention: dict[str, np.ndarray]
    """``q-k`` and ``v-v``: weights of the chosen patch over all 1 + G^2 tokens, class token first, mean over heads"""
    notes: tuple[str, ...] = ()
    """what a reader should know: words that the model never saw, sentences that are all noise"""

    @property
    def cut(self) -> float:
        """The threshold in the units of the map."""
        low, high = self.limits
        return low + self.settings.threshold * (high - low)


class Explorer:
    """The model: settings -> what there is to see, over kept features.

    ``run``: of :func:`clipad.experiment`; ``layers``: for SDP+, which is not offered without.
    """

    def __init__(self, run: Experiment, layers: LinearLayers | None = None):
        self.backbone, self.dataset = run.backbone, run.dataset
        self.protocol, self.prompts = run.protocol, run.prompts
        self.layers = layers
        root = run.dataset.root
        self.samples = {
            Path(os.path.relpath(s.image_path, root)).as_posix(): s for s in run.dataset
        }
        self.depth = len(self.backbone.visual.transformer.resblocks)
        self.grid = self.backbone.visual.grid_size[0]
        self.detectors = [name for name in DETECTORS if layers is not None or name != "sdp_plus"]
        self._picture = lru_cache(64)(self._picture)
        self._features = lru_cache(256)(self._features)
        self._batch = lru_cache(32)(self._batch)
        self.attention = lru_cache(8)(self.attention)
        self._text = lru_cache(256)(self._text)

    # ------------------------------------------------------------------------------------------- settings

    def settings(self, **values) -> Settings:
        """Complete settings from some; what is left out or empty is the published choice.

        Without ``image`` the first anomalous one; without ``object_name`` the image's category; without ``look`` the
        highest patch of SDP's map and the last block. Raises ValueError for a name that is no setting, and what
        :meth:`check` raises.
        """
        known = [field.name for field in fields(Settings)]
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise ValueError(
                    f"no setting {name!r}" + (f"; {near[0]}?" if near else f": {', '.join(known)}")
                )
        image = values.get("image") or next(
            (n for n, s in self.samples.items() if s.label == 1), next(iter(self.samples))
        )
        category = (
            self.samples[image].category if image in self.samples else self.dataset.categories[0]
        )
        detector = values.get("detector") or "sdp"
        sigma = (
            self.protocol.smoothing_240_sdp_plus
            if detector == "sdp_plus"
            else self.protocol.smoothing_240
        )
        chosen = Settings(
            image=image,
            object_name=values.get("object_name") or category,
            detector=detector,
            rvs=values.get("rvs") or self.protocol.rvs,
            stages=tuple(values.get("stages") or default_stages(self.depth)),
            smoothing=values.get("smoothing") or round(sigma / 240 * self.backbone.image_size, 1),
            normal_words=values.get("normal_words") or "",
            anomalous_words=values.get("anomalous_words") or "",
            look=tuple(values.get("look") or (1, 1, self.depth)),
            threshold=values.get("threshold") or 0.5,
        )
        self.check(chosen)
        if not values.get("look"):
            chosen = replace(
                chosen, look=(*self._strongest_patch(chosen.image, category), self.depth)
            )
        return chosen

    def _strongest_patch(self, image: str, category: str) -> tuple[int, int]:
        stages = default_stages(self.depth)
        text, _ = self._text(False, category, "", "", self.protocol.rvs)
        sdp = self._detector(Settings(image, category, stages=stages))
        features = self._features(image, "sdp", stages)
        row, column = divmod(
            int(sdp.patch_values(features, text.to(self.backbone.device))[0].argmax()), self.grid
        )
        return row + 1, column + 1

    def check(self, s: Settings) -> None:
        """ValueError, or OSError for an image that cannot be read, if a user's settings cannot be shown; says why."""
        if s.image not in self.samples and not Path(s.image).is_file():
            near = get_close_matches(s.image, self.samples, n=1)
            raise ValueError(
                f"{s.image!r} is neither an image of {self.dataset.name} nor a file"
                + (f"; {near[0]}?" if near else "")
            )
        self._picture(s.image)
        if not s.object_name.strip():
            raise ValueError("the object has no name: a sentence needs one, such as 'metal nut'")
        if s.detector not in self.detectors:
            layers = (
                "; it needs trained layers, see notebook 04" if s.detector == "sdp_plus" else ""
            )
            raise ValueError(
                f"detector {s.detector!r}{layers}; there are {', '.join(self.detectors)}"
            )
        check_method(s.rvs, {})
        self._words(s.normal_words, s.anomalous_words, self.prompts)
        if (
            not s.stages
            or list(s.stages) != sorted(set(s.stages))
            or not 1 <= s.stages[0] <= s.stages[-1] <= self.depth
        ):
            raise ValueError(
                f"choose one or more stages, rising within 1..{self.depth}; found {list(s.stages)}"
            )
        if not s.smoothing > 0:
            raise ValueError(
                f"smoothing is a sigma in pixels; {NO_SMOOTHING} is none; found {s.smoothing}"
            )
        ends = (self.grid, self.grid, self.depth)
        if len(s.look) != 3 or not all(
            1 <= place <= end for place, end in zip(s.look, ends, strict=True)
        ):
            raise ValueError(
                f"look is a row and a column in 1..{self.grid} and a block in 1..{self.depth}, found {list(s.look)}"
            )
        if not 0 <= s.threshold <= 1:
            raise ValueError(f"the threshold has to lie in 0..1, found {s.threshold}")
        if s.detector == "sdp_plus":
            require_separate(self.layers.settings.get("categories", ()), [s.object_name])

    # ---------------------------------------------------------------------------------------------- model

    @torch.no_grad()
    def show(self, settings: Settings) -> Shown:
        """Everything that is shown of settings. Raises what :meth:`check` raises."""
        self.check(settings)
        s = settings
        text, notes = self._text(
            s.detector == "winclip", s.object_name, s.normal_words, s.anomalous_words, s.rvs
        )
        text = text.to(self.backbone.device)
        features = self._batch(s.image, s.detector, s.stages)
        found = self._detector(s).score_with(features, text)
        picture, mask = self._picture(s.image)
        row, column, block = s.look
        patch = (row - 1) * self.grid + column - 1
        weights = self.attention(s.image)[:, block - 1, patch].numpy()
        return Shown(
            settings=s,
            image=picture,
            mask=mask,
            map=found.maps[0].numpy(),
            limits=(float(found.maps[1:].min()), float(found.maps[1:].max())),
            probability=float(found.probabilities[0]),
            cosines=self._cosines(features[:1], text, patch, s),
            attention={"q-k": weights[0], "v-v": weights[1]},
            notes=notes,
        )

    def _detector(self, s: Settings) -> Detector:
        options = {"smoothing": 0 if s.smoothing <= NO_SMOOTHING else s.smoothing}
        if s.detector == "winclip":
            return WinCLIP(self.backbone)
        if s.detector == "sdp_plus":
            return DETECTORS[s.detector](self.backbone, self.layers, **options)
        if s.detector == "sdp":
            options["stages"] = s.stages
        return DETECTORS[s.detector](self.backbone, **options)

    def _picture(self, image: str) -> tuple[np.ndarray, np.ndarray | None]:
        size = self.backbone.image_size
        sample = self.samples.get(image)
        picture = image_array(read_image(sample.image_path if sample else image), size)
        mask = read_mask(sample.mask_path, size) if sample and sample.mask_path else None
        return picture, mask

    def _pixels(self, image: str) -> torch.Tensor:
        sample = self.samples.get(image)
        return self.backbone.preprocess(read_image(sample.image_path if sample else image))[None]

    def _features(self, image: str, detector: str, stages: tuple[int, ...]) -> Features:
        return self._detector(Settings(image, "", detector, stages=stages)).features(
            self._pixels(image)
        )

    def _batch(self, image: str, detector: str, stages: tuple[int, ...]) -> Features:
        """Features of the image, then those of the reference images."""
        names = (image, *self.references(image))
        return Features.cat([self._features(name, detector, stages) for name in names])

    def references(self, image: str) -> list[str]:
        """Evenly spread over the image's category; for an image of the user's own over the whole data set."""
        names = list(self.samples)
        if image in self.samples:
            names = [n for n in names if self.samples[n].category == self.samples[image].category]
        return [
            names[i]
            for i in np.linspace(0, len(names) - 1, min(REFERENCES, len(names))).round().astype(int)
        ]

    @torch.no_grad()
    def attention(self, image: str) -> torch.Tensor:
        """2 x L x N x (1 + N): q-k and v-v weights of every patch in every block of the ordinary path."""
        visual = self.backbone.visual
        with self.backbone.autocast():
            x = visual.ln_pre(embed_patches(visual, self._pixels(image).to(self.backbone.device)))
            found = []
            for block in visual.transformer.resblocks:
                found.append(
                    torch.stack([kind[0, 1:].float().cpu() for kind in attention_weights(block, x)])
                )
                x = block(x)
        return torch.stack(found, dim=1)

    def _words(self, normal: str, anomalous: str, ensemble: Prompts) -> Prompts:
        """The ensemble with the user's states in place of its own."""
        own = {
            key: phrases(text)
            for key, text in (("normal", normal), ("anomalous", anomalous))
            if text.strip()
        }
        prompts = replace(ensemble, **own)
        if both := set(prompts.normal) & set(prompts.anomalous):
            raise ValueError(f"{min(both)!r} is given for the normal and for the anomalous state")
        return prompts

    def _text(self, winclip: bool, object_name: str, normal: str, anomalous: str, rvs: str):
        """C x 2 unit columns, and what is to be said about them."""
        prompts = self._words(normal, anomalous, WINCLIP if winclip else self.prompts)
        unknown = self.backbone.unknown_words(
            [x for state in prompts.sentences(object_name) for x in state]
        )
        self.backbone.expect_words(unknown)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if winclip:
                vectors = WinCLIP(self.backbone, prompts).text_vectors(object_name)
            else:
                options = self.protocol.rvs_options if rvs == self.protocol.rvs else {}
                vectors = representative_vectors(
                    self.backbone, object_name, prompts, rvs, **options
                )
        notes = [str(warning.message) for warning in caught]
        if unknown:
            words = ", ".join(sorted(unknown))
            notes.append(
                f"the model never saw the words {words} in training: what it makes of them is noise"
            )
        return vectors, tuple(notes)

    def _cosines(self, one: Features, text: torch.Tensor, patch: int, s: Settings) -> pd.DataFrame:
        if (
            s.detector == "winclip"
        ):  # a patch has no feature of its own: mean over the windows that cover it
            cover = [(windows(self.grid, k) == patch).any(dim=1) for k in SIZES]
            rows = {
                f"{k} × {k} windows": cosine(tokens[:, which.to(tokens.device)], text).mean(dim=1)[
                    0
                ]
                for k, tokens, which in zip(SIZES, one.tokens, cover, strict=True)
            }
        else:
            stages = {"sdp": s.stages, "sdp_plus": default_stages(self.depth)}.get(
                s.detector, (self.depth,)
            )
            rows = {
                f"after block {block}": cosine(tokens[:, 1 + patch : 2 + patch], text)[0, 0]
                for block, tokens in zip(stages, one.tokens, strict=True)
            }
        rows["whole image"] = cosine(one.image_embedding[:, None], text)[0, 0]
        return pd.DataFrame(
            {k: v.tolist() for k, v in rows.items()}, index=["normal", "anomalous"]
        ).T


def phrases(text: str) -> tuple[str, ...]:
    """State words as a user types them -> phrases of :class:`clipad.Prompts`.

    >>> phrases("flawless, {} without scratch")
    ('flawless {}', '{} without scratch')

    Raises ValueError for a phrase with other braces than one ``{}``, or one that stands twice.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    found = [part if re.search("[{}]", part) else part + " {}" for part in found]
    for part in found:
        if part.count("{}") != 1 or len(re.findall("[{}]", part)) != 2:
            raise ValueError(
                f"a state has one {{}} for the object and no other braces; found {part!r}"
            )
    if len(set(found)) < len(found):
        raise ValueError(f"a state stands twice in {text!r}")
    if not found:
        raise ValueError(f"no state words in {text!r}")
    return tuple(found)


def command(
    explorer: Explorer,
    settings: Settings,
    other: Settings | None = None,
    base: Mapping | None = None,
) -> str:
    """What to type in a shell to get this figure again: ``clipad run 06 ...``.

    ``base``: parameters with which the notebook itself runs (preset, data set, model, ...); empty ones are left out.
    """
    default = asdict(explorer.settings(image=settings.image)) | {"image": None}
    values = {k: v for k, v in (base or {}).items() if v and (k, v) != ("preset", "demo")}
    values |= {key: value for key, value in asdict(settings).items() if value != default[key]}
    second = (
        {}
        if other is None
        else {k: v for k, v in asdict(other).items() if v != asdict(settings)[k]}
    )
    if second != {"detector": "direct"}:  # the notebook's default
        values["compare_with"] = second
    words = ["clipad", "run", "06"]
    for name, value in values.items():
        if isinstance(value, (int, float)) or (
            isinstance(value, str) and guess_type(value) == value
        ):
            words += ["-p", name, str(value)]
        else:
            entry = _lists({name: value})
            words += [
                "-y",
                yaml.safe_dump(
                    entry, default_flow_style=None, width=10_000, allow_unicode=True
                ).strip(),
            ]
    return shlex.join(words)


def _lists(value):
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def latency(explorer: Explorer, settings: Settings, repeats: int = 5) -> pd.DataFrame:
    """Milliseconds (medians) from a change to a new picture, by the clock; a row per kind of change.

    ``processor``: time that the process itself computed, less than the clock's where other programs run.
    The first two rows answer from kept features and vectors; "new ..." has to compute them.
    """
    other = next((name for name in explorer.samples if name != settings.image), settings.image)

    def slider(i):
        return replace(settings, smoothing=1 + 0.5 * i, threshold=0.3 + 0.05 * i)

    def patch(i):
        return replace(settings, look=(1 + i % explorer.grid, 1, 1 + i % explorer.depth))

    def words(i):
        return replace(settings, normal_words="flawless " * (i + 1) + "{}")

    def image(i):
        for kept in (explorer._features, explorer._batch, explorer.attention, explorer._picture):
            kept.cache_clear()
        return replace(settings, image=other)

    view.png(view.panels([explorer.show(settings)]))  # fonts are looked up once
    rows = {}
    changes = {
        "smoothing, threshold": slider,
        "patch, block": patch,
        "new words": words,
        "new image": image,
    }
    for name, change in changes.items():
        taken = []
        for i in range(repeats):
            changed = change(i)
            start, computed = time.perf_counter(), time.process_time()
            shown = explorer.show(changed)
            between = time.perf_counter()
            view.png(view.panels([shown]))
            end = time.perf_counter()
            taken.append(
                (between - start, end - between, end - start, time.process_time() - computed)
            )
        rows[name] = [1000 * statistics.median(column) for column in zip(*taken, strict=True)]
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["model", "view", "together", "processor"]
    )


# ------------------------------------------------------------------------------------------------ controls


class Panel(w.VBox):
    """A box that says in words what it is wherever widgets are not drawn (a repository page, a terminal)."""

    def __repr__(self):
        return "[Controls: open this notebook in JupyterLab and run it to use them.]"


RVS_LABELS = {
    "mean": "mean",
    "pca": "PCA",
    "kde": "KDE",
    "dbscan": "DBSCAN",
    "mean_shift": "mean shift",
}


class _Row:
    """The controls of one row of the figure: what two settings may differ in."""

    def __init__(self, explorer: Explorer, title: str, first: Settings):
        wide = {"layout": w.Layout(width="97%"), "style": {"description_width": "10em"}}
        size = explorer.backbone.image_size
        late = {"continuous_update": False}
        self.object_name = w.Combobox(
            description="object",
            options=explorer.dataset.categories,
            value=first.object_name,
            **late,
            **wide,
        )
        self.detector = w.Dropdown(
            description="method",
            options=[(view.DETECTOR_NAMES[n], n) for n in explorer.detectors],
            value=first.detector,
            **wide,
        )
        self.rvs = w.Dropdown(
            description="text vector",
            options=[(RVS_LABELS[n], n) for n in METHODS],
            value=first.rvs,
            **wide,
        )
        self.stages = w.SelectMultiple(
            description="stages (blocks)",
            options=range(1, explorer.depth + 1),
            value=first.stages,
            rows=min(explorer.depth, 12),
            **wide,
        )
        self.smoothing = w.FloatSlider(
            description="smoothing, px", min=NO_SMOOTHING, max=max(size / 8, first.smoothing), step=0.1,
            value=first.smoothing, readout_format=".1f", **late, **wide,
        )  # fmt: skip
        hint = "empty: the ensemble's. Or: flawless, {} without scratch"
        self.normal_words = w.Text(
            description="normal words", value=first.normal_words, placeholder=hint, **late, **wide
        )
        self.anomalous_words = w.Text(
            description="anomalous words",
            value=first.anomalous_words,
            placeholder=hint,
            **late,
            **wide,
        )
        self.block = w.IntSlider(
            description="attention in block",
            min=1,
            max=explorer.depth,
            value=first.look[2],
            **late,
            **wide,
        )
        self.widgets = {k: v for k, v in vars(self).items() if isinstance(v, w.Widget)}
        self.box = w.VBox(
            [w.HTML(f"<b>{title}</b>"), *self.widgets.values()], layout=w.Layout(width="50%")
        )
        self.detector.observe(self._enable, "value")
        self._enable()

    def _enable(self, _=None):
        """Only what the method heeds can be changed."""
        self.stages.disabled = self.detector.value != "sdp"
        self.rvs.disabled = self.smoothing.disabled = self.detector.value == "winclip"

    def values(self) -> dict:
        found = {name: widget.value for name, widget in self.widgets.items() if name != "block"}
        return found | {
            "smoothing": round(self.smoothing.value, 2)
        }  # a browser sends 3.3000000000000003


class Controls:
    """Widgets for one or two settings, the figure, messages, and the command that repeats what is shown.

    Two settings share image, patch and threshold (those of ``settings``). ``base``: see :func:`command`; ``uploads``:
    folder that keeps uploaded images, so that the command finds them.

    Settings that cannot be shown and unreadable uploads are told in ``message``. Anything else that is raised in a
    callback is a fault of ours: it is told there, too (a live notebook would hide it), and raised on.
    """

    def __init__(
        self,
        explorer: Explorer,
        settings: Settings,
        other: Settings | None = None,
        base: Mapping | None = None,
        uploads: str | Path = "uploads",
    ):
        self.explorer, self.base, self.uploads = explorer, dict(base or {}), Path(uploads)
        self._held = False
        style = {"style": {"description_width": "10em"}}
        late = {"continuous_update": False}
        sample = explorer.samples.get(settings.image)
        category = sample.category if sample else explorer.dataset.categories[0]
        self.category = w.Dropdown(
            description="category", options=explorer.dataset.categories, value=category, **style
        )
        self.image = w.Dropdown(description="image", **style)
        self.upload = w.FileUpload(
            accept="image/*", description="Upload an image", layout=w.Layout(width="14em")
        )
        self.threshold = w.FloatSlider(
            description="threshold",
            min=0.01,
            max=1,
            step=0.01,
            value=settings.threshold,
            **late,
            **style,
        )
        self.row, self.column = (
            w.IntSlider(
                description=f"patch {name}", min=1, max=explorer.grid, value=place, **late, **style
            )
            for name, place in zip(("row", "column"), settings.look[:2], strict=True)
        )
        self.compare = w.Checkbox(
            description="compare two settings", value=other is not None, indent=False
        )
        self.rows = [
            _Row(explorer, "Settings A", settings),
            _Row(explorer, "Settings B", other or settings),
        ]
        self.message, self.figure, self.command = w.HTML(), w.HTML(), w.HTML()
        self._own: dict[str, str] = (
            {} if sample else {settings.image: f"file: {Path(settings.image).name}"}
        )
        self._list_images(settings.image)

        self.category.observe(self._change_category, "value")
        self.upload.observe(self._take_upload, "value")
        common = (self.image, self.threshold, self.row, self.column, self.compare)
        for widget in (*common, *(widget for row in self.rows for widget in row.widgets.values())):
            widget.observe(self.update, "value")
        self.panel = Panel([
            self.message, self.figure,
            w.HBox([self.category, self.image, self.upload, self.compare], layout=w.Layout(flex_flow="row wrap")),
            w.HBox([self.threshold, self.row, self.column], layout=w.Layout(flex_flow="row wrap")),
            w.HBox([row.box for row in self.rows]),
            self.command,
        ])  # fmt: skip
        self.update()

    def settings(self) -> list[Settings]:
        """What the widgets say: one, or two if they are compared; not checked."""
        common = {"image": self.image.value, "threshold": self.threshold.value}
        patch = (self.row.value, self.column.value)
        rows = self.rows if self.compare.value else self.rows[:1]
        return [Settings(**common, **row.values(), look=(*patch, row.block.value)) for row in rows]

    def update(self, _=None) -> None:
        """Show what the widgets say."""
        if self._held:
            return
        self.rows[1].box.layout.display = None if self.compare.value else "none"
        wanted = self.settings()
        try:
            for settings in wanted:
                self.explorer.check(settings)
        except (ValueError, OSError) as error:
            self._say(f"{error}. The figure still shows the last settings that could be shown.")
            return
        with self._told():
            self.message.value = "<em>Computing …</em>"
            shown = [self.explorer.show(settings) for settings in wanted]
            self.figure.value = _img(view.png(view.panels(shown)), view.describe(shown))
            again = command(self.explorer, *wanted, *([None] * (2 - len(wanted))), base=self.base)
            self.command.value = (
                "To repeat this, without controls:"
                f'<pre style="white-space: pre-wrap; user-select: all">{html.escape(again)}</pre>'
            )
            self._say(*dict.fromkeys(note for one in shown for note in one.notes))

    def _change_category(self, _=None):
        """Another category: its first image, and its name as the object; one update, not four."""
        self._held = True
        try:
            names = [
                n for n, s in self.explorer.samples.items() if s.category == self.category.value
            ]
            self._list_images(
                next((n for n in names if self.explorer.samples[n].label == 1), names[0])
            )
            for row in self.rows:
                row.object_name.value = self.category.value
        finally:
            self._held = False
        self.update()

    def _list_images(self, chosen: str):
        names = [n for n, s in self.explorer.samples.items() if s.category == self.category.value]
        options = [(n.removeprefix(f"{self.category.value}/"), n) for n in names]
        held, self._held = (
            self._held,
            True,
        )  # new options choose the first of them, before ours is chosen
        try:
            self.image.options = [(label, name) for name, label in self._own.items()] + options
            self.image.value = chosen
        finally:
            self._held = held

    def _take_upload(self, _=None):
        with self._told():
            for file in self.upload.value:
                content = bytes(file["content"])
                name = re.sub(r"[^A-Za-z0-9.-]", "_", file["name"])[
                    -60:
                ]  # a path, or dots, lead nowhere
                path = (
                    self.uploads / f"{hashlib.sha256(content).hexdigest()[:8]}-{name}"
                ).resolve()
                try:
                    read_image(io.BytesIO(content))
                except OSError as error:
                    self._say(re.sub(r"<_io.BytesIO[^>]*>", file["name"], str(error)))
                    return
                write_atomically(path, content)
                self._own[str(path)] = f"uploaded: {file['name']}"
                self._list_images(str(path))
        self.update()

    def _say(self, *notes: str):
        text = "<br>".join(html.escape(note[:1].upper() + note[1:]) for note in notes)
        self.message.value = (
            f'<div role="alert" style="color: #a33b00">{text}</div>' if text else ""
        )

    @contextlib.contextmanager
    def _told(self):
        """What goes wrong inside is shown to the user and raised on."""
        try:
            yield
        except Exception as error:
            self._say(f"a fault of this program, {type(error).__name__}: {error}")
            raise


def _img(png: bytes, alt: str) -> str:
    """As HTML, because the image widget has no alternative text."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img alt="{html.escape(alt, quote=True)}" src="{source}" style="max-width: 100%; height: auto">'
