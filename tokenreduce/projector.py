"""Settings that methods between the vision encoder and the language model share."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.budget import check_keep
from tokenreduce.reducer import Reducer

__all__ = ["NEWLINES", "POSITIONS", "Projector"]

POSITIONS = ("compact", "original")
NEWLINES = ("keep", "rank")


@dataclass(frozen=True)
class Projector(Reducer, stage="projector"):
    """Base of methods that choose among the visual tokens of one image at the entry of the language model.

    Args:
        keep: visual tokens of every image that stay, a count or a ratio.
        positions: what the language model counts. "compact" renumbers the tokens that are left, as if the prompt had
            been this short; "original" leaves gaps, so that dropping is the same as hiding keys. None is compact, as
            in published code that shortens the sequence, and original where that cannot be: with M-RoPE, whose
            positions are places in the image, and with sliding windows.
        newlines: row ends that LLaVA-NeXT and its successors put between patches: "keep" keeps them beside ``keep``
            and lets no method look at them; "rank" treats them as visual tokens, as official code does.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 1.0
    positions: str | None = None
    newlines: str = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep is None:
            raise ValueError("keep is a number of tokens (int >= 1) or a ratio (float in (0, 1]), not None")
        if self.positions is not None and self.positions not in POSITIONS:
            raise ValueError(f"positions is one of {POSITIONS} or None, not {self.positions!r}")
        if self.newlines not in NEWLINES:
            raise ValueError(f"newlines is one of {NEWLINES}, not {self.newlines!r}")
