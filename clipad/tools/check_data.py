"""``clipad data check``: read every image and mask of a data set and say what is wrong with them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from clipad import datasets
from clipad.datasets import Sample
from clipad.io import images
from clipad.io.files import PHOTOGRAPH, content_hash, printable, scan, skipped_lines

LABELS = {0: "normal", 1: "anomalous", -1: "unlabelled"}
COUNTS = [*LABELS.values(), "masks", "faults", "duplicates"]


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found: `problems` must be mended, `notes` are worth knowing; `str()` prints everything."""

    title: str
    table: pd.DataFrame
    problems: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        percent = {"anomalous_pixels": "{:.1%}".format}
        shown = self.table.loc[:, self.table.fillna(0).any()]
        lines = [self.title, shown.to_string(index=False, na_rep="-", formatters=percent)]
        lines += [f"PROBLEM: {text}" for text in self.problems]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join([*lines, "ok" if self.ok else f"{len(self.problems)} problems"])


def check_dataset(
    name: str, root: str | Path | None = None, normal_folder: str = "", progress: bool = True
) -> DatasetReport:
    """Read every test image and mask of a data set and report what is wrong with them.

    ``name``, ``root``, ``normal_folder``, and what is raised for a layout that cannot be listed: see
    :func:`clipad.load_dataset`.

    The table has a row per category: `COUNTS` (faults: files that cannot be used, duplicates: images that are
    byte-identical to an earlier one), and `anomalous_pixels` (mean share over the masks).
    """
    dataset = datasets.list_dataset(name, root, normal_folder)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        read = pool.map(lambda sample: _facts(sample, dataset.root), dataset)
        bar = tqdm(read, f"checking {name}", len(dataset), unit="image", disable=not progress)
        facts = pd.DataFrame(bar)
    facts["duplicates"] = facts["digest"].notna() & facts["digest"].duplicated()
    expected = datasets.expected_counts(name)
    order = list(expected or dataset.categories)
    by_category = facts.groupby("category")
    table = by_category[COUNTS].sum().reindex(order, fill_value=0).astype(int)
    table["anomalous_pixels"] = by_category["marked"].mean()
    problems = facts["problems"].sum()
    for row in table.itertuples():
        found, wanted = (row.normal, row.anomalous), expected.get(row.Index)
        if wanted and found != wanted:
            problems.append(
                f"{row.Index}: found {found[0]} normal + {found[1]} anomalous images, "
                f"expected {wanted[0]} + {wanted[1]}"
            )
        if row.anomalous_pixels > 0.5:
            problems.append(
                f"{row.Index}: the masks mark {row.anomalous_pixels:.0%} of the pixels as anomalous: are they the "
                "wrong way round (255 = background)?"
            )
    copies = {
        "byte-identical to an earlier image, kept": facts["path"][facts["duplicates"]].tolist()
    }
    notes = skipped_lines(copies, dataset.root)
    if name == "folder":
        notes += _left_out(dataset)
    title = f"data set {name!r} at {printable(str(dataset.root))}"
    return DatasetReport(title, table.reset_index(), problems, notes)


def _facts(sample: Sample, root: Path) -> dict:
    """What reading the files of one sample shows: columns of the table, and a list of problems."""
    image, problems = sample.image_path, []
    found = {"category": sample.category, "path": image, "problems": problems, "digest": None}
    found |= dict.fromkeys(COUNTS, 0) | {LABELS[sample.label]: 1, "marked": np.nan}
    for path in filter(None, (image, sample.mask_path, sample.object_mask_path)):
        try:
            of = "" if path == image else f", the mask of {image.name},"
            datasets.require_usable(path, root, of)
            if path == image:
                images.read_image(path)
                found["digest"] = content_hash(path)
                continue
            mask = images.read_mask(path)
            if found["digest"]:  # the image can be read
                images.require_mask_size(path, image)
            if path == sample.mask_path:
                found |= {"masks": 1, "marked": mask.mean()}
                if not mask.any():
                    raise ValueError(f"mask {path} has no pixel > 0")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return found | {"faults": len(problems)}


def _left_out(dataset: datasets.Dataset) -> list[str]:
    """A line for each reason why files of data set "folder" are not used."""
    used = {path for s in dataset for path in (s.image_path, s.mask_path, s.object_mask_path)}
    found = {why: [p for p in paths if p not in used] for why, paths in scan(dataset.root).items()}
    found["photographs that no layout takes"] = datasets.for_testing(
        found.pop(PHOTOGRAPH), dataset.root
    )
    return [f"left out: {line}" for line in skipped_lines(found, dataset.root)]
