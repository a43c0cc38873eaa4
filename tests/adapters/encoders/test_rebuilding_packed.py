"""Patches that are set aside in towers that pack images and frames into one row, against stock blocks run by hand."""

from __future__ import annotations

import pytest
import torch
from rebuilt import packed_by_hand, parts, views_of
from vlms import encodes_before

import tokenreduce as tr
from tokenreduce.adapters.encoders import packed_found
from tokenreduce.core.undo import Undo

#: Two images of one size, and between them a video of two frames of another.
GRIDS = torch.tensor([[1, 8, 8], [2, 4, 12], [1, 8, 8]])
TOWERS = {
    "qwen2_vl": ("Qwen2VL", "Qwen2VisionTransformerPretrainedModel", dict(embed_dim=32, hidden_size=48, mlp_ratio=2)),
    "windows": ("Qwen2_5_VL", "Qwen2_5_VisionTransformerPretrainedModel", dict(
        hidden_size=32, intermediate_size=64, window_size=16, out_hidden_size=32, fullatt_block_indexes=[1, 3])),
    "qwen3_vl": ("Qwen3VL", "Qwen3VLVisionModel", dict(
        hidden_size=32, intermediate_size=64, out_hidden_size=32, deepstack_visual_indexes=[1, 2, 3],
        num_position_embeddings=64)),
}  # fmt: skip


def tower_of(name):
    import importlib

    family, kind, settings = TOWERS[name]
    folder = family.lower().replace("qwen2vl", "qwen2_vl").replace("qwen3vl", "qwen3_vl")
    config = getattr(importlib.import_module(f"transformers.models.{folder}"), f"{family}VisionConfig")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    torch.manual_seed(0)
    tower = getattr(module, kind)._from_config(config(depth=5, num_heads=2, patch_size=4, **settings))
    with torch.no_grad():
        for p in tower.parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    return tower.eval()


def close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("how", ["table", "found"])
@pytest.mark.parametrize("per", ["image", "all"])
@pytest.mark.parametrize("as_layer", [0, 1, 7])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_packed_tower_is_the_stock_blocks_on_rebuilt_patches(name, as_layer, per, how):
    if how == "found" and not encodes_before():
        pytest.skip("towers of earlier releases are called in another way")
    tower = tower_of(name)
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 96, generator=torch.Generator().manual_seed(3))
    pixels[64:112] *= 0.2  # one frame loses more than others
    reducer = tr.IPCV(layer=2, keep=0.3, as_layer=as_layer, top_k=3, per=per)
    want, by = packed_by_hand(tower, reducer, GRIDS, pixels)
    stock = parts(tower(pixels, grid_thw=GRIDS))
    if how == "table":
        with tr.patched(tower, reducer), tr.record(tower, flops=False) as trace:
            got = parts(tower(pixels, grid_thw=GRIDS))
        ends = [s for s in trace.steps if s.layer == 4]
        assert sum(s.patches for s in ends) == len(by.stay)
    else:
        undo = Undo((reducer,), tower)
        packed_found.attach(packed_found.tower_of("", tower), (reducer,), undo)
        got = parts(tower(pixels, grid_thw=GRIDS))
        undo.revert()
    close(got, want)
    assert not torch.equal(got[0], stock[0])
    close(parts(tower(pixels, grid_thw=GRIDS)), stock)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_frame_that_loses_everything_and_images_alone(name):
    """Empty windows go; with ``per="image"`` a call with other images changes nothing."""
    tower = tower_of(name)
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 96, generator=torch.Generator().manual_seed(3))
    few = tr.IPCV(layer=2, keep=3, as_layer=0, per="all")
    want, by = packed_by_hand(tower, few, GRIDS, pixels)
    assert sum(any(s in view for s in by.stay) for view in views_of(tower, GRIDS)) < 4
    with tr.patched(tower, few):
        close(parts(tower(pixels, grid_thw=GRIDS)), want)
    with tr.patched(tower, tr.IPCV(layer=2, keep=0.3, as_layer=1)):
        together = parts(tower(pixels, grid_thw=GRIDS))
        alone = parts(tower(pixels[:64], grid_thw=GRIDS[:1]))
    units = [16 if len(t) == 56 else 64 for t in together]
    close([t[:n] for t, n in zip(together, units, strict=True)], alone)


@torch.no_grad()
def test_patches_dropped_by_their_pixels_in_front():
    """Views then have unequal numbers of units; shares are of what is there."""
    tower = tower_of("windows")
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 96, generator=torch.Generator().manual_seed(3))
    pixels[:20] = 0
    with tr.patched(tower, "pixelprune+ipcv:layer=2,keep=0.5,as_layer=1"), tr.record(tower, flops=False) as trace:
        got = parts(tower(pixels, grid_thw=GRIDS))
    before = sum(s.patches for s in trace.steps if s.layer == 1)
    assert before < 224
    assert sum(s.patches for s in trace.steps if s.layer == 4) == sum(
        s.patches // 2 if s.plan is None else int(s.plan.places().sum()) for s in trace.steps if s.layer == 2
    )
    assert all(torch.isfinite(t).all() for t in got)
    with tr.patched(tower, "pixelprune"):
        want = parts(tower(pixels, grid_thw=GRIDS))
    with tr.patched(tower, "pixelprune+ipcv:layer=2,keep=1.0"):
        assert all(torch.equal(a, b) for a, b in zip(parts(tower(pixels, grid_thw=GRIDS)), want, strict=True))
