from __future__ import annotations

import pytest
import torch
from cache_cases import Cache, agrees, case, keeps_all, kept, layers, top

import tokenreduce as tr
from tokenreduce.core.plan import Prune


def removed_of(scores, among, fixed, target):
    """The card's search: keys that go from each layer."""
    p, low, high = 0.5, 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        removed = []
        for s, a, f in zip(scores, among, fixed, strict=True):
            ranked = sorted((float(s[i]) for i in a), reverse=True)
            total, below = 0.0, 0
            for x in ranked:
                total += x / sum(ranked)
                below += total < p
            removed.append(max(0, len(a) - 1 - below - f))
        if abs(sum(removed) - target) < 5:
            break
        low, high = (low, p) if sum(removed) < target else (p, high)
    return removed


def reference_of(keep, what="all", start=1, exact=True, ratio=None):
    def reference(samples):
        scores = [s.a.mean((0, 1)).sum(0) for s in samples]
        among = [list(range(s.n)) if what == "all" else s.visual for s in samples]
        free = [[i for i in a if start <= i < s.n - 1] for s, a in zip(samples, among, strict=True)]
        whole = sum(map(len, among))
        if ratio is not None:
            target = ratio * whole
        else:
            target = whole - keep * (whole if isinstance(keep, float) else len(samples))
        searched = removed_of(scores, among, [len(a) - len(f) for a, f in zip(among, free, strict=True)], target)
        if exact:
            goal = whole - int(keep * whole + 0.5) if isinstance(keep, float) else int(target)
            part = [x * goal / sum(searched) for x in searched]
            assert all(x <= len(f) for x, f in zip(part, free, strict=True))
            counts = [int(x) for x in part]
            for i in sorted(range(len(part)), key=lambda i: -(part[i] - counts[i]))[: goal - sum(counts)]:
                counts[i] += 1
        else:
            counts = [min(len(f), int(x * target / sum(searched))) for x, f in zip(searched, free, strict=True)]
        out = []
        for s, score, f, gone in zip(samples, scores, free, counts, strict=True):
            stay = top(score, f, len(f) - gone)
            out.append([sorted(stay + [i for i in range(s.n) if i not in f])] * s.heads)
        return out

    return reference


LONG = ("tttt" + "v" * 30 + "t" * 9, "." * 8 + "ttt" + "v" * 24 + "t" * 8, "t" + "v" * 20 + "t" * 8 + "." * 14)


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("settings", [dict(keep=0.5), dict(keep=12, start_size=4), dict(keep=0.3, exact=False)])
def test_all_keys(groups, settings):
    more = {("start" if k == "start_size" else k): v for k, v in settings.items()}
    agrees(tr.PrefixKV(what="all", **settings), layers(4, LONG, groups=groups, seed=groups), reference_of(**more))


@pytest.mark.parametrize("keep", [0.5, 6])
def test_visual_keys(keep):
    agrees(tr.PrefixKV(keep=keep), layers(3, LONG, heads=3, given="attention"), reference_of(keep, "visual"))


def test_ratio_is_the_share_that_goes():
    evs = layers(3, LONG)
    agrees(tr.PrefixKV(what="all", ratio=0.6, exact=False), evs, reference_of(None, ratio=0.6, exact=False))
    with pytest.raises(ValueError, match="share that stays"):
        tr.PrefixKV(ratio=0.6)
    with pytest.raises(ValueError, match="without keep"):
        tr.PrefixKV(ratio=0.6, keep=0.4, what="all")


@pytest.mark.parametrize("what", ["visual", "all"])
@pytest.mark.parametrize("keep", [0.15, 0.5, 0.8, 9])
def test_totals(what, keep):
    evs = layers(4, LONG)
    plans = [kept(p) for p in tr.PrefixKV(keep=keep, what=what).plans(evs)]
    for b in range(3):
        among = evs[0].there if what == "all" else evs[0].visual
        mine = set(among[2 * b].nonzero().flatten().tolist())
        counts = [len(mine & set(rows[2 * b])) for rows in plans]
        want = int(keep * 4 * len(mine) + 0.5) if isinstance(keep, float) else keep * 4
        assert sum(counts) == want


def test_equal_layers_ties_and_budgets_that_nothing_fits():
    rows = torch.full((1, 1, 9, 9), 1 / 9)
    visual = torch.tensor([[False] + [True] * 6 + [False] * 2])
    ev = tr.CacheEvidence(torch.ones(1, 9, 2), torch.ones(1, 9, 2), attention=rows, kv_heads=1, visual=visual)
    assert [kept(p) for p in tr.PrefixKV(keep=2).plans([ev, ev])] == [[[0, 1, 2, 7, 8]]] * 2
    keeps_all(tr.PrefixKV(keep=1.0))
    keeps_all(tr.PrefixKV(keep=1.0, what="all"))
    assert tr.PrefixKV(keep=1, what="all", start_size=20).plan(case()).is_identity
    for bad, says in ((dict(distance=0), "below 0"), (dict(start_size=-1), "start_size"), (dict(keep=2.0), "keep")):
        with pytest.raises(ValueError, match=says):
            tr.PrefixKV(**bad)


def first(counts):
    """A prompt's plan that keeps so many last slots of every sample."""

    def plan(cache):
        ev = cache.evidence()
        return Prune.from_mask(ev.last(torch.tensor(counts).repeat_interleave(cache.heads)[:, None]))

    return plan


@pytest.mark.parametrize(("distance", "counts"), [(-5, (12, 9)), (3, (12, 9)), (-25, (12, 9)), (-5, (17, 5))])
def test_decode_drops_one_at_a_fixed_place(distance, counts):
    method = tr.PrefixKV(keep=0.5, what="all", distance=distance)
    assert method.every() == 1
    layouts = ("ttvvvvvvvvvvvtttt", "...tvvvvvvvvvtttt")
    cache = Cache(method, layouts, prompt=first(counts))
    plain = [list(row) for row in cache.held()]
    prompt = [17, 17, 14, 14]
    dropped = 0
    for step in range(1, 201):
        ev = cache.grow()
        cache.decide(ev)
        for r, row in enumerate(plain):
            row.append(16 + step)
            left = counts[r // 2]
            share = 1 - left / prompt[r]
            if int(len(row) - (prompt[r] + step) * (1 - share)) > 0:
                at = distance if distance > 0 else left + distance
                del row[at if at >= 1 else left // 2]
                dropped += 1
        assert cache.held() == plain
    assert dropped > 100 or counts == (17, 5)


def test_in_decode_text_and_new_tokens_stay_by_default():
    assert tr.PrefixKV().every() == 0
    ev = case(step=3)
    with pytest.raises(ValueError, match="prompt_slots"):
        tr.PrefixKV(what="all").plan(ev)
