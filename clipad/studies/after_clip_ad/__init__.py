"""Notebook 08: what came after CLIP-AD, written on the same frozen stage tokens.

Shapes: B images, M images of a category's test set, n flawless images, P remembered patches, N patches of an image,
D width of the image tower, J stages. Every function takes one stage; a method is their sum over the stages.
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
from sklearn.linear_model import LogisticRegression

from clipad.backbone import Backbone
from clipad.datasets import Dataset
from clipad.detectors import SDP, SDPPlus
from clipad.dual_path import staged_features
from clipad.evaluation import batches
from clipad.metrics import pixel_metrics
from clipad.studies.common import Kept, Scores, score
from clipad.studies.opposite_predictions import patch_coverage, untrained
from clipad.studies.trainings import Finding
from clipad.surgery import similarity_map

SHARE = 0.3
"""of the other images, those that a patch is compared with in the end (MuSc: the lowest 30 %)"""
SIZES = (1, 3, 5)
"""sides of the neighbourhoods, in patches (MuSc)"""
VARIANCES = (0.5, 0.7, 0.9, 0.99)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""what is tried on the auxiliary collection"""

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
    Finding(
        "single patches above neighbourhoods", "pixel_pro", "the batch, single patches", "the batch"
    ),
    Finding("nearest of 4 above SDP", "pixel_pro", "nearest of 4", "SDP"),
    Finding(
        "token lengths help nearest", "pixel_pro", "nearest of 4", "nearest of 4, unit lengths"
    ),
    Finding("one PCA above nearest", "pixel_pro", "one PCA of 4", "nearest of 4"),
    Finding("fewer axes than 99 %", "pixel_pro", "one PCA of 4", "one PCA of 4, 99 %"),
    Finding("SDP above layers alone", "pixel_pro", "SDP", "layers alone"),
    Finding("learned directions above text", "pixel_pro", "learned directions", "layers alone"),
    Finding("retrieval above text", "pixel_pro", "retrieval", "layers alone"),
    Finding("SDP + nearest of 4 above SDP", "pixel_pro", "SDP + nearest of 4", "SDP"),
    Finding("SDP + the batch above SDP", "pixel_pro", "SDP + the batch", "SDP"),
    Finding("SDP above one PCA, image score", "image_auroc", "SDP", "one PCA of 4"),
)
"""what is asked of the demo's other trainings, in ``data/demo/after_clip_ad.csv``"""
WITH_TEXT = frozenset(name for name, used in USES.items() if "text" in used)


# The ideas, one stage each ---------------------------------------------------------------------------------------


def standardised(tokens: torch.Tensor) -> torch.Tensor:
    """B x N x D -> the same with mean 0 and deviation 1 over all N D numbers of an image (MuSc).

    What is kept is how long a patch's token is beside the others of its image; a unit length would lose that.
    """
    return F.layer_norm(tokens, tokens.shape[1:])


