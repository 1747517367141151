"""``clipad data check``: read every image and mask of a data set and say what is wrong with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from clipad.datasets import (
    EXPECTED,
    Dataset,
    MaskSizeError,
    Sample,
    decode,
    eight_bit,
    left_over,
    list_dataset,
    native_mask,
    remarks,
    resize_mask,
    two_levels,
)
from clipad.files import SUFFIXES_OF, content_hash, printable, scan


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found. `problems` must be mended; `notes` are facts worth knowing.

    `table` has a row per category (columns as in `check_dataset`); `str()` prints everything.
    """

    name: str
    root: Path
    image_size: int
    table: pd.DataFrame
    problems: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        shown = self.table
        if len(shown) > 1:
            total = shown.drop(columns=["category", "anomalous_pixels"]).sum(min_count=1)
            shown = pd.concat([shown, pd.DataFrame([{"category": "total", **total}])])
        said = ("category", "normal", "anomalous", "masks")
        said = [c for c in shown if c in said or shown[c].fillna(0).any()]
        percent = {"anomalous_pixels": lambda share: f"{share:.1%}"}
        parts = [
            f"data set {self.name!r} at {printable(str(self.root))}",
            shown[said].to_string(
                index=False, na_rep="-", float_format="{:.0f}".format, formatters=percent
            ),
            *(f"PROBLEM: {text}" for text in self.problems[:50]),
        ]
        if len(self.problems) > 50:
            parts.append(
                f"... and {len(self.problems) - 50} more problems (report.problems has all)"
            )
        parts += [f"note: {text}" for text in self.notes]
        parts.append("ok" if self.ok else f"{len(self.problems)} problems")
        return "\n".join(parts)


COUNTS = ("normal", "anomalous", "unlabelled", "masks", "unreadable", "missing_masks")
COUNTS += ("wrong_size_masks", "empty_masks", "vanished_masks", "converted", "duplicates")
MOSTLY = 0.5
"""a mask that marks more than this share of its image is probably the wrong way round"""


@dataclass
class Findings:
    """What reading the files of one sample showed; `mode` and `digest` stay empty for an unreadable image."""

    mode: str = ""
    digest: str = ""
    kinds: set[str] = field(default_factory=set)
    """what a note or a problem will be about, see `NOTES`"""
    counts: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    marked: list[float] = field(default_factory=list)
    """share of anomalous pixels of its mask"""

    def add(self, column: str, problem: object) -> None:
        self.counts[column] += 1
        self.problems.append(str(problem))


NOTES = {
    "copy": "byte-identical to an earlier image, kept",
    "misnamed": "content of another type than the suffix says, read by content",
    "turned": "EXIF orientation set, ignored: pixels are taken as stored",
    "twelve bit": "16-bit files whose values stay below 4096: read on the 16-bit scale they are nearly black; if the "
    "camera has 12 bits, multiply by 16",
    "lossy mask": "JPEG masks: compression noise above 0 counts as anomalous",
    "soft mask": "masks with more than eight grey values: every value above 0 counts as anomalous, so soft edges grow",
}


def check_dataset(
    name: str,
    root: str | Path | None = None,
    image_size: int = 0,
    normal_folder: str = "",
    progress: bool = True,
) -> DatasetReport:
    """Read every test image and mask of a data set and report what is wrong with them.

    ``image_size``: the side at which thin masks may vanish; 0 for what the presets use (96 for the demo, else 240).
    ``normal_folder``: see :func:`clipad.load_dataset`.

    The table's columns per category: `category`, `normal`, `anomalous`, `unlabelled`, `masks`, `unreadable` (images
    and masks), `missing_masks` (0 where the data set has none at all), `wrong_size_masks`, `empty_masks` (no pixel
    > 0), `vanished_masks` (all pixels disappear at `image_size`), `converted` (images that are neither L nor RGB),
    `duplicates` (images byte-identical to an earlier one), `anomalous_pixels` (mean share over the masks),
    `expected_normal` and `expected_anomalous` (NaN where nothing is expected).

    Raises what `load_dataset` raises when there is nothing to check (root missing, another layout).
    """
    image_size = image_size or (96 if name in ("demo", "demo_aux") else 240)
    problems: list[str] = []
    dataset = list_dataset(
        name, root, lambda kind, message: problems.append(message), normal_folder
    )
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        inspected = list(
            tqdm(
                pool.map(lambda sample: _inspect(sample, image_size), dataset.samples),
                total=len(dataset),
                desc=f"checking {name}",
                unit="image",
                disable=not progress,
            )
        )
    first_with: dict[str, Path] = {}
    for sample, found in zip(dataset, inspected, strict=True):
        problems += found.problems
        if found.digest:
            original = first_with.setdefault(found.digest, sample.image_path)
            if original != sample.image_path:
                found.counts["duplicates"] += 1
                found.kinds.add("copy")
    table = _table(name, dataset, inspected)
    for row in table.dropna(subset="expected_normal").itertuples():
        if (row.normal, row.anomalous) != (row.expected_normal, row.expected_anomalous):
            problems.append(
                f"{row.category}: found {row.normal} normal + {row.anomalous} anomalous images, "
                f"expected {row.expected_normal:.0f} + {row.expected_anomalous:.0f}"
            )
    problems += _of_masks(table, dataset, inspected)
    notes = _notes(dataset, inspected)
    return DatasetReport(name, dataset.root, image_size, table, problems, notes)


