"""The clock measurements of encoders: ``python -m tokenreduce.bench.performance.encoders`` prints them again.

Patched models are timed beside the stock model in its fastest form (fused attention), the same blocks on as many tokens
that are merely sliced (what no method can be faster than), and the published way of patching ToMe; all share weights
and run in the same rounds, and ratios are medians over rounds. Random weights: the clock does not care.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import tokenreduce as tr
from tokenreduce.bench.performance.cut import PublishedToMe, Sliced
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.pinned import Others, faults, is_pinned, load_of_machine, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Speedup, interleaved

__all__ = ["GROUPS", "QUICK", "Group", "Row", "measure"]

#: Cores that others may use before a figure is marked.
BUSY = 0.15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _all(r: int) -> tuple[str, ...]:
    """Every method that the page promises something for, where ToMe and its successors remove ``r`` in every layer."""
    return (
        f"tome:r={r}", "pitome:ratio=0.9", "evit:base_keep_rate=0.7", "diffrate:keep=0.3", f"tofu:r={r}",
        "repshift:ratio=0.7", f"random:r={r}", "tome:r=0",
    )  # fmt: skip


@dataclass(frozen=True)
class Group:
    """What is timed in the same rounds: a timm model (random weights) with its settings, a batch, and the methods."""

    model: str
    batch: int
    methods: tuple[str, ...]
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def more(self) -> dict[str, Any]:
        """``settings`` as keywords."""
        return dict(self.settings)

    def build(self, device: str, dtype: torch.dtype) -> Any:
        import timm

        torch.manual_seed(0)
        return timm.create_model(self.model, **self.more).eval().to(device, dtype)


#: The last one is large: ToMe stands for all.
GROUPS = (
    Group("vit_base_patch16_224", 8, _all(16)),
    Group("vit_base_patch16_224", 1, _all(16)),
    Group("deit_small_patch16_224", 8, _all(16)),
    Group("deit_small_patch16_224", 1, _all(16)),
    Group("vit_small_patch14_dinov2", 1, _all(80)),
    Group("vit_small_patch14_dinov2", 8, ("tome:r=80",)),
)
_SMALL = (("img_size", 64), ("depth", 3))
#: What shows in seconds that everything runs.
QUICK = tuple(Group("vit_tiny_patch16_224", batch, _all(2), _SMALL) for batch in (1, 2))


@dataclass(frozen=True)
class Row:
    """One method of a group.

    ``speedup`` is stock over patched, ``possible`` stock over sliced, ``share`` sliced over patched, and ``published``
    the published ToMe over patched where the method is ToMe, all with their intervals. ``flops`` and ``memory`` (peak
    bytes of live tensors, one forward) are stock over patched. ``faults`` are page faults of a forward, of (stock,
    patched), medians. ``others`` are the cores that other processes kept busy meanwhile, None where that is unknown.
    """

    group: Group
    method: str
    left: int
    flops: float
    speedup: Speedup
    possible: Speedup
    share: Speedup
    published: Speedup | None
    memory: float
    faults: tuple[int, int]
    others: float | None
    seconds: float

    @property
    def busy(self) -> bool:
        """Whether other processes disturbed the clock."""
        return self.others is not None and self.others > BUSY


@dataclass
class _Faulting:
    """A function that notes the page faults of its calls."""

    function: Callable[[], object]
    seen: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        before = faults()
        self.function()
        self.seen.append(faults() - before)


@dataclass(frozen=True)
class _Made:
    """A method in a model, and what it was seen to do there."""

    model: Any
    counts: tuple[int, ...]
    position: str
    flops: float


def _patched(stock: Any, method: str, x: Any, flops: int) -> _Made:
    model = tr.patch(shell(stock), method)
    with tr.record(model) as trace:
        model(x)
    (reducer,) = tr.describe(model).active
    return _Made(model, tuple(trace.tokens), reducer.acting_position(), flops / trace.flops)


def _published_r(method: str) -> int | None:
    name, settings = tr.get_method(method).name, method.partition(":")[2]
    return int(settings.removeprefix("r=")) if name == "tome" and settings not in ("", "r=0") else None


def _functions(stock: Any, made: dict[str, _Made], x: Any) -> dict[str, _Faulting]:
    models = {"stock": stock}
    for method, one in made.items():
        models[method] = one.model
        if one.flops > 1:  # where no token goes, the stock model is what is possible
            models[f"sliced {method}"] = Sliced(stock, one.counts, one.position).eval()
        if (r := _published_r(method)) is not None:
            models[f"published {method}"] = PublishedToMe(stock, r).eval()
    return {name: _Faulting(partial(model, x)) for name, model in models.items()}


def rounds_in(seconds: float, functions: dict[str, Any], device: str, rounds: int | None) -> int:
    """How often to run ``functions`` in about ``seconds``, 3 to 25 times, by a round that is not counted; ``rounds``
    where that is given."""
    began = time.perf_counter()
    interleaved(functions, 1, 0, device)
    each = time.perf_counter() - began
    return min(max(int(seconds / each), 3), 25) if rounds is None else rounds


def measure(
    group: Group, seconds: float = 35.0, rounds: int | None = None, device: str = "cpu", dtype: str = "fp32"
) -> list[Row]:
    """One row for every method of ``group``, timed for about ``seconds`` or for as many ``rounds``."""
    stock = group.build(device, DTYPES[dtype])
    x = torch.randn(group.batch, 3, *stock.patch_embed.img_size, device=device, dtype=DTYPES[dtype])
    with torch.inference_mode():
        with tr.record(stock) as before:
            stock(x[:1])
        made = {method: _patched(stock, method, x[:1], before.flops) for method in group.methods}
        functions = _functions(stock, made, x)
        count = rounds_in(seconds, functions, device, rounds)
        others = Others()
        times = interleaved(functions, count, 0, device)
        used = others.cores()
        whole = peak_bytes(lambda: stock(x), device)
        rows = []
        for method, one in made.items():
            peak = peak_bytes(partial(one.model, x), device)
            mine, published = times[method], times.get(f"published {method}")
            sliced = times.get(f"sliced {method}", times["stock"])
            fault = (statistics.median(functions[name].seen[-count:]) for name in ("stock", method))
            rows.append(
                Row(
                    group, method, one.counts[-1], one.flops, times["stock"].against(mine),
                    times["stock"].against(sliced), sliced.against(mine),
                    None if published is None else published.against(mine), whole / peak,
                    tuple(map(int, fault)), used, times["stock"].median,  # type: ignore[arg-type]
                )
            )  # fmt: skip
    return rows


COLUMNS = (
    "model", "batch", "method", "tokens left", "FLOPs", "speed-up", "interval", "possible", "share of it", "interval",
    "published ToMe's time", "memory", "page faults, stock", "patched",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row for a table; ``(!)`` marks figures of a machine that others kept busy."""
    size = "" if not row.group.settings else " " + ",".join(f"{k}={v}" for k, v in row.group.settings)
    mark = " (!)" if row.busy else ""
    published = "" if row.published is None else row.published.cell
    return (
        row.group.model + size, str(row.group.batch), f"`{row.method}`", str(row.left), f"{row.flops:.2f}x",
        row.speedup.cell + mark, row.speedup.interval, f"{row.possible.ratio:.2f}x", f"{row.share.ratio:.2f}{mark}",
        row.share.interval, published, f"{row.memory:.2f}x", str(row.faults[0]), str(row.faults[1]),
    )  # fmt: skip


