"""The oracle for whoever reads tokens: tokens without positions, of which many are equal. Merging equal tokens changes
nothing, wherever the tokens are counted, and a token counted once too few shows, because the kinds are not equally
many."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tokenreduce as tr

SIDE, PATCH = 6, 4
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE * PATCH, patch_size=PATCH)
MERGE = "tome:r=[5,0,4]"


def pictures(side: int = SIDE, patch: int = PATCH, batch: int = 2) -> torch.Tensor:
    """(B,3,H,W) of ``side`` x ``side`` patches, each one of three kinds, not equally often and not in a row."""
    g = torch.Generator().manual_seed(3)
    kinds = torch.randn(batch, 3, 3, patch, patch, generator=g)
    weights = torch.tensor([0.6, 0.3, 0.1])
    which = torch.multinomial(weights, batch * side * side, replacement=True, generator=g).view(batch, side, side)
    rows = [torch.stack([kinds[b, which[b].flatten()]], 0)[0] for b in range(batch)]
    grid = torch.stack(rows).view(batch, side, side, 3, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, side * patch, side * patch)


def without_positions(model: nn.Module) -> Any:
    """``model`` with wide weights and position tables of zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "position" in name or "pos_embed" in name:
                p.zero_()
            elif p.dim() > 1:
                p.normal_(std=0.2)
    return model.eval()


def check_equal_tokens(model: Any, run: Any, method: str = MERGE, tolerance: float = 2e-4) -> None:
    with torch.no_grad():
        want = run(model)
        with tr.patched(model, method), tr.record(model) as trace:
            got = run(model)
        assert any(step.plan is not None for step in trace.steps)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))
        assert torch.equal(run(model), want)


def timm_vit(kind: type | None = None, **changes: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    settings = dict(img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=32, depth=3, num_heads=2, num_classes=7)
    return without_positions((kind or VisionTransformer)(**(settings | changes)))


def hf(model: str, config: str, **changes: Any) -> Any:
    import transformers

    made = getattr(transformers, config)(**(SMALL | changes))
    return without_positions(getattr(transformers, model)(made))
