"""``clipad detect``: from a folder of photographs, and a few flawless ones, to a verdict and a region per image.

The numbers are :mod:`clipad.studies.inspection`'s. First the model looks at every image and its map is kept, so that a
stopped run continues; then maps become pictures and rows of the table. Memory does not grow with the photographs.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from clipad.io.files import (
    RESULT_MARK,
    claim,
    code_version,
    content_hash,
    file_name,
    printable,
    write_arrays,
    write_atomically,
)
from clipad.metrics import image_metrics
from clipad.published import data_dir
from clipad.studies.common import exact_share
from clipad.studies.inspection import Inspector, Look, require_enough, without_specks
from clipad.tools import report
from clipad.tools.photographs import Images, read_photograph

BATCH = 16
THREADS = 4
# Folders of the results, a file per image in each (masks: where there is a region).
ENDINGS = {"images": ".jpg", "overlays": ".jpg", "heat": ".png", "masks": ".png", "maps": ".npz"}


def detect(
    detector,
    images: Images,
    object_name: str,
    output_dir: str | Path,
    false_alarms: float = 0.05,
    neighbours: str = "no",
    tiles: int = 1,
) -> report.Report:
    """Score photographs, and write report.html, scores.csv, scores.json and pictures; a stopped call continues.

    ``images``: of :func:`clipad.tools.photographs.collect`. With flawless images every image gets a verdict at about
    this false-alarm rate; without them a score (the logit) but none. ``neighbours``, ``tiles``: see
    :class:`clipad.studies.inspection.Inspector`. EXIF orientation is applied.

    Raises ValueError or OSError, before the first image is scored, for too few flawless images and for an output
    folder with other settings or other files.
    """
    inspector = Inspector(detector, object_name, neighbours, tiles)
    detector.text_vectors(object_name)  # an empty name is refused before anything is written
    if images.flawless:
        require_enough(len(images.flawless), false_alarms)
    elif neighbours != "no":
        raise ValueError("nearest neighbours need flawless images: give a folder (--normal)")
    settings = _settings(inspector, images, false_alarms)
    work = _Work(inspector, images.root, _own(Path(output_dir), settings))
    notes = list(images.notes)
    if images.flawless:
        looks = work.looks(images.flawless, "flawless images", copy=False)
        inspector.fit((look for _, look in looks), false_alarms)
        unread, work.unread = work.unread, {}
        notes += [f"flawless, but not used: {printable(p.name)}: {w}" for p, w in unread.items()]
    if before := work.keep_maps(list(images.labels)):
        notes.append(f"{before} of {len(images.labels)} images were finished before, skipped")
    scale, scores = work.table(images.labels)
    found = report.Report(
        scores=scores,
        scale=scale,
        unread={printable(work.name(path)): why for path, why in work.unread.items()},
        skipped=images.skipped,
        notes=notes + _notes(scores, inspector),
        settings=settings,
        rule=inspector.rule,
        warning=demo_warning(detector, images.labels),
        observed=_observed(scores),
    )
    report.write_report(found, work.folder, detector.backbone)
    work.remove_others(scores)
    return found


def _settings(inspector: Inspector, images: Images, false_alarms: float) -> dict:
    hashes = "".join(map(content_hash, images.flawless))
    return inspector.detector.settings | {
        "object": inspector.name,
        "images": printable(images.root.name),
        "neighbours": inspector.neighbours,
        "tiles": inspector.tiles,
        "flawless": hashlib.sha256(hashes.encode()).hexdigest()[:16],
        "false_alarms": false_alarms if images.flawless else None,
        "code": code_version(),
    }


def _own(folder: Path, settings: dict) -> Path:
    """The output folder for results of these settings. ValueError if it holds any other content."""
    folder = folder.expanduser().absolute()
    mark = folder / RESULT_MARK
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise ValueError(f"{folder} holds files that are not ours: choose another --out")
    claim(folder, settings, ["maps"], option="--out")
    write_atomically(mark, b"")
    return folder


def demo_warning(detector, photographs) -> str:
    """Empty, or what has to be said first: the demo model on pictures that are not the demo's, by content."""
    shipped = {content_hash(p) for p in (data_dir() / "demo" / "collections").glob("*/*/test/*/*")}
    if detector.backbone.name != "demo" or all(content_hash(p) in shipped for p in photographs):
        return ""
    return (
        "These scores mean nothing: the demo model is a 96-pixel toy that was trained on rendered pictures, and these "
        "pictures are not the demo's. Name a real model, as in --model ViT-B-16-plus-240 --pretrained laion400m_e31."
    )


