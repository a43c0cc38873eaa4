"""AIM's merging against the steps of its card, token by token in plain loops."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.core.plan import Chain, Merge
from tokenreduce.vision.projector.aim_merge import AIMMerge


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(v):
    return v / max(float(v.norm()), 1e-12)


def step(tokens, r):
    """One step on a list of (place, vector, members): steps 1 to 3 of the card."""
    evens, odds = tokens[::2], tokens[1::2]
    best = []
    for _, v, _ in evens:
        cosines = [float(unit(v) @ unit(w)) for _, w, _ in odds]
        j = max(range(len(odds)), key=lambda j: (cosines[j], -j))
        best.append((cosines[j], j))
    ranked = sorted(range(len(evens)), key=lambda i: (-best[i][0], i))
    gone, rest = ranked[:r], ranked[r:]
    out = [evens[i] for i in rest]
    for j, (place, v, members) in enumerate(odds):
        mine = [i for i in gone if best[i][1] == j]
        mean = torch.stack([v, *(evens[i][1] for i in mine)]).mean(0)
        out.append((place, mean, members + [m for i in mine for m in evens[i][2]]))
    return out


def reference(x, keep):
    tokens = [(i, v, [i]) for i, v in enumerate(x.double())]
    while len(tokens) > keep:
        tokens = step(tokens, min(len(tokens) // 2, len(tokens) - keep))
    return tokens


@pytest.mark.parametrize("n", [2, 3, 5, 7, 16, 33])
@pytest.mark.parametrize("keep", [1, 2, 0.25, 0.4, 0.5, 0.9])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_is_the_merging_of_the_card(n, keep, prefix):
    x = noise(2, n + prefix, 6, seed=n)
    plan = AIMMerge(keep=keep).plan(tr.Evidence(x, protected=prefix))
    wanted = min(n, keep) if isinstance(keep, int) else max(1, int(keep * n + 0.5))
    if wanted == n:
        assert plan.is_identity
        return
    out, sources, places = plan.reduce(x), plan.sources(), plan.representatives()
    assert plan.k == wanted + prefix
    for b in range(2):
        tokens = reference(x[b, prefix:], wanted)
        assert torch.equal(out[b, :prefix], x[b, :prefix])
        assert places[b].tolist() == [*range(prefix), *(prefix + place for place, _, _ in tokens)]
        for k, (_, value, members) in enumerate(tokens):
            torch.testing.assert_close(out[b, prefix + k], value.float(), rtol=1e-4, atol=1e-5)
            assert (sources[b] == prefix + k).nonzero().flatten().tolist() == sorted(prefix + m for m in members)


def test_published_numbers_and_steps():
    """Two halvings of a frame of 196, three of 576."""
    for n, keep, sizes in ((196, 0.25, [98, 49]), (576, 0.125, [288, 144, 72]), (196, 0.4, [98, 78])):
        plan = AIMMerge(keep=keep).plan(tr.Evidence(noise(1, n, 8)))
        assert isinstance(plan, Chain)
        assert [p.k for p in plan.plans] == sizes
    assert AIMMerge().keep == 0.25
    one = AIMMerge(keep=0.75).plan(tr.Evidence(noise(1, 196, 8)))
    assert isinstance(one, Merge)
    assert one.k == 147


def test_worked_example():
    """Even places 0 and 2 both join place 1, 4 stays: it leads, and 1 is the mean of three, not of a mean."""
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.2], [1.0, 0.1], [0.0, 3.0], [-1.0, 0.5]]])
    plan = AIMMerge(keep=3).plan(tr.Evidence(x))
    assert plan.representatives().tolist() == [[4, 1, 3]]
    torch.testing.assert_close(plan.reduce(x)[0], torch.tensor([[-1.0, 0.5], [4 / 3, 0.1], [0.0, 3.0]]))
    assert plan.untouched().tolist() == [[True, False, True]]


def test_a_mean_of_means():
    """Sizes do not count: of 4 alike in direction, 0 joins 1 and 2 joins 3, then (0,1) joins (2,3)."""
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [10.0, 1.0], [20.0, 2.0], [7.0, 0.9], [9.0, 0.8]]])
    first = AIMMerge(keep=3).plan(tr.Evidence(x))
    assert first.sources()[0].tolist() == [0, 0, 1, 1, 1, 2]  # 2 and 4 are nearest to 3
    second = AIMMerge(keep=2).plan(tr.Evidence(x))
    means = [x[0, :2].mean(0), x[0, 2:5].mean(0), x[0, 5]]
    cosine = [float(unit(means[i]) @ unit(means[1])) for i in (0, 2)]
    joined = 0 if cosine[0] > cosine[1] else 2
    stays = 2 - joined
    want = torch.stack([means[stays], (means[joined] + means[1]) / 2])
    torch.testing.assert_close(second.reduce(x)[0], want)


def test_ties_zero_vectors_and_nan():
    plan = AIMMerge(keep=6).plan(tr.Evidence(torch.ones(1, 8, 3)))
    assert plan.sources()[0].tolist() == [2, 2, 2, 3, 0, 4, 1, 5], "the lower places go, all to the first odd one"
    x = noise(1, 8, 4)
    x[0, 2] = 0
    out = AIMMerge(keep=5).plan(tr.Evidence(x)).reduce(x)
    for k, (_, value, _) in enumerate(reference(x[0], 5)):
        torch.testing.assert_close(out[0, k], value.float())
    x[0, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        AIMMerge(keep=5).plan(tr.Evidence(x))


def test_autocast_changes_nothing():
    x = noise(1, 40, 16)
    want = AIMMerge().plan(tr.Evidence(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert AIMMerge().plan(tr.Evidence(x)) == want


def test_masks_and_unequal_samples_are_refused():
    ends = torch.zeros(1, 8, dtype=torch.bool)
    ends[0, 3] = True
    with pytest.raises(ValueError, match="aim-merge merges"):
        AIMMerge(keep=4).plan(tr.Evidence(noise(1, 8, 4), protected=ends, cls=False))


def test_settings():
    assert tr.get_method("aim-merge:keep=72") == AIMMerge(keep=72)
    with pytest.raises(ValueError, match="keep is a number of tokens"):
        AIMMerge(keep=None)
