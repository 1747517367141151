"""``clipad detect``: from a folder of photographs, and a few flawless ones, to a verdict and a region per image.

What the numbers mean stands in :mod:`clipad.studies.inspection`; here are files: which are photographs, reading ahead,
what is kept of each image, and how a stopped run continues. Memory does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from clipad.datasets import read_photograph, two_levels
from clipad.files import (
    RESULT_MARK,
    code_version,
    content_hash,
    file_name,
    printable,
    require_same_settings,
    require_writable,
    write_arrays,
    write_atomically,
)
from clipad.metrics import image_metrics
from clipad.published import data_dir
from clipad.studies.common import exact_share
from clipad.studies.inspection import Inspector, require_enough, without_specks
from clipad.tools.photographs import find_flawless, find_photographs, labels_of, refuse_shared
from clipad.tools.report import draw, find_regions, heat_layer, no_region, region_mask, write_report

BATCH = 16
KEPT = ("images", "overlays", "heat", "masks", "maps")
"""folders of the results, a file per image in each (masks: where there is a region)"""
DEMO_WARNING = (
    "These scores mean nothing: the demo model is a 96-pixel toy that was trained on rendered pictures, and these "
    "pictures are not the demo's. Name a real model, as in --model ViT-B-16-plus-240 --pretrained laion400m_e31."
)


class NoPhotographError(ValueError):
    """An image that was decoded and turned out to be a mask or empty."""


@dataclass(frozen=True)
class Report:
    """What ``detect`` found.

    ``scores``: a row per image that was read, highest score first: image, verdict (good, check, bad; "" without
    flawless images), score, p_value, logit, map_max, regions, area (share of the image), boxes (left, top, right,
    bottom in pixels), width, height, label (1, 0, or -1 if not known). ``unread``: image -> why. ``skipped``: a line
    per kind of file that is no photograph. ``settings``: all that decides the numbers. ``rule``: see
    :class:`clipad.studies.inspection.Rule`, None without flawless images. ``observed``: what the labels say.
    """

    scores: pd.DataFrame
    unread: dict[str, str]
    skipped: list[str]
    settings: dict
    rule: object = None
    warning: str = ""
    observed: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many images are bad, check and good."""
        return {v: int((self.scores["verdict"] == v).sum()) for v in ("bad", "check", "good")}


def detect(
    detector,
    path: str | Path,
    object_name: str,
    output_dir: str | Path,
    normal: str | Path | None = None,
    false_alarms: float = 0.05,
    neighbours: str = "no",
    tiles: int = 1,
    normal_folder: str = "",
    progress: bool = True,
) -> Report:
    """Score an image or all photographs below a folder, and write report.html, scores.csv, scores.json and pictures.

    ``normal``: a folder of flawless images of the same product. They set the scale and the threshold, so that every
    image gets a verdict at about the false-alarm rate asked for; without them a score (the logit) but none.
    ``neighbours`` and ``tiles``: see :class:`clipad.studies.inspection.Inspector`. ``normal_folder``: the name of the
    sub-folders that hold flawless images, in ``path`` (for labels) and in ``normal``; labels are never guessed.

    EXIF orientation is applied, so that boxes and outlines lie on the picture as a viewer shows it. A stopped call
    continues: images are finished by their content. Raises ValueError or OSError, before the first image is scored,
    for anything that cannot work: too few flawless images, images that are in both folders, an output folder with
    other settings or other files.
    """
    root, found = find_photographs(path, output_dir)
    flawless, notes = find_flawless(normal, normal_folder, output_dir) if normal else ([], [])
    labels = labels_of(found.photographs, root, normal_folder, flawless)
    inspector = Inspector(detector, object_name, neighbours, tiles)
    detector.text_vectors(object_name)
    if normal:
        refuse_shared(found.photographs, flawless)
        require_enough(len(flawless), false_alarms)
    elif neighbours != "no":
        raise ValueError("nearest neighbours need flawless images: give a folder (--normal)")
    warning = demo_warning(detector, found.photographs)

    settings = detector.settings | {
        "object": object_name,
        "images": printable(root.name),
        "neighbours": neighbours,
        "tiles": tiles,
        "flawless": hashlib.sha256("".join(map(content_hash, flawless)).encode()).hexdigest()[:16],
        "false_alarms": false_alarms if normal else None,
        "code": code_version(),
    }
    work = _Work(inspector, root, claim(Path(output_dir), settings), progress)
    unused = work.fit(flawless, false_alarms) if flawless else {}
    notes += [f"flawless, but not used: {name}: {why}" for name, why in unused.items()]
    unread, masks = work.run(found.photographs)
    if masks:
        found.skipped["with at most two grey levels, so a mask or empty"] = masks
    scores = work.table(unread, masks, labels)
    skipped, notes = found.skipped_lines(root), notes + work.notes(scores)
    report = Report(
        scores, unread, skipped, settings, inspector.rule, warning, _observed(scores), notes
    )
    write_report(report, work.folder, work.scale, inspector)
    work.sweep(scores)
    return report


