"""``clipad detect``: from a folder of photographs, and a few flawless ones, to a verdict and a region per image.

What the numbers mean stands in :mod:`clipad.studies.inspection`; here are files: what is kept of each image, and how a
stopped run continues. First every image is looked at by the model and its map is kept; then maps become pictures and
rows of the table, each once. Memory does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from clipad.datasets import read_photograph, two_levels
from clipad.files import (
    RESULT_MARK,
    claim,
    code_version,
    content_hash,
    file_name,
    printable,
    require_writable,
    write_arrays,
    write_atomically,
)
from clipad.metrics import image_metrics
from clipad.published import data_dir
from clipad.studies.common import exact_share
from clipad.studies.inspection import Inspector, Look, require_enough, without_specks
from clipad.tools.photographs import Images
from clipad.tools.report import (
    COLUMNS,
    ONLY_DRAWN,
    Report,
    draw,
    find_regions,
    heat_layer,
    region_mask,
    write_picture,
    write_report,
)

BATCH = 16
READERS = 4
"""threads"""
ENDINGS = {"images": ".jpg", "overlays": ".jpg", "heat": ".png", "masks": ".png", "maps": ".npz"}
"""folders of the results, a file per image in each (masks: where there is a region)"""
DEMO_WARNING = (
    "These scores mean nothing: the demo model is a 96-pixel toy that was trained on rendered pictures, and these "
    "pictures are not the demo's. Name a real model, as in --model ViT-B-16-plus-240 --pretrained laion400m_e31."
)


def detect(
    detector,
    images: Images,
    object_name: str,
    output_dir: str | Path,
    false_alarms: float = 0.05,
    neighbours: str = "no",
    tiles: int = 1,
) -> Report:
    """Score photographs, and write report.html, scores.csv, scores.json and pictures.

    ``images``: see :func:`clipad.tools.photographs.collect`. Its flawless images set the scale and the threshold, so
    that every image gets a verdict at about the false-alarm rate asked for; without them a score (the logit) but none.
    ``neighbours`` and ``tiles``: see :class:`clipad.studies.inspection.Inspector`.

    EXIF orientation is applied, so that boxes and outlines lie on the picture as a viewer shows it. A stopped call
    continues: images are finished by their content. Raises ValueError or OSError, before the first image is scored,
    for anything that cannot work: too few flawless images, an output folder with other settings or other files.
    """
    if not object_name.strip():
        raise ValueError("the object has no name: a prompt needs one, such as 'metal nut'")
    inspector = Inspector(detector, object_name, neighbours, tiles)
    detector.text_vectors(object_name)
    if images.flawless:
        require_enough(len(images.flawless), false_alarms)
    elif neighbours != "no":
        raise ValueError("nearest neighbours need flawless images: give a folder (--normal)")
    settings = _settings(inspector, images, false_alarms)
    work = _Work(inspector, images.root, _own(Path(output_dir), settings))
    notes = list(images.notes)
    if images.flawless:
        looks = work.looks(images.flawless, "flawless images", copy=False)
        inspector.fit((look for look, _ in looks), false_alarms)
        unread, work.unread = work.unread, {}
        notes += [
            f"flawless, but not used: {printable(p.name)}: {why}" for p, why in unread.items()
        ]
    notes += work.keep_maps(list(images.labels))
    scale = work.scale([path for path in images.labels if path not in work.unread])
    scores = work.table(images.labels, scale)
    report = Report(
        scores=scores,
        scale=scale,
        unread={work.name(path): why for path, why in work.unread.items()},
        skipped=images.skipped,
        notes=notes + _notes(scores, inspector),
        settings=settings,
        rule=inspector.rule,
        warning=demo_warning(detector, images.labels),
        observed=_observed(scores),
    )
    write_report(report, work.folder, inspector)
    work.remove_others(scores)
    return report


def _settings(inspector: Inspector, images: Images, false_alarms: float) -> dict:
    """All that decides the numbers."""
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
    require_writable(folder)
    mark = folder / RESULT_MARK
    if any(folder.iterdir()) and not mark.is_file():
        raise ValueError(f"{folder} holds files that are not ours: choose another --out")
    write_atomically(mark, b"")
    claim(folder, settings, ["maps"], option="--out")
    return folder


def demo_warning(detector, photographs) -> str:
    """Empty, or what has to be said first: the demo model on pictures that are not the demo's, by content."""
    if detector.backbone.name != "demo":
        return ""
    shipped = {content_hash(p) for p in (data_dir() / "demo" / "collections").glob("*/*/test/*/*")}
    return "" if all(content_hash(path) in shipped for path in photographs) else DEMO_WARNING


