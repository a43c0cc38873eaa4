"""The command line: ``tokenreduce methods | describe | show | generate | stream | bench | report | train | ...``.

One file per command; whatever is heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tokenreduce.cli import bench, bench_video, demo, describe, generate, methods, report, scene, show, stream, train
from tokenreduce.cli.shared import Friendly, set_debug

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Friendly,
    help="Fewer tokens for vision transformers and image/video language models, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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


app.command("methods")(methods.command)
app.command("describe")(describe.command)
app.command("show")(show.command)
app.command("generate")(generate.command)
bench.app.command("video")(bench_video.command)
app.add_typer(bench.app, name="bench")
app.command("stream")(stream.command)
app.command("report")(report.command)
app.command("train")(train.command)
app.command("scene")(scene.command)
app.command("demo")(demo.command)


def main() -> None:
    """Entry point of the ``tokenreduce`` script and of ``python -m tokenreduce``."""
    sys.exit(app(prog_name="tokenreduce"))
