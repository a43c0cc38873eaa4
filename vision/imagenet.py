"""ImageNet accuracy, FLOPs and speed of one model, unreduced and with each ``--reduce``: a table, and rows as JSONL.

::

    python -m tokenreduce.vision.imagenet --model timm:vit_base_patch16_224 --data /data/imagenet \\
        --reduce tome:r=13 --reduce pitome:keep=0.5 --workers 4 --limit 1000 --device cuda --amp bf16
    python -m tokenreduce.vision.imagenet --model open_clip:ViT-B-16/openai --data /data/imagenet --reduce tome:r=13

The data is a folder with one folder per WordNet id (``val/n01440764/*.JPEG``), a saved Hugging Face data set, or
webdataset shards. CLIP models classify with the class names and the 80 prompts of the CLIP paper
(``open_clip:ViT-B-16/openai?templates=simple`` takes 7). Everything is measured by
:class:`tokenreduce.bench.vision.VisionTask`; ``tokenreduce bench vision`` sweeps methods and budgets with it.

This is a script: unlike the methods beside it, it imports the benchmark, and no method imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

KEYS = ("final_tokens", "gmacs", "share", "top1", "top5", "agreement", "speedup", "images_per_s", "peak_mb")


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def command(
    model: Annotated[str, typer.Option(help="timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER.")],
    data: Annotated[str, typer.Option(help="Image folder, hf:FOLDER or *.tar shards.")],
    reduce: Annotated[
        list[str] | None, typer.Option(help="Methods such as 'tome:r=13'; may be repeated, each gives one row.")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data.")] = "val",
    limit: Annotated[int | None, typer.Option(help="Images, the same number of every class; all by default.")] = None,
    batch: Annotated[int, typer.Option(help="Images per forward.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 4,
    processes: Annotated[int, typer.Option(help="Processes that share the images, each with the model.")] = 1,
    engine: Annotated[str, typer.Option(help="Who makes them: processes of this machine, or ray.")] = "processes",
    address: Annotated[str | None, typer.Option(help="The Ray cluster, auto or ray://HOST:PORT.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    amp: Annotated[str | None, typer.Option(help="bf16 or fp16 autocast.")] = None,
    classes: Annotated[str | None, typer.Option(help="File with one class name per line, or 'imagenet'.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds per row; 0 measures no time and memory.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Of the images that --limit draws.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File that gets each row as a JSON line.")] = None,
) -> None:
    """Evaluate one model on ImageNet (or any labelled images), unreduced and with each --reduce."""
    from tokenreduce.bench.script import run_script
    from tokenreduce.bench.vision import VisionTask
    from tokenreduce.cli.engines import pool_maker
    from tokenreduce.core.registry import parse

    chosen = [parse(text) for text in reduce or []]
    task = VisionTask(
        model=model, data=data, split=split, limit=limit, batch=batch, workers=workers, device=device, amp=amp,
        classes=classes, repeats=repeats, threads=threads, seed=seed, processes=processes,
        engine=pool_maker(engine, address, processes, "--processes"),
    )  # fmt: skip
    run_script(task, chosen, f"{model} on {data}", _table, out, "image")


def _table(rows: list[dict[str, Any]], width: int) -> Any:
    from rich.table import Table

    from tokenreduce.bench.columns import COLUMNS, cell
    from tokenreduce.common.words import counted

    shown = [c for c in COLUMNS if c.key in KEYS and any(row.get(c.key) is not None for row in rows)]
    made = Table(title=counted(rows[0]["images"], "image"), title_justify="left")
    made.add_column("method", overflow="fold")
    for column in shown:
        made.add_column(column.label, justify="right", no_wrap=width >= 120)
    for row in rows:
        made.add_row(row["method"], *(cell(row, column) for column in shown))
    return made


def main() -> None:
    """Entry point: bad input becomes one message and exit status 2."""
    from tokenreduce.cli.shared import run_program

    run_program(app, "python -m tokenreduce.vision.imagenet")


if __name__ == "__main__":
    main()
