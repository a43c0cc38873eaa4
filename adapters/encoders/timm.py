"""timm ``VisionTransformer`` and ``Eva`` (EVA02, DINOv3, RoPE ViTs): their blocks.

Attention modules are in :mod:`tokenreduce.adapters.encoders.timm_attention`, what stands around the blocks in
:mod:`tokenreduce.adapters.encoders.timm_model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Ask, Attended, asks
from tokenreduce.adapters.encoders.block import Reduced
from tokenreduce.adapters.encoders.state import State, set_state
from tokenreduce.adapters.encoders.stock import refuse_hooks, refuse_own
from tokenreduce.adapters.encoders.timm_attention import attend, listen, project, scores
from tokenreduce.adapters.encoders.timm_model import attach_model, attach_resize
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "towers"]

EVIDENCE = ("keys", "queries", "values", "attention", "before")


def _rope_rows(rope: Tensor | None, state: State, prefix: int) -> Tensor | None:
    """Rows of the rotary table for the tokens that are left: each stands at its representative's place."""
    if rope is None or state.origin is None:
        return rope
    rows = state.origin[:, prefix:] - prefix  # (B,K)
    if rope.dim() == 2:  # (N,D)
        return rope[rows].unsqueeze(1)
    if rope.dim() == 3:  # (H,N,D), one table per head (mixed RoPE)
        return rope[:, rows].transpose(0, 1)
    index = rows[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])  # (B,1 or H,N,D)
    return rope.gather(2, index)


# -- blocks ----------------------------------------------------------------------------------------------------------
class _TimmBlock(Reduced):
    """Blocks with one attention module ``attn`` and a forward of ``(x, attn_mask, is_causal)``."""

    attn: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            _no_mask(attn_mask, is_causal)
        state = self._quiet(x)
        return self._run(x) if state is None else set_state(super().forward(x), state)  # type: ignore[misc]

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm1(x)  # type: ignore[attr-defined]

    def _stock(self, context: Any) -> dict[str, Any]:
        """What the stock block gives its attention besides features."""
        return {"attn_mask": None}

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        ask = Ask(bias, needs) if bias is not None or asks(bias, needs) else None
        return attend(self.attn, self._normed(x), ask, **self._stock(context))

    def _project(self, x: Tensor, context: Any) -> Attended:
        return project(self.attn, self._normed(x), context)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        return attend(self.attn, self._normed(x), Ask(given=attention), **self._stock(context))


def _no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a patched model takes no attn_mask or is_causal: token counts change; call tr.unpatch first")


