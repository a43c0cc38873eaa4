"""Compiled encoders: ``python -m tokenreduce.bench.performance.compiled`` makes its section of docs/performance.md.

The compiled patched model beside the compiled stock model and the compiled blocks on as many tokens that are merely
sliced, in the same rounds: what a compiler can do for one it can do for all three. A patched model is compiled as a
whole, or block by block (``block.compile(dynamic=True)``), where blocks share a graph and the first call is short; it
is held against whole models in both cases.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tokenreduce as tr
from tokenreduce.bench.performance.cut import Sliced
from tokenreduce.bench.performance.encoders import BUSY, DTYPES, refuse_busy, rounds_in
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.pinned import Others, is_pinned, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.timing import Speedup, interleaved

__all__ = ["CASES", "QUICK", "Case", "Row", "measure"]


@dataclass(frozen=True)
class Case:
    """A timm model (random weights) with its settings, a batch, and a method; ``blocks``: the patched model is compiled
    block by block."""

    model: str
    batch: int
    method: str
    settings: tuple[tuple[str, int], ...] = ()
    blocks: bool = False


_WHOLE = (
    Case("vit_base_patch16_224", 1, "tome:r=16"),
    Case("vit_base_patch16_224", 8, "tome:r=16"),
    Case("deit_small_patch16_224", 1, "tome:r=16"),
)
CASES = (*_WHOLE, *(replace(case, blocks=True) for case in _WHOLE))
QUICK = tuple(
    Case("vit_tiny_patch16_224", 2, "tome:r=2", (("img_size", 64), ("depth", 3)), blocks) for blocks in (False, True)
)


@dataclass(frozen=True)
class Compiled:
    """A compiled model: seconds of its first call, graphs that made, and graphs that another batch size added."""

    run: Any
    seconds: float
    graphs: int
    more: int


@dataclass(frozen=True)
class Row:
    """``speedup``, ``possible`` and ``share`` are those of compiled models, ``eager`` that of models that are not;
    ``gain`` is the patched model, eager over compiled. ``stock`` and ``patched`` say what compiling took."""

    case: Case
    speedup: Speedup
    possible: Speedup
    share: Speedup
    eager: Speedup
    gain: Speedup
    stock: Compiled
    patched: Compiled
    others: float | None


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))


def _runs(model: Any, backend: str, blocks: bool) -> Any:
    """``model`` compiled as a whole, or a copy that shares its weights and is compiled block by block."""
    if not blocks:
        return torch.compile(model, backend=backend)
    out = shell(model)
    for block in out.blocks:
        block.compile(backend=backend, dynamic=True)
    return out


def _compiled(model: Any, x: Any, backend: str, blocks: bool = False) -> Compiled:
    torch.compiler.reset()
    start = _graphs()
    run = _runs(model, backend, blocks)
    began = time.perf_counter()
    run(x)
    seconds, first = time.perf_counter() - began, _graphs() - start
    run(torch.cat([x, x]))
    return Compiled(run, seconds, first, _graphs() - start - first)


def measure(
    case: Case, seconds: float = 20.0, rounds: int | None = None, device: str = "cpu", dtype: str = "fp32",
    backend: str = "inductor",
) -> Row:  # fmt: skip
    """One row, timed for about ``seconds`` or for as many ``rounds``. A model's graphs are thrown away when the next
    one is compiled and counted, so all are compiled once more for the clock."""
    import timm

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(case.settings)
    stock: Any = timm.create_model(case.model, **settings).eval().to(device, DTYPES[dtype])
    x = torch.randn(case.batch, 3, *stock.patch_embed.img_size, device=device, dtype=DTYPES[dtype])
    patched = tr.patch(shell(stock), case.method)
    with torch.no_grad():
        with tr.record(patched, flops=False) as trace:
            patched(x)
        (reducer,) = tr.describe(patched).active
        sliced = Sliced(stock, trace.tokens, reducer.acting_position()).eval()
        counted = {
            name: _compiled(model, x, backend, case.blocks and name == "patched")
            for name, model in (("stock", stock), ("patched", patched))
        }
        torch.compiler.reset()
        models = {"stock": stock, "patched": patched, "sliced": sliced}
        runs = {name: _runs(model, backend, case.blocks and name == "patched") for name, model in models.items()}
        functions: dict[str, Any] = {name: partial(run, x) for name, run in runs.items()}
        functions |= {f"eager {name}": partial(models[name], x) for name in ("stock", "patched")}
        for function in functions.values():
            function()
        count = rounds_in(seconds, functions, device, rounds)
        others = Others()
        times = interleaved(functions, count, 1, device)
    return Row(
        case, times["stock"].against(times["patched"]), times["stock"].against(times["sliced"]),
        times["sliced"].against(times["patched"]), times["eager stock"].against(times["eager patched"]),
        times["eager patched"].against(times["patched"]), counted["stock"], counted["patched"], others.cores(),
    )  # fmt: skip


COLUMNS = (
    "model", "batch", "method", "compiled", "speed-up, compiled", "possible", "share of it", "interval",
    "speed-up, eager",
    "compiled over eager, patched", "first call, stock", "patched", "graphs, stock", "patched",
    "more for another batch, stock", "patched",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row for a table; ``(!)`` marks figures of a machine that others kept busy."""
    case, mark = row.case, " (!)" if row.others is not None and row.others > BUSY else ""
    return (
        case.model, str(case.batch), f"`{case.method}`", "blocks" if case.blocks else "model",
        row.speedup.cell + mark, f"{row.possible.ratio:.2f}x",
        f"{row.share.ratio:.2f}{mark}", row.share.interval, row.eager.cell, row.gain.cell,
        f"{row.stock.seconds:.0f} s", f"{row.patched.seconds:.0f} s", str(row.stock.graphs), str(row.patched.graphs),
        str(row.stock.more), str(row.patched.more),
    )  # fmt: skip


