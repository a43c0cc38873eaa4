"""Decode: a method chooses again among the tokens that are cached, and the others are hidden from the new one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.adapters.language.decode import Asker, Choice, chooses, note_choice
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["Hide"]


@dataclass(frozen=True)
class Hide(LayerStep):
    """In a decode step: what the method leaves of the cached tokens, from this layer on. Later turns see them all."""

    asker: Asker

    def before(self, call: LayerCall) -> None:
        if not chooses(call):
            return
        with torch.no_grad():
            asked = self.asker.ask(call)
        if not asked.everything:
            call.forward.state.put(Choice(asked.live), call.index)
        note_choice(call, self.asker.method, asked.live)

    def __str__(self) -> str:
        return f"hide ({self.asker.method.spec()})"
