"""Record the attention of a layer for the method that acts before the next one."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["Listen"]


@dataclass(frozen=True)
class Listen(LayerStep):
    """Queries, keys and values of this layer's attention: in ``prefill``, and, for methods that choose again, in
    ``decode``."""

    prefill: bool
    decode: bool

    def before(self, call: LayerCall) -> None:
        run, index = call.run, call.index
        if call.step.prefill:
            wanted = self.prefill and index + 1 not in run.decided
        else:  # a step that chooses in decode has a call of the attention of its own
            wanted = self.decode and call.step.new == 1 and call.attention is None
        if wanted:
            call.attention = run.calls[index] = Call(call.mask, record=True)