def neighbourhood_means(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """B x N x D -> the mean of the size x size tokens around each patch; outside of the image are zeros (MuSc)."""
    grid = math.isqrt(tokens.shape[1])
    image = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.avg_pool2d(image, size, 1, size // 2).flatten(2).transpose(1, 2)


def batch_distance(
    tokens: torch.Tensor, share: float = SHARE, images_at_once: int = 64
) -> torch.Tensor:
    """Tokens of a whole test set, M x N x D, M > 1 -> M x N: how far each patch is from the other images.

    Per other image the Euclidean distance to its nearest patch, then the mean of the lowest ``share`` of the M - 1
    (MuSc, mutual scoring). Time is quadratic in M; memory is N x 64 N numbers at once.
    """
    count = len(tokens)
    lowest = max(1, int(share * (count - 1)))
    found = []
    for i, image in enumerate(tokens):
        parts = tokens.split(images_at_once)
        nearest = torch.cat([torch.cdist(image[None], part).amin(dim=2) for part in parts])  # M x N
        nearest[i] = math.inf
        found.append(nearest.topk(lowest, dim=0, largest=False).values.mean(dim=0))
    return torch.stack(found)


def batch_scores(stages: Sequence[torch.Tensor], sizes: Sequence[int] = SIZES) -> torch.Tensor:
    """The batch as its own reference: M x N, summed over stages and neighbourhoods."""
    return sum(
        batch_distance(neighbourhood_means(standardised(tokens), size))
        for tokens in stages
        for size in sizes
    )


def nearest_distance(
    tokens: torch.Tensor, bank: torch.Tensor, unit_length: bool = False
) -> torch.Tensor:
    """B x N x D and a bank n x N x D of flawless images -> B x N: the distance to the bank's nearest patch.

    Euclidean between standardised tokens; with ``unit_length`` between tokens of length 1, which ranks like the cosine
    that WinCLIP+ and AnomalyDINO use.
    """
    scaled = (lambda x: F.normalize(x, dim=-1)) if unit_length else standardised
    patches = scaled(bank).flatten(0, 1)
    return torch.stack([torch.cdist(image, patches).amin(dim=1) for image in scaled(tokens)])


def subspace_residual(tokens: torch.Tensor, bank: torch.Tensor, variance: float) -> torch.Tensor:
    """B x N x D and a bank n x N x D -> B x N: squared distance from the bank's principal subspace (SubspaceAD).

    Of the principal axes as many as hold ``variance`` of the bank's variance.
    """
    patches = standardised(bank).flatten(0, 1)
    mean = patches.mean(dim=0)
    _, spread, axes = torch.linalg.svd(patches - mean, full_matrices=False)
    held = spread.square().cumsum(dim=0) / spread.square().sum()
    axes = axes[: int((held < variance).sum()) + 1]
    centred = standardised(tokens) - mean
    return (centred - centred @ axes.T @ axes).square().sum(dim=-1)


def retrieved(
    tokens: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """B x N x D, remembered patches P x D with labels P (0 or 1) -> B x N: the mean label, weighted by similarity.

    The weights are a softmax of cosines over the temperature (MRAD-TF; there on another path's tokens).
    """
    keys = F.normalize(keys, dim=-1)
    found = [F.normalize(image, dim=-1) @ keys.T / temperature for image in tokens]
    return torch.stack([cosines.softmax(dim=-1) @ labels.to(keys) for cosines in found])


def learned_directions(keys: torch.Tensor, labels: torch.Tensor) -> Callable:
    """Two learned directions instead of text: tokens B x N x D -> anomalous probability B x N.

    softmax of (x w_n, x w_a) is the sigmoid of x (w_a - w_n): a logistic regression of the patches' labels.
    """
    mean, spread = keys.mean(dim=0), keys.std(dim=0)
    fitted = LogisticRegression(C=0.1, max_iter=300).fit(
        ((keys - mean) / spread).cpu().numpy(), labels.cpu().numpy()
    )
    direction = torch.as_tensor(fitted.coef_[0], dtype=keys.dtype, device=keys.device)
    return lambda tokens: (
        (tokens - mean) / spread @ direction + float(fitted.intercept_[0])
    ).sigmoid()


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
    kept: Kept,
    tokens: Sequence[torch.Tensor] | None = None,
    references: int = 8,
    seed: int = 0,
) -> Split:
    """Puts aside ``references`` flawless images of each category, drawn at random, at most half of its flawless ones.

    ``tokens``: per stage M x N x D, None for those of ``kept``. ValueError for a category with fewer than eight
    flawless images.
    """
    if tokens is None:
        tokens = [stage[:, 1:] for stage in kept.features.ordinary]
    bank, aside = {}, []
    for c, category in enumerate(kept.dataset.categories):
        at = kept.where(category)
        flawless = at[kept.labels[at] == 0]
        if len(flawless) < 8:
            raise ValueError(f"{category} has {len(flawless)} flawless images, eight are needed")
        drawn = np.random.default_rng([seed, c]).permutation(flawless)
        chosen = drawn[: min(references, len(flawless) // 2)]
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
class Chosen:
    """What the auxiliary collection decided: see :func:`choose`."""

    variance: float
    temperature: float
    nearest_weight: float
    batch_weight: float
    tried: pd.DataFrame
    """PRO on the auxiliary collection by ``what`` and ``value``"""


def choose(sdp: SDP, aux: Split, memory: Memory) -> Chosen:
    """The four free numbers, by mean PRO on the auxiliary collection; it tests no category with its own patches.

    The demo's CLIP was shown defects of these products, so their level says nothing; the choice is all that is used.
    """
    sdp_map = aux.tested.maps(sdp)
    near = to_maps(sdp, aux.values(lambda c, stages: nearest_of(stages, aux.bank[c], 4)))
    batch = to_maps(sdp, aux.values(lambda c, stages: batch_scores(stages)))
    tried = {
        ("variance", v): to_maps(
            sdp, aux.values(lambda c, stages: subspace_of(stages, aux.bank[c], 4, v))
        )
        for v in VARIANCES
    } | {
        ("temperature", t): to_maps(
            sdp, aux.values(lambda c, stages: retrieved_from(stages, memory.without(c), t))
        )
        for t in TEMPERATURES
    }
    for weight in WEIGHTS:
        tried["weight of nearest", weight] = sdp_map + weight * near
        tried["weight of the batch", weight] = sdp_map + weight * batch
    found = pd.Series({key: mean_pro(maps, aux.tested) for key, maps in tried.items()})
    best = {what: float(found[what].idxmax()) for what in found.index.levels[0]}
    table = found.rename_axis(["what", "value"]).rename("pro").reset_index()
    return Chosen(
        best["variance"],
        best["temperature"],
        best["weight of nearest"],
        best["weight of the batch"],
        table,
    )


def nearest_of(stages, bank, k: int, unit_length: bool = False) -> torch.Tensor:
    """Nearest patches of the bank's first k images, summed over stages."""
    return sum(nearest_distance(x, y[:k], unit_length) for x, y in zip(stages, bank, strict=True))


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
    at = [kept.where(c) for c in kept.dataset.categories]
    return float(np.mean([pixel_metrics(maps[i], kept.masks[i])["pro"] for i in at]))


def ideas(test: Split, memory: Memory, chosen: Chosen) -> dict[str, Callable]:
    """The methods that are functions of the tokens: name -> (category, its stages) -> M x N."""
    directions = [learned_directions(keys, memory.labels) for keys in memory.keys]
    return {
        "learned directions": lambda c, stages: sum(
            f(x) for f, x in zip(directions, stages, strict=True)
        ),
        "retrieval": lambda c, stages: retrieved_from(stages, memory, chosen.temperature),
        "nearest of 4": lambda c, stages: nearest_of(stages, test.bank[c], 4),
        "one PCA of 4": lambda c, stages: subspace_of(stages, test.bank[c], 4, chosen.variance),
        "the batch": lambda c, stages: batch_scores(stages),
    }


def every_map(
    sdp: SDP, plus: SDPPlus, alone: SDPPlus, test: Split, memory: Memory, chosen: Chosen
) -> dict[str, np.ndarray]:
    """Maps M x S x S of the tested images by the names of ``USES``."""
    found = {d.name: test.tested.maps(d) for d in (sdp, plus, alone)}
    for name, compute in ideas(test, memory, chosen).items():
        found[name] = to_maps(sdp, test.values(compute))
    found["SDP + nearest of 4"] = found["SDP"] + chosen.nearest_weight * found["nearest of 4"]
    found["SDP + the batch"] = found["SDP"] + chosen.batch_weight * found["the batch"]
    return {name: found[name] for name in USES}


def changed_lines(sdp: SDP, test: Split) -> dict[str, np.ndarray]:
    """The same ideas with one line changed: unit lengths, all but 1 % of the variance, single patches."""
    computed = {
        "nearest of 4, unit lengths": lambda c, stages: nearest_of(stages, test.bank[c], 4, True),
        "one PCA of 4, 99 %": lambda c, stages: subspace_of(stages, test.bank[c], 4, 0.99),
        "the batch, single patches": lambda c, stages: batch_scores(stages, (1,)),
    }
    return {name: to_maps(sdp, test.values(f)) for name, f in computed.items()}


def compared(
    maps: Mapping[str, np.ndarray], sdp: SDP, kept: Kept, resamples: int, seed: int = 0
) -> Scores:
    """All metrics on the same draws. Methods with text have the published image score; the others have the map's
    maximum, because without text there is no class probability."""
    categories = kept.dataset.categories
    probability = np.empty(len(kept.dataset), np.float32)
    for category in categories:
        probability[kept.where(category)] = kept.predict(sdp, category).probabilities
    scores = {n: probability if n in WITH_TEXT else m.max(axis=(1, 2)) for n, m in maps.items()}
    return score(maps, scores, kept, resamples, seed, {n: n in WITH_TEXT for n in maps})


# Controls --------------------------------------------------------------------------------------------------------


def shots(
    sdp: SDP, test: Split, variance: float, draws: int, seed: int = 0, ks: Sequence[int] = (1, 2, 4)
) -> pd.DataFrame:
    """What k flawless images give: columns ``idea``, ``k``, ``draw`` (which images) and ``pro`` (mean over categories).

    A draw orders the references of every category at random and takes the first k.
    """
    rows = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        order = {c: torch.from_numpy(rng.permutation(len(b[0]))) for c, b in test.bank.items()}
        bank = {c: [stage[order[c]] for stage in b] for c, b in test.bank.items()}
        for k in ks:
            found = {
                "nearest": test.values(lambda c, stages: nearest_of(stages, bank[c], k)),
                "one PCA": test.values(lambda c, stages: subspace_of(stages, bank[c], k, variance)),
            }
            for idea, values in found.items():
                pro = mean_pro(to_maps(sdp, values), test.tested)
                rows.append({"idea": idea, "k": k, "draw": draw, "pro": pro})
    return pd.DataFrame(rows)


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


def controls(sdp: SDP, kept: Kept, variance: float, seed: int = 0) -> pd.DataFrame:
    """Three ideas on other tokens: columns ``tokens``, ``idea``, ``pro`` (mean over categories)."""
    rows = []
    for name, tokens in other_tokens(sdp.backbone, kept.dataset, seed).items():
        test = split(kept, tokens, seed=seed)
        found = {
            "nearest of 4": test.values(lambda c, stages: nearest_of(stages, test.bank[c], 4)),
            "one PCA of 4": test.values(
                lambda c, stages: subspace_of(stages, test.bank[c], 4, variance)
            ),
            "the batch": test.values(lambda c, stages: batch_scores(stages)),
        }
        for idea, values in found.items():
            pro = mean_pro(to_maps(sdp, values), test.tested)
            rows.append({"tokens": name, "idea": idea, "pro": pro})
    return pd.DataFrame(rows)


def extra_cost(test: Split, memory: Memory, chosen: Chosen) -> pd.DataFrame:
    """What an idea costs above the image tower, on the first category: ``ms per image``, and ``MB`` remembered."""
    category = test.tested.dataset.categories[0]
    stages = test.stages(category)
    numbers = {
        "learned directions": sum(2 * x.shape[2] + 1 for x in stages),
        "retrieval": sum(keys.numel() for keys in memory.keys),
        "nearest of 4": sum(stage[:4].numel() for stage in test.bank[category]),
        "one PCA of 4": sum(x.shape[2] ** 2 for x in stages),
        "the batch": sum(x.numel() for x in stages) * len(SIZES),
    }
    rows = {}
    for name, compute in ideas(test, memory, chosen).items():
        begun = time.perf_counter()
        compute(category, stages)
        spent = 1000 * (time.perf_counter() - begun) / len(stages[0])
        rows[name] = {"ms per image": spent, "MB": 4e-6 * numbers[name]}
    return pd.DataFrame(rows).T
