"""Notebook 07's bookkeeping: a category as if it were your product."""

import numpy as np
import pandas as pd

from clipad.datasets import Dataset
from clipad.detectors import Detector
from clipad.evaluation import batches
from clipad.studies.common import Interval, Labelled, intervals_over_categories, labelled
from clipad.studies.inspection import Inspector, Look


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
        return Inspector(self.detector, self.name, neighbours).fit(self.look.of(chosen), rate)

    def decide(self, inspector: Inspector, images) -> pd.DataFrame:
        """A row per image (positions): ``image``, ``label``, ``score``, ``verdict``."""
        look, rule = self.look.of(images), inspector.rule
        maxima = inspector.maps(look).max(axis=(1, 2))
        scores = rule.score(look.logits, maxima)
        frame = pd.DataFrame({"image": images, "label": self.labels[images], "score": scores})
        return frame.assign(verdict=[*map(rule.verdict, scores, maxima.astype(float))])


def over_categories(
    table: pd.DataFrame, column: str, minus: pd.DataFrame | None = None
) -> Interval:
    """Mean over categories of a column (or of a paired difference), with its interval over categories.

    With fewer than three categories there is no interval (NaN), and a claim from it is "not measured".
    """
    means = table.groupby("category")[column].mean()
    if minus is not None:
        means = means - minus.groupby("category")[column].mean()
    drawn = np.column_stack([means, means])  # a category's own number is no draw of images
    found = intervals_over_categories(drawn)[1]
    return found if means.count() > 2 else Interval(found.estimate)