def conditions(rows: Sequence[Row], device: str, dtype: str) -> str:
    """What a reader has to know about the figures."""
    import timm

    others = [row.others for row in rows if row.others is not None]
    busy = sum(row.busy for row in rows)
    said = "not known" if not others else f"{min(others):.2f} to {max(others):.2f}"
    where = f"CPU, {torch.get_num_threads()} thread(s)" if device == "cpu" else torch.cuda.get_device_name(device)
    memory = "peak of live tensors by the allocator events of torch.profiler" if device == "cpu" else "allocator's peak"
    rounds = sorted({row.speedup.rounds for row in rows})
    return (
        f"{where}; {dtype}; torch {torch.__version__}, timm {timm.__version__}; random weights, shared; allocator "
        f"{'pinned' if is_pinned() else 'NOT pinned'}; {rounds[0]} to {rounds[-1]} interleaved rounds, medians of "
        f"per-round ratios (≈: within noise); memory is stock over patched, {memory}; cores that other processes used: "
        f"{said}{f'; {busy} rows marked (!), repeat them on an idle machine' if busy else ''}."
    )


def _chosen(groups: Sequence[Group], only: str | None, batch: int | None, model: str | None) -> Iterator[Group]:
    for group in groups:
        methods = tuple(m for m in group.methods if only is None or only in m)
        if methods and batch in (None, group.batch) and (model is None or model in group.model):
            yield Group(group.model, group.batch, methods, group.settings)


def main(
    seconds: Annotated[float, typer.Option(help="time for the rounds of one model and batch", min=0)] = 35.0,
    rounds: Annotated[int | None, typer.Option(help="as many rounds instead", min=1)] = None,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    model: Annotated[str | None, typer.Option(help="models whose name contains this text")] = None,
    batch: Annotated[int | None, typer.Option(help="only this batch")] = None,
    only: Annotated[str | None, typer.Option(help="methods whose text contains this")] = None,
    quick: Annotated[bool, typer.Option(help="tiny models, to see that everything runs")] = False,
    idle: Annotated[bool, typer.Option(help="refuse a machine that others keep busy")] = False,
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """Speed of encoder methods by the clock, beside what is possible."""
    speak_everywhere()
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}")
    chosen = list(_chosen(QUICK if quick else GROUPS, only, batch, model))
    if not chosen:
        raise typer.BadParameter("no model, batch and method is left: loosen --model, --batch or --only")
    if idle:
        refuse_busy()
    screen, rows = Console(width=200), []
    for group in chosen:
        rows += measure(group, seconds, rounds, device, dtype)
        mark = " (!)" if rows[-1].busy else ""
        screen.print(f"{group.model}, batch {group.batch}: {rows[-1].seconds * 1e3:.0f} ms stock{mark}")
    deliver("encoders", COLUMNS, [cells(row) for row in rows], conditions(rows, device, dtype), markdown)


def refuse_busy(wait: float = 2.0) -> None:
    """Raise ``typer.BadParameter`` where other processes use more than :data:`BUSY` cores for ``wait`` seconds."""
    others = Others()
    time.sleep(wait)
    used = others.cores()
    if used is not None and used > BUSY:
        load = load_of_machine()
        said = "" if load is None else f" (load {load:.1f} per core)"
        raise typer.BadParameter(f"other processes use {used:.2f} cores{said}; wait for them, or leave --idle out")


if __name__ == "__main__":
    pin()
    typer.run(main)
