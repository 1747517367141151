"""``clipad data check``: read every image and mask of a data set and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    "twelve bit": "16-bit files whose values stay below 4096, nearly black as read: multiply by 16",
}
"""what is worth a word, and the word"""


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found: `problems` must be mended, `notes` are worth knowing; `str()` prints everything."""

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

    The table has a row per category: `COUNTS` (empty masks have no pixel > 0, vanished ones lose all at `image_size`,
    duplicates are byte-identical to an earlier image), `anomalous_pixels` (mean share over the masks), and
    `expected_normal` and `expected_anomalous`, NaN where nothing is expected.

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
    columns = ["expected_normal", "expected_anomalous"]
    expected = pd.DataFrame.from_dict(EXPECTED.get(name, {}), "index", dtype=float, columns=columns)
    order = pd.Index([*expected.index, *facts["category"]], name="category").unique()
    table = facts.groupby("category")[COUNTS].sum().reindex(order, fill_value=0).astype(int)
    table["anomalous_pixels"] = facts.groupby("category")["marked"].mean()
    table = table.join(expected).reset_index()
    problems = facts["problems"].sum() + _problems(table)
    if flat := _named(dataset, facts["path"][facts["flat"]]):
        problems.append(f"images with at most two colours, so masks or empty: {flat}")
    notes = {text: _named(dataset, facts["path"][facts[k] == 1]) for k, text in NOTES.items()}
    notes = [f"{text}: {names}" for text, names in notes.items() if names]
    if name == "folder":
        notes += _notes_on_folder(dataset)
    return DatasetReport(name, dataset.root, table, problems, notes)


def _facts(sample: Sample, root: Path, image_size: int) -> dict:
    """What reading the files of one sample shows: columns of the table, of ``NOTES``, and a list of problems."""
    found = dict.fromkeys([*COUNTS, *NOTES], 0) | {"digest": None, "flat": False, "marked": np.nan}
    found |= {"category": sample.category, "path": sample.image_path, "problems": []}
    found |= {LABELS[sample.label]: 1, "missing_masks": sample.label == 1 and not sample.mask_path}

    def look(kind: str, path: Path | None, read: Callable[[Path], None]) -> None:
        """Count a file that cannot be used under ``kind`` if it is missing, and say why."""
        try:
            if path:
                datasets.require_usable(path, root)
                read(path)
        except (OSError, ValueError) as error:
            kind = kind if isinstance(error, FileNotFoundError) else "unreadable"
            found["wrong_size_masks" if isinstance(error, MaskSizeError) else kind] += 1
            found["problems"].append(str(error))

    def read_image(path: Path) -> None:
        image = datasets.decode(path)
        found.update(dict.fromkeys(datasets.remarks(image), 1))
        found["flat"] = datasets.two_levels(datasets.eight_bit(image))
        found["digest"] = content_hash(path)

    def read_mask(path: Path) -> None:
        if found["digest"]:  # the image can be read
            datasets.require_mask_size(path, sample.image_path)
        mask = datasets.native_mask(path)
        if path == sample.mask_path:
            empty = not mask.any()
            vanished = not empty and not datasets.resize_mask(mask, image_size).any()
            found.update(masks=1, marked=mask.mean(), empty_masks=empty, vanished_masks=vanished)
            if empty:
                found["problems"].append(f"mask {path} has no pixel > 0")

    look("unreadable", sample.image_path, read_image)
    look("missing_masks", sample.mask_path, read_mask)
    look("missing_masks", sample.object_mask_path, read_mask)
    return found


def _problems(table: pd.DataFrame) -> list[str]:
    """What is wrong with a category as a whole."""
    problems = []
    for row in table.itertuples():
        found, expected = (row.normal, row.anomalous), (row.expected_normal, row.expected_anomalous)
        if row.expected_normal >= 0 and found != expected:
            problems.append(
                f"{row.category}: found {found[0]} normal + {found[1]} anomalous images, "
                f"expected {expected[0]:.0f} + {expected[1]:.0f}"
            )
        if row.anomalous_pixels > 0.5:
            problems.append(
                f"{row.category}: the masks mark {row.anomalous_pixels:.0%} of the pixels as anomalous: are they the "
                "wrong way round (255 = background)?"
            )
    return problems


def _notes_on_folder(dataset: Dataset) -> list[str]:
    """What was left out of data set "folder", and what its prompts will say."""
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
