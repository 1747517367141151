"""Training of SDP+'s linear layers on another data set, and checkpoints (paper section 3.3, METHOD.md section 6)."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from clipad.backbone import Backbone
from clipad.datasets import Dataset
from clipad.detectors import SDP
from clipad.dual_path import staged_features
from clipad.evaluation import batches, fingerprint, in_parts, read_masks
from clipad.io.checkpoints import fill, read_content
from clipad.io.files import claim, write_atomically
from clipad.linear_layers import LinearLayers, linear_maps, stage_losses
from clipad.prompts import Prompts


@dataclass
class Training:
    """What a training left: the layers after the last epoch, a file per epoch, and a row per epoch: epoch, loss, focal,
    dice (sums over stages, means over the epoch's batches)."""

    layers: LinearLayers
    log: pd.DataFrame
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

    The defaults are the released program's, which does not shuffle; ``shuffle`` draws an order per epoch. ``prompts``,
    ``rvs`` and ``rvs_options`` are a detector's, for the text vectors of ``dataset``.
    ``output_dir``: a checkpoint per epoch (``epoch_001.safetensors``), ``log.csv``, and Adam's state (``last.pt``);
    None: nothing is kept. The same call, or one with more ``epochs``, continues after the last finished one; on a CPU
    it ends with the weights of an unbroken training. Patch tokens are held in memory: 3 MB an image at 240 pixels.

    Raises ValueError for data without the masks to learn from, options out of range, a loss that is not finite, or
    an ``output_dir`` that holds a training with other settings; OSError where it cannot be written.
    """
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError("epochs and batch_size have to be 1 or more, and learning_rate positive")
    if not dataset.has_masks or any(s.label < 0 for s in dataset):
        raise ValueError(f"layers learn from masks, which not all defects of {dataset.name} have")
    sdp = SDP(backbone, prompts, rvs, rvs_options, as_released=as_released)
    layers = LinearLayers(*backbone.visual.proj.shape, len(sdp.stages), seed).to(backbone.device)
    settings = sdp.settings | {
        "dataset": dataset.name, "categories": dataset.categories, "samples": fingerprint(dataset), "seed": seed,
        "learning_rate": learning_rate, "batch_size": batch_size, "shuffle": shuffle,
    }  # fmt: skip
    layers.settings = json.loads(json.dumps(settings))  # as it will be read back
    optimizer = torch.optim.Adam(layers.parameters(), lr=learning_rate)
    folder, log = Path(output_dir) if output_dir else None, []
    if folder:
        claim(folder, layers.settings, ["epoch_*"])
        log = _resume(folder, layers, optimizer, epochs)
    if len(log) < epochs:
        text = torch.stack([sdp.text_vectors(s.category) for s in dataset]).to(backbone.device)
        masks = torch.from_numpy(read_masks(list(dataset), backbone.image_size))
        tokens = frozen_tokens(sdp, dataset, batch_size, progress)
    left = range(len(log) + 1, epochs + 1)
    for epoch in tqdm(left, "training", unit="epoch", disable=not progress):
        order = np.arange(len(dataset))
        if shuffle:
            order = np.random.default_rng([seed, epoch]).permutation(order)
        steps = torch.from_numpy(order).split(batch_size)
        log.append({"epoch": epoch} | run_epoch(layers, optimizer, tokens, masks, text, steps))
        if folder:
            _save(folder, layers, optimizer, log)
    checkpoints = [_checkpoint(folder, row["epoch"]) for row in log] if folder else []
    return Training(layers.eval().requires_grad_(False), pd.DataFrame(log), checkpoints)


def run_epoch(layers: LinearLayers, optimizer, tokens, masks, text, batches) -> dict[str, float]:
    """One step for each batch of image numbers; returns the mean losses.

    ``tokens``: J x M x N x D of all images; ``masks``: M x S x S; ``text``: M x C x 2, the unit text vectors of each
    image's category. Raises ValueError when a loss is not finite.
    """
    losses = []
    for which in batches:
        mask = masks[which].to(text.device)
        x = [stage[which].to(text.device) for stage in tokens]
        maps = linear_maps(layers, x, text[which], mask.shape[-1])
        focal, dice = (per_stage.sum() for per_stage in stage_losses(maps, mask))
        loss = focal + dice
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(torch.stack([loss, focal, dice]).detach())
    mean = torch.stack(losses).mean(dim=0)
    if not torch.isfinite(mean).all():
        raise ValueError("the loss is not finite: try a smaller learning_rate")
    return dict(zip(("loss", "focal", "dice"), mean.tolist(), strict=True))


def frozen_tokens(sdp: SDP, dataset: Dataset, batch_size: int, progress=False) -> torch.Tensor:
    """The patch tokens x_j of a whole data set, computed once: J x M x N x D float32, on the CPU."""
    backbone = sdp.backbone

    @torch.no_grad()  # float32 on a GPU, too: training then ends near where a CPU's does
    def encode(images):
        found = staged_features(backbone.visual, images, sdp.stages, sdp.as_released)
        return torch.stack([tokens[:, 1:] for tokens in found.ordinary])

    width, patches = backbone.visual.proj.shape[0], math.prod(backbone.visual.grid_size)
    kept, start = torch.empty(len(sdp.stages), len(dataset), patches, width), 0
    found = batches(backbone, dataset, batch_size)
    for _, images in tqdm(found, "frozen features", unit="batch", disable=not progress):
        for part in in_parts(encode, images):
            kept[:, start : start + part.shape[1]] = part
            start += part.shape[1]
    return kept


def load_layers(path: str | Path) -> LinearLayers:
    """Layers from a checkpoint of ours (``.safetensors``) or of the released program (a file of ``torch.save``).

    The released format is ``{"linear_layers": state_dict}`` with keys ``fc.{i}.weight`` (C x D) and ``fc.{i}.bias``.
    Pickled code is never executed.

    Raises FileNotFoundError, or ValueError for anything else than such a checkpoint.
    """
    path, metadata = Path(path), {}
    try:
        content = read_content(path)
        state = content.get("linear_layers", content)
        first = state.get("fc.0.weight")
        if first is None or first.ndim != 2:
            expected = "fc.0.weight (C x D), fc.0.bias, fc.1.weight, ... in 'linear_layers'"
            raise ValueError(f"expected {expected}; found {', '.join(state) or 'nothing'}")
        layers = LinearLayers(first.shape[1], first.shape[0], len(state) // 2)
        fill(layers, state)
    except ValueError as error:
        raise ValueError(f"{path} holds no linear layers: {error}") from error
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    layers.settings = json.loads(metadata.get("settings", "{}"))
    return layers.eval().requires_grad_(False)


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:03d}.safetensors"


def _save(folder: Path, layers: LinearLayers, optimizer, log: list[dict]) -> None:
    """The epoch's layers, and then what says that they are complete: Adam's state and the log."""
    state = {key: value.cpu().contiguous() for key, value in layers.state_dict().items()}
    settings = {"settings": json.dumps(layers.settings, sort_keys=True)}
    write_atomically(_checkpoint(folder, len(log)), save(state, settings))
    buffer = io.BytesIO()
    torch.save({"adam": optimizer.state_dict(), "log": log}, buffer)
    write_atomically(folder / "last.pt", buffer.getvalue())
    write_atomically(folder / "log.csv", pd.DataFrame(log).to_csv(index=False))


def _resume(folder: Path, layers: LinearLayers, optimizer, epochs: int) -> list[dict]:
    """Put the last epoch, at most ``epochs``, into layers and optimizer; its log rows, [] if none."""
    if not (folder / "last.pt").is_file():
        return []
    last = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    log = last["log"][:epochs]
    if not _checkpoint(folder, len(log)).is_file():
        return []
    layers.load_state_dict(load_layers(_checkpoint(folder, len(log))).state_dict())
    optimizer.load_state_dict(last["adam"])
    return log
