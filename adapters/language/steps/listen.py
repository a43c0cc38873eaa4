"""Record the attention of a layer for the method that acts before the next one."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.records import Decided, Recorded
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["Listen"]


@dataclass(frozen=True)
class Listen(LayerStep):
    """Queries, keys and values of this layer's attention: in ``prefill``, and, for methods that choose again, in
    ``decode``."""

    prefill: bool
    decode: bool
    listens = True

    @property
    def rests(self) -> bool:
        """Whether no method chooses again."""
        return not self.decode

    def before(self, call: LayerCall) -> None:
        if call.prefill:
            wanted = self.prefill and call.index + 1 not in call.state.of(Decided).layers
        else:  # a step that chooses in decode has a call of the attention of its own
            wanted = self.decode and call.forward.phase == "decode" and call.attention is None
        if wanted:
            seen = call.attention = Call(call.mask, record=True)
            call.state.put(Recorded(seen), call.index)
