"""OTPrune against the steps of its card, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def greedy(x, keep, gamma=0.01):
    """Determinants from scratch in every step: the token with the largest determinant of the chosen part."""
    x = x.double()
    n, channels = x.shape
    columns = [math.sqrt(sum(float(x[i, c]) ** 2 for i in range(n))) for c in range(channels)]
    x = torch.stack([x[:, c] / max(columns[c], 1e-12) for c in range(channels)], 1)
    s = x @ x.T
    kernel = torch.eye(n, dtype=torch.double) + gamma * s @ s.T
    chosen = []
    for _ in range(keep):
        rest = [i for i in range(n) if i not in chosen]
        volume = {i: float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]])[1]) for i in rest}
        most = max(volume.values())
        chosen.append(min(i for i in rest if volume[i] >= most - 1e-11))
    return chosen


@pytest.mark.parametrize(("n", "channels"), [(2, 3), (7, 12), (16, 40), (15, 4)])
@pytest.mark.parametrize("keep", [1, 3, 0.5])
def test_is_the_greedy_choice_of_the_card(n, channels, keep):
    x = noise(2, n, channels, seed=n)
    method = tr.OTPrune(keep=keep)
    plan, want = method.plan(tr.Evidence(x)), method.total(n)
    if want >= n:
        assert plan.is_identity
        return
    for b in range(2):
        chosen = greedy(x[b], want)
        assert method.order(tr.Evidence(x))[b].tolist() == chosen
        assert plan.keep[b].tolist() == sorted(chosen)


def test_scaling_a_channel_changes_nothing_and_scaling_a_token_does():
    x = noise(1, 20, 30)
    want = tr.OTPrune(keep=6).order(tr.Evidence(x))
    assert torch.equal(tr.OTPrune(keep=6).order(tr.Evidence(x * torch.linspace(0.5, 9, 30))), want)
    longer = x.clone()
    longer[0, 5] *= 9
    assert tr.OTPrune(keep=6).order(tr.Evidence(longer))[0, 0] == 5 != want[0, 0]


def test_totals_are_half_to_even_and_at_least_one():
    assert [tr.OTPrune(keep=0.5).total(n) for n in (3, 5, 7)] == [2, 2, 4]
    assert tr.OTPrune().total(576) == 56
    assert tr.OTPrune(keep=0.01).total(9) == 1


def test_ties_constant_channels_and_duplicates():
    x = noise(1, 5, 8).repeat(1, 2, 1)
    order = tr.OTPrune(keep=7).order(tr.Evidence(x))[0].tolist()
    assert order[0] < 5, "of two equal tokens the first"
    assert len(set(order)) == 7
    x[:, :, 2] = 0
    assert tr.OTPrune(keep=7).order(tr.Evidence(x))[0].tolist() == greedy(x[0], 7)
    assert tr.OTPrune(keep=3).order(tr.Evidence(torch.ones(1, 6, 4))).tolist() == [[0, 1, 2]]


def test_half_precision_does_not_change_the_choice():
    x = noise(1, 40, 64).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tr.OTPrune(keep=9).plan(tr.Evidence(x)) == tr.OTPrune(keep=9).plan(tr.Evidence(x.float()))


def test_samples_of_unequal_length():
    x, valid = noise(2, 9, 6), torch.ones(2, 9, dtype=torch.bool)
    valid[1, 5:] = False
    plan = tr.OTPrune(keep=0.5).plan(tr.Evidence(x, valid=valid))
    assert plan.keep[0][plan.valid[0]].tolist() == sorted(greedy(x[0], 4))
    assert plan.keep[1][plan.valid[1]].tolist() == sorted(greedy(x[1, :5], 2))


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), True])
def test_bad_gamma(bad):
    with pytest.raises(ValueError, match="gamma"):
        tr.OTPrune(gamma=bad)
