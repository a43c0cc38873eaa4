"""TOVA against a plain loop."""

from __future__ import annotations

import pytest
import torch
from cached import LAYOUTS, against, cached, half_up, image, kept, plain_rows, real, tied, top

import tokenreduce as tr


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("what", ["visual", "all"])
@pytest.mark.parametrize("recent", [0, 1, 3])
def test_one_choice_for_all_heads(groups, what, recent):
    for evidence, rows in ((e := cached(groups=groups), plain_rows(e)), tied(groups=groups)):
        last = rows[:, :, -1]
        got = kept(tr.TOVA(keep=0.5, what=what, recent=recent).plan(evidence))
        for b in range(len(LAYOUTS)):
            mean = sum(last[2 * b + h, g] for h in range(2) for g in range(groups)) / (2 * groups)
            there, visual = real(evidence)[2 * b], image(evidence)[2 * b]
            among = visual if what == "visual" else there
            fixed = [j for j in among if j in there[len(there) - recent :]]
            free = [j for j in among if j not in fixed]
            best = top(mean, free, half_up(0.5, len(among)) - len(fixed))
            want = sorted({*(set(there) - set(among)), *fixed, *best})
            assert got[2 * b] == got[2 * b + 1] == want


@pytest.mark.parametrize("recent", [0, 1])
@pytest.mark.parametrize("groups", [1, 7])
def test_decode_drops_what_the_step_at_hand_sees_least(groups, recent):
    def cut(columns, scores, last, n):
        free = columns[: len(columns) - recent]
        total = int(0.6 * n + 0.5)
        return columns if len(columns) <= total else top(last, free, total - recent) + columns[len(columns) - recent :]

    against(tr.TOVA(keep=0.6, what="all", recent=recent), cut, kv_heads=1, groups=groups)


def test_needs_one_row_and_keeps_no_score():
    assert tr.TOVA().query_rows() == 1
    assert tr.TOVA().score(cached()) is None
    assert tr.TOVA().every() == 0


def test_bad_settings_and_input():
    with pytest.raises(ValueError, match="recent is an int >= 0"):
        tr.TOVA(recent=-1)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 0] = False
    x = torch.randn(2, 6, 8)
    evidence = tr.CacheEvidence(x, x, queries=x[:, None], kv_heads=2, visual=torch.ones(1, 6), valid=valid)
    with pytest.raises(ValueError, match="one choice for all heads"):
        tr.TOVA(keep=3).plan(evidence)
