"""P1-P3: the pixel metrics against scikit-learn, a plain exact PRO, and (optional) anomalib and ADEval."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from benchmarks import references
from benchmarks.measure import Row, interleaved, largest_difference, numpy_peak, ratio, times_note
from clipad.metrics import pixel_metrics


def made_maps(images: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth float32 maps in (0, 1) and masks of which about 2.5 % is anomalous, as in industrial data sets."""
    rng = np.random.default_rng(0)
    masks = np.zeros((images, side, side), dtype=bool)
    maps = np.empty((images, side, side), dtype=np.float32)
    for i in range(images):
        for _ in range(i % 3):  # a third of the images is normal
            height, width = rng.integers(side // 10, side // 4, 2)
            y, x = rng.integers(0, side - height), rng.integers(0, side - width)
            masks[i, y : y + height, x : x + width] = True
        noise = ndimage.gaussian_filter(rng.normal(size=(side, side)), side / 40)
        maps[i] = noise / noise.std() + 1.5 * ndimage.gaussian_filter(
            masks[i].astype(float), side / 60
        )
    # Into (0, 1), where torchmetrics does not apply a sigmoid of its own.
    return (1 / (1 + np.exp(-maps))).astype(np.float32), masks


class Peers:
    """The other interpreter: loads the arrays once, then answers with seconds and values."""

    def __init__(self, python: str, scores: np.ndarray, masks: np.ndarray):
        self._folder = tempfile.TemporaryDirectory()
        paths = [str(Path(self._folder.name) / name) for name in ("scores.npy", "masks.npy")]
        for path, array in zip(paths, (scores, masks), strict=True):
            np.save(path, array)
        script = Path(__file__).with_name("peers.py")
        # Not in the project's folder, so that it sees the packages of its own environment only.
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(script), *paths, str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._folder.name,
        )  # fmt: skip
        self.values: dict[str, dict[str, float]] = {}

    def run(self, name: str) -> tuple[float, float]:
        """(wall, processor) seconds; RuntimeError with the peer's own words if it failed."""
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the interpreter of the peers ended with status {self._process.wait()}"
            )
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        self.values[name] = found["values"]
        return found["wall"], found["cpu"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def rows(quick: bool, peers_python: str | None) -> Iterator[Row]:
    scores, masks = made_maps(20 if quick else 200, 60 if quick else 240)
    reference = {}

    def plain():
        reference.update(
            references.scikit_learn_three(scores, masks), pro=references.exact_pro(scores, masks)
        )

    forms = {"ours": lambda: pixel_metrics(scores, masks) and None, "plain": plain}
    times = interleaved(forms)
    size = (
        f"{len(scores)} maps of {scores.shape[1]} x {scores.shape[2]}, {masks.mean():.1%} anomalous"
    )
    yield Row(
        "P1", f"four pixel metrics, {size}: scikit-learn (three) + plain exact PRO / ours",
        ratio(times["plain"], times["ours"]), "x", 40, at_least=True, note=times_note(times["plain"], times["ours"]),
    )  # fmt: skip
    ours = pixel_metrics(scores, masks)
    yield from _peer_rows(scores, masks, ours, peers_python)

    three = ("auroc", "f1_max", "ap")
    yield Row(
        "P2", "largest difference from scikit-learn (AUROC, F1-max, AP)",
        max(abs(ours[k] - reference[k]) for k in three), "", 1e-12, agreement=True,
    )  # fmt: skip
    yield Row(
        "P2",
        "difference from the plain exact PRO",
        abs(ours["pro"] - reference["pro"]),
        "",
        1e-8,
        agreement=True,
    )
    changed = [
        pixel_metrics(f(scores.astype(np.float64)), masks).values()
        for f in (np.exp, np.cbrt, lambda s: -1 / s)
    ]
    yield Row(
        "P2", "largest change under strictly monotone maps of the scores (exp, cube root, -1/s)",
        max(largest_difference(values, ours.values()) for values in changed), "", 1e-9, agreement=True,
    )  # fmt: skip
    yield Row(
        "P3", "memory of the metrics besides the caller's arrays",
        numpy_peak(lambda: pixel_metrics(scores, masks)) / scores.size, " bytes/pixel", 8,
    )  # fmt: skip


def _peer_rows(scores, masks, ours, peers_python) -> Iterator[Row]:
    peers = {  # name -> (what it computes, the bar of the speed-up)
        "anomalib": ("anomalib's four metrics / ours", 30),
        "adeval": ("ADEval's three binned metrics (no F1-max) / our four", 1),
    }
    if peers_python is None:
        for what, bar in peers.values():
            yield Row("P1", what, None, "x", bar, True, note="no --peers-python given")
        yield Row(
            "P2", "difference from anomalib's AUPRO", None, "", 1e-6, note="no --peers-python given"
        )
        return
    with Peers(peers_python, scores, masks) as other:
        for name, (what, bar) in peers.items():
            try:
                times = interleaved(
                    {
                        "ours": lambda: pixel_metrics(scores, masks) and None,
                        "peer": lambda name=name: other.run(name),
                    }
                )
            except (RuntimeError, OSError) as error:
                yield Row("P1", what, None, "x", bar, True, note=str(error))
                continue
            note = times_note(times["peer"], times["ours"])
            yield Row("P1", what, ratio(times["peer"], times["ours"]), "x", bar, True, note=note)
        pro = other.values.get("anomalib", {}).get("pro")
        yield Row(
            "P2", "difference from anomalib's AUPRO", None if pro is None else abs(pro - ours["pro"]), "", 1e-6,
            agreement=True, note="" if pro is not None else "anomalib did not run",
        )  # fmt: skip
