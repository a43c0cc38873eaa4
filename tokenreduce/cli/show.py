"""``tokenreduce show``: a picture of what was merged and dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.shared import console, open_image, picture_format, save_picture

__all__ = ["command"]


def command(
    model: Annotated[
        str, typer.Argument(help="digits-vit, world-vit, timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER.")
    ],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    reduce: Annotated[str, typer.Option(help="Methods, for example 'tome:r=13' or 'evit:keep=0.5'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("show.png"),
    layer: Annotated[
        int | None, typer.Option(help="0-based layer after which to look; the last one by default.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Least side of each half in pixels.")] = 448,
) -> None:
    """Draw the region of each final token over an image, beside the image as the model saw it."""
    from tokenreduce.bench.models import load_model
    from tokenreduce.picture import show
    from tokenreduce.registry import parse

    chosen = parse(reduce)
    picture_format(out, "--out")
    picture = open_image(image)
    save_picture(show(load_model(model), picture, chosen, layer=layer, side=size), out, "--out")
    console().print(f"wrote {out}", markup=False)
