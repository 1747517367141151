"""``clipad data check``: read every image and mask of a data set and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from clipad import datasets
from clipad.datasets import DEMO, EXPECTED, Dataset, MaskSizeError, Sample
from clipad.files import content_hash, printable, scan

LABELS = {0: "normal", 1: "anomalous", -1: "unlabelled"}
COUNTS = [*LABELS.values(), "masks", "unreadable", "missing_masks"]
COUNTS += ["wrong_size_masks", "empty_masks", "vanished_masks", "duplicates"]
NOTES = {
    "duplicates": "byte-identical to an earlier image, kept",
    "turned": "EXIF orientation set, ignored: pixels are taken as stored",
    "twelve bit": "16-bit files whose values stay below 4096: read on the 16-bit scale they are nearly black; if the "
    "camera has 12 bits, multiply by 16",
}
"""what is worth a word, and the word"""


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
        said = ("category", "normal", "anomalous", "masks")
        shown = [c for c in self.table if c in said or self.table[c].fillna(0).any()]
        percent = {"anomalous_pixels": lambda share: f"{share:.1%}"}
        table = self.table[shown].to_string(
            index=False, na_rep="-", float_format="{:.0f}".format, formatters=percent
        )
        lines = [f"data set {self.name!r} at {printable(str(self.root))}", table]
        lines += [f"PROBLEM: {text}" for text in self.problems]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join([*lines, "ok" if self.ok else f"{len(self.problems)} problems"])


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

    Raises what `load_dataset` raises for a root or a layout that cannot be listed.
    """
    image_size = image_size or (96 if name in DEMO else 240)
    dataset = datasets.list_dataset(name, root, normal_folder)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        read = pool.map(lambda sample: _facts(sample, dataset.root, image_size), dataset)
        bar = tqdm(read, f"checking {name}", len(dataset), unit="image", disable=not progress)
        facts = pd.DataFrame(bar)
    facts["duplicates"] = facts["digest"].notna() & facts["digest"].duplicated()
    if all(sample.mask_path is None for sample in dataset):
        facts["missing_masks"] = 0
    table = _table(name, facts)
    problems = [text for texts in facts["problems"] for text in texts]
    for row in table.itertuples():
        expected = f"expected {row.expected_normal:.0f} + {row.expected_anomalous:.0f}"
        found = f"{row.normal:.0f} + {row.anomalous:.0f}"
        if row.expected_normal >= 0 and not expected.endswith(f" {found}"):
            problems.append(f"{row.category}: found {found} normal + anomalous images, {expected}")
        if row.anomalous_pixels > 0.5:
            problems.append(
                f"{row.category}: the masks mark {row.anomalous_pixels:.0%} of the pixels as anomalous: are they the "
                "wrong way round (255 = background)?"
            )
    if flat := _named(dataset, facts["path"][facts["flat"] == 1]):
        problems.append(f"images with at most two colours, so masks or empty: {flat}")
    notes = {text: _named(dataset, facts["path"][facts[k] == 1]) for k, text in NOTES.items()}
    notes = [f"{text}: {names}" for text, names in notes.items() if names]
    return DatasetReport(
        name, dataset.root, table, problems, notes + _notes_on_folder(name, dataset)
    )


def _facts(sample: Sample, root: Path, image_size: int) -> dict:
    """What reading the files of one sample shows: columns of the table, of ``NOTES``, and a list of problems."""
    found = dict.fromkeys([*COUNTS, *NOTES, "flat"], 0)
    found |= {"category": sample.category, "path": sample.image_path, "digest": None}
    found |= {LABELS[sample.label]: 1, "problems": []}
    found["missing_masks"] = int(sample.label == 1 and sample.mask_path is None)
    for path in filter(None, (sample.image_path, sample.mask_path, sample.object_mask_path)):
        try:
            datasets.require_usable(path, root)
            if path == sample.image_path:
                image = datasets.decode(path)
                found |= dict.fromkeys(datasets.remarks(image), 1)
                found["flat"] = int(datasets.two_levels(datasets.eight_bit(image)))
                found["digest"] = content_hash(path)
                continue
            if found["digest"]:
                datasets.require_mask_size(path, sample.image_path)
            mask = datasets.native_mask(path)
        except (OSError, ValueError) as error:
            kind = "wrong_size_masks" if isinstance(error, MaskSizeError) else "unreadable"
            if isinstance(error, FileNotFoundError) and path != sample.image_path:
                kind = "missing_masks"
            found[kind] += 1
            found["problems"].append(str(error))
            continue
        if path == sample.mask_path:
            found |= {"masks": 1, "marked": float(mask.mean()), "empty_masks": int(not mask.any())}
            vanished = mask.any() and not datasets.resize_mask(mask, image_size).any()
            found["vanished_masks"] = int(vanished)
            if not mask.any():
                found["problems"].append(f"mask {path} has no pixel > 0")
    return found


def _table(name: str, facts: pd.DataFrame) -> pd.DataFrame:
    expected = pd.DataFrame.from_dict(
        EXPECTED.get(name, {}), "index", columns=["expected_normal", "expected_anomalous"]
    )
    order = pd.Index([*expected.index, *facts["category"]], name="category").unique()
    groups = facts.groupby("category")
    table = groups[COUNTS].sum().reindex(order, fill_value=0).astype(int)
    shares = groups["marked"].mean() if "marked" in facts else float("nan")
    return table.assign(anomalous_pixels=shares).join(expected.astype(float)).reset_index()


def _notes_on_folder(name: str, dataset: Dataset) -> list[str]:
    """What was left out of data set "folder", and what its prompts will say."""
    if name != "folder":
        return []
    used = {path for s in dataset for path in (s.image_path, s.mask_path, s.object_mask_path)}
    rest = scan(dataset.root, used)
    notes = [f"left out: {line}" for line in rest.skipped_lines(dataset.root)]
    if names := _named(dataset, datasets.for_testing(rest.photographs, dataset.root)):
        notes.append(f"photographs that no layout takes: {names}")
    names = ", ".join(f"'a flawless {category}'" for category in dataset.categories[:5])
    return [*notes, f"the prompts will say {names}: folders should be called as their product"]


def _named(dataset: Dataset, paths: Iterable[Path]) -> str:
    """How many files, and the first five of them; empty if there are none."""
    names = [printable(str(path.relative_to(dataset.root))) for path in paths]
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(names[:5])}{more})" if names else ""
