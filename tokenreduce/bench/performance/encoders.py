"""The clock measurements of docs/performance.md: ``python -m tokenreduce.bench.performance.encoders`` prints them
again.

Every row compares a patched model with the stock model in its fastest form (fused attention), interleaved in one run,
and reports the median of per-round ratios. Random weights: the clock does not care.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import tokenreduce as tr
from tokenreduce.common.pinned import pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Speedup, interleaved

__all__ = ["Case", "Result", "measure"]


@dataclass(frozen=True)
class Case:
    """One line: a timm model (random weights), its settings, a reducer and a batch size."""

    model: str
    reduce: str
    batch: int
    img_size: int | None = None


@dataclass(frozen=True)
class Result:
    """``flops`` and ``clock`` are stock over patched, ``speedup`` is ``clock`` with its interval; ``own`` the share of
    the patched forward spent on plans."""

    case: Case
    final_tokens: int
    flops: float
    clock: float
    own: float | None
    memory: float
    speedup: Speedup | None = None

    @property
    def yielded(self) -> float:
        """How much of the saving in FLOPs arrives on the clock."""
        return self.clock / self.flops


#: The two rows that the project promises to hold at 0.9 or better, then others for orientation.
CASES = (
    Case("vit_base_patch16_224", "tome:r=16", 8),
    Case("vit_small_patch14_dinov2", "tome:r=80", 2),
    Case("vit_base_patch16_224", "tome:r=16,prop_attn=false", 8),
    Case("vit_base_patch16_224", "pitome:ratio=0.9", 8),
    Case("vit_base_patch16_224", "evit:base_keep_rate=0.5", 8),
    Case("vit_base_patch16_224", "diffrate:schedule=vit-b-deit@8.7", 8),
    Case("vit_base_patch16_224", "tome:r=16", 1),
)


def measure(case: Case, repeats: int = 9, device: str = "cpu", amp: str | None = None) -> Result:
    """Run one case; ``amp`` is None, "bf16" or "fp16" (weights and inputs are cast)."""
    import timm

    dtype = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    size: Any = {} if case.img_size is None else {"img_size": case.img_size}
    stock: Any = timm.create_model(case.model, **size).eval().to(device, dtype)
    patched = tr.patch(copy.deepcopy(stock), case.reduce)
    x = torch.randn(case.batch, 3, *stock.patch_embed.img_size, device=device, dtype=dtype)
    with torch.inference_mode():
        with tr.record(stock) as before:
            stock(x)
        with tr.record(patched) as after:
            patched(x)
        times = interleaved({"stock": lambda: stock(x), "patched": lambda: patched(x)}, repeats, 2, device)
        memory = peak_bytes(lambda: stock(x), device) / peak_bytes(lambda: patched(x), device)
        own = None
        if device == "cpu":
            shares = []
            for _ in range(3):
                with tr.record(patched, flops=False, timing=True) as trace:
                    run = interleaved({"patched": lambda: patched(x)}, 1, 0)["patched"].median
                shares.append(trace.seconds / run)
            own = sorted(shares)[1]
    clock = times["stock"].against(times["patched"])
    return Result(case, after.tokens[-1], before.flops / after.flops, clock.ratio, own, memory, clock)


def main(
    repeats: Annotated[int, typer.Option(help="rounds per case")] = 9,
    device: str = "cpu",
    amp: Annotated[str | None, typer.Option(help="bf16 or fp16")] = None,
    batch: Annotated[int | None, typer.Option(help="instead of each case's own")] = None,
    only: Annotated[str | None, typer.Option(help="cases whose reducer contains this text")] = None,
) -> None:
    """Clock speed-up against FLOPs ratio for the cases of docs/performance.md."""
    speak_everywhere()
    table = Table("model", "batch", "reduce", "final tokens", "FLOPs", "clock", "clock / FLOPs", "own work", "memory")
    for case in CASES:
        if only is not None and only not in case.reduce:
            continue
        if batch is not None:
            case = Case(case.model, case.reduce, batch, case.img_size)
        r = measure(case, repeats, device, amp)
        own = "" if r.own is None else f"{r.own:.1%}"
        clock = f"{r.clock:.2f}x" if r.speedup is None else r.speedup.cell
        cells = (f"{r.flops:.2f}x", clock, f"{r.yielded:.2f}", own, f"{r.memory:.2f}x")
        table.add_row(case.model, str(case.batch), case.reduce, str(r.final_tokens), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    pin()
    typer.run(main)
