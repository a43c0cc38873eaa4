"""An empty batch, as a filter in front of a model leaves it: what stock timm answers, a patched model answers."""

from __future__ import annotations

import pytest
import torch
from support import ENCODER_METHODS, images, tiny_vit

import tokenreduce as tr

POOLS = {
    "token": dict(),
    "avg": dict(global_pool="avg"),
    "map": dict(global_pool="map", class_token=False),
}
#: How many tokens these leave depends on the images.
FREE = ("ats", "mustdrop-merge")


@pytest.mark.parametrize("method", ENCODER_METHODS)
@pytest.mark.parametrize("settings", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_shapes(settings, method, grad):
    model, x = tiny_vit(**settings), images()
    with torch.set_grad_enabled(grad):
        stock = model(x[:0]).shape
        tr.patch(model, f"{method}:keep=0.5")
        with tr.record(model, flops=False) as trace:
            assert model(x[:0]).shape == stock == (0, 7)
        features = model.forward_features(x[:0])
        assert len(features) == 0
        if method not in FREE:
            assert features.shape[1:] == model.forward_features(x).shape[1:]
            assert trace.steps[-1].patches == 0
        _, maps = model.forward_intermediates(x[:0])
        want = (2, 3) if method == "resize" else (6, 6)
        assert maps[-1].shape[:2] == (0, 32)
        assert maps[-1].shape[2] * maps[-1].shape[3] <= 36
        assert method == "resize" or maps[-1].shape[2:] == want


def test_gradients_of_nothing():
    model = tr.patch(tiny_vit(global_pool="avg"), "tome:r=4")
    model(images()[:0]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.head.weight.grad is not None