class _Work:
    """The passes over the images, and the files that are kept of each. ``unread``: image -> why it has none."""

    def __init__(self, inspector: Inspector, root: Path, folder: Path):
        self.inspector, self.root, self.folder = inspector, root, folder
        self.unread: dict[Path, str] = {}

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.root).as_posix())

    def file(self, kind: str, path: Path) -> Path:
        name = file_name(path.relative_to(self.root).as_posix())
        return self.folder / kind / (name + ENDINGS[kind])

    def looks(
        self, paths: list[Path], what: str, copy: bool = True
    ) -> Iterator[tuple[Look, dict[Path, dict]]]:
        """Batches of images as the model sees them, with facts of each; those that cannot be read go to ``unread``."""
        with (
            ThreadPoolExecutor(READERS) as readers,
            tqdm(total=len(paths), desc=what, unit="image", disable=None) as bar,
        ):
            groups = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
            loads = (readers.map(lambda path: self._load(path, copy), group) for group in groups)
            following = next(loads, None)
            for group in groups:
                loaded, following = following, next(loads, None)  # read while the model computes
                tensors, facts = [], {}
                for path, (tensor, found) in zip(group, loaded, strict=True):
                    if tensor is None:
                        self.unread[path] = found
                    else:
                        tensors.append(tensor)
                        facts[path] = found
                if facts:
                    yield self._look(tensors, facts), facts
                bar.update(len(group))

    def _look(self, tensors: list[torch.Tensor], paths) -> Look:
        try:
            return self.inspector.look(torch.stack(tensors))
        except ValueError as error:
            names = ", ".join(printable(path.name) for path in list(paths)[:3])
            raise ValueError(f"{error}: one of {names}, ...") from error

    def _load(self, path: Path, copy: bool) -> tuple[torch.Tensor | None, dict | str]:
        """What the model takes of an image, and facts; or None, and why. Writes the report's copy, if asked."""
        try:
            image, remarks = read_photograph(path)
        except (OSError, ValueError, MemoryError) as error:
            return None, str(error).replace(f"{self.root}/", "")
        if two_levels(image):
            return None, "at most two grey levels, so a mask or empty"
        if copy:
            write_picture(self.file("images", path), image)
        facts = {
            "sha256": content_hash(path),
            "size": image.size,
            "remarks": ",".join(sorted(remarks)),
        }
        return self.inspector.prepare(image), facts

    def keep_maps(self, photographs: list[Path]) -> list[str]:
        """Keep the map of every image that has none yet; returns a note on those that have."""
        with ThreadPoolExecutor(READERS) as pool:
            finished = list(pool.map(self._is_finished, photographs))
        todo = [path for path, done in zip(photographs, finished, strict=True) if not done]
        for look, facts in self.looks(todo, "photographs"):
            maps = self.inspector.maps(look)
            for (path, known), logit, heat in zip(facts.items(), look.logits, maps, strict=True):
                write_arrays(self.file("maps", path), known | {"logit": logit, "map": heat})
        said = f"{sum(finished)} of {len(finished)} images were finished before, skipped"
        return [said] if any(finished) else []

    def _is_finished(self, path: Path) -> bool:
        try:
            with np.load(self.file("maps", path)) as kept:
                same = str(kept["sha256"]) == content_hash(path)
        except Exception:  # whatever is wrong with the file, its image is computed again
            return False
        return same and self.file("images", path).is_file()

    def scale(self, finished: list[Path]) -> tuple[float, float]:
        """From where to where the colours of maps go: from the flawless maps; without them the 1st to the 99.9th
        percentile over up to 32 images spread over the folder."""
        if rule := self.inspector.rule:
            middle = float(np.median(self.inspector.flawless_maps[:, ::4, ::4]))
            return middle, middle + 1.5 * (rule.map_threshold - middle)
        chosen = finished[:: max(1, len(finished) // 32)][:32]
        maps = [np.load(self.file("maps", path))["map"] for path in chosen]
        low, high = np.percentile(maps, [1, 99.9]) if maps else (0.0, 1.0)
        return float(low), float(high if high > low else low + 1)

    def table(self, labels: dict[Path, int], scale: tuple[float, float]) -> pd.DataFrame:
        """A row per image that was read, highest score first; draws its pictures on the way."""
        paths = [path for path in labels if path not in self.unread]
        with ThreadPoolExecutor(READERS) as pool:
            drawn = pool.map(lambda path: self._row(path, labels[path], scale), paths)
            rows = list(tqdm(drawn, "report", len(paths), unit="image", disable=None))
        rows.sort(key=lambda row: -row["score"])
        table = pd.DataFrame(rows, columns=[*COLUMNS, *ONLY_DRAWN])
        return table.drop(columns="label") if -1 in labels.values() else table

    def _row(self, path: Path, label: int, scale: tuple[float, float]) -> dict:
        rule = self.inspector.rule
        with np.load(self.file("maps", path)) as kept:
            heat, logit = kept["map"], float(kept["logit"])
            size, remarks = tuple(map(int, kept["size"])), str(kept["remarks"])
        highest = float(heat.max())
        score = rule.score(logit, highest) if rule else logit
        threshold = rule.map_threshold if rule else np.inf
        above = without_specks(heat, threshold)
        boxes, outlines = find_regions(above, threshold, size)
        overlay = draw(self.file("images", path), heat, scale, outlines, size)
        write_picture(self.file("overlays", path), overlay)
        write_picture(self.file("heat", path), heat_layer(heat, scale))
        if boxes:
            write_picture(self.file("masks", path), region_mask(above, threshold, size))
        return {
            "image": self.name(path),
            "verdict": rule.verdict(score, highest) if rule else "",
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
        }

    def remove_others(self, scores: pd.DataFrame) -> None:
        """Remove what is left of images that are gone, and of regions that are none any more."""
        present, with_regions = set(scores["file"]), set(scores["file"][scores["regions"] > 0])
        for kind in ENDINGS:
            for path in self.folder.glob(f"{kind}/*"):
                if path.stem not in (with_regions if kind == "masks" else present):
                    path.unlink()


def _notes(scores: pd.DataFrame, inspector: Inspector) -> list[str]:
    """What was done to the images that a reader has to know."""
    if not len(scores):
        return []
    turned = int(scores["remarks"].str.contains("turned").sum())
    twelve = int(scores["remarks"].str.contains("twelve bit").sum())
    sides = scores[["width", "height"]]
    long = int((sides.max(axis=1) > 3 * sides.min(axis=1)).sum())
    grid = inspector.detector.backbone.visual.grid_size[0] * inspector.tiles
    width, height = sides.value_counts().index[0]
    said = {
        f"{turned} images were turned as their EXIF orientation says": turned,
        f"{twelve} images are 16-bit files with 12-bit values, nearly black as read: multiply by 16": twelve,
        f"{long} images are more than three times as long as wide: squashed to a square": long,
        f"the model reads {grid} x {grid} patches: one covers {width / grid:.0f} x {height / grid:.0f} pixels of an "
        f"image of {width} x {height} (the most frequent size); much smaller defects are hardly seen (--tiles)": True,
    }
    return [note for note, holds in said.items() if holds]


def _observed(scores: pd.DataFrame) -> dict[str, float] | None:
    """What the labels say: false alarms and defects found, with exact 95 % intervals, and AUROC."""
    if not len(scores) or "label" not in scores:
        return None
    found = {"auroc": float(image_metrics(scores["score"], scores["label"])["auroc"])}
    for label, what in ((0, "false_alarms"), (1, "defects_found")):
        verdicts = scores["verdict"][scores["label"] == label]
        if (verdicts != "").any():
            share = exact_share(int((verdicts == "bad").sum()), len(verdicts))
            found |= {
                what: share.estimate,
                f"{what}_low": share.low,
                f"{what}_high": share.high,
            }
    return {key: value for key, value in found.items() if not np.isnan(value)}
