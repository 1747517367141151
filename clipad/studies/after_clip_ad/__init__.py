"""Notebook 08: what came after CLIP-AD, on the same frozen stage tokens. The ideas themselves are in ``ideas``.

Shapes: B images, M images of a category's test set, n flawless images, P remembered patches, N patches of an image,
D width of the image tower, J stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from clipad.backbone import Backbone
from clipad.datasets import Dataset, read_image
from clipad.detectors import SDP
from clipad.dual_path import staged_features
from clipad.evaluation import batches
from clipad.studies.after_clip_ad.ideas import (
    SIZES,
    batch_scores,
    learned_directions,
    nearest_patch,
    retrieved,
    standardised,
    subspace_residual,
    unit_length,
)
from clipad.studies.common import Kept, Scores, score
from clipad.studies.opposite_predictions import patch_coverage, untrained
from clipad.studies.trainings import Finding
from clipad.surgery import similarity_map

FEWEST = 6
"""flawless images of a category: four references, and two that are tested"""
VARIANCES = (0.5, 0.7, 0.9, 0.99)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""what is tried on the auxiliary collection, beside neighbourhoods up to each of ``SIZES``"""

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
    tokens: list[torch.Tensor]
    """of the tested images, per stage M x N x D"""
    bank: dict[str, list[torch.Tensor]]
    """of the flawless ones, category -> per stage n x N x D"""

    def stages(self, category: str) -> list[torch.Tensor]:
        """The tokens of a category's tested images."""
        at = torch.from_numpy(self.tested.where(category))
        return [tokens[at] for tokens in self.tokens]

    def values(self, compute: Callable[[str, list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """``compute(category, its stages)`` -> M x N of every category, put together in the data set's order."""
        found = self.tokens[0].new_empty(self.tokens[0].shape[:2])
        for category in self.tested.dataset.categories:
            at = torch.from_numpy(self.tested.where(category))
            found[at] = compute(category, self.stages(category))
        return found


def split(
    kept: Kept, tokens: Sequence[torch.Tensor] | None = None, references: int = 8, seed: int = 0
) -> Split:
    """Puts aside ``references`` flawless images of each category, drawn at random, at most half of its flawless ones.

    But at least four: ``FEWEST`` flawless images are needed, else ValueError. ``tokens``: per stage M x N x D, None
    for those of ``kept``.
    """
    if tokens is None:
        tokens = [stage[:, 1:] for stage in kept.features.ordinary]
    bank, aside = {}, []
    for c, category in enumerate(kept.dataset.categories):
        at = kept.where(category)
        flawless = at[kept.labels[at] == 0]
        if len(flawless) < FEWEST:
            raise ValueError(f"{category} has {len(flawless)} flawless images, {FEWEST} are needed")
        drawn = np.random.default_rng([seed, c]).permutation(flawless)
        chosen = drawn[: max(4, min(references, len(flawless) // 2))]
        bank[category] = [stage[torch.from_numpy(chosen)] for stage in tokens]
        aside += chosen.tolist()
    rest = np.setdiff1d(np.arange(len(kept.dataset)), aside)
    at = torch.from_numpy(rest)
    return Split(subset(kept, rest), [stage[at] for stage in tokens], bank)


def subset(kept: Kept, positions: np.ndarray) -> Kept:
    """Some of the images, in the data set's order."""
    return Kept(
        replace(kept.dataset, samples=tuple(kept.dataset[i] for i in positions)),
        kept.reads,
        kept.features[torch.from_numpy(positions)],
        kept.labels[positions],
        None if kept.masks is None else kept.masks[positions],
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

    def without(self, category: str) -> Memory:
        """The patches of all other categories."""
        other = torch.from_numpy(self.categories != category)
        return Memory([k[other] for k in self.keys], self.labels[other], self.categories[other])


def remember(kept: Kept, seed: int = 0) -> Memory:
    """All patches that a defect covers by more than half, and as many that none touches, drawn at random."""
    tokens = [stage[:, 1:].flatten(0, 1) for stage in kept.features.ordinary]
    grid = math.isqrt(kept.features.ordinary[0].shape[1] - 1)
    covered = patch_coverage(kept.masks, grid).flatten()
    anomalous, normal = ((covered > 0.5).nonzero()[:, 0], (covered == 0).nonzero()[:, 0])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(normal)))
    at = torch.cat([anomalous, normal[order[: len(anomalous)]]])
    names = np.repeat([sample.category for sample in kept.dataset], grid * grid)
    return Memory([x[at] for x in tokens], (covered[at] > 0.5).float(), names[at.numpy()])


# All of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The free choices of the ideas."""

    scaled: Callable = unit_length
    variance: float = 0.99
    sizes: tuple[int, ...] = SIZES
    temperature: float = 0.1
    nearest_weight: float = 0.0
    batch_weight: float = 0.0


PUBLISHED = Settings()
"""as WinCLIP+ and AnomalyDINO, SubspaceAD and MuSc have it; MRAD's temperature could not be read"""


def choose(sdp: SDP, aux: Split, memory: Memory) -> tuple[Settings, pd.DataFrame]:
    """Every free choice by mean PRO on the auxiliary collection, and what was tried: ``what``, ``value``, ``pro``.

    Retrieval tests no category with its own patches. The demo's CLIP was shown defects of these products, so the
    levels say nothing; the choice is all that is used.
    """

    def near(scaled):
        return aux.values(lambda c, stages: nearest_of(stages, aux.bank[c], 4, scaled))

    nearest = {"kept": standardised, "divided out": unit_length}
    tried = {("lengths", name): to_maps(sdp, near(scaled)) for name, scaled in nearest.items()}
    for v in VARIANCES:
        found = aux.values(lambda c, stages: subspace_of(stages, aux.bank[c], 4, v))
        tried["variance", v] = to_maps(sdp, found)
    found = 0  # each size once: it is what takes the time
    for size in SIZES:
        found = found + aux.values(lambda c, stages: batch_scores(stages, (size,)))
        tried["largest neighbourhood", size] = to_maps(sdp, found)
    for t in TEMPERATURES:
        found = aux.values(lambda c, stages: retrieved_from(stages, memory.without(c), t))
        tried["temperature", t] = to_maps(sdp, found)
    pro = {key: mean_pro(maps, aux.tested) for key, maps in tried.items()}

    def best(what):
        return max((key for key in pro if key[0] == what), key=pro.get)

    sdp_map = aux.tested.maps(sdp)
    sums = {"weight of nearest": "lengths", "weight of the batch": "largest neighbourhood"}
    for what, added in sums.items():
        for w in WEIGHTS:
            pro[what, w] = mean_pro(sdp_map + w * tried[best(added)], aux.tested)
    settings = Settings(
        scaled=nearest[best("lengths")[1]],
        variance=best("variance")[1],
        sizes=tuple(s for s in SIZES if s <= best("largest neighbourhood")[1]),
        temperature=best("temperature")[1],
        nearest_weight=best("weight of nearest")[1],
        batch_weight=best("weight of the batch")[1],
    )
    rows = [(what, value, found) for (what, value), found in pro.items()]
    return settings, pd.DataFrame(rows, columns=["what", "value", "pro"])


def nearest_of(stages, bank, k: int, scaled: Callable = standardised) -> torch.Tensor:
    """Nearest patches of the bank's first k images, summed over stages."""
    return sum(nearest_patch(x, y[:k], scaled) for x, y in zip(stages, bank, strict=True))


def subspace_of(stages, bank, k: int, variance: float) -> torch.Tensor:
    """Residuals from one PCA a stage of the bank's first k images, summed over stages."""
    return sum(subspace_residual(x, y[:k], variance) for x, y in zip(stages, bank, strict=True))


def retrieved_from(stages, memory: Memory, temperature: float) -> torch.Tensor:
    """Retrieved labels, summed over stages."""
    pairs = zip(stages, memory.keys, strict=True)
    return sum(retrieved(x, keys, memory.labels, temperature) for x, keys in pairs)


def to_maps(sdp: SDP, values: torch.Tensor) -> np.ndarray:
    """Patch values M x N -> maps M x S x S, interpolated and smoothed as SDP's."""
    return similarity_map(values, sdp.backbone.image_size, sdp.smoothing).numpy()


def mean_pro(maps: np.ndarray, kept: Kept) -> float:
    """PRO, mean over categories."""
    return kept.mean_metrics(maps, maps.max(axis=(1, 2)))["pixel_pro"]


def every_idea(test: Split, memory: Memory, settings: Settings) -> dict[str, Callable]:
    """The methods that are functions of the tokens: name -> (category, its stages) -> M x N."""
    directions = [learned_directions(keys, memory.labels) for keys in memory.keys]
    return by_neighbours(test, settings) | {
        "learned directions": lambda c, stages: sum(
            f(x) for f, x in zip(directions, stages, strict=True)
        ),
        "retrieval": lambda c, stages: retrieved_from(stages, memory, settings.temperature),
    }


def by_neighbours(test: Split, settings: Settings) -> dict[str, Callable]:
    """Those of `every_idea` that need nothing but images of the product itself."""
    return {
        "nearest of 4": lambda c, stages: nearest_of(stages, test.bank[c], 4, settings.scaled),
        "one PCA of 4": lambda c, stages: subspace_of(stages, test.bank[c], 4, settings.variance),
        "the batch": lambda c, stages: batch_scores(stages, settings.sizes),
    }


def every_map(
    detectors: Sequence[SDP], test: Split, computed: Mapping[str, Callable], settings: Settings
) -> dict[str, np.ndarray]:
    """Maps M x S x S of the tested images, by the names of ``USES``, and of the ideas "..., published".

    ``detectors``: SDP first, SDP+, its layers alone; ``computed``: `every_idea`.
    """
    sdp = detectors[0]
    found = {d.name: test.tested.maps(d) for d in detectors}
    found |= {name: to_maps(sdp, test.values(f)) for name, f in computed.items()}
    found["SDP + nearest of 4"] = found["SDP"] + settings.nearest_weight * found["nearest of 4"]
    found["SDP + the batch"] = found["SDP"] + settings.batch_weight * found["the batch"]
    published = by_neighbours(test, PUBLISHED).items()
    return {name: found[name] for name in USES} | {
        f"{name}, published": to_maps(sdp, test.values(f)) for name, f in published
    }


def compared(
    maps: Mapping[str, np.ndarray], sdp: SDP, kept: Kept, resamples: int, seed: int = 0
) -> Scores:
    """All metrics on the same draws. Methods with text have the class probability and the published image score; for
    the others both are the map's maximum, because without text there is no class probability."""
    text = {category: sdp.text_vectors(category) for category in kept.dataset.categories}
    _, probability = kept.with_text(sdp, text)
    scores = {n: probability if n in WITH_TEXT else m.max(axis=(1, 2)) for n, m in maps.items()}
    return score(maps, scores, kept, resamples, seed, {n: n in WITH_TEXT for n in maps})


# Controls --------------------------------------------------------------------------------------------------------


def shots(
    sdp: SDP, test: Split, settings: Settings, draws: int, seed: int = 0, ks=(1, 2, 4, 8)
) -> pd.DataFrame:
    """What k flawless images give: columns ``idea``, ``k``, ``draw`` (which images) and ``pro`` (mean over categories).

    A draw orders the references of every category at random and takes the first k (all of them where they are fewer).
    """
    rows = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        order = {c: torch.from_numpy(rng.permutation(len(b[0]))) for c, b in test.bank.items()}
        bank = {c: [stage[order[c]] for stage in b] for c, b in test.bank.items()}
        for k in ks:
            near = test.values(lambda c, stages: nearest_of(stages, bank[c], k, settings.scaled))
            pca = test.values(lambda c, stages: subspace_of(stages, bank[c], k, settings.variance))
            for idea, values in (("nearest", near), ("one PCA", pca)):
                rows.append((idea, k, draw, mean_pro(to_maps(sdp, values), test.tested)))
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


def controls(sdp: SDP, kept: Kept, settings: Settings, seed: int = 0) -> pd.DataFrame:
    """The ideas without masks on other tokens: columns ``tokens``, ``idea``, ``pro`` (mean over categories)."""
    rows = []
    for name, tokens in other_tokens(sdp.backbone, kept.dataset, seed).items():
        test = split(kept, tokens, seed=seed)
        for idea, compute in by_neighbours(test, settings).items():
            pro = mean_pro(to_maps(sdp, test.values(compute)), test.tested)
            rows.append({"tokens": name, "idea": idea, "pro": pro})
    return pd.DataFrame(rows)


def place_alone(sdp: SDP, kept_aux: Kept, test: Split) -> float:
    """PRO of one map for all images: how often a defect of the auxiliary collection covers a place."""
    grid = math.isqrt(test.tokens[0].shape[1])
    often = patch_coverage(kept_aux.masks, grid).mean(dim=0)
    return mean_pro(to_maps(sdp, often.expand(len(test.tokens[0]), -1)), test.tested)


def extra_cost(
    sdp: SDP, test: Split, memory: Memory, computed: Mapping[str, Callable]
) -> pd.DataFrame:
    """What an idea costs on the first category, above what SDP needs: ``ms per image``, and ``MB`` remembered.

    The row SDP is the image tower with both paths and the map.
    """
    category = test.tested.dataset.categories[0]
    stages, first = test.stages(category), test.tested.where(category)[:8]
    images = [test.tested.dataset[i].image_path for i in first]
    batch = torch.stack([sdp.backbone.preprocess(read_image(path)) for path in images])
    numbers = {
        "SDP": 0,
        "learned directions": sum(2 * x.shape[2] + 1 for x in stages),
        "retrieval": sum(keys.numel() for keys in memory.keys),
        "nearest of 4": sum(stage[:4].numel() for stage in test.bank[category]),
        "one PCA of 4": sum(x.shape[2] ** 2 for x in stages),
        "the batch": sum(x.numel() for x in stages),
    }
    timed = {"SDP": (lambda: sdp.predict(batch, category), len(batch))}
    for name, compute in computed.items():
        timed[name] = (lambda compute=compute: compute(category, stages), len(stages[0]))
    rows = {}
    for name, (call, count) in timed.items():
        begun = time.perf_counter()
        call()
        spent = 1000 * (time.perf_counter() - begun) / count
        rows[name] = {"ms per image": spent, "MB": 4e-6 * numbers[name]}
    return pd.DataFrame(rows).T
