"""One page of claims: what all notebooks of a run found, in one table (claims.csv, claims.md). This table is the
reproduction of the paper: with other weights or data the same table comes out of the same command.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from clipad.files import write_atomically
from clipad.studies.common import measured


def markdown(claims: pd.DataFrame, folder: str = "") -> str:
    """The claims as a Markdown table; the interval is the wide one (over images and categories).

    ``folder``: where the notebooks lie, seen from the page, as in ``notebooks/``.
    """
    rows = ["| claim | source | verdict | 95 % | scope | notebook |", "|---|---|---|---|---|---|"]
    for claim in claims.fillna({"metric": ""}).to_dict(orient="records"):
        notebook = f"[{claim['notebook'][:2]}]({folder}{claim['notebook']}.ipynb)"
        verdict, shown = f"**{claim['verdict']}**", measured(claim)
        cells = claim["sentence"], claim["source"], verdict, shown, claim["scope"], notebook
        rows.append(_row(*cells))
    return "\n".join(rows)


def _row(*cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def write_claims(records: Iterable[Path], folder: Path) -> Path | None:
    """Writes claims.csv and claims.md to ``folder``; returns the page, or None when no record holds a claim.

    ``records``: what notebooks leave, ``<notebook>.json``.
    """
    claims, published = [], []
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        own = {"notebook": record["notebook"]}
        claims += [claim | own for claim in record["results"].get("claims", [])]
        published += (record["results"].get("beside published") or {}).values()
    if not claims:
        return None
    table = pd.DataFrame(claims)
    page = f"# Claims\n\n{len(table)} claims of {table['notebook'].nunique()} notebooks.\n\n{markdown(table)}\n"
    if published:
        shown = pd.DataFrame(published).round(4)
        rows = [shown.columns, ["---"] * shown.shape[1], *shown.to_numpy()]
        page += "\n## Beside published numbers (fractions)\n\n"
        page += "\n".join(_row(*row) for row in rows) + "\n"
    write_atomically(folder / "claims.csv", table.to_csv(index=False))
    write_atomically(folder / "claims.md", page)
    return folder / "claims.md"