class ReducedBlock(_TimmBlock, Block):
    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        ask = Ask(bias, needs) if bias is not None or asks(bias, needs) else None
        return attend(self.attn, self.norm1(x), ask, attn_mask=None)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducedResPostBlock(_TimmBlock, ResPostBlock):
    def _normed(self, x: Tensor) -> Tensor:
        return x

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.norm1(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducedEvaBlock(_TimmBlock, EvaBlock):
    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _no_mask(attn_mask, is_causal)
        return self._run(x, rope)

    def _stock(self, context: Any) -> dict[str, Any]:
        return {"rope": context, **super()._stock(context)}

    def _context(self, context: Any, state: State) -> Any:
        return _rope_rows(context, state, self.attn.num_prefix_tokens)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class ReducedEvaBlockPostNorm(ReducedEvaBlock, EvaBlockPostNorm):  # type: ignore[misc]
    """The norm ends a branch."""

    def _normed(self, x: Tensor) -> Tensor:
        return x

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.norm1(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducedParallelScalingBlock(_TimmBlock, ParallelScalingBlock):
    """Attention and MLP share one projection, so nothing can happen between them: both see N tokens, the plan is
    applied to their common output."""

    _one_branch = True

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        x = self.in_norm(x)
        zero = getattr(self, "qkv_bias", None)
        if self.mlp_bias is not None and zero is not None:
            # Early timm: zeros for queries, keys and values, then the MLP's bias, in this order on (mlp, q, k, v).
            x = F.linear(x, self.in_proj.weight, torch.cat((zero, self.mlp_bias)))
            mlp, q, k, v = torch.split(x, self.in_split, dim=-1)
        else:
            mlp, q, k, v = torch.split(self.in_proj(x), self.in_split, dim=-1)
            mlp = mlp if self.mlp_bias is None else mlp + self.mlp_bias
        shape = (b, n, self.num_heads, self.head_dim)
        q, k = self.q_norm(q.view(shape)).transpose(1, 2), self.k_norm(k.view(shape)).transpose(1, 2)
        return mlp, q, k, v.view(shape).transpose(1, 2)

    def _join(self, x: Tensor, heads: Tensor, mlp: Tensor) -> Tensor:
        out = heads.transpose(1, 2).reshape(x.shape)
        mlp = self.mlp_drop(self.mlp_act(mlp))
        if (joint := getattr(self, "out_proj", None)) is not None:  # early timm has the other two alone
            return joint(torch.cat((out, mlp), dim=-1))
        return self.attn_out_proj(out) + self.mlp_out_proj(mlp)  # type: ignore[misc]

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        mlp, q, k, v = self._split(x)
        return Attended(self._join(x, scores(q, k, v, bias, self), mlp), q, k, v)

    def _project(self, x: Tensor, context: Any) -> Attended:
        _, q, k, v = self._split(x)
        return Attended(x, q, k, v)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        mlp, _, _, v = self._split(x)
        return Attended(self._join(x, self.attn_drop(attention) @ v, mlp), values=v)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path(self.ls(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x


class ReducedParallelThingsBlock(_TimmBlock, ParallelThingsBlock):
    """Several attentions, then several MLPs: the plan stands between the two sums. Methods see the heads of all
    attentions side by side, so that means over heads are means over all of them."""

    def _branches(self, x: Tensor, one: Any) -> list[Attended]:
        for branch in self.attns:
            refuse_hooks(branch, "because a method acts between its parts and the next branch's")
        return [one(branch.attn, branch.norm(x)) for branch in self.attns]  # type: ignore[operator]

    def _stacked(self, got: list[Attended], out: Tensor) -> Attended:
        def heads(name: str) -> Tensor | None:
            parts = [getattr(g, name) for g in got]
            return None if parts[0] is None else torch.cat(parts, 1)

        return Attended(out, heads("queries"), heads("keys"), heads("values"))

    def _summed(self, got: list[Attended]) -> Tensor:
        pairs = zip(self.attns, got, strict=True)
        return torch.stack([branch.drop_path(branch.ls(g.out)) for branch, g in pairs]).sum(dim=0)  # type: ignore[operator]

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        asked = asks(bias, needs)
        got = self._branches(x, lambda attn, y: attend(attn, y, Ask(bias, needs) if asked else None))
        return self._stacked(got, self._summed(got))

    def _project(self, x: Tensor, context: Any) -> Attended:
        return self._stacked(self._branches(x, lambda attn, y: project(attn, y, None)), x)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        maps = iter(attention.chunk(len(self.attns), dim=1))
        got = self._branches(x, lambda attn, y: attend(attn, y, Ask(given=next(maps))))
        return Attended(self._summed(got))

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)


VIT_BLOCKS: dict[type, type] = {
    Block: ReducedBlock,
    ResPostBlock: ReducedResPostBlock,
    ParallelScalingBlock: ReducedParallelScalingBlock,
    ParallelThingsBlock: ReducedParallelThingsBlock,
}
EVA_BLOCKS: dict[type, type] = {EvaBlock: ReducedEvaBlock, EvaBlockPostNorm: ReducedEvaBlockPostNorm}


# -- finding and attaching ---------------------------------------------------------------------------------------------
def towers(model: nn.Module) -> Iterator[Tower]:
    """timm towers inside ``model``, outermost first."""
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer | Eva):
            eva = isinstance(module, Eva)
            roped = eva and module.rope is not None
            grid = module.patch_embed.grid_size
            blocks = tuple(module.blocks)
            yield Tower(
                name, module, f"timm {type(module).__name__}", blocks, EVA_BLOCKS if eva else VIT_BLOCKS,
                module.num_prefix_tokens, module.cls_token is not None, grid, (*EVIDENCE, "pixels"),
                "pre" if roped else None,
            )  # fmt: skip


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into a timm tower.

    Raises ``TypeError`` for block, attention or pooling classes that are not known, ``ValueError`` where methods of
    them were replaced.
    """
    model: Any = tower.module
    attach_tower(tower, reducers, undo)
    for block in tower.blocks:
        branches: Any = getattr(block, "attns", (block,))
        for branch in branches:
            if hasattr(branch, "attn"):
                listen(branch.attn, tower.family, undo)
            refuse_own(branch)
    attach_model(model, tower.family, undo)
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            attach_resize(model, reducer, undo)
