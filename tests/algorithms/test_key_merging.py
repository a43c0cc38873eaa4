"""Slots that join others: rows with other numbers of kept, joining and lost slots in one plan."""

from __future__ import annotations

import pytest
import torch
from cached import kept

import tokenreduce as tr
from tokenreduce.algorithms.key_merging import merge_slots

#: For each row its slots: K stays, a digit joins that slot, - goes, . is padding.
ROWS = ("KK0K1-K1", ".K-1K--K", "KKKKKKKK", "..K2222K", "K0000000", ".K1-----", "...KKKKK", "K-------")


def parts(rows):
    stay = torch.tensor([[c == "K" for c in row] for row in rows])
    into = torch.tensor([[int(c) if c.isdigit() else -1 for c in row] for row in rows])
    return stay, into, torch.tensor([[c != "." for c in row] for row in rows])


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rows", [ROWS, *((row,) for row in ROWS), ROWS[:2], ROWS[2:5], ROWS[4:7:2]])
def test_mean_size_and_sources_of_every_row(rows, weighed):
    stay, into, valid = parts(rows)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(rows), 8, 3, generator=g).masked_fill(~valid.unsqueeze(-1), float("nan"))
    weights = torch.rand(len(rows), 8, generator=g) + 0.1 if weighed else None
    size = torch.randint(1, 4, (len(rows), 8), generator=g).float()
    plan = merge_slots(stay, into, tr.CacheEvidence(x, x, kv_heads=1, valid=valid), weights)
    assert plan.is_identity == (not bool((valid & ~stay).any()))
    if plan.is_identity:
        return
    for used in (None, size):
        values, sizes = plan.reduce(x, used), plan.reduce_size(used)
        for b, row in enumerate(rows):
            places = [j for j, c in enumerate(row) if c == "K"]
            assert kept(plan)[b] == places
            for place, j in enumerate(places, plan.k - len(places)):
                members = [j, *(m for m, c in enumerate(row) if c == str(j))]
                w = [(weights[b, m] if weighed else 1.0) * (1.0 if used is None else used[b, m]) for m in members]
                want = sum(v * x[b, m] for v, m in zip(w, members, strict=True)) / sum(w)
                torch.testing.assert_close(values[b, place], want)
                if len(members) == 1:
                    assert torch.equal(values[b, place], x[b, j])
                whole = sum(1.0 if used is None else float(used[b, m]) for m in members)
                assert (1.0 if sizes is None else float(sizes[b, place])) == pytest.approx(whole)
            joined = [-1 if c in "-." else j if c == "K" else int(c) for j, c in enumerate(row)]
            want = [-1 if j < 0 else plan.k - len(places) + places.index(j) for j in joined]
            assert plan.sources()[b].tolist() == want


def test_where_nothing_joins_it_is_a_choice():
    stay, into, valid = parts(("K--K", "KK--"))
    x = torch.zeros(2, 4, 1)
    assert isinstance(merge_slots(stay, into, tr.CacheEvidence(x, x, kv_heads=2, valid=valid[:1])), tr.Prune)
