"""What a block asks of its attention module, and what it is answered."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Ask", "Attended", "asks"]


class Attended(NamedTuple):
    """What a family's attention half returns: its output before the residual, and what it was computed from.

    ``keys``, ``queries``, ``values`` are (B,H,N,d) as the adapter's page says (before RoPE where the family has it);
    ``rotated`` are queries and keys after RoPE, None where there is none. ``table`` (B or 1,H,N,N) is what a model adds
    to its logits by relative position.
    """

    out: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    rotated: tuple[Tensor, Tensor] | None = None
    table: Tensor | None = None


class Ask:
    """What a block asks of an attention module besides its output: to add ``bias`` (B,1,1,N) to the logits, to attend
    with the map ``given`` (B,H,N,N), and to show what :class:`Attended` has. Goes in as keyword ``tokenreduce_ask``."""

    __slots__ = ("bias", "given", "keys", "needs", "queries", "rotated", "values")

    def __init__(self, bias: Tensor | None = None, needs: tuple[str, ...] = (), given: Tensor | None = None) -> None:
        self.bias, self.needs, self.given = bias, needs, given
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.rotated: tuple[Tensor, Tensor] | None = None

    def answer(self, out: Tensor) -> Attended:
        """``out`` and what was shown. Raises ``RuntimeError`` where the module did not get the question."""
        if self.values is None:
            raise RuntimeError(
                "the attention module of a patched block ran other code than its library's and ignored token sizes; "
                "call tr.unpatch, undo what replaced its forward, and patch again"
            )
        return Attended(out, self.queries, self.keys, self.values, self.rotated)


def asks(bias: Tensor | None, needs: tuple[str, ...]) -> bool:
    """Whether the stock attention is not enough: there is a bias to add or something to see."""
    return bias is not None or needs not in ((), ("before",))
