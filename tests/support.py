"""Small models of the real architectures and evidence to try methods on; shared by the tests."""

from __future__ import annotations

import torch
from torch import nn

from tokenreduce import Evidence, list_methods
from tokenreduce.core.registry import get_class

ENCODER_METHODS = [m for m in list_methods(stage="encoder") if not get_class(m).merges_frames]
#: What ``paper`` of a method is: an arXiv id, or nothing. Those of the library's own stand in their files, too.
PAPER = r"(\d{4}\.\d{5})?"


def tiny_vit(**changes) -> nn.Module:
    """A timm ViT of 6 layers and 1 + 36 tokens of 24x24 images, wide random weights so that mistakes show."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    settings = dict(
        img_size=24, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, mlp_ratio=2.0, **changes
    )
    model = VisionTransformer(**settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return model.eval()


def images(batch: int = 2, size: int = 24) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def evidence(
    n: int = 17,
    prefix: int = 1,
    batch: int = 2,
    layer: int = 0,
    depth: int = 6,
    entry: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rows: slice = slice(None),
    **more,
) -> Evidence:
    """Random evidence with everything a method may ask for; ``rows`` picks samples out of the same batch."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)[rows].to(dtype)

    x, before = draw(batch, n, 12), draw(batch, n, 12)
    q, k, v = (draw(batch, 3, n, 8) for _ in range(3))
    side = int((n - prefix) ** 0.5)
    grid = (side, side) if side * side == n - prefix and entry in (None, n) else None
    return Evidence(
        x, k, q, values=v, before=before, protected=prefix, cls=prefix > 0, grid=grid, layer=layer, depth=depth,
        entry=entry or n, **more,
    )  # fmt: skip


def acting_layer(reducer, depth: int = 6) -> int:
    """The first layer in which ``reducer`` does something (0 for a method that acts on the input)."""
    if reducer.acting_position() == "input":
        return 0
    return next(i for i in range(depth) if reducer.acts_at(i, depth))


#: Settings with which methods that act late do something in the few blocks of small models.
EARLY = {"ipcv": {"layer": 2, "as_layer": 1}}


def with_keep(name: str, keep: float | int):
    return get_class(name)(keep=keep, **EARLY.get(name, {}))
