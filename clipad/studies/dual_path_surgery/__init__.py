"""What each part of SDP does: its variants as data, all computed from a few passes of the dual path.

A variant says which path it reads, where that path starts, whether it restarts, after which blocks it is read, and
how similarities become values. Variants that share a path share its pass through the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clipad.datasets import Dataset
from clipad.detectors import CLIP_TEMPERATURE, class_probability
from clipad.dual_path import (
    StagedFeatures,
    attention_weights,
    default_stages,
    embed_patches,
    project,
    staged_features,
)
from clipad.evaluation import load_images, published_image_score, read_masks
from clipad.metrics import draw_counts, interval, pixel_metrics, resampled_metrics
from clipad.surgery import cosine, feature_surgery, similarity_map

COLUMNS = (
    *(f"pixel_{m}" for m in ("auroc", "f1_max", "ap", "pro")),
    *(f"image_{m}" for m in ("auroc", "f1_max", "ap")),
    *(f"map_{m}" for m in ("auroc", "f1_max", "ap")),
)
"""``pixel_*`` as everywhere; ``image_*`` by the published image score; ``map_*`` by the maximum of the map alone"""
FULL = "SDP"


@dataclass(frozen=True)
class Variant:
    """One way from an image to patch values. The defaults are SDP as released."""

    name: str
    group: str
    blocks: tuple[int, ...]
    """1-based blocks after which the path is read; the similarities are summed"""
    path: str = "surgery"
    """``surgery`` (v-v attention) or ``ordinary`` (plain CLIP)"""
    first_block: int = 0
    restart: bool = True
    as_released: bool = True
    score: str = "surgery"
    """``surgery`` (feature surgery), ``difference`` (the same with w = 1), ``anomalous`` (the cosine with the
    anomalous vector alone), ``softmax`` (direct map)"""


def variants(layers: int) -> tuple[Variant, ...]:
    """The ablation for a network of ``layers`` blocks, in the order of the tables.

    Not listed twice: v-v attention in the last quarter on one path *is* the last stage alone.

    >>> [v.name for v in variants(12)][:6]
    ['Direct', 'Direct + feature surgery', 'last 1', 'last 3 = stage 4', 'last 6', 'all 12']
    """
    stages = default_stages(layers)
    quarter, half = layers // 4, layers // 2
    one_path, single, parts = "v-v in the last k blocks, one path", "one stage", "parts of SDP"
    starts = sorted({1, quarter, half} - {quarter})
    found = [
        Variant("Direct", "ordinary path", (layers,), path="ordinary", score="softmax"),
        Variant("Direct + feature surgery", "ordinary path", (layers,), path="ordinary"),
        *(
            Variant(f"last {k}", one_path, (layers,), first_block=layers - k, restart=False)
            for k in starts
        ),
        Variant(f"all {layers}", one_path, (layers,), restart=False, as_released=False),
        *(Variant(f"stage {n}", single, (block,)) for n, block in enumerate(stages[:3], start=1)),
        # Without restart the released program's side effect would also change the path: one change at a time.
        Variant("no restart", parts, stages, restart=False, as_released=False),
        Variant("no feature surgery", parts, stages, score="anomalous"),
        Variant("no class-token weights", parts, stages, score="difference"),
        Variant("as written", parts, stages, as_released=False),
        Variant(FULL, "all of it", stages),
    ]
    last_quarter = Variant(f"last {quarter} = stage 4", one_path, (layers,))
    found.insert(2 + sum(k < quarter for k in starts), last_quarter)
    return tuple(found)


def patch_values(tokens: list[torch.Tensor], text: torch.Tensor, score: str) -> torch.Tensor:
    """Per stage B x (N+1) x C and text C x 2 -> B x N, by one of the scores of :class:`Variant`."""
    if score == "surgery":
        return feature_surgery(tokens, text)[:, 1:, 1]
    z = sum(cosine(stage[:, 1:], text) for stage in tokens)
    if score == "softmax":
        return (CLIP_TEMPERATURE * z).softmax(dim=-1)[..., 1]
    return {"anomalous": z[..., 1], "difference": (z[..., 1] - z[..., 0]) / 2}[score]


@torch.no_grad()
def variant_values(
    backbone, images: torch.Tensor, text: torch.Tensor, chosen
) -> tuple[dict, torch.Tensor]:
    """Patch values per variant, B x N on the CPU, and the class probabilities B, of images B x 3 x S x S.

    One pass of the dual path for each (first_block, restart, as_released) that occurs in ``chosen``.
    """
    passes: dict[tuple, list[Variant]] = {}
    for variant in chosen:
        passes.setdefault((variant.first_block, variant.restart, variant.as_released), []).append(
            variant
        )
    images, text = images.to(backbone.device), text.to(backbone.device)
    values = {}
    for (first_block, restart, as_released), own in passes.items():
        blocks = sorted({block for variant in own for block in variant.blocks})
        with backbone.autocast():
            found = staged_features(
                backbone.visual, images, blocks, as_released, first_block, restart
            )
            ordinary = {
                b: project(backbone.visual, x) for b, x in zip(blocks, found.ordinary, strict=True)
            }
        surgery = dict(zip(blocks, found.surgery, strict=True))
        for variant in own:
            path = ordinary if variant.path == "ordinary" else surgery
            tokens = [path[block].float() for block in variant.blocks]
            values[variant.name] = patch_values(tokens, text, variant.score).cpu()
    return values, class_probability(found.image_embedding.float(), text).cpu()


@dataclass
class Ablation:
    """Metrics of every variant, category and resample, and the patch values they came from."""

    variants: tuple[Variant, ...]
    dataset: Dataset
    numbers: np.ndarray
    """V x categories x metrics (``COLUMNS``) x (1 + R); [..., 0] is the estimate, the rest are resamples"""
    values: dict[str, torch.Tensor]
    """per variant, patch values of all images of the data set in its order"""
    image_size: int
    smoothing: float

    def maps(self, name: str, index) -> np.ndarray:
        """Smoothed maps S x S of some images (indices into the data set)."""
        return similarity_map(self.values[name][index], self.image_size, self.smoothing).numpy()

    @cached_property
    def coverage(self) -> torch.Tensor:
        """Share of every patch that is anomalous, as the values of a variant; 0 where there is no mask."""
        grid = round(next(iter(self.values.values())).shape[1] ** 0.5)
        return patch_coverage(read_masks(list(self.dataset), self.image_size), grid)

    def contrast(self, values: str | torch.Tensor) -> torch.Tensor:
        """Per image, mean of the patch values inside minus outside the defect, in standard deviations of the image.

        ``values``: name of a variant, or values like a variant's. NaN where an image has no defect with a mask.
        """
        values = self.values[values] if isinstance(values, str) else values
        inside, outside = (
            (values * w).sum(dim=1) / w.sum(dim=1) for w in (self.coverage, 1 - self.coverage)
        )
        return (inside - outside) / values.std(dim=1)

    def table(self, name: str) -> pd.DataFrame:
        """Category x metric with a last row ``mean``, as :class:`clipad.Result` has it."""
        table = pd.DataFrame(
            self.numbers[self._row(name), :, :, 0], self.dataset.categories, COLUMNS
        )
        table.loc["mean"] = table.mean()
        return table

    def means(self) -> pd.DataFrame:
        """Variant x metric: mean over categories."""
        return pd.DataFrame({v.name: self.table(v.name).loc["mean"] for v in self.variants}).T

    def intervals(
        self, metric: str, baseline: str = FULL, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Per variant: ``mean``, ``difference`` to the baseline, and ``low``/``high`` of both, in two kinds.

        ``images``: images drawn anew within the categories at hand. ``both``: categories drawn anew as well, and
        within each the images. Differences are paired: variant and baseline see the same draws.
        """
        m = COLUMNS.index(metric)
        numbers = self.numbers[:, :, m]
        numbers = numbers[:, np.isfinite(numbers[:, :, 0]).all(axis=0)]
        n_categories, n_draws = numbers.shape[1], numbers.shape[2] - 1
        rng = np.random.default_rng(seed)
        picked = rng.integers(n_categories, size=(2000, n_categories))
        draws = {
            "images": numbers[:, :, 1:].mean(axis=1),
            "both": numbers[:, picked, rng.integers(1, n_draws + 1, size=picked.shape)].mean(
                axis=2
            ),
        }
        mean = numbers[:, :, 0].mean(axis=1)
        base = self._row(baseline)
        table = pd.DataFrame(
            {"mean": mean, "difference": mean - mean[base]}, [v.name for v in self.variants]
        )
        for kind, values in draws.items():
            for column, shown in (("mean", values), ("difference", values - values[base])):
                table[f"{column}_low_{kind}"], table[f"{column}_high_{kind}"] = interval(
                    shown, level
                )
        return table

    def _row(self, name: str) -> int:
        return [v.name for v in self.variants].index(name)


