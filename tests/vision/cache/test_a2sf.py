"""A2SF against a plain loop."""

from __future__ import annotations

import pytest
import torch
from cached import LAYOUTS, against, cached, half_up, image, kept, plain_rows, real, tied, top

import tokenreduce as tr


def faded(rows, there, factor):
    """(B*Hkv,N): row after row, what was before fades and the new one comes on top."""
    out = torch.zeros(rows.shape[0], rows.shape[3], dtype=torch.float64)
    for i in range(rows.shape[0]):
        for r in range(rows.shape[2]):
            if there[i, rows.shape[3] - rows.shape[2] + r]:
                out[i] = factor * out[i] + rows[i, :, r].sum(0)
    return out


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("factor", [0.0, 0.2, 0.5, 0.95, 1.0])
def test_plan_and_score(groups, factor):
    method = tr.A2SF(forgetting_factor=factor, keep=0.5)
    for evidence, rows in ((e := cached(groups=groups), plain_rows(e)), tied(groups=groups)):
        scores = faded(rows, evidence.there, factor)
        there = evidence.there
        torch.testing.assert_close(method.score(evidence).double()[there], scores[there], rtol=1e-5, atol=1e-6)
        if factor not in (0.0, 0.5, 1.0):
            scores = method.score(evidence)  # float32 rounds what is exact in the others
        got = kept(method.plan(evidence))
        for i, (columns, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
            text = set(columns) - set(visual)
            assert got[i] == sorted(text | set(top(scores[i].float(), visual, half_up(0.5, len(visual)))))


@pytest.mark.parametrize(("factor", "rows"), [(0.0, 1), (0.2, 19), (0.95, 542), (1.0, None)])
def test_no_more_rows_than_count(factor, rows):
    assert tr.A2SF(forgetting_factor=factor).query_rows() == rows


def test_the_rows_that_are_asked_for_are_enough():
    method = tr.A2SF(forgetting_factor=0.2)
    whole, some = cached(LAYOUTS[1:3], pad=0.0), cached(LAYOUTS[1:3], pad=0.0, rows=19)
    assert torch.equal(method.score(whole), method.score(some))
    torch.testing.assert_close(
        method.score(some).double(), faded(plain_rows(whole), whole.there, 0.2), rtol=1e-5, atol=1e-6
    )


def heavy(columns, scores, hh, recent):
    if len(columns) <= hh + recent:
        return columns
    edge = len(columns) - recent
    return top(scores, columns[:edge], hh) + columns[edge:]


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("factor", [0.2, 0.95])
def test_decode(groups, factor):
    def update(scores, rows, columns, evidence, i):
        for row in rows.sum(0).tolist():
            for column, value in zip(columns, row, strict=True):
                scores[column] = factor * scores.get(column, 0.0) + value

    method = tr.A2SF(forgetting_factor=factor, hh_size=5, recent_size=4, what="all")
    against(method, lambda columns, scores, last, n: heavy(columns, scores, 5, 4), update, groups=groups)


def test_several_tokens_at_once():
    evidence = cached(LAYOUTS[:1], rows=5)
    old = torch.rand(2, evidence.n, generator=torch.Generator().manual_seed(0))
    given = cached(LAYOUTS[:1], rows=5, scores=old, step=3)
    want = 0.5**5 * old + faded(plain_rows(evidence), evidence.there, 0.5).float()
    torch.testing.assert_close(tr.A2SF(forgetting_factor=0.5).score(given), want)


def test_once_behind_the_prompt_as_the_current_code():
    method = tr.get_method("a2sf:keep=12,what=all,recent_size=4,interval=none")
    assert method.every() == 0
    evidence = cached()
    scores = method.score(evidence)
    assert kept(method.plan(evidence)) == [heavy(there, scores[i], 8, 4) for i, there in enumerate(real(evidence))]


def test_bad_settings():
    for bad in (-0.1, 1.1, "all"):
        with pytest.raises(ValueError, match="forgetting_factor"):
            tr.A2SF(forgetting_factor=bad)
