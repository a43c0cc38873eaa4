"""``tokenreduce models``: how every architecture of the installed libraries is supported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import Screen, console
from tokenreduce.common.words import counted

if TYPE_CHECKING:
    from tokenreduce.measure.census import Row

__all__ = ["LIBRARIES", "command"]

LIBRARIES = ("transformers", "timm", "open_clip")
HEADS = ("model", "how", "stages", "note")
#: Columns of measured differences.
EXACT = ("model", "tower", "before, original", "before, compact", "inside, layers", "inside", "cache")


def command(
    library: Annotated[
        str | None,
        typer.Option(help="One library: transformers, timm or open_clip; all by default."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown (docs/models.md).")] = False,
    measured: Annotated[
        Path | None, typer.Option(help="JSON of measured differences to put beside (docs/models.json).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """List every architecture: by table or discovered, the stages that can act in it, or why none can."""
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library={library!r}: choose one of {', '.join(LIBRARIES)}")
    if markdown and as_json:
        raise ValueError("--markdown and --json are two forms of one list; choose one")
    chosen = LIBRARIES if library is None else (library,)
    found = [(name, *_census(name)) for name in chosen]
    numbers = {} if measured is None else json.loads(measured.read_text(encoding="utf-8"))
    if markdown:
        typer.echo("\n".join(_page(found, numbers)))
        return
    rows = [row for _, language, encoders in found for row in (*language, *encoders)]
    if as_json:
        print_json({"models": [asdict(row) for row in rows]})
        return
    out = console()
    _table(out, rows)
    out.say(counted(len(rows), "model"))


def _census(library: str) -> tuple[list[Row], list[Row]]:
    """Language models and encoders of a library."""
    from tokenreduce.measure.census_encoders import census_encoders
    from tokenreduce.measure.census_language import census_language

    # Libraries that print while they are imported must not print into the page or the JSON.
    with redirect_stdout(sys.stderr):
        return census_language(library), census_encoders(library)


def _table(out: Screen, rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in HEADS:
        table.add_column(head, no_wrap=head != "note", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, (row.name, row.how, ", ".join(row.stages) or "-", row.reason or "-")))
    out.print(table)


def _page(found: list[Any], numbers: dict[str, Any]) -> Iterator[str]:
    """The page, line by line."""
    yield "# Models"
    yield ""
    yield (
        "What can act where in every architecture of the installed libraries. Made by `tokenreduce models --markdown "
        "--measured docs/models.json`; a model is built from its default config without memory, and looked at by its "
        "structure."
    )
    for library, language, encoders in found:
        for title, rows in (("Image/video language models", language), ("Encoders", encoders)):
            if rows:
                yield from ("", f"## {title} of {library}", "")
                yield _summary(rows)
                yield ""
                yield from _lines([_cells(row) for row in rows], HEADS)
    if numbers:
        yield from _measured(numbers)


def _summary(rows: list[Row]) -> str:
    kinds = ("table", "discovered", "refused", "not built")
    counts = [(kind, sum(row.how == kind for row in rows)) for kind in kinds]
    return f"{counted(len(rows), 'model')}: " + ", ".join(f"{n} {kind}" for kind, n in counts if n) + "."


def _cells(row: Row) -> tuple[str, ...]:
    return (f"`{row.name}`", row.how, ", ".join(row.stages) or "none", row.reason.replace("|", "/"))


def _lines(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _measured(numbers: dict[str, Any]) -> Iterator[str]:
    yield from (
        "", "## How exact image/video language models are", "",
        "Toys of every class with random weights (`python tests/toys/measure.py docs/models.json`), transformers' own "
        "code, float32, a padded batch of a prompt with one image and one with two. The largest difference of logits "
        "over three new tokens, over the largest logit, between the reduced model and the stock model on prompts that "
        "are as short, one at a time and unpadded, at original and at compact positions (those that are places in the "
        "image have no compact form); in the tower: between a tower that drops patches and the stock tower that hides "
        "them, with the visual tokens that have a patch left; inside the language model: between `fastv` and stock "
        "layers on one row; in the cache: between rows, heads and layers that hold unequal numbers of keys, and the "
        "stock model with the keys that left hidden. "
        "Bidirectional models are held against the stock model with the dropped columns hidden.", "",
    )  # fmt: skip
    rows = sorted(numbers.values(), key=lambda r: str(r["class"]).lower())
    yield from _lines([_exact(row) for row in rows], EXACT)
    without = [row for row in rows if row.get("no_encoder")]
    if without:
        yield from ("", f"Methods do not act inside the tower of {counted(len(without), 'model')}:", "")
        yield from (f"- `{row['class']}`: {row['no_encoder']}" for row in without)


def _exact(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of differences."""
    if "error" in row:
        return (f"`{row['class']}`", row["error"].replace("|", "/"), "", "", "", "", "")
    hidden = row.get("masked")
    first = _number(row.get("original")) if hidden is None else f"{_number(hidden)} (hidden)"
    layers = ", ".join(map(str, row.get("layers", ()))) or "none"
    tower, compact, inside, cache = (_number(row.get(key)) for key in ("encoder", "compact", "inside", "cache"))
    tower = "not measured" if hidden is not None and "no_encoder" not in row else tower
    return (f"`{row['class']}`", tower, first, compact, layers, inside, cache)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.0e}"
