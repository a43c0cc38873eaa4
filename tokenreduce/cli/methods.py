"""``tokenreduce methods``: what there is."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Annotated

import typer

from tokenreduce.cli.shared import console

__all__ = ["command"]


def command(
    pattern: Annotated[str, typer.Argument(help="Wildcard for names, for example 'to*'.")] = "*",
    stage: Annotated[
        str | None, typer.Option(help="Only methods of one stage: encoder, projector, language or cache.")
    ] = None,
) -> None:
    """List the methods with their stage, settings and paper."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from tokenreduce.reducer import format_spec
    from tokenreduce.registry import get_class, list_methods

    names = list_methods(pattern, stage=stage)
    if not names:
        known = ", ".join(list_methods(stage=stage)) or "none"
        raise ValueError(f"no {stage + ' ' if stage else ''}method matches {pattern!r}; known: {known}")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("method", "stage", "title", "settings and defaults", "paper"):
        table.add_column(head, no_wrap=head in ("method", "stage", "paper"), overflow="fold")
    for name in names:
        kind = get_class(name, stage)
        defaults = {}
        for f in fields(kind):
            missing = f.default is MISSING
            defaults[f.name] = f.default_factory() if missing and f.default_factory is not MISSING else f.default
        settings = format_spec("", {k: "(required)" if v is MISSING else v for k, v in defaults.items()})[1:]
        paper = f"arXiv {kind.paper}" if kind.paper[:1].isdigit() else kind.paper or "-"
        table.add_row(*(Text(t) for t in (name, kind.stage, kind.title, settings.replace(",", ", ") or "-", paper)))
    out = console()
    out.print(table)
    out.print(f"{len(names)} methods; write one as name:setting=value,setting=value and join several with +")
