"""The command line: ``tokenreduce methods | describe | show | generate | stream | bench | report | train | ...``.

One file per command, imported when the command is used (:mod:`tokenreduce.cli.commands`); whatever is heavy is imported
inside the function that needs it, so that help, completion and errors of usage answer without torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tokenreduce.cli.commands import HELP
from tokenreduce.cli.shared import Friendly, set_debug
from tokenreduce.common.pinned import pin

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Friendly,
    help="Fewer tokens for vision transformers and image/video language models, without training.",
    no_args_is_help=True,
    epilog="Example: tokenreduce describe timm:vit_base_patch16_224 --reduce 'tome:r=16'",
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


def _version(wanted: bool) -> None:
    if wanted:
        import tokenreduce

        typer.echo(f"tokenreduce {tokenreduce.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fewer tokens for vision transformers and image/video language models, without training."""
    set_debug(debug)


def main() -> None:
    """Entry point of the ``tokenreduce`` script and of ``python -m tokenreduce``."""
    if sys.argv[1:2] in (["bench"], ["demo"]) and not {"-h", "--help"} & set(
        sys.argv
    ):  # clocks are for an allocator that keeps
        pin()
    sys.exit(app(prog_name="tokenreduce"))
