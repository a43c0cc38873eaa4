"""``tokenreduce bench vision``: methods x budgets on one image classifier and one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.bench import Extent, run
from tokenreduce.cli.engines import Address, Engine, pool_maker
from tokenreduce.cli.options import (
    AnyDevice,
    BenchJson,
    Classes,
    Fresh,
    Full,
    Methods,
    Reduce,
    Repeats,
    RunFolder,
)

__all__ = ["command"]

#: Budgets where --budgets says nothing, without and with --full.
BUDGETS = ("0.5,0.35", "0.75,0.5,0.35")
#: Images per forward where --batch says nothing.
BATCH, BATCHES = 64, {"world": 32, "world2": 8, "world2-one": 8}
#: Embedded classifiers and their data, and the one that is measured when no model is named.
EMBEDDED = {
    "world-vit-2": "world2", "world-vit": "world", "digits-vit": "digits", "world-clip-2": "world2-one",
}  # fmt: skip
DEFAULT = "world-vit-2"
#: Images per row where --limit and --full say nothing: the embedded digits whole, other data in part.
QUICK = {"digits": None, "world": 200, "world2": 200, "world2-one": 200}
QUICK_ELSEWHERE = 1000

Model = Annotated[
    str | None,
    typer.Option(
        help="world-vit-2 (the default), world-clip-2 (zero-shot), world-vit, digits-vit, timm:NAME, "
        "open_clip:NAME/TAG or hf:ID_OR_FOLDER."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, world, world2, world2-one, an image folder (class/image.jpg), hf:FOLDER (a saved data set) or "
        "webdataset shards (*.tar); an embedded model has its own."
    ),
]
Split = Annotated[str, typer.Option(help="Part of the data to evaluate.")]
Budgets = Annotated[
    str | None, typer.Option(help="Shares of the unreduced FLOPs; 0.5,0.35 by default, 0.75,0.5,0.35 with --full.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Images to evaluate; 1,000 by default, 200 scenes of the world.")
]
Batch = Annotated[int | None, typer.Option(min=1, help="Images per forward; 64 by default, 32 scenes of the world.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Processes = Annotated[
    int,
    typer.Option(min=1, help="Processes that share the images, each with the model (on cuda, all GPUs in turn)."),
]
Amp = Annotated[str | None, typer.Option(help="bf16 or fp16 autocast.")]


def command(
    ctx: typer.Context,
    model: Model = None,
    data: Data = None,
    split: Split = "test",
    methods: Methods = None,
    budgets: Budgets = None,
    reduce: Reduce = None,
    limit: Limit = None,
    batch: Batch = None,
    workers: Workers = 0,
    processes: Processes = 1,
    engine: Engine = "processes",
    address: Address = None,
    device: AnyDevice = "cpu",
    amp: Amp = None,
    repeats: Repeats = None,
    classes: Classes = None,
    out: RunFolder = Path("runs/vision"),
    fresh: Fresh = False,
    full: Full = False,
    as_json: BenchJson = False,
) -> None:
    """Image classification: accuracy, FLOPs, clock speed-up and memory of every method at equal FLOPs.

    Without --model on world-vit-2: scenes of the second world, of which it names all things and all characters on
    signs. A killed run continues where it stopped when the same command is given again.
    """
    extent = Extent.of(ctx)
    name, source = _subject(model, data)
    from tokenreduce.bench.vision import VisionTask

    quick = QUICK.get(source, QUICK_ELSEWHERE)
    task = VisionTask(
        model=name, data=source, split=split, limit=extent.most(quick), batch=batch or BATCHES.get(source, BATCH),
        workers=workers, device=device, amp=amp, repeats=extent.repeats, classes=classes, few=extent.few,
        processes=processes, engine=pool_maker(engine, address, processes, "--processes"),
    )  # fmt: skip
    extent.say(extent.cut("evaluating", quick, "image", f" of {source}"), stages=False, as_json=as_json)
    run(ctx, {out: task}, budgets=BUDGETS, device=device)


def _subject(model: str | None, data: str | None) -> tuple[str, str]:
    """The model to measure, and its data."""
    if model is None and data is None:
        return DEFAULT, EMBEDDED[DEFAULT]
    if model is None:
        own = [name for name, source in EMBEDDED.items() if source == data]
        if not own:
            raise ValueError(f"--model is needed for {data}: timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER")
        return own[0], str(data)
    if data is None and model not in EMBEDDED:
        needed = ", ".join(f"{source} for {name}" for name, source in EMBEDDED.items())
        raise ValueError(f"--data is needed for {model}: an image folder, hf:FOLDER or *.tar shards ({needed})")
    return model, data or EMBEDDED[model]
