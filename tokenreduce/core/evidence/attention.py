"""Attention: queries, keys and values of one attention of a model, and softmax rows of it on request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Attention", "Rows", "need"]

Rows = Literal["cls", "all"] | Tensor


def need(value: Tensor | None, name: str) -> Tensor:
    """``value``; raises ``ValueError`` with what to give when there is none."""
    if value is None:
        raise ValueError(f"this method needs {name}, which the evidence lacks: give Evidence({name}=...)")
    return value


@dataclass(eq=False)
class Attention:
    """One attention of a model, to be asked and never written to: ``evidence.attention("cls")`` are softmax rows.

    Nobody asks a model for its whole attention map; rows are computed here, from queries and keys, with the bias,
    the mask and the cap that the model uses.

    Args:
        q: (B,H,N,d) queries; ``k``, ``v``: (B,H or Hkv,N,d) keys and values. None where they were not gathered, and
            then :attr:`queries`, :attr:`keys` and :attr:`values` raise ``ValueError``.
        given: precomputed softmax rows (B,H,R,N), which stand for whatever rows a method asks for.
        rotated: queries and keys after RoPE when ``q`` and ``k`` are from before it; rows use these.
        rope: "pre" or "post" when queries and keys are from before or after a rotary embedding, else None.
        scale: factor on q·k; 1/sqrt(d) by default.
        softcap: logits l become softcap * tanh(l / softcap), as in Gemma 2.
        causal: whether a query sees only keys at or before its own place.
        mask: (B or 1,1 or H,N,N) bool or additive, in place of ``causal``: what each query sees in the model, or what
            is added to its logits by relative position.
        size, valid: (B,N) sizes of merged tokens and which tokens are there.
        proportional: whether rows carry the log-size bias, as they do in a model that uses it; a number is the power
            of the sizes.
        cls: whether row 0 is a class token's.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    given: Tensor | None = None
    rotated: tuple[Tensor, Tensor] | None = None
    rope: str | None = None
    scale: float | None = None
    softcap: float | None = None
    causal: bool = False
    mask: Tensor | None = None
    size: Tensor | None = None
    valid: Tensor | None = None
    proportional: float = True
    cls: bool = True
    _map: Tensor | None = field(default=None, init=False, repr=False)

    # -- what the model computed -----------------------------------------------------------------------------------
    @property
    def queries(self) -> Tensor:
        return self.q if self.q is not None else need(None, "queries")

    @property
    def keys(self) -> Tensor:
        return self.k if self.k is not None else need(None, "keys")

    @property
    def values(self) -> Tensor:
        return self.v if self.v is not None else need(None, "values")

    @property
    def used(self) -> tuple[Tensor, Tensor]:
        """Queries and keys that the model's logits are made of, behind RoPE where it has one."""
        return (self.queries, self.keys) if self.rotated is None else self.rotated

    @property
    def factor(self) -> float:
        """The factor on q·k."""
        return float(self.queries.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def heads(self) -> int:
        """Number of heads that rows have; grouped queries count each."""
        return (self.queries if self.given is None else self.given).shape[1]

    @property
    def plain(self) -> bool:
        """Whether every query sees every key, uncapped."""
        return self.mask is None and not self.causal and self.softcap is None

    # -- rows --------------------------------------------------------------------------------------------------------
    def __call__(self, rows: Rows = "cls") -> Tensor:
        """Softmax rows (B,H,R,N) in float32 for a few queries: "cls" (row 0), "all", or indices (R,) or (B,R).

        Precomputed rows are returned as they are. Raises ``ValueError`` for "cls" without a class token.
        """
        if self.given is not None:
            return self.given.float()
        q, k = self.used
        if isinstance(rows, str) and rows == "all" and self._map is not None:
            return self._map
        if isinstance(rows, Tensor):
            where = rows if rows.dim() == 2 else rows.unsqueeze(0)
            q = q.gather(2, where[:, None, :, None].expand(q.shape[0], q.shape[1], -1, q.shape[-1]))
        elif rows == "cls":
            if not self.cls:
                raise ValueError("the model has no class token to take attention from")
            q = q[:, :, :1]
        elif rows != "all":
            raise ValueError(f"rows is 'cls', 'all' or token indices, not {rows!r}")
        logits = self._logits(q, k)
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        out = self._softmax(self._seen(logits, rows))
        if isinstance(rows, str) and rows == "all":
            self._map = out  # an adapter that reduces the map itself must not compute it twice
        return out

    def _seen(self, logits: Tensor, rows: Rows) -> Tensor:
        """``logits`` (B,H,R,N) of the queries ``rows`` where these see, and what the mask adds to them."""
        if self.mask is None and not self.causal:
            return logits
        b, n = logits.shape[0], logits.shape[3]
        where: Tensor | None = None
        if isinstance(rows, Tensor):
            where = rows if rows.dim() == 2 else rows.unsqueeze(0)
        elif rows == "cls" or self.mask is None:
            where = torch.arange(n if rows == "all" else 1, device=logits.device).unsqueeze(0)
        if self.mask is not None:
            seen = self.mask.expand(b, -1, -1, -1)
            if where is not None:
                seen = seen.gather(2, where[:, None, :, None].expand(b, seen.shape[1], -1, n))
            return logits.masked_fill_(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen.float()
        assert where is not None
        later = torch.arange(n, device=logits.device) > where.unsqueeze(-1)
        return logits.masked_fill_(later.unsqueeze(1), float("-inf"))

    def between(self, start: int, end: int) -> Tensor:
        """Rows (B,H,end-start,N) of queries that stand side by side, which need not be gathered where all keys are
        seen."""
        if not self.plain or self.given is not None or self.used[0].shape[1] != self.used[1].shape[1]:
            return self(torch.arange(start, end, device=self.used[0].device if self.given is None else None))
        q, k = self.used
        return self._softmax(self._logits(q[:, :, start:end], k))

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        if k.shape[1] != q.shape[1]:  # grouped queries: every key head serves several query heads
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(q.device.type, enabled=False):  # a ranking must not be rounded to half precision
            return (q.float() * scale) @ k.float().transpose(-2, -1)

    def _softmax(self, logits: Tensor) -> Tensor:
        bias = self.key_bias()
        return (logits if bias is None else logits + bias).softmax(-1)

    def key_bias(self) -> Tensor | None:
        """(B,1,1,N) float32 added to attention logits: log size, and -inf for tokens that are not there."""
        bias = None
        if self.size is not None and self.proportional:
            bias = self.size.float().log()
            bias = bias if self.proportional == 1 else bias * self.proportional
        if self.valid is not None:
            bias = torch.zeros(self.valid.shape, device=self.valid.device) if bias is None else bias
            bias = bias.masked_fill(~self.valid, float("-inf"))
        return None if bias is None else bias[:, None, None, :]

    # -- the same attention, seen otherwise ----------------------------------------------------------------------------
    def head(self, h: int) -> Attention:
        """One of :attr:`heads`, where all of them at once would take too much memory."""
        if self.given is not None:
            return replace(self, given=self.given[:, h : h + 1])

        def pair(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            own = h * k.shape[1] // q.shape[1]
            return q[:, h : h + 1], k[:, own : own + 1]

        q, k = pair(self.queries, self.keys)
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, h : h + 1]
        return replace(self, q=q, k=k, mask=mask, rotated=None if self.rotated is None else pair(*self.rotated))

    def joined(self) -> Attention:
        """All heads side by side as one of full width C: its rows are softmax(q·k / sqrt(C)), which is not the mean
        over heads. Rows that were given stay as they are."""
        if self.given is not None:
            return self
        q, k = self.used
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        mask = self.mask
        if mask is not None and mask.shape[1] > 1:  # heads side by side add their logits up, over sqrt(H)
            mask = mask.sum(1, keepdim=True) / mask.shape[1] ** 0.5
        q, k = (t.transpose(1, 2).flatten(2).unsqueeze(1) for t in (q, k))
        return replace(self, q=q, k=k, rotated=None, scale=None, mask=mask)

    def unbiased(self) -> Attention:
        """Without the log-size bias. Rows that were given stay as they are."""
        return replace(self, proportional=False)

    def tempered(self, temperature: float) -> Attention | None:
        """All logits divided by ``temperature``, which spares their way back from a softmax; None where rows were
        given, or carry the sizes of merged tokens."""
        if self.given is not None or (self.size is not None and self.proportional):
            return None
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask / temperature
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.factor / temperature, softcap=softcap, mask=mask)

    def first(self, n: int) -> Attention:
        """Of the first ``n`` tokens, which are all that these see."""

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[..., :n, :]

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:, :n]

        rotated = None if self.rotated is None else (self.rotated[0][..., :n, :], self.rotated[1][..., :n, :])
        mask = None if self.mask is None else self.mask[..., :n, :n]
        return replace(
            self, q=cut(self.q), k=cut(self.k), v=cut(self.v), rotated=rotated, mask=mask, size=pick(self.size),
            valid=pick(self.valid),
        )  # fmt: skip

    def samples(self, rows: Tensor) -> Attention:
        """Of some samples of the batch, ``rows`` (R,)."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[rows]
        rotated = None if self.rotated is None else (self.rotated[0][rows], self.rotated[1][rows])
        return replace(
            self, q=pick(self.q), k=pick(self.k), v=pick(self.v), given=pick(self.given), rotated=rotated, mask=mask,
            size=pick(self.size), valid=pick(self.valid),
        )  # fmt: skip

    def tokens(self, row: int, where: Tensor) -> Attention:
        """Of the tokens ``where`` (K,) of one sample, as if there were no others."""

        def heads(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[row : row + 1, :, where]

        given = None if self.given is None else self.given[row : row + 1, :, :, where]
        size = None if self.size is None else self.size[row : row + 1, where]
        mask = None
        if self.mask is not None and self.mask.shape[1] > 1:
            mask = self.mask.expand(len(self.queries), -1, -1, -1)[row : row + 1, :, where][..., where]
        return Attention(
            heads(self.q), heads(self.k), heads(self.v), given, rope=self.rope, scale=self.scale, mask=mask, size=size,
            cls=False,
        )  # fmt: skip
