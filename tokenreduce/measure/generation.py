"""What a reduction does to one generation: the answer, visual tokens at every stage, time, and the KV cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.generation import cache_of, columns_order
from tokenreduce.labels import label_of
from tokenreduce.measure.question import Question
from tokenreduce.measure.timing import Speedup, Timing, synchronise, turns
from tokenreduce.patching import describe, patched, reducers_of
from tokenreduce.reducer import Reducer
from tokenreduce.trace import DecodeStep, Step, Trace, record

__all__ = [
    "Comparison", "Side", "Site", "cache_bytes", "compare", "compare_several", "follow", "layers_of", "patches_left",
    "patches_of", "visual_columns",
]  # fmt: skip

STOCK = "stock"


@dataclass(frozen=True)
class Side:
    """One model on one question.

    Attributes:
        answer, ids: the greedy answer and its tokens, up to the end of sequence.
        encoder: patches at the vision encoder's end over all images and crops, None where they cannot be told.
        layers: visual tokens in every layer of the language model.
        first: seconds until the logits of the first new token: vision encoder and prefill, without preprocessing.
        step: seconds for every further token, None when only one was asked for.
        cache: bytes of keys and values after prefill, over all layers.
    """

    answer: str
    ids: tuple[int, ...]
    encoder: int | None
    layers: tuple[int, ...]
    first: Timing
    step: Timing | None
    cache: int

    @property
    def mean_tokens(self) -> float:
        """Visual tokens, averaged over the layers of the language model."""
        return sum(self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "answer": self.answer, "ids": list(self.ids), "encoder_tokens": self.encoder,
            "entry_tokens": self.layers[0], "layer_tokens": list(self.layers), "mean_layer_tokens": self.mean_tokens,
            "first_token_s": self.first.median,
            "tokens_per_s": None if self.step is None else 1 / self.step.median, "cache_bytes": self.cache,
        }  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Visual tokens ``before`` and ``after`` one place where a method acted; ``layer`` is None before the LLM."""

    stage: str
    layer: int | None
    method: str
    before: int
    after: int

    def __str__(self) -> str:
        return "before the language model" if self.layer is None else f"before layer {self.layer}"