def summary(report: Report, output_dir: Path, shown: int = 10) -> list[str]:
    """What a terminal shows: counts, the images that score highest, what was left out, where the report is."""
    lines = [f"left out: {line}" for line in report.skipped]
    lines += [f"note: {line}" for line in report.notes]
    lines += [f"not readable: {name}: {why}" for name, why in report.unread.items()]
    if report.rule:
        lines += [f"{name}: {text}" for name, text in report.rule.words().items()]
    if report.observed:
        lines.append("  ".join(f"{k} {v:.3f}" for k, v in report.observed.items()))
    for row in report.scores.head(shown).itertuples():
        why = no_region(row.verdict, row.regions)
        lines.append(f"{row.score:8.2f}  {row.verdict:6}{row.image}  {why}".rstrip())
    counts = ", ".join(f"{n} {verdict}" for verdict, n in report.counts.items())
    highest = f" (the {shown} highest shown)" if len(report.scores) > shown else ""
    lines.append(
        f"{len(report.scores)} images{f': {counts}' if report.rule else ''}{highest}; {output_dir / 'report.html'}"
    )
    return lines


def demo_warning(detector, photographs) -> str:
    """Empty, or what has to be said first: the demo model on pictures that are not the demo's, by content."""
    if detector.backbone.name != "demo":
        return ""
    shipped = {content_hash(p) for p in (data_dir() / "demo" / "collections").glob("*/*/test/*/*")}
    return "" if all(content_hash(path) in shipped for path in photographs) else DEMO_WARNING


def claim(folder: Path, settings: dict) -> Path:
    """Make the output folder, or see that it holds results of these settings. ValueError for any other content."""
    folder = folder.expanduser().absolute()
    path = folder / "settings.json"
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RESULT_MARK).is_file():
            raise ValueError(f"{folder} holds files that are not ours: choose another --out")
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(
                f"{path} is missing or damaged: choose another --out or remove {folder.name}"
            ) from None
        now = json.loads(json.dumps(settings))
        require_same_settings(folder, before, now, option="--out")
        return folder
    require_writable(folder)
    write_atomically(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / RESULT_MARK, b"")
    return folder


# --------------------------------------------------------------------------------------- the work


