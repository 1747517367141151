"""Notebook 07's analysis: the same rule over random choices of the flawless images, over names, over tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit

from clipad.datasets import Dataset, Sample, read_image
from clipad.detectors import Detector
from clipad.evaluation import batches, read_masks
from clipad.metrics import image_metrics, pixel_metrics
from clipad.studies.common import Interval, Scores, intervals_over_categories, labelled, score
from clipad.studies.inspection import (
    Inspector,
    Look,
    Rule,
    alarms_allowed,
    class_logit,
    rate_interval,
)


@dataclass
class Product:
    """One category as if it were yours: a look at each of its images, labels N (0 flawless), masks N x S x S."""

    name: str
    dataset: Dataset
    look: Look
    labels: np.ndarray
    masks: np.ndarray | None

    @property
    def flawless(self) -> np.ndarray:
        """Positions of the flawless images."""
        return np.flatnonzero(self.labels == 0)

    def split(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions of n flawless images drawn at random, and of all other images."""
        chosen = rng.permutation(self.flawless)[:n]
        return chosen, np.setdiff1d(np.arange(len(self.labels)), chosen)


def look_at(detector: Detector, dataset: Dataset, category: str) -> Product:
    """Run the backbone once over a category's images; everything in notebook 07 then works on what it gave."""
    own = dataset.select(category)
    inspector = Inspector(detector, category, "added")
    looks = [inspector.look(x[:, None]) for _, x in batches(detector.backbone, list(own), 16)]
    masks = read_masks(list(own), detector.backbone.image_size) if own.has_masks else None
    labels = np.array([s.label for s in own])
    return Product(category, own, Look.cat(looks), labels, masks)


def fitted(detector: Detector, product: Product, chosen, rate: float, neighbours="no") -> Inspector:
    """An inspector that knows the chosen flawless images (positions)."""
    inspector = Inspector(detector, product.name, neighbours)
    return inspector.fit([product.look[chosen]], rate)


def decide(inspector: Inspector, product: Product, images) -> pd.DataFrame:
    """A row per image (positions): ``image``, ``label``, ``score``, ``map_max``, ``verdict``."""
    look, rule = product.look[images], inspector.rule
    maxima = inspector.maps(look).max(axis=(1, 2))
    frame = pd.DataFrame({"image": images, "label": product.labels[images]})
    frame["score"], frame["map_max"] = rule.score(look.logits, maxima), maxima.astype(float)
    pairs = zip(frame["score"], frame["map_max"], strict=True)
    return frame.assign(verdict=[rule.verdict(score, highest) for score, highest in pairs])


