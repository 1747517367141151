"""``clipad detect``: from a folder of photographs, and a few flawless ones, to a verdict and a region per image.

The numbers are :mod:`clipad.studies.inspection`'s. First the model looks at every image and its map is kept, so that a
stopped run continues; then maps become pictures and rows of the table. Memory does not grow with the photographs.
"""

import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd
from tqdm.contrib.concurrent import thread_map

from clipad.io import files
from clipad.io.files import content_hash, printable
from clipad.metrics import image_metrics
from clipad.published import data_dir
from clipad.studies.common import exact_share
from clipad.studies.inspection import Inspector, Look, alarms_allowed, without_specks
from clipad.tools import report
from clipad.tools.photographs import Images, read_photograph

# Folders of the results, a file per image in each (masks: with flawless images only).
ENDINGS = {"images": ".jpg", "overlays": ".jpg", "heat": ".png", "masks": ".png", "maps": ".npz"}
in_threads = partial(thread_map, max_workers=4, unit="image", disable=None)


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
        alarms_allowed(len(images.flawless), false_alarms)
    elif neighbours != "no":
        raise ValueError("nearest neighbours need flawless images: give a folder (--normal)")
    settings = _settings(inspector, images, false_alarms)
    folder = Path(output_dir).expanduser()
    mark = folder / files.RESULT_MARK
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise ValueError(f"{folder} holds files that are not ours: choose another --out")
    files.claim(folder, settings, ["maps"], option="--out")
    files.write_atomically(mark, b"")
    work = _Work(inspector, images.root, folder)
    notes = list(images.notes)
    if images.flawless:
        found = in_threads(work.look, images.flawless, desc="flawless images")
        looks = [look for look, _ in filter(None, found)]
        alarms_allowed(len(looks), false_alarms)
        inspector.fit(Look.cat(looks), false_alarms)
        unused = [f"{printable(path.name)}: {why}" for path, why in work.unread.items()]
        notes += [f"flawless, but not used: {line}" for line in unused]
        work.unread.clear()
    if before := sum(in_threads(work.keep, list(images.labels), desc="photographs")):
        notes.append(f"{before} of {len(images.labels)} images were finished before, skipped")
    scale, scores = work.table(images.labels)
    found = report.Report(
        scores=scores,
        scale=scale,
        unread={printable(work.name(path)): why for path, why in work.unread.items()},
        notes=notes + _notes(scores, inspector),
        settings=settings,
        rule=inspector.rule,
        warning=demo_warning(detector, images.labels),
        observed=_observed(scores),
    )
    report.write_report(found, folder, detector.backbone)
    return found


def _settings(inspector: Inspector, images: Images, false_alarms: float) -> dict:
    return inspector.detector.settings | {
        "object": inspector.name,
        "images": printable(images.root.name),
        "neighbours": inspector.neighbours,
        "tiles": inspector.tiles,
        "flawless": files.address([*map(content_hash, images.flawless)]),
        "false_alarms": false_alarms if images.flawless else None,
        "code": files.code_version(),
    }


