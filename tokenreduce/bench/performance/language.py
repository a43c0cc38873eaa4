"""The clock of image language models: ``python -m tokenreduce.bench.performance.language`` makes its section of
docs/performance.md again.

Every row compares a patched model with the stock model (fused attention), interleaved in one run: time to first token
is one prefill with the image, the vision tower included, up to the logits of the last token. Medians are over
rounds. Random weights: the clock does not care, as the number of tokens that stay is the budget's.
"""

from __future__ import annotations

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.shapes import SHAPES, Shape, build, prompt
from tokenreduce.common.files import write_text
from tokenreduce.common.words import counted, speak_everywhere
from tokenreduce.core.reducer import Reducer
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Speedup, interleaved, synchronise

__all__ = ["COLUMNS", "Cost", "Row", "Settings", "cells", "markdown", "measure", "methods_of", "splice"]

STAGES = ("projector", "language", "cache")


@dataclass(frozen=True)
class Settings:
    """How to measure: ``rounds`` timed ones, ``decode`` tokens per round of decoding (0: not timed)."""

    rounds: int = 5
    warmup: int = 1
    decode: int = 8
    device: str = "cpu"


@dataclass(frozen=True)
class Cost:
    """What one prefill costs apart from time: ``visual`` tokens in the cache of every layer, per sample; ``kv`` bytes
    of keys and values in all layers and samples; ``peak`` bytes on CUDA."""

    visual: tuple[int, ...]
    flops: int
    kv: int
    peak: int | None = None

    @property
    def mean(self) -> float:
        """Mean visual tokens over layers."""
        return statistics.fmean(self.visual)


@dataclass(frozen=True)
class Row:
    """One method at one budget, or why it did not run. Times are seconds: ``first`` to the first token, ``token`` per
    decoded token, of (stock, reduced).

    ``clock`` is the median over rounds of stock over reduced (the reduced time is the stock median over it),
    ``speedup`` has its interval, and ``limit`` is the same for the stock model on a prompt with as few tokens
    (projector stage): small matrices use a machine less well, whoever made them small. ``own`` is
    the reduction's own work (the time inside ``plan``, or what the adapter clocks as making and applying plans where
    that is more) as a share of the stock prefill.
    """

    method: str
    stage: str
    keep: int | None = None
    stock: Cost | None = None
    cost: Cost | None = None
    first: tuple[float, float] | None = None
    clock: float | None = None
    limit: float | None = None
    own: float | None = None
    token: tuple[float, float] | None = None
    error: str = ""
    speedup: Speedup | None = None

    @property
    def flops(self) -> float | None:
        """FLOPs of the stock prefill over those of the reduced one."""
        return None if self.stock is None or self.cost is None else self.stock.flops / self.cost.flops

    @property
    def yielded(self) -> float | None:
        """How much of the saving in FLOPs arrives on the clock."""
        return None if self.clock is None or self.flops is None else self.clock / self.flops


# -- measuring ---------------------------------------------------------------------------------------------------------


def methods_of(model: nn.Module, wanted: Sequence[str] = ()) -> list[tuple[str, str]]:
    """``(name, stage)`` of every method that can act in ``model`` before its language model, inside it or on its cache;
    those ``wanted`` (``"random"`` at all stages or ``"random@projector"``) alone if any are named.

    Raises ``ValueError`` for one that the model cannot serve.
    """
    described = tr.describe(model)
    found = [(name, stage) for stage in STAGES for name in described.methods(stage)]
    unknown = [w for w in wanted if not any(w in (n, f"{n}@{s}") for n, s in found)]
    if unknown:
        raise ValueError(f"no method {', '.join(unknown)} for this model; there are {', '.join(n for n, _ in found)}")
    return [(n, s) for n, s in found if not wanted or n in wanted or f"{n}@{s}" in wanted]


