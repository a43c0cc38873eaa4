"""``tokenreduce show``: a picture of what was merged and dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.shared import open_image, picture_format, print_json, save_picture
from tokenreduce.common.screen import console

__all__ = ["command"]


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="digits-vit, world-vit, world-vit-2, world-clip-2, timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER."
        ),
    ],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    reduce: Annotated[str, typer.Option(help="Methods, for example 'tome:r=13' or 'evit:keep=0.5'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("show.png"),
    layer: Annotated[
        int | None, typer.Option(help="0-based layer after which to look; the last one by default.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Least side of each half in pixels.")] = 448,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Draw the region of each final token over an image, beside the image as the model saw it."""
    from tokenreduce.bench.models import load_model
    from tokenreduce.core.auto import is_auto
    from tokenreduce.core.registry import parse
    from tokenreduce.measure.picture import check_layer, look
    from tokenreduce.patching import reducers_for

    if not is_auto(reduce):
        parse(reduce)  # a mistake shows here, before the model is loaded
    picture_format(out, "--out")
    if out.exists() and image.exists() and out.samefile(image):
        raise ValueError(f"--out {out} is the image itself, which would be lost; write to another file")
    picture = open_image(image)
    loaded = load_model(model)
    check_layer(loaded, layer)
    chosen, _ = reducers_for(loaded.model, reduce)
    seen = look(loaded, picture, chosen)
    save_picture(seen.draw(layer, side=size), out, "--out")
    if as_json:
        tokens = [step.tokens for step in seen.steps]
        shown = {"grid": seen.grid, "prefix": seen.prefix, "layers": seen.depth, "layer": layer, "tokens": tokens}
        print_json({"model": model, "reduce": seen.title, **shown, "caption": seen.caption(layer), "out": str(out)})
        return
    console().say(f"wrote {out}")
