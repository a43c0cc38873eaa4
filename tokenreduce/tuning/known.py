"""Makes the table of what is known of methods: ``python -m tokenreduce.tuning.known``, with ``--tuned
runs/a/tuned.json`` for other combinations than those that the table has.

``auto:`` chooses from it (:mod:`tokenreduce.estimation.auto`). Single methods come from the stored results page: at
each stage and budget the best ones, and the best that asks nothing of a vision tower. Combinations come from files
that ``tokenreduce tune`` wrote for ``world-llava`` and ``world-vit``, with the score of what was held out.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.bench.stored import StoredRow, number, stored_rows
from tokenreduce.common.files import write_text
from tokenreduce.common.words import speak_everywhere
from tokenreduce.core.draft import LEAST
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_method, parse
from tokenreduce.estimation.known import FILE

__all__ = ["main", "table"]

#: By group: the heading of its benchmark on the page, the column of the score, and what that is.
GROUPS = {
    "image": ("world-vit on world", "accuracy %", "scenes of world-vit that are right"),
    "language": ("world-llava on world: pictures", "accuracy %", "questions of world-llava about pictures"),
    "cache": (
        "world-llava on world: cache",
        "long agree %",
        "tokens of long answers of world-llava that stay the same",
    ),
}
#: Methods that are taken of a stage at each budget; none that looks at pixels, for which a drawn world tells nothing.
BEST = 2
ABOUT = (
    "What auto: chooses from. Scores are shares; keep is what each method keeps, from mild to strong. Single methods: "
    "of each stage the best two at each budget of the results page and the best that asks nothing of a vision tower. "
    "Combinations: what tokenreduce tune recommended, with the score of held-out samples."
)


def table(page: str, source: str, tuned: Iterable[tuple[str, dict[str, Any]]] = ()) -> dict[str, Any]:
    """The table from the text of a results page, which is called ``source``, and from tuned files by their name."""
    rows = list(stored_rows(page))
    groups: dict[str, dict[str, Any]] = {}
    for group, (heading, column, what) in GROUPS.items():
        mine = [row for row in rows if row.section.startswith(heading)]
        whole = next(number(row.cells[column])[0] for row in mine if row.spec == "unreduced")
        groups[group] = {"what": what, "unreduced": whole / 100, "candidates": _singles(mine, column, source)}
    for name, raw in tuned:
        groups["image" if raw["model"] == "world-vit" else "language"]["candidates"].append(_combined(name, raw))
    return {"about": ABOUT, "groups": groups}


def _singles(rows: Sequence[StoredRow], column: str, source: str) -> list[dict[str, Any]]:
    points: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    places: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    simple: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row in rows:
        reducer = None if row.baseline or row.spec == "unreduced" else _by_keep(row.spec)
        if reducer is None or "pixels" in reducer.needs:  # drawn grounds are flat, photographs are not
            continue
        name = f"{reducer.name.partition('@')[0]}@{reducer.stage}"
        score, stderr = (value / 100 for value in number(row.cells[column]))
        points[name][float(reducer.keep)] = score, stderr  # type: ignore[attr-defined]
        places[reducer.stage, row.budget].append((score, name))
        if not type(reducer).needs:
            simple[reducer.stage].append((score, name))
    chosen = {name for some in places.values() for _, name in sorted(some, reverse=True)[:BEST]}
    for some in simple.values():
        mean = {name: sum(s for s, n in some if n == name) / sum(n == name for _, n in some) for _, name in some}
        chosen.add(max(mean, key=lambda name: mean[name]))
    return [
        {
            "methods": [name],
            "points": [_point([k], *points[name][k]) for k in sorted(points[name], reverse=True)],
            "source": source,
        }
        for name in sorted(chosen)
    ]  # fmt: skip


def _by_keep(spec: str) -> Reducer | None:
    """The method of a row, where a share ``keep`` is all that was set and it keeps less than everything."""
    reducer = get_method(spec)
    keep = getattr(reducer, "keep", None)
    if not isinstance(keep, float) or not LEAST <= keep < 1 or set(reducer._changed()) - {"keep"}:
        return None
    return reducer


def _combined(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    reducers, score = parse(raw["reduce"]), raw["facts"]["score"]
    names = [f"{r.name.partition('@')[0]}@{r.stage}" for r in reducers]
    keep = [r.keep for r in reducers]  # type: ignore[attr-defined]
    return {"methods": names, "points": [_point(keep, score[0], score[1])], "source": name}


def _point(keep: list[float], score: float, stderr: float) -> dict[str, Any]:
    return {"keep": keep, "score": round(score, 4), "stderr": round(stderr, 4)}


def main(
    page: Annotated[Path, typer.Option(help="The stored results page.")] = Path("docs/results.md"),
    tuned: Annotated[
        list[Path] | None,
        typer.Option(
            help="A tuned.json of an embedded model; may be repeated. Without one the combinations stay as they are."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = FILE,
) -> None:
    """Make the table that auto: chooses from."""
    speak_everywhere()
    files = [(_said(raw), raw) for raw in _read(tuned or [])]
    made = table(page.read_text(encoding="utf-8"), page.as_posix(), files)
    if not files and out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))["groups"]
        for name, group in made["groups"].items():
            group["candidates"] += [c for c in before[name]["candidates"] if len(c["methods"]) > 1]
    command = " ".join(["python -m tokenreduce.tuning.known", *sys.argv[1:]])
    write_text(out, json.dumps({"made": command, **made}, indent=1) + "\n")
    counts = ", ".join(f"{len(g['candidates'])} {name}" for name, g in made["groups"].items())
    print(f"wrote {out}: {counts}")


def _said(raw: dict[str, Any]) -> str:
    samples = raw["facts"]["score"][2]
    return f"tokenreduce tune {raw['model']} --target {raw['facts']['target']}, {samples} held-out samples"


def _read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    out = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if odd := [raw["model"] for raw in out if raw["model"] not in ("world-llava", "world-vit")]:
        raise ValueError(f"what is known is of world-llava and world-vit, not of {odd[0]}")
    return out


if __name__ == "__main__":
    typer.run(main)
