"""Notebook 04: what linear layers that were trained on other products add to the frozen model, and how sure that is.

*Layers alone* and *logit fusion* are controls of ours, not methods of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from clipad.datasets import Dataset, load_dataset
from clipad.detectors import CLIP_TEMPERATURE, Detector, SDPPlus
from clipad.dual_path import project
from clipad.evaluation import fingerprint
from clipad.files import address, code_version
from clipad.linear_layers import LinearLayers, linear_logits
from clipad.metrics import image_metrics
from clipad.published import protocol
from clipad.studies.common import Kept, thinned
from clipad.studies.experiments import Experiment
from clipad.studies.opposite_predictions import Truth
from clipad.surgery import similarity_map, smooth
from clipad.training import Training, load_layers, train

SATURATED = 0.05
"""below this sum over stages the layers say "nothing there" """


class LayersAlone(SDPPlus):
    """The layers' summed maps without SDP's."""

    name = "layers alone"

    def maps(self, features, text):
        _, layers = self.summands(features, text)
        return smooth(layers, self.smoothing)


class LogitFusion(SDPPlus):
    """Another sum of the same parts: logits instead of probabilities.

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


# Layers for a data set ------------------------------------------------------------------------------------------


def training_set(run: Experiment, name: str = "", root: str | Path = "") -> Dataset | None:
    """The data set that trains the layers for the run's: the one named, else the published one.

    The demo model learns from the demo's other collection, whatever it is tested on. None where the published one is
    not at hand (no ``root``).
    """
    if run.backbone.name == "demo" and not name and not root:
        name = "demo" if run.dataset.name == "demo_aux" else "demo_aux"
    if not name and not root:
        return None
    return load_dataset(name or run.protocol.trained_on, root or None)


def train_for(run: Experiment, dataset: Dataset, epochs: int = 0, **options) -> Training:
    """:func:`clipad.train` with the protocol's text and hyper-parameters, except those in ``options``.

    Kept in a folder of its own under the run's, named by all that decides the weights: a finished training is read
    back and a stopped one continues.
    """
    theirs, rule, backbone = protocol(dataset.name), run.protocol, run.backbone
    published = {"learning_rate": rule.learning_rate, "shuffle": rule.shuffle, "seed": run.seed}
    words = {"prompts": run.prompts, "rvs": theirs.rvs, "rvs_options": theirs.rvs_options}
    options = words | published | options
    key = [backbone.weights_hash, backbone.device.type, code_version(), fingerprint(dataset)]
    name = address(repr([*key, sorted(options.items())]))
    where = run.output_dir / "training" / f"{dataset.name}-{name}"
    return train(backbone, dataset, where, epochs=epochs or rule.epochs, progress=False, **options)


def layers_for(
    run: Experiment, checkpoint: str | Path = "", train_root: str | Path = ""
) -> LinearLayers | None:
    """The layers with which SDP+ is tested on the run's data: those of the checkpoint, else trained as published
    (read back where notebook 04 has done it), else None: no training data at hand."""
    if checkpoint:
        return load_layers(checkpoint)
    dataset = training_set(run, root=train_root)
    return None if dataset is None else train_for(run, dataset).layers


def build(
    run: Experiment, layers: LinearLayers, kind: type[SDPPlus] = SDPPlus, **options
) -> SDPPlus:
    """SDP+, or a control built on it, with the protocol's text and smoothing for the run's data set."""
    sigma = run.protocol.smoothing_240_sdp_plus / 240 * run.backbone.image_size
    return kind(run.backbone, layers, **{"smoothing": sigma} | run.rvs | options)


# What training depends on ---------------------------------------------------------------------------------------


def mean_metrics(detector: Detector, kept: Kept) -> dict[str, float]:
    """``METRICS`` of one detector, mean over categories, without intervals; NaN where undefined."""
    return kept.mean_metrics(*kept.predict_all(detector))


def over_trainings(
    run: Experiment, dataset: Dataset, kept: Kept, seeds: Sequence[int], **options
) -> pd.DataFrame:
    """SDP+ after trainings that differ in chance alone: a row per seed (of the layers' first weights and, where
    shuffled, of the order) and order, with ``METRICS``."""
    rows = []
    for order, seed in product(("as released", "shuffled"), seeds):
        own = options | {"shuffle": order == "shuffled", "seed": seed}
        found = mean_metrics(build(run, train_for(run, dataset, **own).layers), kept)
        rows.append({"order": order, "seed": seed} | found)
    return pd.DataFrame(rows)


