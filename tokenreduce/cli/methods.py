"""``tokenreduce methods``: what there is."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import Screen, console
from tokenreduce.common.words import counted

__all__ = ["command"]


def command(
    pattern: Annotated[str, typer.Argument(help="Wildcard for names, for example 'to*'.")] = "*",
    stage: Annotated[
        str | None, typer.Option(help="Only methods of one stage: encoder, projector, language or cache.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """List the methods with their stage, settings and paper."""
    from tokenreduce.core.registry import list_methods

    names = list_methods(pattern, stage=stage)
    if not names:
        known = ", ".join(list_methods(stage=stage)) or "none"
        raise ValueError(f"no {stage + ' ' if stage else ''}method matches {pattern!r}; known: {known}")
    facts = [_facts(name, stage) for name in names]
    if as_json:
        print_json({"methods": facts})
        return
    out = console()
    _table(out, facts)
    out.say(f"{counted(len(names), 'method')}; write one as name:setting=value,setting=value and join several with +")


def _facts(name: str, stage: str | None) -> dict[str, Any]:
    from tokenreduce.core.registry import get_class

    kind = get_class(name, stage)
    defaults = {}
    for f in fields(kind):
        made = f.default_factory() if f.default_factory is not MISSING else f.default
        defaults[f.name] = "(required)" if made is MISSING else made
    paper = f"arXiv {kind.paper}" if kind.paper[:1].isdigit() else kind.paper
    return {"name": name, "stage": kind.stage, "title": kind.title, "settings": defaults, "paper": paper}


def _table(out: Screen, facts: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from tokenreduce.core.reducer import format_spec

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("method", "stage", "title", "settings and defaults", "paper"):
        # Under a hundred columns only names stay whole: what is left must hold the settings.
        whole = head in ("method", "stage", "paper") if out.width >= 100 else head in ("method", "stage")
        table.add_column(head, no_wrap=whole, overflow="fold")
    for each in facts:
        settings = format_spec("", each["settings"])[1:].replace(",", ", ")
        cells = (each["name"], each["stage"], each["title"], settings or "-", each["paper"] or "-")
        table.add_row(*map(Text, cells))
    out.print(table)
