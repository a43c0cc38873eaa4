"""Scores that several methods share."""

from __future__ import annotations

import pytest
import torch

from tokenreduce.scoring import gram, inner


@pytest.mark.parametrize("n", [3, 255, 256, 401])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_inner_product_with_itself(n, dtype):
    x = torch.randn(2, n, 40, generator=torch.Generator().manual_seed(n)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gram(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, inner(x, x))
    if n >= 256:
        assert torch.equal(got, got.transpose(1, 2))
    x = x.float().requires_grad_()
    gram(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().sum(1, keepdim=True).expand_as(x), rtol=1e-4, atol=1e-4)
