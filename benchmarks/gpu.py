"""``python -m benchmarks.gpu``: what a GPU gives, in under six minutes, for the table in ``benchmarks/README.md``.

On ViT-B-16-plus-240 with random weights (speed does not depend on their values): images a second of each detector in
float32 and in the half precision of this device, at batches of 1, 16, 64, with the memory it took, and the staged dual
path against open_clip's ``encode_image``. ``--device cpu --model demo --batches 1`` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from clipad.backbone import load_backbone
from clipad.detectors import SDP, ClipSurgery, Direct, SDPPlus
from clipad.dual_path import staged_features
from clipad.linear_layers import LinearLayers
from clipad.winclip import WinCLIP

REPEATS, SECONDS = 5, 1.0
"""repeats of each measurement, and how long one lasts at most once it has run three times"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="", help="empty: the accelerator that torch sees")
    parser.add_argument("--model", default="ViT-B-16-plus-240")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    chosen = parser.parse_args(arguments)
    backbone = load_backbone(chosen.model, device=chosen.device)
    rows = []
    for half in (False, True):
        if half and backbone.device.type == "cpu":
            continue
        dtype = torch.get_autocast_dtype(backbone.device.type) if half else torch.float32
        with contextlib.nullcontext() if half else _float32(backbone):
            for batch in chosen.batches:
                images = torch.randn(batch, 3, backbone.image_size, backbone.image_size)
                images = images.to(backbone.device)
                for name, call in _calls(backbone, images):
                    seconds, megabytes = _measure(call, backbone.device)
                    rows.append(
                        (name, str(dtype).removeprefix("torch."), batch, batch / seconds, megabytes)
                    )
    table = pd.DataFrame(
        rows, columns=["what", "type", "batch", "images a second", "MB above the weights"]
    )
    text = f"{_machine(backbone)}\n\n{_markdown(table)}\n"
    print(text)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "gpu.md").write_text(text, encoding="utf-8")
    return 0


@contextlib.contextmanager
def _float32(backbone):
    """Without mixed precision."""
    cast = backbone.tower
    backbone.autocast, backbone.tower = contextlib.nullcontext, backbone.visual
    try:
        yield
    finally:
        del backbone.autocast
        backbone.tower = cast


def _calls(backbone, images):
    """(name, call) of everything that is measured; nothing is a detector's text, which costs the same everywhere."""
    visual = backbone.visual
    text = torch.nn.functional.normalize(torch.randn(visual.proj.shape[1], 2), dim=0)
    layers = LinearLayers(*visual.proj.shape, 4)
    detectors = [
        Direct(backbone),
        ClipSurgery(backbone),
        SDP(backbone),
        SDPPlus(backbone, layers),
        WinCLIP(backbone),
    ]

    def encode():
        with torch.no_grad(), backbone.autocast():
            return backbone.tower(images)

    def staged():
        with torch.no_grad(), backbone.autocast():
            return staged_features(backbone.tower, images)

    yield "encode_image", encode
    yield "staged_features", staged
    for detector in detectors:
        yield detector.name, lambda d=detector: d.score_with(d.features(images), text)


def _measure(call, device: torch.device) -> tuple[float, float]:
    """Median seconds of a call, and the peak of the memory it took (NaN where torch does not count it)."""
    call()  # what is made once is made now
    counts = device.type == "cuda"
    if counts:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times, begun = [], time.perf_counter()
    while len(times) < REPEATS and (len(times) < 3 or time.perf_counter() - begun < SECONDS):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if counts else float("nan")
    return statistics.median(times), peak


def _machine(backbone) -> str:
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{name}; {backbone.name} at {backbone.image_size} pixels, {backbone.pretrained}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * table.shape[1]]
    lines += [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
        for row in table.to_numpy().tolist()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