def ablate(
    detector,
    dataset: Dataset,
    chosen=None,
    n_resamples: int = 200,
    seed: int = 0,
    batch_size: int = 16,
) -> Ablation:
    """Every variant on every image, with ``n_resamples`` bootstrap resamples of the images for each metric.

    ``detector``: where text vectors, backbone and smoothing come from (a :class:`clipad.SDP`); ``chosen``: None for
    :func:`variants`. Metrics are NaN where a data set has no such labels.

    Raises ValueError for fewer than 2 resamples or a data set without images.
    """
    if n_resamples < 2 or not len(dataset):
        raise ValueError(
            f"expected images and 2 resamples or more, found {len(dataset)} and {n_resamples}"
        )
    backbone = detector.backbone
    chosen = chosen or variants(len(backbone.visual.transformer.resblocks))
    rng = np.random.default_rng(seed)
    numbers = np.full((len(chosen), len(dataset.categories), len(COLUMNS), 1 + n_resamples), np.nan)
    parts = {variant.name: {} for variant in chosen}
    for c, category in enumerate(
        tqdm(dataset.categories, desc=f"ablation on {dataset.name}", unit="category")
    ):
        where = [i for i, s in enumerate(dataset) if s.category == category]
        samples = [dataset[i] for i in where]
        text = detector.text_vectors(category)
        batches = load_images(samples, backbone.preprocess, batch_size)
        found = [variant_values(backbone, images, text, chosen) for images in batches]
        probabilities = torch.cat([p for _, p in found]).numpy()
        labels = np.array([s.label for s in samples])
        masked = (labels >= 0).all() and all(s.mask_path for s in samples if s.label == 1)
        masks = read_masks(samples, backbone.image_size) if masked else None
        counts = draw_counts(labels, n_resamples, rng)
        for v, variant in enumerate(chosen):
            values = torch.cat([part[variant.name] for part, _ in found])
            parts[variant.name].update(zip(where, values, strict=True))
            maps = similarity_map(values, backbone.image_size, detector.smoothing).numpy()
            numbers[v, c] = _metrics(maps, masks, probabilities, labels, counts)
    joined = {
        name: torch.stack([rows[i] for i in range(len(dataset))]) for name, rows in parts.items()
    }
    return Ablation(
        tuple(chosen), dataset, numbers, joined, backbone.image_size, detector.smoothing
    )


