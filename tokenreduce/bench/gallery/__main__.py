"""``python -m tokenreduce.bench.gallery docs/kept.json``: what every method keeps of the same pictures."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.bench.gallery.kept import Kept, read_kept, write_kept
from tokenreduce.bench.gallery.looking import kept_by
from tokenreduce.common.words import counted
from tokenreduce.core.registry import load_all


def main(
    out: Annotated[Path, typer.Argument(help="The file that is written, method by method.")],
    methods: Annotated[str, typer.Option(help="Wildcard for names; others stay as the file has them.")] = "*",
) -> None:
    """Look what every method keeps of the gallery's pictures in the embedded models, and store it as text."""
    names = fnmatch.filter(sorted(load_all()), methods)
    if not names:
        raise typer.BadParameter(f"no method matches {methods!r}; tokenreduce methods lists them")
    known = read_kept(out) if methods != "*" and out.exists() else {}
    known = {name: one for name, one in known.items() if name in load_all()}
    for name in names:
        known[name] = one = kept_by(name)
        left = ", ".join(f"{a:.4g} of {b}" for a, b in one.left()) if isinstance(one, Kept) else one.why
        typer.echo(f"{name}: {left}")
    write_kept(out, known)
    typer.echo(f"wrote {counted(len(known), 'method')} into {out}")


if __name__ == "__main__":
    typer.run(main)
