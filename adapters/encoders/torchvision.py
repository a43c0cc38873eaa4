"""torchvision's ``VisionTransformer``: blocks with ``nn.MultiheadAttention``, images of one size, and a class token
that the head reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from tokenreduce.adapters.encoders.ask import Ask, Attended, asks
from tokenreduce.adapters.encoders.block import Reduced
from tokenreduce.adapters.encoders.multihead import listen_multihead, split
from tokenreduce.adapters.encoders.state import Entry, carry_state, note_entry
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_pre_hooks
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "refusal", "towers"]

EVIDENCE = ("keys", "queries", "values", "attention", "before")


class ReducedEncoderBlock(Reduced, EncoderBlock):
    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        if asks(bias, needs):
            return self._asked(x, Ask(bias, needs))
        y = self.ln_1(x)
        return Attended(self.self_attention(y, y, y, need_weights=False)[0])

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        return self._asked(x, Ask(given=attention))

    def _asked(self, x: Tensor, ask: Ask) -> Attended:
        refuse_own(self.self_attention)
        y = self.ln_1(x)
        return ask.answer(self.self_attention(y, y, y, need_weights=False, tokenreduce_ask=ask)[0])

    def _project(self, x: Tensor, context: Any) -> Attended:
        refuse_pre_hooks(self.self_attention)
        return Attended(x, *split(self.self_attention, self.ln_1(x)))

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self.dropout(out) + x

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


def towers(model: nn.Module) -> Iterator[Tower]:
    """torchvision's vision transformers inside ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            side = module.image_size // module.patch_size
            yield Tower(
                name, module, "torchvision VisionTransformer", tuple(module.encoder.layers),
                {EncoderBlock: ReducedEncoderBlock}, 1, True, (side, side), EVIDENCE, resizes=False,
            )  # fmt: skip


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into such a tower.

    Raises ``TypeError`` for block or attention classes that are not known, ``ValueError`` where methods of them were
    replaced.
    """
    model: Any = tower.module
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            raise ValueError(f"{tower.family} cannot be resized here: it takes images of one size")
    attach_tower(tower, reducers, undo)
    for block in tower.blocks:
        attention: Any = block
        listen_multihead(attention.self_attention, tower.family, undo)
    undo.pre_hook(tower.blocks[0], functools.partial(note_grid, grid=tower.grid))
    undo.hook(model.encoder.ln, carry_state)


def note_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, grid: tuple[int, ...] | None
) -> None:
    """Pre-hook on the first block: images are of one size, and so is their grid of patches."""
    note_entry(args[0], Entry(grid))


def refusal(module: nn.Module) -> str | None:
    """Why a model of torchvision cannot be reduced, None where nothing is known of it."""
    kind = type(module)
    if isinstance(module, SwinTransformer | MaxVit):
        why = "a hierarchical model lays its tokens out on a grid between stages, so single tokens cannot go"
    elif kind.__module__.startswith("torchvision.models.") and not isinstance(module, VisionTransformer):
        why = "it has no transformer blocks whose tokens could go"
    else:
        return None
    return f"{kind.__name__} is not supported: {why}"
