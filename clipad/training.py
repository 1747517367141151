"""Training of SDP+'s linear layers on another data set, and checkpoints (paper section 3.3, METHOD.md section 6)."""

from __future__ import annotations

import json
import math
import pickle
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from clipad.backbone import Backbone
from clipad.datasets import Dataset
from clipad.dual_path import default_stages, staged_features
from clipad.evaluation import fingerprint, load_images, read_masks
from clipad.files import write_atomically
from clipad.linear_layers import LinearLayers, linear_maps, stage_losses
from clipad.prompts import CLIP_AD, Prompts
from clipad.text import check_method, representative_vectors


@dataclass
class Training:
    """What a training left: the layers after the last epoch, a log with a row per epoch, and a file per epoch."""

    layers: LinearLayers
    log: pd.DataFrame
    """columns epoch, loss, focal, dice (sums over stages, means over the epoch's batches), seconds"""
    checkpoints: list[Path]


def train(
    backbone: Backbone,
    dataset: Dataset,
    output_dir: str | Path | None = None,
    *,
    epochs: int = 5,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    shuffle: bool = False,
    seed: int = 0,
    prompts: Prompts | None = None,
    rvs: str = "dbscan",
    rvs_options: dict[str, Any] | None = None,
    stages: Sequence[int] | None = None,
    as_released: bool = True,
    cache_gb: float = 8.0,
    progress: bool = True,
) -> Training:
    """Train one linear layer per stage on the images and masks of ``dataset``; the backbone stays frozen.

    The defaults are the released program's, which does not shuffle; ``shuffle`` draws an order per epoch from
    ``seed`` and the number of the epoch. Text vectors are those of ``dataset`` (``prompts``, ``rvs``,
    ``rvs_options``).

    The frozen tokens are computed once and kept in memory where they take at most ``cache_gb`` gigabytes, else anew
    in every epoch (measured on a busy CPU: 0.9 s instead of 7.4 s an epoch of the demo's 320 images). On a GPU the
    backbone runs in float16; layers and losses are always float32.

    ``output_dir``: a checkpoint per epoch (``epoch_001.safetensors``, with Adam's state) and ``log.csv``. The same
    call continues after the last finished epoch and ends with the weights of an unbroken training; asking for more
    ``epochs`` continues as well. None: nothing is kept.

    Raises ValueError for data without the masks to learn from, options out of range, a loss that is not finite, or
    an ``output_dir`` that holds a training with other settings; OSError where it cannot be written.
    """
    _require_trainable(dataset, epochs, learning_rate, batch_size)
    check_method(rvs, rvs_options or {})
    stages = tuple(stages) if stages else default_stages(len(backbone.visual.transformer.resblocks))
    prompts = prompts or CLIP_AD
    settings = {
        "model": backbone.name,
        "weights": backbone.weights_hash,
        "image_size": backbone.image_size,
        "device": backbone.device.type,
        "stages": list(stages),
        "as_released": as_released,
        "dataset": dataset.name,
        "categories": list(dataset.categories),
        "samples": fingerprint(dataset),
        "prompts": asdict(prompts),
        "rvs": rvs,
        "rvs_options": dict(rvs_options or {}),
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "seed": seed,
    }
    settings = json.loads(
        json.dumps(settings)
    )  # tuples become lists, as they will be when read back
    folder = None if output_dir is None else Path(output_dir)

    layers = LinearLayers(*backbone.visual.proj.shape, len(stages), seed).to(backbone.device)
    layers.settings = settings
    optimizer = torch.optim.Adam(layers.parameters(), lr=learning_rate)
    rows = [] if folder is None else _resume(folder, layers, optimizer, settings, epochs)
    if len(rows) < epochs:
        text = torch.stack(
            [
                representative_vectors(backbone, category, prompts, rvs, **(rvs_options or {}))
                for category in dataset.categories
            ]
        )
        of = [dataset.categories.index(sample.category) for sample in dataset]
        source = _TokenSource(
            backbone, dataset, stages, as_released, batch_size, cache_gb, progress
        )
        masks = torch.from_numpy(read_masks(list(dataset.samples), backbone.image_size))
        _run(
            layers, optimizer, source, masks, text[of], rows, folder,
            epochs=epochs, shuffle=shuffle, seed=seed, progress=progress,
        )  # fmt: skip
    checkpoints = [] if folder is None else [_checkpoint(folder, row["epoch"]) for row in rows]
    return Training(layers.eval().requires_grad_(False), pd.DataFrame(rows), checkpoints)