def _metrics(maps, masks, probabilities, labels, counts) -> np.ndarray:
    """Metrics (``COLUMNS``) x (1 + R) of one variant on one category."""
    found = {}
    if masks is not None:
        found |= {f"pixel_{k}": v for k, v in resampled_metrics(maps, masks, counts).items()}
    if (labels >= 0).all():
        maxima = maps.max(axis=(1, 2))
        for kind, scores in (
            ("image", published_image_score(probabilities, maxima)),
            ("map", maxima),
        ):
            found |= {
                f"{kind}_{k}": v for k, v in resampled_metrics(scores, labels, counts).items()
            }
    return np.array([found.get(name, np.full(len(counts), np.nan)) for name in COLUMNS])


def stage_shift(one: StagedFeatures, other: StagedFeatures) -> pd.DataFrame:
    """How far two readings of the same images differ, per stage: length of the difference / length of ``other``.

    Columns: the class token and the patch tokens of the projected stage feature (median over images and tokens), and
    the tokens of the ordinary path, which SDP+ reads.
    """
    rows = {}
    for stage, a, b, x, y in zip(
        one.stages, one.surgery, other.surgery, one.ordinary, other.ordinary, strict=True
    ):
        parts = ((a[:, :1], b[:, :1]), (a[:, 1:], b[:, 1:]), (x, y))
        rows[stage] = [float(((p - q).norm(dim=-1) / q.norm(dim=-1)).median()) for p, q in parts]
    columns = ["class token", "patch tokens, surgery path", "tokens, ordinary path"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("after block")


def chosen_by_rule(dataset: Dataset, maps: np.ndarray) -> list[int]:
    """Up to six images: the worst, median and best anomalous one, then the normal one with the highest, median and
    lowest map.

    ``maps``: of the whole data set, N x S x S. Anomalous images are ranked by the pixel AUROC within the image, or,
    where there are no masks, by the maximum of the map.
    """
    maxima = maps.max(axis=(1, 2))
    masks = read_masks(list(dataset), maps.shape[-1]) if dataset.has_masks else None
    chosen = []
    for label in (1, 0):
        found = [i for i, s in enumerate(dataset) if s.label == label]
        if label and masks is not None:
            found = [i for i in found if masks[i].any() and not masks[i].all()]
            found.sort(key=lambda i: pixel_metrics(maps[[i]], masks[[i]])["auroc"])
        else:
            found.sort(key=lambda i: maxima[i] if label else -maxima[i])
        chosen += [found[place] for place in (0, len(found) // 2, -1)] if len(found) >= 3 else found
    return chosen


def patch_coverage(masks: np.ndarray, grid: int) -> torch.Tensor:
    """Masks B x S x S -> share of each patch that is anomalous, B x G*G (row by row, as the tokens)."""
    pooled = F.adaptive_avg_pool2d(torch.from_numpy(np.asarray(masks)).float(), grid)
    return pooled.flatten(1)


@torch.no_grad()
def attention_reach(
    backbone, dataset: Dataset, coverage: torch.Tensor, per_category: int = 4, batch_size: int = 8
) -> pd.DataFrame:
    """Where patches of a defect look, per block, with q-k and with v-v attention; medians over these patches.

    The first ``per_category`` anomalous images of each category; ``coverage``: of the data set, images x patches.
    ``lift``: attention that a defect's patch gives to the *other* patches of the defect, over what it would give if
    it looked everywhere alike (1 = chance). ``spread``: the number of patches it looks at, exp(entropy). A patch is of
    the defect when the mask covers more than half of it. Both leave out the class token and the patch itself, whose
    v-v weight is large by construction. NaN where no defect has two such patches.
    """
    anomalous = pd.Series({i: s.category for i, s in enumerate(dataset) if s.label == 1})
    chosen = anomalous.groupby(anomalous).head(per_category).index.tolist()
    batches = load_images([dataset[i] for i in chosen], backbone.preprocess, batch_size)
    found: dict[tuple, list] = {}
    for images, cover in zip(batches, coverage[chosen].split(batch_size), strict=True):
        x = backbone.visual.ln_pre(embed_patches(backbone.visual, images.to(backbone.device)))
        cover, n = cover.to(x.device), cover.shape[1]
        others = (cover.sum(dim=1, keepdim=True) - cover) / (n - 1)
        ours = (cover > 0.5) & (others > 0)
        for number, block in enumerate(backbone.visual.transformer.resblocks, start=1):
            for kind, weights in zip(("q-k", "v-v"), attention_weights(block, x), strict=True):
                p = weights[:, 1:, 1:] * (1 - torch.eye(n, device=x.device))
                p = p / p.sum(dim=-1, keepdim=True)
                lift = (p @ cover[..., None])[..., 0] / others
                found.setdefault((kind, "lift", number), []).append(lift[ours])
                spread = torch.special.entr(p).sum(dim=-1).exp()
                found.setdefault((kind, "spread", number), []).append(spread[ours])
            x = block(x)
    medians = pd.Series(
        {key: float(torch.cat(values).nanmedian()) for key, values in found.items()}
    )
    return medians.unstack().T.rename_axis("block")


@torch.no_grad()
def attention_of(
    visual, image: torch.Tensor, patch: int, blocks
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """1-based block -> q-k and v-v attention of one patch over all tokens, of one image 1 x 3 x S x S."""
    x = visual.ln_pre(embed_patches(visual, image))
    found = {}
    for number, block in enumerate(visual.transformer.resblocks, start=1):
        if number in blocks:
            found[number] = tuple(
                w[0, 1 + patch].cpu().numpy() for w in attention_weights(block, x)
            )
        x = block(x)
    return found
