"""What a reduction does to one generation: the answer, visual tokens at every stage, time, and the KV cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.cuts import columns_order
from tokenreduce.adapters.language.generation import cache_of
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.specs import split_specs
from tokenreduce.core.trace import Step, Trace, record
from tokenreduce.core.undo import reducers_of
from tokenreduce.measure.cached import cache_peak, thinned
from tokenreduce.measure.comparison import Comparison, Side, Site
from tokenreduce.measure.question import Question
from tokenreduce.measure.timing import Timing, synchronise, turns
from tokenreduce.patching import describe, patched

__all__ = [
    "Comparison", "Side", "Site", "cache_bytes", "compare", "compare_several", "follow", "greedy", "layer_bytes",
    "layers_of", "patches_left", "patches_of", "visual_columns",
]  # fmt: skip

STOCK = "stock"


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
                greedy(model, inputs, max_new_tokens, min_new_tokens=max_new_tokens, logits_processor=[clock])
                clock.stop()
            first[name].append(clock.first)
            step[name].append((clock.total - clock.first) / max(max_new_tokens - 1, 1))
    sides: dict[str, Side] = {}
    sites: dict[str, tuple[Site, ...]] = {}
    for name, (ids, (cache, peak, end), trace) in made.items():
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
            peak,
            end,
            trace.flops,
        )
    return [
        Comparison(
            question,
            some,
            sides[STOCK],
            sides[name],
            _labelled(sites[name], some),
            rounds,
            *_told(made[name][2]),
            visual,
            tuple(made[name][2].decode),
            tuple(replace(t, method=_names(some).get(t.method, t.method)) for t in thinned(made[name][2].cache)),
        )
        for name, some in variants.items()
        if name != STOCK
    ]


def _labelled(sites: Sequence[Site], some: Sequence[Reducer]) -> tuple[Site, ...]:
    """``sites`` with methods called by :func:`label_of`, which has the budget also where it is the default."""
    names = _names(some)
    return tuple(replace(s, method="+".join(names.get(m, m) for m in split_specs(s.method))) for s in sites)


def _names(some: Sequence[Reducer]) -> dict[str, str]:
    return {r.spec(): label_of(r) for r in some}


def _told(trace: Trace) -> tuple[tuple[str, ...], tuple[Step, ...]]:
    return tuple(trace.notes), tuple(trace.steps)


def _answer(
    model: nn.Module, question: Question, some: tuple[Reducer, ...], prompt: int, tokens: int
) -> tuple[tuple[int, ...], tuple[int, int, int], Trace]:
    """Greedy token ids behind the ``prompt`` columns, bytes of the cache behind the prefill, at its peak and behind the
    answer, and the trace of a prefill with the choices of all decode steps."""
    with torch.inference_mode(), _patched(model, some):
        with record(model) as trace:
            out = greedy(model, _inputs(model, question), 1, return_dict_in_generate=True)
        layers = layer_bytes(cache_of(out))
        peak = cache_peak(layers, trace.cache)
        del out
        with record(model, flops=False) as whole:
            made = greedy(model, _inputs(model, question), tokens, return_dict_in_generate=True)
        trace.decode, trace.cache = whole.decode, whole.cache
    ids = tuple(made.sequences[0, prompt:].tolist())
    return ids, (sum(layers), peak, cache_bytes(cache_of(made))), trace


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
    for part, slots in zip(step.parts, step.slots, strict=True):
        for mine, source, slot in zip(part.columns.cpu(), part.plan.sources().cpu(), slots.cpu(), strict=True):
            source = source[-len(mine) :]  # behind a class token
            taken = slot[source.clamp(min=0)].where(source >= 0, -1)
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
    """Bytes that a transformers cache holds in keys and values, over all layers."""
    return sum(layer_bytes(cache))


def layer_bytes(cache: Any) -> list[int]:
    """The same, for each layer. One that stores its states otherwise than it shows them says how much it holds."""
    return [_held(layer) for layer in cache.layers]


def _held(layer: Any) -> int:
    if isinstance(said := getattr(layer, "nbytes", None), int):
        return said
    some = (getattr(layer, part, None) for part in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in some if isinstance(t, Tensor))


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
    ``steps`` of a trace; what was set aside in the tower has come back there."""
    found = describe(model)
    vision = None if found.language is None else found.language.vision
    last = 1 << 30 if vision is None else int(vision.feature)
    inside = [s for s in steps if s.stage == "encoder" and s.layer <= last and not s.aside]
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


def greedy(model: Any, inputs: dict[str, Any], tokens: int, **settings: Any) -> Any:
    """``generate`` of ``tokens`` more, greedy, whatever the checkpoint's own settings for sampling are."""
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
