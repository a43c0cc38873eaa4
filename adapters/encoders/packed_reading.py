"""Layers on packed rows, read instead of listed: as :mod:`tokenreduce.adapters.encoders.hf_reading` does for batches.

The trial row is two images, so that what is read holds for attention cut into windows as well: tokens of one image are
hidden from it, or left out, and both must be the same.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import calling
from tokenreduce.adapters.encoders.hf_reading import TOKENS, Reading, UnlikeError
from tokenreduce.adapters.encoders.hf_structure import RECIPE, ROTARY, Recipe, StructuredLayer, hear
from tokenreduce.adapters.encoders.packed_call import RowCall
from tokenreduce.core.mixing import mixed
from tokenreduce.core.undo import Undo

__all__ = ["BOUNDS", "LONGEST", "FlatReading", "RowReading"]

#: The argument that cuts a row into windows.
BOUNDS = "cu_seqlens"
#: The argument that says how long the longest is, None where that is to be counted.
LONGEST = "max_seqlen"
_CUT = 4


class RowReading(Reading):
    """A layer on one row of tokens (1,P,C)."""

    def _tokens(self, generator: torch.Generator) -> Tensor:
        return torch.randn(1, TOKENS, self.width, generator=generator)

    def _given(self, generator: torch.Generator) -> dict[str, Any]:
        given = super()._given(generator)
        if BOUNDS in self.arguments or BOUNDS in self._asks():
            given[BOUNDS] = torch.tensor([0, _CUT, TOKENS], dtype=torch.int32)
            if LONGEST in self._asks():
                given[LONGEST] = None
        elif "attention_mask" in self.arguments:
            given["attention_mask"] = _apart(torch.tensor([0, _CUT, TOKENS]))
        else:
            raise UnlikeError("nothing that it is given keeps the images of a row apart")
        return given

    def _checked(self, recipe: Recipe, want: Tensor) -> Recipe:
        layer, undo = self.layer, Undo()
        if not hasattr(self.core, "config") or not hasattr(
            sys.modules[type(self.core).__module__], "eager_attention_forward"
        ):
            raise UnlikeError("its attention does not look its function up in transformers' registry")
        hear(self.core, undo, {})
        recipe = replace(recipe, carries="context", mask=self._mask(), flat=self.x.dim() == 2)
        layer.__dict__[RECIPE] = recipe
        layer.__class__ = mixed(type(layer), StructuredLayer)
        try:
            self._check(want)
        finally:
            del layer.__dict__[RECIPE]
        return recipe

    def _mask(self) -> str | None:
        """How the attention gets the mask of a row that is not cut; it was one among what is passed."""
        return "keyword" if self.given.get("attention_mask") is not None else None

    def _check(self, want: Tensor) -> None:
        if not torch.equal(self._run(self.x, self.given, None), want):
            raise UnlikeError("computing by its parts gives something else")
        call = RowCall(self.given.get("attention_mask"), record=True)
        if not torch.equal(self._run(self.x, self.given, call), want):
            raise UnlikeError("watching its attention changes it")
        call.gather()
        if call.keys is None or call.keys.dim() != 3 or len(call.keys) != TOKENS:
            raise UnlikeError("its attention shows no keys of single tokens")
        left = torch.tensor([0, 1, 3, 5])
        hidden = torch.zeros(TOKENS).index_fill(0, torch.tensor([2, 4]), float("-inf"))
        mask = self.given.get("attention_mask")
        seen = RowCall(None if mask is None else mask + hidden, hidden)
        masked = self._run(self.x, self.given, seen)[..., left, :]
        fewer = self._run(self.x[..., left, :], self._of(left), None)
        if not torch.allclose(masked, fewer, rtol=1e-3, atol=1e-4 * float(fewer.abs().max())):
            raise UnlikeError(
                "hiding a token from its attention is something else than leaving it out (it counts places by itself)"
            )

    def _of(self, left: Tensor) -> dict[str, Any]:
        """What the layer is given where the tokens ``left`` are: three of the first image and one of the second."""
        bounds = torch.tensor([0, 3, 4])
        out = dict(self.given)
        if out.get("attention_mask") is not None:
            out["attention_mask"] = _apart(bounds)
        if BOUNDS in out:
            out[BOUNDS] = bounds.int()
        if ROTARY in out:
            out[ROTARY] = tuple(t[left] for t in out[ROTARY])
        return out

    @torch.no_grad()
    def _run(self, x: Tensor, given: dict[str, Any], call: RowCall | None) -> Tensor:
        mask = given.get("attention_mask")
        given = {k: v for k, v in given.items() if k != "attention_mask"}
        with calling(call):
            out = self.layer._call(x, mask if call is None else call, given)
        done: Tensor = self.layer._feed_forward(self.layer._residual(x, out))
        return done


class FlatReading(RowReading):
    """The same of tokens (P,C)."""

    def _tokens(self, generator: torch.Generator) -> Tensor:
        return torch.randn(TOKENS, self.width, generator=generator)


def _apart(bounds: Tensor) -> Tensor:
    """The mask (1,1,P,P) of images that do not see each other."""
    image = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    apart = image[:, None] != image
    return torch.zeros(apart.shape).masked_fill(apart, torch.finfo(torch.float32).min)[None, None]
