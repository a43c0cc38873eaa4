"""Clocks prefills and decode steps of image language models, stock and reduced, in the same rounds."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.own_work import own_share
from tokenreduce.bench.performance.shapes import Shape, build, prompt
from tokenreduce.measure.generation import cache_bytes
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Speedup, interleaved

__all__ = ["Cost", "Row", "Settings", "measure", "methods_of", "prefill", "shell"]

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
    times = interleaved({"stock": lambda: prefill(model, given)}, settings.rounds, settings.warmup, settings.device)
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
            models[keep] = tr.patch(shell(stock), tr.get_method(f"{name}:keep={keep}", stage))
            rows[keep] = replace(blank[keep], stock=base, cost=_cost(models[keep], given, how))
        except Exception as error:
            rows[keep] = replace(blank[keep], error=_brief(error))
    good = [k for k in budgets if not rows[k].error]
    try:
        if good:
            calls: dict[str, Callable[[], object]] = {"stock": partial(prefill, stock, given)}
            calls.update({str(k): partial(prefill, models[k], given) for k in good})
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
                own = own_share(models[k], partial(prefill, models[k], given), how.device) / clock
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


def shell(model: nn.Module) -> Any:
    """A copy of ``model`` that shares its weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in weights})


def prefill(model: Any, given: dict[str, Tensor]) -> Any:
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
        cache = prefill(model, given)
    ids = given["input_ids"]
    text = _text(model, ids)
    kv = cache_bytes(cache)
    visual = tuple(layer.keys.shape[-2] - text for layer in cache.layers)
    if how.decode:  # so that an error belongs to this budget
        _step(model, ids[:, -1:], cache)
    del cache
    cuda = torch.device(how.device).type == "cuda"
    peak = peak_bytes(lambda: prefill(model, given), how.device) if cuda else None
    return Cost(visual, trace.flops, kv, peak)


def _decode(models: dict[str, Any], given: dict[str, Tensor], how: Settings) -> dict[str, tuple[float, float]]:
    """Median seconds per token of (stock, itself) for every model."""
    if not how.decode:
        return {}
    caches = {name: prefill(model, given) for name, model in models.items()}
    token = given["input_ids"][:, -1:]

    def steps(name: str) -> None:
        for _ in range(how.decode):  # the caches grow from round to round, all by as much
            _step(models[name], token, caches[name])

    times = interleaved({n: partial(steps, n) for n in models}, how.rounds, how.warmup, how.device)
    stock = times["stock"]
    each = stock.median / how.decode
    return {n: (each, stock.against(times[n]).after(each)) for n in models}