class _Work:
    """Images read ahead by threads, looked at in batches, and what is kept of each in the output folder."""

    def __init__(self, inspector: Inspector, root: Path, folder: Path, progress: bool):
        self.inspector, self.root, self.folder = inspector, root, folder
        self.quiet = None if progress else True  # None: no bars where stderr is no terminal
        self.scale: tuple[float, float] = (0.0, 1.0)
        self.before = ""

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.root).as_posix())

    def file(self, kind: str, path: Path) -> Path:
        ending = {"maps": ".npz", "heat": ".png", "masks": ".png"}.get(kind, ".jpg")
        return self.folder / kind / (file_name(path.relative_to(self.root).as_posix()) + ending)

    def fit(self, flawless: list[Path], false_alarms: float) -> dict[str, str]:
        """Learn from the flawless images; returns those that could not be read."""
        unread: dict[str, str] = {}

        def looks():
            for paths, items in self._read(flawless, self._load_flawless, "flawless images"):
                for path, item in zip(paths, items, strict=True):
                    if isinstance(item, Exception):
                        unread[printable(path.name)] = str(item)
                good = [item for item in items if not isinstance(item, Exception)]
                if good:
                    yield self._look(good, paths)

        self.inspector.fit(looks(), false_alarms)
        rule, maps = self.inspector.rule, self.inspector.flawless_maps
        middle = float(np.median(maps[:, ::4, ::4]))
        self.scale = (middle, middle + 1.5 * (rule.map_threshold - middle))
        return unread

    def _load_flawless(self, path: Path) -> torch.Tensor:
        return self.inspector.prepare(_photograph(path)[0])

    def run(self, photographs) -> tuple[dict[str, str], list[Path]]:
        """Score what is not finished. Returns the images that could not be read, and those that are masks."""
        for kind in KEPT:
            require_writable(self.folder / kind)
        with ThreadPoolExecutor(4) as pool:
            finished = list(pool.map(self._finished, photographs))
        todo = [path for path, done in zip(photographs, finished, strict=True) if not done]
        if any(finished):
            self.before = f"{sum(finished)} of {len(finished)} images were finished before, skipped"
        if self.inspector.rule is None:
            self.scale = self._scale_without_flawless(todo)
        unread, masks = {}, []
        with ThreadPoolExecutor(4) as writers:
            pending: deque = deque()
            for paths, items in self._read(todo, self._load, "photographs"):
                good = []
                for path, item in zip(paths, items, strict=True):
                    if isinstance(item, NoPhotographError):
                        masks.append(path)
                    elif isinstance(item, Exception):
                        unread[self.name(path)] = str(item).replace(f"{self.root}/", "")
                    else:
                        good.append((path, *item))
                if not good:
                    continue
                look = self._look([item[1] for item in good], paths)
                maps = self.inspector.maps(look)
                for (path, _, picture, facts), logit, heat in zip(
                    good, look.logits, maps, strict=True
                ):
                    facts |= {"logit": logit, "map": heat}
                    pending.append(writers.submit(self._keep, path, picture, facts))
                while len(pending) > BATCH:
                    pending.popleft().result()
            for future in pending:
                future.result()
        return unread, masks

    def _look(self, tensors, paths):
        try:
            return self.inspector.look(torch.stack(tensors))
        except ValueError as error:
            names = ", ".join(printable(path.name) for path in paths[:3])
            raise ValueError(f"{error}: one of {names}, ...") from error

    def _read(self, paths, load, what: str) -> Iterator[tuple[list[Path], list]]:
        """Batches of paths with what ``load`` made of them, or the exception it raised."""

        def careful(path):
            try:
                return load(path)
            except (OSError, ValueError, MemoryError) as error:
                return error

        groups = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
        with (
            ThreadPoolExecutor(4) as readers,
            tqdm(total=len(paths), desc=what, unit="image", disable=self.quiet) as bar,
        ):
            ahead: deque = deque()
            for number, group in enumerate(groups):
                for later in groups[number + len(ahead) : number + 2]:
                    ahead.append([readers.submit(careful, path) for path in later])
                items = [future.result() for future in ahead.popleft()]
                failed = [e for e in items if isinstance(e, OSError) and e.errno == 28]
                if failed:  # a full disk is no fault of the image
                    raise failed[0]
                yield group, items
                bar.update(len(group))

    def _load(self, path: Path):
        """(what the model takes, small picture, facts); writes the picture at native size on the way."""
        image, found = _photograph(path)
        facts = {"sha256": content_hash(path), "size": np.array(image.size)}
        facts["remarks"] = ",".join(sorted(found))
        tensor = self.inspector.prepare(image)
        shown = image.copy() if max(image.size) > 65_000 else image  # JPEG's limit
        shown.thumbnail((65_000, 65_000))
        _write_picture(self.file("images", path), shown)
        small = image.convert("RGB")
        small.thumbnail((768, 768))
        return tensor, small, facts

    def _finished(self, path: Path) -> bool:
        try:
            with np.load(self.file("maps", path)) as kept:
                same = str(kept["sha256"]) == content_hash(path)
        except Exception:  # whatever is wrong with the file, its image is computed again
            return False
        return same and all(
            self.file(kind, path).is_file() for kind in ("images", "overlays", "heat")
        )

    def _keep(self, path: Path, picture: Image.Image, facts: dict) -> None:
        """Write all pictures, then the map, whose presence says that the image is finished."""
        heat, size = facts["map"], tuple(int(v) for v in facts["size"])
        threshold = self.inspector.rule.map_threshold if self.inspector.rule else np.inf
        regions = find_regions(heat, threshold, size)
        pictures = {
            "overlays": draw(picture, heat, self.scale, regions, size),
            "heat": heat_layer(heat, self.scale),
        }
        if regions:
            pictures["masks"] = region_mask(heat, threshold, size)
        for kind, shown in pictures.items():
            _write_picture(self.file(kind, path), shown)
        write_arrays(self.file("maps", path), facts)

    def _scale_without_flawless(self, todo) -> tuple[float, float]:
        """1st to 99.9th percentile over up to 32 images spread over the folder; kept, so that it stays the same."""
        path = self.folder / "scale.json"
        if path.is_file():
            return tuple(json.loads(path.read_text()))
        found = []
        chosen = todo[:: max(1, len(todo) // 32)][:32]
        for paths, items in self._read(chosen, self._load_flawless, "scale of the maps"):
            good = [item for item in items if not isinstance(item, Exception)]
            if good:
                found.append(self._look(good, paths).words)
        low, high = np.percentile(np.concatenate(found), [1, 99.9]) if found else (0.0, 1.0)
        if not high > low:
            high = low + 1
        write_atomically(path, json.dumps([float(low), float(high)]))
        return float(low), float(high)

    def table(self, unread: dict[str, str], masks: list[Path], labels: dict) -> pd.DataFrame:
        """A row per finished image (path -> label, without those unread and masks), highest score first."""
        rows, rule = [], self.inspector.rule
        for path in labels:
            if path in masks or self.name(path) in unread:
                continue
            with np.load(self.file("maps", path)) as kept:
                heat, logit = kept["map"], float(kept["logit"])
                size, said = tuple(int(v) for v in kept["size"]), str(kept["remarks"])
            highest = float(heat.max())
            score = rule.score(logit, highest) if rule else logit
            regions, area = [], None
            if rule:
                regions = find_regions(heat, rule.map_threshold, size)
                area = float((without_specks(heat, rule.map_threshold) > rule.map_threshold).mean())
            rows.append(
                {
                    "image": self.name(path),
                    "verdict": rule.verdict(score, highest) if rule else "",
                    "score": score,
                    "p_value": rule.p_value(score) if rule else None,
                    "logit": logit,
                    "map_max": highest,
                    "regions": len(regions),
                    "area": area,
                    "boxes": [region.box for region in regions],
                    "width": size[0],
                    "height": size[1],
                    "label": labels[path],
                    "remarks": said,
                    "outlines": [region.outline for region in regions],
                    "file": self.file("images", path).stem,
                }
            )
        columns = list(rows[0]) if rows else ["image", "verdict", "score", "label", "file"]
        return pd.DataFrame(rows, columns=columns).sort_values(
            "score", ascending=False, kind="stable", ignore_index=True
        )

    def notes(self, scores: pd.DataFrame) -> list[str]:
        """What was done to the images that a reader has to know."""
        if not len(scores):
            return []
        notes = [self.before] if self.before else []
        for remark, text in (
            ("turned", "were turned as their EXIF orientation says"),
            (
                "twelve bit",
                "are 16-bit files with 12-bit values, nearly black as read: multiply by 16",
            ),
        ):
            count = int(scores["remarks"].str.contains(remark).sum())
            if count:
                notes.append(f"{count} images {text}")
        grid = self.inspector.detector.backbone.visual.grid_size[0] * self.inspector.tiles
        sides = [(int(w), int(h)) for w, h in zip(scores["width"], scores["height"], strict=True)]
        (w, h), count = pd.Series(sides).mode()[0], len(set(sides))
        notes.append(
            f"the model reads {grid} x {grid} patches: one covers {w / grid:.0f} x {h / grid:.0f} pixels of an "
            f"image of {w} x {h}{' (the most frequent size)' if count > 1 else ''}; much smaller defects are hardly "
            "seen (--tiles)"
        )
        long = sum(max(side) > 3 * min(side) for side in sides)
        if long:
            notes.append(
                f"{long} images are more than three times as long as wide: squashed to a square"
            )
        return notes

    def sweep(self, scores: pd.DataFrame) -> None:
        """Remove what is left of images that are gone, and of regions that are none any more."""
        present = set(scores["file"])
        regions = set(scores["file"][scores["regions"] > 0]) if len(scores) else set()
        for kind in KEPT:
            for path in (self.folder / kind).iterdir():
                if path.stem not in (regions if kind == "masks" else present):
                    path.unlink()


def _write_picture(path: Path, picture: Image.Image) -> None:
    """As the name's ending says, .png or .jpg."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if path.suffix == ".png" else "JPEG", quality=88)
    write_atomically(path, buffer.getvalue())


def _photograph(path: Path) -> tuple[Image.Image, set[str]]:
    image, found = read_photograph(path)
    if two_levels(image):
        raise NoPhotographError(f"{path} has at most two grey levels: a mask or an empty picture")
    return image, found


def _observed(scores: pd.DataFrame) -> dict[str, float] | None:
    """What the labels say: false alarms and defects found, with exact 95 % intervals, and AUROC."""
    if not len(scores) or (scores["label"] < 0).any():
        return None
    found = {"auroc": float(image_metrics(scores["score"], scores["label"])["auroc"])}
    if (scores["verdict"] != "").all():
        for label, what in ((0, "false_alarms"), (1, "defects_found")):
            bad = scores["verdict"][scores["label"] == label] == "bad"
            if len(bad):
                share = exact_share(int(bad.sum()), len(bad))
                found |= {
                    what: share.estimate,
                    f"{what}_low": share.low,
                    f"{what}_high": share.high,
                }
    return {key: value for key, value in found.items() if not np.isnan(value)}
