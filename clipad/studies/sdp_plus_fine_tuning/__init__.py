"""Notebook 04 (and 05, 06, 08): linear layers that are trained on other products, and SDP+ with them."""

from pathlib import Path

from clipad.datasets import Dataset, load_dataset
from clipad.detectors import SDPPlus
from clipad.evaluation import fingerprint
from clipad.io.files import address, code_version
from clipad.linear_layers import LinearLayers
from clipad.published import protocol
from clipad.studies.experiments import Experiment
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
