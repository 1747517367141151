"""From a few flawless images to a decision per image: notebook 07, and what ``clipad detect`` computes with.

:class:`Inspector` turns images into two numbers, logit and map maximum, :class:`Rule` these into scores and verdicts.

Shapes: B images, n flawless images, J stages, T x T tiles, K = T^2 N patches of an image, S image side,
R = T S side of a map.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.stats import beta

from clipad.detectors import CLIP_TEMPERATURE, SDP, Detector, SDPPlus
from clipad.surgery import similarity_map

FEWEST_FLAWLESS = 8  # a median and a MAD of fewer images say nothing
BANK = 100  # flawless images whose patches are remembered; further ones are compared with these, as new images are
SMALLEST = 4  # pixels of a map: a region of fewer is not outlined


def alarms_allowed(n: int, false_alarms: float) -> int:
    """k = floor(rate (n + 1)): the threshold is the k-th highest of n flawless scores (conformal prediction, Vovk
    2005). ValueError if n images cannot promise this false-alarm rate: none below 1 / (n + 1) is possible."""
    if not 0 < false_alarms <= 0.25:
        raise ValueError(f"a false-alarm rate is above 0 and at most 0.25, found {false_alarms}")
    k = math.floor(false_alarms * (n + 1) + 1e-9)
    if k < 1 or n < FEWEST_FLAWLESS:
        needed = max(FEWEST_FLAWLESS, math.ceil(1 / false_alarms - 1 - 1e-9))
        raise ValueError(
            f"{n} flawless images cannot promise a false-alarm rate of {false_alarms:g}: it takes at least {needed}"
        )
    return k


def rate_interval(n: int, false_alarms: float) -> tuple[float, float]:
    """95 % interval of the true false-alarm rate of *this* threshold, over draws of the n flawless images.

    For n independent continuous scores it is Beta(k, n + 1 - k) distributed; approximate for those of :class:`Rule`.
    """
    k = alarms_allowed(n, false_alarms)
    low, high = beta.ppf([0.025, 0.975], k, n + 1 - k)
    return float(low), float(high)


def robust_scale(values: Sequence[float]) -> tuple[float, float]:
    """Median and 1.4826 MAD, which estimates a standard deviation. ValueError where the MAD is 0: there is no floor."""
    values = np.asarray(values, dtype=np.float64)
    centre = float(np.median(values))
    spread = float(1.4826 * np.median(np.abs(values - centre)))
    if not spread > 0:
        raise ValueError(
            f"half of the flawless images' logits, maxima or map values are {centre:.6g}: are they copies of one?"
        )
    return centre, spread


@dataclass
class Rule:
    """How scores become verdicts. ``logits`` and ``maxima`` are those of the n flawless images.

    Each of these is scored as if it were new: on the scale of the other n - 1 (``scores``). *bad*: the score is above
    ``threshold``, the k-th highest flawless one; *check*: it is not, but the map's maximum is above ``map_threshold``,
    found in the same way; *good*: neither. :meth:`words` says what is promised.
    """

    logits: np.ndarray
    maxima: np.ndarray
    false_alarms: float = 0.05

    def __post_init__(self):
        n = len(self.logits)
        k = alarms_allowed(n, self.false_alarms)
        each = zip(self.logits, self.maxima, ~np.eye(n, dtype=bool), strict=True)
        self.scores = np.array([self.score(x, m, rest) for x, m, rest in each])
        self.threshold = float(np.sort(self.scores)[-k])
        self.map_threshold = float(np.sort(self.maxima)[-k])

    def score(self, logit, maximum, known=slice(None)):
        """(z(l) + z(m)) / sqrt(2) of one image, or of arrays, on the robust scale of the ``known`` flawless images."""
        centre_l, spread_l = robust_scale(self.logits[known])
        centre_m, spread_m = robust_scale(self.maxima[known])
        return ((logit - centre_l) / spread_l + (maximum - centre_m) / spread_m) / math.sqrt(2)

    def p_value(self, score: float) -> float:
        """(1 + flawless images that score as high) / (n + 1): small means unusual."""
        return float((1 + (self.scores >= score).sum()) / (len(self.scores) + 1))

    def verdict(self, score: float, maximum: float) -> str:
        if score > self.threshold:
            return "bad"
        return "check" if maximum > self.map_threshold else "good"

    def words(self) -> dict[str, str]:
        """The rule and what it promises, in words: a sentence for each verdict, and one for the rate."""
        n, k = len(self.logits), alarms_allowed(len(self.logits), self.false_alarms)
        low, high = rate_interval(n, self.false_alarms)
        return {
            "bad": f"the score is above {self.threshold:.2f}, rank {k} from the top among the {n} flawless images, "
            f"each scored as if it were new, from the other {n - 1}",
            "check": f"the score is not, but the map is somewhere above {self.map_threshold:.4g}, by the same rule",
            "good": "neither",
            "promised": f"on average over choices of {n} flawless images, about {k}/{n + 1} = {k / (n + 1):.1%} of new "
            f"flawless images are bad, and at most about {2 * k / (n + 1):.1%} bad or check; with these {n} the true "
            f"rate of bad lies roughly between {low:.1%} and {high:.1%} (95 % interval). Only about, as it is a "
            "jackknife, and only for images that are taken as the flawless ones were",
        }


def without_specks(heat: np.ndarray, threshold: float) -> np.ndarray:
    """The map (R x R), lowered to the threshold where fewer than ``SMALLEST`` connected pixels are above it."""
    labels, _ = ndimage.label(heat > threshold, structure=np.ones((3, 3)))
    small = np.bincount(labels.ravel()) < SMALLEST
    small[0] = False
    return np.where(small[labels], np.asarray(threshold, heat.dtype), heat)


def standardised(tokens: torch.Tensor) -> torch.Tensor:
    """B x K x D -> the same with mean 0 and deviation 1 over all K D numbers of an image, as MuSc has it."""
    return F.layer_norm(tokens.float(), tokens.shape[1:])


def nearest_patch(
    tokens: torch.Tensor, bank: torch.Tensor, scaled: Callable = standardised, same: bool = False
) -> torch.Tensor:
    """One stage, B x K x D and a bank n x K x D of flawless images -> B x K: distance to the bank's nearest patch.

    ``scaled``: what is done to the tokens before; ``same``: the tokens begin with the bank's own images, each of which
    is compared with the others only.
    """
    patches, k, found = scaled(bank).flatten(0, 1), bank.shape[1], []
    for i, image in enumerate(scaled(tokens)):  # one image at a time: K x n K distances
        distances = torch.cdist(image, patches)
        if same:  # nothing for i >= n
            distances[:, i * k : (i + 1) * k] = math.inf
        found.append(distances.amin(dim=1))
    return torch.stack(found)


def tile(image, tiles: int) -> list:
    """A PIL image cut into tiles x tiles pieces, row by row; the model reads each at its full size."""
    rows = np.array_split(np.asarray(image), tiles)
    pieces = [piece for row in rows for piece in np.array_split(row, tiles, axis=1)]
    return list(map(Image.fromarray, pieces))


def stitch(maps: torch.Tensor, tiles: int) -> torch.Tensor:
    """Maps of tiles, (B T^2) x S x S in ``tile``'s order -> B x R x R."""
    side = maps.shape[-1]
    grid = maps.reshape(-1, tiles, tiles, side, side).transpose(2, 3)
    return grid.reshape(-1, tiles * side, tiles * side)


