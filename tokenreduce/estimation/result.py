"""What an estimate found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tokenreduce.estimation.limits import Worth
from tokenreduce.estimation.roofline import Part
from tokenreduce.estimation.table import text

__all__ = ["Estimate", "Side"]


@dataclass(frozen=True)
class Side:
    """The stock or the reduced model on the device, for a whole batch.

    ``parts`` in the order of a token's way; ``first_token`` seconds (an encoder's forward), ``token`` seconds of one
    decode step for all samples; ``cache_bytes`` behind the prompt; ``largest_batch`` that fits, answers included.
    """

    parts: tuple[Part, ...]
    first_token: float
    token: float
    cache_bytes: float
    largest_batch: int


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found. ``limits`` has, by stage, the stock time over what is left where the stage takes all
    visual tokens away at no cost; ``worth`` is the budget from which on this reduction gains 5 %."""

    model: str
    device: str
    dtype: str
    batch: int
    shown: str
    prompt: int
    answer: int
    visual: int
    parameters: int
    reduce: str
    stock: Side
    reduced: Side | None
    limits: dict[str, float]
    worth: Worth | None
    notes: tuple[str, ...] = field(default=())

    @property
    def answers(self) -> bool:
        """Whether there is a language model."""
        return self.visual > 0

    @property
    def speedup(self) -> float | None:
        """Of the time to the first token, or of an encoder's forward."""
        return None if self.reduced is None else self.stock.first_token / self.reduced.first_token

    @property
    def token_speedup(self) -> float | None:
        """Of a decode step."""
        return None if self.reduced is None or not self.answers else self.stock.token / self.reduced.token

    def total(self, side: Side) -> float:
        """Seconds to the end of the answer."""
        return side.first_token + self.answer * side.token

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, seconds and bytes."""
        return {**asdict(self), "speedup": self.speedup, "token_speedup": self.token_speedup}

    def __str__(self) -> str:
        return text(self)
