from __future__ import annotations

import math

import pytest
import torch
from cache_cases import Cache, case, top

import tokenreduce as tr

PROMPTS = ("ttvvvvvvvvvvvtttt", "...tvvvvvvvvvtttt", "tttttttttttttttvt")


def worth(slot, t, window):
    if slot["mri"] == 0:
        return 0.0
    again = 2 / (1 + math.exp((t - slot["ts"]) / slot["mri"]))
    return again + 2 / (1 + math.exp(slot["mri"] / window))


def run(method, budget_of, steps=200, groups=2):
    cache = Cache(method, PROMPTS, groups=groups)
    rows = [
        [dict(column=c, visual=PROMPTS[r // 2][c] == "v", ts=0, mri=0) for c in held]
        for r, held in enumerate(cache.held())
    ]
    whole = [sum(s["visual"] for s in row) for row in rows]
    window, cuts = method.window, 0
    for t in range(1, steps + 1):
        ev = cache.grow()
        logits = torch.einsum("rgid,rjd->rgij", ev.queries.double(), ev.keys.double()) * ev.scale
        got = logits.masked_fill(~ev.there[:, None, None], float("-inf")).softmax(-1)[:, :, 0].mean(1)
        weight = [{int(c): float(w) for c, w in zip(ev.columns[r], got[r], strict=True)} for r in range(len(rows))]
        seen = ev.seen.flatten().tolist()
        cache.decide(ev)
        for r, row in enumerate(rows):
            threshold = method.alpha / (len(row) + 1) if method.relative else method.alpha
            for s in row:
                if weight[r][s["column"]] >= threshold:
                    s["mri"], s["ts"] = max(s["mri"], t - s["ts"]), t
            row.append(dict(column=16 + t, visual=False, ts=t, mri=0))
            if t % window:
                continue
            counted = [i for i, s in enumerate(row) if method.what == "all" or s["visual"]]
            budget = budget_of(whole[r], seen[r])
            if len(counted) <= budget:
                continue
            cuts += 1
            free = [i for i in counted if i < len(row) - window]
            stay = top([worth(s, t, window) for s in row], free, budget - (len(counted) - len(free)))
            row[:] = [s for i, s in enumerate(row) if i in stay or i not in free]
        assert cache.held() == [[s["column"] for s in row] for row in rows]
    for r, row in enumerate(rows):
        if cache.scores is not None:
            for channel, name in ((0, "ts"), (1, "mri")):
                assert cache.scores[r, :, channel][cache.valid[r]].tolist() == [float(s[name]) for s in row]
    return cache, cuts


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("settings", [dict(alpha=0.05), dict(alpha=1.5, relative=True)])
def test_all_keys_200_steps(groups, settings):
    method = tr.LazyEviction(what="all", keep=20, window=7, **settings)
    cache, cuts = run(method, lambda visual, seen: 20, groups=groups)
    assert cuts > 100
    assert max(map(len, cache.held())) < 20 + 7


def test_a_share_of_all_tokens_200_steps():
    method = tr.LazyEviction(what="all", keep=0.5, window=5, alpha=0.03)
    _, cuts = run(method, lambda visual, seen: int(0.5 * seen + 0.5))
    assert cuts > 100


@pytest.mark.parametrize("keep", [0.4, 3])
def test_visual_keys_are_thinned_once(keep):
    method = tr.LazyEviction(keep=keep, window=6, alpha=0.05)

    def budget(v, seen):
        return keep if isinstance(keep, int) else max(1, int(keep * v + 0.5))

    cache, cuts = run(method, budget, 60)
    assert cuts == 4  # the last sample has one visual key
    want = [60 + text + min(v, budget(v, 0)) for text, v in ((6, 11), (5, 9), (16, 1)) for _ in "hh"]
    assert [len(c) for c in cache.held()] == want


def test_a_small_budget_leaves_the_window():
    method = tr.LazyEviction(what="all", keep=0.05, window=9, alpha=0.05)
    cache, _ = run(method, lambda visual, seen: max(1, int(0.05 * seen + 0.5)), 45)
    assert [len(c) for c in cache.held()] == [9] * 6


def test_never_in_the_prompt_and_bad_settings():
    method = tr.LazyEviction()
    assert method.moment() == "never"
    assert method.every() == 32
    assert method.plan(case()).is_identity
    assert method.score(case()).shape == (6, 17, 3)
    assert tr.LazyEviction(keep=1.0).plan(case(step=32)).is_identity
    for bad, says in (
        (dict(window=0), "window"), (dict(alpha=2.0), "0 to 1"), (dict(alpha=-1.0, relative=True), ">= 0"),
        (dict(what="all", keep=32), "above window"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            tr.LazyEviction(**bad)
