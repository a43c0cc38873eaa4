"""Plain evidence by hand, for research: one class that answers what methods of every stage ask."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch import Tensor

from tokenreduce.core.evidence.attention import Attention
from tokenreduce.core.evidence.diffusion import DiffusionEvidence
from tokenreduce.core.evidence.encoder import EncoderEvidence
from tokenreduce.core.evidence.language import Earlier, LanguageEvidence, Prompt
from tokenreduce.core.evidence.pairs import Joint, Through
from tokenreduce.core.evidence.visual import VisualEvidence

__all__ = ["Evidence"]


class Evidence(EncoderEvidence, VisualEvidence, LanguageEvidence, DiffusionEvidence):
    """Evidence made by hand: ``tr.ToMe(r=13).plan(tr.Evidence(x, keys=k, protected=1))``.

    Only ``x`` must be given; a method that asks for what is missing raises ``ValueError`` that names it. Adapters make
    the class of their stage instead.

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
        valid, cls, layer, depth, entry: see :class:`BaseEvidence`; by default token 0 is a class token when something
            is protected.
        rope, rotated, scale, proportional, causal, softcap, mask: see
            :class:`~tokenreduce.core.evidence.attention.Attention`.
        before, origin: see :class:`EncoderEvidence` and :class:`LanguageEvidence`.
        prompt, norm, frame_of, place_of, history, scores, earlier, held: see :class:`LanguageEvidence`.
        text_valid, pixels, clip, crops, through, segments: see :class:`VisualEvidence`.
        timestep: see :class:`DiffusionEvidence`.
        films, marks: what ``frame_of`` and ``scores`` were called before.
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
        proportional: float = True,
        causal: bool = False,
        softcap: float | None = None,
        mask: Tensor | None = None,
        layer: int = 0,
        depth: int = 1,
        entry: int | None = None,
        prompt: Prompt | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        frame_of: Tensor | None = None,
        history: Tensor | None = None,
        scores: Tensor | None = None,
        earlier: Earlier | None = None,
        text_valid: Tensor | None = None,
        pixels: Tensor | None = None,
        clip: Joint | tuple[Tensor, Tensor] | None = None,
        crops: tuple[int, int] | None = None,
        films: Tensor | None = None,
        marks: Tensor | None = None,
        place_of: Tensor | None = None,
        held: Tensor | None = None,
        through: Through | tuple[Tensor, Callable[[Tensor], Tensor]] | None = None,
        origin: Tensor | None = None,
        timestep: Tensor | float | None = None,
        segments: Tensor | None = None,
    ) -> None:
        if films is not None or marks is not None:
            warnings.warn("films is frame_of now, and marks is scores", DeprecationWarning, stacklevel=2)
            frame_of, scores = films if frame_of is None else frame_of, marks if scores is None else scores
        if cls is None:
            cls = isinstance(protected, int) and protected > 0
        rows = Attention(
            queries,
            keys,
            values,
            attention,
            rotated,
            rope,
            scale,
            softcap,
            causal,
            mask,
            size,
            valid,
            proportional,
            cls,
        )
        super().__init__(
            x, rows, size=size, protected=protected, grid=grid, valid=valid, cls=cls, layer=layer, depth=depth,
            entry=entry, before=before, text=text, text_valid=text_valid, times=times, crops=crops, clip=clip,
            pixels=pixels, visual=visual, prompt=prompt, norm=norm, frame_of=frame_of, history=history, scores=scores,
            earlier=earlier, place_of=place_of, held=held, through=through, origin=origin, timestep=timestep,
            segments=segments,
        )  # fmt: skip

    def samples(self, rows: Tensor) -> Evidence:
        def some(t: Tensor) -> Tensor:
            return t[rows]

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else some(t)

        seen, protected = self.attention.samples(rows), self.protected
        if isinstance(protected, Tensor) and protected.dim() == 2:
            protected = protected[rows]
        text = self.text if self.text is None or self.text.dim() < 2 else self.text[rows]
        prompt, earlier = self.prompt, self.earlier
        return Evidence(
            self.x[rows], seen.k, seen.q, seen.given, pick(self.size), protected, self.grid, pick(self.times),
            pick(self.visual), text, values=seen.v, valid=pick(self.valid), before=pick(self._before), cls=self.cls,
            rope=seen.rope, rotated=seen.rotated, scale=seen.scale, proportional=seen.proportional, causal=seen.causal,
            softcap=seen.softcap, mask=seen.mask, layer=self.layer, depth=self.depth, entry=self.entry,
            prompt=None if prompt is None else Prompt(prompt.visual[rows], pick(prompt.valid), pick(prompt.x)),
            norm=self._norm, frame_of=pick(self._frame_of), history=pick(self.history), scores=pick(self._scores),
            earlier=None if earlier is None else Earlier(earlier.attention[rows], earlier.stay[rows]),
            text_valid=pick(self.text_valid), pixels=pick(self._pixels), crops=self.crops,
            place_of=pick(self._place_of), held=pick(self.held), origin=pick(self.origin),
            through=None if self._through is None else self._through.cut(some), timestep=self.timestep,
            clip=None if self._clip is None else self._clip.cut(some, some), segments=pick(self._segments),
        )  # fmt: skip

    def tokens_at(self, row: int, where: Tensor) -> Evidence:
        """Evidence of the tokens ``where`` (K,) of one sample, none of them protected."""

        def one(t: Tensor) -> Tensor:
            return t[row : row + 1]

        def here(t: Tensor) -> Tensor:
            return one(t)[:, where]

        def behind(t: Tensor) -> Tensor:
            return one(t)[:, where - self.prefix]

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else here(t)

        def alone(t: Tensor | None) -> Tensor | None:
            return None if t is None else one(t)

        seen = self.attention.tokens(row, where)
        return Evidence(
            self.x[row : row + 1, where], seen.k, seen.q, seen.given, rows(self.size), values=seen.v,
            before=rows(self._before), text=alone(self.text), text_valid=alone(self.text_valid), times=rows(self.times),
            through=None if self._through is None else self._through.cut(behind),
            pixels=None if self._pixels is None else behind(self._pixels),
            grid=self.grid if self.grid is not None and math.prod(self.grid) == len(where) else None, cls=False,
            clip=None if self._clip is None else self._clip.cut(here, one),
            rope=seen.rope, scale=seen.scale, layer=self.layer, depth=self.depth,
        )  # fmt: skip
