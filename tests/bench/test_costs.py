"""Multiply-adds as a function of the tokens per layer: the published figures, and what torch counts."""

from __future__ import annotations

import pytest
import torch
from support import images, tiny_vit

import tokenreduce as tr
from tokenreduce.bench.costs import Costs
from tokenreduce.vision.encoder.diffrate import DiffRate

WIDTHS = {"vit-s-deit": (197, 384, 16), "vit-b-deit": (197, 768, 16), "vit-b-mae": (197, 768, 16),
          "vit-l-mae": (197, 1024, 16), "vit-h-mae": (257, 1280, 14)}  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "reduced", "dense"),
    [
        ("vit-s-deit@2.9", 2.905, 4.599),
        ("vit-b-deit@11.5", 11.517, 17.564),
        ("vit-b-mae@11.5", 11.517, 17.564),
        ("vit-l-mae@42.3", 42.290, 61.555),
        ("vit-h-mae@103.4", 103.337, 167.296),
    ],
)
def test_the_formula_gives_the_published_figures(schedule, reduced, dense):
    costs = Costs.vit(*WIDTHS[schedule.split("@")[0]])
    depth = {1024: 24, 1280: 32}.get(WIDTHS[schedule.split("@")[0]][1], 12)
    counts = DiffRate(schedule=schedule).counts(costs.tokens - 1, depth)
    assert round(costs.gmacs([1 + merged for _, merged in counts]), 3) == reduced
    assert round(costs.gmacs([costs.tokens] * depth), 3) == dense


def test_measured_costs_are_the_formula():
    """Up to the class token's share of the patch embedding, which nobody computes."""
    got, want = Costs.measure(tiny_vit(), images()), Costs.vit(37, 32, 4, classes=7, mlp_ratio=2.0)
    assert (got.tokens, got.linear, got.square, got.feed) == (37, want.linear, want.square, want.feed)
    assert got.base == want.base - 32 * 3 * 16


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg"}, {"global_pool": "map"}, {"reg_tokens": 4}])
def test_measured_costs_foresee_any_schedule(changes):
    model = tiny_vit(**changes)
    costs = Costs.measure(model, images())
    with torch.no_grad(), tr.record(model) as dense:
        model(images(1))
    assert costs.gmacs([costs.tokens] * 6) * 2e9 == pytest.approx(dense.flops)
    with torch.no_grad(), tr.patched(model, DiffRate(prune_kept_num=[30, 30, 20, 12, 9, 5])), tr.record(model) as trace:
        model(images(1))
    assert trace.tokens == [model.num_prefix_tokens + c for c in (29, 29, 19, 11, 8, 4)]
    # Ranking costs one row of attention: 32 multiply-adds per token in every layer that prunes.
    arriving = [costs.tokens, *trace.tokens]
    rows = sum(32 * n for n, left in zip(arriving, trace.tokens, strict=False) if left < n)
    assert costs.gmacs(trace.tokens) * 1e9 + rows == pytest.approx(trace.flops / 2)


def test_measuring_leaves_the_model_as_it_was():
    model = tiny_vit()
    with torch.no_grad():
        want = model(images())
        Costs.measure(model, images(), lambda m, x: m.forward_features(x))
        assert torch.equal(model(images()), want)
    assert tr.describe(model).active == ()


def test_too_small_to_measure():
    from timm.models.vision_transformer import VisionTransformer

    with pytest.raises(ValueError, match="2 layers and 4 patches, this model has 1 and 4"):
        Costs.measure(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1), images(1, 8))
    with pytest.raises(ValueError, match="this model has 2 and 1"):
        Costs.measure(VisionTransformer(img_size=4, patch_size=4, embed_dim=8, depth=2, num_heads=1), images(1, 4))
