"""Every method and the main ablations on one training of the demo model, as rows of ``data/demo/trainings.csv``, and
the methods of notebook 08 as rows of ``data/demo/after_clip_ad.csv``.

``python -m demo_world.trainings --weights FILE`` takes ``model.safetensors`` with its ``training.json`` beside it, or
``state.pt`` of a training that still runs. Some minutes on one core; what is stored is not computed again.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from tqdm import tqdm

from clipad.backbone import Backbone, load_backbone
from clipad.datasets import Dataset, load_dataset
from clipad.detectors import SDP, ClipSurgery, Detector, Direct, Features, SDPPlus
from clipad.dual_path import staged_features
from clipad.evaluation import evaluate
from clipad.io.files import content_hash, write_atomically
from clipad.linear_layers import LinearLayers
from clipad.published import data_dir, protocol
from clipad.studies import after_clip_ad
from clipad.studies.common import keep
from clipad.studies.opposite_predictions import count_phenomena, ground_truth
from clipad.studies.sdp_plus_fine_tuning import LayersAlone
from clipad.studies.trainings import read_trainings
from clipad.surgery import cosine
from clipad.training import train
from clipad.winclip import WinCLIP

METRICS = ("class_auroc", "image_auroc", "pixel_auroc", "pixel_f1_max", "pixel_pro")
RATES = ("opposite", "opposite_on_object")
COLUMNS = ("seed", "steps", "weights", "method", "category", *METRICS, *RATES)
"""metrics and rates are fractions; the rates are those of Direct and SDP only"""


class DirectDifference(Direct):
    """The direct map without saturation: (cos anomalous - cos normal) / 2, not the softmax of 100 times both."""

    name = "Direct, difference of states"

    def patch_values(self, features, text):
        return difference(features.tokens, text)


class Altered(SDP):
    """SDP with one part taken away.

    ``restart``: whether the surgery path starts anew at each quarter; ``weights``: whether feature surgery weights the
    states by the class token.
    """

    def __init__(self, backbone: Backbone, name: str, restart=True, weights=True, **options):
        super().__init__(backbone, **options)
        self.name, self.restart, self.weights = name, restart, weights

    def encode(self, images):
        visual = self.backbone.visual
        found = staged_features(visual, images, self.stages, self.as_released, 0, self.restart)
        return Features(found.image_embedding, found.surgery)

    def patch_values(self, features, text):
        if self.weights:
            return super().patch_values(features, text)
        return difference(features.tokens, text)

    @property
    def reads(self):
        return (*super().reads, f"restart {self.restart}")

    @property
    def settings(self):
        return super().settings | {"restart": self.restart, "weights_by_class_token": self.weights}


def difference(tokens: list[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """Per stage B x (N+1) x C and text C x 2 -> B x N: half the difference of the cosines, summed over stages."""
    z = sum(cosine(stage[:, 1:], text) for stage in tokens)
    return (z[..., 1] - z[..., 0]) / 2


def detectors(backbone: Backbone) -> dict[str, Callable[[], Detector]]:
    """The five methods, then the ablations; each is made when it is called (SDP+ has to be trained)."""
    published = protocol("demo")
    text = {"rvs": published.rvs, "rvs_options": published.rvs_options}
    found = {
        "Direct": lambda: Direct(backbone, **text),
        "CLIP Surgery": lambda: ClipSurgery(backbone, **text),
        "WinCLIP": lambda: WinCLIP(backbone),
        "SDP": lambda: SDP(backbone, **text),
        "SDP+": lambda: SDPPlus(backbone, trained_layers(backbone), **text),
        "Direct, difference of states": lambda: DirectDifference(backbone, **text),
    }
    last = [len(backbone.visual.transformer.resblocks)]
    # Without a restart the released program's side effect would change the path as well: one change at a time.
    plain = {"restart": False, "as_released": False}
    ablations = {
        "SDP, one path over all blocks": {"stages": last, **plain},
        "SDP, no restart": plain,
        "SDP, no class-token weights": {"weights": False},
        "SDP, as written": {"as_released": False},
        "SDP, mean vector": {"rvs": "mean", "rvs_options": {}},
    }
    for name, options in ablations.items():
        found[name] = lambda name=name, options=options: Altered(backbone, name, **text | options)
    return found


def trained_layers(backbone: Backbone) -> LinearLayers:
    """SDP+'s layers for this backbone, trained on ``demo_aux`` with the hyper-parameters of `clipad.published`."""
    published = protocol("demo")
    return train(
        backbone,
        load_dataset(published.trained_on),
        epochs=published.epochs,
        learning_rate=published.learning_rate,
        shuffle=published.shuffle,
        rvs=published.rvs,
        rvs_options=protocol(published.trained_on).rvs_options,
        progress=False,
    ).layers


