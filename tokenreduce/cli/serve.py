"""``tokenreduce serve``: a model with fewer visual tokens behind vLLM's OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="world-llava, a folder that save_pretrained wrote, or a Hub id.")],
    more: Annotated[
        list[str] | None, typer.Argument(help="Behind --: arguments of vLLM, handed on as they are.")
    ] = None,
    reduce: Annotated[
        str | None, typer.Option(help="One method before the language model, 'fastervlm:keep=64'; none: stock.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the server listens.")] = 8000,
    host: Annotated[str, typer.Option(help="0.0.0.0 for all interfaces of this machine.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="What requests call the model; MODEL by default.")] = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="Let no request choose how many tokens stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and start nothing.")] = False,
) -> None:
    """Serve an image/video language model with fewer visual tokens by vLLM.

    Prints vLLM's command and a line that asks the server, then becomes the server. What vLLM cannot serve with fewer
    tokens is refused before anything starts.
    """
    from tokenreduce.integrations.vllm.command import check_installed, server
    from tokenreduce.integrations.vllm.source import config_of, source_of

    if not dry_run:
        check_installed()
    source = source_of(model, write=not dry_run)
    made = server(
        source, config_of(model), reduce, name=name or model, host=host, port=port, more=more or (),
        requests_may_choose=not fixed,
    )  # fmt: skip
    typer.echo(made.line)
    typer.echo(f"\nonce it listens:\n{made.curl()}")
    if not dry_run:
        made.run()
