from __future__ import annotations

import pytest
import torch
from cache_cases import agrees, case, half_up, keeps_all, kept, top

import tokenreduce as tr

W = 3


def window_scores(s, window, in_front):
    """Mean over the window's rows, group mean, average pool 5; (H,n)."""
    first = s.n - window
    raw = s.a[:, :, first:].mean((1, 2))
    if in_front:
        raw = raw.clone()
        raw[:, first:] = 0
    out = torch.zeros_like(raw)
    for j in range(s.n):
        out[:, j] = sum(raw[:, i] for i in range(j - 2, j + 3) if 0 <= i < s.n) / 5
    return out


def scaled(x, level):
    x = (x - min(x)) / (max(x) - min(x) + 1e-8)
    return x * level / (x.mean() + 1e-8)


def mix(s, a, free, mode="headwisemixkv", table=None):
    """The card's score per head over the slots ``free``."""
    out = torch.full((s.heads, s.n), -1.0, dtype=torch.double)
    for h in range(s.heads):
        units = torch.stack([k / k.norm() for k in s.keys[h]])
        mean = units.mean(0)
        level = a[h, free].mean()
        v = scaled(torch.stack([s.values[h, i].norm() for i in free]), level)
        d = scaled(torch.stack([-(units[i] @ mean) for i in free]), level)
        pairs = [float(units[i] @ units[j]) for i in range(s.n) for j in range(s.n) if i != j]
        r = min(1.0, max(0.0, sum(pairs) / len(pairs)))
        if table is not None:
            r = table[s.layer][h]
        both = r * d + (1 - r) * (a[h, free] + v)
        out[h, free] = {"headwisemixkv": both, "mixkv": 0.33 * (d + a[h, free] + v), "keydiff": d}[mode]
    return out


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("mode", ["headwisemixkv", "mixkv", "keydiff"])
@pytest.mark.parametrize("what", ["all", "visual"])
def test_snapkv_base(groups, mode, what):
    def reference(samples):
        out = []
        for s in samples:
            a = window_scores(s, W, what == "all")
            free = s.visual if what == "visual" else list(range(s.n - W))
            scores = mix(s, a, free, mode)
            rest = s.text if what == "visual" else list(range(s.n - W, s.n))
            count = half_up(0.5, len(s.visual)) if what == "visual" else half_up(0.5, s.n) - W
            out.append([sorted(top(scores[h], free, count) + rest) for h in range(s.heads)])
        return out

    method = tr.MixKV(base=f"snapkv:window_size={W}", keep=0.5, what=what, select_method=mode)
    agrees(method, [case(heads=3, groups=groups, given="attention", seed=groups)], reference)


def test_alike_heads_spread_out():
    """With equal keys but one, r is near 1, and the odd one stays whatever attention says."""
    keys = torch.ones(1, 9, 4)
    keys[0, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    rows = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.0, 0.05, 0.05, 0.05, 0.05]).view(1, 1, 1, 9)
    visual = torch.tensor([[True] * 8 + [False]])
    ev = tr.CacheEvidence(keys, torch.ones(1, 9, 2), attention=rows, kv_heads=1, visual=visual)
    base = "snapkv:kernel_size=1"
    assert kept(tr.MixKV(base=base, keep=1).plan(ev)) == [[4, 8]]
    assert kept(tr.MixKV(base=base, keep=1, select_method="attn").plan(ev)) == [[0, 8]]
    assert kept(tr.MixKV(base=base, keep=1, redundancy=((0.0,),)).plan(ev)) == [[0, 8]]


def test_table_stands_for_what_the_keys_say():
    table = ((0.9, 0.1), (0.2, 0.5))

    def reference(samples):
        out = []
        for s in samples:
            scores = mix(s, window_scores(s, W, False), s.visual, table=table)
            out.append([sorted(top(scores[h], s.visual, 4) + s.text) for h in range(s.heads)])
        return out

    evs = [case(layer=i, depth=2) for i in range(2)]
    method = tr.MixKV(base=f"snapkv:window_size={W}", keep=4, redundancy=table)
    agrees(method, evs, reference)
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
    with pytest.raises(ValueError, match="another model"):
        method.plan(case(heads=3, depth=2))


def test_adakv_shares_by_attention_and_ranks_by_the_mix():
    def reference(samples):
        out = []
        for s in samples:
            a = window_scores(s, W, False)
            scores = mix(s, a, s.visual)
            every = sorted((-float(a[h, i]), h, i) for h in range(s.heads) for i in s.visual)[: 4 * s.heads]
            counts = [sum(h == own for _, own, _ in every) for h in range(s.heads)]
            out.append([sorted(top(scores[h], s.visual, counts[h]) + s.text) for h in range(s.heads)])
        return out

    method = tr.AdaKV(base=f"mixkv:base='snapkv:window_size={W}'", keep=4, floor_alpha=0.0)
    assert tr.get_method(method.spec()) == method
    agrees(method, [case(heads=3)], reference)


def test_equal_values_identity_capacity_and_bad_settings():
    ev = case()
    flat = tr.CacheEvidence(
        ev.keys, torch.ones_like(ev.values), queries=ev.queries, kv_heads=2, visual=ev._visual, valid=ev._valid
    )
    rows = kept(tr.MixKV(keep=3).plan(flat))
    assert [len(r) for r in rows] == [9, 9, 7, 7, 8, 8]
    keeps_all(tr.MixKV(keep=1.0))
    whole = tr.MixKV(base="snapkv:window_size=2,max_capacity_prompt=6", what="all").plan(ev)
    assert {len(r) for r in kept(whole)} == {6}
    with pytest.raises(ValueError, match="below 0"):
        tr.MixKV(base="knorm", keep=2).plan(ev)
    for bad, says in ((dict(select_method="vnorm"), "headwisemixkv"), (dict(base="look-m"), "does not rank")):
        with pytest.raises(ValueError, match=says):
            tr.MixKV(**bad)
