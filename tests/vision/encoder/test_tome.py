"""ToMe against a plain reference written from the card, token by token."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from support import evidence

import tokenreduce as tr


def plain_tome(x, metric, size, r, prefix):
    """Card steps 2-7 for one sample: returns features, sizes and the list of members per output, in order."""
    n = len(x)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    r = min(r, (n - prefix) // 2)

    def cosine(i, j):
        return float(metric[i] @ metric[j] / (metric[i].norm() * metric[j].norm()))

    best = {}
    for a in even:
        scores = [-math.inf if a < prefix or b < prefix else cosine(a, b) for b in odd]
        top = max(range(len(odd)), key=lambda j: (scores[j], -j))
        best[a] = (scores[top], odd[top])
    order = sorted(even, key=lambda a: (-best[a][0], a))
    moved, rest = order[:r], order[r:]
    if prefix:
        rest = sorted(rest)
    lead = list(range(prefix))
    outputs = lead + [a for a in rest if a >= prefix] + [b for b in odd if b >= prefix]
    members = [[o] + [a for a in moved if best[a][1] == o] for o in outputs]
    mass = [sum(float(size[t]) for t in m) for m in members]
    merged = [sum(x[t] * float(size[t]) for t in m) / w for m, w in zip(members, mass, strict=True)]
    return torch.stack(merged), torch.tensor(mass), members


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [3, 7, 12, 17])
@pytest.mark.parametrize("r", [1, 3, 100])
def test_agrees_with_the_card(n, prefix, r):
    if n <= prefix:
        return
    size = torch.randint(1, 5, (2, n)).float()
    e = evidence(n=n, prefix=prefix, size=size)
    with pytest.warns(UserWarning, match="clamped") if r > (n - prefix) // 2 else nullcontext():
        plan = tr.ToMe(r=r).plan(e)
    got, mass, source = plan.reduce(e.x, size), plan.reduce_size(size), plan.sources()
    for b in range(2):
        x, want_mass, members = plain_tome(e.x[b], e.keys[b].mean(0), size[b], r, prefix)
        torch.testing.assert_close(got[b], x, rtol=1e-5, atol=1e-5)
        assert plan.is_identity or torch.allclose(mass[b], want_mass)
        for k, group in enumerate(members):
            assert sorted(group) == [t for t in range(n) if source[b, t] == k]


def test_ties_go_to_the_lower_index():
    x = torch.ones(1, 8, 4)
    plan = tr.ToMe(r=2).plan(tr.Evidence(x, keys=torch.ones(1, 2, 8, 4)))
    assert plan.src.tolist() == [[0, 2]]
    assert plan.sources()[0, [0, 1, 2]].tolist() == [plan.sources()[0, 1].item()] * 3


def test_zero_keys_do_not_make_nan():
    keys = torch.randn(1, 2, 9, 4)
    keys[:, :, 3] = 0
    plan = tr.ToMe(r=4).plan(tr.Evidence(torch.randn(1, 9, 4), keys=keys, protected=1))
    assert torch.isfinite(plan.reduce(torch.randn(1, 9, 4))).all()


def test_padding_takes_no_part():
    valid = torch.arange(17).expand(2, -1) < 13
    e = evidence(valid=valid, size=valid.float())
    source = tr.ToMe(r=6).plan(e).sources()
    for b in range(2):
        partners = [source[b, :13].tolist().count(int(s)) for s in source[b, 13:]]
        assert partners == [0] * 4


def test_protected_tokens_may_be_a_mask():
    mask = torch.zeros(17, dtype=torch.bool)
    mask[[0, 5, 8]] = True
    e = evidence(prefix=0)
    plan = tr.ToMe(r=5).plan(tr.Evidence(e.x, keys=e.keys, protected=mask))
    for b in range(2):
        for t in (0, 5, 8):
            assert (plan.sources()[b] == plan.sources()[b, t]).sum() == 1


def test_schedules_of_the_model():
    """37 tokens, r=6, six layers: the cap of the card gives 31, 25, 19, 13, 7, 4."""
    left, n = [], 37
    for layer in range(6):
        e = evidence(n=n, layer=layer, entry=37)
        with pytest.warns(UserWarning, match="clamped") if n == 7 else nullcontext():
            n = tr.ToMe(r=6).plan(e).k
        left.append(n)
    assert left == [31, 25, 19, 13, 7, 4]
    assert tr.ToMe(r=(13, -1.0)) == tr.ToMe(r=13, inflect=-1.0)
    assert tr.ToMe(r=[4, 2, 1]).r == (4, 2, 1)
    assert [tr.ToMe(r=[4, 0, 1]).acts_at(i, 6) for i in range(6)] == [True, False, True, False, False, False]


BAD = [{"r": -1}, {"r": [3, -1]}, {"r": 2, "keep": 0.5}, {"r": 2, "inflect": 3.0}, {"r": 1.5}]


@pytest.mark.parametrize("bad", BAD)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"\br\b|inflect"):
        tr.ToMe(**bad)


# -- the k-th variant ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tail", ["merge", "drop"])
@pytest.mark.parametrize(("n", "prefix", "k"), [(17, 1, 4), (19, 1, 4), (14, 2, 3), (9, 0, 2)])
def test_kth_agrees_with_the_card(n, prefix, k, tail):
    e = evidence(n=n, prefix=prefix)
    source = tr.get_method(f"tome_kth:k={k},tail={tail}").plan(e).sources()
    groups = (n - prefix) // k
    targets = [prefix + g * k + k - 1 for g in range(groups)]
    metric = e.keys.mean(1)
    for b in range(2):
        assert [int(source[b, t]) for t in targets] == list(range(prefix, prefix + groups))
        for t in range(prefix, n):
            if t in targets:
                continue
            if t >= prefix + groups * k and tail == "drop":
                assert source[b, t] == -1
                continue
            scores = torch.nn.functional.cosine_similarity(metric[b, t][None], metric[b, targets], dim=-1)
            assert source[b, t] == prefix + int(scores.argmax())


def test_a_plain_mean_ignores_padding_too():
    from tokenreduce.algorithms.matching import bipartite

    valid = torch.arange(9).expand(2, -1) < 3
    e = evidence(n=9, valid=valid, size=valid.float())
    e.x[:, 3:] = 1e6
    plan = bipartite(e.keys.mean(1), 4, e, by_size=False)
    out = plan.reduce(e.x, e.size)
    real = plan.gather(valid)
    assert float(out[real].abs().max()) < 100
