"""MiniCache's codec against its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from tokenreduce.vision.cache.minicache import MiniCache


def states(b=2, h=3, n=11, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    lower = torch.randn(b, h, n, d, generator=g)
    return lower, lower * 0.7 + 0.6 * torch.randn(b, h, n, d, generator=g)


def angle_of(a, b):
    cosine = float(a @ b / a.norm() / b.norm())
    return math.acos(max(-1.0, min(1.0, cosine)))


def reference(lower, upper, b, there, method):
    """{(head, token): (lower, upper)} as restored, and which tokens are kept."""
    low, up = lower[b].double(), upper[b].double()
    places = [(h, i) for h in range(low.shape[0]) for i in range(low.shape[1])]
    distance = {p: angle_of(low[p], up[p]) / math.pi for p in places}
    real = [p for p in places if there is None or bool(there[b, p[1]])]
    smallest, largest = min(distance[p] for p in real), max(distance[p] for p in real)
    border = smallest + method.gamma * (largest - smallest)
    kept = {
        "differ": {p for p in real if distance[p] > largest - method.gamma * (largest - smallest)},
        "guide": {p for p in real if distance[p] > border}, "printed": {p for p in real if distance[p] <= border},
    }[method.rule]  # fmt: skip
    out = {}
    for p in places:
        omega = distance[p] * math.pi
        e = math.sin((1 - method.t) * omega) / math.sin(omega) * low[p] / low[p].norm()
        e = e + math.sin(method.t * omega) / math.sin(omega) * up[p] / up[p].norm()
        out[p] = (low[p], up[p]) if p in kept else (e * low[p].norm(), e * up[p].norm())
    return out, kept


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "method",
    [MiniCache(), MiniCache(gamma=0.4), MiniCache(t=0.5, gamma=0.3, rule="guide"), MiniCache(rule="printed"),
     MiniCache(t=0.0), MiniCache(gamma=0.0)],
    ids=str,
)  # fmt: skip
def test_encode(method, padded):
    lower, upper = states()
    there = torch.ones(2, 11, dtype=torch.bool) if padded else None
    if padded:
        there[1, :4] = False
    paired = method.encode(lower, upper, there, True)
    got = [paired.restore(0), paired.restore(1)]
    for b in range(2):
        want, kept = reference(lower, upper, b, there, method)
        for p, both in want.items():
            for which, x in enumerate((lower, upper)):
                torch.testing.assert_close(got[which][b][p].double(), both[which], rtol=1e-4, atol=1e-5)
                if p in kept:
                    assert torch.equal(got[which][b][p], x[b][p])
    assert paired.n == 11


def test_about_one_token_in_twenty_is_kept_and_memory_falls():
    lower, upper = states(1, 4, 600, 64)
    paired = MiniCache().encode(lower, upper, None, True)
    kept = sum(len(set(row[real].tolist())) for row, real in zip(paired.kept[0], paired.real[0], strict=True))
    assert 0 < kept < 0.05 * 4 * 600
    assert paired.nbytes < 0.56 * 2 * lower.numel() * 4


def test_tokens_of_decode_steps_are_merged_and_follow():
    method, (lower, upper), more = MiniCache(gamma=0.4), states(), states(n=1, seed=5)
    first, second = method.encode(lower, upper, None, True), method.encode(*more, None, False)
    assert second.kept.shape[2] == 0
    both = first.then(second)
    for which in (0, 1):
        want = torch.cat([first.restore(which), second.restore(which)], 2)
        assert torch.equal(both.restore(which), want)
        for n in range(1, 13):
            assert torch.equal(both.first(n).restore(which), want[:, :, :n])
        assert torch.equal(both.rows(torch.tensor([1, 1, 0])).restore(which), want[[1, 1, 0]])


def test_directions_without_an_angle():
    """Equal, opposite and empty vectors: no NaN, magnitudes of their own."""
    a = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]])[None, None]
    b = torch.tensor([[6.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, 0.0], [0.0, 0.0]])[None, None]
    paired = MiniCache().encode(a, b, None, False)
    assert torch.equal(paired.restore(0)[0, 0, [0, 2, 3, 4]], a[0, 0, [0, 2, 3, 4]])
    assert torch.equal(paired.restore(1)[0, 0, [0, 2, 3, 4]], b[0, 0, [0, 2, 3, 4]])
    assert torch.isfinite(paired.restore(0)).all()
    torch.testing.assert_close(paired.restore(1).norm(dim=-1)[0, 0, 1], torch.tensor(1.0))
    kept = MiniCache().encode(a, b, None, True)
    assert torch.equal(kept.restore(1)[0, 0, 1], b[0, 0, 1]), "opposite ones differ most"


def test_samples_do_not_depend_on_each_other():
    lower, upper = states()
    both = MiniCache(gamma=0.3).encode(lower, upper, None, True)
    for b in range(2):
        alone = MiniCache(gamma=0.3).encode(lower[b : b + 1], upper[b : b + 1], None, True)
        assert torch.equal(alone.restore(0)[0], both.restore(0)[b])


def test_pairs():
    assert MiniCache().pairs(8) == ((4, 5), (6, 7))
    assert MiniCache().pairs(7) == ((3, 4), (5, 6))
    assert MiniCache(start=2).pairs(7) == ((2, 3), (4, 5))
    assert MiniCache(start=8).pairs(8) == ()
    assert [MiniCache().acts_at(i, 7) for i in range(7)] == [False] * 3 + [True] * 4


def test_bad_input():
    for settings in ({"start": -1}, {"t": 1.5}, {"gamma": -0.1}, {"rule": "best"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            MiniCache(**settings)
    lower, upper = states()
    upper[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        MiniCache().encode(lower, upper, None, True)
