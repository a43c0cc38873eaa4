"""VidCom2 against the steps of its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.video.projector.vidcom2 import VidCom2


def reference(x, t, ratio, target=None, channels=0.5, temperature=0.01):
    """Card, steps 1 to 5 and, with a ``target``, step 6, on one video (T*n,C) in float64."""
    x = x.double()
    c, n = x.shape[1], len(x) // t
    variance = [float(((x[:, i] - x[:, i].mean()) ** 2).mean()) for i in range(c)]
    quiet = sorted(range(c), key=lambda i: (variance[i], i))[: max(1, int(c * channels))]
    f = [row[quiet] / max(float(row[quiet].norm()), 1e-12) for row in x]

    def gauss(a, b):
        d = float(((a - b) ** 2).sum())
        return sum(math.exp(-d / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    g = sum(f) / len(f)
    v = [gauss(row, g) for row in f]
    centres = [sum(f[i * n : i * n + n]) / n for i in range(t)]
    s = [v[i] + gauss(f[i], centres[i // n]) for i in range(t * n)]
    score = [-sum(v[i * n : i * n + n]) / n for i in range(t)]
    e = [math.exp((q - max(score)) / temperature) for q in score]
    p = [q / sum(e) for q in e]
    keep = []
    for i in range(t):
        k = min(max(round(min(ratio * (1 + p[i] - sum(p) / t), 1) * n), 1), n)
        keep += sorted(range(i * n, i * n + n), key=lambda j: (s[j], j))[:k]
    if target is not None:
        by_score = sorted(range(t * n), key=lambda j: (s[j], j))
        inside = [j for j in by_score if j in set(keep)]
        keep = (inside + [j for j in by_score if j not in set(keep)])[:target]
    return sorted(keep)


def film(t, n, c=9, spread=0.2, batch=2):
    """Frames that resemble each other, so that neither all nor none of the softmax is one frame's."""
    return torch.randn(batch, 1, n, c).add(spread * torch.randn(batch, t, n, c)).flatten(1, 2)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("n", [1, 5, 9])
@pytest.mark.parametrize("ratio", [0.11, 0.27, 0.63, 0.92])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_is_the_card(t, n, ratio, temperature):
    if (t, n) == (2, 1):
        return  # both tokens are as far from their mean: rounding decides
    x = film(t, n)
    keep = max(1, int(ratio * t * n + 0.5))
    exact, plain = (VidCom2(keep=ratio, temperature=temperature, plain=p) for p in (False, True))
    e = tr.Evidence(x, grid=(t, 1, n))
    if keep == t * n:
        assert exact.plan(e).is_identity
        return
    plan, free = exact.plan(e), plain.plan(e)
    there = free.validity()
    for b in range(2):
        assert plan.representatives()[b].tolist() == reference(x[b], t, ratio, keep, temperature=temperature)
        left = free.representatives()[b]
        left = left if there is None else left[there[b]]
        assert left.tolist() == reference(x[b], t, ratio, temperature=temperature)
        alone = exact.plan(tr.Evidence(x[b : b + 1], grid=(t, 1, n)))
        assert torch.equal(alone.representatives()[0], plan.representatives()[b])
    assert plan.k == keep


def test_plain_counts_miss_the_budget_both_ways():
    """Card: fewer than 12 of 8x15 at R = 0.1, where one frame takes the softmax; and one of 5 each at R = 0.11."""
    v = torch.full((1, 8, 15), 2.0)
    v[:, 2] = 1.0
    assert VidCom2().quota(v, 0.1).tolist() == [[1, 1, 3, 1, 1, 1, 1, 1]]  # round(1.5 * (1 + 7/8)), round(1.5 * 7/8)
    e = tr.Evidence(film(8, 15), grid=(8, 3, 5))
    assert VidCom2(keep=0.1, plain=True).plan(e).k < 12
    assert VidCom2(keep=0.1).plan(e).k == 12
    e = tr.Evidence(film(8, 5), grid=(8, 1, 5))
    assert VidCom2(keep=0.11, plain=True).plan(e).k == 8
    assert VidCom2(keep=0.11).plan(e).k == 4


