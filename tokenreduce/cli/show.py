"""``tokenreduce show``: a picture of what was merged and dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.shared import console

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="digits-vit, timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    reduce: Annotated[str, typer.Option(help="Methods, for example 'tome:r=13' or 'evit:keep=0.5'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("show.png"),
    layer: Annotated[
        int | None, typer.Option(help="0-based layer after which to look; the last one by default.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Least side of each half in pixels.")] = 448,
) -> None:
    """Draw the region of each final token over an image, beside the image as the model saw it."""
    from PIL import Image, UnidentifiedImageError

    from tokenreduce.bench.models import load_model
    from tokenreduce.picture import show
    from tokenreduce.registry import parse

    chosen = parse(reduce)
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"cannot tell the picture format of {out}: end --out in .png or .jpg")
    try:
        with Image.open(image) as opened:
            opened.load()
            picture = opened.copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {image}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{image} cannot be read as an image: {error}") from error
    drawn = show(load_model(model), picture, chosen, layer=layer, side=size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(out)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}; choose another place with --out") from error
    console().print(f"wrote {out}", markup=False)
