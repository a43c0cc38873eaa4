"""Own work of every method beside the stock prefill: ``python -m tokenreduce.bench.performance.own_table``.

Own work is the time inside ``plan``, or what an adapter clocks as making and applying plans where that is more. It is
measured on the shape ``small`` of the page, and, of methods before the language model, with a tower and embeddings as
wide as LLaVA-1.5-7B's. That model's prefill is that of its tower with one language layer, and 31 times what another
layer takes more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

import tokenreduce as tr
from tokenreduce.bench.performance.encoders import refuse_busy
from tokenreduce.bench.performance.own_work import own_seconds
from tokenreduce.bench.performance.prefills import methods_of, prefill
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.bench.performance.shapes import SHAPES, Shape, build, prompt
from tokenreduce.common.pinned import is_pinned, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.timing import interleaved

__all__ = ["Row", "WIDE", "measure", "whole_prefill"]

WIDE = SHAPES["llava-7b"]
#: Goal for own work before the language model and inside it, shares of the stock prefill.
GOALS = {"projector": 0.01, "language": 0.02}


@dataclass(frozen=True)
class Row:
    """Own work of a method in seconds, and of the stock prefill beside it; ``wide`` is the same at the widths of
    LLaVA-1.5-7B. ``error`` says why there is none."""

    method: str
    stage: str
    keep: int
    own: float | None = None
    prefill: float | None = None
    wide: tuple[float, float] | None = None
    error: str = ""


def whole_prefill(shape: Shape, repeats: int = 3, device: str = "cpu") -> float:
    """Seconds of a stock prefill of ``shape``, from models of one and of two language layers."""
    given, calls = prompt(shape, device=device), {}
    for n in (1, 2):
        model = build(replace(shape, llm=(shape.llm[0], n, *shape.llm[2:])), device)
        calls[str(n)] = partial(prefill, model, given)
    times = interleaved(calls, repeats, 1, device)
    one, two = times["1"].median, times["2"].median
    return one + (shape.llm[1] - 1) * (two - one)


def measure(
    small: Shape = SHAPES["small"], wide: Shape | None = WIDE, keep: int = 192, methods: Sequence[str] = (),
    repeats: int = 3, done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:  # fmt: skip
    """A row for every method before and inside the language model, the dearest first; ``done`` hears of each when it is
    there, and again with what it is at ``wide``."""
    stock, given = build(small), prompt(small)
    base = interleaved({"": partial(prefill, stock, given)}, repeats, 1, "cpu")[""].median
    rows = []
    for name, stage in methods_of(stock, methods):
        if stage in GOALS:
            rows.append(_row(stock, given, name, stage, keep, base, repeats))
            done(rows[-1])
    del stock
    if wide is not None:
        whole = whole_prefill(wide, repeats)
        one, given = build(replace(wide, llm=(wide.llm[0], 1, *wide.llm[2:]))), prompt(wide)
        for i, row in enumerate(rows):
            if row.stage == "projector" and row.own is not None:
                other = _row(one, given, row.method, row.stage, keep, whole, repeats)
                rows[i] = replace(row, wide=None if other.own is None else (other.own, whole))
                done(rows[i])
    return sorted(rows, key=lambda r: (r.stage != "projector", -(r.own or 0)))


def _row(stock: Any, given: dict[str, Tensor], name: str, stage: str, keep: int, base: float, repeats: int) -> Row:
    try:
        reducer = tr.get_method(f"{name}:keep={keep}", stage)
        own = own_seconds(stock, reducer, partial(prefill, stock, given), "cpu", repeats)
        return Row(name, stage, keep, own, base)
    except Exception as error:
        return Row(name, stage, keep, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


COLUMNS = ("method", "stage", "own work", "of the stock prefill", "as wide as 7B", "of 7B's prefill")


def cells(row: Row) -> list[str]:
    """A row for a table; a share above the goal is marked."""
    if row.own is None or row.prefill is None:
        return [row.method, row.stage, row.error, "", "", ""]
    share = row.own / row.prefill
    out = [row.method, row.stage, f"{row.own * 1e3:.1f} ms", f"{share:.2%}{' *' if share > GOALS[row.stage] else ''}"]
    if row.wide is None:
        return [*out, "", ""]
    return [*out, f"{row.wide[0] * 1e3:.1f} ms", f"{row.wide[0] / row.wide[1]:.3%}"]


def command(
    methods: Annotated[str | None, typer.Option(help="'divprune,fastv'; all by default")] = None,
    keep: Annotated[int, typer.Option(min=1, help="visual tokens that stay, of 576")] = 192,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="tiny models, to see that every method runs")] = False,
    idle: Annotated[bool, typer.Option(help="refuse a machine that others keep busy")] = False,
    markdown: Annotated[Path | None, typer.Option(help="page whose section is replaced")] = None,
) -> None:
    """What every method does itself, beside the stock prefill."""
    if idle:
        refuse_busy()
    small, wide = (SHAPES["tiny"], None) if quick else (SHAPES["small"], WIDE)
    log = Console(stderr=True)
    rows = measure(
        small, wide, keep, [] if methods is None else methods.replace(",", " ").split(), repeats,
        lambda row: log.print(" ".join(c for c in cells(row) if c), highlight=False),
    )  # fmt: skip
    base = next((r.prefill for r in rows if r.prefill), 0.0)
    whole = next((f"; as wide as LLaVA-1.5-7B, whose prefill takes {r.wide[1]:.0f} s" for r in rows if r.wide), "")
    about = (
        f"CPU, {torch.get_num_threads()} thread(s), float32, torch {torch.__version__}, allocator "
        f"{'pinned' if is_pinned() else 'NOT pinned'}; {small.visual} visual tokens, {keep} stay; language model of "
        f"{small.llm[1]} layers of width {small.llm[0]}, whose prefill takes {base * 1e3:.0f} ms{whole}; medians of "
        f"{repeats}; * above the goal of 1 % before the language model and 2 % inside."
    )
    deliver("own_table", COLUMNS, [cells(row) for row in rows], about, markdown)


if __name__ == "__main__":
    pin()
    speak_everywhere()
    typer.run(command)
