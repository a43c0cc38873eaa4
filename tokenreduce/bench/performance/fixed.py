"""What a patch costs whatever its method does: ``python -m tokenreduce.bench.performance.fixed``.

A method that does nothing but let the last visual token go is put into a model with the layers and tokens of
LLaVA-1.5-7B and hardly any width, where a generation takes as long as its operators and its Python take to start. What
it takes beside the stock model is the fixed cost: hooks, what is kept of a generation, masks, gathering. It is the same
in a model of any width. Operators, and functions of this package that are entered, do not depend on the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import tokenreduce as tr
from tokenreduce.algorithms.projector import kept
from tokenreduce.bench.performance.encoders import refuse_busy
from tokenreduce.bench.performance.language_operators import count
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.bench.performance.shapes import Shape, build, prompt
from tokenreduce.common.pinned import is_pinned, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.core.evidence import CacheEvidence, LanguageEvidence, VisualEvidence
from tokenreduce.core.plan import Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.measure.operators import entered
from tokenreduce.measure.timing import interleaved
from tokenreduce.vision.cache.random_drop import RandomKeys
from tokenreduce.vision.language.random_drop import RandomVisual
from tokenreduce.vision.projector.random_drop import RandomTokens

__all__ = ["SHAPE", "Row", "measure", "methods"]

SHAPE = Shape((64, 24, 4, 128), (64, 32, 4, 128), vocabulary=512)
TINY = Shape((32, 3, 2, 64), (32, 4, 4, 64), side=6, text=8, vocabulary=512)


@dataclass(frozen=True)
class _LastToken(RandomTokens):
    """Before the language model: the last token goes."""

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(torch.arange(keep, device=evidence.x.device).expand(evidence.batch, -1), evidence)


@dataclass(frozen=True)
class _LastColumn(RandomVisual):
    """Inside the language model: the last visual token goes."""

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = evidence.visual
        assert visual is not None
        last = visual.cumsum(1).argmax(1, keepdim=True)
        places = torch.arange(evidence.n - 1, device=visual.device).expand(evidence.batch, -1)
        return Prune(evidence.n, places + (places >= last).long())


@dataclass(frozen=True)
class _LastKey(RandomKeys):
    """On the cache: the last visual key of every layer goes."""

    def importance(self, evidence: CacheEvidence) -> Tensor:
        keys = evidence.keys
        return torch.arange(evidence.n, 0, -1, device=keys.device, dtype=torch.float32).expand(len(keys), -1)


def methods(visual: int) -> dict[str, Reducer]:
    """The empty method of each stage, for prompts of ``visual`` such tokens."""
    keep = visual - 1
    return {"projector": _LastToken(keep=keep), "language": _LastColumn(keep=keep), "cache": _LastKey(keep=keep)}


@dataclass(frozen=True)
class Row:
    """The empty method of a stage beside the stock model: milliseconds that a ``generate`` of one token (``first``)
    and every further token (``further``) take more, medians over rounds with the smallest and largest; operators more
    of a prefill and a step; functions of this package entered in both."""

    stage: str
    first: tuple[float, float, float]
    further: tuple[float, float, float]
    operators: tuple[int, int]
    functions: tuple[int, int]


def generate(model: Any, given: dict[str, Tensor], tokens: int) -> Any:
    """``tokens`` new tokens of a prompt, none of them the end."""
    return model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def measure(
    shape: Shape = SHAPE, rounds: int = 15, tokens: int = 17, cpu_time: bool = False
) -> tuple[list[Row], tuple[float, float]]:
    """A row for each stage, and the stock model's milliseconds of one token and every further one; ``cpu_time`` is that
    of this thread, which other processes disturb less."""
    stock, given = build(shape), prompt(shape)
    models = {"stock": stock}
    models |= {name: tr.patch(shell(stock), method) for name, method in methods(shape.visual).items()}
    calls = {f"{name} {n}": partial(generate, model, given, n) for name, model in models.items() for n in (1, tokens)}
    times = interleaved(calls, rounds, 1, clock=time.thread_time if cpu_time else None)
    one = {name: times[f"{name} 1"].times for name in models}
    more = {
        name: [(b - a) / (tokens - 1) for a, b in zip(one[name], times[f"{name} {tokens}"].times, strict=True)]
        for name in models
    }
    base = count(stock, given)
    rows = []
    for name in ("projector", "language", "cache"):
        made = count(models[name], given)
        functions = [entered(calls[f"{name} {n}"]).total() for n in (1, tokens)]
        rows.append(
            Row(
                name,
                _range([(b - a) * 1e3 for a, b in zip(one["stock"], one[name], strict=True)]),
                _range([(b - a) * 1e3 for a, b in zip(more["stock"], more[name], strict=True)]),
                (made.prefill - base.prefill, made.step - base.step),
                (functions[0], round((functions[1] - functions[0]) / (tokens - 1))),
            )
        )
    return rows, (statistics.median(one["stock"]) * 1e3, statistics.median(more["stock"]) * 1e3)


COLUMNS = (
    "stage", "more for a generate of one token", "range", "more for each further token", "range",
    "operators more, prefill", "step", "functions entered, prefill", "step",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row for a table."""
    spans = [f"{low:.2f} to {high:.2f} ms" for _, low, high in (row.first, row.further)]
    return (
        row.stage, f"{row.first[0]:.2f} ms", spans[0], f"{row.further[0]:.3f} ms", spans[1],
        *map(str, (*row.operators, *row.functions)),
    )  # fmt: skip


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    tokens: Annotated[int, typer.Option(min=2, help="new tokens of the longer generation")] = 17,
    quick: Annotated[bool, typer.Option(help="a tiny model, to see that everything runs")] = False,
    idle: Annotated[bool, typer.Option(help="refuse a machine that others keep busy")] = False,
    cpu_time: Annotated[bool, typer.Option(help="CPU time of one thread, where others disturb the clock")] = False,
    profile: Annotated[str | None, typer.Option(help="a stage: print which functions are entered instead")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """The fixed cost of a patch in a generation."""
    speak_everywhere()
    shape = TINY if quick else SHAPE
    if profile is not None:
        _profile(shape, profile, tokens)
        return
    if idle:
        refuse_busy()
    if cpu_time:
        torch.set_num_threads(1)
    rows, (first, further) = measure(shape, rounds, tokens, cpu_time)
    kind = ", CPU time" if cpu_time else ""
    about = (
        f"CPU{kind}, {torch.get_num_threads()} thread(s), float32, torch {torch.__version__}, allocator "
        f"{'pinned' if is_pinned() else 'NOT pinned'}; {shape.llm[1]} layers, {shape.visual} visual tokens; the stock "
        f"model takes {first:.1f} ms for one token and {further:.2f} ms for each further one; {rounds} interleaved "
        f"rounds, medians of differences."
    )
    deliver("fixed", COLUMNS, [cells(row) for row in rows], about, markdown)


def _profile(shape: Shape, stage: str, tokens: int) -> None:
    """Print the functions of this package that a prefill and all steps behind it enter, the most frequent first."""
    known = methods(shape.visual)
    if stage not in known:
        raise typer.BadParameter(f"--profile is one of {', '.join(known)}, not {stage!r}")
    model, given = tr.patch(build(shape), known[stage]), prompt(shape)
    generate(model, given, 2)
    one, all_ = (entered(partial(generate, model, given, n)) for n in (1, tokens))
    for title, found in (("prefill", one), (f"{tokens - 1} steps", all_ - one)):
        print(f"{title}: {found.total()}")
        for name, n in found.most_common(40):
            print(f"  {n:6d} {name}")


if __name__ == "__main__":
    pin()
    typer.run(main)
