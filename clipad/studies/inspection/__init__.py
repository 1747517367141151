"""From a few flawless images to a decision per image: notebook 07, and what ``clipad detect`` computes with.

:class:`Inspector` turns images into two numbers, logit and map maximum, :class:`Rule` these into scores and verdicts.

Shapes: B images, n flawless images, J stages, T x T tiles, K = T^2 N patches of an image, S image side,
R = T S side of a map.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.stats import beta

from clipad.detectors import CLIP_TEMPERATURE, SDP, Detector, SDPPlus
from clipad.evaluation import in_parts
from clipad.surgery import similarity_map

NEIGHBOURS = ("no", "alone", "added")
FEWEST_FLAWLESS = 8  # a median and a MAD of fewer images say nothing
BANK = 100  # flawless images whose patches are remembered; further ones are compared with these, as new images are
SMALLEST = 4  # pixels of a map: a region of fewer is not outlined


def require_enough(n: int, false_alarms: float) -> None:
    """ValueError if n flawless images cannot promise this false-alarm rate: none below 1 / (n + 1) is possible."""
    if not 0 < false_alarms <= 0.25:
        raise ValueError(f"a false-alarm rate is above 0 and at most 0.25, found {false_alarms}")
    needed = max(FEWEST_FLAWLESS, math.ceil(1 / false_alarms - 1 - 1e-9))
    if n < needed:
        raise ValueError(
            f"{n} flawless images cannot promise a false-alarm rate of {false_alarms:g}: it takes at least {needed}"
        )


def alarms_allowed(n: int, false_alarms: float) -> int:
    """k = floor(rate (n + 1)): the threshold is the k-th highest of n flawless scores."""
    return math.floor(false_alarms * (n + 1) + 1e-9)


def conformal_threshold(scores: Sequence[float], false_alarms: float) -> float:
    """The k-th highest of n flawless scores (conformal prediction, Vovk et al. 2005). ValueError if k would be 0."""
    require_enough(len(scores), false_alarms)
    return float(np.sort(scores)[-alarms_allowed(len(scores), false_alarms)])


def rate_interval(n: int, false_alarms: float) -> tuple[float, float]:
    """95 % interval of the true false-alarm rate of *this* threshold, over draws of the n flawless images.

    For n independent continuous scores it is Beta(k, n + 1 - k) distributed; approximate for those of :class:`Rule`.
    """
    k = alarms_allowed(n, false_alarms)
    low, high = beta.ppf([0.025, 0.975], k, n + 1 - k)
    return float(low), float(high)


def robust_scale(values: Sequence[float], what: str = "value") -> tuple[float, float]:
    """Median and 1.4826 MAD, which estimates a standard deviation. ValueError where the MAD is 0: there is no floor."""
    values = np.asarray(values, dtype=np.float64)
    centre = float(np.median(values))
    spread = float(1.4826 * np.median(np.abs(values - centre)))
    if not spread > 0:
        raise ValueError(
            f"half of the flawless images have the same {what} ({centre:.6g}), so it has no scale: are they copies of "
            "one picture?"
        )
    return centre, spread


def combined_score(logits, maxima, flawless_logits, flawless_maxima):
    """(z(l) + z(m)) / sqrt(2) on the robust scale of the flawless images; arrays or numbers."""
    centre_l, spread_l = robust_scale(flawless_logits, "logit")
    centre_m, spread_m = robust_scale(flawless_maxima, "map maximum")
    return ((logits - centre_l) / spread_l + (maxima - centre_m) / spread_m) / math.sqrt(2)


@dataclass
class Rule:
    """How scores become verdicts. ``logits`` and ``maxima`` are those of the n flawless images.

    Each of these is scored as if it were new: on the scale of the other n - 1 (``scores``). *bad*: the score is above
    ``threshold``, the k-th highest flawless one, k = floor(rate (n + 1)); *check*: it is not, but the map's maximum is
    above ``map_threshold``, found in the same way; *good*: neither. :meth:`words` says what is promised.
    """

    logits: np.ndarray
    maxima: np.ndarray
    false_alarms: float = 0.05

    def __post_init__(self):
        logits, maxima = self.logits, self.maxima
        each = zip(logits, maxima, ~np.eye(len(logits), dtype=bool), strict=True)
        own = [combined_score(x, m, logits[rest], maxima[rest]) for x, m, rest in each]
        self.scores = np.array(own)
        self.threshold = conformal_threshold(self.scores, self.false_alarms)
        self.map_threshold = conformal_threshold(maxima, self.false_alarms)

    def score(self, logit, maximum):
        """Of one image, or of arrays of them."""
        return combined_score(logit, maximum, self.logits, self.maxima)

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
            "check": "the score is not, but a region of the map is above "
            f"{self.map_threshold:.4g}, found by the same rule",
            "good": "neither",
            "promised": f"on average over all choices of {n} flawless images, about {k}/{n + 1} = {k / (n + 1):.1%} of "
            f"new flawless images are called bad, and at most about {2 * k / (n + 1):.1%} bad or check; with these {n} "
            f"images the true rate of bad lies roughly between {low:.1%} and {high:.1%} (95 % interval). Only about, "
            f"because {n - 1} images set the scale of each flawless score and {n} that of a new one (a jackknife), and "
            "only for images that are taken as the flawless ones were",
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
    columns, rows = ([round(side * i / tiles) for i in range(tiles + 1)] for side in image.size)
    return [
        image.crop((left, top, right, below))
        for top, below in pairwise(rows)
        for left, right in pairwise(columns)
    ]


def stitch(maps: torch.Tensor, tiles: int) -> torch.Tensor:
    """Maps of tiles, (B T^2) x S x S in ``tile``'s order -> B x R x R."""
    side = maps.shape[-1]
    grid = maps.reshape(-1, tiles, tiles, side, side).transpose(2, 3)
    return grid.reshape(-1, tiles * side, tiles * side)


