"""Opposite predictions and irrelevant highlights as numbers per anomalous image, on the map before smoothing
(METHOD.md section 3), and the controls of notebooks 02 and 03.

Shapes: M anomalous images, S x S pixels, N = G x G patches, C joint width.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from clipad.backbone import Backbone
from clipad.datasets import Dataset
from clipad.detectors import Detector
from clipad.evaluation import batches, read_masks
from clipad.io.images import read_mask
from clipad.studies.common import Labelled
from clipad.text import representative_vector

PHENOMENA = ("opposite", "opposite_on_object")
PHENOMENA += ("off_object", "off_object_area", "off_defect", "off_defect_area")
MEANS = ("on_defect", "elsewhere", "on_rest", "on_background")


def opposite(values: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    """1 where a map S x S is on average lower inside than outside, 1/2 for a tie, else 0; regions S x S bool."""
    # float32 summed in float64 is exact for equal values: a constant map gives ties.
    higher = values[inside].mean(dtype=np.float64) - values[outside].mean(dtype=np.float64)
    return float(0.5 - 0.5 * np.sign(higher))


def highlight(values: np.ndarray, region: np.ndarray, top: float = 0.05) -> float:
    """Share of a map's hottest pixels (``top`` of all) in a region, both S x S; those that tie at the edge count by
    their share, so a constant map gets the region's area."""
    count = max(1, round(top * values.size))
    threshold = np.partition(values, -count, axis=None)[-count]
    above, tied = values > threshold, values == threshold
    return float((region[above].sum() + (count - above.sum()) * region[tied].mean()) / count)


def image_phenomena(
    values: np.ndarray, mask: np.ndarray, whole: np.ndarray | None = None
) -> dict[str, float]:
    """``PHENOMENA`` and ``MEANS`` of one map S x S, its ``mask`` and the ``whole`` object, None where it is not known.

    NaN for what cannot be counted: everything where the mask is empty or full, highlights off an object that fills the
    image.
    """
    found = dict.fromkeys((*MEANS, *PHENOMENA), float("nan"))
    if not mask.any() or mask.all():
        return found
    found |= {"on_defect": values[mask].mean(), "elsewhere": values[~mask].mean()}
    found["opposite"] = opposite(values, mask, ~mask)
    found |= {"off_defect": highlight(values, ~mask), "off_defect_area": (~mask).mean()}
    if whole is not None and (rest := whole & ~mask).any():
        found |= {
            "opposite_on_object": opposite(values, mask, rest),
            "on_rest": values[rest].mean(),
        }
    if whole is not None and not whole.all():
        found["on_background"] = values[~(whole | mask)].mean()
        found |= {"off_object": highlight(values, ~whole), "off_object_area": (~whole).mean()}
    return found


@dataclass
class Truth(Labelled):
    """The anomalous images of a data set that have a mask, and what is known of their pixels."""

    objects: np.ndarray | None
    """M x S x S like the masks, None where the data set has no object masks"""

    def batches(self, backbone: Backbone) -> Iterator[tuple[np.ndarray, str, torch.Tensor]]:
        """Positions, category and pre-processed images, batch by batch."""
        position = 0
        for category, images in batches(backbone, list(self.dataset)):
            yield position + np.arange(len(images)), category, images
            position += len(images)

    def patches(self, grid: int) -> np.ndarray:
        """M x N labels: 1 where the defect covers a quarter of the patch or more; 0 where it covers none and the object
        (if known) half or more; -1 for all others."""
        defect = patch_coverage(self.masks, grid)
        normal = defect == 0
        if self.objects is not None:
            normal &= patch_coverage(self.objects, grid) >= 0.5
        return np.where(defect >= 0.25, 1, np.where(normal, 0, -1))


def patch_coverage(masks: np.ndarray, grid: int) -> torch.Tensor:
    """Masks M x S x S -> share of each patch that they cover, M x N."""
    return F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), grid).flatten(1)


def pick(labels: np.ndarray, per_image: int = 16, seed: int = 0) -> pd.DataFrame:
    """Of labels M x N at most that many patches of each image with 0 and with 1, at random: ``image``, ``patch``,
    ``label``."""
    rng, rows = np.random.default_rng(seed), []
    for i, own in enumerate(labels):
        for label in (0, 1):
            for patch in rng.permutation(np.flatnonzero(own == label))[:per_image]:
                rows.append((i, patch, label))
    return pd.DataFrame(rows, columns=["image", "patch", "label"])


def ground_truth(dataset: Dataset, image_size: int) -> Truth:
    """Read the masks, S x S. ValueError for a data set without any."""
    samples = tuple(s for s in dataset if s.label == 1 and s.mask_path is not None)
    if not samples:
        raise ValueError(f"{dataset.name} has no ground-truth masks: nothing can be counted on it")
    objects = None
    if all(s.object_mask_path for s in samples):
        objects = np.stack([read_mask(s.object_mask_path, image_size) for s in samples])
    names = tuple(c for c in dataset.categories if any(s.category == c for s in samples))
    few = replace(dataset, categories=names, samples=samples)
    return Truth(few, read_masks(list(samples), image_size), objects)


def count_phenomena(maps: np.ndarray, truth: Truth) -> pd.DataFrame:
    """A row per anomalous image: ``category``, ``defect`` and what :func:`image_phenomena` finds in maps M x S x S, in
    the order of ``truth``. ValueError for maps with NaN."""
    maps = np.asarray(maps, dtype=np.float32)
    if not np.isfinite(maps).all():
        raise ValueError("maps have to be finite; found NaN or infinity, which would count as 0")
    objects = truth.objects if truth.objects is not None else [None] * len(maps)
    rows = [image_phenomena(*entry) for entry in zip(maps, truth.masks, objects, strict=True)]
    kinds = {"category": truth.categories, "defect": [s.defect for s in truth.dataset]}
    return pd.concat([pd.DataFrame(kinds), pd.DataFrame(rows, dtype=float)], axis=1)


def shuffled_states(
    detector: Detector, categories: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """For each seed the detector's C x 2 per category, but from sentences dealt to the two states at random."""
    method, options, found = detector.rvs, detector.rvs_options, [{} for _ in seeds]
    for category in categories:
        sentences = detector.prompts.sentences(category)
        states = [F.normalize(detector.backbone.encode_text(own), dim=-1) for own in sentences]
        pool = torch.cat(states)
        for seed, vectors in zip(seeds, found, strict=True):
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            parts = pool[order].split([len(s) for s in states])
            chosen = [representative_vector(part, method, **options) for part in parts]
            vectors[category] = torch.stack(chosen, dim=1)
    return found


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """The same model with an image encoder of random weights, drawn on the CPU (a GPU would draw others)."""
    twin = copy.copy(backbone)
    for made in ("weights_hash", "tower"):
        twin.__dict__.pop(made, None)
    twin.model = copy.deepcopy(backbone.model).cpu()
    twin.visual = visual = twin.model.visual
    twin.pretrained = f"untrained image encoder (seed {seed})"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in visual.modules():
            for name in ("reset_parameters", "_reset_parameters"):
                if hasattr(module, name):
                    getattr(module, name)()
        for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
            parameter.copy_(torch.randn(parameter.shape) * len(visual.class_embedding) ** -0.5)
    twin.model.to(backbone.device)
    return twin
