"""``tokenreduce demo``: a page on which the trade can be seen, on the embedded models and on one's own."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from tokenreduce.common.screen import console

__all__ = ["command"]


def command(
    model: Annotated[
        str | None,
        typer.Option(help="A model of your own beside the embedded ones: a timm name, a Hub id or a folder."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860 on by default.")
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Make a public link through gradio.live: anyone who has it can use the page."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:1.")] = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images for the tab Measure of your own image model, as bench takes them."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names of your own model: a text file with one per line, or 'imagenet'.")
    ] = None,
) -> None:
    """Open a page to see what token reduction saves and costs: an image, a question, a trade-off curve.

    Weights are only ever read from safetensors, and no code of a model repository is run.
    """
    for library in ("gradio", "plotly"):
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"the page needs {library}: pip install 'tokenreduce[demo]'")
    console().say("starting the page; this takes some seconds", "dim")
    from tokenreduce.bench.vlms import pick_device
    from tokenreduce.demo.app import launch
    from tokenreduce.demo.store import Store

    store = Store(model, str(pick_device(device)), data, classes)
    launch(store, host=host, port=port, share=share)
