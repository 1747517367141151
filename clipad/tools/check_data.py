"""``clipad data check``: read every image and mask of a data set and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from clipad.datasets import (
    DEMO,
    EXPECTED,
    Dataset,
    MaskSizeError,
    Sample,
    decode,
    eight_bit,
    for_testing,
    list_dataset,
    native_mask,
    remarks,
    require_mask_size,
    resize_mask,
    two_levels,
)
from clipad.files import content_hash, printable, scan


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found. `problems` must be mended; `notes` are facts worth knowing.

    `table` has a row per category (columns as in `check_dataset`); `str()` prints everything.
    """

    name: str
    root: Path
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
COUNTS += ["wrong_size_masks", "empty_masks", "vanished_masks", "duplicates"]
LABELS = {0: "normal", 1: "anomalous", -1: "unlabelled"}
PROBLEMS = ("unreadable", "wrong_size_masks", "empty_masks")
MOSTLY = 0.5
"""a mask that marks more than this share of its image is probably the wrong way round"""
NOTES = {
    "duplicates": "byte-identical to an earlier image, kept",
    "turned": "EXIF orientation set, ignored: pixels are taken as stored",
    "twelve bit": "16-bit files whose values stay below 4096: read on the 16-bit scale they are nearly black; if the "
    "camera has 12 bits, multiply by 16",
    "lossy mask": "JPEG masks: compression noise above 0 counts as anomalous",
    "soft mask": "masks with more than eight grey values: every value above 0 counts as anomalous, so soft edges grow",
}
"""what is worth a word, and the word"""


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
    > 0), `vanished_masks` (all pixels disappear at `image_size`), `duplicates` (images byte-identical to an
    earlier one), `anomalous_pixels` (mean share over the masks), `expected_normal` and `expected_anomalous` (NaN where
    nothing is expected).

    Raises what `load_dataset` raises when there is nothing to check (root missing, another layout).
    """
    image_size = image_size or (96 if name in DEMO else 240)
    dataset, faults = list_dataset(name, root, normal_folder)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        found = pool.map(lambda sample: list(_facts(sample, image_size)), dataset)
        bar = tqdm(found, f"checking {name}", len(dataset), unit="image", disable=not progress)
        rows = [row for rows in bar for row in rows]
    facts = pd.DataFrame(rows, columns=["category", "kind", "path", "said"])
    again = facts[facts["kind"] == "digest"].duplicated("said")
    facts.loc[again[again].index, "kind"] = "duplicates"  # of a digest that an earlier image has
    if all(sample.mask_path is None for sample in dataset):
        facts = facts[facts["kind"] != "missing_masks"]
    table = _table(name, facts)
    problems = [*map(str, faults), *facts["said"][facts["kind"].isin(PROBLEMS)]]
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
    if flat := _named(dataset, facts["path"][facts["kind"] == "flat"]):
        problems.append(f"images with at most two colours, so masks or empty: {flat}")
    return DatasetReport(name, dataset.root, table, problems, _notes(dataset, facts))


def _facts(sample: Sample, image_size: int) -> Iterator[tuple[str, str, Path, object]]:
    """(category, kind, path, said) for all that reading the files of one sample shows. Kinds are columns of the table,
    names of ``PROBLEMS`` and ``NOTES``, and "mode", "digest", "flat" and "marked"; ``said`` is a text or a value."""
    image, mask, objects = sample.image_path, sample.mask_path, sample.object_mask_path
    missing = sample.label == 1 and mask is None
    facts = [(image, {LABELS[sample.label]: True, "missing_masks": missing})]
    for path in filter(None, (image, mask, objects)):
        try:
            found = _of_image(path) if path == image else _of_mask(path, image, image_size)
        except (MaskSizeError, OSError) as error:
            kind = "wrong_size_masks" if isinstance(error, MaskSizeError) else "unreadable"
            found = {kind: str(error)}
        if path == objects:
            found = {kind: said for kind, said in found.items() if kind in PROBLEMS}
        if path == image and "unreadable" in found:
            image = None  # its masks are looked at all the same
        facts.append((path, found))
    for path, found in facts:
        # what is False or 0 is no fact, and is not counted
        yield from ((sample.category, kind, path, said) for kind, said in found.items() if said)


def _of_image(path: Path) -> dict[str, object]:
    image = decode(path)
    return dict.fromkeys(remarks(image), True) | {
        "mode": image.mode,
        "digest": content_hash(path),
        "flat": two_levels(eight_bit(image)),
    }


def _of_mask(path: Path, image: Path | None, image_size: int) -> dict[str, object]:
    if image:
        require_mask_size(path, image)
    mask, stored = native_mask(path), decode(path)
    lossy = stored.format in ("JPEG", "MPO")
    return {
        "masks": True,
        "marked": float(mask.mean()),
        "empty_masks": not mask.any() and f"mask {path} has no pixel > 0",
        "vanished_masks": mask.any() and not resize_mask(mask, image_size).any(),
        "lossy mask": lossy,
        "soft mask": not lossy and stored.mode == "L" and stored.getcolors(8) is None,
    }


def _table(name: str, facts: pd.DataFrame) -> pd.DataFrame:
    columns = ["expected_normal", "expected_anomalous"]
    expected = pd.DataFrame.from_dict(EXPECTED.get(name, {}), "index", columns=columns)
    order = pd.Index([*expected.index, *facts["category"]], name="category").unique()
    counts = pd.crosstab(facts["category"], facts["kind"])
    marked = facts[facts["kind"] == "marked"]
    shares = marked["said"].astype(float).groupby(marked["category"]).mean()
    table = counts.reindex(index=order, columns=COUNTS, fill_value=0).rename_axis(columns=None)
    return table.assign(anomalous_pixels=shares).join(expected.astype(float)).reset_index()


def _notes(dataset: Dataset, facts: pd.DataFrame) -> list[str]:
    modes = facts["said"][facts["kind"] == "mode"].value_counts()
    shown = ", ".join(f"{mode} {n}" for mode, n in modes.items())
    notes = [f"image modes: {shown}"] if shown else []
    for kind, text in NOTES.items():
        if names := _named(dataset, facts["path"][facts["kind"] == kind]):
            notes.append(f"{text}: {names}")
    if dataset.name == "folder":
        used = {path for s in dataset for path in (s.image_path, s.mask_path, s.object_mask_path)}
        rest = scan(dataset.root, used)
        if names := _named(dataset, for_testing(rest.photographs, dataset.root)):
            notes.append(f"photographs that no layout takes: {names}")
        notes += [f"left out: {line}" for line in rest.skipped_lines(dataset.root)]
        names = ", ".join(f"'a flawless {category}'" for category in dataset.categories[:5])
        notes.append(f"the prompts will say {names}: folders should be called as their product")
        normal = sorted({s.image_path.parent.name for s in dataset if s.label == 0})
        if normal:
            notes.append(f"normal are the images in folders called {', '.join(normal)}")
    return notes


def _named(dataset: Dataset, paths: Iterable[Path]) -> str:
    """How many files, and the first five of them; empty if there are none."""
    names = [printable(str(path.relative_to(dataset.root))) for path in paths]
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(names[:5])}{more})" if names else ""
