"""What every notebook starts and ends with: from its parameters to backbone, data and folder, and the record of the
run. A parameter left empty ("" or 0 or []) means what the preset says; a given one wins.
"""

import json
import platform
import random
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from clipad.backbone import Backbone, load_backbone, require_model
from clipad.datasets import Dataset, load_dataset
from clipad.detectors import SDP, ClipSurgery, Detector, Direct, SDPPlus
from clipad.evaluation import fingerprint
from clipad.io.files import (
    REPOSITORY,
    code_version,
    did_you_mean,
    require_writable,
    write_atomically,
)
from clipad.prompts import Prompts, load_prompts
from clipad.published import Protocol, protocol
from clipad.training import load_layers
from clipad.winclip import WinCLIP

RESULT_MIME = "application/vnd.clipad.result+json"

PRESETS = {"demo": "demo", "paper": "mvtec"}
"""preset -> the data set whose protocol it takes"""


@dataclass(repr=False)
class Experiment:
    """One run of one notebook: what it uses, where its results go, and what it found."""

    notebook: str
    parameters: dict[str, Any]
    backbone: Backbone
    dataset: Dataset
    protocol: Protocol
    prompts: Prompts
    output_dir: Path
    seed: int
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def rvs(self) -> dict[str, Any]:
        """Keyword arguments for a detector: prompts and the published representative vectors of this data set."""
        rule = self.protocol
        return {"prompts": self.prompts, "rvs": rule.rvs, "rvs_options": rule.rvs_options}

    @property
    def tolerance(self) -> float:
        """How near a map that a notebook computes in float32 has to be to a detector's, in half precision on a GPU."""
        with self.backbone.autocast():
            return 0.02 if torch.is_autocast_enabled(self.backbone.device.type) else 1e-4

    def has_masks(self) -> bool:
        """Whether there are masks; where not, says so: the guard of a cell that needs them."""
        if not self.dataset.has_masks:
            print("Skipped: no masks.")
        return self.dataset.has_masks

    def need_both_labels(self, what: str) -> None:
        """Leave where there is nothing to compare: no labels, or one of the two only."""
        if not (self.dataset.has_masks or {s.label for s in self.dataset} >= {0, 1}):
            name = self.dataset.name
            self.leave(f"{what}. Metrics need normal and anomalous images, {name} has not both.")

    def leave(self, why: str) -> None:
        """End a notebook without an error where its data has nothing to say; keeps the record."""
        print(f"Skipped: {why}")
        self.finish()
        raise SystemExit(0)

    def record(self, name: str, value: Any) -> None:
        """Keep a result (number, mapping or DataFrame) for the record of the run."""
        self.results[name] = _plain(value)

    def finish(self) -> None:
        """Last cell of a notebook: show what it ran with (versions, device, seed, hashes: what gives the same numbers),
        and write the record of the run, JSON beside the executed notebook and a private MIME bundle in it."""
        packages = ("torch", "open_clip_torch", "numpy", "scikit-learn", "umap-learn")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        model, data = self.backbone, self.dataset
        on = f"{model.device.type.upper()}, {torch.get_num_threads()} threads"
        if model.device.type == "cuda":
            on = torch.cuda.get_device_name(model.device)
        mean, std = (" ".join(f"{v:.4f}" for v in values) for values in (model.mean, model.std))
        about = {
            "model": f"{model.name}, {model.pretrained}, {model.activation}, weights {model.weights_hash}",
            "pre-processing": f"{model.image_size} px, mean {mean}, std {std}",
            "data": f"{data.name}, {len(data)} images, samples {fingerprint(data)}",
            "code": f"clipad {version('clipad')}, sources {code_version()}",
            "versions": f"Python {platform.python_version()}, {versions}",
            "device": on,
            "seed": str(self.seed),
        }
        record = {"notebook": self.notebook, "parameters": self.parameters, "provenance": about}
        record["results"] = self.results
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
        write_atomically(self.output_dir / f"{self.notebook}.json", text + "\n")
        rows = "\n".join(f"| {key} | {value} |" for key, value in about.items())
        table = f"| this run | |\n|---|---|\n{rows}"
        shown = {"text/markdown": table, "text/plain": table, RESULT_MIME: record}
        display(shown, raw=True)

    def __str__(self) -> str:
        model, data = self.backbone, self.dataset
        kinds = {"image labels": data.has_image_labels, "pixel masks": data.has_masks}
        known = ", ".join(kind for kind, there in kinds.items() if there) or "no labels"
        told = (
            f"model **{model.name}** ({model.pretrained}, {model.image_size} px, {model.device}) on **{data.name}**: "
            f"{len(data)} images, categories {', '.join(data.categories)} ({known})"
        )
        states = [state for c in data.categories for state in self.prompts.sentences(c)]
        unknown = set().union(*map(model.unknown_words, states))
        model.told |= unknown  # here once, so that no cell has to warn of it
        if unknown:
            words = ", ".join(sorted(unknown))
            told += f". The model never saw the words *{words}* in training: what it makes of them is noise"
        return told

    __repr__ = _repr_markdown_ = __str__  # no path of the machine in a stored notebook


