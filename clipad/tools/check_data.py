"""``clipad data check``: read every image and mask of a data set and say what is wrong with them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from clipad.datasets import (
    DEMO,
    EXPECTED,
    Dataset,
    MaskSizeError,
    Sample,
    decode,
    left_over,
    list_dataset,
    native_mask,
    readable,
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
        options = {"index": False, "na_rep": "-", "float_format": "{:.0f}".format}
        parts = [f"data set {self.name!r} at {printable(str(self.root))}"]
        parts += [shown[said].to_string(formatters=percent, **options)]
        parts += [f"PROBLEM: {text}" for text in self.problems[:50]]
        if len(self.problems) > 50:
            parts += [f"... and {len(self.problems) - 50} more problems (report.problems has all)"]
        parts += [f"note: {text}" for text in self.notes]
        parts += ["ok" if self.ok else f"{len(self.problems)} problems"]
        return "\n".join(parts)


COUNTS = ["normal", "anomalous", "unlabelled", "masks", "unreadable", "missing_masks"]
COUNTS += ["wrong_size_masks", "empty_masks", "vanished_masks", "converted", "duplicates"]
LABELS = {0: "normal", 1: "anomalous", -1: "unlabelled"}
MOSTLY = 0.5
"""a mask that marks more than this share of its image is probably the wrong way round"""
NOTES = {
    "duplicates": "byte-identical to an earlier image, kept",
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
    image_size = image_size or (96 if name in DEMO else 240)
    dataset, faults = list_dataset(name, root, normal_folder)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        rows = pool.map(lambda sample: _inspect(sample, image_size), dataset.samples)
        rows = list(
            tqdm(rows, f"checking {name}", len(dataset), unit="image", disable=not progress)
        )
    files = pd.DataFrame(rows, columns=["category", "mode", "digest", "marked", "problems"])
    counts = pd.DataFrame([row["counts"] for row in rows], columns=list({*COUNTS, *NOTES, "flat"}))
    files = files.join(counts.fillna(0).astype(int))
    files["duplicates"] = files["digest"].notna() & files["digest"].duplicated()
    if all(sample.mask_path is None for sample in dataset):
        files["missing_masks"] = 0
    table = _table(name, files)
    problems = [*map(str, faults), *(text for row in files["problems"] for text in row)]
    for row in table.itertuples():
        wanted = (row.expected_normal, row.expected_anomalous)
        if not pd.isna(wanted[0]) and (row.normal, row.anomalous) != wanted:
            problems.append(
                f"{row.category}: found {row.normal} normal + {row.anomalous} anomalous images, "
                f"expected {wanted[0]:.0f} + {wanted[1]:.0f}"
            )
        if row.anomalous_pixels > MOSTLY:
            problems.append(
                f"{row.category}: the masks mark {row.anomalous_pixels:.0%} of the pixels as anomalous: are they the "
                "wrong way round (255 = background)?"
            )
    flat = [sample.image_path for sample, one in zip(dataset, files["flat"], strict=True) if one]
    if flat:
        names = _some(dataset, flat)
        problems.append(
            f"{len(flat)} images have at most two colours, so they are masks or empty: {names}"
        )
    return DatasetReport(name, dataset.root, image_size, table, problems, _notes(dataset, files))


def _inspect(sample: Sample, image_size: int) -> dict:
    """What reading the files of one sample showed; ``counts`` are columns of the table and notes."""
    path, size = sample.image_path, None
    row = {"category": sample.category, "counts": Counter(), "problems": []}
    counts: Counter = row["counts"]
    counts[LABELS[sample.label]] += 1
    counts["missing_masks"] += sample.label == 1 and sample.mask_path is None
    try:
        image = decode(path)
        shown, size = readable(path, image), image.size
        row |= {"mode": image.mode, "digest": content_hash(path)}
        counts.update(remarks(image))
        counts["converted"] += image.mode not in ("L", "RGB")
        counts["misnamed"] += path.suffix.lower() not in SUFFIXES_OF[image.format]
        counts["flat"] += two_levels(shown)
    except OSError as error:
        counts["unreadable"] += 1
        row["problems"].append(str(error))
    for path in filter(None, (sample.mask_path, sample.object_mask_path)):
        try:
            mask = native_mask(path, size)
        except (MaskSizeError, OSError) as error:
            kind = "wrong_size_masks" if isinstance(error, MaskSizeError) else "unreadable"
            counts[kind] += 1
            row["problems"].append(str(error))
            continue
        if not mask.any():
            counts["empty_masks"] += 1
            row["problems"].append(f"mask {path} has no pixel > 0")
        if path == sample.mask_path:
            counts["masks"] += 1
            if mask.any():
                row["marked"] = float(mask.mean())
                counts["vanished_masks"] += not resize_mask(mask, image_size).any()
                counts[_blurred(path)] += 1
    return row


def _blurred(path: Path) -> str | None:
    """The kind of mask whose edges are not sharp: it has more grey values than numbers of classes would."""
    if path.suffix.lower() in SUFFIXES_OF["JPEG"]:
        return "lossy mask"
    image = decode(path)
    return "soft mask" if image.mode == "L" and image.getcolors(8) is None else None


def _table(name: str, files: pd.DataFrame) -> pd.DataFrame:
    expected = EXPECTED.get(name, {})
    order = list(dict.fromkeys([*expected, *files["category"]]))
    groups = files.groupby("category")
    table = groups[COUNTS].sum().reindex(order, fill_value=0)
    table["anomalous_pixels"] = groups["marked"].mean()
    for i, column in enumerate(("expected_normal", "expected_anomalous")):
        table[column] = [expected.get(category, (np.nan, np.nan))[i] for category in order]
    return table.reset_index()


def _notes(dataset: Dataset, files: pd.DataFrame) -> list[str]:
    modes = files["mode"].value_counts()
    notes = []
    if len(modes):
        notes.append("image modes: " + ", ".join(f"{mode} {n}" for mode, n in modes.items()))
    for kind, text in NOTES.items():
        seen = [sample for sample, one in zip(dataset, files[kind], strict=True) if one]
        if seen:
            paths = [s.mask_path if "mask" in kind else s.image_path for s in seen]
            notes.append(f"{text}: {len(paths)} ({_some(dataset, paths)})")
    if dataset.name == "folder":
        used = {path for s in dataset for path in (s.mask_path, s.object_mask_path)}
        rest = left_over(dataset.root, dataset)
        if rest:
            notes.append(f"photographs that no layout takes: {len(rest)} ({_some(dataset, rest)})")
        skipped = scan(dataset.root, used).skipped_lines(dataset.root)
        notes += [f"left out: {line}" for line in skipped]
        names = ", ".join(f"'a flawless {category}'" for category in dataset.categories[:5])
        notes.append(f"the prompts will say {names}: folders should be called as their product")
        normal = sorted({s.image_path.parent.name for s in dataset if s.label == 0})
        if normal:
            notes.append(f"normal are the images in folders called {', '.join(normal)}")
    return notes


def _some(dataset: Dataset, paths: list[Path]) -> str:
    shown = ", ".join(printable(str(path.relative_to(dataset.root))) for path in paths[:5])
    return f"{shown}{', ...' if len(paths) > 5 else ''}"
