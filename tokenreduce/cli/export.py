"""``tokenreduce export``: a vision encoder with its methods as a file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import console

__all__ = ["command"]

Model = Annotated[
    str, typer.Argument(help="digits-vit, world-vit, timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER (an encoder).")
]
Reduce = Annotated[
    str | None, typer.Option(help="Encoder methods, 'tome:r=13' or 'a+b'; none exports the stock model.")
]
Format = Annotated[str, typer.Option("--format", help="onnx (run by onnxruntime) or pt2 (torch.export).")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The file; named after model and methods by default.")]
Batch = Annotated[int, typer.Option(min=2, help="Images that are compared, and timed as one batch.")]
Repeats = Annotated[int, typer.Option(min=0, help="Timed rounds; 0 leaves the clock out.")]


def command(
    model: Model,
    reduce: Reduce = None,
    form: Format = "onnx",
    out: Out = None,
    batch: Batch = 8,
    repeats: Repeats = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write a vision encoder with its methods as an ONNX file, or as a program of torch.export, for any batch.

    Settings and the size of images become constants. The file is compared with the model on pictures before it takes
    its place, and timed against the stock model's export.
    """
    from tokenreduce.core.registry import parse
    from tokenreduce.measure.exported import FORMATS, export, needs

    needs(form)
    reducers = parse(reduce, stage="encoder") if reduce else ()
    if wrong := [r.spec() for r in reducers if r.stage != "encoder"]:
        raise ValueError(f"{', '.join(wrong)} acts outside of the encoder; an export takes encoder methods alone")
    path = out or Path(_name(model, reduce) + FORMATS[form])
    screen = console(stderr=as_json)
    with screen.status("loading"):
        loaded, images = _load(model, batch)
    with screen.status("exporting, comparing, timing"):
        made = export(
            loaded.model, reducers, images, path, form=form, forward=loaded.forward, repeats=repeats
        )  # fmt: skip
    if as_json:
        print_json(_facts(made, loaded))
    else:
        _say(screen, made, loaded)


def _load(model: str, batch: int) -> tuple[Any, Any]:
    """The model and pictures as it takes them."""
    import torch

    from tokenreduce.bench.models import load_model
    from tokenreduce.patching import describe
    from tokenreduce.zoo.examples import scene_examples

    loaded = load_model(model)
    describe(loaded.model)
    return loaded, torch.stack([loaded.transform(e.image) for e in scene_examples(batch)])


def _name(model: str, reduce: str | None) -> str:
    """``timm:vit_tiny`` with ``tome:r=3`` to ``vit_tiny_tome-r-3``."""
    import re

    stem = re.sub(r"[?@].*", "", model.partition(":")[2] or model).strip("/").rpartition("/")[2]
    spec = re.sub(r"[^\w.]+", "-", reduce).strip("-") if reduce else "stock"
    return f"{stem or 'encoder'}_{spec}"


def _facts(made: Any, loaded: Any) -> dict[str, Any]:
    from dataclasses import asdict

    speedup = None if made.speedup is None else asdict(made.speedup)
    return {**asdict(made), "path": str(made.path), "speedup": speedup, "input": ["batch", *loaded.input_size],
            "output": _output(loaded)}  # fmt: skip


def _output(loaded: Any) -> str:
    return "logits" if loaded.kind == "classifier" else "image features"


def _say(screen: Any, made: Any, loaded: Any) -> None:
    from tokenreduce.bench.columns import in_bytes, seconds

    shape = "x".join(map(str, loaded.input_size))
    screen.say(
        f"wrote {made.path} ({in_bytes(made.bytes)}): {made.spec or 'no reduction'}; images (batch,{shape}) to "
        f"{_output(loaded)}, any batch"
    )
    batches = ", ".join(map(str, made.checked.batches))
    screen.say(
        f"as the model on {made.checked.images} pictures in batches of {batches}: largest difference "
        f"{made.checked.difference:.2g} of outputs up to {made.checked.scale:.3g}"
    )
    if made.speedup is not None:
        screen.say(
            f"a batch of {made.batch}: {seconds(made.seconds)} against {seconds(made.stock_s)} of the stock export, "
            f"{made.speedup}"
        )
    for note in made.notes:
        screen.say(note, "dim")
