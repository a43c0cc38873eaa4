"""A language-stage method at work: evidence before a decoder layer, its plan, and the tokens that are left."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import Call, is_causal, softcap_of
from tokenreduce.adapters.language.generation import Cut, Run
from tokenreduce.adapters.language.projector.marks import needs_marks
from tokenreduce.core.evidence import Attention, LanguageEvidence, Prompt
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Step as TraceStep
from tokenreduce.core.trace import active

__all__ = ["reduce_before"]


def reduce_before(
    x: Tensor,
    run: Run,
    index: int,
    depth: int,
    reducer: Reducer,
    layer: Any,
    call: Call | None,
    norm: nn.Module | None,
    plain: bool,
    attention: nn.Module | None = None,
) -> Tensor:
    """``x`` (B,N,C) with the tokens that ``reducer`` keeps before layer ``index``; decided once per run."""
    if index in run.decided:
        cut = run.cut_at(index)
        return x if cut is None or cut.layer != index else cut.take(x)
    acted: Plan | None = None
    made: Cut | None = None
    trace = active()
    with nullcontext() if trace is None else trace.clock():
        # A plan is a choice; and a layer that is checkpointed must save the same tensors each time.
        with torch.no_grad():
            plan = reducer.plan(
                _evidence(x, run, index, depth, attention or layer.self_attn, call, norm, plain, reducer)
            )
            run.decided.add(index)
            if not plan.is_identity:
                acted, made = plan, run.cut(index, plan, reducer.size_power)
        if made is not None:
            x = made.take(x)
    if trace is not None:
        trace.add(layer, TraceStep("language", index, x.shape[1], acted, reducer.spec()))
    return x


def _evidence(
    x: Tensor,
    run: Run,
    index: int,
    depth: int,
    attention: Any,
    call: Call | None,
    norm: nn.Module | None,
    plain: bool,
    reducer: Reducer,
) -> LanguageEvidence:
    asked, valid = reducer.required(), run.column_mask(index)
    history = None
    if "history" in asked:
        history = torch.stack([run.visual_at(i - 1).sum(1) for i in range(index + 1)], 1)
    return LanguageEvidence(
        x,
        _attention(x, attention, call, valid, plain),
        frame_of=run.films_at(index) if "films" in asked else None,
        place_of=run.places_at(index) if "places" in asked else None,
        before=run.inputs.pop(index, None) if "before" in asked else None,
        scores=run.marks_at(index, reducer) if needs_marks(reducer) else None,
        history=history,
        visual=run.choosable_at(index),
        valid=valid,
        layer=index,
        depth=depth,
        entry=run.length,
        prompt=Prompt(run.visual_at(-1), run.column_mask(-1), run.entered),
        norm=norm,
    )


def _attention(x: Tensor, module: Any, call: Call | None, valid: Tensor | None, plain: bool) -> Attention:
    """What was seen of an attention module, of the tokens ``x`` (B,N,C); a static cache has empty slots behind them."""
    q = k = v = mask = softcap = rotated = None
    n = x.shape[1]
    if call is not None and call.keys is not None and call.values is not None:
        q, k, v = call.queries, call.keys[:, :, :n], call.values[:, :, :n]
        if call.rotated is not None:
            rotated, call.rotated = (call.rotated[0], call.rotated[1][:, :, :n]), None
        if isinstance(call.mask, Tensor) and call.mask.dim() == 4:
            mask = call.mask[..., :n]
        softcap = softcap_of(module)
        # A checkpointed layer keeps its arguments until the backward pass, and fills the call again there.
        call.record, call.queries, call.keys, call.values = False, None, None, None
    return Attention(
        q, k, v, rotated=rotated, rope="pre" if plain or rotated is not None else "post",
        scale=getattr(module, "scaling", None), softcap=softcap, mask=mask, causal=is_causal(module), valid=valid,
        cls=False,
    )  # fmt: skip
