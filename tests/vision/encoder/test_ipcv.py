"""IPCV's plans against its card in plain loops: which patches stay, who their neighbours are, what is rebuilt."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.core.plan import Rebuild


def drawn(n, batch=2, channels=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, channels, generator=g), torch.randn(batch, n, channels, generator=g)


def by_hand(h, before, keep, k, prefix=0, there=None):
    """Of one sample: places that stay, and for every other one its neighbours among them, by loops."""
    n = len(h)
    free = [i for i in range(prefix, n) if there is None or there[i]]
    number = max(int(len(free) * keep), 1) if isinstance(keep, float) else min(keep, len(free))
    change = {i: float((h[i] - before[i]).double().norm()) for i in free}
    best = sorted(free, key=lambda i: (-change[i], i))[:number]
    stay = sorted([*range(prefix), *best])
    near = {}
    for i in range(n):
        if i not in stay:
            far = {j: float((h[i] - h[j]).double().norm()) for j in sorted(best)}
            near[i] = sorted(far, key=lambda j: (round(far[j], 5), j))[:k]
    return stay, near


def rebuilt(h, stay, near, y):
    """All tokens of one sample from ``y``, those that stayed in order."""
    now = dict(zip(stay, y, strict=True))
    for i, friends in near.items():
        now[i] = h[i] + sum(now[j] - h[j] for j in friends) / len(friends)
    return torch.stack([now[i] for i in range(len(h))])


@pytest.mark.parametrize(("n", "prefix", "keep", "k"), [
    (17, 1, 0.35, 10), (16, 0, 0.35, 3), (21, 5, 0.5, 4), (9, 0, 2, 10), (12, 1, 0.01, 10), (37, 1, 20, 1),
])  # fmt: skip
def test_the_plan_is_the_cards(n, prefix, keep, k):
    h, before = drawn(n)
    plan = tr.IPCV(keep=keep, top_k=k).plan(tr.Evidence(h, before=before, protected=prefix))
    y = torch.randn(2, plan.k, 6, generator=torch.Generator().manual_seed(3))
    full = plan.rebuild(y)
    for b in range(2):
        stay, near = by_hand(h[b], before[b], keep, k, prefix)
        assert plan.keep[b].tolist() == stay
        for i, friends in near.items():
            assert sorted(plan.keep[b][plan.near[b, i]].tolist()) == sorted(friends)
        torch.testing.assert_close(full[b], rebuilt(h[b], stay, near, y[b]))
        assert torch.equal(full[b, stay], y[b]), "those that stayed are themselves, to the bit"
    assert torch.equal(plan.rebuild(plan.reduce(h)), h), "at the drop nothing has moved"


def test_ties_go_to_the_lower_index():
    """Equal patches: the first ones stay, and of equally near ones the first are neighbours."""
    h = torch.ones(1, 8, 3)
    plan = tr.IPCV(keep=4, top_k=2).plan(tr.Evidence(h, before=torch.zeros_like(h)))
    assert plan.keep.tolist() == [[0, 1, 2, 3]]
    assert plan.near[0, 4:].sort(-1).values.tolist() == [[0, 1]] * 4


def test_padding_neither_stays_nor_helps():
    """Samples with padding keep shares of what they have, and one with fewer than top_k takes those."""
    h, before = drawn(14, batch=3)
    valid = torch.ones(3, 14, dtype=torch.bool)
    valid[1, 9:], valid[2, :10] = False, False  # behind, and in front
    plan = tr.IPCV(keep=0.5, top_k=4).plan(tr.Evidence(h, before=before, valid=valid))
    y = torch.randn(3, plan.k, 6)
    full = plan.rebuild(y)
    for b in range(3):
        stay, near = by_hand(h[b], before[b], 0.5, 4, there=valid[b].tolist())
        real = torch.ones(plan.k, dtype=torch.bool) if plan.valid is None else plan.valid[b]
        assert plan.keep[b][real].tolist() == stay
        want = rebuilt(h[b], stay, near, y[b][real])
        torch.testing.assert_close(full[b][valid[b]], want[valid[b]])
    assert plan.valid.sum(1).tolist() == [7, 4, 2]


def test_half_precision_is_summed_in_float32():
    h, before = drawn(33, channels=16)
    plan = tr.IPCV(keep=0.4, top_k=7).plan(tr.Evidence(h.bfloat16(), before=before.bfloat16()))
    y = torch.randn(2, plan.k, 16).bfloat16()
    wide = Rebuild(plan.n, plan.keep, None, anchor=h.bfloat16().double(), near=plan.near)
    assert plan.rebuild(y).dtype == torch.bfloat16
    assert torch.equal(plan.rebuild(y), wide.rebuild(y.double()).to(torch.bfloat16))


def test_other_widths_are_refused():
    h, before = drawn(9)
    plan = tr.IPCV(keep=3).plan(tr.Evidence(h, before=before))
    with pytest.raises(ValueError, match="6 channels were set aside"):
        plan.rebuild(torch.randn(2, 3, 5))


@pytest.mark.parametrize(("spec", "said"), [
    ("ipcv:layer=1", "layer is an int >= 2"), ("ipcv:keep=0", "keep"), ("ipcv:as_layer=-1", "as_layer"),
    ("ipcv:top_k=0", "top_k"), ("ipcv:per=frame", "per"),
])  # fmt: skip
def test_bad_settings(spec, said):
    with pytest.raises(ValueError, match=said):
        tr.get_method(spec)
