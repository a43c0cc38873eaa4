"""``tokenreduce estimate``: what a reduction gives, before a model is loaded."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import console

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="timm:NAME, an embedded model, a Hub id or a folder with a config.")],
    reduce: Annotated[
        str | None, typer.Option(help="Methods, 'visionzip:keep=64', or a target, auto:flops=0.5; none: stock.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="h100, a100, l4, rtx4090, jetson-orin, cpu, or measured (see calibrate).")
    ] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Samples, each with one image or clip.")] = 1,
    image: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's own size by default.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="A clip of as many frames instead of an image.")] = None,
    prompt: Annotated[int, typer.Option(min=4, help="Text tokens beside the image.")] = 64,
    answer: Annotated[int, typer.Option(min=0, help="Tokens of the answer.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """FLOPs, bytes and time of a model by part, stock and reduced, from its config alone."""
    from tokenreduce.estimation import estimate

    made = estimate(
        model, *([reduce] if reduce else []), device=device, batch=batch, image=_size(image), frames=frames,
        prompt=prompt, answer=answer, dtype=dtype,
    )  # fmt: skip
    if as_json:
        print_json(made.to_dict())
        return
    out = console()
    for line in str(made).splitlines():
        out.say(line)


def _size(text: str | None) -> tuple[int, int] | None:
    """``"1344x1008"`` to (width, height). Raises ``ValueError`` that names the option."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip())  # noqa: RUF001 - people write both
    if not found or not int(found[1]) or not int(found[2]):
        raise ValueError(f"--image is WIDTHxHEIGHT in pixels, for example 1344x1008, not {text!r}")
    return int(found[1]), int(found[2])
