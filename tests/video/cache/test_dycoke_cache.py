from __future__ import annotations

import pytest
import torch

from tokenreduce.core.evidence import Earlier, Evidence
from tokenreduce.video.cache.dycoke_cache import DyCokeCache


def step(rows, visual, earlier=None):
    """One head sees ``rows``, the other twice as much of the same: the mean is what counts."""
    rows = torch.tensor(rows)
    visual = torch.tensor([[c == "v" for c in v] for v in visual])
    return Evidence(
        torch.zeros(*rows.shape, 0), attention=torch.stack([rows * 0.5, rows * 1.5], 1)[:, :, None], visual=visual,
        cls=False, layer=3, depth=8, earlier=earlier,
    )  # fmt: skip


def kept(plan):
    return [row.nonzero().flatten().tolist() for row in plan.sources() >= 0]


ROW = [0.3, 0.05, 0.2, 0.1, 0.15, 0.05, 0.15]


def test_the_largest_shares_stay_with_all_text_and_ties_go_to_the_first():
    assert kept(DyCokeCache(p=0.6).plan(step([ROW], ["tvvvvvt"]))) == [[0, 2, 4, 6]]
    assert kept(DyCokeCache(p=0.2).plan(step([ROW], ["tvvvvvt"]))) == [[0, 1, 2, 3, 4, 6]]


@pytest.mark.parametrize(("n", "p", "left"), [(10, 0.7, 3), (10, 0.9, 1), (10, 0.95, 1), (7, 0.7, 2), (196, 0.8, 39)])
def test_counts_are_rounded_down_and_one_at_least(n, p, left):
    row = torch.linspace(1, 2, n).tolist()
    (got,) = kept(DyCokeCache(p=p).plan(step([row], ["v" * n])))
    assert got == list(range(n - left, n))


def test_a_step_like_the_one_before_uses_its_choice_and_another_does_not():
    now = [[0.3, 0.05, 0.2, 0.1, 0.35], [0.3, 0.05, 0.2, 0.1, 0.35]]
    before = torch.tensor([[0.0, 0.06, 0.19, 0.1, 0.0], [0.0, 0.9, 0.0, 0.05, 0.0]])  # alike, and not
    stayed = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 0, 0, 1]]).bool()
    evidence = step(now, ["tvvvt", "tvvvt"], Earlier(before, stayed))
    assert kept(DyCokeCache(keep=1).plan(evidence)) == [[0, 1, 4], [0, 2, 4]]
    assert kept(DyCokeCache(keep=1, reuse=False).plan(evidence)) == [[0, 1, 2, 3, 4], [0, 2, 4]]
    assert kept(DyCokeCache(keep=1, gate=1.0).plan(evidence)) == [[0, 2, 4], [0, 2, 4]]


def test_only_visual_tokens_count_for_the_gate():
    before = torch.tensor([[9.0, 0.05, 0.2, 0.1, -9.0]])
    evidence = step([[0.3, 0.05, 0.2, 0.1, 0.35]], ["tvvvt"], Earlier(before, torch.tensor([[1, 0, 0, 1, 1]]).bool()))
    assert kept(DyCokeCache(keep=1).plan(evidence)) == [[0, 3, 4]]


def test_settings():
    assert DyCokeCache().plan(step([ROW], ["tvvvvvt"])) == DyCokeCache(p=0.7).plan(step([ROW], ["tvvvvvt"]))
    assert DyCokeCache(p=0.0).plan(step([ROW], ["tvvvvvt"])).is_identity
    assert [DyCokeCache().acts_at(i, 8) for i in range(8)] == [i == 3 for i in range(8)]
    for bad in (dict(p=1.0), dict(p=-0.1), dict(gate=0), dict(gate=1.1), dict(layer=0), dict(p=0.5, keep=3)):
        with pytest.raises(ValueError, match="|".join(bad)):
            DyCokeCache(**bad)
    with pytest.raises(ValueError, match="reuse"):
        DyCokeCache(reuse=1)
