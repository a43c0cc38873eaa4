"""What encoders are compared with: the same blocks on as many tokens that are merely sliced, and the published ToMe.

Both run the weights of a stock timm model. The first is the possible speed: no method that leaves as many tokens in
every layer can be faster. The second is what a user of the paper's own way of patching has: attention that is not
fused, and closures that merge, written from the paper's description (arXiv 2210.09461).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PublishedToMe", "Sliced"]


class _Walk(nn.Module):
    """A timm ``VisionTransformer`` block by block. Raises ``ValueError`` for other models and blocks."""

    def __init__(self, model: nn.Module) -> None:
        from timm.models.vision_transformer import Block, VisionTransformer

        super().__init__()
        if type(model) is not VisionTransformer or any(type(b) is not Block for b in model.blocks):
            raise ValueError(f"a timm VisionTransformer of plain blocks, unpatched, not {type(model).__name__}")
        self.model: Any = model

    def forward(self, image: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        return model.forward_head(model.norm(self._blocks(x)))

    def _blocks(self, x: Tensor) -> Tensor:
        raise NotImplementedError("abstract")


class Sliced(_Walk):
    """``model`` with the first ``counts[i]`` tokens in block i and behind, and no thought about which these are.

    ``position`` is where a block cuts: "before" it, in its "middle" between attention and MLP, or "after" it.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], position: str = "middle") -> None:
        super().__init__(model)
        self.counts, self.position = tuple(counts), position
        if len(self.counts) != len(self.model.blocks) or position not in ("before", "middle", "after"):
            raise ValueError(f"{len(self.model.blocks)} counts and a place in a block, not {counts!r} and {position!r}")

    def _blocks(self, x: Tensor) -> Tensor:
        for block, k in zip(self.model.blocks, self.counts, strict=True):
            if self.position == "before":
                x = x[:, :k]
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if self.position == "middle":
                x = x[:, :k]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            if self.position == "after":
                x = x[:, :k]
        return x


class PublishedToMe(_Walk):
    """ToMe as the paper has it, removing ``r`` tokens in every block: the keys' mean over heads as metric, even and odd
    places, the class token protected, means weighed by size, log sizes added to attention logits."""

    def __init__(self, model: nn.Module, r: int) -> None:
        super().__init__(model)
        self.r = r

    def _blocks(self, x: Tensor) -> Tensor:
        size: Tensor | None = None
        for block in self.model.blocks:
            out, metric = self._attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(out))
            merge = self._matched(metric)
            if merge is not None:
                size = torch.ones_like(x[..., :1]) if size is None else size
                weighed = merge(x * size)
                size = merge(size)
                x = weighed / size
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x

    def _attend(self, attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, c // attn.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return attn.proj_drop(attn.proj(out)), k.mean(1)

    def _matched(self, metric: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The function that sums groups of tokens (B,N,C) to (B,N-r,C), None where nothing goes."""
        protected = self.model.num_prefix_tokens
        r = min(self.r, (metric.shape[1] - protected) // 2)
        if r <= 0:
            return None
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
        if protected:
            scores[:, 0] = float("-inf")
        best, partner = scores.max(-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        stay, go = order[:, r:], order[:, :r]
        to = partner[..., None].gather(1, go)
        if protected:
            stay = stay.sort(dim=1).values

        def merge(t: Tensor) -> Tensor:
            even, odd = t[:, ::2], t[:, 1::2]
            width = t.shape[-1]
            gone = even.gather(1, go.expand(-1, -1, width))
            odd = odd.scatter_add(1, to.expand(-1, -1, width), gone)
            return torch.cat([even.gather(1, stay.expand(-1, -1, width)), odd], 1)

        return merge
