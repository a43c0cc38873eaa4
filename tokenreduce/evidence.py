"""Evidence: what a method may look at when it decides about tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenreduce.readable import length

__all__ = ["Earlier", "Evidence", "Look", "Prompt", "Rows"]

Rows = Literal["cls", "all"] | Tensor
#: Which block of a vision tower: a 0-based index (negative from the end), a share of its depth (float), or None for
#: the block whose output enters the projector.
Look = int | float | None


@dataclass(frozen=True, eq=False)
class Prompt:
    """The sequence as it entered a language model: ``visual`` (B,L) bool marks its visual tokens, ``valid`` (B,L) its
    real ones (None: all), ``x`` (B,L,C) are the features before layer 0 where a method asked for them."""

    visual: Tensor
    valid: Tensor | None = None
    x: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Earlier:
    """The decode step before, for the same tokens: ``attention`` (B,N) of its new token, mean over heads (0 for tokens
    that it did not see), and ``stay`` (B,N) bool, those that the method left."""

    attention: Tensor
    stay: Tensor


class Evidence:
    """Everything that a method may look at, at one site of a model.

    Only ``x`` is always there; asking for what is missing raises ``ValueError`` that names it.

    Args:
        x: features (B,N,C), the residual stream at the site.
        keys, queries, values: (B,H,N,d) of the attention before the site.
        attention: precomputed softmax rows (B,H,R,N); they stand for whatever rows a method asks for.
        size: (B,N) number of original tokens behind each token; None means one each.
        protected: count of leading tokens that must stay (class token, registers), or a bool mask (B,N) or (N,).
        grid: (H,W) or (T,H,W) of the tokens that are not protected, as they entered the model.
        times: (B,N) seconds, for video.
        visual: (B,N) bool marks the visual tokens of a mixed sequence; only those may go.
        text: (B,L,C) or (B,C) text embeddings.
        valid: (B,N) bool, False where a sample has fewer tokens.
        before: (B,N,C) what went into the sub-layer whose output is ``x``.
        cls: whether token 0 is a class token; by default it is when something is protected.
        rope: "pre" or "post" when keys and queries are from before or after a rotary embedding, else None.
        rotated: queries and keys after RoPE when ``keys`` are from before it; attention rows use these.
        scale: factor on q·k; 1/sqrt(d) by default.
        proportional: whether attention rows carry the log-size bias, as they do in a model that uses it.
        causal: whether a query sees only keys at or before its own place, as in a language model.
        softcap: attention logits l become softcap * tanh(l / softcap), as in Gemma 2.
        mask: (B or 1,1,N,N) bool or additive: what each query sees in the model (sliding windows, prefixes that see
            each other), in place of ``causal``.
        layer, depth: 0-based layer index and number of layers, for schedules.
        entry: number of tokens at the entry of the model, protected ones included; N by default.
        prompt: the sequence at the entry of a language model, before any layer dropped something.
        norm: the final norm of a language model, for methods that compare normed features.
        films: (B,N,4) for tokens of a mixed sequence: number of the video that a token comes from, first and last frame
            that it stands for, and its place within a frame; -1 for text and pictures.
        history: (B,layer+1) visual tokens that were there before each layer up to this one made its choice.
        marks: (B,N) what the method marked by what the vision tower saw, see :meth:`tokenreduce.Reducer.mark`; a token
            that stands for several has the highest of theirs, text has 0.
        earlier: in a decode step, what the method saw and chose in the one before, see
            :meth:`tokenreduce.Reducer.later`; None in the first.
        pixels: (B,N,P) the pixels of every token's area, of the tokens behind the prefix.
    """

    def __init__(
        self,
        x: Tensor,
        keys: Tensor | None = None,
        queries: Tensor | None = None,
        attention: Tensor | None = None,
        size: Tensor | None = None,
        protected: int | Tensor = 0,
        grid: tuple[int, ...] | None = None,
        times: Tensor | None = None,
        visual: Tensor | None = None,
        text: Tensor | None = None,
        *,
        values: Tensor | None = None,
        valid: Tensor | None = None,
        before: Tensor | None = None,
        cls: bool | None = None,
        rope: str | None = None,
        rotated: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
        proportional: bool = True,
        causal: bool = False,
        softcap: float | None = None,
        mask: Tensor | None = None,
        layer: int = 0,
        depth: int = 1,
        entry: int | None = None,
        prompt: Prompt | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        films: Tensor | None = None,
        history: Tensor | None = None,
        marks: Tensor | None = None,
        earlier: Earlier | None = None,
        pixels: Tensor | None = None,
    ) -> None:
        if x.dim() != 3:
            raise ValueError(f"x has shape (batch, tokens, channels), not {tuple(x.shape)}")
        self.x = x
        self._keys, self._queries, self._values = keys, queries, values
        self._attention = attention
        self.size, self.grid, self.times = size, grid, times
        self.visual, self.text, self.valid = visual, text, valid
        self._before = before
        self._protected = protected
        self.rope, self._scale, self.proportional = rope, scale, proportional
        self._rotated = rotated
        self._softcap, self.causal, self.mask = softcap, causal, mask
        self.prompt, self._norm = prompt, norm
        self._films, self.history, self._marks = films, history, marks
        self.earlier, self._pixels = earlier, pixels
        self._map: Tensor | None = None
        self.layer, self.depth = layer, depth
        self.entry = length(x) if entry is None else entry
        self.text_valid: Tensor | None = None
        self.crops: tuple[int, int] | None = None
        self._clip: tuple[Tensor, Tensor] | None = None
        self.cls = self.prefix > 0 if cls is None else cls

    # -- shapes --------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def n(self) -> int:
        """Number of tokens N."""
        return length(self.x)

    @property
    def prefix(self) -> int:
        """Number of protected leading tokens; 0 when protection is a mask."""
        return self._protected if isinstance(self._protected, int) else 0

    def fixed(self) -> Tensor | None:
        """(B,N) bool of the tokens that must stay and must not absorb others, or None when there is none."""
        masks = []
        if isinstance(self._protected, Tensor):
            masks.append(self._protected.bool().expand(self.batch, -1))
        elif self._protected:
            masks.append((torch.arange(self.n, device=self.x.device) < self._protected).expand(self.batch, -1))
        if self.visual is not None:
            masks.append(~self.visual.bool())
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] | masks[1]

    def last(self) -> Tensor:
        """(B,1): index of the last token that is there, the row that language-stage methods read."""
        if self.valid is None:
            return torch.full((self.batch, 1), self.n - 1, device=self.x.device)
        position = torch.arange(self.n, device=self.x.device)
        return (position * self.valid).argmax(1, keepdim=True)

    def visual_entry(self) -> Tensor:
        """(B,1): visual tokens of every sample at the entry of the language model; those present without a prompt."""
        visual = self.visual if self.prompt is None else self.prompt.visual
        if visual is None:
            raise ValueError("the evidence marks no visual tokens: give Evidence(visual=...) with a bool mask (B,N)")
        return visual.sum(1, keepdim=True)

    def free(self) -> int:
        """How many tokens of a sample may go (the smallest number over the batch when masks differ)."""
        if self.visual is None and isinstance(self._protected, int):
            return self.n - self._protected
        fixed = self.fixed()
        return self.n if fixed is None else int((~fixed).sum(1).min())

    # -- visual tokens behind a vision tower, see tokenreduce.visual.Visual ------------------------------------------
    def tower(self, look: Look = None) -> Evidence:
        """Evidence of a block of the vision tower for the same tokens; plain evidence stands for every block."""
        return self

    def per_token(self, score: Callable[[Evidence], Tensor]) -> Tensor:
        """``score`` (B,N,...) of this evidence, where a tower is behind it computed on its patches and taken to the
        tokens: softmax, and means over queries, then are those of the tower."""
        return score(self)

    def of_pixels(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,N) for the tokens behind the prefix: ``score`` makes (B,T,n) of the pixels (B,T,n,P) of T frames, where
        tokens are made of patches computed on these."""
        pixels = self._need(self._pixels, "pixels")
        return score(pixels.reshape(self.batch, self.frames, -1, pixels.shape[-1])).flatten(1)

    def pooling(self) -> tuple[Tensor, Tensor] | None:
        """The pooling head of the vision tower: (B,N) attention of its query to the tokens behind the prefix, mean
        over heads, and (B,T,C) what it makes of every view; None where a tower has none or nobody asked."""
        return None

    @property
    def features(self) -> Tensor:
        """(B,N,C) what enters the projector; ``x`` where nothing else is known."""
        return self.x

    @property
    def projected(self) -> Tensor:
        """(B,N,D) embeddings behind the projector, of the tokens behind the prefix."""
        return self.x[:, self.prefix :]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the grid that the tokens behind the prefix lie on. Raises ``ValueError`` when unknown."""
        if self.grid is not None:
            return self.grid[-2], self.grid[-1]
        side = math.isqrt(self.n - self.prefix)
        if side * side != self.n - self.prefix:
            raise ValueError(f"{self.n - self.prefix} tokens are no square grid: give Evidence(grid=(rows, columns))")
        return side, side

    @property
    def place(self) -> Tensor:
        """(N,2) row and column of every token behind the prefix on :attr:`shape`."""
        at = torch.arange(self.n - self.prefix, device=self.x.device)
        return torch.stack([at // self.shape[1] % self.shape[0], at % self.shape[1]], 1)

    @property
    def view(self) -> Tensor:
        """(N,) 0-based view (overview, crop, frame) of every token behind the prefix."""
        return torch.zeros(self.n - self.prefix, dtype=torch.long, device=self.x.device)

    @property
    def frames(self) -> int:
        """Number of frames, which have as many tokens each: T of a grid (T,rows,columns), 1 without one."""
        return self.grid[0] if self.grid is not None and len(self.grid) == 3 else 1

    @property
    def clip(self) -> tuple[Tensor, Tensor]:
        """Patches (B,N,E) and question (B,M,E) in the joint space of a CLIP model."""
        if self._clip is None:
            raise ValueError("this method needs clip, which the evidence lacks: name a CLIP model in its setting clip")
        return self._clip

    def _masks(self) -> bool:
        """Whether protection differs over samples, or is more than a prefix."""
        return isinstance(self._protected, Tensor) or self.visual is not None

    def tokens_at(self, row: int, where: Tensor) -> Evidence:
        """Evidence of the tokens ``where`` (K,) of one sample, none of them protected."""

        def heads(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[row : row + 1, :, where]

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[row : row + 1, where]

        def alone(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[row : row + 1]

        given = self._attention
        out = Evidence(
            self.x[row : row + 1, where], heads(self._keys), heads(self._queries),
            None if given is None else given[row : row + 1, :, :, where], rows(self.size), values=heads(self._values),
            before=rows(self._before), text=alone(self.text), times=rows(self.times), cls=False, rope=self.rope,
            pixels=None if self._pixels is None else self._pixels[row : row + 1, where - self.prefix],
            grid=self.grid if self.grid is not None and math.prod(self.grid) == len(where) else None,
            scale=self._scale, layer=self.layer, depth=self.depth,
        )  # fmt: skip
        out.text_valid = alone(self.text_valid)
        if self._clip is not None:
            out._clip = (self._clip[0][row : row + 1, where], self._clip[1][row : row + 1])
        return out

    def batch_rows(self, rows: Tensor) -> Evidence:
        """The same evidence for some samples of the batch, ``rows`` (R,)."""

        def pick(t: Any) -> Any:
            return t[rows] if isinstance(t, Tensor) and t.dim() > 1 and t.shape[0] == self.batch else t

        out: Evidence = object.__new__(type(self))
        out.__dict__.update({name: pick(value) for name, value in self.__dict__.items()})
        if self._rotated is not None:
            out._rotated = (pick(self._rotated[0]), pick(self._rotated[1]))
        if self._clip is not None:
            out._clip = (pick(self._clip[0]), pick(self._clip[1]))
        out._map = None
        return out

    # -- what the model computed -----------------------------------------------------------------------------------
    def _need(self, value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise ValueError(f"this method needs {name}, which the evidence lacks: give Evidence({name}=...)")
        return value

    @property
    def keys(self) -> Tensor:
        return self._need(self._keys, "keys")

    @property
    def queries(self) -> Tensor:
        return self._need(self._queries, "queries")

    @property
    def values(self) -> Tensor:
        return self._need(self._values, "values")

    @property
    def before(self) -> Tensor:
        return self._need(self._before, "before")

    @property
    def films(self) -> Tensor:
        return self._need(self._films, "films")

    @property
    def marks(self) -> Tensor:
        return self._need(self._marks, "marks")

    @property
    def normed(self) -> Tensor:
        """(B,N,C): the features behind the final norm of the language model."""
        if self._norm is None:
            raise ValueError("this method needs norm, which the evidence lacks: give Evidence(norm=...)")
        return self._norm(self.x)

    def attention(self, rows: Rows = "cls") -> Tensor:
        """Softmax rows (B,H,R,N) in float32 for a few queries: "cls" (row 0), "all", or indices (R,) or (B,R).

        Computed from queries and keys with the log-size bias and the validity mask of the model; precomputed rows
        given to the constructor are returned as they are.
        """
        if self._attention is not None:
            return self._attention.float()
        q, k = (self.queries, self.keys) if self._rotated is None else self._rotated
        if isinstance(rows, str) and rows == "all" and self._map is not None:
            return self._map
        where = torch.arange(self.n, device=q.device).unsqueeze(0)
        if isinstance(rows, Tensor):
            where = rows if rows.dim() == 2 else rows.unsqueeze(0)
            index = where[:, None, :, None].expand(q.shape[0], q.shape[1], -1, q.shape[-1])
            q = q.gather(2, index)
        elif rows == "cls":
            if not self.cls:
                raise ValueError("the model has no class token to take attention from")
            where, q = where[:, :1], q[:, :, :1]
        elif rows != "all":
            raise ValueError(f"rows is 'cls', 'all' or token indices, not {rows!r}")
        if k.shape[1] != q.shape[1]:  # grouped queries: every key head serves several query heads
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if self._scale is None else self._scale
        with torch.autocast(q.device.type, enabled=False):  # a ranking must not be rounded to half precision
            logits = (q.float() * scale) @ k.float().transpose(-2, -1)
        if self._softcap is not None:
            logits = (logits / self._softcap).tanh() * self._softcap
        if self.mask is not None:
            seen = self.mask.expand(q.shape[0], 1, -1, -1)
            if isinstance(rows, Tensor) or rows != "all":
                seen = seen.gather(2, where[:, None, :, None].expand(q.shape[0], 1, -1, self.n))
            logits = logits.masked_fill_(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen.float()
        elif self.causal:
            later = torch.arange(self.n, device=q.device) > where.unsqueeze(-1)
            logits = logits.masked_fill_(later.unsqueeze(1), float("-inf"))
        bias = self.key_bias()
        out = (logits if bias is None else logits + bias).softmax(-1)
        if isinstance(rows, str) and rows == "all":
            self._map = out  # an adapter that reduces the map itself must not compute it twice
        return out

    @property
    def heads(self) -> int:
        """Number of heads that attention rows have; grouped queries count each."""
        return (self.queries if self._attention is None else self._attention).shape[1]

    def head(self, h: int) -> Evidence:
        """The same evidence for one of :attr:`heads`, where all of them at once would take too much memory."""

        def pair(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            own = h * k.shape[1] // q.shape[1]
            return q[:, h : h + 1], k[:, own : own + 1]

        out: Evidence = object.__new__(type(self))
        out.__dict__.update(self.__dict__)
        out._map = None
        if self._attention is not None:
            out._attention = self._attention[:, h : h + 1]
        else:
            out._queries, out._keys = pair(self.queries, self.keys)
            out._rotated = None if self._rotated is None else pair(*self._rotated)
        return out

    def key_bias(self) -> Tensor | None:
        """(B,1,1,N) float32 added to attention logits: log size, and -inf for tokens that are not there."""
        bias = None
        if self.size is not None and self.proportional:
            bias = self.size.float().log()
        if self.valid is not None:
            bias = torch.zeros(self.valid.shape, device=self.valid.device) if bias is None else bias
            bias = bias.masked_fill(~self.valid, float("-inf"))
        return None if bias is None else bias[:, None, None, :]

    # -- messages --------------------------------------------------------------------------------------------------
    def note(self, detail: str, brief: str) -> None:
        """Report that a setting was clamped: ``detail`` goes to an active trace, else ``brief`` to ``warnings``."""
        if torch.compiler.is_compiling():
            return
        from tokenreduce.trace import active

        trace = active()
        if trace is not None:
            trace.note(detail)
        else:
            warnings.warn(brief, stacklevel=4)
