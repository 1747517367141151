"""P4, P12-P14: evaluate() in memory and time: what it holds, what waits, what stays the same."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import psutil
import torch
import torch.nn.functional as F

from benchmarks.measure import REPEATS, Row, largest_difference, numpy_peak, seconds
from clipad.backbone import Backbone, load_backbone
from clipad.detectors import SDP
from clipad.evaluation import batches, evaluate
from clipad.io.images import read_image
from tests.conftest import tiny_clip
from tests.small_data import files_of, make_folder

STEP = 64  # images between two looks at the memory


def rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from _memory(Path(folder) / "memory", quick)
        yield _loading(Path(folder) / "loading", quick)
        yield from _same_bytes(Path(folder) / "bytes")
    yield _batch_sizes(quick)


def _tiny(image_size: int) -> SDP:
    """A detector whose network costs nothing beside its maps."""
    model = tiny_clip(image_size=image_size, patch_size=image_size // 4)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    backbone = Backbone(
        model, tokenizer, name="tiny", pretrained="random", mean=(0.5,) * 3, std=(0.3,) * 3
    )
    return SDP(backbone, rvs="mean")


def _memory(folder: Path, quick: bool) -> Iterator[Row]:
    count, side = (4 if quick else 8) * STEP, 240
    names = ("bolt", "gear", "nut", "pin")
    data = make_folder(folder, names, normal=count - 16, anomalous=16, side=30)
    detector = _tiny(side)
    predict, process = detector.predict, psutil.Process()
    done, resident = 0, []

    def watched(images, category):
        nonlocal done
        if done % STEP == 0:
            resident.append(process.memory_info().rss)
        done += len(images)
        return predict(images, category)

    detector.predict = watched
    evaluate(detector, data.select(names[:3]), progress=False)
    # From step to step, in the second half of each category: until then the allocator makes pools that stay.
    steps = np.diff(np.reshape(resident, (3, -1)), axis=1)[:, count // STEP // 2 :]
    growth = float(np.median(steps)) / STEP / 1024
    own = side * side * 4 / 1024
    freed = growth < 0.95 * own  # impossible, unless the process gave other memory back meanwhile
    yield Row(
        "P4", f"memory that grows with each {side} x {side} image while a category runs, results kept in memory",
        None if freed else growth, " KiB/image", 260,
        note="other memory was freed meanwhile" if freed else f"{count} images; the map itself is {own:.0f} KiB",
    )  # fmt: skip
    two, four = (
        numpy_peak(lambda n=n: evaluate(detector, data.select(names[:n]), progress=False))
        for n in (2, 4)
    )
    yield Row(
        "P4", "largest memory of arrays in a run over four categories / over two", four / two, "x", 1.1,
        note=f"{four / 2**20:.0f} against {two / 2**20:.0f} MiB, at the end of a category: "
        f"{two / count / 1024:.0f} KiB for each of its images, masks and metrics included",
    )  # fmt: skip


def _loading(folder: Path, quick: bool) -> Row:
    """A stand-in for a device: it needs for an image as long as one thread needs to read it, and no processor."""
    data = make_folder(folder, ["bolt"], normal=16 if quick else 128, anomalous=0, side=400)
    samples, backbone = list(data), load_backbone("demo", device="cpu")
    shares, each = [], 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        for sample in samples[:16]:
            backbone.preprocess(read_image(sample.image_path))
        each = (time.perf_counter() - start) / 16
        start, busy = time.perf_counter(), 0.0
        for _, images in batches(backbone, samples, batch_size=8):
            began = time.perf_counter()
            time.sleep(each * len(images))
            busy += time.perf_counter() - began
        shares.append(1 - busy / (time.perf_counter() - start))
    return Row(
        "P12", "share of the time that a device as fast as one reading thread waits for images, four workers",
        statistics.median(shares), "", 0.1, note=f"{seconds(each)} an image; without overlap it would be 0.5",
    )  # fmt: skip


def _same_bytes(folder: Path) -> Iterator[Row]:
    """Results of two runs, and of runs that were stopped at each of their batches, as files."""
    data, detector = make_folder(folder / "data"), _tiny(32)
    predict = detector.predict
    done: list[str] = []
    stop_at = None

    def stopping(images, category):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(category)
        return predict(images, category)

    detector.predict = stopping

    def run(name):
        done.clear()
        evaluate(detector, data, folder / name, batch_size=2, progress=False)
        return files_of(folder / name)

    whole = run("whole")
    batches = len(done)
    different = int(run("again") != whole)
    yield Row("P13", "files that differ between two runs", different, "", 0, agreement=True)
    wrong, repeated = 0, 0
    for batch in range(batches):
        stop_at = batch
        try:
            run(f"stopped {batch}")
        except KeyboardInterrupt:
            finished = {
                category
                for category in done
                if (folder / f"stopped {batch}" / "categories" / f"{category}.npz").is_file()
            }
        stop_at = None
        wrong += run(f"stopped {batch}") != whole
        repeated += len(finished & set(done))
    yield Row(
        "P13", f"runs with other bytes after a stop at each of {batches} batches and a restart",
        wrong, "", 0, agreement=True, note="tests/test_evaluation.py does the same with SIGKILL",
    )  # fmt: skip
    yield Row(
        "P13", "finished categories that were computed again", repeated, "", 0, agreement=True
    )


def _batch_sizes(quick: bool) -> Row:
    torch.manual_seed(0)
    model = (
        load_backbone("demo", device="cpu")
        if quick
        else load_backbone("ViT-B-16-plus-240", device="cpu")
    )
    detector = SDP(model, rvs="mean")
    images = torch.randn(17, 3, model.image_size, model.image_size)
    text = F.normalize(torch.randn(model.visual.proj.shape[1], 2), dim=0)

    def scores(size):
        found = [detector.score_with(detector.features(part), text) for part in images.split(size)]
        return torch.cat([p.maps for p in found]), torch.cat([p.probabilities for p in found])

    by_one = scores(1)
    worst = max(largest_difference(scores(size), by_one) for size in (3, 16))
    return Row(
        "P14", f"largest difference of maps and probabilities, batches of 3 and 16 against 1, {model.name}",
        worst, "", 1e-5, agreement=True,
    )  # fmt: skip
