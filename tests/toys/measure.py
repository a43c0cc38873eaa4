"""Writes down how exact every toy is: ``python tests/toys/measure.py docs/models.json`` (some minutes).

``tokenreduce models --markdown --measured docs/models.json`` puts the numbers into docs/models.md. Every family is
written as it is done: ``--resume`` goes on where a run was stopped, and names behind the file measure those alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenreduce as tr
from tokenreduce.adapters import encoder_refusal
from tokenreduce.adapters.language.find import find
from toys.build import TABLE, families, outer_class
from toys.checks import FORWARD, REFUSED, STOCK_FAILS, before, cached, forward, inside, layers_to_act, plain, toy
from toys.towers import dropped_inside

SPEC = "random@projector:keep=0.4"


def measured(name: str) -> dict[str, Any]:
    """The largest relative differences of a toy, by what was compared."""
    row: dict[str, Any] = {"class": outer_class(name).__name__, "how": "table" if name in TABLE else "discovered"}
    if name in FORWARD:
        return {**row, "masked": forward(name, SPEC), **without_tower(name)}
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
    row |= {"layers": at, **({"inside": max(inside(name, k) for k in at)} if at else {})}
    return {**row, **in_tower(name)}


def in_tower(name: str) -> dict[str, Any]:
    """How far a generation is whose tower drops patches, or why no method acts there."""
    return without_tower(name) or {"encoder": dropped_inside(toy(name))[0]}


def without_tower(name: str) -> dict[str, Any]:
    """Why no method acts in the tower of a discovered model; nothing where one does."""
    model, _ = plain(name)
    found = find(model)
    why = encoder_refusal(model, found) if name not in TABLE else ""
    return {"no_encoder": why.partition(" is not supported: ")[2] or why} if why else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="families to measure; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = json.loads(given.out.read_text()) if given.names or (given.resume and given.out.exists()) else {}
    names = given.names or [n for n in families() if n not in (*REFUSED, *STOCK_FAILS, *rows)]
    for name in names:
        try:
            rows[name] = measured(name)
        except Exception as error:
            rows[name] = {"class": outer_class(name).__name__, "error": f"{type(error).__name__}: {error}"[:200]}
        print(name, rows[name], flush=True)
        toy.cache_clear()
        given.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
