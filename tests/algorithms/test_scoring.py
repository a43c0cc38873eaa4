"""Scores that several methods share."""

from __future__ import annotations

import pytest
import torch

from tokenreduce.algorithms.scoring import descending, gram, highest, inner, received_by_head
from tokenreduce.core.evidence import Evidence


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


@pytest.mark.parametrize("values", [2, 5, 1000])
@pytest.mark.parametrize("k", [0, 1, 7, 20])
def test_highest_is_the_front_of_a_stable_sort(values, k):
    g = torch.Generator().manual_seed(values)
    scores = torch.randint(0, values, (3, 4, 20), generator=g).float()
    scores[0, 0, :5] = float("-inf")
    front = descending(scores)[..., :k]
    assert torch.equal(highest(scores, k), torch.zeros_like(scores, dtype=torch.bool).scatter(2, front, True))
    assert highest(scores[:0], k).shape == (0, 4, 20)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_received_is_the_mean_of_all_rows(heads, causal, padded):
    valid = torch.arange(9) < torch.tensor([[9], [6]]) if padded else None
    e = Evidence(
        torch.randn(2, 9, 8), torch.randn(2, heads, 9, 5), torch.randn(2, 4, 9, 5), size=torch.rand(2, 9) + 1,
        valid=valid, causal=causal, scale=0.3,
    )  # fmt: skip
    rows = e.attention("all")
    mean = rows.mean(2)
    if valid is not None:
        mean = (rows * valid[:, None, :, None]).sum(2) / valid.sum(1)[:, None, None]
    torch.testing.assert_close(received_by_head(e.attention, chunk=4), mean)
