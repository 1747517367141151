"""Training of SDP+'s linear layers on another data set, and checkpoints (paper section 3.3, METHOD.md section 6)."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
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
from clipad.checkpoints import fill, read_content
from clipad.datasets import Dataset
from clipad.dual_path import default_stages, staged_features
from clipad.evaluation import fingerprint, in_parts, load_images, read_masks
from clipad.files import require_same_settings, write_atomically
from clipad.linear_layers import LinearLayers, linear_maps, stage_losses
from clipad.prompts import CLIP_AD, Prompts
from clipad.text import check_method, representative_vectors

ADAM = ("step", "exp_avg", "exp_avg_sq")
"""what Adam remembers of each weight"""


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
    as_released: bool = True,
    progress: bool = True,
) -> Training:
    """Train one linear layer per quarter of the network on the images and masks of ``dataset``; the backbone is frozen.

    The defaults are the released program's, which does not shuffle; ``shuffle`` draws an order per epoch from
    ``seed`` and the number of the epoch. Text vectors are those of ``dataset`` (``prompts``, ``rvs``,
    ``rvs_options``). On a GPU the backbone runs in float16; layers and losses are always float32.

    ``output_dir``: a checkpoint per epoch (``epoch_001.safetensors``, with Adam's state) and ``log.csv``. The same
    call continues after the last finished epoch, and so does one that asks for more ``epochs``; on a CPU it ends with
    the weights of an unbroken training (on a GPU gradients are not summed in a fixed order). None: nothing is kept.

    Raises ValueError for data without the masks to learn from, options out of range, a loss that is not finite, or
    an ``output_dir`` that holds a training with other settings; OSError where it cannot be written.
    """
    _require_trainable(dataset, epochs, learning_rate, batch_size)
    stages = default_stages(len(backbone.visual.transformer.resblocks))
    layers = LinearLayers(*backbone.visual.proj.shape, len(stages), seed).to(backbone.device)
    how = {"learning_rate": learning_rate, "batch_size": batch_size, "shuffle": shuffle}
    how |= {"seed": seed, "stages": stages, "as_released": as_released}
    texts = {"prompts": prompts or CLIP_AD, "rvs": rvs, "rvs_options": dict(rvs_options or {})}
    layers.settings = _settings(backbone, dataset, **texts, **how)
    optimizer = torch.optim.Adam(layers.parameters(), lr=learning_rate)
    folder = None if output_dir is None else Path(output_dir)
    log = _resume(folder, layers, optimizer, epochs) if folder else []
    if len(log) < epochs:
        text = _text_of(backbone, dataset, *texts.values())
        masks = torch.from_numpy(read_masks(list(dataset), backbone.image_size))
        orders = [_order(len(dataset), shuffle, seed, e) for e in range(len(log) + 1, epochs + 1)]
        tokens = FrozenTokens(backbone, dataset, stages, as_released, batch_size, progress)
        started = time.perf_counter()
        for row in tqdm(
            run_epochs(layers, optimizer, tokens, masks, text, orders),
            "training", epochs, initial=len(log), unit="epoch", disable=not progress,
        ):  # fmt: skip
            seconds = round(time.perf_counter() - started, 3)
            log.append({"epoch": len(log) + 1} | row | {"seconds": seconds})
            if folder is not None:
                _save(folder, layers, optimizer, log)
            started = time.perf_counter()
    checkpoints = [_checkpoint(folder, row["epoch"]) for row in log] if folder else []
    return Training(layers.eval().requires_grad_(False), pd.DataFrame(log), checkpoints)


def run_epochs(
    layers: LinearLayers,
    optimizer: torch.optim.Optimizer,
    tokens: FrozenTokens,
    masks: torch.Tensor,
    text: torch.Tensor,
    orders: Iterable[torch.Tensor],
) -> Iterator[dict[str, float]]:
    """The training itself: an epoch for each order of the images, and after each its mean losses.

    ``masks``: M x S x S of all images; ``text``: M x C x 2, the unit text vectors of each image's category;
    ``orders``: M image numbers each. Raises ValueError when a loss is not finite.
    """
    for order in orders:
        losses = []
        for which, x in tokens.batches(order):
            mask = masks[which].to(text.device)
            maps = linear_maps(layers, x, text[which], mask.shape[-1])
            focal, dice = (per_stage.sum() for per_stage in stage_losses(maps, mask))
            loss = focal + dice
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(torch.stack([loss, focal, dice]).detach())
        mean = torch.stack(losses).mean(dim=0)
        if not torch.isfinite(mean).all():
            raise ValueError(
                "the loss is not finite: try a smaller learning_rate; the checkpoints of earlier epochs are unharmed"
            )
        yield dict(zip(("loss", "focal", "dice"), mean.tolist(), strict=True))


def _settings(backbone: Backbone, dataset: Dataset, prompts: Prompts, **options) -> dict[str, Any]:
    """All that decides the weights, as it will be read back."""
    check_method(options["rvs"], options["rvs_options"])
    of_data = {"dataset": dataset.name, "categories": dataset.categories}
    of_data |= {"samples": fingerprint(dataset), "prompts": asdict(prompts)}
    return json.loads(json.dumps(backbone.settings | of_data | options))


def _text_of(backbone, dataset, prompts, rvs, rvs_options) -> torch.Tensor:
    """M x C x 2 on the backbone's device: the text vectors of every image's category."""
    vectors = {
        category: representative_vectors(backbone, category, prompts, rvs, **rvs_options)
        for category in dataset.categories
    }
    return torch.stack([vectors[sample.category] for sample in dataset]).to(backbone.device)


def _order(count: int, shuffle: bool, seed: int, epoch: int) -> torch.Tensor:
    if not shuffle:
        return torch.arange(count)
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


class FrozenTokens:
    """The patch tokens x_j of a data set: computed once and kept in memory where all fit into ``MEMORY`` bytes, else
    computed anew in every epoch (measured on a busy CPU: 7.4 s instead of 0.9 s an epoch of the demo's 320 images)."""

    MEMORY = 8e9

    def __init__(self, backbone, dataset, stages, as_released, batch_size, progress=False):
        self.backbone, self.samples, self.batch_size = backbone, list(dataset), batch_size
        self.stages, self.as_released = stages, as_released
        self.kept = None
        width, patches = backbone.visual.proj.shape[0], math.prod(backbone.visual.grid_size)
        if len(dataset) * len(stages) * patches * width * 4 <= self.MEMORY:
            kept = [torch.empty(len(dataset), patches, width) for _ in stages]
            everything = self.batches(torch.arange(len(dataset)))
            total = math.ceil(len(dataset) / batch_size)
            for which, tokens in tqdm(
                everything, "frozen features", total, unit="batch", disable=not progress
            ):
                for stage, values in zip(kept, tokens, strict=True):
                    stage[which] = values.cpu()
            self.kept = kept

    def batches(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """(which images, per stage B x N x D on the backbone's device), in an order of image numbers."""
        parts = order.split(self.batch_size)
        if self.kept is not None:
            for which in parts:
                yield which, [stage[which].to(self.backbone.device) for stage in self.kept]
            return
        images = load_images(
            [self.samples[i] for i in order], self.backbone.preprocess, self.batch_size
        )
        for which, batch in zip(parts, images, strict=True):
            found = in_parts(self._encode, batch.to(self.backbone.device))
            yield which, [torch.cat(stage) for stage in zip(*found, strict=True)]

    def _encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():  # float32 on a GPU, too: training then ends near where a CPU's does
            found = staged_features(self.backbone.visual, images, self.stages, self.as_released)
        return [tokens[:, 1:] for tokens in found.ordinary]


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
    try:
        if path.suffix == ".safetensors":
            state, settings, _ = _read(path)
            state = {key: value for key, value in state.items() if not key.startswith("adam.")}
        else:
            content, settings = read_content(path), {}
            if not isinstance(content.get("linear_layers"), dict):
                found = ", ".join(map(str, content)) or "nothing"
                raise ValueError(f"it has to hold 'linear_layers': a state dict; found {found}")
            state = dict(content["linear_layers"])
        layers = _from_state(state)
    except ValueError as error:
        raise ValueError(f"{path} holds no linear layers: {error}") from error
    layers.settings = settings
    return layers


def _from_state(state: dict[str, torch.Tensor]) -> LinearLayers:
    first = state.get("fc.0.weight", torch.empty(0))
    if first.ndim != 2:
        found = ", ".join(state) or "nothing"
        raise ValueError(
            f"expected fc.0.weight (C x D), fc.0.bias, fc.1.weight, ...; found {found}"
        )
    layers = LinearLayers(first.shape[1], first.shape[0], len(state) // 2)
    fill(layers, state)
    return layers.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict, list[dict]]:
    """Tensors, settings and log rows of a checkpoint of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        settings, log = metadata.get("settings", "{}"), metadata.get("log", "[]")
        return state, json.loads(settings), json.loads(log)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"it is no safetensors file, or a damaged one: {error}") from error


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:03d}.safetensors"


def _save(folder: Path, layers: LinearLayers, optimizer, rows: list[dict]) -> None:
    """Layers, Adam's state and the log in one file, so that no kill can leave two that disagree."""
    state = {key: value.cpu().contiguous() for key, value in layers.state_dict().items()}
    for name, parameter in layers.named_parameters():
        for kind in ADAM:
            state[f"adam.{kind}.{name}"] = optimizer.state[parameter][kind].cpu().contiguous()
    metadata = {"settings": json.dumps(layers.settings, sort_keys=True), "log": json.dumps(rows)}
    write_atomically(_checkpoint(folder, rows[-1]["epoch"]), save(state, metadata))
    write_atomically(folder / "log.csv", pd.DataFrame(rows).to_csv(index=False))


def _resume(folder: Path, layers: LinearLayers, optimizer, epochs: int) -> list[dict]:
    """Put the newest checkpoint of at most ``epochs`` epochs into layers and optimizer; its log rows, [] if none."""
    settings = layers.settings
    for path in sorted(folder.glob("epoch_*.safetensors"), reverse=True):
        try:
            state, found, rows = _read(path)
        except ValueError:
            warnings.warn(
                f"{path.name} is damaged: the training continues from an earlier epoch",
                stacklevel=3,
            )
            continue
        require_same_settings(folder, found, settings, "a training with")
        if len(rows) > epochs:
            continue
        layers.load_state_dict({name: state[name] for name in layers.state_dict()})
        names = [name for name, _ in layers.named_parameters()]
        adam = [{kind: state[f"adam.{kind}.{name}"] for kind in ADAM} for name in names]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(enumerate(adam))})
        return rows
    return []
