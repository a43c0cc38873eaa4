"""What methods of the cache stage share: rows of attention, budgets in decode, padding behind a prompt."""

from __future__ import annotations

import pytest
import torch
from cached import LAYOUTS, cached, plain_rows

import tokenreduce as tr
from tokenreduce.algorithms.keys import keep_best_slots, standing


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 5, 21])
def test_rows_of_attention_and_their_sums(groups, rows):
    evidence = cached(groups=groups, rows=rows)
    want = plain_rows(evidence)
    torch.testing.assert_close(evidence.rows().double(), want, rtol=1e-5, atol=1e-6)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        evidence.column_sums(weights).double(), (want * weights[:, None]).sum(2), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(evidence.column_sums(rows=1).double(), want[:, :, -1], rtol=1e-5, atol=1e-6)


def test_nan_of_a_token_shows_and_of_padding_does_not():
    evidence = cached(LAYOUTS[1:2])  # padding holds NaN
    assert evidence.rows().isfinite().all()
    evidence.keys[0, 10] = float("nan")
    rows = evidence.rows()
    assert rows[0, :, :10].isfinite().all()
    assert rows[0, :, 10:].isnan().any(-1).all()
    assert rows[1].isfinite().all()


def test_a_ratio_stays_what_it_was_at_the_prompt():
    slots = torch.tensor([[7], [5]])
    x = torch.zeros(2, 9, 4)
    evidence = tr.CacheEvidence(x, x, kv_heads=2, step=3, prompt_slots=slots)
    assert torch.equal(standing(0.5, evidence), slots)
    assert standing(6, evidence) == 6
    assert torch.equal(standing(1.0, evidence), torch.tensor([[9], [9]]))
    assert standing(0.5, tr.CacheEvidence(x, x, kv_heads=2)) == 0.5
    with pytest.raises(ValueError, match="prompt_slots"):
        standing(0.5, tr.CacheEvidence(x, x, kv_heads=2, step=3))


@pytest.mark.parametrize(
    "spec",
    ["tova", "ems:window_size=4", "a2sf:forgetting_factor=0.05"],
)
def test_padding_behind_the_prompt_is_refused_by_those_who_look_at_its_end(spec):
    method, layouts = tr.get_method(spec), ("ttvvvvvvvvvvtttt", "ttvvvvvvvttttt..")
    with pytest.raises(ValueError, match="pad on the left"):
        method.plan(cached(layouts, pad=0.0))
    assert method.plan(cached(layouts[:1]))
    assert method.plan(cached(("ttvvvvvvvvvvttttt", "ttvvvvvvvttttt..t"), rows=4, pad=0.0))  # a later turn


@pytest.mark.parametrize("spec", ["h2o", "keyformer", "keydiff", "streamingllm", "recent", "random@cache"])
def test_padding_behind_the_prompt_changes_nothing_else(spec):
    method, layouts = tr.get_method(spec), ("ttvvvvvvvvvvtt", "ttvvvvvvvttt..")
    together = (method.plan(cached(layouts)).sources() >= 0)[2:, :12]
    alone = method.plan(cached((layouts[1][:12],), samples=[1])).sources() >= 0
    assert torch.equal(together, alone)


def test_layers_that_share_marks_tell_one_key_from_all() -> None:
    marks: dict = {}
    keys = torch.randn(2, 5, 4)
    visual = torch.tensor([[False, True, True, True, False]])
    first, second, third = (
        tr.CacheEvidence(keys, keys, kv_heads=2, visual=visual, layer=i, depth=3, marks=marks) for i in range(3)
    )
    scores = torch.arange(5.0).expand(2, -1)
    one, every = keep_best_slots(scores, 1, first), keep_best_slots(scores, 1.0, second)
    assert one.representatives().tolist() == [[0, 3, 4]] * 2
    assert every.is_identity
    assert keep_best_slots(scores, 1, third).representatives().tolist() == [[0, 3, 4]] * 2
    assert third.visual is first.visual