def over_images(
    run: Experiment, dataset: Dataset, kept: Kept, seeds: Sequence[int], epochs: int, **options
) -> pd.DataFrame:
    """SDP+ after trainings on ever more images of each category: 1/16, 1/4 and all of them, a row per seed.

    Each training takes as many steps as ``epochs`` over the whole data set, so that only the images differ.
    """
    most = max(sum(s.category == c for s in dataset) for c in dataset.categories)
    rows = []
    for count, seed in product(sorted({max(2, most // part) for part in (16, 4, 1)}), seeds):
        few = thinned(dataset, count)
        equal = max(1, round(epochs * len(dataset) / len(few)))
        layers = train_for(run, few, equal, **options | {"seed": seed}).layers
        rows.append({"images": len(few), "seed": seed} | mean_metrics(build(run, layers), kept))
    return pd.DataFrame(rows)


def over_epochs(run: Experiment, trainings: Sequence[Training], kept: Kept) -> pd.DataFrame:
    """SDP+ after every epoch of several trainings: a row per epoch and training, with ``METRICS``."""
    rows = []
    for number, training in enumerate(trainings):
        for epoch, path in zip(training.log["epoch"], training.checkpoints, strict=True):
            found = mean_metrics(build(run, load_layers(path)), kept)
            rows.append({"epoch": int(epoch), "training": number} | found)
    return pd.DataFrame(rows)


# What the layers change -----------------------------------------------------------------------------------------


@torch.no_grad()
def joint_space(
    detector: SDPPlus, kept: Kept, stage: int, per_image: int = 6, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Up to ``per_image`` defect patches and as many others of each anomalous image, mapped three ways.

    *before*: CLIP's own mapping (ln_post and projection); *untrained layer*: a control; *trained layer*. A patch is of
    the defect where the mask covers a quarter of it or more, another where it covers none. ``stage``: 0 .. J-1.

    Returns a row per patch: ``label`` (1 for the defect) and per mapping its margin, 100 (cos(patch, anomalous) -
    cos(patch, normal)); and a row per mapping: ``auroc`` of the margin (defect against other patches), its mean over
    patches of each kind, and ``gap``, the distance between the mean patch and the mean text vector.
    """
    anomalous = np.flatnonzero(kept.labels == 1)
    few = replace(kept.dataset, samples=tuple(kept.dataset[i] for i in anomalous))
    truth, grid = Truth(few, kept.masks[anomalous], None), detector.backbone.visual.grid_size[0]
    chosen = truth.pick(grid, per_image, seed)
    at = anomalous[chosen["image"]], 1 + chosen["patch"].to_numpy()
    picked = kept.features.ordinary[stage][at].to(detector.backbone.device)
    trained = detector.layers
    fresh = LinearLayers(picked.shape[1], trained.fc[0].out_features, len(trained.fc), seed)
    mapped = {
        "before": project(detector.backbone.visual, picked),
        "untrained layer": fresh.to(picked.device).fc[stage](picked),
        "trained layer": trained.fc[stage](picked),
    }
    text = torch.stack([detector.text_vectors(category) for category in chosen["category"]])
    margins, numbers = chosen[["label"]].copy(), {}
    for name, values in mapped.items():
        unit = F.normalize(values, dim=-1).float().cpu()
        cosines = torch.einsum("pc,pcs->ps", unit, text)
        margins[name] = 100 * (cosines[:, 1] - cosines[:, 0]).numpy()
        other, defect = margins.groupby("label")[name].mean()
        numbers[name] = {
            "auroc": image_metrics(margins[name], margins["label"])["auroc"],
            "margin, normal patches": other,
            "margin, defect patches": defect,
            "gap": float((unit.mean(dim=0) - text.mean(dim=(0, 2))).norm()),
        }
    return margins, pd.DataFrame.from_dict(numbers, orient="index")


@dataclass
class Summands:
    """The two maps that SDP+ adds, N x S x S before smoothing, with the ground truth."""

    sdp: np.ndarray
    layers: np.ndarray
    kept: Kept
    smoothing: float

    @property
    def silent(self) -> np.ndarray:
        """N x S x S: where the layers say "nothing there"."""
        return self.layers < SATURATED

    def table(self) -> pd.DataFrame:
        """Rows SDP, layers and their sum: mean on the defects and off them; ``spread``, the standard deviation of all
        pixels; and how well it ranks defect pixels above others (AUROC, all images together) in all pixels, in those
        where the layers are silent, and in those where they speak."""
        truth, rows = self.kept.masks, {}
        regions = {"all": np.ones_like(truth), "silent": self.silent, "speaking": ~self.silent}
        parts = {"SDP": self.sdp, "layers": self.layers, "sum": self.sdp + self.layers}
        for name, values in parts.items():
            row = {"on defects": values[truth].mean(dtype=float)}
            row |= {"off defects": values[~truth].mean(dtype=float)}
            row |= {"spread": values.std(dtype=float)}
            for where, at in regions.items():
                found = image_metrics(values[at], truth[at].astype(int)) if at.any() else {}
                row[f"AUROC, {where}"] = found.get("auroc", np.nan)
            rows[name] = row
        return pd.DataFrame.from_dict(rows, orient="index")

    def weighted(self, weights: Sequence[float]) -> pd.DataFrame:
        """Pixel metrics of weight * SDP + layers, smoothed; 0 is the layers alone, 1 is SDP+."""
        rows = []
        for weight in weights:
            total = torch.from_numpy(weight * self.sdp + self.layers)
            maps = smooth(total, self.smoothing).numpy()
            rows.append(self.kept.mean_metrics(maps, maps.max(axis=(1, 2))))
        return pd.DataFrame(rows).filter(like="pixel_").assign(weight=weights)


def summands(detector: SDPPlus, kept: Kept) -> Summands:
    """What SDP+ adds on a data set with masks."""
    first, second = (np.empty(kept.masks.shape, np.float32) for _ in range(2))
    for category in kept.dataset.categories:
        at = kept.where(category)
        own = kept.features[torch.from_numpy(at)].to(detector.backbone.device)
        text = detector.text_vectors(category).to(own.image_embedding)
        with torch.no_grad():
            parts = detector.summands(own, text)
        first[at], second[at] = (part.cpu().numpy() for part in parts)
    return Summands(first, second, kept, detector.smoothing)
