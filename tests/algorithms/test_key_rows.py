from __future__ import annotations

import pytest
import torch
from cache_cases import case, dense

import tokenreduce as tr
from tokenreduce.algorithms.key_rows import above_share, carried, marked_sums, over_heads, span


def test_rows_that_are_marked():
    ev = case(groups=3)
    marks = ev.there & (torch.arange(ev.n) % 4 == 1) & (torch.arange(ev.n) > 6)
    weights = torch.rand(marks.shape, generator=torch.Generator().manual_seed(0))
    rows = dense(ev, ev.drawn)
    torch.testing.assert_close(marked_sums(ev, marks), (rows * marks[:, None, :, None]).sum(2))
    torch.testing.assert_close(marked_sums(ev, marks, weights), (rows * (marks * weights)[:, None, :, None]).sum(2))
    assert span(marks, ev) == ev.n - 9
    assert not marked_sums(ev, torch.zeros_like(marks)).any()


def test_blocks_are_the_rows(monkeypatch):
    monkeypatch.setattr("tokenreduce.core.evidence.cache._BLOCK", 4)
    ev = case()
    blocks = list(ev.blocks(10))
    assert [start for start, _ in blocks] == [0, 4, 8]
    torch.testing.assert_close(torch.cat([b for _, b in blocks], 2), ev.rows(10))
    torch.testing.assert_close(ev.column_sums(), dense(ev, ev.drawn).sum(2))
    with pytest.raises(ValueError, match="needs attention"):
        list(ev.bare().blocks())


def test_logits_of_some_slots_whoever_sees_them():
    ev = case()
    raw = torch.einsum("bgid,bjd->bgij", ev.queries, ev.keys) * ev.scale
    slots = torch.tensor([[4, 16, 9]]).expand(6, 3) - torch.arange(6)[:, None] % 3
    got = ev.logits(2, 5, slots)
    for row in range(6):
        torch.testing.assert_close(got[row], raw[row, :, 2:5][..., slots[row]])
    given = case(given="attention").logits(9, 12, slots)
    torch.testing.assert_close(given.exp()[1], dense(ev, ev.drawn)[1, :, 9:12][..., slots[1]])


def test_heads_meet_at_columns():
    """Two heads that hold different columns of a sample: only what both hold is averaged."""
    columns = torch.tensor([[0, 1, 4, 5], [0, 0, 1, 5]])
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    ev = tr.CacheEvidence(torch.ones(2, 4, 2), torch.ones(2, 4, 2), kv_heads=2, valid=valid, columns=columns)
    values = torch.tensor([[1.0, 2, 3, 4], [9, 5, 6, 8]])
    got = over_heads(values, ev)
    assert got[ev.there].tolist() == [3.0, 4.0, 3.0, 6.0, 3.0, 4.0, 6.0]
    plain = tr.CacheEvidence(torch.ones(2, 4, 2), torch.ones(2, 4, 2), kv_heads=2)
    assert torch.equal(over_heads(values, plain), values.mean(0).expand(2, 4))


def test_numbers_that_travel_and_shares():
    ev = case(scores=None)
    first = torch.arange(6)[:, None]
    assert carried(ev, first).equal(first)
    scores = torch.zeros(6, ev.n, 2)
    scores[2:, :5, 1] = 7.0  # the second sample has padding there
    held = carried(case(scores=scores), first)
    assert held.flatten().tolist() == [0, 1, 2, 3, 7, 7]
    with pytest.raises(ValueError, match="mine needs"):
        above_share(case(step=1), "mine")
    left = torch.full((6, 1), 6)
    over = above_share(case(step=2, prompt_slots=left, seen=torch.tensor([[22], [42], [12]])), "mine")
    # Of 20, 40 and 10 tokens 6 stayed; now there are 17, 12 and 14 slots.
    assert over.flatten().tolist() == [True] * 6
    few = above_share(case(("tttt",), step=2, prompt_slots=left[:2], seen=torch.tensor([[14]])), "mine")
    assert few.flatten().tolist() == [False] * 2


def test_nan_of_the_model_is_seen_and_that_of_padding_is_not():
    ev = case()
    ev.keys[0, 3] = float("nan")
    assert ev.column_sums()[0].isnan().any()
    assert not ev.column_sums()[1:].isnan().any()
    rows = dense(ev, ev.drawn)
    rows[~ev.there[:, None, :, None].expand_as(rows)] = float("nan")
    given = tr.CacheEvidence(ev.keys, ev.values, attention=rows, kv_heads=2, valid=ev._valid)
    assert not given.column_sums()[1:].isnan().any()
    with pytest.raises(ValueError, match="hold NaN"):
        tr.get_method("look-m:keep=2").plan(ev)