def _run(
    layers, optimizer, source, masks, text, rows, folder, *, epochs, shuffle, seed, progress
) -> None:
    """The remaining epochs; appends a row per epoch to ``rows``."""
    device = layers.fc[0].weight.device
    size = masks.shape[-1]
    steps = math.ceil(len(masks) / source.batch_size)
    with tqdm(
        total=epochs * steps,
        initial=len(rows) * steps,
        desc="training",
        unit="batch",
        mininterval=1,
        disable=not progress,
    ) as bar:
        for epoch in range(len(rows) + 1, epochs + 1):
            started, losses = time.perf_counter(), []
            order = (
                np.random.default_rng([seed, epoch]).permutation(len(masks)) if shuffle else None
            )
            order = torch.arange(len(masks)) if order is None else torch.from_numpy(order)
            batches = zip(order.split(source.batch_size), source.batches(order), strict=True)
            for which, tokens in batches:
                maps = linear_maps(layers, tokens, text[which].to(device), size)
                focal, dice = (
                    values.sum() for values in stage_losses(maps, masks[which].to(device))
                )
                loss = focal + dice
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the loss of epoch {epoch} is not finite: try a smaller learning_rate; "
                        "the checkpoints of earlier epochs are unharmed"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(torch.stack([loss, focal, dice]).detach())
                bar.update()
            mean = torch.stack(losses).mean(dim=0).tolist()
            row = {"epoch": epoch} | dict(zip(("loss", "focal", "dice"), mean, strict=True))
            rows.append(row | {"seconds": round(time.perf_counter() - started, 3)})
            bar.set_postfix(epoch=epoch, loss=f"{mean[0]:.3f}")
            if folder is not None:
                _save(folder, layers, optimizer, rows)


class _TokenSource:
    """The frozen patch tokens of a data set: from memory where they fit, else from the images each time."""

    def __init__(self, backbone, dataset, stages, as_released, batch_size, cache_gb, progress):
        self.backbone, self.samples = backbone, list(dataset.samples)
        self.stages, self.as_released, self.batch_size = stages, as_released, batch_size
        width, patches = backbone.visual.proj.shape[0], math.prod(backbone.visual.grid_size)
        self.cache = None
        if len(self.samples) * len(stages) * patches * width * 4 <= cache_gb * 1e9:
            cache = [torch.empty(len(self.samples), patches, width) for _ in stages]
            everything = torch.arange(len(self.samples))
            batches = zip(everything.split(batch_size), self._compute(everything), strict=True)
            total = math.ceil(len(self.samples) / batch_size)
            for which, tokens in tqdm(
                batches, "frozen features", total, unit="batch", disable=not progress
            ):
                for kept, stage in zip(cache, tokens, strict=True):
                    kept[which] = stage.cpu()
            self.cache = cache

    def batches(self, order: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Per batch of ``order`` (indices into the data set) a list over stages of B x N x D, on the device."""
        if self.cache is None:
            yield from self._compute(order)
        else:
            for which in order.split(self.batch_size):
                yield [stage[which].to(self.backbone.device) for stage in self.cache]

    def _compute(self, order):
        samples = [self.samples[i] for i in order.tolist()]
        for images in load_images(samples, self.backbone.preprocess, self.batch_size):
            with torch.no_grad(), self.backbone.autocast():
                found = staged_features(
                    self.backbone.tower,
                    images.to(self.backbone.device),
                    self.stages,
                    self.as_released,
                )
            yield [tokens[:, 1:].float() for tokens in found.ordinary]


def _require_trainable(
    dataset: Dataset, epochs: int, learning_rate: float, batch_size: int
) -> None:
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            "epochs and batch_size have to be 1 or more and learning_rate positive; "
            f"found {epochs}, {batch_size} and {learning_rate}"
        )
    missing = [s for s in dataset if s.label < 0 or (s.label == 1 and s.mask_path is None)]
    if missing or not any(s.label == 1 for s in dataset):
        raise ValueError(
            f"the layers learn from masks, but {len(missing) or 'all'} of the {len(dataset)} images of "
            f"{dataset.name} bring none (or no label, or no defect): train on a data set with pixel ground truth"
        )


# Checkpoints ----------------------------------------------------------------------------------------------------


def load_layers(path: str | Path) -> LinearLayers:
    """Layers from a checkpoint of ours (``.safetensors``) or of the released program (a file of ``torch.save``).

    The released format is ``{"linear_layers": state_dict}`` with keys ``fc.{i}.weight`` (C x D) and ``fc.{i}.bias``.
    Pickled code is never executed.

    Raises FileNotFoundError, or ValueError for anything else than such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        state, settings, _ = _read(path)
        state = {key: value for key, value in state.items() if not key.startswith("adam.")}
    else:
        state, settings = _read_released(path), {}
    layers = _from_state(state, path)
    layers.settings = settings
    return layers


def _from_state(state: dict[str, torch.Tensor], path: Path) -> LinearLayers:
    count = len(state) // 2
    expected = {f"fc.{i}.{part}" for i in range(count) for part in ("weight", "bias")}
    if not count or set(state) != expected:
        odd = sorted(set(state) ^ (expected or {"fc.0.weight", "fc.0.bias"}))
        raise ValueError(
            f"{path} has to hold fc.0.weight, fc.0.bias, fc.1.weight, ... for each stage; "
            f"missing or unknown: {', '.join(odd[:6])}"
        )
    first = state["fc.0.weight"]
    for key, value in state.items():
        shape = tuple(first.shape if key.endswith("weight") else first.shape[:1])
        if first.ndim != 2 or tuple(value.shape) != shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(value.shape)}, expected {shape} (weights C x D, biases C)"
            )
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(
                f"{path}: {key} holds values that are no finite numbers; the file is damaged"
            )
    layers = LinearLayers(first.shape[1], first.shape[0], count)
    layers.load_state_dict({key: value.float() for key, value in state.items()})
    return layers.eval().requires_grad_(False)


