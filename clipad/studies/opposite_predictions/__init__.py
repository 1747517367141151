"""Opposite predictions and irrelevant highlights as numbers, and what may explain them (METHOD.md section 3).

The paper shows both phenomena of the direct map as pictures. Here each is a number per anomalous image, on the map
at S x S before smoothing:

* opposite prediction: the map is lower on the defect than outside (1; a tie counts 1/2);
* irrelevant highlight: the share of the hottest 5 % of the pixels that lie off the object. Pixels that tie at the edge
  of the 5 % count by their share, so that a constant map is exactly at chance.

Shapes: M anomalous images, S x S pixels, N = G x G patches, C joint width, L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clipad.backbone import Backbone
from clipad.datasets import Dataset, Sample, read_mask
from clipad.detectors import CLIP_TEMPERATURE, Features
from clipad.dual_path import attention_weights, embed_patches, project, staged_features
from clipad.evaluation import batches, read_masks
from clipad.metrics import image_metrics
from clipad.surgery import cosine, similarity_map
from clipad.text import representative_vector

TOP = 0.05
"""share of an image's pixels that count as highlighted"""

PHENOMENA = [
    "opposite",
    "opposite_regions",
    "opposite_on_object",
    "off_object",
    "off_object_chance",
    "off_defect",
    "off_defect_chance",
]


# ------------------------------------------------------------------------------------------------ one image


def region_mean(values: np.ndarray, region: np.ndarray) -> float:
    """Mean of a map S x S over a region S x S bool; NaN for an empty one."""
    if not region.any():
        return float("nan")
    # float32 summed in float64 is exact for equal values: a constant map gives ties and not rounding errors.
    return float(values.astype(np.float32, copy=False)[region].mean(dtype=np.float64))


def opposite_prediction(inside: float, outside: float) -> float:
    """1 where the mean inside is lower than outside, 0 where it is higher, 0.5 for a tie; NaN if one is NaN.

    >>> opposite_prediction(0.1, 0.5), opposite_prediction(0.5, 0.5)
    (1.0, 0.5)
    """
    return 0.5 - 0.5 * float(np.sign(inside - outside))


def highlight_share(values: np.ndarray, region: np.ndarray, top: float = TOP) -> float:
    """Share of the hottest pixels (``top`` of all) that lie in ``region``; both S x S. Ties count by their share.

    >>> region = np.array([[True, False], [False, False]])
    >>> highlight_share(np.array([[0.9, 0.1], [0.2, 0.3]]), region, top=0.25)
    1.0
    >>> highlight_share(np.ones((2, 2)), region)  # a constant map is at chance
    0.25
    """
    values, region = values.ravel(), region.ravel()
    count = max(1, round(top * values.size))
    threshold = np.partition(values, values.size - count)[values.size - count]
    above, tied = values > threshold, values == threshold
    return float((region[above].sum() + (count - above.sum()) * region[tied].mean()) / count)


def image_phenomena(
    values: np.ndarray, mask: np.ndarray, objects: np.ndarray | None = None
) -> dict[str, float]:
    """All of ``PHENOMENA`` for one map S x S, its ground truth and, where known, its object.

    ``inside``, ``outside``: the map's means on the mask and off it; ``opposite``: whether they are the wrong way round;
    ``opposite_regions``: share of the mask's 8-connected regions that are lower than what lies outside the mask;
    ``opposite_on_object``: the defect against the rest of the object; ``off_object``: irrelevant highlight, NaN
    without an object mask or where the object fills the image; ``off_defect``: highlights outside the ground truth.
    ``*_chance``: the share of the pixels that lie there, which a map without any knowledge reaches on average.
    """
    found = dict.fromkeys(["inside", "outside", *PHENOMENA], float("nan"))
    if not mask.any() or mask.all():
        return found
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    inside, outside = found["inside"], found["outside"] = (
        region_mean(values, mask),
        region_mean(values, ~mask),
    )
    found["opposite"] = opposite_prediction(inside, outside)
    found["opposite_regions"] = float(
        np.mean(
            [
                opposite_prediction(region_mean(values, regions == i), outside)
                for i in range(1, count + 1)
            ]
        )
    )
    found["off_defect"] = highlight_share(values, ~mask)
    found["off_defect_chance"] = float((~mask).mean())
    if objects is not None:
        found["opposite_on_object"] = opposite_prediction(
            inside, region_mean(values, objects & ~mask)
        )
        if not objects.all():
            found["off_object"] = highlight_share(values, ~objects)
            found["off_object_chance"] = float((~objects).mean())
    return found


