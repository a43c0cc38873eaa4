"""Image/video language models of transformers 5: dropping visual tokens inside the language model.

Mechanism: a pre-hook on the inner model makes a :class:`~tokenreduce.adapters.generation.Run` at prefill and passes it
on as a keyword; pre-hooks on decoder layers compute plans from the attention of the layer before, gather hidden
states, rotary tables and masks from the acting layer on, and rebuild the mask of those layers in decode, where their
caches are shorter than the prompt. Kept tokens keep their original positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.generation import KEYWORD, Run, Step, attach_run, columns_kept, gather_mask, run_of
from tokenreduce.adapters.hf_attention import CALL, Call, listen
from tokenreduce.evidence import Evidence
from tokenreduce.patching import Undo
from tokenreduce.reducer import Reducer
from tokenreduce.trace import Step as TraceStep
from tokenreduce.trace import active

__all__ = ["FAMILIES", "Language", "attach", "find"]

EVIDENCE = ("keys", "queries", "values", "attention")


@dataclass(frozen=True)
class Family:
    """Where the parts are. ``ids`` are config attributes that name the placeholder tokens."""

    language: str = "language_model"
    layers: str = "layers"
    ids: tuple[str, ...] = ("image_token_id", "video_token_id")


#: Inner model class -> its parts.
FAMILIES: dict[str, Family] = {"LlavaModel": Family()}


@dataclass(frozen=True)
class Language:
    """One language model with visual tokens found inside a model."""

    name: str
    inner: nn.Module
    family: str
    layers: tuple[nn.Module, ...]
    ids: tuple[int, ...]
    evidence: tuple[str, ...] = EVIDENCE


def find(model: nn.Module) -> Language | None:
    """The image/video language model inside ``model``, or None."""
    for name, module in model.named_modules():
        family = FAMILIES.get(type(module).__name__)
        if family is not None and type(module).__module__.startswith("transformers."):
            config: Any = module.config
            found = (getattr(config, i, None) for i in family.ids)
            ids = tuple(i for i in found if isinstance(i, int))
            text: Any = module.get_submodule(family.language)
            layers = tuple(getattr(text, family.layers))
            return Language(name, module, type(module).__name__, layers, ids)
    return None


def attach(found: Language, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put language-stage ``reducers`` into the model. Raises ``ValueError`` for layers that do not exist or clash."""
    depth = len(found.layers)
    acting: list[Reducer | None] = []
    for layer in range(depth):
        here = [r for r in reducers if r.acts(layer, depth)]
        if len(here) > 1:
            raise ValueError(f"{' and '.join(r.spec() for r in here)} both act before layer {layer}; choose other layers")
        acting.append(here[0] if here else None)
    first = next((i for i, r in enumerate(acting) if r is not None), depth)
    if first == depth:
        return
    undo.pre_hook(found.inner, functools.partial(start, ids=found.ids))
    copies: dict[int, Any] = {}
    for i, layer in enumerate(found.layers):
        if "forward" in vars(layer):
            raise ValueError(f"layer {i} has a forward of its own (accelerate's dispatch); call tr.patch before dispatching")
        after = acting[i + 1] if i + 1 < depth else None
        reads = after is not None and bool(after.gathers())
        if reads:
            listen(layer.self_attn, undo, copies)  # type: ignore[arg-type]
        if i >= first or reads:
            undo.pre_hook(layer, functools.partial(enter, index=i, depth=depth, reducer=acting[i], reads=reads))
        if acting[i] is not None:
            undo.set(layer, "_get_name", functools.partial(_name, type(layer).__name__, acting[i]))


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"