def measured(detector: Detector, dataset: Dataset, rates: bool) -> pd.DataFrame:
    """A row per category: ``category``, the metrics, and, if asked for, the rates of opposite predictions."""
    table = evaluate(detector, dataset, progress=False).table.drop(index="mean")[list(METRICS)]
    if rates:
        truth = ground_truth(dataset, detector.backbone.image_size)
        sharp = copy.copy(detector)
        sharp.smoothing = 0
        images = count_phenomena(keep(sharp, truth.dataset).maps(sharp), truth)
        table = table.join(images.groupby("category")[list(RATES)].mean())
    return table.rename_axis("category").reset_index()


def measured_after(backbone: Backbone) -> pd.DataFrame:
    """The methods of notebook 08: a row per method and category."""
    published = protocol("demo")
    text = {"rvs": published.rvs, "rvs_options": published.rvs_options}
    layers, sdp = trained_layers(backbone), SDP(backbone, **text)
    plus, alone = (kind(backbone, layers, **text) for kind in (SDPPlus, LayersAlone))
    kept_aux = keep(plus, load_dataset(published.trained_on))
    test = after_clip_ad.split(keep(plus, load_dataset("demo")))
    memory = after_clip_ad.remember(kept_aux)
    settings, _ = after_clip_ad.choose(sdp, after_clip_ad.split(kept_aux), memory)
    maps, _ = after_clip_ad.every_map((sdp, plus, alone), test, memory, settings)
    scores = after_clip_ad.compared(maps, sdp, test.tested, resamples=20)
    tables = {name: scores.table(name).drop(index="mean")[list(METRICS)] for name in maps}
    return pd.concat(tables, names=["method", "category"]).reset_index()


def append_rows(weights: Path, seed: int, steps: int, file: Path, after: Path) -> None:
    """Every detector of which `file` holds no row for these weights; the file is complete after each. `after`: the
    same for the methods of notebook 08.

    A row's `weights` are the first 16 digits of the SHA-256 of ``model.safetensors``, as ``sha256sum`` prints it.
    """
    backbone = load_backbone("demo", pretrained=weights, device="cpu")
    about = {"seed": seed, "steps": steps, "weights": content_hash(weights)[:16]}
    dataset = load_dataset("demo")
    for name, make in (bar := tqdm(detectors(backbone).items())):
        bar.set_description(name)
        if not _has(file, about["weights"], name):
            rows = measured(make(), dataset, rates=name in ("Direct", "SDP"))
            _append(file, rows.assign(method=name, **about))
    if not _has(after, about["weights"], "SDP"):
        _append(after, measured_after(backbone).assign(**about))


def _has(file: Path, weights: str, method: str) -> bool:
    if not file.exists():
        return False
    table = read_trainings(file)
    return bool(((table["weights"] == weights) & (table["method"] == method)).any())


def _append(file: Path, rows: pd.DataFrame) -> None:
    rows = rows.reindex(columns=COLUMNS)
    table = pd.concat([read_trainings(file), rows]) if file.exists() else rows
    table = table.sort_values(["seed", "steps"], kind="stable")
    write_atomically(file, table.to_csv(index=False, float_format="%.4f"))


def exported(path: Path, folder: Path) -> tuple[Path, int, int]:
    """A model's file, its seed and its steps. ``state.pt`` becomes a file in `folder`, as it would be shipped."""
    if path.suffix == ".pt":
        state = torch.load(path, map_location="cpu", weights_only=True)
        half = {name: value.half().contiguous() for name, value in state["model"].items()}
        safetensors.torch.save_file(half, folder / "model.safetensors")
        return folder / "model.safetensors", state["settings"]["seed"], state["step"]
    record = path.with_name("training.json")
    if not record.is_file():
        raise ValueError(
            f"{path} has no training.json beside it, which says seed and steps: give the model.safetensors or the "
            "state.pt in the folder of a training"
        )
    record = json.loads(record.read_text(encoding="utf-8"))
    return path, record["seed"], record["chosen"]["step"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo_world.trainings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, required=True, help="model.safetensors or state.pt")
    parser.add_argument(
        "--output",
        type=Path,
        default=data_dir() / "demo" / "trainings.csv",
        help="rows are added (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights, seed, steps = exported(arguments.weights, Path(folder))
            file = arguments.output.resolve()
            after = file.with_name("after_clip_ad.csv")
            append_rows(weights, seed, steps, file, after)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
