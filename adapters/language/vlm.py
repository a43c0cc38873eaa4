"""Image/video language models of transformers 5: dropping visual tokens before and inside the language model.

Mechanism: a pre-hook on the inner model makes a :class:`~tokenreduce.adapters.language.generation.Run` at prefill and
passes it
on as a keyword; pre-hooks on decoder layers compute plans from the attention of the layer before, gather hidden
states, rotary tables and masks from the acting layer on, and rebuild the mask of those layers in decode, where their
caches are shorter than the prompt. Kept tokens keep their original positions, and sliding windows count them.

The families differ in where their parts are (:data:`FAMILIES`) and, in Qwen3-VL, in DeepStack: visual features that
the language model adds after its first layers to columns that may be gone. Rotary tables reach the layers ready
(M-RoPE mixed, one pair per layer type), so that layers need no position ids behind a cut.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, is_causal, listen
from tokenreduce.adapters.language.ahead import drop_prompt, keep_prompt, look_ahead
from tokenreduce.adapters.language.batching import attach_batching
from tokenreduce.adapters.language.cache import keep_run
from tokenreduce.adapters.language.decode import Site, check_later, choose_again, last_only, set_aside
from tokenreduce.adapters.language.decoders import (
    carries,
    check_deep,
    check_implementation,
    check_layers,
    final_norm,
    hand_on,
    ids_left,
    take_up,
    window_of,
)
from tokenreduce.adapters.language.drafts import attach_drafts
from tokenreduce.adapters.language.generation import (
    KEYWORD,
    Cut,
    Deep,
    Step,
    cache_in,
    gather_mask,
    rows_of,
    run_of,
)
from tokenreduce.adapters.language.given import Arrived, attach_given
from tokenreduce.adapters.language.labels import attach_labels
from tokenreduce.adapters.language.later import later_mask
from tokenreduce.adapters.language.marks import TOWER, needs_marks
from tokenreduce.adapters.language.middle import attach_middle, is_middle, taken
from tokenreduce.adapters.language.projector.choose import attach_projector
from tokenreduce.adapters.language.projector.seen import Vision
from tokenreduce.adapters.language.projector.tower import vision_of
from tokenreduce.adapters.language.prompt import WholePrefill, start, start_alone
from tokenreduce.adapters.language.reduce import reduce_before
from tokenreduce.adapters.language.retrieval import attach_retrieval, check_owner, limits, note_run, owner_of
from tokenreduce.adapters.language.towers import Everything, attach_encoder
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["FAMILIES", "Language", "attach", "find"]

EVIDENCE = ("keys", "queries", "values", "attention", "ahead", "plain", "middle", "prompt", "norm", "films", "history")


@dataclass(frozen=True)
class Family:
    """Where the parts are. ``ids`` are config attributes that name the placeholder tokens; ``deep`` says that the
    language model takes DeepStack features, ``types`` is the argument that says what every token is: 1 an image's, 2 a
    video's."""

    language: str = "language_model"
    layers: str = "layers"
    ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    deep: bool = False
    types: str = "mm_token_type_ids"


#: Inner model class -> its parts.
FAMILIES: dict[str, Family] = {
    "LlavaModel": Family(),
    "LlavaNextModel": Family(),
    "LlavaNextVideoModel": Family(),
    "LlavaOnevisionModel": Family(),
    "VideoLlavaModel": Family(),
    "Qwen2VLModel": Family(),
    "Qwen2_5_VLModel": Family(),
    "Qwen3VLModel": Family(deep=True),
    "InternVLModel": Family(),
    "Idefics3Model": Family(language="text_model"),
    "SmolVLMModel": Family(language="text_model"),
    "PaliGemmaModel": Family(),
    "Gemma3Model": Family(types="token_type_ids"),
}


