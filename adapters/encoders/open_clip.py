"""open_clip's own ``VisionTransformer``, alone or inside ``CLIP``, ``CustomTextCLIP`` and ``CoCa``.

Both kinds of block are known: ``ResidualAttentionBlock`` with ``nn.MultiheadAttention`` and
``CustomResidualAttentionBlock`` with open_clip's ``Attention`` (qk-norm, head scale, inner norm, ``scale_attn``,
``scale_fc``); the attention is in :mod:`tokenreduce.adapters.encoders.open_clip_attention`. Text towers and decoders
are made
of the same blocks and are left alone. A timm tower inside open_clip (``TimmModel.trunk``) belongs to the timm adapter.
What leaves a reduced tower is the matter of :mod:`tokenreduce.adapters.encoders.open_clip_model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Ask, Attended, asks
from tokenreduce.adapters.encoders.block import Reduced
from tokenreduce.adapters.encoders.open_clip_attention import SEQUENCE_FIRST, listen, show
from tokenreduce.adapters.encoders.open_clip_model import PREFIX, attach_model
from tokenreduce.adapters.encoders.stock import refuse_own
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "towers"]

EVIDENCE = ("keys", "queries", "values", "attention", "before")


# -- blocks ----------------------------------------------------------------------------------------------------------
def _alone(*others: Tensor | None) -> None:
    if any(other is not None for other in others):
        raise ValueError("a patched block takes one input and no attn_mask: token counts change; call tr.unpatch first")


class _ClipBlock(Reduced):
    """What both kinds of block share."""

    attn: Any

    def _normed(self, x: Tensor) -> Tensor:
        return self.ln_1(x)  # type: ignore[attr-defined]

    def _project(self, x: Tensor, context: Any) -> Attended:
        return Attended(x, *show(self.attn, self._normed(x)))

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.ls_1(out)  # type: ignore[attr-defined]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.ls_2(self.mlp(self.ln_2(x)))  # type: ignore[attr-defined]


class ReducedAttentionBlock(_ClipBlock, ResidualAttentionBlock):
    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        _alone(k_x, v_x, attn_mask)
        return self._run(q_x)

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        if not asks(bias, needs):
            return Attended(self.attention(self._normed(x)))
        return self._asked(x, Ask(bias, needs))

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        return self._asked(x, Ask(given=attention))

    def _asked(self, x: Tensor, ask: Ask) -> Attended:
        refuse_own(self, "attention")
        refuse_own(self.attn)
        y = self._normed(x)
        return ask.answer(self.attn(y, y, y, need_weights=False, attn_mask=None, tokenreduce_ask=ask)[0])


class ReducedCustomAttentionBlock(_ClipBlock, CustomResidualAttentionBlock):
    def forward(self, x: Tensor, *others: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        # open_clip's checkpointing passes the arguments of the other kind of block to this one, too.
        _alone(*others, attn_mask)
        return self._run(x)

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        if not asks(bias, needs):
            return Attended(self.ln_attn(self.attn(self._normed(x), attn_mask=None)))
        return self._asked(x, Ask(bias, needs))

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        return self._asked(x, Ask(given=attention))

    def _asked(self, x: Tensor, ask: Ask) -> Attended:
        refuse_own(self.attn)
        got = ask.answer(self.attn(self._normed(x), attn_mask=None, tokenreduce_ask=ask))
        return got._replace(out=self.ln_attn(got.out))


BLOCKS: dict[type, type] = {
    ResidualAttentionBlock: ReducedAttentionBlock,
    CustomResidualAttentionBlock: ReducedCustomAttentionBlock,
}


# -- finding and attaching ------------------------------------------------------------------------------------------
def towers(model: nn.Module) -> Iterator[Tower]:
    """open_clip's own vision towers inside ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            blocks = tuple(module.transformer.resblocks)
            yield Tower(
                name,
                module,
                "open_clip VisionTransformer",
                blocks,
                BLOCKS,
                PREFIX,
                True,
                module.grid_size,
                (*EVIDENCE, "pixels"),
            )


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into an open_clip tower.

    Raises ``TypeError`` for scaled cosine attention, sequence-first transformers, and block, attention or pooler
    classes that are not known, ``ValueError`` where methods of them were replaced.
    """
    model: Any = tower.module
    if not getattr(model.transformer, "batch_first", True):
        raise TypeError(f"{tower.family}: {SEQUENCE_FIRST}")
    kinds = [type(block) for block in tower.blocks]
    attach_tower(tower, reducers, undo)
    for block, kind in zip(tower.blocks, kinds, strict=True):
        listen(block, kind, tower.family, undo)
    attach_model(tower, reducers, undo)
