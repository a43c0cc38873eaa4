"""The clock of image language models: ``python -m tokenreduce.bench.performance.language`` makes its section of
docs/performance.md again.

Every row compares a patched model with the stock model (fused attention), interleaved in one run: time to first token
is one prefill with the image, the vision tower included, up to the logits of the last token. Medians are over
rounds. Random weights: the clock does not care, as the number of tokens that stay is the budget's.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tokenreduce.bench.performance.prefills import Row, Settings, measure
from tokenreduce.bench.performance.sections import command_of, section, splice
from tokenreduce.bench.performance.shapes import SHAPES, Shape
from tokenreduce.common.pinned import pin
from tokenreduce.common.words import counted, speak_everywhere

__all__ = ["COLUMNS", "cells", "markdown"]

COLUMNS = (
    "method", "stage", "keep", "visual tokens at entry", "mean over layers", "GFLOPs", "FLOPs share",
    "first token, stock", "first token, reduced", "FLOPs", "clock", "clock / FLOPs", "clock, short prompt", "own work",
    "KV cache", "per token, stock", "per token, reduced", "peak memory",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The text of a row under :data:`COLUMNS`; an error stands in the column behind the budget."""
    head = (row.method, row.stage, "" if row.keep is None else str(row.keep))
    if row.cost is None or row.stock is None or row.first is None or row.clock is None:
        return (*head, row.error, *[""] * (len(COLUMNS) - 4))
    cost = row.cost
    token = ("", "") if row.token is None else tuple(f"{t * 1e3:.1f} ms" for t in row.token)
    return (
        *head,
        str(cost.visual[0]),
        f"{cost.mean:.1f}",
        f"{cost.flops / 1e9:.1f}",
        f"{cost.flops / row.stock.flops:.1%}",
        *(f"{t * 1e3:.0f} ms" if t >= 0.1 else f"{t * 1e3:.1f} ms" for t in row.first),
        f"{row.flops:.2f}x",
        f"{row.clock:.2f}x" if row.speedup is None else row.speedup.cell,
        f"{row.yielded:.2f}",
        "" if row.limit is None else f"{row.limit:.2f}x",
        "" if row.own is None else f"{row.own:.2%}",
        f"{cost.kv / 2**20:.1f} MiB",
        *token,
        "" if cost.peak is None else f"{cost.peak / 2**20:.0f} MiB",
    )


def _shown(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and lines, without the columns that are empty throughout."""
    lines = [cells(row) for row in rows]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
    return [COLUMNS[i] for i in used], [tuple(line[i] for i in used) for line in lines]


def table(rows: Sequence[Row]) -> Table:
    head, lines = _shown(rows)
    out = Table(*head)
    for line in lines:
        out.add_row(*line)
    return out


def facts(shape: Shape, settings: Settings, dtype: torch.dtype, batch: int) -> str:
    """What a figure depends on, in words."""
    import transformers

    where = f"CPU, {torch.get_num_threads()} thread(s)"
    if torch.device(settings.device).type == "cuda":
        where = torch.cuda.get_device_name(settings.device)
    grid = f"{shape.side}x{shape.side} patches" if not shape.pinpoints else f"an image of {shape.pixels} pixels"
    return (
        f"{where}; {str(dtype).removeprefix('torch.')}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; random weights, language model "
        f"{shape.llm[1]} layers of width {shape.llm[0]}, tower {shape.tower[1]} layers of width {shape.tower[0]}; "
        f"batch {batch}, {shape.visual} visual tokens ({grid}) and {shape.text} text tokens; "
        f"{counted(settings.rounds, 'round')}, stock and reduced interleaved, medians of per-round ratios (≈: "
        f"within noise, their interval includes 1); "
        f"reduced times are the stock median over the ratio."
    )


def markdown(name: str, rows: Sequence[Row], command: str, about: str) -> str:
    """A section with the command, the conditions and the table, between markers that carry ``name``."""
    return section(name, *_shown(rows), command, about)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _list(text: str | None) -> list[str]:
    return [] if text is None else text.replace(",", " ").split()


def main(
    shape: Annotated[str | None, typer.Option(help=f"{', '.join(SHAPES)}; small, or llava-7b on CUDA")] = None,
    methods: Annotated[str | None, typer.Option(help="'divprune,random@projector'; all by default")] = None,
    budgets: Annotated[str | None, typer.Option(help="visual tokens that stay, '192,128,64'")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds")] = 5,
    decode: Annotated[int, typer.Option(min=0, help="tokens per round of decoding; 0: not timed")] = 8,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    device: str = "cpu",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; bfloat16 on CUDA")] = None,
    quick: Annotated[bool, typer.Option(help="one round on shape tiny: does every method run?")] = False,
    markdown_out: Annotated[
        Path | None, typer.Option("--markdown", help="file whose marked section is replaced, or a new one")
    ] = None,
) -> None:
    """Speed-up by clock against speed-up by FLOPs for every method on image language models."""
    speak_everywhere()
    cuda = torch.device(device).type == "cuda"
    name = shape or ("tiny" if quick else "llava-7b" if cuda else "small")
    kind = dtype or ("bfloat16" if cuda else "float32")
    if name not in SHAPES or kind not in DTYPES:
        raise typer.BadParameter(f"--shape is one of {', '.join(SHAPES)} and --dtype one of {', '.join(DTYPES)}")
    settings = Settings(1 if quick else rounds, 1, min(decode, 1) if quick else decode, device)
    console = Console(width=200, stderr=False)
    keeps = [int(b) for b in _list(budgets)]
    about = facts(SHAPES[name], settings, DTYPES[kind], batch)
    console.print(about)
    log = Console(stderr=True)
    rows = measure(
        SHAPES[name], _list(methods), keeps, settings, DTYPES[kind], batch,
        lambda row: log.print(" ".join(c for c in cells(row) if c), highlight=False),
    )  # fmt: skip
    console.print(table(rows))
    if markdown_out is not None:
        splice(markdown_out, name, markdown(name, rows, command_of("language", sys.argv[1:]), about))


if __name__ == "__main__":
    pin()
    typer.run(main)
