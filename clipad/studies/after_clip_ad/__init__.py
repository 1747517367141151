"""Notebook 08: what came after CLIP-AD, on the same frozen stage tokens. The ideas themselves are in ``ideas``.

Shapes: B images, M images of a category's test set, n flawless images, P remembered patches, N patches of an image,
D width of the image tower, J stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from clipad.backbone import Backbone
from clipad.datasets import Dataset, read_image
from clipad.detectors import SDP
from clipad.dual_path import staged_features
from clipad.evaluation import batches
from clipad.studies.after_clip_ad.ideas import IDEAS, learned_directions
from clipad.studies.common import Kept, Scores, score
from clipad.studies.opposite_predictions import patch_coverage, untrained
from clipad.studies.trainings import Finding
from clipad.surgery import similarity_map

FEWEST = 6
"""flawless images of a category: four references, and two that are tested"""
WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""of another map that is added to SDP's, tried on the auxiliary collection"""
OF_THE_PRODUCT = ("nearest of 4", "one PCA of 4", "the batch")
"""ideas that need nothing but images of the product itself"""

USES = {
    "SDP": "text",
    "SDP+": "text, masks",
    "layers alone": "text, masks",
    "learned directions": "masks",
    "retrieval": "masks",
    "nearest of 4": "flawless",
    "one PCA of 4": "flawless",
    "the batch": "test set",
    "SDP + nearest of 4": "text, flawless",
    "SDP + the batch": "text, test set",
}
"""method -> what it takes besides the frozen image tower: words; masks of *other* products; four flawless images of
this product; all images of this product's test set"""
SAME_SIGN = (
    Finding("the batch above SDP", "pixel_pro", "the batch", "SDP"),
    Finding("nearest of 4 above SDP", "pixel_pro", "nearest of 4", "SDP"),
    Finding("retrieval above SDP", "pixel_pro", "retrieval", "SDP"),
    Finding(
        "learned directions above layers alone", "pixel_pro", "learned directions", "layers alone"
    ),
    Finding("retrieval above layers alone", "pixel_pro", "retrieval", "layers alone"),
    Finding("nearest: lengths help", "pixel_pro", "nearest of 4", "nearest of 4, published"),
    Finding("PCA: fewer axes help", "pixel_pro", "one PCA of 4", "one PCA of 4, published"),
    Finding("batch: single patches help", "pixel_pro", "the batch", "the batch, published"),
    Finding("one PCA above nearest of 4", "pixel_pro", "one PCA of 4", "nearest of 4"),
    Finding("SDP + nearest above SDP", "pixel_pro", "SDP + nearest of 4", "SDP"),
    Finding("SDP + nearest above nearest", "pixel_pro", "SDP + nearest of 4", "nearest of 4"),
    Finding("SDP + batch above SDP", "pixel_pro", "SDP + the batch", "SDP"),
    Finding("SDP + batch above batch", "pixel_pro", "SDP + the batch", "the batch"),
    Finding("class probability above nearest's maximum", "class_auroc", "SDP", "nearest of 4"),
)
"""what is asked of the demo's other trainings, in ``data/demo/after_clip_ad.csv``"""
WITH_TEXT = frozenset(name for name, used in USES.items() if "text" in used)


# Who is a reference, who is tested, what is remembered -----------------------------------------------------------


