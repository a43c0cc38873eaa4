"""ToFu against a plain reference written from the card, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, tiny_vit

import tokenreduce as tr


def plain_groups(metric, r, prefix):
    """ToMe's matching for one sample: members of every output in order, the destination first."""
    n = len(metric)
    m = (metric / metric.norm(dim=-1, keepdim=True)).double()
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    best = {}
    for a in even:
        s = [-math.inf if a < prefix or b < prefix else float(m[a] @ m[b]) for b in odd]
        top = max(range(len(odd)), key=lambda j: (s[j], -j))
        best[a] = (s[top], odd[top])
    order = sorted(even, key=lambda a: (-best[a][0], a))
    moved, rest = order[:r], order[r:]
    rest = sorted(rest) if prefix else rest
    outputs = [*range(prefix), *(a for a in rest if a >= prefix), *(b for b in odd if b >= prefix)]
    return [[o] + [a for a in moved if best[a][1] == o] for o in outputs]


def plain_mlerp(rows):
    """Direction of the mean, norm of the largest member."""
    mean = sum(rows) / len(rows)
    own = float(mean.norm())
    return mean if own == 0 or len(rows) == 1 else mean / own * max(float(v.norm()) for v in rows)


@pytest.mark.parametrize(("n", "prefix"), [(2, 0), (3, 1), (5, 2), (12, 1), (17, 0), (21, 5)])
@pytest.mark.parametrize("layer", [0, 3, 4, 5])
def test_agrees_with_the_card(n, prefix, layer):
    """Of six layers 0-3 prune and 4-5 merge; sizes do not weigh."""
    size = torch.randint(1, 5, (2, n)).float()
    e = evidence(n=n, prefix=prefix, layer=layer, size=size)
    r = (n - prefix) // 2
    plan = tr.ToFu(r=r).plan(e)
    got, mass = plan.reduce(e.x, size), plan.reduce_size(size)
    for b in range(2):
        groups = plain_groups(e.keys[b].mean(0), r, prefix)
        assert plan.representatives()[b].tolist() == [g[0] for g in groups]
        for k, group in enumerate(groups):
            merged = layer >= 4
            want = plain_mlerp([e.x[b, t] for t in group]) if merged else e.x[b, group[0]]
            torch.testing.assert_close(got[b, k], want, rtol=1e-5, atol=1e-5)
            assert float(mass[b, k]) == sum(float(size[b, t]) for t in (group if merged else group[:1]))


def two_pairs():
    """Tokens 0 and 2 look for a partner among 1 and 3; both find 1. Features are chosen for easy norms."""
    keys = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    return x[None], keys[None, None]


def test_worked_example():
    x, keys = two_pairs()
    e = tr.Evidence(x, keys, layer=7, depth=12)
    got = tr.ToFu(r=1).plan(e).reduce(x)[0]  # 0 joins 1: mean (1.5, 2) of norm 2.5, largest norm 4
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0], [2.4, 3.2], [1.0, 1.0]]))
    got = tr.ToFu(r=2).plan(e).reduce(x)[0]  # 0 and 2 join 1: mean (1, 4/3)
    torch.testing.assert_close(got, torch.tensor([[2.4, 3.2], [1.0, 1.0]]))
    early = tr.Evidence(x, keys, layer=6, depth=12)
    assert tr.ToFu(r=2).plan(early).reduce(x).tolist() == [[[0.0, 4.0], [1.0, 1.0]]]


def test_opposite_tokens_give_zero_and_not_nan():
    x, keys = two_pairs()
    x[0, 0] = -x[0, 1]
    got = tr.ToFu(r=1).plan(tr.Evidence(x, keys, layer=7, depth=12)).reduce(x)[0]
    assert got.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(("depth", "first"), [(3, 2), (6, 4), (12, 7), (13, 7), (24, 13)])
def test_default_switch(depth, first):
    plans = [tr.ToFu(keep=0.5).plan(evidence(n=99, layer=i, depth=depth, entry=100)) for i in range(depth)]
    kinds = [type(p).__name__ for p in plans if not p.is_identity]
    assert kinds[0] == "Prune"
    assert [i for i in range(depth) if isinstance(plans[i], tr.Merge)] == list(range(first, depth))


