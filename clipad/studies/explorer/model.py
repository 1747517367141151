"""The model of the explorer: settings -> what there is to see, a function of the settings alone.

What the network makes of images and of sentences is kept, so that most questions cost milliseconds. The browser
(``numbers.js``) computes the same map from an :class:`Answer`; a test holds the two together.

Shapes: S pixels a side, N = G x G patches, T = 1 + N tokens (class token first), J stages, R flawless images.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from clipad.detectors import Detector, Features
from clipad.dual_path import default_stages
from clipad.io.files import IMAGE_SUFFIXES, did_you_mean
from clipad.io.images import read_image, read_mask
from clipad.linear_layers import LinearLayers
from clipad.prompts import WINCLIP, Prompts
from clipad.studies.dual_path_surgery import attention_by_block
from clipad.studies.experiments import DETECTORS, Experiment
from clipad.surgery import cosine, similarity_map, smooth
from clipad.winclip import SIZES, WinCLIP, coverage

REFERENCES = 20  # flawless images, at most, whose maps give the threshold and the colour scale
STATES = ["normal", "anomalous"]


@dataclass(frozen=True)
class Settings:
    """What one side of the explorer shows: parameters of notebook 06, which says what each of them means."""

    image: str = ""
    object_name: str = ""
    detector: str = "sdp"
    rvs: str = ""
    normal_words: str = ""
    anomalous_words: str = ""
    flawless: str = ""
    stages: tuple[int, ...] = ()
    surgery: bool = True
    smoothing: float = -1.0
    false_alarms: float = 5.0
    look: tuple[int, ...] = ()


@dataclass
class Answer:
    """What the model says to a question, before all that needs no model: stages, smoothing, threshold."""

    rows: tuple[str, ...]  # what z counts first: stages, or sizes of WinCLIP's windows
    z: np.ndarray  # J x T x 2, cosines of the tokens with the vectors normal and anomalous
    # What maps follow from, of the image and of R flawless ones: cosines (1 + R) x J x T x 2 for SDP and CLIP Surgery,
    # else maps (1 + R) x S x S, not smoothed.
    values: np.ndarray
    whole: tuple[float, float]  # cosines of the image embedding
    probability: float  # class probability of "anomalous"
    notes: tuple[str, ...]  # what a reader has to know of words and scale


@dataclass
class Shown:
    """What there is to see with some settings."""

    answer: Answer
    map: np.ndarray  # S x S, higher = more anomalous
    maxima: np.ndarray  # R, of the flawless images' maps
    threshold: float  # the quantile of the maxima that false_alarms names
    middle: float  # median of the flawless images' maps, where colours begin
    cosines: pd.DataFrame  # of the chosen patch, and of the whole image, with both vectors
    attention: dict[str, np.ndarray]  # q-k and v-v, weights of the patch over all T tokens


def patch_values(z: np.ndarray, surgery: bool = True) -> np.ndarray:
    """Stage cosines ... x J x T x 2 -> patch values ... x N: the anomalous column of :func:`clipad.feature_surgery`, or
    without surgery the sum of the cosines with the anomalous vector."""
    if not surgery:
        return z[..., 1:, 1].sum(axis=-2)
    p = np.exp(z[..., :1, :])
    z = z * (2 * p / p.sum(axis=-1, keepdims=True))
    return ((z[..., 1:, 1] - z[..., 1:, 0]) / 2).sum(axis=-2)


def phrases(text: str) -> tuple[str, ...]:
    """State words as a user types them -> phrases of :class:`clipad.Prompts`.

    >>> phrases("flawless, {} without scratch")
    ('flawless {}', '{} without scratch')
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    found = [part if "{}" in part else part + " {}" for part in found]
    if not found or any(re.findall("{}|[{}]", part) != ["{}"] for part in found):
        raise ValueError(f"state words have one {{}} each and no other braces; found {text!r}")
    return tuple(found)


