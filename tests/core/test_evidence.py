from __future__ import annotations

import pytest
import torch

from tokenreduce import Evidence
from tokenreduce.algorithms.scoring import cls_attention, importance, received_attention, select, unit
from tokenreduce.core.evidence import Prompt


def evidence(n=7, prefix=1, **more):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, n, 4, generator=g), torch.randn(2, 3, n, 4, generator=g)
    return Evidence(torch.randn(2, n, 5, generator=g), k, q, protected=prefix, **more), q, k


def test_rows_are_softmax_rows_with_sizes_and_padding():
    size = torch.tensor([[1.0, 2, 3, 1, 1, 1, 0], [1.0] * 7])
    valid = size > 0
    e, q, k = evidence(size=size, valid=valid)
    for b in range(2):
        for h in range(3):
            logits = q[b, h] @ k[b, h].T / 2
            weights = logits.exp() * size[b]
            want = weights / weights.sum(-1, keepdim=True)
            torch.testing.assert_close(e.attention("all")[b, h], want)
            torch.testing.assert_close(e.attention("cls")[b, h], want[:1])
            torch.testing.assert_close(e.attention(torch.tensor([3, 1]))[b, h], want[[3, 1]])
    per_sample = torch.tensor([[2], [5]])
    torch.testing.assert_close(e.attention(per_sample)[1, 0, 0], e.attention("all")[1, 0, 5])


def test_sizes_do_not_bias_rows_of_a_model_that_ignores_them():
    e, q, k = evidence(size=torch.full((2, 7), 4.0), proportional=False)
    torch.testing.assert_close(e.attention("all"), ((q @ k.transpose(-1, -2)) / 2).softmax(-1))


def test_rotated_queries_and_keys_make_the_rows():
    e, q, k = evidence()
    turned, _, _ = evidence(rotated=(2 * q, k))
    torch.testing.assert_close(turned.attention("cls"), (q[:, :, :1] @ k.transpose(-1, -2)).softmax(-1))
    assert not torch.allclose(turned.attention("cls"), e.attention("cls"))


def test_precomputed_rows_are_used():
    rows = torch.rand(2, 3, 1, 7)
    e = Evidence(torch.randn(2, 7, 5), attention=rows, protected=1)
    assert torch.equal(cls_attention(e), rows[:, :, 0].mean(1))


def test_received_attention_in_chunks_is_the_mean_of_the_map():
    e, _, _ = evidence(n=11)
    torch.testing.assert_close(received_attention(e, chunk=4), e.attention("all").mean((1, 2)))
    padded, _, _ = evidence(n=11, valid=torch.arange(11).expand(2, -1) < 8, size=None)
    full = padded.attention("all")[:, :, :8].mean((1, 2))
    torch.testing.assert_close(received_attention(padded, chunk=3), full)


def test_importance_without_class_token_is_what_tokens_receive():
    e, _, _ = evidence(prefix=0)
    torch.testing.assert_close(importance(e), received_attention(e))
    with pytest.raises(ValueError, match="no class token"):
        e.attention("cls")


@pytest.mark.parametrize("name", ["keys", "queries", "values", "before"])
def test_missing_evidence_is_named(name):
    with pytest.raises(ValueError, match=f"needs {name}"):
        getattr(Evidence(torch.randn(1, 3, 2)), name)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="batch, tokens, channels"):
        Evidence(torch.randn(3, 2))


def test_protection_by_count_mask_and_visual():
    x = torch.randn(2, 5, 3)
    assert Evidence(x, protected=2).fixed().tolist() == [[True, True, False, False, False]] * 2
    mask = torch.tensor([False, True, False, False, False])
    visual = torch.tensor([[True, True, True, True, False]] * 2)
    both = Evidence(x, protected=mask, visual=visual)
    assert both.fixed().tolist() == [[False, True, False, False, True]] * 2
    assert both.free() == 3
    assert Evidence(x).fixed() is None


def test_select_is_stable_and_keeps_the_prefix():
    x = torch.randn(1, 6, 2)
    scores = torch.tensor([[9.0, 1, 3, 3, 2, 3]])
    e = Evidence(x, protected=1)
    assert select(scores, 2, e).tolist() == [[0, 2, 3]]
    assert select(scores, 4, e, by_score=True).tolist() == [[0, 2, 3, 5, 4]]
    padded = Evidence(x, protected=1, valid=torch.tensor([[True, True, False, True, True, True]]))
    assert select(scores, 2, padded).tolist() == [[0, 3, 5]]


def test_nan_is_an_error_that_says_where():
    e = Evidence(torch.randn(1, 4, 2), layer=5)
    with pytest.raises(ValueError, match="NaN in the tokens at layer 5"):
        select(torch.tensor([[1.0, float("nan"), 0, 0]]), 2, e)


def test_unit_of_zero_is_zero():
    assert torch.equal(unit(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_attention_under_the_mask_and_softcap_of_the_model():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 6, 4).unbind(0)
    seen = torch.rand(2, 1, 6, 6) < 0.6
    seen |= torch.eye(6, dtype=torch.bool)
    logits = 1.5 * torch.tanh(q @ k.transpose(-2, -1) / 2.0 / 1.5)
    want = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, additive):
        evidence = Evidence(torch.zeros(2, 6, 8), k, q, mask=mask, softcap=1.5, causal=True, cls=True)
        torch.testing.assert_close(evidence.attention("all"), want)
        torch.testing.assert_close(evidence.attention("cls"), want[:, :, :1])
        torch.testing.assert_close(evidence.attention(torch.tensor([[5], [2]]))[1], want[1, :, [2]])
    shared = Evidence(torch.zeros(2, 6, 8), k, q, mask=seen[:1], softcap=1.5, cls=False).attention(torch.tensor([4, 1]))
    torch.testing.assert_close(shared[1], logits.masked_fill(~seen[:1], float("-inf")).softmax(-1)[1, :, [4, 1]])


def test_the_prompt_and_the_final_norm_of_a_language_model():
    x, visual = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [False, True, False]])
    entry = torch.tensor([[True, True, True, False], [False, True, True, False]])
    evidence = Evidence(x, visual=visual, prompt=Prompt(entry), norm=lambda h: h * 2)
    assert evidence.visual_entry().tolist() == [[3], [2]]
    assert torch.equal(evidence.normed, x * 2)
    assert Evidence(x, visual=visual).visual_entry().tolist() == [[2], [1]]
    with pytest.raises(ValueError, match="needs norm"):
        _ = Evidence(x).normed
    with pytest.raises(ValueError, match="marks no visual tokens"):
        Evidence(x).visual_entry()
