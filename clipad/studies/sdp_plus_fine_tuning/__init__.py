"""SDP+ on a data set that its layers never saw: what notebook 04 measures.

The features of a data set are computed once and held in memory (about 0.5 MB an image for the demo, 5.5 MB for
ViT-B-16-plus-240, so large sets are thinned first); every detector and every set of layers is then scored on them.

Shapes: N images, S x S pixels, P patches, J stages, C joint width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from clipad.datasets import Dataset, load_dataset
from clipad.detectors import (
    CLIP_TEMPERATURE,
    SDP,
    Detector,
    Direct,
    Features,
    Prediction,
    SDPPlus,
)
from clipad.dual_path import project, staged_features
from clipad.evaluation import fingerprint, load_images, published_image_score, read_masks
from clipad.files import code_version
from clipad.linear_layers import LinearLayers, linear_logits
from clipad.metrics import draw_counts, image_metrics, interval, pixel_metrics, resampled_metrics
from clipad.published import protocol
from clipad.studies.experiments import Experiment
from clipad.studies.opposite_predictions import change, count_phenomena, ground_truth, rates
from clipad.surgery import similarity_map, smooth
from clipad.training import Training, load_layers, train

METRICS = (
    *(f"pixel_{m}" for m in ("auroc", "f1_max", "ap", "pro")),
    *(f"image_{m}" for m in ("auroc", "f1_max", "ap")),
)
SATURATED = 0.05
"""below this sum over stages the layers say "nothing there" """


class LayersAlone(SDPPlus):
    """The layers' summed maps without SDP's: a control for SDP+, not a method of the paper."""

    name = "layers alone"

    def maps(self, features, text):
        _, layers = self.summands(features, text)
        return smooth(layers, self.smoothing)


class LogitFusion(SDPPlus):
    """Another sum of the same parts (ours, not the paper's): logits instead of probabilities.

    A layer's probability is close to 0 or 1 nearly everywhere, so there the sum of SDP+ has little left to rank by.
    Here the layers' logits are averaged over stages, and SDP's patch values are brought to the same form, 100 times a
    cosine averaged over J stages: mean_j logit_j + 100 / J * SDP. Then up-sampled and smoothed like SDP's map.
    """

    name = "logit fusion"

    def maps(self, features, text):
        tokens = [stage[:, 1:] for stage in features.ordinary]
        logits = linear_logits(self.layers, tokens, text).mean(dim=1)
        sdp = CLIP_TEMPERATURE / len(tokens) * self.patch_values(features, text)
        return similarity_map(logits + sdp, self.backbone.image_size, self.smoothing)


def thinned(dataset: Dataset, per_category: int) -> Dataset:
    """At most ``per_category`` images of each category, normal and anomalous in their proportion, evenly spaced."""
    kept = []
    for category in dataset.categories:
        own = [i for i, s in enumerate(dataset) if s.category == category]
        own.sort(
            key=lambda i: dataset[i].label
        )  # stable: even spacing then takes its share of both labels
        take = min(per_category, len(own))
        kept += [own[(2 * k + 1) * len(own) // (2 * take)] for k in range(take)]
    return replace(dataset, samples=tuple(dataset[i] for i in sorted(kept)))


@dataclass
class Held:
    """The features of a data set in its order, and its ground truth N x S x S (None without masks)."""

    dataset: Dataset
    features: Features
    masks: np.ndarray | None
    labels: np.ndarray

    def where(self, category: str) -> np.ndarray:
        """Positions of a category's images."""
        return np.array([i for i, s in enumerate(self.dataset) if s.category == category])

    def score(self, detector: Detector, category: str) -> Prediction:
        """What a detector says of a category's images: Direct, SDP or one built on SDP+; TypeError for others, whose
        features are not held."""
        if not isinstance(detector, Direct | SDP):
            raise TypeError(f"the features that are held are SDP's, {detector.name} needs its own")
        features = self.features[torch.from_numpy(self.where(category))]
        if isinstance(detector, Direct):
            # Its features are those of the ordinary path after the last block.
            last = project(detector.backbone.visual, features.ordinary[-1])
            features = Features(features.image_embedding, [last])
        return detector.score(features, category)

    def maps(self, detector: Detector) -> np.ndarray:
        """N x S x S."""
        parts = {c: self.score(detector, c).maps.numpy() for c in self.dataset.categories}
        maps = np.empty((len(self.dataset), *next(iter(parts.values())).shape[1:]), np.float32)
        for category, values in parts.items():
            maps[self.where(category)] = values
        return maps


@torch.no_grad()
def hold(sdp: SDP, dataset: Dataset, batch_size: int = 16) -> Held:
    """Run the dual path of ``sdp`` once over a data set."""
    backbone, parts = sdp.backbone, []
    for images in load_images(list(dataset.samples), backbone.preprocess, batch_size):
        with backbone.autocast():
            found = staged_features(
                backbone.visual, images.to(backbone.device), sdp.stages, sdp.as_released
            )
        parts.append(
            Features(
                found.image_embedding.float(),
                [t.float() for t in found.surgery],
                [t.float() for t in found.ordinary],
            )
        )
    masks = read_masks(list(dataset.samples), backbone.image_size) if dataset.has_masks else None
    return Held(dataset, Features.cat(parts), masks, np.array([s.label for s in dataset]))


@dataclass
class Direction:
    """One way between two data sets: detectors as the protocol sets them up for ``test``, and its features in memory.

    ``trained_on`` names the data set of the layers; ``per_category`` images are held (:func:`thinned`).
    """

    run: Experiment
    test: Dataset
    trained_on: str
    per_category: int = 40
    allow_overlap: bool = False

    def __post_init__(self):
        self.sdp = SDP(self.run.backbone, **rvs_options(self.run, self.test))
        self.direct = Direct(self.run.backbone, **rvs_options(self.run, self.test))
        self.few = thinned(self.test, self.per_category)
        self.held = hold(self.sdp, self.few)

    def __str__(self):
        return f"{self.trained_on} → {self.test.name}"

    def build(self, layers: LinearLayers, kinds=(SDPPlus, LayersAlone), **changed) -> list[SDPPlus]:
        """SDP+ and its controls with these layers; ``changed`` options win over the protocol's."""
        smoothing = (
            protocol(self.test.name).smoothing_240_sdp_plus / 240 * self.run.backbone.image_size
        )
        options = rvs_options(self.run, self.test)
        options |= {"smoothing": smoothing, "allow_overlap": self.allow_overlap} | changed
        return [kind(self.run.backbone, layers, **options) for kind in kinds]

    def phenomena(self, layers: LinearLayers, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
        """Opposite predictions and irrelevant highlights (notebook 02) of Direct, SDP, SDP+ and the layers alone.

        Mean rates over categories, a row per method, on unsmoothed maps; and what changes from SDP to SDP+, a row per
        phenomenon with ``difference``, ``low`` and ``high``. Raises ValueError for data without masks.
        """
        truth = ground_truth(self.few, self.run.backbone.image_size)
        at = [i for i, s in enumerate(self.few) if s.label == 1 and s.mask_path is not None]
        unsmoothed = [
            kind(self.run.backbone, smoothing=0, **rvs_options(self.run, self.test))
            for kind in (Direct, SDP)
        ]
        unsmoothed += self.build(layers, smoothing=0)
        frames = {d.name: count_phenomena(self.held.maps(d)[at], truth) for d in unsmoothed}
        place = "off_object" if frames["SDP"]["off_object"].notna().any() else "off_defect"
        columns = ["opposite", "opposite_regions", place, f"{place}_chance"]
        table = pd.DataFrame(
            {n: f.groupby("category")[columns].mean().mean() for n, f in frames.items()}
        ).T
        changed = rates(change(frames["SDP"], frames[unsmoothed[2].name]), columns[:3], seed=seed)
        return table, changed.loc["mean"].unstack().rename(columns={"rate": "difference"}).loc[
            columns[:3]
        ]


def rvs_options(run: Experiment, dataset: Dataset) -> dict:
    """Prompts and representative vectors of the protocol for one data set, in training as in testing."""
    chosen = protocol(dataset.name)
    return {"prompts": run.prompts, "rvs": chosen.rvs, "rvs_options": chosen.rvs_options}


def in_words(row: pd.Series) -> str:
    """A difference with its interval, in points.

    >>> in_words(pd.Series({"difference": 0.031, "low": 0.012, "high": 0.05}))
    '+3.1 [+1.2, +5.0], above 0'
    """
    side = "above 0" if row["low"] > 0 else "below 0" if row["high"] < 0 else "0 lies within"
    return f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], {side}"


# Scores ---------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Metrics of detectors per category and bootstrap resample; ``numbers[..., 0]`` is the estimate."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    numbers: np.ndarray
    """detectors x categories x ``METRICS`` x (1 + R)"""

    def table(self, name: str) -> pd.DataFrame:
        """Category x metric with a last row ``mean``."""
        numbers = self.numbers[self.names.index(name), :, :, 0]
        table = pd.DataFrame(numbers, self.categories, METRICS).rename_axis("category")
        table.loc["mean"] = table.mean()
        return table

    def difference(
        self, after: str, before: str, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Per metric the mean over categories before and after, and the paired ``difference`` with two intervals.

        ``low``, ``high``: images drawn anew within the categories at hand; ``low_both``, ``high_both``: categories
        drawn anew as well, which asks about other categories of this kind. Metrics without numbers are left out.
        """
        first, last = (self.numbers[self.names.index(name)] for name in (before, after))
        known = np.isfinite(first[:, :, 0]).all(axis=0) & np.isfinite(last[:, :, 0]).all(axis=0)
        count, draws = first.shape[0], first.shape[2] - 1
        rng = np.random.default_rng(seed)
        picked = rng.integers(count, size=(2000, count))
        resample = rng.integers(1, draws + 1, size=picked.shape)
        rows = {}
        for m in np.flatnonzero(known):
            gained = last[:, m] - first[:, m]
            low, high = interval(gained[:, 1:].mean(axis=0), level)
            low_both, high_both = interval(gained[picked, resample].mean(axis=1), level)
            rows[METRICS[m]] = {
                "before": first[:, m, 0].mean(),
                "after": last[:, m, 0].mean(),
                "difference": gained[:, 0].mean(),
                "low": low,
                "high": high,
                "low_both": low_both,
                "high_both": high_both,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def compare(
    detectors: Sequence[Detector], held: Held, n_resamples: int = 200, seed: int = 0
) -> Comparison:
    """Score detectors on the same images and the same bootstrap draws (images, within category and label).

    Raises ValueError for fewer than 2 resamples.
    """
    if n_resamples < 2:
        raise ValueError(f"an interval needs 2 resamples or more, found {n_resamples}")
    rng = np.random.default_rng(seed)
    categories = held.dataset.categories
    numbers = np.full((len(detectors), len(categories), len(METRICS), 1 + n_resamples), np.nan)
    for c, category in enumerate(categories):
        where = held.where(category)
        labels = held.labels[where]
        counts = draw_counts(labels, n_resamples, rng)
        for d, detector in enumerate(detectors):
            prediction = held.score(detector, category)
            maps, found = prediction.maps.numpy(), {}
            if held.masks is not None:
                found |= _named("pixel", resampled_metrics(maps, held.masks[where], counts))
            if (labels >= 0).all():
                score = published_image_score(
                    prediction.probabilities.numpy(), maps.max(axis=(1, 2))
                )
                found |= _named("image", resampled_metrics(score, labels, counts))
            for m, metric in enumerate(METRICS):
                if metric in found:
                    numbers[d, c, m] = found[metric]
    return Comparison(tuple(d.name for d in detectors), categories, numbers)


def _named(level: str, metrics: Mapping) -> dict:
    return {f"{level}_{name}": values for name, values in metrics.items()}


def mean_metrics(detector: Detector, held: Held) -> dict[str, float]:
    """``METRICS`` of one detector, mean over categories, without intervals; NaN where undefined."""
    rows = []
    for category in held.dataset.categories:
        where = held.where(category)
        prediction = held.score(detector, category)
        maps, found = prediction.maps.numpy(), dict.fromkeys(METRICS, np.nan)
        if held.masks is not None:
            found |= _named("pixel", pixel_metrics(maps, held.masks[where]))
        if (held.labels[where] >= 0).all():
            score = published_image_score(prediction.probabilities.numpy(), maps.max(axis=(1, 2)))
            found |= _named("image", image_metrics(score, held.labels[where]))
        rows.append(found)
    return pd.DataFrame(rows).mean().to_dict()


def within_image(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Pixel AUROC inside each image, N; NaN where nothing, or everything, is anomalous."""
    return np.array(
        [pixel_metrics(v[None], m[None])["auroc"] for v, m in zip(maps, masks, strict=True)]
    )


def by_defect(maps: Mapping[str, np.ndarray], held: Held) -> pd.DataFrame:
    """Mean pixel AUROC inside the image per type of defect (rows, the hardest for the last method first) and method,
    and the number of images ``n``."""
    frame = pd.DataFrame({name: within_image(values, held.masks) for name, values in maps.items()})
    frame.insert(0, "defect", [s.defect for s in held.dataset])
    frame = frame[held.labels == 1].dropna()
    table = frame.groupby("defect").mean()
    table["n"] = frame.groupby("defect").size()
    return table.sort_values(list(maps)[-1])


# Training and what it grows with --------------------------------------------------------------------------------


def train_for(
    run: Experiment, dataset: Dataset, epochs: int, progress: bool = True, **options
) -> Training:
    """:func:`clipad.training.train` with the protocol's text for ``dataset``, in a folder of its own under the
    run's, named by all that decides the weights: a finished training is read back and a stopped one continues."""
    options = rvs_options(run, dataset) | options
    key = [
        run.backbone.weights_hash,
        run.backbone.device.type,
        code_version(),
        fingerprint(dataset),
    ]
    name = hashlib.sha256(
        json.dumps([*key, options], sort_keys=True, default=str).encode()
    ).hexdigest()[:10]
    folder = run.output_dir / "training" / f"{dataset.name}-{name}"
    return train(run.backbone, dataset, folder, epochs=epochs, progress=progress, **options)


def layers_for(
    run: Experiment, dataset: str, checkpoint: str | Path = "", train_root: str | Path = ""
) -> LinearLayers | None:
    """The layers with which SDP+ is tested on the named data set: those of the checkpoint; without one they are trained
    as published on the data set at ``train_root`` (read back where notebook 04 has done it). The demo has that data
    set, its other collection; without checkpoint and root other data sets go without (None)."""
    if checkpoint:
        return load_layers(checkpoint)
    if not train_root and dataset not in ("demo", "demo_aux"):
        return None
    rule = protocol(dataset)
    return train_for(
        run, load_dataset(rule.trained_on, train_root or None), rule.epochs, progress=False,
        learning_rate=rule.learning_rate, shuffle=rule.shuffle, seed=run.seed,
    ).layers  # fmt: skip


def over_epochs(direction: Direction, training: Training) -> pd.DataFrame:
    """Scores after every epoch: a row per epoch and method, columns ``METRICS``."""
    steps = zip(training.log["epoch"], training.checkpoints, strict=True)
    return pd.DataFrame(
        [
            {"epoch": epoch} | row
            for epoch, path in steps
            for row in _scored(direction, load_layers(path))
        ]
    )


def over_images(direction: Direction, dataset: Dataset, epochs: int, **training) -> pd.DataFrame:
    """The same after trainings on ever more images of each category: 1/16, 1/8, 1/4, half and all of them (at least 2).

    Each training takes as many steps as ``epochs`` over the whole data set, so that only the images differ.
    """
    most = max(sum(s.category == c for s in dataset) for c in dataset.categories)
    rows = []
    for count in sorted({max(2, most // part) for part in (16, 8, 4, 2, 1)}):
        few = thinned(dataset, count)
        equal = max(1, round(epochs * len(dataset) / len(few)))
        layers = train_for(direction.run, few, equal, progress=False, **training).layers
        rows += [{"images": len(few)} | row for row in _scored(direction, layers)]
    return pd.DataFrame(rows)


def _scored(direction: Direction, layers: LinearLayers) -> list[dict]:
    return [{"method": d.name} | mean_metrics(d, direction.held) for d in direction.build(layers)]


# What the layers change -----------------------------------------------------------------------------------------


@dataclass
class JointSpace:
    """Patches of one stage in the joint space under several mappings, and the text they are compared with.

    ``patches``: per mapping P x C unit rows; ``labels``: P, 1 for patches of a defect; ``categories``: P;
    ``text``: per category C x 2 unit columns.
    """

    patches: dict[str, torch.Tensor]
    labels: np.ndarray
    categories: np.ndarray
    text: dict[str, torch.Tensor]

    def numbers(self) -> pd.DataFrame:
        """How well patches and text agree, a row per mapping, from the full space.

        ``auroc``: of cos(anomalous) - cos(normal), defect against other patches, all categories together;
        ``normal``, ``anomalous``: mean of 100 (cos(own state) - cos(other state)) over the patches of that state,
        positive where they are nearer to their own; ``gap``: distance between the mean patch and the mean text vector.
        """
        rows = {}
        text = torch.stack([self.text[c] for c in self.categories])
        for name, patches in self.patches.items():
            cosines = torch.einsum("pc,pcs->ps", patches, text)
            margin = 100 * (cosines[:, 1] - cosines[:, 0]).numpy()
            rows[name] = {
                "auroc": image_metrics(margin, self.labels)["auroc"],
                "normal": -margin[self.labels == 0].mean(),
                "anomalous": margin[self.labels == 1].mean(),
                "gap": float((patches.mean(dim=0) - text.mean(dim=(0, 2))).norm()),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def in_text_plane(self, name: str) -> np.ndarray:
        """P x 2: coordinates in the plane that the category's two text vectors span.

        x along t_1 - t_0 (0 is halfway), y along t_0 + t_1; both axes of length 1.
        """
        axes = {
            c: F.normalize(torch.stack([t[:, 1] - t[:, 0], t[:, 0] + t[:, 1]]), dim=1)
            for c, t in self.text.items()
        }
        axes = torch.stack([axes[c] for c in self.categories])
        return torch.einsum("pc,pxc->px", self.patches[name], axes).numpy()


@torch.no_grad()
def joint_space(
    detector: SDPPlus, held: Held, stage: int, per_image: int = 6, seed: int = 0
) -> JointSpace:
    """Up to ``per_image`` defect patches and as many others of each anomalous image, mapped three ways.

    ``CLIP's own projection`` (ln_post and proj), ``untrained layer`` (a control), ``trained layer``. A patch is of the
    defect where the mask covers a quarter of it or more, and another where it covers none. ``stage``: 0 .. J-1.
    Raises ValueError for data without masks.
    """
    if held.masks is None:
        raise ValueError(
            f"{held.dataset.name} has no masks: which patches are anomalous is not known"
        )
    tokens = held.features.ordinary[stage]
    grid = round((tokens.shape[1] - 1) ** 0.5)
    covered = (
        F.adaptive_avg_pool2d(torch.from_numpy(held.masks).float()[:, None], grid)
        .flatten(1)
        .numpy()
    )
    rng = np.random.default_rng(seed)
    image, patch, labels = [], [], []
    for i in np.flatnonzero(held.labels == 1):
        for label, candidates in enumerate((covered[i] == 0, covered[i] >= 0.25)):
            picked = rng.permutation(np.flatnonzero(candidates))[:per_image]
            image += [i] * len(picked)
            patch += (1 + picked).tolist()
            labels += [label] * len(picked)
    picked = tokens[image, patch].to(detector.backbone.device)
    trained = detector.layers
    fresh = LinearLayers(picked.shape[1], trained.fc[0].out_features, len(trained.fc), seed).to(
        picked.device
    )
    mapped = {
        "CLIP's own projection": project(detector.backbone.visual, picked),
        "untrained layer": fresh.fc[stage](picked),
        "trained layer": trained.fc[stage](picked),
    }
    return JointSpace(
        {name: F.normalize(values, dim=-1).float().cpu() for name, values in mapped.items()},
        np.array(labels),
        np.array([held.dataset[i].category for i in image]),
        {c: detector.text_vectors(c) for c in held.dataset.categories},
    )


@dataclass
class Summands:
    """The two maps that SDP+ adds, N x S x S before smoothing, with the ground truth."""

    sdp: np.ndarray
    layers: np.ndarray
    held: Held
    smoothing: float

    def table(self) -> pd.DataFrame:
        """Rows SDP, layers and their sum: mean on the defects and off them; ``spread``, the standard deviation of all
        pixels; and how well it ranks defect pixels above others (AUROC, all images together) in all pixels, in those
        where the layers are silent, and in those where they speak."""
        truth, silent = self.held.masks, self.layers < SATURATED
        rows = {}
        for name, values in (
            ("SDP", self.sdp),
            ("layers", self.layers),
            ("sum", self.sdp + self.layers),
        ):
            rows[name] = {
                "on defects": values[truth].mean(dtype=float),
                "off defects": values[~truth].mean(dtype=float),
                "spread": values.std(dtype=float),
            }
            for where, pixels in (("all", slice(None)), ("silent", silent), ("speaking", ~silent)):
                own, labels = values[pixels].ravel(), truth[pixels].ravel().astype(int)
                rows[name][f"AUROC, {where}"] = (
                    image_metrics(own, labels)["auroc"] if len(own) else np.nan
                )
        return pd.DataFrame.from_dict(rows, orient="index")

    def in_words(self) -> str:
        """Where the layers are silent, and whether SDP knows more of those pixels."""
        silent, ranked = self.layers < SATURATED, self.table()["AUROC, silent"]
        said = (
            f"the layers are silent in {silent.mean():.0%} of all pixels and in {silent[self.held.masks].mean():.0%} "
            "of the defects'"
        )
        if ranked[["SDP", "layers"]].isna().any():  # none are silent, or of one state only
            return said
        helps = "more" if ranked["SDP"] > ranked["layers"] else "no more"
        return (
            f"{said}; there SDP ranks {helps} correctly than the layers' remainder "
            f"(AUROC {ranked['SDP']:.2f} against {ranked['layers']:.2f})"
        )

    def weighted(self, weights: Sequence[float]) -> pd.DataFrame:
        """Pixel metrics of weight * SDP + layers, smoothed; 0 is the layers alone, 1 is SDP+, infinity SDP."""
        rows = []
        for weight in weights:
            total = torch.from_numpy(
                self.sdp if np.isinf(weight) else weight * self.sdp + self.layers
            )
            maps = smooth(total, self.smoothing).numpy()
            found = [
                pixel_metrics(maps[where], self.held.masks[where])
                for where in map(self.held.where, self.held.dataset.categories)
            ]
            rows.append({"weight": weight} | _named("pixel", pd.DataFrame(found).mean()))
        return pd.DataFrame(rows)


def summands(detector: SDPPlus, held: Held) -> Summands:
    """What SDP+ adds on a data set. Raises ValueError for data without masks."""
    if held.masks is None:
        raise ValueError(f"{held.dataset.name} has no masks: what lies on a defect is not known")
    first, second = (np.empty(held.masks.shape, np.float32) for _ in range(2))
    for category in held.dataset.categories:
        where = held.where(category)
        text = detector.text_vectors(category).to(held.features.image_embedding)
        with torch.no_grad():
            parts = detector.summands(held.features[torch.from_numpy(where)], text)
        first[where], second[where] = (part.cpu().numpy() for part in parts)
    return Summands(first, second, held, detector.smoothing)