def _inspect(sample: Sample, image_size: int) -> Findings:
    found = Findings()
    size = None
    try:
        image = decode(sample.image_path)
        shown = eight_bit(image)
        size, found.mode = image.size, image.mode
        found.digest = content_hash(sample.image_path)
        found.kinds |= remarks(image)
        for kind, there in (
            ("misnamed", sample.image_path.suffix.lower() not in SUFFIXES_OF[image.format]),
            ("two levels", two_levels(shown)),
        ):
            if there:
                found.kinds.add(kind)
        found.counts["converted"] += image.mode not in ("L", "RGB")
    except OSError as error:
        found.add("unreadable", error)
    except ValueError as error:
        found.add("unreadable", f"{sample.image_path}: {error}")
    for path in filter(None, (sample.mask_path, sample.object_mask_path)):
        _inspect_mask(path, path == sample.mask_path, size, image_size, found)
    return found


def _inspect_mask(path: Path, of_defect: bool, size, image_size: int, found: Findings) -> None:
    try:
        mask = native_mask(path, size)
    except MaskSizeError as error:
        found.add("wrong_size_masks", error)
    except OSError as error:
        found.add("unreadable", error)
    else:
        found.counts["masks"] += of_defect
        if not mask.any():
            found.add("empty_masks", f"mask {path} has no pixel > 0")
        elif of_defect:
            found.marked.append(float(mask.mean()))
            found.counts["vanished_masks"] += not resize_mask(mask, image_size).any()
            if path.suffix.lower() in SUFFIXES_OF["JPEG"]:
                found.kinds.add("lossy mask")
            elif _soft(path):
                found.kinds.add("soft mask")


def _soft(path: Path) -> bool:
    """Whether a grey mask fades out: it has more values than numbers of classes would."""
    image = decode(path)
    return image.mode == "L" and image.getcolors(8) is None


def _table(name: str, dataset: Dataset, inspected: list[Findings]) -> pd.DataFrame:
    masked = any(s.mask_path for s in dataset)
    counts: dict[str, Counter] = defaultdict(Counter)
    marked: dict[str, list[float]] = defaultdict(list)
    for sample, found in zip(dataset, inspected, strict=True):
        row = counts[sample.category]
        row.update(found.counts)
        row[{0: "normal", 1: "anomalous", -1: "unlabelled"}[sample.label]] += 1
        row["missing_masks"] += masked and sample.label == 1 and sample.mask_path is None
        marked[sample.category] += found.marked
    expected = EXPECTED.get(name, {})
    rows = []
    for category in dict.fromkeys([*expected, *dataset.categories]):
        share = np.mean(marked[category]) if marked[category] else np.nan
        wanted = expected.get(category, (np.nan, np.nan))
        rows.append([category, *(counts[category][column] for column in COUNTS), share, *wanted])
    columns = ["category", *COUNTS, "anomalous_pixels", "expected_normal", "expected_anomalous"]
    return pd.DataFrame(rows, columns=columns)


def _of_masks(table: pd.DataFrame, dataset: Dataset, inspected: list[Findings]) -> list[str]:
    """Masks the wrong way round, and masks among the images."""
    problems = [
        f"{row.category}: the masks mark {row.anomalous_pixels:.0%} of the pixels as anomalous: are they the wrong way "
        "round (255 = background)?"
        for row in table.itertuples()
        if row.anomalous_pixels > MOSTLY
    ]
    masks = [
        s.image_path for s, f in zip(dataset, inspected, strict=True) if "two levels" in f.kinds
    ]
    if masks:
        problems.append(
            f"{len(masks)} images have at most two colours, so they are masks or empty: {_some(dataset, masks)}"
        )
    return problems


def _notes(dataset: Dataset, inspected: list[Findings]) -> list[str]:
    modes = Counter(found.mode for found in inspected if found.mode)
    notes = []
    if modes:
        notes.append("image modes: " + ", ".join(f"{mode} {n}" for mode, n in modes.most_common()))
    for kind, text in NOTES.items():
        paths = [
            sample.mask_path if "mask" in kind else sample.image_path
            for sample, found in zip(dataset, inspected, strict=True)
            if kind in found.kinds
        ]
        if paths:
            notes.append(f"{text}: {len(paths)} ({_some(dataset, paths)})")
    if dataset.name == "folder":
        used = {path for s in dataset for path in (s.mask_path, s.object_mask_path)}
        rest = left_over(dataset.root, dataset)
        if rest:
            notes.append(f"photographs that no layout takes: {len(rest)} ({_some(dataset, rest)})")
        notes += [
            f"left out: {line}" for line in scan(dataset.root, used).skipped_lines(dataset.root)
        ]
        names = ", ".join(f"'a flawless {category}'" for category in dataset.categories[:5])
        notes.append(f"the prompts will say {names}: folders should be called as their product")
        normal = sorted({s.image_path.parent.name for s in dataset if s.label == 0})
        if normal:
            notes.append(f"normal are the images in folders called {', '.join(normal)}")
    return notes


def _some(dataset: Dataset, paths: list[Path]) -> str:
    shown = ", ".join(printable(str(path.relative_to(dataset.root))) for path in paths[:5])
    return f"{shown}{', ...' if len(paths) > 5 else ''}"