def start(
    inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, ids: tuple[int, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the inner model: make the run of this generation, or take it from the cache."""
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        run = run_of(cache)
        return None if run is None else (args, {**kwargs, KEYWORD: Step(run, prefill=False)})
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is not None:
        visual = torch.isin(tokens, torch.tensor(ids, device=tokens.device))
    else:
        embeds = kwargs["inputs_embeds"]
        table = inner.get_input_embeddings()
        marks = [(embeds == table(torch.tensor(i, device=embeds.device))).all(-1) for i in ids]
        visual = torch.stack(marks).any(0)
    if not bool(visual.any()):
        return None
    padding = _padding(kwargs.get("attention_mask"), visual)
    return args, {**kwargs, KEYWORD: Step(Run(visual.shape[1], visual, padding), prefill=True)}


def _padding(mask: Any, visual: Tensor) -> Tensor | None:
    """(B,L) bool of the real columns, None when all are: from a padding mask, or from the 4-D mask that ``generate``
    makes for a static cache, whose last row sees every real token (prompts are padded on the left there)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            f"a patched model takes attention_mask as padding mask (batch, tokens) or (batch, 1, tokens, slots), "
            f"not {type(mask).__name__}"
        )
    if mask.dim() == 4:
        row = mask[:, 0, -1, : visual.shape[1]]
        mask = row if row.dtype == torch.bool else row == 0
        mask = mask.expand(visual.shape[0], -1)
    return None if bool(mask.all()) else mask.bool()


def enter(
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    index: int,
    depth: int,
    reducer: Reducer | None,
    reads: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on decoder layer ``index``: plan and gather in prefill, rebuild the mask in decode."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None:
        return None
    run, cache = step.run, kwargs.get("past_key_values")
    kwargs = dict(kwargs)
    if not step.prefill:
        if run.cut_at(index) is None:
            return None
        kwargs["attention_mask"] = _decode_mask(layer, args[0], kwargs.get("attention_mask"), run, index, cache)
        return args, kwargs
    if cache is not None and run_of(cache) is not run:
        attach_run(cache, run)
    x = args[0]
    if reducer is not None:
        plan = reducer.plan(_evidence(x, run, index, depth, reducer, layer))
        acted = None if plan.is_identity else plan
        if acted is not None:
            x = _rows(x, columns_kept(acted)[0])
            run.cut(index, acted)
        trace = active()
        if trace is not None:
            trace.add(layer, TraceStep("language", index, x.shape[1], acted, reducer.spec()))
    cut_here = run.cut_at(index)
    if cut_here is not None:
        where = cut_here.index
        kwargs["position_embeddings"] = tuple(_rows(t, where) for t in kwargs["position_embeddings"])
        slots = x.shape[1] if cache is None else cache.layers[index].get_mask_sizes(x.shape[1])[0]
        kwargs["attention_mask"] = gather_mask(kwargs.get("attention_mask"), where, cut_here.valid, slots)
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor):
            kwargs["position_ids"] = positions.expand(where.shape[0], -1).gather(1, where)
    if reads:
        run.calls[index] = kwargs[CALL] = Call(kwargs.get("attention_mask"), record=True)
    return (x, *args[1:]), kwargs


def _rows(table: Tensor, where: Tensor) -> Tensor:
    """Rows of ``table`` (B or 1,L,d) at the columns ``where`` (B,K)."""
    table = table.expand(where.shape[0], -1, -1)
    return table.gather(1, where.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def _evidence(x: Tensor, run: Run, index: int, depth: int, reducer: Reducer, layer: Any) -> Evidence:
    call = run.calls.pop(index - 1, None)
    seen: dict[str, Any] = {}
    if call is not None:
        n = x.shape[1]
        seen = {"keys": call.keys[:, :, :n], "queries": call.queries, "values": call.values[:, :, :n]}
    return Evidence(
        x,
        **seen,
        visual=run.visual_at(index),
        valid=run.column_mask(index),
        cls=False,
        rope="post",
        scale=getattr(layer.self_attn, "scaling", None),
        causal=True,
        layer=index,
        depth=depth,
        entry=run.length,
    )


def _decode_mask(layer: Any, x: Tensor, stock: Any, run: Run, index: int, cache: Any) -> Tensor | None:
    mine = cache.layers[index]
    queries = x.shape[1]
    slots, _ = mine.get_mask_sizes(queries)
    mask = run.decode_mask(index, int(mine.get_seq_length()), queries, slots)
    if mask is None or layer.self_attn.config._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
