"""Notebook 04: what linear layers that were trained on other products add to the frozen model, and how sure that is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from clipad.datasets import Dataset, load_dataset
from clipad.detectors import SDPPlus
from clipad.dual_path import project
from clipad.evaluation import fingerprint
from clipad.io.files import address, code_version
from clipad.linear_layers import LinearLayers
from clipad.metrics import image_metrics
from clipad.published import protocol
from clipad.studies.common import Kept
from clipad.studies.experiments import Experiment
from clipad.studies.opposite_predictions import Truth
from clipad.surgery import smooth
from clipad.training import Training, load_layers, train


class LayersAlone(SDPPlus):
    """The layers' summed maps without SDP's: a control of ours, not a method of the paper."""

    name = "layers alone"

    def maps(self, features, text):
        _, layers = self.summands(features, text)
        return smooth(layers, self.smoothing)


def training_set(run: Experiment, name: str = "", root: str | Path = "") -> Dataset | None:
    """The data set that trains the layers for the run's: the one named, else the published one.

    The demo model learns from the demo's other collection, whatever it is tested on. None where the published one is
    not at hand (no ``root``).
    """
    if not name and not root:
        if run.backbone.name != "demo":
            return None
        name = "demo" if run.dataset.name == "demo_aux" else "demo_aux"
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


@torch.no_grad()
def joint_space(
    detector: SDPPlus, kept: Kept, stage: int, per_image: int = 4, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Up to ``per_image`` defect patches and as many others of each anomalous image, mapped three ways.

    *before*: CLIP's own mapping (ln_post and projection); *untrained layer*: a control; *trained layer*. A patch is of
    the defect where the mask covers a quarter of it or more, another where it covers none. ``stage``: 0 .. J-1.

    Returns a row per patch: ``label`` (1 for the defect) and per mapping its margin, 100 (cos(patch, anomalous) -
    cos(patch, normal)); and a row per mapping: ``auroc`` of the margin (defect against other patches), its mean over
    patches of each kind, and ``gap``, the distance between the mean patch and the mean text vector.
    """
    visual, at = detector.backbone.visual, np.flatnonzero(kept.labels == 1)
    few = replace(kept.dataset, samples=tuple(kept.dataset[i] for i in at))
    chosen = Truth(few, kept.masks[at], None).pick(visual.grid_size[0], per_image, seed)
    tokens = kept.features.ordinary[stage][at[chosen["image"]], 1 + chosen["patch"].to_numpy()]
    tokens, layers = tokens.to(detector.backbone.device), detector.layers
    fresh = LinearLayers(tokens.shape[1], layers.fc[0].out_features, len(layers.fc), seed)
    mapped = {
        "before": project(visual, tokens),
        "untrained layer": fresh.to(tokens.device).fc[stage](tokens),
        "trained layer": layers.fc[stage](tokens),
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
    return margins, pd.DataFrame(numbers).T