@dataclass
class Look:
    """What the backbone says of B images."""

    logits: np.ndarray  # B
    words: np.ndarray  # B x R x R, the detector's map
    tokens: list[
        torch.Tensor
    ]  # per stage B x K x D, the ordinary path's patches; empty without neighbours

    def __getitem__(self, index) -> Self:
        return Look(self.logits[index], self.words[index], [stage[index] for stage in self.tokens])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        return cls(
            np.concatenate([p.logits for p in parts]),
            np.concatenate([p.words for p in parts]),
            [torch.cat(stage) for stage in zip(*(p.tokens for p in parts), strict=True)],
        )


class Inspector:
    """A detector for one product: from images to logit and map.

    ``neighbours``: ``no`` for the detector's own map; for SDP and SDP+ also ``alone``, the distance to the nearest
    flawless patch, or ``added``, both, each on the robust scale of the flawless images' map values. ``tiles``: the map
    is put together from those of tiles x tiles pieces.

    After :meth:`fit`: ``rule`` (:class:`Rule`), ``flawless_maps`` (n x R x R), ``bank`` (the remembered patches).
    """

    rule: Rule | None = None

    def __init__(self, detector: Detector, name: str, neighbours: str = "no", tiles: int = 1):
        if neighbours not in NEIGHBOURS:
            raise ValueError(f"neighbours: one of {', '.join(NEIGHBOURS)}; found {neighbours!r}")
        if neighbours != "no" and not isinstance(detector, SDP):
            raise ValueError(f"nearest neighbours go with sdp and sdp_plus, not with {detector}")
        self.detector, self.name = detector, name
        self.neighbours, self.tiles = neighbours, tiles

    def prepare(self, image) -> torch.Tensor:
        """A PIL image -> what ``look`` takes of it: (1 + T^2) x 3 x S x S, whole and tiles; 1 x 3 x S x S without."""
        pieces = [image, *(tile(image, self.tiles) if self.tiles > 1 else [])]
        return torch.stack([self.detector.backbone.preprocess(piece) for piece in pieces])

    def look(self, images: torch.Tensor) -> Look:
        """Run the backbone over prepared images, B x (1 or 1 + T^2) x 3 x S x S.

        ValueError for maps or logits that are not finite.
        """
        return Look.cat(in_parts(self._look, images))

    def _look(self, images):
        detector, (count, each) = self.detector, images.shape[:2]
        images, text, backbone = (
            images.flatten(0, 1),
            detector.text_vectors(self.name),
            detector.backbone,
        )
        if self.neighbours == "no":
            seen = detector.features(images)
        else:  # as SDP+ reads an image: also the ordinary path
            with torch.no_grad(), backbone.autocast():
                seen = SDPPlus.encode(detector, images.to(backbone.device)).apply(
                    torch.Tensor.float
                )
        logits = class_logit(seen.image_embedding[::each], text)
        if self.tiles > 1:  # the map comes from the tiles alone
            seen = seen[torch.arange(count * each) % each > 0]
        words = stitch(detector.score_with(seen, text).maps, self.tiles).numpy()
        if not (np.isfinite(words).all() and np.isfinite(logits).all()):
            raise ValueError(f"{detector.name} gave a map or a logit that is not finite")
        near = [] if self.neighbours == "no" else seen.ordinary
        return Look(logits, words, [x[:, 1:].reshape(count, -1, x.shape[-1]) for x in near])

    def fit(self, looks: Iterable[Look], false_alarms: float = 0.05) -> Self:
        """Learn from flawless images (batches of ``look``): the patches to remember, the scales, the rule."""
        looks, known = iter(looks), []
        for look in looks:
            known.append(look)
            if sum(len(one.logits) for one in known) >= BANK:
                break
        if not known:
            require_enough(0, false_alarms)
        first = Look.cat(known)
        self.bank = first.tokens
        seen = [(first.logits, *self._maps(first, same=True))]
        # Beyond the bank as new images; their tokens are not kept.
        seen += [(look.logits, *self._maps(look)) for look in looks]
        logits, *maps = map(np.concatenate, zip(*seen, strict=True))
        require_enough(len(logits), false_alarms)
        if len(maps) > 1:
            self._scales = [robust_scale(m[:, ::2, ::2], "map value") for m in maps]
        self.flawless_maps = self._added(maps)
        self.rule = Rule(logits, self.flawless_maps.max(axis=(1, 2)), false_alarms)
        return self

    def maps(self, look: Look) -> np.ndarray:
        """B x R x R, higher = more anomalous."""
        return self._added(self._maps(look))

    def _maps(self, look: Look, same: bool = False) -> list[np.ndarray]:
        """The map by words, the map of distances to the bank, or both; ``same``: see :func:`nearest_patch`."""
        if self.neighbours == "no":
            return [look.words]
        pairs = zip(look.tokens, self.bank, strict=True)
        values = sum(nearest_patch(x, y, same=same) for x, y in pairs) / len(self.bank)
        size, smoothing = self.detector.backbone.image_size, self.detector.smoothing
        values = values.reshape(len(values) * self.tiles**2, -1)
        near = stitch(similarity_map(values, size, smoothing), self.tiles).cpu().numpy()
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