@dataclass(frozen=True)
class Language:
    """One language model with visual tokens found inside a model."""

    name: str
    inner: nn.Module
    family: str
    text: nn.Module
    layers: tuple[nn.Module, ...]
    ids: tuple[int, ...]
    generator: nn.Module | None = None
    vision: Vision | None = None
    #: The wrapper that calls the inner model in a way of its own, as retrieval models do.
    owner: nn.Module | None = None

    @property
    def evidence(self) -> tuple[str, ...]:
        """Evidence inside the language model; what the tower saw comes there as marks."""
        return (*EVIDENCE, *(e for e in self.projector if e in TOWER))

    @property
    def limits(self) -> tuple[str, ...]:
        """What is not reduced, in sentences."""
        return limits(self)

    @property
    def projector(self) -> tuple[str, ...]:
        """Evidence besides the features at the projector stage."""
        return ("text",) if self.vision is None else self.vision.evidence


def find(model: nn.Module) -> Language | None:
    """The image/video language model inside ``model``, or None.

    Raises ``TypeError`` for one whose language model is built from parts that are not decoder layers with a
    ``self_attn``, as all families have by default.
    """
    for name, module in model.named_modules():
        family = FAMILIES.get(type(module).__name__)
        if family is not None and type(module).__module__.startswith("transformers."):
            config: Any = module.config
            found = (getattr(config, i, None) for i in family.ids)
            ids = tuple(i for i in found if isinstance(i, int))
            text: Any = module.get_submodule(family.language)
            layers = tuple(getattr(text, family.layers, ()))
            if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
                raise TypeError(
                    f"the language model of {type(module).__name__} is a {type(text).__name__}; supported are language "
                    f"models whose .{family.layers} are decoder layers with a .self_attn (Llama, Mistral, Qwen, Gemma)"
                )
            owners = (m for m in model.modules() if hasattr(m, "_prefill") and getattr(m, "model", None) is module)
            return Language(
                name, module, type(module).__name__, text, layers, ids, next(owners, None), vision_of(module),
                owner_of(model, module),
            )  # fmt: skip
    return None


