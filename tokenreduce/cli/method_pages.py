"""A page for every method, of its docstring and of what is stored: ``tokenreduce methods --pages FOLDER``.

Adding a method adds its page. Results are read from a results page (``docs/results.md``), and what it keeps of some
pictures from a file that ``python -m tokenreduce.bench.gallery`` writes (``docs/kept.json``); a method that is not
there says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenreduce.cli.kept_section import kept_section
from tokenreduce.cli.methods_page import STAGES, anchor, section

if TYPE_CHECKING:
    from tokenreduce.bench.gallery.kept import Kept, Without
    from tokenreduce.bench.stored import StoredRow
    from tokenreduce.core.reducer import Reducer

__all__ = ["NEEDS", "curve", "method_pages", "method_pictures", "write_pages"]

#: What a method may ask of a model beyond the tokens themselves, in words.
NEEDS = {
    "keys": "keys of attention", "queries": "queries of attention", "values": "values of attention",
    "attention": "rows of attention", "before": "tokens as they entered the layer", "text": "the question",
    "times": "times of frames", "ahead": "attention of the layer that it acts before",
    "plain": "keys and queries before their rotation", "middle": "a place between attention and MLP",
    "prompt": "features at the entry of the language model", "norm": "the language model's last norm",
    "tower": "queries and keys of blocks of the vision tower", "cls": "a class token in the vision tower",
    "clip": "a CLIP model's space of images and texts", "crops": "images that are cut into tiles",
    "frames": "which frames a token stands for", "history": "how many visual tokens there were",
    "head": "a pooling head of the vision tower", "pixels": "pixels", "places": "places of tokens in the image",
    "unrotated": "queries and keys before their rotation", "through": "the projector as a function",
    "rotary": "tables that turned the keys",
}  # fmt: skip
#: The score of a row, whichever column has it, and the share that it was run at.
SCORES = ("accuracy %", "long agree %")
SHARES = {"KV %": "bytes of keys and values", "visual %": "visual tokens", "FLOPs %": "FLOPs"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 230, 44, 130, 16, 40
COLOURS = {"method": "#0072b2", "random": "#777777"}


@dataclass(frozen=True)
class _Point:
    share: float
    score: float
    row: StoredRow


def method_pages(results: str = "", kept: Mapping[str, Kept | Without] | None = None) -> dict[str, str]:
    """Markdown by the name of its file, from the text of a results page and what methods ``kept`` of pictures.

    Pages show the files that :func:`method_pictures` makes of ``kept``. Raises what loading the methods raises.
    """
    from tokenreduce.bench.stored import stored_rows
    from tokenreduce.core.registry import load_all

    found: dict[str, dict[str, list[_Point]]] = defaultdict(lambda: defaultdict(list))
    for row in stored_rows(results):
        if (point := _point(row)) is not None:
            found[row.section][_full(row.spec)].append(point)
    return {f"{anchor(n)}.md": _page(n, kind, found, (kept or {}).get(n)) for n, kind in sorted(load_all().items())}


def method_pictures(kept: Mapping[str, Kept | Without]) -> dict[str, bytes]:
    """The pictures of the pages, WebP by the name of its file: the originals, and what every method ``kept``.

    Raises ``ValueError`` for what was kept of other pictures than the gallery's.
    """
    from tokenreduce.bench.gallery.kept import Kept
    from tokenreduce.bench.gallery.sheets import FILES, original, sheet, webp

    drawn = {f"{anchor(name)}.webp": webp(sheet(one)) for name, one in kept.items() if isinstance(one, Kept)}
    return {**{file: webp(original(pictures)) for pictures, file in FILES.items()}, **drawn}


def write_pages(folder: Path, results: Path, kept: Path) -> int:
    """Write all pages with their pictures into ``folder``; returns how many pages. Raises ``OSError`` for a page, file
    or folder that is not there, ``ValueError`` for a file that is none of the gallery's."""
    from tokenreduce.bench.gallery import read_kept
    from tokenreduce.common.files import write_bytes, write_text

    known = read_kept(kept)
    pages, fix = method_pages(results.read_text(encoding="utf-8"), known), "choose another place with --pages"
    for name, text in pages.items():
        write_text(folder / name, text, fix)
    for name, data in method_pictures(known).items():
        write_bytes(folder / name, data, fix)
    return len(pages)


def _full(spec: str) -> str:
    """The registry's name of a row's method: ``random@encoder`` is ``random`` there."""
    from tokenreduce.core.registry import get_class, load_all

    name = spec.partition(":")[0]
    if name not in load_all() and "@" not in name:
        return name
    kind = get_class(name)
    return next(known for known, other in load_all().items() if other is kind)


def _point(row: StoredRow) -> _Point | None:
    from tokenreduce.bench.stored import number

    score = next((row.cells[c] for c in SCORES if c in row.cells), "-")
    share = next((row.cells[c] for c in SHARES if c in row.cells), "-")
    try:
        return _Point(number(share)[0], number(score)[0], row)
    except ValueError:
        return None


