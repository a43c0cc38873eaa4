"""EMS against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cached import LAYOUTS, cached, half_up, image, kept, plain_rows, real, tied, top

import tokenreduce as tr


def scores_of(rows, there, window, kernel, combine):
    """{slot: score} of one row (G,R,N); R are all queries."""
    rows = rows.mean(0)
    whole = {j: float(rows[:, j].sum()) / (len(there) - place) for place, j in enumerate(there)}
    last = {j: float(rows[-window:, j].sum()) for j in there}
    around = lambda j: range(j - kernel // 2, j + kernel // 2 + 1)
    local = {j: sum(last.get(i, 0.0) for i in around(j)) / kernel for j in there}
    scale = sum(local.values()) / sum(whole.values())
    both = max if combine == "max" else lambda a, b: a + b
    return {j: both(whole[j] * scale, local[j]) for j in there}


def classes(evidence, i, scores, among, centres, tau, least):
    """{slot: centre} of the slots that join one."""
    order, total, sum_ = sorted(among, key=lambda j: (-scores[j], j)), sum(scores[j] for j in among), 0.0
    needed = set()
    for j in order:
        if sum_ < tau * total:
            needed.add(j)
        sum_ += scores[j]
    out = {}
    keys, values = evidence.keys[i].double(), evidence.values[i].double()
    for j in among:
        if j in centres or j not in needed:
            continue
        alike = {
            c: max(0.0, float(F.cosine_similarity(keys[j], keys[c], dim=0)))
            * max(0.0, float(F.cosine_similarity(values[j], values[c], dim=0)))
            for c in sorted(centres)
        }
        best = max(alike.values())
        if best >= least:
            out[j] = min(c for c, a in alike.items() if a == best)
    return out


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(combine="sum", tau=0.9, similarity=0.0),
        dict(similarity=0.0, tau=1.0),
        dict(what="all", similarity=0.05),
        dict(weights="equal", similarity=0.1, kernel_size=1),
        dict(similarity=1.0),
    ],
)
def test_what_stays_what_joins_and_what_goes(groups, settings):
    method = tr.EMS(**{"keep": 0.4, "window_size": 4, "similarity": 0.2, **settings})
    # The batch has rows that keep and merge different numbers of slots.
    evidence = cached(groups=groups)
    rows, plan = plain_rows(evidence), method.plan(evidence)
    at, values = kept(plan), plan.reduce(evidence.values)
    sizes = plan.reduce_size(None)
    sources = plan.sources()
    merged = 0
    for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        scores = scores_of(rows[i], there, 4, method.kernel_size, method.combine)
        among = visual if method.what == "visual" else there
        fixed = there[-4:] if method.what == "all" else []
        free = [j for j in among if j not in fixed]
        centres = fixed + top(scores, free, half_up(0.4, len(among)) - len(fixed))
        stay = sorted({*(set(there) - set(among)), *centres})
        assert at[i] == stay
        into = classes(evidence, i, scores, among, centres, method.tau, method.similarity)
        merged += len(into)
        first = plan.k - len(stay)
        for place, j in enumerate(stay):
            members = [j, *(m for m, c in into.items() if c == j)]
            weight = [scores[m] if method.weights == "score" else 1.0 for m in members]
            want = sum(w * evidence.values[i, m].double() for w, m in zip(weight, members, strict=True)) / sum(weight)
            torch.testing.assert_close(values[i, first + place].double(), want, rtol=1e-4, atol=1e-5)
            if len(members) == 1:
                assert torch.equal(values[i, first + place], evidence.values[i, j])
            assert float(sizes[i, first + place] if sizes is not None else 1) == pytest.approx(len(members))
            assert all(int(sources[i, m]) == first + place for m in members)
        assert sum(int(s) >= 0 for s in sources[i]) == len(stay) + len(into)
    assert (merged > 0) == (method.similarity < 1)


def test_ties():
    """Equal scores: the lower slots are the centres; equal likeness: the lower centre."""
    x = torch.ones(2, 7, 4)
    attention = torch.full((2, 1, 7, 7), 0.25).tril()
    evidence = tr.CacheEvidence(x, x, attention, kv_heads=1, visual=torch.tensor([[0, 1, 1, 1, 1, 1, 0]] * 2))
    plan = tr.EMS(keep=2, window_size=1, kernel_size=1, tau=1.0).plan(evidence)
    assert kept(plan) == [[0, 1, 2, 6]] * 2
    assert plan.sources().tolist() == [[0, 1, 2, 1, 1, 1, 3]] * 2


def test_merging_keys_and_bias():
    plain, turned = cached(), cached(mrope=True)
    assert not tr.EMS().merges_keys(plain)
    assert tr.EMS(merge_keys=True).merges_keys(plain)
    assert not tr.EMS(merge_keys=True).merges_keys(turned)
    assert not tr.EMS().counts_merged()
    assert tr.EMS(prop_attn=True).counts_merged()


def test_nothing_joins_where_nothing_is_alike_or_left():
    assert isinstance(tr.EMS(keep=0.4, window_size=4, similarity=1.0).plan(cached()), tr.Prune)
    assert isinstance(tr.EMS(keep=0.4, window_size=4, similarity=0.0).plan(cached()), tr.Merge)
    assert tr.EMS(keep=0.4, window_size=4).plan(tied()[0]).k


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window_size=0), "window_size is an int >= 1"),
        (dict(kernel_size=2), "odd"),
        (dict(combine="mean"), "combine"),
        (dict(tau=0.0), "tau is a number in"),
        (dict(similarity=1.5), "similarity is a number in"),
        (dict(weights="none"), "weights"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tr.EMS(**settings)


def test_budget_below_the_window():
    with pytest.raises(ValueError, match="always stay"):
        tr.EMS(keep=4, window_size=8, what="all").plan(cached(LAYOUTS))
