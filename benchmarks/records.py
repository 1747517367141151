"""``python -m benchmarks.records outputs/gpu-demo``: the records of a run beside the stored ones, which a CPU made.

``make gpu-demo`` executes all notebooks with ``device=cuda``; each leaves a record. Every number in it is compared with
the one that is stored in ``notebooks/``, within the tolerance of its kind. The status is 1 where a number is outside of
it or missing; what a clock or a memory counter gave is left out.

Why not equal: float16 in the network (on the CPU's emulation 0.0003 in a metric, 0.011 in a class probability), another
order of sums, and in training the backward pass of the bilinear interpolation, which a GPU adds up in no fixed order.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from clipad.studies.experiments import RESULT_MIME

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
OF_THE_MACHINE = re.compile(r"latency|second|\bms\b|time|cost|memory|\bmb\b|per image", re.I)
TOLERANCES = [
    ("pixel AUROC", re.compile(r"pixel_(auroc|pro)$"), 0.002),
    ("image AUROC", re.compile(r"(image|class)_auroc$"), 0.005),
    ("average precision, F1-max", re.compile(r"(_ap|_f1_max)$"), 0.01),
    ("end of an interval", re.compile(r"\b(low|high)\b|_(low|high)"), 0.02),
]
"""kind, its names, largest absolute difference"""
OTHERS = ("other numbers", 0.02)
"""absolute below 1, relative above"""
TRAINED = ("04", 5)
"""the notebook that trains, and how much wider its tolerances are"""


def compare(found: dict, expected: dict, wider: float = 1) -> pd.DataFrame:
    """Results of one notebook -> a row per number: name, kind, both values, difference, whether it is within."""
    there, wanted = dict(_numbers(found)), dict(_numbers(expected))
    rows = []
    for name in sorted(there.keys() | wanted.keys()):
        if OF_THE_MACHINE.search(name):
            continue
        kind, tolerance = next(
            ((kind, limit) for kind, names, limit in TOLERANCES if names.search(name)), OTHERS
        )
        a, b = there.get(name, math.nan), wanted.get(name, math.nan)
        limit = wider * tolerance * (max(1, abs(b)) if kind == OTHERS[0] else 1)
        within = name in there and name in wanted and (_same(a, b) or abs(a - b) <= limit)
        rows.append((name, kind, a, b, abs(a - b), within))
    return pd.DataFrame(rows, columns=["name", "kind", "found", "stored", "difference", "within"])


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _numbers(value, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested dictionaries and lists by its path; null is not a number, as in the records."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{name}/{i}")
    elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield name, math.nan if value is None else float(value)


def stored_record(notebook: Path) -> dict | None:
    """The record within a stored notebook, None where it has none."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if RESULT_MIME in output.get("data", {}):
                return output["data"][RESULT_MIME]
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of `clipad run --all`")
    parser.add_argument(
        "--notebooks", type=Path, default=NOTEBOOKS, help="where the stored ones are"
    )
    chosen = parser.parse_args(arguments)
    outside = 0
    for notebook in sorted(chosen.notebooks.glob("*.ipynb")):
        stored, path = stored_record(notebook), chosen.folder / f"{notebook.stem}.json"
        if stored is None:
            continue
        if not path.is_file():
            print(f"{notebook.stem}: no record in {chosen.folder}")
            outside += 1
            continue
        wider = TRAINED[1] if notebook.stem.startswith(TRAINED[0]) else 1
        record = json.loads(path.read_text(encoding="utf-8"))
        table = compare(record["results"], stored["results"], wider)
        largest = table.groupby("kind")["difference"].max()
        told = ", ".join(f"{kind} {value:.2g}" for kind, value in largest.items())
        print(
            f"{notebook.stem} on {record['provenance']['device']}: {len(table)} numbers; largest differences: {told}"
        )
        wrong = table[~table["within"]]
        outside += len(wrong)
        for row in wrong.head(10).itertuples():
            print(f"  outside: {row.name} is {row.found:.6g}, stored {row.stored:.6g}")
        if len(wrong) > 10:
            print(f"  and {len(wrong) - 10} more")
    print("all within" if not outside else f"{outside} outside of the tolerances")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
