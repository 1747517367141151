"""Notebook 08: what came after CLIP-AD, on the same frozen stage tokens. The ideas themselves are in ``ideas``.

Shapes: B images, M images of a category's test set, n flawless images, P remembered patches, N patches of an image,
D width of the image tower, J stages.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from clipad.detectors import SDP
from clipad.studies.after_clip_ad.ideas import IDEAS, learned_directions
from clipad.studies.common import Kept, Scores, score
from clipad.studies.opposite_predictions import patch_coverage
from clipad.surgery import similarity_map

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
SUMS = {
    "SDP + nearest of 4": ("nearest of 4", "weight of nearest"),
    "SDP + the batch": ("the batch", "weight of the batch"),
}
"""SDP's map plus another, and the choice that this leaves"""


@dataclass
class Split:
    """The tested images of a data set with masks, and per category some flawless ones that are never tested."""

    tested: Kept
    tokens: dict[str, list[torch.Tensor]]  # of the tested images, category -> per stage M x N x D
    bank: dict[str, list[torch.Tensor]]  # of the flawless ones, category -> per stage n x N x D

    def values(self, compute: Callable, known: Callable | None = None) -> torch.Tensor:
        """``compute(tokens, known)`` -> M x N of each category, summed over stages, in the data set's order.

        ``known(category, stage)``: what the tokens are compared with; None for four of the flawless images.
        """
        known = known or (lambda category, stage: self.bank[category][stage][:4])
        patches = next(iter(self.bank.values()))[0].shape[1]
        found = torch.empty(len(self.tested.labels), patches)
        for category, stages in self.tokens.items():
            parts = [compute(tokens, known(category, j)) for j, tokens in enumerate(stages)]
            found[torch.from_numpy(self.tested.where(category))] = sum(parts)
        return found

    def maps(self, name: str, value: Any, known: Callable | None = None) -> np.ndarray:
        """M x S x S of one of ``IDEAS`` with a value of its free choice, interpolated and smoothed as SDP's map."""
        values = self.values(lambda x, near: IDEAS[name].compute(x, near, value), known)
        size = self.tested.masks.shape[-1]
        return similarity_map(values, size, 8 / 240 * size).numpy()

    def pro(self, maps: np.ndarray) -> float:
        """PRO of maps M x S x S, mean over categories."""
        return self.tested.mean_metrics(maps, maps.max(axis=(1, 2)))["pixel_pro"]