# ------------------------------------------------------------------------------------------- a data set


@dataclass(frozen=True)
class Truth:
    """The anomalous images of a data set that have a mask, and what is known of their pixels.

    ``masks``: M x S x S bool; ``objects``: the same, or None where the data set has no object masks.
    """

    samples: list[Sample]
    masks: np.ndarray
    objects: np.ndarray | None

    def shares(self, grid: int) -> np.ndarray:
        """M x N: the share of each patch that the defect covers."""
        masks = torch.from_numpy(self.masks).float()
        return F.adaptive_avg_pool2d(masks[:, None], grid).flatten(1).numpy()

    def patches(self, grid: int) -> np.ndarray:
        """M x N labels: 1 where the defect covers a quarter of the patch or more, 0 where none, -1 between."""
        shares = self.shares(grid)
        return np.where(shares >= 0.25, 1, np.where(shares == 0, 0, -1))


def ground_truth(dataset: Dataset, image_size: int) -> Truth:
    """Read the masks, S x S. ValueError for a data set without any: neither phenomenon can be counted there."""
    samples = [s for s in dataset if s.label == 1 and s.mask_path is not None]
    if not samples:
        raise ValueError(
            f"the data set {dataset.name} has no ground-truth masks: opposite predictions and irrelevant highlights "
            "are about pixels and cannot be counted on it"
        )
    objects = None
    if all(s.object_mask_path for s in samples):
        objects = np.stack([read_mask(s.object_mask_path, image_size) for s in samples])
    return Truth(samples, read_masks(samples, image_size), objects)


def count_phenomena(maps: np.ndarray, truth: Truth) -> pd.DataFrame:
    """A row per anomalous image: ``category``, ``defect`` and what :func:`image_phenomena` finds.

    ``maps``: M x S x S in the order of ``truth``, unsmoothed (:func:`raw_maps`). ValueError for another shape.
    """
    maps = np.asarray(maps, dtype=np.float32)
    if maps.shape != truth.masks.shape:
        raise ValueError(
            f"maps have to be {truth.masks.shape}, one for each mask, found {maps.shape}"
        )
    objects = truth.objects if truth.objects is not None else [None] * len(maps)
    rows = [image_phenomena(*entry) for entry in zip(maps, truth.masks, objects, strict=True)]
    frame = pd.DataFrame(rows)
    frame.insert(0, "category", [s.category for s in truth.samples])
    frame.insert(1, "defect", [s.defect for s in truth.samples])
    return frame


def raw_maps(detector, samples: Sequence[Sample], batch_size: int = 16) -> np.ndarray:
    """The maps of any detector before its smoothing, len(samples) x S x S float32."""
    detector = copy.copy(detector)
    detector.smoothing = 0
    size = detector.backbone.image_size
    parts = [np.zeros((0, size, size), np.float32)]
    for category, images in batches(detector.backbone, samples, batch_size):
        parts.append(detector.predict(images, category).maps.numpy())
    return np.concatenate(parts)