def attach(found: Language, reducers: tuple[Reducer, ...], undo: Undo, towers: Any = ()) -> None:
    """Put ``reducers`` into the model; encoder-stage ones into its ``towers``, (adapter, tower) each.

    Raises ``ValueError`` for layers that do not exist or clash, and for attention that dropping tokens would change:
    chunked, linear and other layer types than full and sliding, or sliding windows inside flash attention.
    """
    depth = len(found.layers)
    check_owner(found, reducers)
    methods = " + ".join(r.spec() for r in reducers)
    before = [r for r in reducers if r.stage == "projector"]
    inside = tuple(r for r in reducers if r.stage == "encoder")
    if inside:
        attach_encoder(towers, inside, undo)
        before = before or [Everything()]
    caching = [r for r in reducers if r.stage == "cache"]
    reducers = tuple(r for r in reducers if r.stage == "language")
    films = any("films" in r.gathers() for r in reducers)
    marking = tuple(dict.fromkeys(r for r in reducers if needs_marks(r)))
    if films or marking:  # which frame a token is of, and what the tower saw of it, shows where it enters
        before = before or [Everything()]
    if len(before) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in before)} both act before the language model; choose one")
    acting: list[Reducer | None] = []
    for i in range(depth):
        here = [r for r in reducers if r.acts(i, depth)]
        if len(here) > 1:
            raise ValueError(f"{' and '.join(r.spec() for r in here)} both act before layer {i}; choose other layers")
        acting.append(here[0] if here else None)
    windows = [window_of(found.text.config, i) for i in range(depth)]
    present = [[r for r in (acting[i], *caching) if r is not None and r.acts(i, depth)] for i in range(depth)]
    again = [next((r for r in here if r.later()), None) for here in present]
    first = next((i for i, here in enumerate(present) if here), depth)
    behind = 0 if before else first  # the first layer that may see fewer tokens
    attach_labels(found.inner, found.generator, undo)
    if behind == depth:
        return
    check_layers(found.layers, behind, acting, again)
    check_later(present, windows, found.layers)
    for i in range(max(behind - 1, 0), depth):
        check_implementation(found.layers[i], i, windows[i])
    arrived = Arrived()
    begin = functools.partial(
        start, ids=found.ids, slides=None not in windows, again=tuple(i for i, r in enumerate(again) if r is not None),
        arrived=arrived, types=FAMILIES[found.family].types, methods=methods, front=first == depth and not any(windows),
    )  # fmt: skip
    if found.owner is not None:
        attach_retrieval(found, undo)
    undo.pre_hook(found.inner, begin)
    if found.owner is not None:
        undo.pre_hook(found.inner, note_run)
    undo.pre_hook(found.text, functools.partial(start_alone, inner=found.inner, begin=begin, arrived=arrived))
    if found.generator is not None:
        undo.mix_in(found.generator, WholePrefill)
        attach_batching(found.generator, found.ids, undo)
        attach_drafts(found.generator, next((r for r in again if r is not None), None), undo)
    if before:
        attach_projector(found, before[0], windows, undo, films, marking)
    attach_given(found, arrived, undo)
    if FAMILIES[found.family].deep:
        check_deep(found, depth)
        undo.pre_hook(found.text, functools.partial(take_deep, first=first))
    copies: dict[int, Any] = {}
    for i in range(depth):
        layer: Any = found.layers[i]
        reducer = acting[i]
        if "forward" in vars(layer):
            raise ValueError(
                f"layer {i} has a forward of its own (accelerate's dispatch); call tr.patch before dispatching"
            )
        if not carries(layer):
            undo.pre_hook(layer.self_attn, take_up)
        after = acting[i + 1] if i + 1 < depth else None
        reads = after is not None and _reads(after)
        ahead = reducer is not None and "ahead" in reducer.gathers()
        chosen = [j for j in range(i + 1) if again[j] is not None]
        site = Site(again[i], chosen[-1] if chosen else None, i + 1 < depth and again[i + 1] is not None, depth)
        if reads or ahead or chosen or site.reads:
            listen(layer.self_attn, undo, copies)
        if chosen or site.reads:
            undo.pre_hook(layer, functools.partial(choose_again, index=i, site=site))
        if chosen and i == depth - 1:
            undo.hook(layer, last_only, with_kwargs=True)
        if i >= behind or reads or site.reads or is_middle(after, i + 1):
            undo.pre_hook(
                layer,
                functools.partial(
                    enter,
                    index=i,
                    depth=depth,
                    reducer=reducer,
                    reads=reads,
                    later=site.reads,
                    window=windows[i],
                    norm=final_norm(found.text, reducer),
                    plain=reducer is not None and "plain" in reducer.gathers() and _mrope(found.text.config),
                ),
            )
        if after is not None and is_middle(after, i + 1):
            attach_middle(layer, after, i + 1, depth, final_norm(found.text, after), undo)
        if not carries(layer):
            undo.pre_hook(layer, hand_on)  # behind the hooks above
        shown = reducer or again[i]
        if shown is not None:
            undo.set(layer, "_get_name", functools.partial(_name, type(layer).__name__, shown))
    asking = [i for i, r in enumerate(acting) if r is not None and "prompt" in r.gathers()]
    if asking:
        undo.pre_hook(found.layers[0], keep_prompt)  # behind the hooks above
        undo.pre_hook(found.layers[asking[-1]], drop_prompt)


def _reads(reducer: Reducer) -> bool:
    """Whether ``reducer`` looks at the attention of the layer before the one where it acts."""
    gathers = reducer.gathers()
    return "ahead" not in gathers and any(g in ("keys", "queries", "values", "attention") for g in gathers)


def _mrope(config: Any) -> bool:
    """Whether positions are places in time and image."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"


def take_deep(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on a language model with DeepStack: it adds its features to all visual columns, so those that come
    after layer ``first`` (0 where columns go before the language model) or a later one are added by us, to the columns
    that are left."""
    step: Step | None = kwargs.get(KEYWORD)
    features = kwargs.get("deepstack_visual_embeds")
    if step is None or not step.prefill or features is None:
        return None
    first = first if step.run.cut_at(-1) is None else 0
    if len(features) <= first:
        return None
    mine = {i + 1: features[i] for i in range(first, len(features))}
    deep = Deep(kwargs["visual_pos_masks"], mine)
    return args, {**kwargs, "deepstack_visual_embeds": features[:first], KEYWORD: replace(step, deep=deep)}