class Look(NamedTuple):
    """What the backbone says of B images."""

    logits: np.ndarray  # B
    words: np.ndarray  # B x R x R, the detector's map
    tokens: np.ndarray  # B x J x K x D, the ordinary path's patches; B x 0 without neighbours

    def of(self, images) -> Self:
        """Of some of the images: a slice, a mask or positions."""
        return Look(*(values[images] for values in self))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


class Inspector:
    """A detector for one product: from images to logit and map.

    ``neighbours``: ``no`` for the detector's own map; for SDP and SDP+ also ``alone``, the distance to the nearest
    flawless patch, or ``added``, both, each on the robust scale of the flawless images' map values. ``tiles``: the map
    is put together from those of tiles x tiles pieces.

    After :meth:`fit`: ``rule`` (:class:`Rule`), ``flawless_maps`` (n x R x R), ``bank`` (the remembered patches).
    """

    rule: Rule | None = None

    def __init__(self, detector: Detector, name: str, neighbours: str = "no", tiles: int = 1):
        if neighbours != "no" and not isinstance(detector, SDP):
            raise ValueError(
                f"nearest neighbours go with sdp and sdp_plus, not with {detector.name}"
            )
        self.detector, self.name = detector, name
        self.neighbours, self.tiles = neighbours, tiles

    def prepare(self, image) -> torch.Tensor:
        """A PIL image -> what ``look`` takes of it: (1 + T^2) x 3 x S x S, whole and tiles; 1 x 3 x S x S without."""
        pieces = [image, *(tile(image, self.tiles) if self.tiles > 1 else [])]
        return torch.stack([self.detector.backbone.preprocess(piece) for piece in pieces])

    def look(self, images: torch.Tensor) -> Look:
        """Run the backbone over prepared images, B x (1 or 1 + T^2) x 3 x S x S. ValueError for maps or logits that are
        not finite."""
        detector, backbone, (count, each) = self.detector, self.detector.backbone, images.shape[:2]
        encode = detector.encode
        if self.neighbours != "no":  # as SDP+ reads an image: also the ordinary path
            encode = partial(SDPPlus.encode, detector)
        with torch.no_grad(), backbone.autocast():
            seen = encode(images.flatten(0, 1).to(backbone.device)).apply(torch.Tensor.float)
        text = detector.text_vectors(self.name)
        logits = class_logit(seen.image_embedding[::each], text)
        if self.tiles > 1:  # the map comes from the tiles alone
            seen = seen[torch.arange(count * each) % each > 0]
        words = stitch(detector.score_with(seen, text).maps, self.tiles).numpy()
        if not (np.isfinite(words).all() and np.isfinite(logits).all()):
            raise ValueError(f"{detector.name} gave a map or a logit that is not finite")
        if self.neighbours == "no":
            return Look(logits, words, np.empty((count, 0), np.float32))
        stages = [x[:, 1:].reshape(count, -1, x.shape[-1]) for x in seen.ordinary]
        return Look(logits, words, torch.stack(stages, dim=1).cpu().numpy())

    def fit(self, flawless: Look, false_alarms: float = 0.05) -> Self:
        """Learn from flawless images: the patches to remember, the scales, the rule."""
        self.bank = torch.from_numpy(flawless.tokens[:BANK]).to(self.detector.backbone.device)
        maps = self._maps(flawless, same=True)
        if len(maps) > 1:
            self._scales = [robust_scale(m[:, ::2, ::2]) for m in maps]
        self.flawless_maps = self._added(maps)
        self.rule = Rule(flawless.logits, self.flawless_maps.max(axis=(1, 2)), false_alarms)
        return self

    def maps(self, look: Look) -> np.ndarray:
        """B x R x R, higher = more anomalous."""
        return self._added(self._maps(look))

    def _maps(self, look: Look, same: bool = False) -> list[np.ndarray]:
        """The map by words, the map of distances to the bank, or both; ``same``: see :func:`nearest_patch`."""
        if self.neighbours == "no":
            return [look.words]
        backbone, smoothing = self.detector.backbone, self.detector.smoothing
        tokens = torch.from_numpy(look.tokens).to(backbone.device)
        pairs = zip(tokens.unbind(1), self.bank.unbind(1), strict=True)
        values = sum(nearest_patch(x, y, same=same) for x, y in pairs) / tokens.shape[1]
        values = values.reshape(len(values) * self.tiles**2, -1)
        maps = similarity_map(values, backbone.image_size, smoothing)
        near = stitch(maps, self.tiles).cpu().numpy()
        return [near] if self.neighbours == "alone" else [look.words, near]

    def _added(self, maps: list[np.ndarray]) -> np.ndarray:
        """One map as it is; of two the sum on their robust scales."""
        if len(maps) == 1:
            return maps[0]
        pairs = zip(maps, self._scales, strict=True)
        total = sum((values - centre) / spread for values, (centre, spread) in pairs)
        return (total / math.sqrt(2)).astype(np.float32)


def class_logit(image_embedding: torch.Tensor, text: torch.Tensor) -> np.ndarray:
    """B: 100 (cos(f, t_a) - cos(f, t_n)); the class probability is its logistic function."""
    cosines = F.normalize(image_embedding.float(), dim=-1) @ text.to(image_embedding.device)
    return (CLIP_TEMPERATURE * (cosines[:, 1] - cosines[:, 0])).double().cpu().numpy()
