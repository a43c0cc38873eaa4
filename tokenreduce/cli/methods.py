"""``tokenreduce methods``: what there is."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.options import AsJson
from tokenreduce.cli.shared import print_json
from tokenreduce.common.files import write_text
from tokenreduce.common.screen import Screen, console
from tokenreduce.common.words import counted

__all__ = ["command"]


def command(
    pattern: Annotated[str, typer.Argument(help="Wildcard for names, for example 'to*'.")] = "*",
    stage: Annotated[
        str | None, typer.Option(help="Only methods of one stage: encoder, projector, language, cache or diffusion.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the page of all methods, with what their docstrings say, and list none.")
    ] = None,
    pages: Annotated[
        Path | None, typer.Option(help="Write a page for every method, with its stored results, and list none.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The results page that --pages reads.")] = Path("docs/results.md"),
    kept: Annotated[
        Path, typer.Option(help="What methods keep of pictures, for --pages; python -m tokenreduce.bench.gallery FILE.")
    ] = Path("docs/kept.json"),
    as_json: AsJson = False,
) -> None:
    """List the methods with their stage, settings and paper."""
    if pages is not None:
        if pattern != "*" or stage is not None or as_json or markdown is not None:
            raise ValueError("--pages writes pages of all methods; it takes no pattern, --stage, --markdown or --json")
        from tokenreduce.cli.method_pages import write_pages

        console().say(f"wrote {counted(write_pages(pages, results, kept), 'page')} into {pages}")
        return
    if markdown is not None:
        if pattern != "*" or stage is not None or as_json:
            raise ValueError("--markdown writes a page of all methods; it takes no pattern, --stage or --json")
        from tokenreduce.cli.methods_page import methods_page

        console().say(f"wrote {write_text(markdown, methods_page(), 'choose another place with --markdown')}")
        return
    from tokenreduce.cli.catalogue import catalogue

    table = catalogue()
    if stage is not None and stage not in table["stages"]:
        raise ValueError(f"unknown stage {stage!r}; stages: {', '.join(table['stages'])}")
    methods = _of_stage(table["methods"], stage)
    found = [methods[name] for name in sorted(fnmatch.filter(methods, pattern))]
    if not found:
        known = ", ".join(sorted(methods)) or "none"
        raise ValueError(f"no {stage + ' ' if stage else ''}method matches {pattern!r}; known: {known}")
    if as_json:
        print_json({"methods": [{k: v for k, v in each.items() if k != "text"} for each in found]})
        return
    out = console()
    _table(out, found)
    out.say(f"{counted(len(found), 'method')}; write one as name:setting=value,setting=value and join several with +")


def _of_stage(methods: list[dict[str, Any]], stage: str | None) -> dict[str, dict[str, Any]]:
    """By name: full names of all, short ones (``random`` for ``random@projector``) of one stage."""
    if stage is None:
        return {each["name"]: each for each in methods}
    short = ({**each, "name": each["name"].partition("@")[0]} for each in methods if each["stage"] == stage)
    return {each["name"]: each for each in short}


def _table(out: Screen, found: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("method", "stage", "title", "settings and defaults", "paper"):
        # Under a hundred columns only names stay whole: what is left must hold the settings.
        whole = head in ("method", "stage", "paper") if out.width >= 100 else head in ("method", "stage")
        table.add_column(head, no_wrap=whole, overflow="fold")
    for each in found:
        cells = (each["name"], each["stage"], each["title"], each["text"] or "-", each["paper"] or "-")
        table.add_row(*map(Text, cells))
    out.print(table)
