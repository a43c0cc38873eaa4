"""Writes down how exact every toy is: ``python tests/toys/measure.py docs/models.json`` (some minutes).

``tokenreduce models --markdown --measured docs/models.json`` puts the numbers into docs/models.md.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenreduce as tr
from toys.build import TABLE, families, outer_class
from toys.checks import FORWARD, REFUSED, STOCK_FAILS, before, cached, forward, inside, layers_to_act, toy

SPEC = "random@projector:keep=0.4"


def measured(name: str) -> dict[str, Any]:
    """The largest relative differences of a toy, by what was compared."""
    row: dict[str, Any] = {"class": outer_class(name).__name__, "how": "table" if name in TABLE else "discovered"}
    if name in FORWARD:
        return {**row, "masked": forward(name, SPEC)}
    for positions in ("original", "compact"):
        spec = f"{SPEC},positions={positions}"
        try:
            tr.unpatch(tr.patch(toy(name).model, spec))
        except ValueError:
            continue
        row[positions] = before(name, spec, positions == "compact")
    at = layers_to_act(name)
    if (kept := cached(name)) is not None:
        row["cache"] = kept
    return {**row, "layers": at, **({"inside": max(inside(name, k) for k in at)} if at else {})}


def main(out: str, *only: str) -> None:
    warnings.filterwarnings("ignore")
    names = only or [n for n in families() if n not in (*REFUSED, *STOCK_FAILS)]
    rows = json.loads(Path(out).read_text()) if only else {}
    for name in names:
        try:
            rows[name] = measured(name)
        except Exception as error:
            rows[name] = {"class": outer_class(name).__name__, "error": f"{type(error).__name__}: {error}"[:200]}
        print(name, rows[name], flush=True)
        toy.cache_clear()
    Path(out).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