def test_quota_worked_example():
    """Two frames, softmax (e/(1+e), 1/(1+e)) at temperature 1: p - mean p = +-0.231; never above n, never below 1."""
    v = torch.tensor([[[1.0] * 10, [2.0] * 10]])
    method = VidCom2(temperature=1.0)
    assert method.quota(v, 0.5).tolist() == [[6, 4]]  # 6.155, 3.845
    assert method.quota(v, 0.9).tolist() == [[10, 7]]  # min(11.08, 10), 6.92
    assert method.quota(v, 0.01).tolist() == [[1, 1]]
    assert VidCom2().quota(v, 0.4).tolist() == [[6, 2]]  # one frame takes all: 1.5 R and 0.5 R
    still = torch.full((1, 3, 2), 2.5)
    assert VidCom2().quota(still, 0.25).tolist() == [[1, 1, 1]]  # round(0.5) = 0, at least one
    assert VidCom2().quota(torch.full((1, 3, 10), 2.5), 0.25).tolist() == [[2, 2, 2]]  # half to even


def test_only_the_quiet_channels_count():
    """Loud channels hold noise; the two quiet ones say which token is unlike the others."""
    x = torch.cat([torch.ones(1, 8, 2), 50 * torch.randn(1, 8, 2)], 2)
    x[0, 5, :2] = torch.tensor([1.0, 0.5])
    assert VidCom2(keep=1).plan(tr.Evidence(x, grid=(2, 2, 2))).keep.tolist() == [[5]]


def test_one_channel_zero_tokens_and_still_videos():
    one = VidCom2(keep=3).plan(tr.Evidence(torch.randn(2, 12, 1), grid=(3, 2, 2)))
    assert one.k == 3
    assert VidCom2(keep=5).plan(tr.Evidence(torch.zeros(1, 12, 4), grid=(3, 2, 2))).keep.tolist() == [[0, 1, 4, 5, 8]]
    assert VidCom2(keep=2).plan(tr.Evidence(torch.zeros(1, 12, 4), grid=(3, 2, 2))).keep.tolist() == [[0, 4]]


def test_a_count_is_a_ratio_and_small_budgets_leave_frames_empty():
    x = film(6, 10)
    e = tr.Evidence(x, grid=(6, 2, 5))
    assert VidCom2(keep=15).plan(e) == VidCom2(keep=0.25).plan(e)
    for keep in (1, 4, 59):
        plan = VidCom2(keep=keep).plan(e)
        for b in range(2):
            assert plan.keep[b].tolist() == reference(x[b], 6, keep / 60, keep)


def test_prefix_with_and_without_exact_counts():
    x = film(4, 6)
    e = tr.Evidence(torch.cat([torch.randn(2, 2, 9), x], 1), protected=2, grid=(4, 2, 3))
    plan, free = VidCom2(keep=0.4).plan(e), VidCom2(keep=0.4, plain=True).plan(e)
    there = free.validity()
    for b in range(2):
        assert plan.keep[b].tolist() == [0, 1] + [2 + i for i in reference(x[b], 4, 0.4, 10)]
        left = free.keep[b] if there is None else free.keep[b][there[b]]
        assert left.tolist() == [0, 1] + [2 + i for i in reference(x[b], 4, 0.4)]


def test_a_model_and_nan():
    e = visual(ORIGINS["frames"])
    for b in range(2):
        assert VidCom2().plan(e).keep[b].tolist() == reference(e.x[b], 3, 0.25, 12)
    e.x[0, 20, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        VidCom2().plan(e)


@pytest.mark.parametrize(
    ("field", "bad"),
    [("channels", 0), ("channels", 1.1), ("channels", True), ("temperature", 0.0), ("temperature", "hot"),
     ("temperature", float("nan")), ("bandwidths", ()), ("bandwidths", 0.5), ("bandwidths", (1.0, -1.0)),
     ("plain", 1), ("keep", 0)],
)  # fmt: skip
def test_bad_settings(field, bad):
    with pytest.raises(ValueError, match=field):
        VidCom2(**{field: bad})


def test_text_round_trip():
    method = VidCom2(keep=0.5, bandwidths=(0.5, 1.0), plain=True)
    assert tr.get_method(method.spec()) == method
