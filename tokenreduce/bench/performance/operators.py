"""Operators that encoders start: ``python -m tokenreduce.bench.performance.operators`` makes its section of
docs/performance.md again. Counts do not depend on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tokenreduce as tr
from tokenreduce.bench.performance.cut import PublishedToMe
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.operators import Operators, count_operators

__all__ = ["count"]

METHODS = (
    "tome:r=13", "pitome:ratio=0.9", "evit:base_keep_rate=0.7", "diffrate:keep=0.3", "tofu:r=13", "repshift:ratio=0.7",
    "random:r=13", "tome:r=0",
)  # fmt: skip
COLUMNS = ("method", "operators of a forward", "of the block that takes most", "of these, plans", "most often")


def count(stock: Any, x: torch.Tensor, method: str | None = None) -> Operators:
    """Operators of a forward of a timm model on ``x``, with ``method`` in it."""
    with torch.no_grad():
        if method is None:
            return count_operators(stock, lambda: stock(x), list(stock.blocks))
        with tr.patched(stock, method):
            stock(x)  # constants of this shape are made
            return count_operators(stock, lambda: stock(x), list(stock.blocks))


def cells(name: str, got: Operators) -> tuple[str, ...]:
    """A row for a table."""
    if not sum(got.per_block):
        return (name, str(got.total), "", "", "")
    most = got.per_block.index(max(got.per_block))
    often = ", ".join(f"{n} {op.removeprefix('aten.')}" for op, n in got.own[most].most_common(4))
    return (name, str(got.total), str(got.per_block[most]), str(got.own_per_block[most]), often)


def main(
    model: Annotated[str, typer.Option(help="a timm vision transformer")] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    methods: Annotated[str, typer.Option(help="separated by +")] = "+".join(METHODS),
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """Operators of encoder methods, by block."""
    import timm

    speak_everywhere()
    stock: Any = timm.create_model(model).eval()
    x = torch.randn(batch, 3, *stock.patch_embed.img_size)
    lines = [cells("stock", count(stock, x))]
    lines += [cells(f"`{method}`", count(stock, x, method)) for method in methods.split("+")]
    plain = PublishedToMe(stock, 13).eval()
    lines.append(cells("published ToMe, r=13", count_operators(plain, lambda: plain(x), [])))
    about = (
        f"{model}, batch {batch}, on the CPU, without gradients; torch {torch.__version__}, timm {timm.__version__}."
    )
    deliver("operators", COLUMNS, lines, about, markdown)


if __name__ == "__main__":
    typer.run(main)
