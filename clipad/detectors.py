"""Zero-shot detectors behind one protocol: ``predict(images, category) -> Prediction``.

Each is split in two: ``features(images)`` runs the backbone, ``score_with(features, text)`` is cheap.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F

from clipad.dual_path import default_stages, embed_patches, project, staged_features
from clipad.linear_layers import LinearLayers, linear_maps, require_separate
from clipad.prompts import CLIP_AD, Prompts
from clipad.surgery import cosine, feature_surgery, similarity_map, smooth
from clipad.text import check_method, representative_vectors

CLIP_TEMPERATURE = 100.0
"""The factor before the softmax over states (METHOD.md section 3); CLIP's own logit scale ends there."""


@dataclass
class Prediction:
    """What a detector says of B images: ``maps`` B x S x S (higher = more anomalous) and class ``probabilities`` B
    (METHOD.md section 3), float32 on the CPU."""

    maps: torch.Tensor
    probabilities: torch.Tensor


@dataclass
class Features:
    """What scores need, not normalised: the image embedding B x C and, per stage, ``tokens`` B x (N+1) x C and, for
    SDP+ only, ``ordinary`` ones B x (N+1) x D."""

    image_embedding: torch.Tensor
    tokens: list[torch.Tensor]
    ordinary: list[torch.Tensor] = field(default_factory=list)

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        tokens, ordinary = ([change(stage) for stage in x] for x in (self.tokens, self.ordinary))
        return Features(change(self.image_embedding), tokens, ordinary)

    def to(self, device) -> Self:
        return self.apply(lambda values: values.to(device))

    def __getitem__(self, index) -> Self:
        """Of some of the images: a slice, a mask or a list of indices."""
        return self.apply(lambda values: values[index])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Features of batches put together, in their order."""
        return cls(
            torch.cat([part.image_embedding for part in parts]),
            [torch.cat(stage) for stage in zip(*(p.tokens for p in parts), strict=True)],
            [torch.cat(stage) for stage in zip(*(p.ordinary for p in parts), strict=True)],
        )


class Detector:
    """Common to all: prompts, representative vectors per category, smoothing.

    ``smoothing``: sigma of the Gaussian in pixels; None is 8/240 of the image side, 0 is none. ``prompts`` and
    ``rvs_options``: None for the published ones. A detector brings ``encode(images) -> Features``, in the backbone's
    precision, and ``patch_values(features, text) -> B x N``, the anomalous column before up-sampling, or ``maps``.
    """

    map_in_image_score = True
    """whether an image's score adds the maximum of its map to the class probability (METHOD.md section 5)"""

    def __init__(
        self,
        backbone,
        prompts: Prompts | None = None,
        rvs: str = "dbscan",
        rvs_options: dict[str, Any] | None = None,
        smoothing: float | None = None,
    ):
        check_method(rvs)
        if smoothing is not None and not 0 <= smoothing < float("inf"):
            raise ValueError(f"smoothing is a sigma in pixels, 0 or more; found {smoothing}")
        self.backbone = backbone
        self.prompts = prompts or CLIP_AD
        self.rvs, self.rvs_options = rvs, dict(rvs_options or {})
        self.smoothing = 8 / 240 * backbone.image_size if smoothing is None else float(smoothing)
        self._text: dict[str, torch.Tensor] = {}

    def text_vectors(self, category: str) -> torch.Tensor:
        """C x 2 unit columns (normal, anomalous) on the CPU, computed once per category."""
        if category not in self._text:
            self._text[category] = representative_vectors(
                self.backbone, category, self.prompts, self.rvs, **self.rvs_options
            )
        return self._text[category]

    def predict(self, images: torch.Tensor, category: str) -> Prediction:
        """Maps and class probabilities of pre-processed images B x 3 x S x S; batch size and order do not matter."""
        return self.score_with(self.features(images), self.text_vectors(category))

    def features(self, images: torch.Tensor) -> Features:
        """Everything that does not depend on the text, float32 on the backbone's device."""
        with torch.no_grad(), self.backbone.autocast():
            found = self.encode(images.to(self.backbone.device, non_blocking=True))
        return found.apply(torch.Tensor.float)

    def score_with(self, features: Features, text: torch.Tensor) -> Prediction:
        """Maps and class probabilities with given text vectors, C x 2 unit columns."""
        text = text.to(features.image_embedding)
        with torch.no_grad():
            maps, probabilities = self.maps(features, text), self.probabilities(features, text)
        return Prediction(maps.cpu(), probabilities.cpu())

    def maps(self, features: Features, text: torch.Tensor) -> torch.Tensor:
        """B x S x S, smoothed; ``text``: C x 2 unit columns on the features' device."""
        values = self.patch_values(features, text)
        return similarity_map(values, self.backbone.image_size, self.smoothing)

    def probabilities(self, features: Features, text: torch.Tensor) -> torch.Tensor:
        return class_probability(features.image_embedding, text)

    def __repr__(self):
        return f"{self.name}({self.backbone.name}, rvs={self.rvs}, smoothing={self.smoothing:g} px)"

    @property
    def reads(self) -> tuple:
        """What its features are; a detector whose ``reads`` begin those of another can score the other's features."""
        return (self.backbone.weights_hash, self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the numbers, JSON-able: a stopped run continues only if it is equal."""
        model = self.backbone
        found = {"detector": self.name, "model": model.name, "weights": model.weights_hash}
        found |= {"image_size": model.image_size, "device": model.device.type}
        found |= {"prompts": asdict(self.prompts), "rvs": self.rvs, "rvs_options": self.rvs_options}
        return found | {"smoothing": self.smoothing}


class Direct(Detector):
    """The map computed directly ("Comp. Directly"): cosine of the last block's patch tokens with the text."""

    name = "Direct"

    def encode(self, images):
        visual = self.backbone.tower
        x = visual.transformer(visual.ln_pre(embed_patches(visual, images)))
        return Features(project(visual, x[:, 0]), [project(visual, x)])

    def patch_values(self, features, text):
        return (CLIP_TEMPERATURE * cosine(features.tokens[0][:, 1:], text)).softmax(dim=-1)[..., 1]


class SDP(Detector):
    """Staged dual path: feature surgery on the surgery path's features, summed over stages (paper section 3.2).

    Beside a :class:`Detector`'s arguments ``stages`` (1-based blocks, None for the four quarters) and ``as_released``
    (see :func:`clipad.staged_features`).
    """

    name = "SDP"

    def __init__(
        self,
        backbone,
        prompts=None,
        rvs="dbscan",
        rvs_options=None,
        stages=None,
        smoothing=None,
        as_released=True,
    ):
        super().__init__(backbone, prompts, rvs, rvs_options, smoothing)
        blocks = len(backbone.visual.transformer.resblocks)
        self.stages = tuple(stages) if stages else default_stages(blocks)
        self.as_released = as_released

    def encode(self, images):
        found = staged_features(self.backbone.tower, images, self.stages, self.as_released)
        return Features(found.image_embedding, found.surgery)

    def patch_values(self, features, text):
        return feature_surgery(features.tokens, text)[:, 1:, 1]

    @property
    def reads(self):
        return (self.backbone.weights_hash, "staged dual path", self.stages, self.as_released)

    @property
    def settings(self):
        return super().settings | {"stages": list(self.stages), "as_released": self.as_released}


class SDPPlus(SDP):
    """SDP plus one trained linear layer per stage (paper section 3.3, METHOD.md section 6): SDP's map and the layers'
    anomalous probabilities, summed over stages, then smoothed.

    ``layers``: from :func:`clipad.train` or ``load_layers``. A category that trained them is refused (ValueError)
    unless ``allow_overlap``, which then stands in the name and in the settings of every result.
    """

    name = "SDP+"

    def __init__(self, backbone, layers: LinearLayers, *args, allow_overlap=False, **options):
        super().__init__(backbone, *args, **options)
        layers.require_fit(backbone, self.stages, self.as_released)
        self.layers = layers.to(backbone.device)
        self.allow_overlap = allow_overlap
        if allow_overlap:
            self.name += " (overlap allowed)"

    def text_vectors(self, category):
        require_separate(self.layers.settings.get("categories", ()), [category], self.allow_overlap)
        return super().text_vectors(category)

    def encode(self, images):
        found = staged_features(self.backbone.tower, images, self.stages, self.as_released)
        return Features(found.image_embedding, found.surgery, found.ordinary)

    def maps(self, features, text):
        sdp, layers = self.summands(features, text)
        return smooth(sdp + layers, self.smoothing)

    def summands(self, features: Features, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two maps that are added, B x S x S each, before smoothing: SDP's and the layers' (0 to J)."""
        size = self.backbone.image_size
        sdp = similarity_map(self.patch_values(features, text), size, 0)
        tokens = [stage[:, 1:] for stage in features.ordinary]
        return sdp, linear_maps(self.layers, tokens, text, size).sum(dim=1)

    @property
    def reads(self):
        return (*super().reads, "ordinary tokens")

    @property
    def settings(self):
        found = {"layers": self.layers.hash, "trained_on": self.layers.settings.get("dataset")}
        return super().settings | found | {"allow_overlap": self.allow_overlap}


class ClipSurgery(Detector):
    """CLIP Surgery (arXiv 2304.05653) as a baseline: v-v attention in the last half of the blocks on one path that
    never restarts, the last block's feature only, then the two-state feature surgery (METHOD.md section 8)."""

    name = "CLIP Surgery"

    def encode(self, images):
        visual = self.backbone.tower
        last = len(visual.transformer.resblocks)
        found = staged_features(
            visual, images, [last], as_released=False, first_block=last // 2, restart=False
        )
        return Features(found.image_embedding, found.surgery)

    patch_values = SDP.patch_values


def class_probability(image_embedding: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """B: softmax over the two states of 100 * cos(image embedding, text), anomalous column (METHOD.md section 3)."""
    logits = CLIP_TEMPERATURE * F.normalize(image_embedding, dim=-1) @ text
    return logits.softmax(dim=-1)[:, 1]
