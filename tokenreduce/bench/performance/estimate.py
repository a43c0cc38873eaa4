"""Is an estimate right: ``python -m tokenreduce.bench.performance.estimate`` makes its section of docs/performance.md.

This machine is calibrated, then every setting is estimated on ``measured`` from its config, and measured with the true
model of random weights: stock and reduced, interleaved, fused attention. What is compared is the speed-up.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tokenreduce as tr
from tokenreduce.bench.performance.sections import command_of, section, splice
from tokenreduce.bench.performance.shapes import PACKED, SHAPES, config_of, packed_config
from tokenreduce.common.words import counted, speak_everywhere
from tokenreduce.estimation.calibrate import calibrate
from tokenreduce.estimation.estimate import compared
from tokenreduce.estimation.measured import Measured
from tokenreduce.estimation.subject import Ask, Subject
from tokenreduce.estimation.subjects import subject_of
from tokenreduce.measure.timing import Speedup, fused_attention, interleaved
from tokenreduce.patching import twin

__all__ = ["SETTINGS", "Case", "Row", "measure", "summary"]

HEAD = ("model", "batch", "reduce", "stock, estimated", "stock, measured", "speed-up, estimated", "measured", "error")
TOME = ("tome:r=4", "tome:r=8", "tome:r=16")
ZIP = ("visionzip:keep=0.5", "visionzip:keep=0.25", "visionzip:keep=0.1")


@dataclass(frozen=True)
class Case:
    """A model by name, or by a shape whose config is written to a folder, with three budgets."""

    name: str
    reduce: tuple[str, ...]
    batch: int = 1
    image: tuple[int, int] | None = None
    #: 0 is in every run, 1 is left out by ``--quick``, 2 is added by ``--full``.
    cost: int = 1

    @property
    def title(self) -> str:
        size = "" if self.image is None else f" ({self.image[0]} px)"
        return self.name.removeprefix("timm:") + size


SETTINGS = (
    Case("timm:vit_base_patch16_224", TOME),
    Case("timm:vit_base_patch16_224", TOME, 8),
    Case("timm:vit_large_patch16_224", TOME),
    Case("timm:vit_large_patch16_224", TOME, 8, cost=2),
    Case("timm:vit_small_patch14_dinov2", ("tome:r=8", "tome:r=16", "tome:r=20"), 1, (224, 224), 0),
    Case("timm:vit_small_patch14_dinov2", ("tome:r=8", "tome:r=16", "tome:r=20"), 8, (224, 224)),
    Case("timm:vit_small_patch14_dinov2", ("tome:r=40", "tome:r=80", "tome:r=110"), 1, (518, 518), 0),
    Case("open_clip:ViT-B-16", ("evit:base_keep_rate=0.8", "evit:base_keep_rate=0.65", "evit:base_keep_rate=0.5")),
    Case("llava", ZIP),
    Case("llava", ZIP, 8, cost=2),
    Case("qwen2.5-vl", ZIP, 1, (448, 448)),
    Case("qwen2.5-vl", ZIP, 8, (448, 448), 2),
)


@dataclass(frozen=True)
class Row:
    """One setting: stock seconds and speed-up, estimated and measured."""

    case: Case
    reduce: str
    stock: tuple[float, float]
    estimated: float
    measured: Speedup

    @property
    def error(self) -> float:
        """Of the estimated speed-up, as a share of the measured one."""
        return self.estimated / self.measured.ratio - 1


def measure(
    cases: Sequence[Case], device: Measured, rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Row]:
    """Rows of all cases in order."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            subject = subject_of(_source(case.name, Path(folder)), Ask(case.image))
            predicted = {s: compared(subject, tr.parse(s), device, case.batch, device.dtype) for s in case.reduce}
            times = _times(subject, case, rounds, clock)
            for spec, (stock, reduced) in predicted.items():
                speedup = times["stock"].against(times[spec])
                yield Row(case, spec, (stock, times["stock"].median), stock / reduced, speedup)


def _source(name: str, folder: Path) -> str:
    if name not in ("llava", "qwen2.5-vl"):
        return name
    config = config_of(SHAPES["small"]) if name == "llava" else packed_config(PACKED)
    config.save_pretrained(folder / name)
    return str(folder / name)


def _times(subject: Subject, case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    stock = subject.build()
    inputs = {k: torch.cat([v] * case.batch) for k, v in subject.inputs.items()}
    models = {"stock": stock, **{s: tr.patch(twin(stock), s) for s in case.reduce}}
    calls = {name: partial(subject.forward, model, inputs) for name, model in models.items()}
    with fused_attention("cpu"):
        return dict(interleaved(calls, rounds, clock=clock))


def summary(rows: Sequence[Row]) -> str:
    """The median and the worst error, in words."""
    worst = max(rows, key=lambda row: abs(row.error))
    middle = statistics.median(abs(row.error) for row in rows)
    return (
        f"{counted(len(rows), 'setting')}: the estimated speed-up is off by {100 * middle:.1f} % in the median, at "
        f"worst by {100 * worst.error:+.0f} % ({worst.case.title}, batch {worst.case.batch}, `{worst.reduce}`)."
    )


def cells(row: Row) -> tuple[str, ...]:
    """The text of a row under :data:`HEAD`."""
    return (
        row.case.title, str(row.case.batch), f"`{row.reduce}`", *(f"{t * 1e3:.0f} ms" for t in row.stock),
        f"{row.estimated:.2f}x", row.measured.cell, f"{100 * row.error:+.0f} %",
    )  # fmt: skip


def main(
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="time to calibrate")] = 20.0,
    quick: Annotated[bool, typer.Option(help="the two smallest models only")] = False,
    full: Annotated[bool, typer.Option(help="large batches of large models, too")] = False,
    cpu_time: Annotated[bool, typer.Option(help="CPU time of one thread, for a machine with other work")] = False,
    markdown_out: Annotated[
        Path | None, typer.Option("--markdown", help="file whose marked section is replaced, or a new one")
    ] = None,
) -> None:
    """Estimated against measured speed-ups on this machine's CPU."""
    speak_everywhere()
    if cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if cpu_time else time.perf_counter
    device = calibrate("fp32", seconds, clock)
    rows = []
    for row in measure([c for c in SETTINGS if c.cost <= (0 if quick else 2 if full else 1)], device, rounds, clock):
        rows.append(row)
        print(*cells(row), flush=True)
    threads = counted(torch.get_num_threads(), "thread") + (", CPU time" if cpu_time else "")
    about = (
        f"CPU, {threads}; fp32; torch {torch.__version__}, Python {platform.python_version()}; random weights; "
        f"{counted(rounds, 'round')}, stock and reduced interleaved. llava and qwen2.5-vl are shapes for a CPU "
        f"(language model {SHAPES['small'].llm[1]} layers of width {SHAPES['small'].llm[0]}), measured to the first "
        f"token.\n\n{summary(rows)}"
    )
    print(summary(rows))
    if markdown_out is not None:
        command = command_of("estimate", sys.argv[1:])
        splice(markdown_out, "estimate", section("estimate", HEAD, [cells(row) for row in rows], command, about))


if __name__ == "__main__":
    typer.run(main)