@dataclass
class Split:
    """The tested images of a data set, and per category some flawless ones that are never tested."""

    tested: Kept
    tokens: dict[str, list[torch.Tensor]]
    """of the tested images, category -> per stage M x N x D"""
    bank: dict[str, list[torch.Tensor]]
    """of the flawless ones, category -> per stage n x N x D"""
    summands: dict[tuple[str, Any], torch.Tensor] = field(default_factory=dict)
    """(idea that adds up, one tried value) -> M x N: these take the time, so each is computed once"""

    def values(self, compute: Callable, known: Callable | None = None) -> torch.Tensor:
        """``compute(tokens, known)`` -> M x N of each category, summed over stages, in the data set's order.

        ``known(category, stage)``: what the tokens are compared with; None for four of the flawless images.
        """
        known = known or (lambda category, stage: self.bank[category][stage][:4])
        found = torch.empty(len(self.tested.labels), self.grid**2)
        for category, stages in self.tokens.items():
            parts = [compute(tokens, known(category, j)) for j, tokens in enumerate(stages)]
            found[torch.from_numpy(self.tested.where(category))] = sum(parts)
        return found

    @property
    def grid(self) -> int:
        """Patches a side."""
        return math.isqrt(next(iter(self.tokens.values()))[0].shape[1])

    def idea(self, name: str, value: Any, known: Callable | None = None) -> torch.Tensor:
        """M x N of one of ``IDEAS`` with a value of its free choice; ``known``: as for :meth:`values`."""
        idea = IDEAS[name]

        def of(one: Any) -> torch.Tensor:
            return self.values(lambda tokens, near: idea.compute(tokens, near, one), known)

        if not idea.adds_up:
            return of(value)
        summands = [(name, one) for one in idea.tried if one <= value]
        for key in set(summands) - set(self.summands):
            self.summands[key] = of(key[1])
        return sum(self.summands[key] for key in summands)