def trials(
    detector: Detector,
    products: Sequence[Product],
    n: int,
    rate: float,
    neighbours: str = "no",
    draws: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """n flawless images drawn at random set the rule, all other images are judged; again and again.

    A row per category and draw: ``category``, ``false_alarms`` (share of the other flawless images that is called
    bad), ``in_sample`` (the same with the flawless images scored on the scale of all n, themselves among them) and
    ``found`` (share of the defective images called bad). Categories with no more than n flawless images are left out.
    """
    rows = []
    for c, product in enumerate(products):
        rng = np.random.default_rng([seed, c])
        for _ in range(draws if len(product.flawless) > n else 0):
            chosen, rest = product.split(n, rng)
            inspector = fitted(detector, product, chosen, rate, neighbours)
            decided = decide(inspector, product, rest)
            good, bad = (decided[decided["label"] == label] for label in (0, 1))
            alarms, found = ((part["verdict"] == "bad").mean() for part in (good, bad))
            in_sample = (good["score"] > in_sample_threshold(inspector.rule)).mean()
            rows.append((product.name, alarms, in_sample, found))
    return pd.DataFrame(rows, columns=["category", "false_alarms", "in_sample", "found"])


def in_sample_threshold(rule: Rule) -> float:
    """The tempting mistake: flawless images scored on a scale that they have set themselves."""
    k = (rule.scores > rule.threshold).sum() + 1
    return float(np.sort(rule.score(rule.logits, rule.maxima))[-k])


def over_categories(
    table: pd.DataFrame, column: str, minus: pd.DataFrame | None = None
) -> Interval:
    """Mean over categories of ``trials``' column (or of a paired difference), with its interval over categories.

    With fewer than three categories there is no interval (NaN), and a claim from it is "not measured".
    """
    means = table.groupby("category")[column].mean()
    if minus is not None:
        means = means - minus.groupby("category")[column].mean()
    values = means.dropna().to_numpy()
    if len(values) < 3:  # nothing can be said of other categories
        return Interval(values.mean() if len(values) else np.nan, np.nan, np.nan)
    drawn = np.column_stack([values, values])  # a category's own number is no draw of images
    return intervals_over_categories(drawn)[1]


def names_tried(
    detector: Detector, product: Product, features, names: Sequence[str], rate: float
) -> pd.DataFrame:
    """What the typed word does: a row per name with the flawless images' ``median`` probability, ``above`` (share of
    them above 0.5), the class ``auroc``, and ``found`` by the conformal threshold on the logit alone, which is set
    anew for each name (mean over 50 draws of half the flawless images).
    """
    flawless, defective = product.flawless, np.flatnonzero(product.labels == 1)
    rows = []
    for name in names:
        logits = class_logit(features.image_embedding, detector.text_vectors(name))
        probabilities = expit(logits)
        rng, found = np.random.default_rng(0), []
        for _ in range(50):
            chosen, _ = product.split(len(flawless) // 2, rng)
            k = max(1, alarms_allowed(len(chosen), rate))
            found.append((logits[defective] > np.sort(logits[chosen])[-k]).mean())
        own, auroc = probabilities[flawless], image_metrics(logits, product.labels)["auroc"]
        row = (name, np.median(own), (own > 0.5).mean(), auroc, np.mean(found))
        rows.append((*row, probabilities))
    columns = ["name", "median", "above", "auroc", "found", "probabilities"]
    return pd.DataFrame(rows, columns=columns)


def promised(rates: Sequence[float], numbers: Sequence[int]) -> pd.DataFrame:
    """What n flawless images promise: a row per rate and n with ``low`` and ``high`` of the true false-alarm rate."""
    pairs = [(rate, n) for rate in rates for n in numbers if alarms_allowed(n, rate)]
    rows = [(rate, n, *rate_interval(n, rate)) for rate, n in pairs]
    return pd.DataFrame(rows, columns=["rate", "n", "low", "high"])


# Small defects in large images ----------------------------------------------------------------------------------


def trays(
    product: Product, side: int, count: int, piece: int, seed: int = 0
) -> Mapping[str, np.ndarray | list]:
    """Large images, as wide as ``side`` pieces of ``piece`` pixels, cut at a random place out of one piece more.

    Every second of the ``count`` trays has one defective piece, all of it inside. ``images`` (PIL),
    ``labels``, ``masks`` (their size).
    """
    rng = np.random.default_rng([seed, *product.name.encode()])  # other draws for each product
    images, masks, labels = [], [], np.arange(count) % 2
    for label in labels:
        chosen = rng.choice(product.flawless, (side + 1, side + 1))
        if label:
            inside = tuple(rng.integers(1, side, 2))
            chosen[inside] = rng.choice(np.flatnonzero(product.labels == 1))
        pairs = [[_picture_and_truth(product.dataset[i], piece) for i in row] for row in chosen]
        pictures, truths = ([[pair[k] for pair in row] for row in pairs] for k in (0, 1))
        y, x = rng.integers(piece, size=2)
        window = np.s_[y : y + side * piece, x : x + side * piece]
        images.append(Image.fromarray(_grid(pictures)[window]))
        masks.append(_grid(truths)[window])
    return {"images": images, "labels": labels, "masks": np.stack(masks)}


def _picture_and_truth(sample: Sample, side: int) -> tuple[np.ndarray, np.ndarray]:
    picture = np.asarray(read_image(sample.image_path).convert("RGB").resize((side, side)))
    if sample.mask_path is None:
        return picture, np.zeros((side, side), bool)
    truth = read_image(sample.mask_path).convert("L")
    return picture, np.asarray(truth.resize((side, side), Image.Resampling.NEAREST)) > 0


def _grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of pieces as one array."""
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def tiles_tried(
    detector: Detector, made: Mapping, name: str, tiles: Sequence[int]
) -> tuple[pd.DataFrame, dict[int, np.ndarray]]:
    """Pixel AUROC, AP and the AUROC of the map maximum for each number of tiles, and the maps at the trays' size."""
    size = made["images"][0].size
    rows, kept = [], {}
    for number in tiles:
        inspector = Inspector(detector, name, tiles=number)
        looks = [inspector.look(inspector.prepare(image)[None]) for image in made["images"]]
        maps = inspector.maps(Look.cat(looks))
        large = [Image.fromarray(m).resize(size, Image.Resampling.BILINEAR) for m in maps]
        kept[number] = np.stack([np.asarray(m) for m in large])
        pixel = pixel_metrics(kept[number], made["masks"])
        image = image_metrics(maps.max(axis=(1, 2)), made["labels"])
        rows.append((number, pixel["auroc"], pixel["ap"], image["auroc"]))
    return pd.DataFrame(rows, columns=["tiles", "auroc", "ap", "map_auroc"]), kept


def split_for_maps(
    products: Sequence[Product], n: int, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per product (n flawless positions, all other positions), drawn once: what the comparison of maps uses."""
    rng = np.random.default_rng(seed)
    return [product.split(n, rng) for product in products]


def maps_of(
    detector: Detector, products: Sequence[Product], parts, rate: float, neighbours: str
) -> np.ndarray:
    """Maps of all images that are not among the chosen flawless ones, category by category: N x S x S."""
    found = []
    for product, (chosen, rest) in zip(products, parts, strict=True):
        inspector = fitted(detector, product, chosen, rate, neighbours)
        found.append(inspector.maps(product.look[rest]))
    return np.concatenate(found)


def rest_of(products: Sequence[Product], parts, dataset: Dataset) -> Dataset:
    """The data set without the chosen flawless images, in ``maps_of``'s order."""
    samples = [p.dataset[i] for p, (_, rest) in zip(products, parts, strict=True) for i in rest]
    return replace(dataset, samples=tuple(samples))


def scores_of_maps(
    maps: Mapping[str, np.ndarray], logits: np.ndarray, rest: Dataset, size: int, seed: int = 0
) -> Scores:
    """Metrics of several maps of the same images on the same bootstrap draws; the logit joins in the image score."""
    pairs = {name: (values, logits) for name, values in maps.items()}
    return score(pairs, labelled(rest, size), seed=seed)


def tiles_over_categories(
    detector: Detector,
    products: Sequence[Product],
    tiles: Sequence[int],
    count: int,
    piece: int,
    seed: int = 0,
) -> pd.DataFrame:
    """``tiles_tried`` on trays of every category: columns ``category``, ``tiles``, ``auroc``, ``ap``, ``map_auroc``."""
    tables = []
    for product in products:
        made = trays(product, 3, count, piece, seed)
        table, _ = tiles_tried(detector, made, product.name, tiles)
        tables.append(table.assign(category=product.name))
    return pd.concat(tables, ignore_index=True)
