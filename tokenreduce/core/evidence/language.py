"""Evidence inside a language model: a sequence of text and visual tokens, of which only the visual ones may go."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.core.evidence.attention import need
from tokenreduce.core.evidence.base import BaseEvidence

__all__ = ["Earlier", "LanguageEvidence", "Prompt"]


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


class LanguageEvidence(BaseEvidence):
    """Evidence before a decoder layer, see :class:`BaseEvidence`.

    Args:
        visual: (B,N) bool marks the visual tokens; only those may go.
        prompt: the sequence at the entry of the language model, before any layer dropped something.
        norm: the final norm of the language model, for methods that compare normed features.
        frame_of: (B,N,4) number of the video that a token comes from, first and last frame that it stands for, and its
            place within a frame; -1 for text and pictures.
        place_of: (B,N,6) number of the image (frame with text around it, video) within the sample that a token comes
            from, its plane (0 the overview or the only one, 1 all crops together; frames count up), row and column on
            that, its number among the image's tokens, and how many these are; -1 for text. Of what stands for several,
            the place that it kept.
        history: (B,layer+1) visual tokens that were there before each layer up to this one made its choice.
        scores: (B,N) what the method scored by what the vision tower saw, see
            :meth:`tokenreduce.Reducer.tower_scores`; a token that stands for several has the highest of theirs, text 0.
        earlier: in a decode step, what the method saw and chose in the one before; None in the first.
        held: (B,N) bool, in a decode step, the tokens of the prompt that the choice left which holds so far; None in
            prefill.
        before: (B,N,C) what entered the layer before, of the same tokens.
    """

    def __init__(
        self,
        x: Tensor,
        *args: Any,
        visual: Tensor | None = None,
        prompt: Prompt | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        frame_of: Tensor | None = None,
        history: Tensor | None = None,
        scores: Tensor | None = None,
        earlier: Earlier | None = None,
        before: Tensor | None = None,
        place_of: Tensor | None = None,
        held: Tensor | None = None,
        **core: Any,
    ) -> None:
        super().__init__(x, *args, **core)
        self.visual, self.prompt, self.history, self.earlier = visual, prompt, history, earlier
        self.held = held
        self._norm, self._frame_of, self._scores = norm, frame_of, scores
        self._before, self._place_of = before, place_of

    def _mixed(self) -> bool:
        return self.visual is not None

    def fixed(self) -> Tensor | None:
        fixed = super().fixed()
        if self.visual is None:
            return fixed
        return ~self.visual.bool() if fixed is None else fixed | ~self.visual.bool()

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

    @property
    def before(self) -> Tensor:
        return need(self._before, "before")

    @property
    def frame_of(self) -> Tensor:
        return need(self._frame_of, "frame_of")

    @property
    def place_of(self) -> Tensor:
        return need(self._place_of, "place_of")

    @property
    def scores(self) -> Tensor:
        return need(self._scores, "scores")

    @property
    def films(self) -> Tensor:
        """The old name of :attr:`frame_of`."""
        warnings.warn("evidence.films is evidence.frame_of now", DeprecationWarning, stacklevel=2)
        return self.frame_of

    @property
    def marks(self) -> Tensor:
        """The old name of :attr:`scores`."""
        warnings.warn("evidence.marks is evidence.scores now", DeprecationWarning, stacklevel=2)
        return self.scores

    @property
    def normed(self) -> Tensor:
        """(B,N,C): the features behind the final norm of the language model."""
        if self._norm is None:
            raise ValueError("this method needs norm, which the evidence lacks: give Evidence(norm=...)")
        return self._norm(self.x)