def demo_warning(detector, photographs) -> str:
    """Empty, or what has to be said first: the demo model on pictures that are not the demo's, by content."""
    shipped = map(content_hash, (data_dir() / "demo" / "collections").glob("*/*/test/*/*"))
    if detector.backbone.name != "demo" or {*map(content_hash, photographs)} <= {*shipped}:
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
    model: Lock = field(default_factory=Lock)  # one image at a time; meanwhile others are read

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def file(self, kind: str, path: Path) -> Path:
        return self.folder / kind / (files.file_name(self.name(path)) + ENDINGS[kind])

    def look(self, path: Path, copy: bool = False) -> tuple[Look, dict] | None:
        """What the model sees in an image, and facts; None, and the reason in ``unread``, if it cannot be read."""
        try:
            image, remark = read_photograph(path)
        except (OSError, ValueError, MemoryError) as error:
            self.unread[path] = str(error).replace(f"{self.root}/", "")
            return None
        if copy:  # the report's
            report.write_picture(self.file("images", path), image)
        prepared = self.inspector.prepare(image)[None]
        with self.model:
            return self.inspector.look(prepared), {"size": image.size, "remark": remark}

    def keep(self, path: Path) -> bool:
        """Keep the map of an image, its logit and facts; whether they were kept before."""
        before = self._is_finished(path)
        if not before and (found := self.look(path, copy=True)):
            look, facts = found
            with self.model:
                heat = self.inspector.maps(look)[0]
            facts |= {"sha256": content_hash(path), "logit": look.logits[0], "map": heat}
            files.write_arrays(self.file("maps", path), facts)
        return before

    def _is_finished(self, path: Path) -> bool:
        try:
            with np.load(self.file("maps", path)) as kept:
                same = str(kept["sha256"]) == content_hash(path)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return False  # none, or a damaged one
        return same and self.file("images", path).is_file()

    def table(self, labels: dict[Path, int]) -> tuple[tuple[float, float], pd.DataFrame]:
        """The colours' scale, and a row per image that was read, highest score first. Draws on the way, and removes
        what is left of images that are gone."""
        paths = [path for path in labels if path not in self.unread]
        if not paths:
            path, why = next(iter(self.unread.items()))
            raise ValueError(f"not one of {len(labels)} images can be read; {path.name}: {why}")
        scale = self._scale(paths)
        rows = in_threads(lambda path: self._row(path, labels[path], scale), paths, desc="pictures")
        present = {self.file(kind, path) for kind in ENDINGS for path in paths}
        for kind in ENDINGS:
            for path in {*self.folder.glob(f"{kind}/*")} - present:
                path.unlink()
        table = pd.DataFrame(sorted(rows, key=lambda row: -row["score"]))
        return scale, table.drop(columns="label") if -1 in labels.values() else table

    def _scale(self, paths: list[Path]) -> tuple[float, float]:
        """From where to where the colours of maps go: from the flawless maps; without them the 1st to the 99.9th
        percentile over at most 32 images, spread over the folder."""
        if rule := self.inspector.rule:
            middle = float(np.median(self.inspector.flawless_maps[:, ::4, ::4]))
            return middle, middle + 1.5 * (rule.map_threshold - middle)
        maps = [np.load(self.file("maps", p))["map"] for p in paths[:: 1 + (len(paths) - 1) // 32]]
        low, high = map(float, np.percentile(maps, [1, 99.9]))
        return low, high if high > low else low + 1

    def _row(self, path: Path, label: int, scale: tuple[float, float]) -> dict:
        rule = self.inspector.rule
        with np.load(self.file("maps", path)) as kept:
            heat, logit = kept["map"], float(kept["logit"])
            size, remark = tuple(map(int, kept["size"])), str(kept["remark"])
        highest = float(heat.max())
        score = rule.score(logit, highest) if rule else logit
        threshold = rule.map_threshold if rule else np.inf
        above = without_specks(heat, threshold)
        boxes, outlines = report.find_regions(above, threshold, size)
        layer = report.heat_layer(heat, scale)
        overlay = report.draw(self.file("images", path), layer, outlines)
        pictures = {"overlays": overlay, "heat": layer}
        if rule:
            pictures["masks"] = report.region_mask(above, threshold, size)
        for kind, picture in pictures.items():
            report.write_picture(self.file(kind, path), picture)
        return {
            "image": printable(self.name(path)),
            "verdict": rule.verdict(score, highest) if rule else "",
            "score": score,
            "p_value": rule.p_value(score) if rule else None,
            "logit": logit,
            "map_max": highest,
            "regions": len(boxes),
            "boxes": boxes,
            "width": size[0],
            "height": size[1],
            "label": label,
            "file": self.file("images", path).stem,
            "outlines": outlines,
            "remark": remark,
        }


def _notes(scores: pd.DataFrame, inspector: Inspector) -> list[str]:
    """What was done to the images that a reader has to know."""
    remarks = scores["remark"].str.split("; ").explode().value_counts().drop("", errors="ignore")
    grid = inspector.detector.backbone.visual.grid_size[0] * inspector.tiles
    width, height = scores[["width", "height"]].value_counts().index[0]
    return [f"{number} images {what}" for what, number in remarks.items()] + [
        f"the model reads {grid} x {grid} patches: one covers {width / grid:.0f} x {height / grid:.0f} pixels of an "
        f"image of {width} x {height} (the most frequent size); much smaller defects are hardly seen (--tiles)"
    ]


def _observed(scores: pd.DataFrame) -> dict[str, str]:
    """What the labels say, in percent: AUROC, and with verdicts false alarms and defects found, with exact 95 %
    intervals."""
    if "label" not in scores:
        return {}
    found = {}
    if scores["label"].nunique() == 2:
        auroc = image_metrics(scores["score"], scores["label"])["auroc"]
        found["AUROC"] = f"{100 * auroc:.1f}"
    for label, what in ((0, "false alarms"), (1, "defects called bad")):
        verdicts = scores["verdict"][scores["label"] == label]
        if verdicts.any():
            found[what] = f"{exact_share((verdicts == 'bad').sum(), len(verdicts))}"
    return found