def _read_released(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        OSError,
    ) as error:
        raise ValueError(
            f"{path} is no checkpoint: it is damaged, of another kind, or a pickle with code, which is never executed"
        ) from error
    layers = found.get("linear_layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict) or not all(
        isinstance(v, torch.Tensor) for v in layers.values()
    ):
        held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{path} has to hold a dict with 'linear_layers': a state dict; found: {held[:200] or 'nothing'}"
        )
    return dict(layers)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict, list[dict]]:
    """Tensors, settings and log rows of a checkpoint of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        return (
            state,
            json.loads(metadata.get("settings", "{}")),
            json.loads(metadata.get("log", "[]")),
        )
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:03d}.safetensors"


def _save(folder: Path, layers: LinearLayers, optimizer, rows: list[dict]) -> None:
    """Layers, Adam's state and the log in one file, so that no kill can leave two that disagree."""
    state = {key: value.cpu().contiguous() for key, value in layers.state_dict().items()}
    for name, parameter in layers.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            state[f"adam.{kind}.{name}"] = value.cpu().contiguous()
    metadata = {"settings": json.dumps(layers.settings, sort_keys=True), "log": json.dumps(rows)}
    write_atomically(_checkpoint(folder, rows[-1]["epoch"]), save(state, metadata))
    write_atomically(folder / "log.csv", pd.DataFrame(rows).to_csv(index=False))


def _resume(
    folder: Path, layers: LinearLayers, optimizer, settings: dict, epochs: int
) -> list[dict]:
    """Put the newest checkpoint of at most ``epochs`` epochs into layers and optimizer; its log rows, [] if none."""
    for path in sorted(folder.glob("epoch_*.safetensors"), reverse=True):
        try:
            state, found, rows = _read(path)
        except ValueError:
            warnings.warn(
                f"{path.name} is damaged: the training continues from an earlier epoch",
                stacklevel=3,
            )
            continue
        different = sorted(
            k for k in found.keys() | settings.keys() if found.get(k) != settings.get(k)
        )
        if different:
            raise ValueError(
                f"{folder} holds a training with other settings (different: {', '.join(different)}): "
                "choose another output_dir or remove this one"
            )
        if len(rows) > epochs:
            continue
        layers.load_state_dict({name: state[name] for name in layers.state_dict()})
        for name, parameter in layers.named_parameters():
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                value = state[f"adam.{kind}.{name}"]
                optimizer.state[parameter][kind] = (
                    value if kind == "step" else value.to(parameter.device)
                )
        return rows
    return []
