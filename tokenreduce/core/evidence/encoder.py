"""Evidence inside a vision encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokenreduce.core.evidence.attention import Attention, need
from tokenreduce.core.evidence.base import BaseEvidence

__all__ = ["EncoderEvidence", "TracedEvidence"]


class EncoderEvidence(BaseEvidence):
    """Evidence at a block of a vision encoder, see :class:`BaseEvidence`.

    Args:
        before: (B,N,C) what went into the sub-layer whose output is ``x``.
        origin: (B,N) number of the token at the entry that every one of ``x`` is in the place of; None where none has
            left. Or a function that answers with it, when it is asked for.
    """

    def __init__(
        self,
        x: Tensor,
        attention: Attention | None = None,
        *,
        before: Tensor | None = None,
        origin: Tensor | Callable[[], Tensor | None] | None = None,
        **core: Any,
    ) -> None:
        super().__init__(x, attention, **core)
        self._before, self._origin = before, origin

    @property
    def origin(self) -> Tensor | None:
        """(B,N) places at the entry, see above."""
        return self._origin() if callable(self._origin) else self._origin

    @origin.setter
    def origin(self, places: Tensor | None) -> None:
        self._origin = places

    @property
    def before(self) -> Tensor:
        return need(self._before, "before")

    def one_of_ones(self) -> EncoderEvidence:
        """The same for one sample of equal tokens, where the batch is empty and yet a plan must be made."""

        def one(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.new_ones(1, *t.shape[1:])

        seen, protected = self.attention, self.protected
        rotated = None
        if seen.rotated is not None:
            q, k = seen.rotated
            rotated = q.new_ones(1, *q.shape[1:]), k.new_ones(1, *k.shape[1:])
        rows = Attention(
            one(seen.q), one(seen.k), one(seen.v), rotated=rotated, rope=seen.rope, scale=seen.scale,
            mask=one(seen.mask), size=one(seen.size), valid=one(seen.valid), proportional=seen.proportional,
            cls=seen.cls,
        )  # fmt: skip
        return EncoderEvidence(
            self.x.new_ones(1, *self.x.shape[1:]), rows, size=one(self.size), protected=protected, grid=self.grid,
            valid=one(self.valid), cls=self.cls, layer=self.layer, depth=self.depth, entry=self.entry,
            before=one(self._before),
            origin=None if (origin := self.origin) is None else origin.new_zeros(1, *origin.shape[1:]),
        )  # fmt: skip

    @property
    def keys(self) -> Tensor:
        return self._attention.keys

    @property
    def masked(self) -> bool:
        return isinstance(self.protected, Tensor)

    @property
    def proportional(self) -> float:
        """Whether the model's attention carries the log-size bias; a number is the power of the sizes."""
        return self.attention.proportional


class TracedEvidence(EncoderEvidence):
    """The same in a compiled graph, which serves the blocks of all layers where nobody asks for ``layer``: it is what
    ``layer_of()`` says."""

    def __init__(self, x: Tensor, attention: Attention | None, *, layer_of: Callable[[], int], **more: Any) -> None:
        self._layer_of = layer_of
        super().__init__(x, attention, **more)

    @property
    def layer(self) -> int:  # type: ignore[override]
        return self._layer_of()

    @layer.setter
    def layer(self, number: int) -> None:
        pass  # the base class's, which knows none
