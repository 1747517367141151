"""``python -m benchmarks``: measure every bar and print the table, which also goes to outputs/benchmarks/.

Every ratio is taken in one run: both sides in turn, five times, with the same threads and dtype; the median counts.
With one thread (the default) processor time is judged, else the wall clock. The status is 1 if a row that is about
agreement misses its bar; a slow machine is no failure.

    python -m benchmarks --quick                    small sizes, seconds: is everything still right?
    python -m benchmarks --only method --threads 2
    python -m benchmarks --peers-python PATH        the Python of an environment that holds anomalib and ADEval
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import threadpoolctl
import torch
from tqdm import tqdm

from benchmarks import evaluation, method, metrics
from benchmarks.measure import REPEATS, Row

COLUMNS = ["id", "what", "ratio or value", "bar", "verdict", "note"]
PACKAGES = ("torch", "open_clip_torch", "numpy", "scipy", "scikit-learn")


def machine(threads: int) -> str:
    """Everything a reader needs to judge the numbers."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    load = (
        " ".join(f"{value:.1f}" for value in os.getloadavg())
        if hasattr(os, "getloadavg")
        else "unknown"
    )
    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, {_processor()}, "
        f"{os.cpu_count()} cores, load average {load}; {threads} thread{'s' if threads > 1 else ''}, float32; "
        f"Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def table(rows: list[Row], quick: bool) -> pd.DataFrame:
    def number(value: float | None, unit: str) -> str:
        return (
            ""
            if value is None
            else f"{value:.3g}{unit if unit.startswith(' ') or not unit else ' ' + unit}"
        )

    return pd.DataFrame(
        [
            (
                row.id,
                row.what,
                number(row.value, row.unit),
                ""
                if row.bar is None
                else ("at least " if row.at_least else "at most ") + number(row.bar, row.unit),
                row.verdict(quick),
                row.note,
            )
            for row in rows
        ],
        columns=COLUMNS,
    )


def markdown(frame: pd.DataFrame) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *frame.to_numpy().tolist()]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Evaluation first: it looks at the memory of the process, which still is as it started.
    groups = {"evaluation": evaluation.rows, "method": method.rows, "metrics": metrics.rows}
    parser.add_argument(
        "--quick", action="store_true", help="small sizes; speed and memory are not judged"
    )
    parser.add_argument("--only", choices=groups, help="one part of the table")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch and of the linear algebra (default 1)"
    )
    parser.add_argument(
        "--peers-python", metavar="PATH", help="interpreter that imports anomalib and adeval"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmarks"), help="folder of the table"
    )
    chosen = parser.parse_args()
    if chosen.threads < 1:
        parser.error(f"--threads has to be 1 or more, found {chosen.threads}")
    chosen.output.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(chosen.threads)
    rows: list[Row] = []
    with (
        threadpoolctl.threadpool_limits(chosen.threads),
        tqdm(unit="row", disable=chosen.quick) as bar,
    ):
        for name, measure in groups.items():
            if chosen.only in (None, name):
                bar.set_description(name)
                arguments = {"peers_python": chosen.peers_python} if name == "metrics" else {}
                for row in measure(chosen.quick, **arguments):
                    rows.append(row)
                    bar.update()
    rows.sort(key=lambda row: int(row.id[1:]))

    frame = table(rows, chosen.quick)
    header = f"{machine(chosen.threads)}. Medians of {REPEATS} interleaved repeats."
    text = f"{header}\n\n{markdown(frame)}\n"
    print(text)
    (chosen.output / "table.md").write_text(text, encoding="utf-8")
    frame.assign(machine=header).to_csv(chosen.output / "table.csv", index=False)
    wrong = [row for row in rows if row.agreement and row.verdict() == "missed"]
    for row in wrong:
        print(
            f"{row.id}: {row.what} is {row.value:.3g}, expected {row.bar:.3g} at most",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