def conditions(rows: Sequence[Row], device: str, dtype: str, backend: str) -> str:
    """What a reader has to know about the figures."""
    where = f"CPU, {torch.get_num_threads()} thread(s)" if device == "cpu" else torch.cuda.get_device_name(device)
    rounds = sorted({row.speedup.rounds for row in rows})
    return (
        f"{where}; {dtype}; torch {torch.__version__}, backend {backend}; random weights, shared; "
        f"allocator {'pinned' if is_pinned() else 'NOT pinned'}; {rounds[0]} to {rounds[-1]} interleaved rounds, "
        f"medians of per-round ratios (≈: within noise; (!): other processes used more than {BUSY} cores)."
    )


def main(
    seconds: Annotated[float, typer.Option(help="time for the rounds of one case", min=0)] = 20.0,
    rounds: Annotated[int | None, typer.Option(help="as many rounds instead", min=1)] = None,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    backend: str = "inductor",
    model: Annotated[str | None, typer.Option(help="models whose name contains this text")] = None,
    quick: Annotated[bool, typer.Option(help="a tiny model, to see that everything runs")] = False,
    idle: Annotated[bool, typer.Option(help="refuse a machine that others keep busy")] = False,
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """Speed of compiled encoders, beside what is possible."""
    speak_everywhere()
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}")
    cases = [case for case in (QUICK if quick else CASES) if model is None or model in case.model]
    if not cases:
        raise typer.BadParameter(f"--model is part of one of {', '.join(sorted({c.model for c in CASES}))}")
    if idle:
        refuse_busy()
    rows = [measure(case, seconds, rounds, device, dtype, backend) for case in cases]
    about = conditions(rows, device, dtype, backend)
    deliver("compiled", COLUMNS, [cells(row) for row in rows], about, markdown, "encoders-compiled")


if __name__ == "__main__":
    pin()
    typer.run(main)
