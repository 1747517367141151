"""Notebook 07's analysis: the same rule over random choices of the flawless images, and over tiles."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from PIL import Image

from clipad.datasets import Dataset, Sample
from clipad.detectors import Detector
from clipad.evaluation import batches
from clipad.io.images import read_image, read_mask
from clipad.metrics import image_metrics, pixel_metrics
from clipad.studies.common import Interval, Labelled, intervals_over_categories, labelled
from clipad.studies.inspection import Inspector, Look, conformal_threshold


class Product(Labelled):
    """One category as if it were yours. The backbone sees each of its images once; all else works on what it gave.

    ``look``: at all N images; ``flawless``: positions of the flawless ones.
    """

    def __init__(self, detector: Detector, dataset: Dataset, name: str):
        own = labelled(dataset.select(name), detector.backbone.image_size)
        super().__init__(own.dataset, own.masks)
        self.detector, self.name, inspector = detector, name, Inspector(detector, name, "added")
        images = batches(detector.backbone, list(own.dataset))
        self.look = Look.cat([inspector.look(batch[:, None]) for _, batch in images])
        self.flawless = np.flatnonzero(self.labels == 0)

    def split(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions of n flawless images drawn at random, and of all other images."""
        chosen = rng.permutation(self.flawless)[:n]
        return chosen, np.setdiff1d(np.arange(len(self.labels)), chosen)

    def fitted(self, chosen, rate: float, neighbours: str = "no") -> Inspector:
        """An inspector that knows the chosen flawless images (positions)."""
        return Inspector(self.detector, self.name, neighbours).fit([self.look[chosen]], rate)

    def decide(self, inspector: Inspector, images) -> pd.DataFrame:
        """A row per image (positions): ``image``, ``label``, ``score``, ``verdict``."""
        look, rule = self.look[images], inspector.rule
        maxima = inspector.maps(look).max(axis=(1, 2))
        scores = rule.score(look.logits, maxima)
        frame = pd.DataFrame({"image": images, "label": self.labels[images], "score": scores})
        return frame.assign(verdict=[*map(rule.verdict, scores, maxima.astype(float))])


def trials(
    products: Sequence[Product], n: int, rate: float, neighbours="no", draws: int = 50, seed=0
) -> pd.DataFrame:
    """n flawless images drawn at random set the rule, all other images are judged; again and again.

    A row per category (with more than n flawless images) and draw: ``category``, ``false_alarms`` (share of the other
    flawless images that is called bad), ``in_sample`` (the same with flawless images scored on the scale that they
    have set themselves) and ``found`` (share of the defective images called bad).
    """
    rows = []
    for c, product in enumerate(products):
        rng = np.random.default_rng([seed, c])
        for _ in range(draws if len(product.flawless) > n else 0):
            chosen, rest = product.split(n, rng)
            inspector = product.fitted(chosen, rate, neighbours)
            decided = product.decide(inspector, rest)
            good, bad = (decided[decided["label"] == label] for label in (0, 1))
            alarms, found = ((part["verdict"] == "bad").mean() for part in (good, bad))
            rule = inspector.rule
            tempting = conformal_threshold(rule.score(rule.logits, rule.maxima), rate)
            rows.append((product.name, alarms, (good["score"] > tempting).mean(), found))
    return pd.DataFrame(rows, columns=["category", "false_alarms", "in_sample", "found"])


def over_categories(
    table: pd.DataFrame, column: str, minus: pd.DataFrame | None = None
) -> Interval:
    """Mean over categories of ``trials``' column (or of a paired difference), with its interval over categories.

    With fewer than three categories there is no interval (NaN), and a claim from it is "not measured".
    """
    means = table.groupby("category")[column].mean()
    if minus is not None:
        means = means - minus.groupby("category")[column].mean()
    means = means.dropna()
    if len(means) < 3:
        return Interval(means.mean())
    drawn = np.column_stack([means, means])  # a category's own number is no draw of images
    return intervals_over_categories(drawn)[1]


def trays(product: Product, side: int, count: int, piece: int, seed: int = 0) -> dict:
    """Large images, as wide as ``side`` pieces of ``piece`` pixels, cut at a random place out of one piece more.

    Every second of the ``count`` trays has one defective piece, all of it inside. ``images`` (PIL),
    ``labels``, ``masks`` (their size).
    """
    rng = np.random.default_rng([seed, *product.name.encode()])  # other draws for each product
    made, labels = [], np.arange(count) % 2
    for label in labels:
        chosen = rng.choice(product.flawless, (side + 1, side + 1))
        if label:
            inside = tuple(rng.integers(1, side, 2))
            chosen[inside] = rng.choice(np.flatnonzero(product.labels == 1))
        rows = [[_piece(product.dataset[i], piece) for i in row] for row in chosen]
        whole = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        y, x = rng.integers(piece, size=2)
        made.append(whole[y : y + side * piece, x : x + side * piece])
    images = [Image.fromarray(np.ascontiguousarray(tray[..., :3])) for tray in made]
    return {"images": images, "labels": labels, "masks": np.stack(made)[..., 3] > 0}


def _piece(sample: Sample, side: int) -> np.ndarray:
    """RGB of a product, and where it is defective: side x side x 4."""
    picture = read_image(sample.image_path).convert("RGB").resize((side, side))
    known = sample.mask_path is not None
    truth = read_mask(sample.mask_path, side) if known else np.zeros((side, side), bool)
    return np.dstack([picture, truth])


def tiles_tried(
    product: Product, made: Mapping, tiles: Sequence[int]
) -> tuple[pd.DataFrame, dict[int, np.ndarray]]:
    """Pixel AUROC, AP and the AUROC of the map maximum of :func:`trays` for each number of tiles, and the maps at the
    trays' size."""
    size = made["images"][0].size
    rows, kept = [], {}
    for number in tiles:
        inspector = Inspector(product.detector, product.name, tiles=number)
        looks = [inspector.look(inspector.prepare(image)[None]) for image in made["images"]]
        maps = inspector.maps(Look.cat(looks))
        large = [Image.fromarray(m).resize(size, Image.Resampling.BILINEAR) for m in maps]
        kept[number] = np.stack([np.asarray(m) for m in large])
        pixel = pixel_metrics(kept[number], made["masks"])
        image = image_metrics(maps.max(axis=(1, 2)), made["labels"])
        rows.append((product.name, number, pixel["auroc"], pixel["ap"], image["auroc"]))
    return pd.DataFrame(rows, columns=["category", "tiles", "auroc", "ap", "map_auroc"]), kept
