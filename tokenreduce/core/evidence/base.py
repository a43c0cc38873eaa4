"""What every stage knows about the tokens that a method decides about."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tokenreduce.core.evidence.attention import Attention
from tokenreduce.core.readable import length
from tokenreduce.core.trace import active

__all__ = ["BaseEvidence"]


class BaseEvidence:
    """The small core of evidence; each stage has a class of its own that adds what only that stage knows.

    Evidence is read, never written to. Asking for what is missing raises ``ValueError`` that names it.

    Args:
        x: features (B,N,C), the residual stream at the site.
        attention: the attention before the site.
        size: (B,N) number of original tokens behind each token; None means one each.
        protected: count of leading tokens that must stay (class token, registers), or a bool mask (B,N) or (N,).
        grid: (H,W) or (T,H,W) of the tokens that are not protected, as they entered the model.
        valid: (B,N) bool, False where a sample has fewer tokens.
        cls: whether token 0 is a class token.
        layer, depth: 0-based layer index and number of layers, for schedules.
        entry: number of tokens at the entry of the model, protected ones included; N by default.
    """

    def __init__(
        self,
        x: Tensor,
        attention: Attention | None = None,
        *,
        size: Tensor | None = None,
        protected: int | Tensor = 0,
        grid: tuple[int, ...] | None = None,
        valid: Tensor | None = None,
        cls: bool = False,
        layer: int = 0,
        depth: int = 1,
        entry: int | None = None,
    ) -> None:
        if x.dim() != 3:
            raise ValueError(f"x has shape (batch, tokens, channels), not {tuple(x.shape)}")
        self.x, self.size, self.valid, self.grid, self.cls = x, size, valid, grid, cls
        self.protected = protected
        self._attention = Attention(size=size, valid=valid, cls=cls) if attention is None else attention
        self.layer, self.depth = layer, depth
        self.entry = length(x) if entry is None else entry

    # -- the attention -------------------------------------------------------------------------------------------------
    @property
    def attention(self) -> Attention:
        """The attention before the site; ``evidence.attention("cls")`` are softmax rows."""
        return self._attention

    @property
    def keys(self) -> Tensor:
        return self.attention.keys

    @property
    def queries(self) -> Tensor:
        return self.attention.queries

    @property
    def values(self) -> Tensor:
        return self.attention.values

    # -- tokens --------------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def n(self) -> int:
        """Number of tokens N."""
        n = self.x.shape[1]
        return n if type(n) is int else length(self.x)

    @property
    def prefix(self) -> int:
        """Number of protected leading tokens; 0 when protection is a mask."""
        return self.protected if isinstance(self.protected, int) else 0

    @property
    def masked(self) -> bool:
        """Whether protection differs over samples, or is more than a prefix."""
        return isinstance(self.protected, Tensor) or self._mixed()

    def _mixed(self) -> bool:
        """Whether some tokens must stay for what they are."""
        return False

    def fixed(self) -> Tensor | None:
        """(B,N) bool of the tokens that must stay and must not absorb others, or None when there is none."""
        if isinstance(self.protected, Tensor):
            return self.protected.bool().expand(self.batch, -1)
        if not self.protected:
            return None
        return (torch.arange(self.n, device=self.x.device) < self.protected).expand(self.batch, -1)

    def free(self) -> int:
        """How many tokens of a sample may go (the smallest number over the batch when masks differ)."""
        if not self.masked:
            return self.n - self.prefix
        fixed = self.fixed()
        return self.n if fixed is None else int((~fixed).sum(1).min())

    def samples(self, rows: Tensor) -> BaseEvidence:
        """The same tokens, of some samples of the batch, ``rows`` (R,): what the core knows of them."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        protected = self.protected
        if isinstance(protected, Tensor) and protected.dim() == 2:
            protected = protected[rows]
        return BaseEvidence(
            self.x[rows], self.attention.samples(rows), size=pick(self.size), protected=protected, grid=self.grid,
            valid=pick(self.valid), cls=self.cls, layer=self.layer, depth=self.depth, entry=self.entry,
        )  # fmt: skip

    # -- messages ------------------------------------------------------------------------------------------------------
    def note(self, detail: str, brief: str) -> None:
        """Report that a setting was clamped: ``detail`` goes to an active trace, else ``brief`` to ``warnings``."""
        if torch.compiler.is_compiling():
            return
        trace = active()
        if trace is not None:
            trace.note(detail)
        else:
            warnings.warn(brief, stacklevel=4)