@dataclass
class _Work:
    """The passes over the images, and the files that are kept of each."""

    inspector: Inspector
    root: Path
    folder: Path
    unread: dict[Path, str] = field(default_factory=dict)  # image -> why

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def file(self, kind: str, path: Path) -> Path:
        return self.folder / kind / (file_name(self.name(path)) + ENDINGS[kind])

    def looks(self, paths: list[Path], what: str, copy: bool) -> Iterator[tuple[dict, Look]]:
        """Of each batch path -> facts, and what the model sees; images that cannot be read go to ``unread``."""
        with ThreadPoolExecutor(THREADS) as readers:
            for start in tqdm(range(0, len(paths), BATCH), what, unit="batch", disable=None):
                group = paths[start : start + BATCH]
                found = zip(group, readers.map(partial(self._load, copy=copy), group), strict=True)
                read = {path: loaded for path, loaded in found if loaded}
                if read:
                    tensors, facts = zip(*read.values(), strict=True)
                    look = self.inspector.look(torch.stack(tensors))
                    yield dict(zip(read, facts, strict=True)), look

    def _load(self, path: Path, copy: bool) -> tuple[torch.Tensor, dict] | None:
        """What the model takes of an image, and facts. Writes the report's copy, if asked."""
        try:
            image, remarks = read_photograph(path)
            if image.getcolors(2):  # None if there are more
                raise ValueError("at most two grey levels, so a mask or empty")
        except (OSError, ValueError, MemoryError) as error:
            self.unread[path] = str(error).replace(f"{self.root}/", "")
            return None
        if copy:
            report.write_picture(self.file("images", path), image)
        facts = {"size": image.size, "remarks": ",".join(sorted(remarks))}
        return self.inspector.prepare(image), {"sha256": content_hash(path)} | facts

    def keep_maps(self, photographs: list[Path]) -> int:
        """Keep the map of every image that has none yet; returns how many had one."""
        todo = [path for path in photographs if not self._is_finished(path)]
        for facts, look in self.looks(todo, "photographs", copy=True):
            maps = self.inspector.maps(look)
            for (path, known), logit, heat in zip(facts.items(), look.logits, maps, strict=True):
                write_arrays(self.file("maps", path), known | {"logit": logit, "map": heat})
        return len(photographs) - len(todo)

    def _is_finished(self, path: Path) -> bool:
        try:
            with np.load(self.file("maps", path)) as kept:
                same = str(kept["sha256"]) == content_hash(path)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return False  # none, or a damaged one
        return same and self.file("images", path).is_file()

    def table(self, labels: dict[Path, int]) -> tuple[tuple[float, float], pd.DataFrame]:
        """The colours' scale, and a row per image that was read, highest score first; draws on the way."""
        paths = [path for path in labels if path not in self.unread]
        if not paths:
            path, why = next(iter(self.unread.items()))
            raise ValueError(f"not one of {len(labels)} images can be read; {path.name}: {why}")
        scale = self._scale(paths)
        with ThreadPoolExecutor(THREADS) as pool:
            rows = list(pool.map(lambda path: self._row(path, labels[path], scale), paths))
        table = pd.DataFrame(sorted(rows, key=lambda row: -row["score"]))
        return scale, table.drop(columns="label") if -1 in labels.values() else table

    def _scale(self, paths: list[Path]) -> tuple[float, float]:
        """From where to where the colours of maps go: from the flawless maps; without them the 1st to the 99.9th
        percentile over at most 32 images, spread over the folder."""
        if rule := self.inspector.rule:
            middle = float(np.median(self.inspector.flawless_maps[:, ::4, ::4]))
            return middle, middle + 1.5 * (rule.map_threshold - middle)
        maps = [np.load(self.file("maps", p))["map"] for p in paths[:: 1 + (len(paths) - 1) // 32]]
        low, high = np.percentile(maps, [1, 99.9])
        return float(low), float(high)

    def _row(self, path: Path, label: int, scale: tuple[float, float]) -> dict:
        rule = self.inspector.rule
        with np.load(self.file("maps", path)) as kept:
            heat, logit = kept["map"], float(kept["logit"])
            size, remarks = tuple(map(int, kept["size"])), str(kept["remarks"])
        highest = float(heat.max())
        score = rule.score(logit, highest) if rule else logit
        verdict = rule.verdict(score, highest) if rule else ""
        threshold = rule.map_threshold if rule else np.inf
        above = without_specks(heat, threshold)
        boxes, outlines = report.find_regions(above, threshold, size)
        layer = report.heat_layer(heat, scale)
        overlay = report.draw(self.file("images", path), layer, outlines)
        pictures = {"overlays": overlay, "heat": layer}
        if boxes:
            pictures["masks"] = report.region_mask(above, threshold, size)
        for kind, picture in pictures.items():
            report.write_picture(self.file(kind, path), picture)
        return {
            "image": printable(self.name(path)),
            "verdict": verdict,
            "score": score,
            "p_value": rule.p_value(score) if rule else None,
            "logit": logit,
            "map_max": highest,
            "regions": len(boxes),
            "area": float((above > threshold).mean()) if rule else None,
            "boxes": boxes,
            "width": size[0],
            "height": size[1],
            "label": label,
            "file": self.file("images", path).stem,
            "outlines": outlines,
            "remarks": remarks,
            "no_region": "" if boxes else report.NO_REGION.get(verdict, ""),
        }

    def remove_others(self, scores: pd.DataFrame) -> None:
        """Remove what is left of images that are gone, and of regions that are none any more."""
        for kind in ENDINGS:
            rows = scores[scores["regions"] > 0] if kind == "masks" else scores
            present = set(rows["file"])
            for path in self.folder.glob(f"{kind}/*"):
                if path.stem not in present:
                    path.unlink()


def _notes(scores: pd.DataFrame, inspector: Inspector) -> list[str]:
    """What was done to the images that a reader has to know."""
    turned, twelve = (scores["remarks"].str.contains(x).sum() for x in ("turned", "twelve bit"))
    sides = scores[["width", "height"]]
    long = (sides.max(axis=1) > 3 * sides.min(axis=1)).sum()
    grid = inspector.detector.backbone.visual.grid_size[0] * inspector.tiles
    width, height = sides.value_counts().index[0]
    said = [
        (turned, "images were turned as their EXIF orientation says"),
        (
            twelve,
            "images are 16-bit files with 12-bit values, nearly black as read: multiply by 16",
        ),
        (long, "images are more than three times as long as wide: squashed to a square"),
    ]
    return [f"{number} {what}" for number, what in said if number] + [
        f"the model reads {grid} x {grid} patches: one covers {width / grid:.0f} x {height / grid:.0f} pixels of an "
        f"image of {width} x {height} (the most frequent size); much smaller defects are hardly seen (--tiles)"
    ]


def _observed(scores: pd.DataFrame) -> dict[str, float] | None:
    """What the labels say: AUROC, and with verdicts false alarms and defects found, with exact 95 % intervals."""
    if "label" not in scores:
        return None
    found = {"auroc": float(image_metrics(scores["score"], scores["label"])["auroc"])}
    for label, what in ((0, "false_alarms"), (1, "defects_found")):
        verdicts = scores["verdict"][scores["label"] == label]
        if verdicts.any():
            share = exact_share(int((verdicts == "bad").sum()), len(verdicts))
            found |= {what: share.estimate, f"{what}_low": share.low, f"{what}_high": share.high}
    return {key: value for key, value in found.items() if not np.isnan(value)}