def resolve(
    preset="demo", model="", pretrained="", dataset="", data_root="", image_size=0, **_others
) -> dict[str, str]:
    """model, pretrained and dataset: what the preset says, and what was given instead.

    ValueError for what does not go together, and for models and weights that do not exist.
    """
    rule = protocol(_known("preset", preset, PRESETS))
    chosen = {"model": rule.model, "pretrained": rule.pretrained or "", "dataset": rule.dataset}
    if data_root and not dataset and chosen["dataset"] == "demo":
        raise ValueError(
            "data_root is given, dataset is not: did you mean dataset folder? (mvtec, visa, ... for those)"
        )
    if model and model != chosen["model"]:
        chosen |= {"model": model, "pretrained": ""}
    given = {"pretrained": pretrained, "dataset": dataset}
    chosen |= {name: value for name, value in given.items() if value}
    if chosen["pretrained"] == ("random" if chosen["model"] == "demo" else ""):
        raise ValueError(
            f"model={chosen['model']!r} needs pretrained: an open_clip tag, a checkpoint file, or 'random'; the demo "
            f"model its own weights or a file; found {chosen['pretrained']!r}"
        )
    require_model(chosen["model"], _weights(chosen), image_size)
    return chosen


def _weights(chosen: dict[str, str]) -> str | None:
    return None if chosen["pretrained"] in ("", "random") else chosen["pretrained"]


def _known(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        hint = did_you_mean(name, table)
        raise ValueError(f"unknown {what} {name!r}{hint}: one of {', '.join(table)}")
    return table[name]


def run_folder(preset="demo", dataset="", **_others) -> Path:
    """Where results go if nothing else is said, such as ``outputs/paper-visa`` of the clone."""
    return REPOSITORY / "outputs" / f"{preset}-{dataset or PRESETS[preset]}"


def experiment(
    notebook: str,
    preset: str = "demo",
    model: str = "",
    pretrained: str = "",
    dataset: str = "",
    data_root: str = "",
    categories: list | None = None,
    prompts: str = "",
    image_size: int = 0,
    seed: int = 0,
    device: str = "",
    output_dir: str = "",
    normal_folder: str = "",
) -> Experiment:
    """Resolve a notebook's parameters, load model and data, and seed every generator.

    ``preset``: ``demo`` (shipped model and images, offline) or ``paper`` (published protocol). ``pretrained``: an
    open_clip tag, a checkpoint file, or ``random``. ``image_size``: side in pixels. ``normal_folder``: see
    :func:`clipad.load_dataset`. ``output_dir``: empty for ``outputs/<preset>-<dataset>`` of the checkout.

    ValueError or OSError for anything that cannot work, before anything long starts.
    """
    chosen = resolve(preset, model, pretrained, dataset, data_root, image_size)
    # The data and the folder first: a wrong path shall not wait for a model to load.
    data = load_dataset(chosen["dataset"], data_root or None, categories or None, normal_folder)
    own_prompts = load_prompts(prompts or None)
    folder = Path(output_dir) if output_dir else run_folder(preset, dataset)
    require_writable(folder)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries that notebooks call draw from the global generator)
    random.seed(seed)
    size = image_size or None
    backbone = load_backbone(chosen["model"], _weights(chosen), device or None, size, seed)
    # Names only: no path of the machine in a stored notebook.
    parameters = {"preset": preset, **chosen, "pretrained": Path(chosen["pretrained"]).name}
    parameters |= {"categories": list(data.categories), "prompts": Path(prompts).name}
    parameters |= {"normal_folder": normal_folder} if normal_folder else {}
    parameters |= {"image_size": backbone.image_size, "seed": seed}
    rules = protocol(chosen["dataset"])
    return Experiment(notebook, parameters, backbone, data, rules, own_prompts, folder, seed)


DETECTORS = {"direct": Direct, "clip_surgery": ClipSurgery, "sdp": SDP}
DETECTORS |= {"sdp_plus": SDPPlus, "winclip": WinCLIP}


def make_detector(
    name: str, backbone: Backbone, layers: str | Path | None = None, **options
) -> Detector:
    """A detector by its short name; ``sdp_plus`` needs ``layers``, a checkpoint of its linear layers. ValueError for an
    unknown name, missing layers, or layers that another detector would ignore."""
    kind = _known("detector", name, DETECTORS)
    if (kind is SDPPlus) != bool(layers):
        raise ValueError("sdp_plus needs its linear layers, a checkpoint; others take none")
    return kind(backbone, *([load_layers(layers)] if layers else []), **options)


def _plain(value):
    """JSON-able: keys of several levels as words, NaN as None."""
    if isinstance(value, pd.DataFrame):
        value = value.to_dict(orient="index")
    elif isinstance(value, pd.Series):
        value = value.to_dict()
    elif isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, dict):
        names = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in value]
        return dict(zip(names, map(_plain, value.values()), strict=True))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
