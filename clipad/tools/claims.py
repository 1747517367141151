"""One page of claims: what all notebooks of a run found, in one table (claims.csv, claims.md)."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from clipad.io.files import write_atomically


def markdown(claims: pd.DataFrame, folder: str = "") -> str:
    """The claims as a Markdown table, with wide intervals; ``folder``: of the notebooks, seen from the page."""
    rows = []
    for claim in claims.fillna({"measured": ""}).to_dict(orient="records"):
        notebook = f"[{claim['notebook'][:2]}]({folder}{claim['notebook']}.ipynb)"
        found = f"**{claim['verdict']}**", claim["measured"], claim["scope"]
        rows.append((claim["sentence"], claim["source"], *found, notebook))
    return _table(["claim", "source", "verdict", "95 %", "scope", "notebook"], rows)


def _table(header, rows) -> str:
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in (header, *rows)]
    lines.insert(1, " | ".join("---" for _ in header))
    return "\n".join(f"| {line} |" for line in lines)


def write_claims(records: Iterable[Path], folder: Path) -> Path | None:
    """Writes claims.csv and claims.md to ``folder``; returns the page, None when no record (``<notebook>.json``) has
    a claim."""
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
        rows = _table(shown.columns, shown.to_numpy())
        page += f"\n## Beside published numbers (fractions)\n\n{rows}\n"
    write_atomically(folder / "claims.csv", table.to_csv(index=False))
    write_atomically(folder / "claims.md", page)
    return folder / "claims.md"