def rates(
    images: pd.DataFrame,
    columns: Sequence[str] = PHENOMENA,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of each column per category, and the unweighted ``mean`` over categories, with bootstrap intervals.

    ``images``: what :func:`count_phenomena` returns, or the difference of two such frames (then the interval is that
    of the paired change). Images are drawn with replacement within each category (percentile bootstrap). Returns
    ``rate``, ``low``, ``high`` and the number of images ``n`` under each column; NaN where nothing could be counted.
    An interval over images that all agree has no width: that says little when they are few.
    """
    options = {"confidence_level": level, "n_resamples": n_resamples, "method": "percentile"}
    rows: dict = {}
    for column in columns:
        groups = {
            name: values.dropna().to_numpy(float)
            for name, values in images.groupby("category", sort=False)[column]
        }
        filled = [values for values in groups.values() if len(values)]
        for name, sets in [
            *((name, [v] if len(v) else []) for name, v in groups.items()),
            ("mean", filled),
        ]:
            rate = np.mean([v.mean() for v in sets]) if sets else np.nan
            low = high = rate
            if any(np.ptp(v) > 0 for v in sets):
                found = stats.bootstrap(
                    sets, _mean_of_means, random_state=np.random.default_rng(seed), **options
                )
                low, high = found.confidence_interval
            entry = rows.setdefault(name, {})
            entry |= {(column, "rate"): rate, (column, "low"): low, (column, "high"): high}
            entry[(column, "n")] = sum(len(v) for v in sets)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("category")


def _mean_of_means(*sets, axis=-1):
    return np.mean([values.mean(axis=axis) for values in sets], axis=0)


def change(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """``after - before`` image by image, for :func:`rates`."""
    return before.assign(**(after[PHENOMENA] - before[PHENOMENA]))


def against(row: pd.Series, level: float) -> str:
    """An interval of :func:`rates` in words: "above", "below", or "not distinguishable from" a level.

    >>> against(pd.Series({"low": 0.7, "high": 0.8}), 0.5)
    'above'
    """
    return (
        "above"
        if row["low"] > level
        else "below"
        if row["high"] < level
        else "not distinguishable from"
    )


def worst_median_best(values: Sequence[float], categories: Sequence[str]) -> dict[str, list[int]]:
    """Per category the positions of the lowest, the (upper) median and the highest value; NaN is left out.

    >>> worst_median_best([3, 1, 2, 9], ["a", "a", "a", "b"])
    {'a': [1, 2, 0], 'b': [3, 3, 3]}
    """
    values, categories = np.asarray(values, dtype=float), np.asarray(categories)
    found = {}
    for category in dict.fromkeys(categories.tolist()):
        mine = np.flatnonzero((categories == category) & ~np.isnan(values))
        if len(mine):
            mine = mine[np.argsort(values[mine], kind="stable")]
            found[category] = [int(mine[place]) for place in (0, len(mine) // 2, -1)]
    return found


# ----------------------------------------------------------------------------------------- why: layer by layer


@dataclass
class Probe:
    """What patches say, layer by layer, of M images. Keys of the mappings: ``("q-k", l)`` is the ordinary path after
    block l, ``("v-v", k)`` a path that adds up v-v attention over the last k blocks, read after the last block.

    ``cosines``: M x N x 2 with the text (normal, anomalous); ``centroids``: C, mean of the unit patch features;
    ``features``: unit features of the picked patches, P x C, for the last block and ``("v-v", L)``;
    ``picked``: P x 2, their image and patch; ``labels``: M x N as given to :func:`probe`; ``attention``: per block what
    :func:`attention_to_defect` counts.
    """

    cosines: dict[tuple[str, int], torch.Tensor]
    centroids: dict[tuple[str, int], torch.Tensor]
    features: dict[tuple[str, int], np.ndarray]
    picked: np.ndarray
    labels: np.ndarray | None
    attention: pd.DataFrame | None


@torch.no_grad()
def probe(
    backbone: Backbone,
    samples: Sequence[Sample],
    text: Mapping[str, torch.Tensor],
    labels: np.ndarray | None = None,
    last_blocks: Sequence[int] = (1, 3, 6, 12),
    per_image: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> Probe:
    """Run both kinds of attention over samples and keep what is small.

    ``text``: C x 2 unit columns per category; ``labels``: M x N of patches (:meth:`Truth.patches`), None where they
    are not known; ``last_blocks``: over how many of the last blocks v-v attention is added up (those the network
    has); ``per_image``: patches picked at random per image and label for ``features``.
    """
    visual, blocks = backbone.visual, backbone.visual.transformer.resblocks
    layers = len(blocks)
    spans = sorted({k for k in last_blocks if k <= layers} | {layers})
    keys = [("q-k", layer) for layer in range(1, layers + 1)] + [("v-v", k) for k in spans]
    kept = [("q-k", layers), ("v-v", layers)]
    picked = _pick(len(samples), visual.positional_embedding.shape[0] - 1, labels, per_image, seed)
    cosines, sums, features = {k: [] for k in keys}, dict.fromkeys(keys, 0), {k: [] for k in kept}
    attention, done = [], 0
    for category, images in batches(backbone, samples, batch_size):
        images = images.to(backbone.device)
        rows = slice(done, done + len(images))
        done = rows.stop
        with backbone.autocast():
            tokens = {}
            x = visual.ln_pre(embed_patches(visual, images))
            for layer, block in enumerate(blocks, start=1):
                if labels is not None:
                    attention.append(
                        attention_to_defect(attention_weights(block, x), labels[rows], layer)
                    )
                x = block(x)
                tokens["q-k", layer] = project(visual, x)
            for k in spans:
                found = staged_features(
                    visual, images, [layers], False, first_block=layers - k, restart=False
                )
                tokens["v-v", k] = found.surgery[0]
        mine = picked[(picked[:, 0] >= rows.start) & (picked[:, 0] < rows.stop)]
        for key, value in tokens.items():
            patches = F.normalize(value[:, 1:].float(), dim=-1)
            cosines[key].append(cosine(patches, text[category].to(patches)).cpu())
            sums[key] = sums[key] + patches.mean(dim=1).sum(dim=0).cpu()
            if key in kept:
                features[key].append(patches[mine[:, 0] - rows.start, mine[:, 1]].cpu())
    return Probe(
        {key: torch.cat(values) for key, values in cosines.items()},
        {key: value / len(samples) for key, value in sums.items()},
        {key: torch.cat(values).numpy() for key, values in features.items()},
        picked,
        labels,
        pd.concat(attention, ignore_index=True) if attention else None,
    )


def _pick(
    images: int, patches: int, labels: np.ndarray | None, per_image: int, seed: int
) -> np.ndarray:
    """P x 2 (image, patch), sorted by image: at most ``per_image`` patches of each label and image, at random."""
    generator = np.random.default_rng(seed)
    found = []
    for image in range(images):
        sets = (
            [np.arange(patches)]
            if labels is None
            else [np.flatnonzero(labels[image] == v) for v in (0, 1)]
        )
        for candidates in sets:
            chosen = generator.permutation(candidates)[:per_image]
            found += [(image, patch) for patch in chosen]
    return np.array(found)


def attention_to_defect(weights, labels: np.ndarray, layer: int) -> pd.DataFrame:
    """A row per image with two defect patches or more: how much of their attention goes to *other* defect patches.

    As a share of what goes to all other patches (a patch attends to itself by v-v in any case), and ``chance``, the
    share that even attention would give.
    """
    rows = []
    for image, label in enumerate(labels):
        defect = np.flatnonzero(label == 1)
        if len(defect) < 2:
            continue
        row = {"layer": layer, "chance": (len(defect) - 1) / (label.size - 1)}
        for name, matrix in zip(("q-k", "v-v"), weights, strict=True):
            patches = matrix[image, 1:, 1:].float()
            patches = patches - torch.diag(patches.diagonal())
            mine = patches[defect]
            row[name] = float((mine[:, defect].sum(dim=1) / mine.sum(dim=1)).mean())
        rows.append(row)
    return pd.DataFrame(rows, columns=["layer", "chance", "q-k", "v-v"])


def direct_maps(cosines: torch.Tensor, image_size: int) -> np.ndarray:
    """The direct map from cosines M x N x 2: softmax(100 *), anomalous column, bilinear to M x S x S, unsmoothed."""
    return similarity_map(
        (CLIP_TEMPERATURE * cosines).softmax(dim=-1)[..., 1], image_size, 0
    ).numpy()


def modality_gap(
    centroids: Mapping[tuple[str, int], torch.Tensor], sentences: torch.Tensor
) -> pd.Series:
    """Distance between the mean unit patch feature (C) and the mean unit sentence (M x C, normalised inside), 0 to 2.

    Liang et al., "Mind the Gap" (NeurIPS 2022), equation 1, with patches in place of images.
    """
    mean = F.normalize(sentences.float(), dim=-1).mean(dim=0)
    return pd.Series({key: float((value - mean).norm()) for key, value in centroids.items()})


def patch_auroc(cosines: torch.Tensor, labels: np.ndarray) -> float:
    """AUROC of cos(anomalous) - cos(normal) for defect against normal patches of all images (``Truth.patches``)."""
    known = labels >= 0
    return image_metrics((cosines[..., 1] - cosines[..., 0]).numpy()[known], labels[known])["auroc"]


def linear_probe_auroc(
    features: np.ndarray, labels: np.ndarray, groups: Sequence, folds: int = 5
) -> float:
    """AUROC of a logistic regression on P x C features, each group (image or category) predicted by the others.

    It answers whether the features *know* the label at all, in whatever direction; NaN with fewer than two groups.
    """
    folds = min(folds, len(set(groups)))
    if folds < 2 or len(set(labels)) < 2:
        return float("nan")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    scores = cross_val_predict(
        model, features, labels, groups=groups, cv=GroupKFold(folds), method="decision_function"
    )
    return image_metrics(scores, labels)["auroc"]


def what_patches_know(found: Probe, blind: Probe, seed: int = 0) -> pd.DataFrame:
    """AUROC for defect against normal patches among the picked ones, for either attention in all blocks (columns).

    By the text direction; by a linear probe tested on other images; and as controls by the same linear probe on what an
    untrained encoder sees (``blind``, from :func:`probe` with the same labels and seed) and with shuffled labels.
    """
    image, patch = found.picked.T
    labels = found.labels[image, patch]
    shuffled = np.random.default_rng(seed).permutation(labels)
    return pd.DataFrame(
        {
            kind: {
                "text direction": patch_auroc(found.cosines[kind, last][image, patch], labels),
                "linear probe, other images": linear_probe_auroc(features, labels, image),
                "linear probe, untrained encoder": linear_probe_auroc(
                    blind.features[kind, last], labels, image
                ),
                "linear probe, shuffled labels": linear_probe_auroc(features, shuffled, image),
            }
            for (kind, last), features in found.features.items()
        }
    )


def layer_rates(found: Probe, truth: Truth, seed: int = 0) -> dict[tuple[str, int], pd.DataFrame]:
    """:func:`rates` of the direct map from each entry of the probe: block by block, and with v-v attention."""
    size = truth.masks.shape[-1]
    return {
        key: rates(count_phenomena(direct_maps(z, size), truth), seed=seed)
        for key, z in found.cosines.items()
    }


@torch.no_grad()
def block_attention(
    backbone: Backbone, image: torch.Tensor, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """q-k and v-v attention weights of a block (1-based) for one image 3 x S x S, mean over heads: two T x T."""
    visual = backbone.visual
    x = visual.ln_pre(embed_patches(visual, image[None].to(backbone.device)))
    for before in visual.transformer.resblocks[: block - 1]:
        x = before(x)
    weights = attention_weights(visual.transformer.resblocks[block - 1], x)
    return tuple(w[0].float().cpu().numpy() for w in weights)


# -------------------------------------------------------------------------------------------------- controls


def shuffled_states(
    backbone: Backbone, categories: Sequence[str], prompts, method: str, options: Mapping, seed: int
) -> dict[str, torch.Tensor]:
    """Text vectors whose sentences were dealt to the two states at random (the same deal for all categories)."""
    found = {}
    for category in categories:
        states = [F.normalize(backbone.encode_text(s), dim=-1) for s in prompts.sentences(category)]
        pool = torch.cat(states)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        parts = pool[order].split([len(s) for s in states])
        found[category] = torch.stack(
            [representative_vector(part, method, **options) for part in parts], dim=1
        )
    return found


def random_states(width: int, categories: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """Two random directions of the joint space in place of the two states, the same for all categories."""
    vectors = F.normalize(
        torch.randn(width, 2, generator=torch.Generator().manual_seed(seed)), dim=0
    )
    return dict.fromkeys(categories, vectors)


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """The same model with an image encoder of random weights, as PyTorch and open_clip initialise it."""
    twin = copy.copy(backbone)
    twin.__dict__.pop("weights_hash", None)
    twin.model = copy.deepcopy(backbone.model)
    twin.visual = visual = twin.model.visual
    twin.pretrained = f"untrained image encoder (seed {seed})"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in visual.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if reset:
                reset()
        for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
            parameter.copy_(torch.randn(parameter.shape) * len(visual.class_embedding) ** -0.5)
    return twin


def all_features(detector, samples: Sequence[Sample], batch_size: int = 16) -> Features:
    """The features of all samples, so that many text vectors can be tried on them: M x (N+1) x C in memory."""
    return Features.cat(
        [detector.features(images) for _, images in batches(detector.backbone, samples, batch_size)]
    )


def gap_closed(
    features: Features, text: Mapping[str, torch.Tensor]
) -> tuple[Features, dict[str, torch.Tensor]]:
    """Both modalities moved to a common mean: unit tokens minus their mean patch, unit text minus its mean."""
    tokens = [F.normalize(stage, dim=-1) for stage in features.tokens]
    tokens = [stage - stage[:, 1:].mean(dim=(0, 1)) for stage in tokens]
    mean = torch.stack(list(text.values())).mean(dim=(0, 2))[:, None]
    moved = {category: F.normalize(vectors - mean, dim=0) for category, vectors in text.items()}
    return Features(features.image_embedding, tokens), moved


def control_rates(
    detector, features, texts: Sequence[Mapping[str, torch.Tensor]], truth: Truth
) -> pd.DataFrame:
    """Mean rates over categories for each of several sets of text vectors, from features that are computed once."""
    detector = copy.copy(detector)
    detector.smoothing = 0
    categories = np.array([s.category for s in truth.samples])
    rows = []
    for text in texts:
        maps = np.zeros(truth.masks.shape, dtype=np.float32)
        for category in dict.fromkeys(categories):
            index = torch.from_numpy(np.flatnonzero(categories == category))
            maps[index] = detector.score_with(features[index], text[category]).maps.numpy()
        frame = count_phenomena(maps, truth)
        rows.append(frame.groupby("category")[PHENOMENA].mean().mean())
    return pd.DataFrame(rows)


def controls(detector, truth: Truth, draws: int = 100, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Mean rates under three kinds of ignorance, a row per draw: shuffled states, random text, and an untrained image
    encoder (a twentieth of the draws, since each runs all images)."""
    backbone = detector.backbone
    categories = list(dict.fromkeys(s.category for s in truth.samples))
    text = {category: detector.text_vectors(category) for category in categories}
    features = all_features(detector, truth.samples)
    seeds = range(seed + 1, seed + 1 + draws)
    how = (categories, detector.prompts, detector.rvs, detector.rvs_options)
    shuffled = [shuffled_states(backbone, *how, s) for s in seeds]
    random = [random_states(len(text[categories[0]]), categories, s) for s in seeds]
    untrained_rates = []
    for s in seeds[: max(1, draws // 20)]:
        twin = copy.copy(detector)
        twin.backbone = untrained(backbone, s)
        untrained_rates.append(
            control_rates(twin, all_features(twin, truth.samples), [text], truth)
        )
    return {
        "shuffled states": control_rates(detector, features, shuffled, truth),
        "random text": control_rates(detector, features, random, truth),
        "untrained image encoder": pd.concat(untrained_rates, ignore_index=True),
    }


def reached(drawn: Mapping[str, pd.DataFrame], observed: float, column: str) -> dict[str, float]:
    """Share of the draws of each control with a rate at least as high, counting the observed one itself."""
    return {
        name: float((1 + (f[column] >= observed).sum()) / (1 + len(f))) for name, f in drawn.items()
    }


def scale_effect(maps: np.ndarray, flawless: np.ndarray) -> dict[str, float]:
    """What the scale of the drawing does to flawless images; both arrays are maps x S x S.

    ``low``, ``high``: a scale shared by all maps (0.1 and 99.9 percentile); ``shared``, ``released``: share of the
    flawless images' pixels in the top tenth of that scale, and of each image's own as the released program draws;
    ``auroc``: how well the brightest spot ranks the images on the shared scale (with their own, all are equal).
    """
    low, high = np.percentile(np.concatenate([maps, flawless]), [0.1, 99.9])
    own = [edge(flawless, axis=(1, 2), keepdims=True) for edge in (np.min, np.max)]
    top = np.concatenate([flawless, maps]).max(axis=(1, 2))
    return {
        "low": float(low),
        "high": float(high),
        "shared": float(np.mean(flawless > 0.1 * low + 0.9 * high)),
        "released": float(np.mean(flawless > 0.1 * own[0] + 0.9 * own[1])),
        "auroc": image_metrics(top, [0] * len(flawless) + [1] * len(maps))["auroc"],
    }