@dataclass(frozen=True)
class Comparison:
    """``stock`` against ``reduced``. ``steps`` are the trace of the reduced prefill, ``decode`` the choices of methods
    that make some for every new token, ``visual`` (L,) marks the columns of the prompt that are visual tokens."""

    question: Question
    reducers: tuple[Reducer, ...]
    stock: Side
    reduced: Side
    sites: tuple[Site, ...]
    rounds: int
    notes: tuple[str, ...] = ()
    steps: tuple[Step, ...] = field(default=(), repr=False)
    visual: Tensor | None = field(default=None, repr=False)
    decode: tuple[DecodeStep, ...] = field(default=(), repr=False)

    @property
    def looked(self) -> tuple[tuple[int, str, float, float], ...]:
        """``(layer, method, seen, back)`` for every layer where a method chooses in decode: visual tokens that a new
        token saw from there on, and tokens that came back there, both averaged over the decode steps."""
        places = dict.fromkeys((s.layer, s.method) for s in self.decode)
        out = []
        for layer, method in places:
            here = [s for s in self.decode if (s.layer, s.method) == (layer, method)]
            seen = sum(int(s.seen.sum()) for s in here) / len(here)
            out.append((layer, method, seen, sum(int(s.back.sum()) for s in here) / len(here)))
        return tuple(out)

    @property
    def spec(self) -> str:
        """The reducers as text, with the budget that they ran at."""
        return label_of(self.reducers)

    @property
    def agree(self) -> bool:
        """Whether both answers have the same token ids."""
        return self.stock.ids == self.reduced.ids

    @property
    def common(self) -> int:
        """How many token ids are the same before the first that differs."""
        pairs = zip(self.stock.ids, self.reduced.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.stock.ids), len(self.reduced.ids)))

    def ratios(self) -> dict[str, float | None]:
        """Stock over reduced, so that above 1 is less or faster; times are medians of per-round ratios."""
        a, b = self.stock, self.reduced
        pairs = {
            "encoder_tokens": (a.encoder, b.encoder),
            "entry_tokens": (a.layers[0], b.layers[0]),
            "mean_layer_tokens": (a.mean_tokens, b.mean_tokens),
            "cache_bytes": (a.cache, b.cache),
        }
        out: dict[str, float | None] = {k: x / y if x is not None and y else None for k, (x, y) in pairs.items()}
        return {**out, **{k: None if v is None else v.ratio for k, v in self.speedups().items()}}

    def speedups(self) -> dict[str, Speedup | None]:
        """The ratios of times with their intervals."""
        a, b = self.stock, self.reduced
        step = None if a.step is None or b.step is None else a.step.against(b.step)
        return {"first_token_s": a.first.against(b.first), "tokens_per_s": step}

    def clock(self) -> dict[str, tuple[float, float] | None]:
        """Seconds without and with the reduction to the first token and for each further one (``step_s``): the stock
        model's median, and that over the speed-up, so that times and ratios never contradict each other."""
        first, step = self.speedups().values()
        assert first is not None
        a, b = self.stock.first.median, None if self.stock.step is None else self.stock.step.median
        return {
            "first_token_s": (a, first.after(a)), "step_s": None if step is None or b is None else (b, step.after(b)),
        }  # fmt: skip

    def _seconds(self, side: int) -> dict[str, float | None]:
        clock = self.clock()
        first, step = clock["first_token_s"], clock["step_s"]
        assert first is not None
        return {"first_token_s": first[side], "tokens_per_s": None if step is None else 1 / step[side]}

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with ``--json``."""
        return {
            "prompt": self.question.prompt, "text": self.question.text, "images": len(self.question.images),
            "reduce": self.spec, "agree": self.agree, "common_tokens": self.common, "rounds": self.rounds,
            "stock": {**self.stock.to_dict(), **self._seconds(0)},
            "reduced": {**self.reduced.to_dict(), **self._seconds(1)}, "ratio": self.ratios(),
            "interval": {k: None if v is None else [v.low, v.high] for k, v in self.speedups().items()},
            "sites": [
                {"stage": s.stage, "layer": s.layer, "method": s.method, "before": s.before, "after": s.after}
                for s in self.sites
            ],
            "decode": [
                {"layer": layer, "method": method, "mean_tokens": seen, "mean_came_back": back}
                for layer, method, seen, back in self.looked
            ],
            "notes": list(self.notes),
        }  # fmt: skip


def compare(
    model: nn.Module,
    processor: Any,
    question: Question,
    reducers: Reducer | str | Sequence[Reducer | str],
    *,
    max_new_tokens: int = 32,
    rounds: int = 3,
) -> Comparison:
    """Answer ``question`` without and with ``reducers``, and measure both.

    The answers are greedy and end where the model ends them; they warm both variants up. Timed rounds alternate
    between the two, in changing order, and always decode ``max_new_tokens`` (the end of sequence is suppressed, so that
    both do the same work); patching happens outside the clock. The model comes back unpatched.

    Raises ``ValueError`` for numbers below 1, a patched model, a prompt without visual tokens and whatever
    :func:`tokenreduce.patch` refuses, and ``TypeError`` for a model without adapter.
    """
    given = (reducers,) if isinstance(reducers, Reducer | str) else tuple(reducers)
    return compare_several(model, processor, question, [given], max_new_tokens=max_new_tokens, rounds=rounds)[0]


def compare_several(
    model: nn.Module,
    processor: Any,
    question: Question,
    several: Sequence[Sequence[Reducer | str]],
    *,
    max_new_tokens: int = 32,
    rounds: int = 3,
) -> list[Comparison]:
    """:func:`compare` for each of ``several`` patches, all against one answer of the unreduced model and timed in the
    same rounds. Raises what :func:`compare` raises."""
    for name, value in (("max_new_tokens", max_new_tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is an int >= 1, not {value!r}")
    if reducers_of(model):
        raise ValueError("the model is patched already; call tr.unpatch(model) first, all variants are measured here")
    variants: dict[str, tuple[Reducer, ...]] = {STOCK: ()}
    for i, given in enumerate(several):
        with patched(model, *given):  # what does not fit fails here, before the work
            variants[f"reduced {i}"] = reducers_of(model)
    visual = visual_columns(model, question)
    depth = len(describe(model).language.layers)
    patches = patches_of(model, question)
    made = {name: _answer(model, question, some, len(visual), max_new_tokens) for name, some in variants.items()}
    first: dict[str, list[float]] = {name: [] for name in variants}
    step: dict[str, list[float]] = {name: [] for name in variants}
    placed = _inputs(model, question) if question.remake is None else None
    with torch.inference_mode():
        for _, name in turns(variants, rounds):
            with _patched(model, variants[name]):
                clock = _Clock(next(model.parameters()).device)
                inputs = placed or _inputs(model, question)  # the tower runs inside the clock, wherever that is
                _generate(model, inputs, max_new_tokens, min_new_tokens=max_new_tokens, logits_processor=[clock])
                clock.stop()
            first[name].append(clock.first)
            step[name].append((clock.total - clock.first) / max(max_new_tokens - 1, 1))
    sides: dict[str, Side] = {}
    sites: dict[str, tuple[Site, ...]] = {}
    for name, (ids, cache, trace) in made.items():
        steps = tuple(trace.steps)
        sites[name], layers = layers_of(steps, visual, depth)
        sides[name] = Side(
            processor.batch_decode([list(ids)], skip_special_tokens=True)[0].strip(),
            ids,
            patches if name == STOCK else patches_left(model, question, patches, steps),
            layers if name != STOCK else (int(visual.sum()),) * depth,
            Timing(name, tuple(first[name])),
            Timing(name, tuple(step[name])) if max_new_tokens > 1 else None,
            cache,
        )
    return [
        Comparison(
            question,
            some,
            sides[STOCK],
            sides[name],
            sites[name],
            rounds,
            *_told(made[name][2]),
            visual,
            tuple(made[name][2].decode),
        )
        for name, some in variants.items()
        if name != STOCK
    ]


def _told(trace: Trace) -> tuple[tuple[str, ...], tuple[Step, ...]]:
    return tuple(trace.notes), tuple(trace.steps)


def _answer(
    model: nn.Module, question: Question, some: tuple[Reducer, ...], prompt: int, tokens: int
) -> tuple[tuple[int, ...], int, Trace]:
    """Greedy token ids behind the ``prompt`` columns, bytes of the cache behind them, and the trace of a prefill
    with the choices of all decode steps."""
    with torch.inference_mode(), _patched(model, some):
        with record(model, flops=False) as trace:
            out = _generate(model, _inputs(model, question), 1, return_dict_in_generate=True)
        cache = cache_bytes(cache_of(out))
        del out
        with record(model, flops=False) as whole:
            made = _generate(model, _inputs(model, question), tokens)
        trace.decode = whole.decode
    return tuple(made[0, prompt:].tolist()), cache, trace


def visual_columns(model: nn.Module, question: Question) -> Tensor:
    """(L,) bool, on the CPU: which columns of the prompt are visual tokens.

    Raises ``TypeError`` for a model without adapter, ``ValueError`` where there are no visual tokens.
    """
    language = describe(model).language
    if language is None:
        raise TypeError(f"{type(model).__name__} has no language model with visual tokens that an adapter knows")
    ids = question.inputs["input_ids"][0].cpu()
    visual = torch.isin(ids, torch.tensor(language.ids))
    if not bool(visual.any()):
        raise ValueError(
            f"the prompt has no visual tokens (ids {', '.join(map(str, language.ids))}): the processor does not belong "
            f"to this model"
        )
    return visual


def follow(steps: Sequence[Step], columns: int) -> list[tuple[Step, Tensor]]:
    """Every step before and inside the language model with (L,) where each column of the prompt is behind it: its
    place in the sequence there, -1 where it is gone. Columns that were merged share a place. Batches of one."""
    where = torch.arange(columns)
    out = []
    for step in steps:
        if step.stage not in ("projector", "language"):
            continue
        if step.plan is not None or step.parts:
            moved = _moved(step, columns if step.plan is None else step.plan.n)
            where = torch.where(where >= 0, moved[where.clamp(min=0)], -1)
        out.append((step, where))
    return out


def _moved(step: Step, n: int) -> Tensor:
    """(N,) the place behind a step of every place before it, -1 where a token is gone."""
    moved = torch.arange(n)
    if step.plan is not None:
        # Adapters put what is left in the order of the prompt, whatever a plan's own order is.
        place = columns_order(step.plan)[0].argsort().cpu()
        source = step.plan.sources()[0].cpu()
        moved = torch.where(source >= 0, place[source.clamp(min=0)], -1)
    columns_kept = moved.clone()
    for (_, columns, plan), hosts in zip(step.parts, step.hosts, strict=True):
        for mine, source, host in zip(columns.cpu(), plan.sources().cpu(), hosts.cpu(), strict=True):
            source = source[-len(mine) :]  # behind a class token
            taken = host[source.clamp(min=0)].where(source >= 0, -1)
            moved[mine] = columns_kept[taken.clamp(min=0)].where(taken >= 0, -1)
    return moved


def layers_of(steps: Sequence[Step], visual: Tensor, depth: int) -> tuple[tuple[Site, ...], tuple[int, ...]]:
    """What every site left of the visual tokens, and how many every layer of the language model sees."""
    now, text = int(visual.sum()), int((~visual).sum())
    inside = "+".join(dict.fromkeys(s.method for s in steps if s.stage == "encoder" and s.method))
    sites: list[Site] = []
    layers: list[int] = []
    for step in steps:
        if step.stage not in ("projector", "language"):
            continue
        layer = step.layer if step.stage == "language" else None
        layers += [now] * ((layer or 0) - len(layers))
        # All text stays. Tokens are counted, not patches: a class token has none.
        left = step.tokens - text
        # What the tower merged goes before the language model, where no method of its own may act. Where nothing has a
        # name, a method inside the language model only had a look at what enters.
        if step.method or inside:
            sites.append(Site(step.stage, layer, step.method or inside, now, left))
        now = left
    return tuple(sites), tuple(layers + [now] * (depth - len(layers)))


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache shows, over all layers."""
    tensors = (getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _views(question: Question) -> Tensor | None:
    """(V,C,H,W) images and crops; those that are all zeros fill rows up and are left out."""
    pixels = question.inputs.get("pixel_values", question.inputs.get("pixel_values_videos"))
    if not isinstance(pixels, Tensor) or pixels.dim() < 4:
        return None
    views = pixels.flatten(0, -4)
    return views[(views != 0).flatten(1).any(1)]


def patches_of(model: Any, question: Question) -> int | None:
    """Patches of all images, crops and frames of ``question``, None where they cannot be told."""
    grids = question.inputs.get("image_grid_thw", question.inputs.get("video_grid_thw"))
    if isinstance(grids, Tensor):
        return int(grids.prod(1).sum())
    vision = getattr(model.config, "vision_config", None)
    if question.remake is not None and vision is not None:  # every frame is a picture of the tower's own size
        return len(question.images) * (vision.image_size // vision.patch_size) ** 2
    views, patch = _views(question), getattr(vision, "patch_size", None)
    if views is None or patch is None:
        return None
    high, wide = patch if isinstance(patch, list | tuple) else (patch, patch)
    return len(views) * (views.shape[-2] // high) * (views.shape[-1] // wide)


def patches_left(model: Any, question: Question, patches: int | None, steps: Sequence[Step]) -> int | None:
    """Those of ``patches`` that leave the block which the projector reads (later ones may run, too), after the
    ``steps`` of a trace."""
    found = describe(model)
    vision = None if found.language is None else found.language.vision
    last = 1 << 30 if vision is None else int(vision.feature)
    inside = [s for s in steps if s.stage == "encoder" and s.layer <= last]
    if not inside:
        return patches
    ends = [s.patches for s in inside if s.layer == inside[-1].layer]
    if None not in ends:
        return sum(n for n in ends if n is not None)
    views, towers = _views(question), found.towers
    return None if views is None or len(towers) != 1 else len(views) * (inside[-1].tokens - towers[0].prefix)


def _patched(model: nn.Module, reducers: tuple[Reducer, ...]) -> Any:
    return patched(model, *reducers) if reducers else contextlib.nullcontext()


def _inputs(model: nn.Module, question: Question) -> dict[str, Any]:
    """The inputs of ``question`` on the model's device, made anew where they depend on what is patched into it."""
    if question.remake is not None:
        return question.remake(model)
    like = next(model.parameters())
    return {
        k: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
        for k, v in question.inputs.items()
    }


def _generate(model: Any, inputs: dict[str, Any], tokens: int, **settings: Any) -> Any:
    """Greedy, whatever the checkpoint's own settings for sampling are."""
    plain = dict(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, use_cache=True)
    return model.generate(**inputs, max_new_tokens=tokens, **plain, **settings)


class _Clock:
    """A logits processor that notes when the first logits are there; the clock runs from its making."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first, self.total = device, 0.0, 0.0
        synchronise(device)
        self.began = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.first:
            self.first = self._now()
        return scores

    def stop(self) -> None:
        self.total = self._now()

    def _now(self) -> float:
        synchronise(self.device)
        return max(time.perf_counter() - self.began, 1e-9)