def split(kept: Kept, tokens: Sequence[torch.Tensor] | None = None, seed: int = 0) -> Split:
    """Puts aside eight flawless images of each category, drawn at random; of fewer than 16 half, but at least four.

    ``tokens``: per stage M x N x D, None for those of ``kept``.
    """
    if tokens is None:
        tokens = [stage[:, 1:] for stage in kept.features.ordinary]
    bank, rest, tested = {}, {}, []
    for c, category in enumerate(kept.dataset.categories):
        at = kept.where(category)
        flawless = at[kept.labels[at] == 0]
        drawn = np.random.default_rng([seed, c]).permutation(flawless)
        chosen = drawn[: max(4, min(8, len(flawless) // 2))]
        others = np.setdiff1d(at, chosen)
        bank[category] = [stage[torch.from_numpy(chosen)] for stage in tokens]
        rest[category] = [stage[torch.from_numpy(others)] for stage in tokens]
        tested += others.tolist()
    at = np.sort(tested)
    few = replace(kept.dataset, samples=tuple(kept.dataset[i] for i in at))
    features = kept.features[torch.from_numpy(at)]
    return Split(Kept(few, kept.masks[at], kept.reads, features), rest, bank)


@dataclass
class Memory:
    """Labelled patches of the auxiliary collection, as many normal as anomalous ones."""

    keys: list[torch.Tensor]  # per stage P x D
    labels: torch.Tensor  # P
    categories: np.ndarray  # P

    def others(self, category: str, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and labels of a stage without the category's own, which its images are not tested with."""
        there = torch.from_numpy(self.categories != category)
        return self.keys[stage][there], self.labels[there]


def remember(kept: Kept, seed: int = 0) -> Memory:
    """All patches that a defect covers by more than half, and as many that none touches, drawn at random."""
    tokens = [stage[:, 1:].flatten(0, 1) for stage in kept.features.ordinary]
    grid = math.isqrt(kept.features.ordinary[0].shape[1] - 1)
    covered = patch_coverage(kept.masks, grid).flatten()
    anomalous, normal = (np.flatnonzero(at) for at in (covered > 0.5, covered == 0))
    drawn = np.random.default_rng(seed).permutation(normal)[: len(anomalous)]
    at, names = np.concatenate([anomalous, drawn]), np.repeat(kept.categories, grid * grid)
    return Memory([x[at] for x in tokens], (covered[at] > 0.5).float(), names[at])


def choose(sdp: SDP, aux: Split, memory: Memory) -> tuple[dict[str, Any], pd.DataFrame]:
    """Every free choice (its name -> value) by mean PRO on the auxiliary collection, and what was tried: ``what``,
    ``value``, ``pro``.

    The demo's CLIP was shown defects of these products, so the levels say nothing; the choice is all that is used.
    """
    chosen, maps, rows = {}, {"SDP": aux.tested.maps(sdp)}, []

    def best_of(choice: str, tried: Mapping[Any, np.ndarray]) -> np.ndarray:
        pro = {value: aux.pro(own) for value, own in tried.items()}
        rows.extend((choice, value, found) for value, found in pro.items())
        chosen[choice] = max(pro, key=pro.get)
        return tried[chosen[choice]]

    for name, idea in IDEAS.items():
        known = memory.others if name == "retrieval" else None
        if idea.tried:
            tried = {value: aux.maps(name, value, known) for value in idea.tried}
            maps[name] = best_of(idea.choice, tried)
    for added, choice in SUMS.values():
        best_of(choice, {w: maps["SDP"] + w * maps[added] for w in WEIGHTS})
    return chosen, pd.DataFrame(rows, columns=["what", "value", "pro"])


def every_map(
    detectors: Sequence[SDP], test: Split, memory: Memory, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Maps M x S x S of the tested images, by the names of ``USES``, and of the ideas "..., published"; and the
    milliseconds per image that an idea took.

    ``detectors``: SDP first, SDP+, its layers alone; ``settings``: of :func:`choose`.
    """
    directions = [learned_directions(keys, memory.labels) for keys in memory.keys]
    known = {"retrieval": memory.others, "learned directions": lambda c, stage: directions[stage]}
    found, spent = {d.name: test.tested.maps(d) for d in detectors}, {}
    for name, idea in IDEAS.items():
        begun = time.perf_counter()
        found[name] = test.maps(name, settings.get(idea.choice), known.get(name))
        spent[name] = 1000 * (time.perf_counter() - begun) / len(found[name])
    for name, (added, choice) in SUMS.items():
        found[name] = found["SDP"] + settings[choice] * found[added]
    found = {name: found[name] for name in USES}
    for name in OF_THE_PRODUCT:
        found[f"{name}, published"] = test.maps(name, IDEAS[name].published)
    return found, spent


def compared(
    maps: Mapping[str, np.ndarray], sdp: SDP, kept: Kept, resamples: int, seed: int = 0
) -> Scores:
    """All metrics on the same draws. Methods with text have the class probability and the published image score; for
    the others both are the map's maximum, because without text there is no class probability."""
    _, probability = kept.predict_all(sdp)
    without = {name for name in maps if "text" not in USES.get(name, "")}
    pairs = {n: (m, m.max(axis=(1, 2)) if n in without else probability) for n, m in maps.items()}
    return score(pairs, kept, resamples, seed, without_map=without)