def measure(
    shape: Shape,
    methods: Sequence[str] = (),
    budgets: Sequence[int] = (),
    settings: Settings = Settings(),
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """The stock model, then every method at every budget; ``done`` hears of each row when it is there.

    A method that fails gives a row with its error.
    """
    device = settings.device
    stock = build(shape, device, dtype)
    given = prompt(shape, batch, device, dtype)
    rows: list[Row] = []

    def add(more: Iterable[Row]) -> None:
        for row in more:
            rows.append(row)
            done(row)

    add([_stock(stock, given, settings)])
    assert rows[0].cost is not None
    for name, stage in methods_of(stock, methods):
        add(_method(stock, given, rows[0].cost, name, stage, tuple(budgets or shape.budgets), settings))
    return rows


def _stock(model: Any, given: dict[str, Tensor], settings: Settings) -> Row:
    cost = _cost(model, given, settings)
    times = interleaved({"stock": lambda: _prefill(model, given)}, settings.rounds, settings.warmup, settings.device)
    first = times["stock"].median
    token = _decode({"stock": model}, given, settings).get("stock")
    return Row(
        "stock", "", None, cost, cost, (first, first), 1.0, None, 0.0, None if token is None else (token[1], token[1])
    )


def _method(
    stock: Any, given: dict[str, Tensor], base: Cost, name: str, stage: str, budgets: tuple[int, ...], how: Settings
) -> Iterator[Row]:
    """One row per budget; the stock model and all budgets of the method are timed in the same rounds."""
    blank = {k: Row(name, stage, k) for k in budgets}
    models: dict[int, Any] = {}
    rows: dict[int, Row] = {}
    for keep in budgets:
        try:
            models[keep] = tr.patch(_shell(stock), tr.get_method(f"{name}:keep={keep}", stage))
            rows[keep] = replace(blank[keep], stock=base, cost=_cost(models[keep], given, how))
        except Exception as error:
            rows[keep] = replace(blank[keep], error=_brief(error))
    good = [k for k in budgets if not rows[k].error]
    try:
        if good:
            calls: dict[str, Callable[[], object]] = {"stock": partial(_prefill, stock, given)}
            calls.update({str(k): partial(_prefill, models[k], given) for k in good})
            if stage == "projector":
                entries = {rows[k].cost.visual[0] for k in good}  # type: ignore[union-attr]
                calls.update({f"short {n}": partial(_short, stock, given, n) for n in entries})
            times = interleaved(calls, how.rounds, how.warmup, how.device)
            tokens = _decode({"stock": stock, **{str(k): models[k] for k in good}}, given, how)
            for k in good:
                speedup = times["stock"].against(times[str(k)])
                clock = speedup.ratio
                short = times.get(f"short {rows[k].cost.visual[0]}")  # type: ignore[union-attr]
                limit = None if short is None else times["stock"].ratio(short)
                own = _own(models[k], given, how) / clock
                first = (times["stock"].median, speedup.after(times["stock"].median))
                rows[k] = replace(
                    rows[k], first=first, clock=clock, limit=limit, own=own, token=tokens.get(str(k)), speedup=speedup
                )
    except Exception as error:
        rows.update({k: replace(blank[k], error=_brief(error)) for k in good})
    yield from (rows[k] for k in budgets)


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _shell(model: nn.Module) -> Any:
    """A copy of ``model`` that shares its weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in weights})


def _prefill(model: Any, given: dict[str, Tensor]) -> Any:
    """The cache after the prompt, when the logits of the last token are there, as ``generate`` does it."""
    with torch.no_grad():
        return cache_of(model(**given, use_cache=True, logits_to_keep=1))


def _step(model: Any, token: Tensor, cache: Any) -> None:
    with torch.no_grad():
        model(input_ids=token, use_cache=True, **cache_as(model, cache))


def _text(model: Any, ids: Tensor) -> int:
    """Text tokens of a prompt."""
    return int((ids[0] != model.config.image_token_id).sum())


def _short(model: Any, given: dict[str, Tensor], visual: int) -> None:
    """A stock prefill on a prompt of ``visual`` such tokens, made from an image as large: what it costs to have fewer
    tokens where choosing them costs nothing."""
    ids, inner = given["input_ids"], model.model
    sizes = {k: v for k, v in given.items() if k == "image_sizes"}
    with torch.no_grad():
        inner.get_image_features(given["pixel_values"], **sizes)
        x = inner.get_input_embeddings()(ids[:, : visual + _text(model, ids)])
        model.lm_head(inner.language_model(inputs_embeds=x, use_cache=True).last_hidden_state[:, -1:])


def _cost(model: Any, given: dict[str, Tensor], how: Settings) -> Cost:
    with tr.record(model) as trace:
        cache = _prefill(model, given)
    ids = given["input_ids"]
    text = _text(model, ids)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    kv = sum(t.numel() * t.element_size() for pair in layers for t in pair)
    visual = tuple(keys.shape[-2] - text for keys, _ in layers)
    if how.decode:  # so that an error belongs to this budget
        _step(model, ids[:, -1:], cache)
    del cache, layers
    cuda = torch.device(how.device).type == "cuda"
    peak = peak_bytes(lambda: _prefill(model, given), how.device) if cuda else None
    return Cost(visual, trace.flops, kv, peak)


def _decode(models: dict[str, Any], given: dict[str, Tensor], how: Settings) -> dict[str, tuple[float, float]]:
    """Median seconds per token of (stock, itself) for every model."""
    if not how.decode:
        return {}
    caches = {name: _prefill(model, given) for name, model in models.items()}
    token = given["input_ids"][:, -1:]

    def steps(name: str) -> None:
        for _ in range(how.decode):  # the caches grow from round to round, all by as much
            _step(models[name], token, caches[name])

    times = interleaved({n: partial(steps, n) for n in models}, how.rounds, how.warmup, how.device)
    stock = times["stock"]
    each = stock.median / how.decode
    return {n: (each, stock.against(times[n]).after(each)) for n in models}


def _own(model: Any, given: dict[str, Tensor], how: Settings) -> float:
    """Share of a patched prefill that is the reduction's own work, the median of three."""
    (reducer,) = tr.describe(model).active
    timed = _timed(reducer, how.device)
    shares = []
    tr.unpatch(model)
    with tr.patched(model, timed):
        for _ in range(3):
            timed.watch.seconds = 0.0
            with tr.record(model, flops=False, timing=True) as trace:
                whole = interleaved({"": lambda: _prefill(model, given)}, 1, 0, how.device)[""].median
            shares.append(max(timed.watch.seconds, trace.seconds) / whole)
    return statistics.median(shares)


@dataclass
class _Watch:
    device: str
    seconds: float = 0.0
    depth: int = 0


def _timed(reducer: Reducer, device: str) -> Any:
    """``reducer`` as one of a subclass that times its plans, and shares the watch with what adapters derive from it."""
    base: Any = type(reducer)

    class Timed(base):
        watch = _Watch(device)

        def plan(self, evidence: Any) -> Any:
            watch = self.watch
            if watch.depth:  # a plan that is made of plans
                return super().plan(evidence)
            synchronise(watch.device)
            began = time.perf_counter()
            watch.depth += 1
            try:
                plan = super().plan(evidence)
            finally:
                watch.depth -= 1
            synchronise(watch.device)
            watch.seconds += time.perf_counter() - began
            return plan

    Timed.name = base.name
    made = object.__new__(Timed)
    made.__dict__.update(vars(reducer))
    return made


# -- showing -----------------------------------------------------------------------------------------------------------

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
    head, lines = _shown(rows)
    text = [_mark(name, "begin"), f"`{command}`", "", about, ""]
    text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([*text, _mark(name, "end")]) + "\n"


def _mark(name: str, edge: str) -> str:
    return f"<!-- vlm-performance {name}: {edge} -->"


def splice(path: Path, name: str, section: str) -> None:
    """Put ``section`` between its markers in ``path``, which is made when it is not there.

    Raises ``ValueError`` for a file without the markers.
    """
    if not path.exists():
        write_text(path, section)
        return
    text, begin, end = path.read_text(encoding="utf-8"), _mark(name, "begin"), _mark(name, "end")
    first, last = text.find(begin), text.find(end)
    if first < 0 or last < first:
        raise ValueError(f"{path} has no place for the figures: put the lines {begin!r} and {end!r} where they belong")
    write_text(path, text[:first] + section.rstrip("\n") + text[last + len(end) :])


# -- command -----------------------------------------------------------------------------------------------------------

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
        splice(markdown_out, name, markdown(name, rows, _command(sys.argv[1:]), about))


def _command(args: list[str]) -> str:
    """The command that makes the figures, without the file they go to."""
    kept = []
    skip = False
    for arg in args:
        if not skip and arg.split("=")[0] != "--markdown":
            kept.append(arg)
        skip = arg == "--markdown"
    return " ".join(["python -m tokenreduce.bench.performance.language", *kept])


if __name__ == "__main__":
    typer.run(main)