def _page(
    name: str, kind: type[Reducer], found: dict[str, dict[str, list[_Point]]], kept: Kept | Without | None
) -> str:
    where = STAGES.get(kind.stage, kind.stage)
    parts = [
        f"# {name}",
        f"{where} (stage `{kind.stage}`). [All methods](../methods.md)",
        section(name, kind, heading=False),
    ]
    parts += ["## What it keeps", *kept_section(name, kept)]
    parts += ["## What it asks of a model", *_asks(kind)]
    parts += ["## On the embedded models", *_results(name, kind, found)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _asks(kind: type[Reducer]) -> Iterator[str]:
    asked = "\n".join(f"- `{need}`: {NEEDS.get(need, need)}" for need in kind.needs)
    yield asked or "Nothing but the tokens."
    yield (
        "A model that cannot give that is refused by name. `tokenreduce describe MODEL` lists what fits yours, and the "
        "[models page](../models.md) has every architecture with its stages."
    )


def _results(name: str, kind: type[Reducer], found: dict[str, dict[str, list[_Point]]]) -> Iterator[str]:
    there = {heading: rows for heading, rows in found.items() if name in rows}
    if not there and kind.stage == "diffusion":
        yield (
            "It has no row on the [results page](../results.md): the embedded models make no images. What it saves in "
            "models in the shape of Stable Diffusion is on the page on "
            "[diffusion models](../guides/diffusion.md#what-it-saves)."
        )
        return
    if not there:
        yield "It has no row on the [results page](../results.md) yet; `make results` measures it."
        return
    yield (
        "From the [results page](../results.md): small trained models, to be read as a check and a comparison at equal "
        "cost, not as a ranking for yours. A star marks a share that could not be brought down to its budget."
    )
    for heading, rows in there.items():
        points = sorted(rows[name], key=lambda p: -p.share)
        others = {"random": _baseline(rows, kind.stage)} if not name.startswith("random") else {}
        yield f"### {heading.partition(': ')[2] or heading}"
        yield curve(name, points, others, _whole(rows))
        heads = [h for h in ("visual %", "KV %", *SCORES, "FLOPs %", "GMACs", "KV") if h in points[0].row.cells]
        lines = ["| setting | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += [f"| `{p.row.spec}` | " + " | ".join(p.row.cells.get(h, "-") for h in heads) + " |" for p in points]
        yield "\n".join(lines)


def _baseline(rows: dict[str, list[_Point]], stage: str) -> list[_Point]:
    for name in (f"random@{stage}", "random"):
        if name in rows:
            return sorted(rows[name], key=lambda p: -p.share)
    return []


def _whole(rows: dict[str, list[_Point]]) -> float:
    some = rows.get("unreduced")
    return some[0].score if some else 100.0


def curve(name: str, points: Sequence[_Point], others: dict[str, list[_Point]], whole: float) -> str:
    """An SVG of scores over shares, ``name`` in colour, ``others`` dashed, all from the unreduced model on."""
    inner, deep = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    lines = {name: list(points), **{n: p for n, p in others.items() if p}}
    low = min(p.score for some in lines.values() for p in some) // 20 * 20

    def x(share: float) -> float:
        return LEFT + inner * (1 - min(share, 100.0) / 100)

    def y(score: float) -> float:
        return TOP + deep * (100 - score) / max(100 - low, 1.0)

    out = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" font-size="12">']
    out.append(f"<title>score of {name} over the share that is left</title>")
    for value in sorted({low, (low + 100) / 2, 100.0}):
        out.append(f'<line x1="{LEFT}" x2="{LEFT + inner}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#cccccc"/>')
        out.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="currentColor">{value:g}</text>'
        )
    for share in (100, 75, 50, 25, 0):
        out.append(
            f'<text x="{x(share):.1f}" y="{HEIGHT - 22}" text-anchor="middle" fill="currentColor">{share} %</text>'
        )
    said = points[0].row.cells
    axis = next(text for column, text in SHARES.items() if column in said)
    out.append(f'<text x="{LEFT + inner / 2}" y="{HEIGHT - 5}" text-anchor="middle" fill="currentColor">{axis}</text>')
    last = -100.0
    for called, some in sorted(lines.items(), key=lambda item: -item[1][-1].score):
        colour = COLOURS["method" if called == name else "random"]
        dash = "" if called == name else ' stroke-dasharray="5 4"'
        at = [(100.0, whole), *((p.share, p.score) for p in some)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in at)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in at]
        last = max(y(at[-1][1]) + 4, last + 14)
        out.append(f'<text x="{LEFT + inner + 8}" y="{last:.1f}" fill="{colour}">{called} {at[-1][1]:g}</text>')
    return "\n".join(["<div>", *out, "</svg>", "</div>"])