def test_switch_and_mode():
    x, keys = two_pairs()
    e = tr.Evidence(x, keys, layer=2, depth=12)
    pruned, mean, mlerp = [0.0, 4.0], [1.5, 2.0], [2.4, 3.2]
    for settings, want in (
        (dict(switch=2), mlerp), (dict(switch=3), pruned), (dict(switch=0, mode="prune"), pruned),
        (dict(mode="mean"), mean), (dict(mode=("mlerp", "prune")), mlerp),
        (dict(mode=["prune", "mean"], switch=1), mean),
    ):  # fmt: skip
        torch.testing.assert_close(tr.ToFu(r=1, **settings).plan(e).reduce(x)[0, 1], torch.tensor(want))


def test_a_pruned_token_can_leave_its_mass_behind():
    x, keys = two_pairs()
    size = torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    e = tr.Evidence(x, keys, size=size, layer=0, depth=12)
    dropped, kept = tr.ToFu(r=2).plan(e), tr.ToFu(r=2, keep_mass=True).plan(e)
    assert dropped.reduce_size(size).tolist() == [[3.0, 7.0]]
    assert kept.reduce_size(size).tolist() == [[10.0, 7.0]]
    assert torch.equal(kept.reduce(x, size), dropped.reduce(x, size))
    assert tr.ToFu(r=2, keep_mass=True, mode="mean").plan(e).reduce(x)[0, 0].tolist() == pytest.approx([1.0, 4 / 3])


def test_absent_tokens_do_not_change_a_merged_one():
    """Neither their features nor their norms, even when they are merged for lack of real ones."""
    x = torch.randn(1, 8, 4)
    x[:, 4:] *= 100
    valid = torch.arange(8)[None] < 4
    e = tr.Evidence(x, torch.randn(1, 2, 8, 3), size=valid.float(), valid=valid, layer=5, depth=6)
    plan = tr.ToFu(r=4).plan(e)
    alone = tr.ToFu(r=2).plan(tr.Evidence(x[:, :4], e.keys[:, :, :4], layer=5, depth=6))
    real = plan.gather(valid)[0]
    torch.testing.assert_close(plan.reduce(x, e.size)[:, real], alone.reduce(x[:, :4]))


@pytest.mark.parametrize("n", [1, 2, 3, 36])
@pytest.mark.parametrize("depth", [3, 6, 12, 24])
def test_keep_falls_by_equal_steps(depth, n):
    left = n
    for layer in range(depth):
        left = tr.ToFu(keep=0.5).plan(evidence(n=left + 1, layer=layer, depth=depth, entry=n + 1, batch=1)).k - 1
        assert left == n - (n - max(1, int(n * 0.5 + 0.5))) * (layer + 1) // depth
    assert left == max(1, int(n * 0.5 + 0.5))


def test_in_a_model_sizes_are_those_of_the_merging_layers():
    model = tiny_vit()
    with tr.patched(model, tr.ToFu(r=4)), tr.record(model, flops=False) as trace, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    assert trace.tokens == [33, 29, 25, 21, 17, 13]
    assert [type(p).__name__ for p in trace.plans] == ["Prune"] * 4 + ["Merge"] * 2
    assert int(trace.plan.reduce_size(torch.ones(1, 37)).sum()) == 21


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(switch=-1), "switch"), (dict(switch=1.5), "switch"), (dict(mode="merge"), "mode"),
        (dict(mode=("prune",)), "mode"), (dict(mode=("prune", "slerp")), "mode"), (dict(r=-2), "r is"),
        (dict(r=3, keep=0.5), "r or keep"),
    ],
)  # fmt: skip
def test_bad_settings(settings, names):
    with pytest.raises(ValueError, match=names):
        tr.ToFu(**settings)


def test_settings_as_text():
    assert tr.get_method("tofu:r=8,mode=[prune,mean],switch=3") == tr.ToFu(r=8, mode=("prune", "mean"), switch=3)
    assert tr.ToFu(mode="mean").mode == ("mean", "mean")
    assert not tr.ToFu(r=8).proportional
