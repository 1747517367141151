"""One page of claims: what all notebooks of a run found, in one table (claims.csv, claims.md). This table is the
reproduction of the paper: with other weights or data the same table comes out of the same command.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from clipad.files import write_atomically
from clipad.studies.common import measured


def collect(records: Iterable[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Claims and comparisons with published numbers from the records that notebooks leave (``<notebook>.json``).

    Returns a row a claim (its fields and ``notebook``) and a row a published number; either may be empty.
    """
    claims, published = [], []
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        own = {"notebook": record["notebook"]}
        claims += [claim | own for claim in record["results"].get("claims", [])]
        published += (record["results"].get("beside published") or {}).values()
    return pd.DataFrame(claims), pd.DataFrame(published)


def markdown(claims: pd.DataFrame, folder: str = "") -> str:
    """The claims as a Markdown table; the interval is the wide one (over images and categories).

    ``folder``: where the notebooks lie, seen from the page, as in ``notebooks/``.
    """
    rows = ["| claim | source | verdict | 95 % | scope | notebook |", "|---|---|---|---|---|---|"]
    for claim in claims.fillna({"metric": ""}).to_dict(orient="records"):
        notebook = f"[{claim['notebook'][:2]}]({folder}{claim['notebook']}.ipynb)"
        verdict, scope = f"**{claim['verdict']}**", claim["scope"]
        rows.append(
            _row(claim["sentence"], claim["source"], verdict, measured(claim), scope, notebook)
        )
    return "\n".join(rows)


def _row(*cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def write_claims(records: Iterable[Path], folder: Path) -> Path | None:
    """Writes claims.csv and claims.md to ``folder``; returns the page, or None when no record holds a claim."""
    claims, published = collect(records)
    if claims.empty:
        return None
    said = f"{len(claims)} claims of {claims['notebook'].nunique()} notebooks"
    page = f"# Claims\n\n{said}.\n\n{markdown(claims)}\n"
    if not published.empty:
        rows = [published.columns, ["---"] * published.shape[1], *published.round(4).to_numpy()]
        table = "\n".join(_row(*row) for row in rows)
        page += f"\n## Beside published numbers (fractions)\n\n{table}\n"
    write_atomically(folder / "claims.csv", claims.to_csv(index=False))
    write_atomically(folder / "claims.md", page)
    return folder / "claims.md"
