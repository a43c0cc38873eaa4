"""``tokenreduce encode``: features of many images by a reduced encoder, as Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.engines import Address, Engine, pool_maker
from tokenreduce.cli.options import AnyDevice, AsJson, Fresh
from tokenreduce.cli.shared import print_json, progress_bar, quiet_bars
from tokenreduce.common.screen import complain, console
from tokenreduce.common.words import counted

__all__ = ["command"]


def command(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME/TAG, hf:ID_OR_FOLDER, or an embedded classifier.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images (all folders in it too), hf:FOLDER (a saved data set), *.tar shards, or digits, "
            "world, world2; labels are not needed."
        ),
    ],
    reduce: Annotated[str | None, typer.Option(help="Encoder methods, 'tome:r=13' or 'a+b'; none by default.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the Parquet files; an earlier run in it is continued.")
    ] = Path("runs/features"),
    split: Annotated[str, typer.Option(help="Part of data that has parts.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many images; all by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Images per file, and what a killed run repeats.")] = 1024,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Store float16 in place of float32.")] = False,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes that share the images, each with the model (on cuda: a GPU in turn)."),
    ] = 1,
    engine: Engine = "processes",
    address: Address = None,
    device: AnyDevice = "cpu",
    amp: Annotated[str | None, typer.Option(help="bf16 or fp16 autocast.")] = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Encode images into vectors: a folder, a saved data set or shards, one Parquet file per 1,024 images.

    Columns are id (position in the data), path and embedding: image features of CLIP and SigLIP, outputs of a model
    without a head, and of a classifier what goes into its last layer. A killed run continues where it stopped when the
    same command is given again, and the files are the same whoever made them.
    """
    maker = pool_maker(engine, address, workers)
    from tokenreduce.encoding import Encoding, encode

    quiet_bars()
    screen = console(stderr=as_json)
    task = Encoding(
        model, data, reduce or "", split=split, limit=limit, batch=batch, rows=rows, device=device, amp=amp,
        normalize=normalize, half=half,
    )  # fmt: skip
    with progress_bar(screen) as progress:
        bar = progress.add_task("loading model and data", total=None)

        def watch(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, description="encoding")

        try:
            made = encode(task, out, workers=workers, engine=maker, fresh=fresh, watch=watch)
        except KeyboardInterrupt:
            progress.stop()
            complain(f"stopped; every finished file is in {out}. The same command continues there.")
            raise typer.Exit(130) from None
    if as_json:
        print_json(_facts(made, task))
    else:
        _present(screen, made, task)


def _facts(made: Any, task: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(made), "folder": str(made.folder), **task.settings()}


def _present(screen: Any, made: Any, task: Any) -> None:
    for note in made.notes:
        screen.say(note, "dim")
    rate = f", {made.encoded / made.seconds:.1f} images a second" if made.encoded else ""
    screen.say(f"{counted(made.images, 'image')} in {made.folder}, {made.width} numbers each{rate}")
    if made.encoded < made.images:
        screen.say(f"{counted(made.images - made.encoded, 'image')} of them were there already", "dim")
    stock, reduced = made.flops
    if task.reduce:
        screen.say(f"{task.reduce}: {reduced / stock:.0%} of the FLOPs of the stock model")
    if made.died:
        screen.say(f"{counted(made.died, 'worker')} died; the images were encoded again", "dim")
    if made.problems:
        complain(f"{counted(len(made.problems), 'image')} could not be used:")
        for problem in made.problems[:5]:
            complain(f"  {problem['path']}: {problem['reason']}")
        if len(made.problems) > 5:
            complain(f"  and {len(made.problems) - 5} more, in {made.folder / 'rows.jsonl'}")