def list_images(folder: str) -> list[str]:
    """Paths of the images in a folder (not below), by name. ValueError where there are none."""
    files = sorted(Path(folder).expanduser().resolve().glob("*"))
    found = [str(path) for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise ValueError(f"{folder!r} is no folder with images in it")
    return found


class Explorer:
    """Settings -> what there is to see, over kept features.

    ``run``: of :func:`clipad.experiment`; ``layers``: for SDP+, which is not offered without.
    """

    def __init__(self, run: Experiment, layers: LinearLayers | None = None):
        self.run, self.backbone, self.layers = run, run.backbone, layers
        root = run.dataset.root
        paths = [Path(os.path.relpath(s.image_path, root)).as_posix() for s in run.dataset]
        self.samples = dict(zip(paths, run.dataset, strict=True))
        visual = self.backbone.visual
        self.size, self.grid = self.backbone.image_size, visual.grid_size[0]
        self.stages = default_stages(len(visual.transformer.resblocks))
        self.detectors = [name for name in DETECTORS if layers is not None or name != "sdp_plus"]
        self.picture = lru_cache(64)(self.picture)
        self.attention = lru_cache(8)(self.attention)
        self._features = lru_cache(128)(self._features)
        self._text = lru_cache(64)(self._text)

    def settings(self, **values) -> Settings:
        """Complete settings from some: what is left out or empty (a smoothing below 0) is the published choice.

        Without ``image`` the first anomalous one; without ``object_name`` the image's category; without ``look`` the
        highest patch of SDP's map and the last block. Raises ValueError for what is no value of a setting.
        """
        s, rule = Settings(**values), self.run.protocol
        plus = s.detector == "sdp_plus"
        side = rule.smoothing_240_sdp_plus if plus else rule.smoothing_240
        image = s.image or self.example(label=1)
        s = replace(
            s,
            image=image,
            object_name=s.object_name or self.category(image),
            rvs=s.rvs or rule.rvs,
            stages=tuple(sorted(s.stages)) or self.stages,
            smoothing=round(side / 240 * self.size, 1) if s.smoothing < 0 else s.smoothing,
            look=tuple(s.look),
        )
        if image not in self.samples and not Path(image).is_file():
            hint = did_you_mean(image, self.samples)
            raise ValueError(f"{image!r} is no image of {self.run.dataset.name}, nor a file{hint}")
        if s.detector not in self.detectors:
            known = ", ".join(self.detectors)
            raise ValueError(f"{s.detector!r} is none of {known}; sdp_plus needs trained layers")
        row, column, block = s.look or (1, 1, self.stages[-1])
        places = range(1, self.grid + 1)
        if not {*s.stages, block} <= {*self.stages} or row not in places or column not in places:
            raise ValueError(
                f"stages are some of {list(self.stages)}, look is row and column of 1..{self.grid} and one of the "
                f"stages; found {list(s.stages)} and {list(s.look)}"
            )
        return s if s.look else replace(s, look=(*self.highest_patch(s), self.stages[-1]))

    def beside(self, first: Settings, changes: Mapping | None = None) -> Settings:
        """Settings of B: those of A with some changed; without changes a flawless image of the same category."""
        flawless = self.example(label=0, category=self.category(first.image))
        return self.settings(**asdict(first) | dict(changes or {"image": flawless}))

    def highest_patch(self, s: Settings) -> tuple[int, int]:
        """Row and column, from 1, of the highest patch of SDP's map."""
        found = self.answer(replace(s, detector="sdp"))
        row, column = divmod(int(patch_values(found.z).argmax()), self.grid)
        return row + 1, column + 1

    def patch(self, s: Settings) -> int:
        """Position among the N patches of the one that ``look`` names."""
        row, column, _ = s.look
        return (row - 1) * self.grid + column - 1

    def category(self, image: str) -> str:
        """The category of an image of the data set; the first one for a file of the user's own."""
        known = self.samples.get(image)
        return known.category if known else self.run.dataset.categories[0]

    def example(self, label: int, category: str = "") -> str:
        """The first image with this label (of this category); the first one at all where no label is known."""
        names = [n for n, s in self.samples.items() if not category or s.category == category]
        return next((n for n in names if self.samples[n].label == label), names[0])

    def show(self, s: Settings) -> Shown:
        """Raises what :meth:`answer` raises."""
        answer, patch = self.answer(s), self.patch(s)
        values = answer.values
        if values.ndim == 4:
            used = [self.stages.index(block) for block in s.stages] if s.detector == "sdp" else [0]
            values = patch_values(values[:, used], s.surgery)
        sigma = 0.0 if s.detector == "winclip" else s.smoothing
        values = torch.from_numpy(values).float()
        maps = (
            smooth(values, sigma) if values.ndim == 3 else similarity_map(values, self.size, sigma)
        )
        own, *flawless = maps.numpy()
        maxima = np.max(flawless, axis=(1, 2))
        cosines = np.array([*answer.z[:, 1 + patch], answer.whole])
        attention = self.attention(s.image)[:, self.stages.index(s.look[2]), patch]
        return Shown(
            answer=answer,
            map=own,
            maxima=maxima,
            threshold=float(np.quantile(maxima, 1 - s.false_alarms / 100)),
            middle=float(np.median(flawless)),
            cosines=pd.DataFrame(cosines, [*answer.rows, "whole image"], STATES),
            attention=dict(zip(("q-k", "v-v"), attention, strict=True)),
        )

    @torch.no_grad()
    def answer(self, s: Settings) -> Answer:
        """What only the model can say. ValueError or OSError for words, folders and images that cannot be used."""
        names, notes = self.references(s)
        text, said = self._text(s.detector, s.object_name, s.normal_words, s.anomalous_words, s.rvs)
        text = text.to(self.backbone.device)
        seen = Features.cat([self._features(name, s.detector) for name in (s.image, *names)])
        rows, z = self._cosines(s.detector, seen, text)
        from_cosines = s.detector in ("sdp", "clip_surgery")
        prediction = self._detector(s.detector).score_with(seen[:1] if from_cosines else seen, text)
        return Answer(
            rows=rows,
            z=z[0],
            values=z if from_cosines else prediction.maps.numpy(),
            whole=tuple(cosine(seen.image_embedding[:1, None], text)[0, 0].tolist()),
            probability=float(prediction.probabilities[0]),
            notes=(*said, *notes),
        )

    def references(self, s: Settings) -> tuple[list[str], list[str]]:
        """Names of flawless images, evenly spread, without the shown one; and what is to be said of them."""
        known = self.samples.get(s.image)
        category = known.category if known else s.object_name
        notes, own = [], [n for n, x in self.samples.items() if x.category == category]
        names = [name for name in own or self.samples if self.samples[name].label == 0]
        if s.flawless:
            names = list_images(s.flawless)
        elif not own or not names:
            of = "" if own else " of other objects"
            what = f"flawless images{of}" if names else f"images{of} not known to be flawless"
            notes.append(f"threshold and colours come from {what}: name a folder of your own")
        names = names or own or list(self.samples)
        names = [name for name in names if name != s.image] or names
        places = np.linspace(0, len(names) - 1, min(REFERENCES, len(names))).round().astype(int)
        return [names[i] for i in places], notes

    def picture(self, image: str) -> tuple[Image.Image, np.ndarray | None]:
        """An image as it is, RGB, and its true mask S x S if one is known. Raises OSError if it cannot be read."""
        sample = self.samples.get(image)
        picture = read_image(sample.image_path if sample else image).convert("RGB")
        mask = read_mask(sample.mask_path, self.size) if sample and sample.mask_path else None
        return picture, mask

    @torch.no_grad()
    def attention(self, image: str) -> np.ndarray:
        """2 x J x N x T: q-k and v-v weights of every patch in the stages' last blocks, ordinary path."""
        with self.backbone.autocast():
            pixels = self.backbone.preprocess(self.picture(image)[0])[None].to(self.backbone.device)
            found = list(attention_by_block(self.backbone.tower, pixels))
        return np.stack([[found[b - 1][kind][0, 1:] for b in self.stages] for kind in (0, 1)])

    def speaking(self, s: Settings, patch: bool = False) -> pd.DataFrame:
        """Which phrase speaks: a row per sentence, columns ``state``, ``sentence``, ``cosine``, highest first.

        The cosine is that of the whole image (its embedding), or of the patch in ``look`` after the last of ``stages``.
        """
        features = self._features(s.image, "sdp")
        token = features.image_embedding[0]
        if patch:
            token = features.tokens[self.stages.index(s.stages[-1])][0, 1 + self.patch(s)]
        asked = self._words("sdp", s.normal_words, s.anomalous_words).sentences(s.object_name)
        rows = [(state, text) for state, texts in zip(STATES, asked, strict=True) for text in texts]
        table = pd.DataFrame(rows, columns=["state", "sentence"])
        vectors = F.normalize(self.backbone.encode_text(table["sentence"].tolist()), dim=-1)
        table["cosine"] = (vectors @ F.normalize(token.cpu(), dim=0)).tolist()
        return table.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)

    def _detector(self, name: str, prompts: Prompts | None = None, rvs: str = "mean") -> Detector:
        """Not smoothed: smoothing is for :meth:`show`, and for the browser."""
        if name == "winclip":
            return WinCLIP(self.backbone, prompts)
        layers = [self.layers] if name == "sdp_plus" else []
        options = self.run.protocol.rvs_options if rvs == self.run.protocol.rvs else {}
        return DETECTORS[name](self.backbone, *layers, prompts, rvs, options, smoothing=0)

    def _features(self, image: str, detector: str) -> Features:
        pixels = self.backbone.preprocess(self.picture(image)[0])[None]
        return self._detector(detector).features(pixels)

    def _cosines(self, detector: str, features: Features, text: torch.Tensor):
        """Names of the rows (a tuple), and B x J x T x 2."""
        found = [cosine(tokens, text) for tokens in features.tokens]
        rows = tuple(f"block {b}" for b in (self.stages if len(found) > 1 else self.stages[-1:]))
        if detector == "winclip":  # a patch has no feature of its own: mean over its windows
            rows = tuple(f"{k} × {k} windows" for k in SIZES)
            whole = cosine(features.image_embedding[:, None], text)
            for i, k in enumerate(SIZES):
                cover = coverage(self.grid, k).to(text)
                found[i] = torch.cat([whole, (cover / cover.sum(dim=0)).T @ found[i]], dim=1)
        return rows, torch.stack(found, dim=1).float().cpu().numpy()

    def _words(self, detector: str, normal: str, anomalous: str) -> Prompts:
        """The detector's, with the user's states in place of its own."""
        prompts = WINCLIP if detector == "winclip" else self.run.prompts
        typed = zip(STATES, (normal, anomalous), strict=True)
        return replace(prompts, **{state: phrases(text) for state, text in typed if text.strip()})

    def _text(self, detector: str, object_name: str, normal: str, anomalous: str, rvs: str):
        """C x 2 unit columns, and what is to be said about them."""
        prompts = self._words(detector, normal, anomalous)
        unknown = self.backbone.unknown_words(x for y in prompts.sentences(object_name) for x in y)
        self.backbone.told |= unknown  # in the notes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = self._detector(detector, prompts, rvs).text_vectors(object_name)
        notes = [str(warning.message) for warning in caught]
        if unknown:
            named = ", ".join(sorted(unknown))
            notes.append(f"the model never saw {named} in training: what it makes of that is noise")
        return vectors, tuple(notes)