def enter(
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    index: int,
    depth: int,
    reducer: Reducer | None,
    reads: bool,
    later: bool,
    window: int | None,
    norm: nn.Module | None = None,
    plain: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on decoder layer ``index``: plan and gather in prefill, rebuild the mask in decode. ``reads`` and
    ``later`` are whether the next layer's method looks at this one's attention in prefill and in decode; with
    ``plain``, a method that looks ahead gets queries and keys before their rotation."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None:
        return None
    run, cache = step.run, cache_in(kwargs)
    kwargs = dict(kwargs)
    if not step.prefill:
        records = later and step.new == 1
        if CALL in kwargs or (run.cut_at(index) is None and not records):
            return None
        if run.cut_at(index) is not None:
            run.check_batch(args[0].shape[0])
            name = check_implementation(layer, index, window)
            kwargs["attention_mask"] = later_mask(
                kwargs.get("attention_mask"), args[0], step, index, cache, window, name
            )
        if records:
            run.calls[index] = kwargs[CALL] = Call(kwargs.get("attention_mask"), record=True)
        return args, kwargs
    if cache is not None and run_of(cache) is not run:
        keep_run(cache, run)
    x, entry = args[0], run.cut_at(-1)
    if index == 0 and entry is not None:
        x = rows_of(x, entry.local)
    middle = is_middle(reducer, index)
    if middle and (left := taken(run, index)) is not None:
        x = left
    if step.deep is not None:
        x = step.deep.add(x, index, run.cut_at(index if middle else index - 1))
    if reducer is not None and not middle:
        ahead = "ahead" in reducer.gathers() and index not in run.decided
        with torch.no_grad():
            flash = "flash" in check_implementation(layer, index, window)
            call = look_ahead(layer, x, run, index, kwargs, flash, plain) if ahead else run.calls.pop(index - 1, None)
        whole = x
        x = reduce_before(x, run, index, depth, reducer, layer, call, norm, plain)
        dropped = run.cut_at(index)
        if cache is not None and reducer.later() == "revive" and dropped is not None and dropped.layer == index:
            set_aside(run, index, whole, kwargs["position_embeddings"], cache)
    cut_here = run.cut_at(index)
    if cut_here is not None:
        name = check_implementation(layer, index, window)
        kwargs["position_embeddings"] = _tables(step, cut_here, kwargs["position_embeddings"])
        kwargs["position_ids"] = ids_left(layer, kwargs.get("position_ids"), cut_here.here)
        slots = x.shape[1] if cache is None else cache.layers[index].get_mask_sizes(x.shape[1])[0]
        if "flash" in name:
            kwargs["attention_mask"] = run.flash_mask(index, run.front + x.shape[1], slots)
        else:
            mask, causal = kwargs.get("attention_mask"), is_causal(layer.self_attn)
            made, key = step.masks, (id(cut_here), id(mask), slots, causal)
            if key not in made:
                made[key] = gather_mask(mask, cut_here.index, cut_here.valid, slots, causal, run.front)
            kwargs["attention_mask"] = made[key]
    if reads and index + 1 not in run.decided:
        run.calls[index] = kwargs[CALL] = Call(kwargs.get("attention_mask"), record=True)
    return (x, *args[1:]), kwargs


def _tables(step: Step, cut: Cut, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotary tables of the columns that are left; gathered once for the layers that share them."""
    key = (id(cut), *map(id, tables))
    if key not in step.tables:
        # The stock tables are held as well, so that no other can get their ids while they are a key.
        step.tables[key] = (tables, tuple(rows_of(t, cut.here) for t in tables))
    return step.tables[key][1]
