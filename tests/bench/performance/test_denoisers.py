"""Costs of denoisers are counted without making their tensors, and are those of the tensors that would be made."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs the extra diffusion")

from tokenreduce.bench.performance.denoisers import built, cost, step
from tokenreduce.core.flops import count_flops


@pytest.mark.slow
def test_multiply_adds_without_tensors_are_those_with_them():
    model, side = "Stable Diffusion 1.5", 16
    unet = built(model, "cpu", narrow=True)
    stock = count_flops(step(unet, side, "cpu"))
    assert cost(model, None, side, narrow=True) == (stock, 0)
    merged, blocks = cost(model, "tomesd", side, narrow=True)
    assert blocks == 5, "two in front of the first downsampling, three behind the last upsampling"
    assert merged < stock
    assert cost(model, "tomesd:ratio=0", side, narrow=True) == (stock, 0)
