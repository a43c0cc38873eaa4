"""A language-stage method at work: evidence before a decoder layer, its plan, and the tokens that are left."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import Call, is_causal, softcap_of
from tokenreduce.adapters.language.cuts import Cut
from tokenreduce.adapters.language.generation import Generation
from tokenreduce.adapters.language.projector.scores import needs_scores
from tokenreduce.adapters.language.records import Decided, Frames, LayerInput, Places, PromptFeatures, TowerScores
from tokenreduce.core.evidence import Attention, LanguageEvidence, Prompt
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Step, active

__all__ = ["Chooser"]


@dataclass(frozen=True)
class Chooser:
    """A language-stage method, which acts before decoder layer ``index`` of ``depth``."""

    reducer: Reducer
    index: int
    depth: int
    #: The norm behind the last layer, where the method asks for it.
    norm: nn.Module | None = None
    #: Whether it looks at queries and keys before their rotation.
    plain: bool = False
    #: The attention that is looked at, where the layer has none.
    attention: nn.Module | None = None

    def reduce(self, x: Tensor, generation: Generation, layer: Any, seen: Call | None) -> Tensor:
        """``x`` (B,N,C) with the tokens that are left, by what was ``seen`` of an attention; decided once per
        generation. ``layer`` is the decoder layer, for the trace."""
        columns, index = generation.columns, self.index
        decided = generation.state.of(Decided).layers
        if index in decided:
            cut = columns.cut_at(index)
            return x if cut is None or cut.layer != index else cut.take(x)
        acted: Plan | None = None
        made: Cut | None = None
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            # A plan is a choice; and a layer that is checkpointed must save the same tensors each time.
            with torch.no_grad():
                plan = self.reducer.plan(self._evidence(x, generation, layer, seen))
                decided.add(index)
                if not plan.is_identity:
                    acted, made = plan, columns.cut(index, plan, self.reducer.size_power)
            if made is not None:
                x = made.take(x)
        if trace is not None:
            trace.add(layer, Step("language", index, x.shape[1], acted, self.reducer.spec()))
        return x

    def _evidence(self, x: Tensor, generation: Generation, layer: Any, seen: Call | None) -> LanguageEvidence:
        columns, state, index, asked = generation.columns, generation.state, self.index, self.reducer.required()
        valid, entered = columns.real_at(index), state.get(PromptFeatures)
        before = state.pop(LayerInput, index - 1) if "before" in asked else None
        scores = state.of(TowerScores).by[self.reducer] if needs_scores(self.reducer) else None
        history = None
        if "history" in asked:
            history = torch.stack([columns.visual_at(i - 1).sum(1) for i in range(index + 1)], 1)
        return LanguageEvidence(
            x,
            _attention(x, self.attention or layer.self_attn, seen, valid, self.plain),
            frame_of=self._told("frames", Frames, generation),
            place_of=self._told("places", Places, generation),
            before=None if before is None else before.x,
            scores=None if scores is None else columns.tell(scores, index),
            history=history,
            visual=columns.choosable_at(index),
            valid=valid,
            layer=index,
            depth=self.depth,
            entry=columns.length,
            prompt=Prompt(columns.visual_at(-1), columns.real_at(-1), None if entered is None else entered.x),
            norm=self.norm,
        )

    def _told(self, word: str, kind: type[Frames] | type[Places], generation: Generation) -> Tensor | None:
        """(B,N,n) what the method asks to be told of every token."""
        known = generation.state.get(kind) if word in self.reducer.required() else None
        return None if known is None else generation.columns.tell(known.of, self.index, -1)


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