def split(
    kept: Kept, tokens: Sequence[torch.Tensor] | None = None, references: int = 8, seed: int = 0
) -> Split:
    """Puts aside ``references`` flawless images of each category, drawn at random, at most half of its flawless ones.

    But at least four: ``FEWEST`` flawless images are needed, else ValueError. ``tokens``: per stage M x N x D, None
    for those of ``kept``.
    """
    if tokens is None:
        tokens = [stage[:, 1:] for stage in kept.features.ordinary]
    bank, rest, tested = {}, {}, []
    for c, category in enumerate(kept.dataset.categories):
        at = kept.where(category)
        flawless = at[kept.labels[at] == 0]
        if len(flawless) < FEWEST:
            raise ValueError(f"{category} has {len(flawless)} flawless images, {FEWEST} are needed")
        drawn = np.random.default_rng([seed, c]).permutation(flawless)
        chosen = drawn[: max(4, min(references, len(flawless) // 2))]
        others = np.setdiff1d(at, chosen)
        bank[category] = [stage[torch.from_numpy(chosen)] for stage in tokens]
        rest[category] = [stage[torch.from_numpy(others)] for stage in tokens]
        tested += others.tolist()
    return Split(subset(kept, np.sort(tested)), rest, bank)


def subset(kept: Kept, positions: np.ndarray) -> Kept:
    """Some of the images, in the data set's order."""
    return Kept(
        replace(kept.dataset, samples=tuple(kept.dataset[i] for i in positions)),
        None if kept.masks is None else kept.masks[positions],
        kept.reads,
        kept.features[torch.from_numpy(positions)],
    )


@dataclass
class Memory:
    """Labelled patches of the auxiliary collection, as many normal as anomalous ones."""

    keys: list[torch.Tensor]
    """per stage P x D"""
    labels: torch.Tensor
    """P"""
    categories: np.ndarray
    """P: which category a patch comes from"""

    def others(self, category: str, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and labels of a stage without the category's own, which its images are not tested with."""
        there = torch.from_numpy(self.categories != category)
        return self.keys[stage][there], self.labels[there]


def remember(kept: Kept, seed: int = 0) -> Memory:
    """All patches that a defect covers by more than half, and as many that none touches, drawn at random."""
    tokens = [stage[:, 1:].flatten(0, 1) for stage in kept.features.ordinary]
    grid = math.isqrt(kept.features.ordinary[0].shape[1] - 1)
    covered = patch_coverage(kept.masks, grid).flatten()
    anomalous, normal = ((covered > 0.5).nonzero()[:, 0], (covered == 0).nonzero()[:, 0])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(normal)))
    at = torch.cat([anomalous, normal[order[: len(anomalous)]]])
    names = np.repeat(kept.categories, grid * grid)
    return Memory([x[at] for x in tokens], (covered[at] > 0.5).float(), names[at.numpy()])


# All of them -----------------------------------------------------------------------------------------------------

SUMS = {
    "SDP + nearest of 4": ("nearest of 4", "weight of nearest"),
    "SDP + the batch": ("the batch", "weight of the batch"),
}
"""SDP's map plus another, and the choice that this leaves"""


def choose(sdp: SDP, aux: Split, memory: Memory) -> tuple[dict[str, Any], pd.DataFrame]:
    """Every free choice (its name -> value) by mean PRO on the auxiliary collection, and what was tried: ``what``,
    ``value``, ``pro``.

    The demo's CLIP was shown defects of these products, so the levels say nothing; the choice is all that is used.
    """
    chosen, maps, rows = {}, {"SDP": aux.tested.maps(sdp)}, []

    def best_of(choice: str, tried: Mapping[Any, np.ndarray]) -> np.ndarray:
        pro = {value: mean_pro(own, aux.tested) for value, own in tried.items()}
        rows.extend((choice, value, found) for value, found in pro.items())
        chosen[choice] = max(pro, key=pro.get)
        return tried[chosen[choice]]

    for name, idea in IDEAS.items():
        known = memory.others if name == "retrieval" else None
        tried = {v: to_maps(sdp, aux.idea(name, v, known)) for v in idea.tried}
        if tried:
            maps[name] = best_of(idea.choice, tried)
    for added, choice in SUMS.values():
        best_of(choice, {w: maps["SDP"] + w * maps[added] for w in WEIGHTS})
    return chosen, pd.DataFrame(rows, columns=["what", "value", "pro"])


def to_maps(sdp: SDP, values: torch.Tensor) -> np.ndarray:
    """Patch values M x N -> maps M x S x S, interpolated and smoothed as SDP's."""
    return similarity_map(values, sdp.backbone.image_size, sdp.smoothing).numpy()


def mean_pro(maps: np.ndarray, kept: Kept) -> float:
    """PRO, mean over categories."""
    return kept.mean_metrics(maps, maps.max(axis=(1, 2)))["pixel_pro"]


def every_map(
    detectors: Sequence[SDP], test: Split, memory: Memory, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Maps M x S x S of the tested images, by the names of ``USES``, and of the ideas "..., published"; and the
    milliseconds per image that an idea took.

    ``detectors``: SDP first, SDP+, its layers alone; ``settings``: of :func:`choose`.
    """
    sdp, spent = detectors[0], {}
    directions = [learned_directions(keys, memory.labels) for keys in memory.keys]
    known = {"retrieval": memory.others, "learned directions": lambda c, stage: directions[stage]}
    found = {d.name: test.tested.maps(d) for d in detectors}
    for name, idea in IDEAS.items():
        begun = time.perf_counter()
        values = test.idea(name, settings.get(idea.choice), known.get(name))
        spent[name] = 1000 * (time.perf_counter() - begun) / len(values)
        found[name] = to_maps(sdp, values)
    for name, (added, choice) in SUMS.items():
        found[name] = found["SDP"] + settings[choice] * found[added]
    found = {name: found[name] for name in USES}
    for name in OF_THE_PRODUCT:
        published = test.idea(name, IDEAS[name].published)
        found[f"{name}, published"] = to_maps(sdp, published)
    return found, spent


def compared(
    maps: Mapping[str, np.ndarray], sdp: SDP, kept: Kept, resamples: int, seed: int = 0
) -> Scores:
    """All metrics on the same draws. Methods with text have the class probability and the published image score; for
    the others both are the map's maximum, because without text there is no class probability."""
    _, probability = kept.predict_all(sdp)
    pairs = {n: (m, probability if n in WITH_TEXT else m.max(axis=(1, 2))) for n, m in maps.items()}
    return score(pairs, kept, resamples, seed, without_map=set(maps) - WITH_TEXT)


# Controls --------------------------------------------------------------------------------------------------------


def shots(
    sdp: SDP, test: Split, settings: Mapping, draws: int, seed: int = 0, ks=(1, 2, 4, 8)
) -> pd.DataFrame:
    """What k flawless images give: columns ``idea``, ``k``, ``draw`` (which images) and ``pro`` (mean over categories).

    A draw orders the references of every category at random and takes the first k (all of them where they are fewer).
    """
    rows = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        order = {c: torch.from_numpy(rng.permutation(len(b[0]))) for c, b in test.bank.items()}
        for k in ks:
            for idea in ("nearest of 4", "one PCA of 4"):
                values = test.idea(
                    idea,
                    settings[IDEAS[idea].choice],
                    lambda category, stage: test.bank[category][stage][order[category][:k]],
                )
                pro = mean_pro(to_maps(sdp, values), test.tested)
                rows.append((idea.removesuffix(" of 4"), k, draw, pro))
    return pd.DataFrame(rows, columns=["idea", "k", "draw", "pro"])


def other_tokens(backbone: Backbone, dataset: Dataset, seed: int = 0) -> dict[str, list]:
    """Tokens that no training has shaped: of the same tower with random weights, and the patches' pixels themselves."""
    twin = untrained(backbone, seed)
    stages, pixels = [], []
    side = backbone.visual.patch_size[0]
    with torch.no_grad():
        for _, images in batches(backbone, list(dataset)):
            stages.append([x[:, 1:].cpu() for x in staged_features(twin.visual, images).ordinary])
            pixels.append(F.unfold(images, side, stride=side).transpose(1, 2).cpu())
    return {
        "untrained tower": [torch.cat(stage) for stage in zip(*stages, strict=True)],
        "pixels": [torch.cat(pixels)],
    }


def controls(sdp: SDP, kept: Kept, settings: Mapping, seed: int = 0) -> pd.DataFrame:
    """The ideas without masks on other tokens: columns ``tokens``, ``idea``, ``pro`` (mean over categories)."""
    rows = []
    for name, tokens in other_tokens(sdp.backbone, kept.dataset, seed).items():
        test = split(kept, tokens, seed=seed)
        for idea in OF_THE_PRODUCT:
            values = test.idea(idea, settings[IDEAS[idea].choice])
            rows.append((name, idea, mean_pro(to_maps(sdp, values), test.tested)))
    return pd.DataFrame(rows, columns=["tokens", "idea", "pro"])


def place_alone(sdp: SDP, kept_aux: Kept, test: Split) -> float:
    """PRO of one map for all images: how often a defect of the auxiliary collection covers a place."""
    often = patch_coverage(kept_aux.masks, test.grid).mean(dim=0)
    return mean_pro(to_maps(sdp, often.expand(len(test.tested.labels), -1)), test.tested)


def extra_cost(sdp: SDP, test: Split, memory: Memory, spent: Mapping[str, float]) -> pd.DataFrame:
    """What an idea costs above what SDP needs: ``ms per image`` (``spent``), and ``MB`` remembered for a category.

    The row SDP is the image tower with both paths and the map.
    """
    category = test.tested.dataset.categories[0]
    stages, first = test.tokens[category], test.tested.where(category)[:8]
    images = [read_image(test.tested.dataset[i].image_path) for i in first]
    batch = torch.stack([sdp.backbone.preprocess(image) for image in images])
    begun = time.perf_counter()
    sdp.predict(batch, category)
    own = 1000 * (time.perf_counter() - begun) / len(batch)
    numbers = {
        "SDP": 0,
        "learned directions": sum(2 * x.shape[2] + 1 for x in stages),
        "retrieval": sum(keys.numel() for keys in memory.keys),
        "nearest of 4": sum(stage[:4].numel() for stage in test.bank[category]),
        "one PCA of 4": sum(x.shape[2] ** 2 for x in stages),
        "the batch": sum(x.numel() for x in stages),
    }
    table = pd.DataFrame({"ms per image": {"SDP": own, **spent}, "MB": numbers})
    return table.assign(MB=4e-6 * table["MB"])
