from __future__ import annotations

import itertools

import pytest
import torch
from cache_cases import LAYOUTS, agrees, case, half_up, keeps_all, kept, top

import tokenreduce as tr


def snap(sample, window, kernel, pool, skip_window):
    """SnapKV's scores (H,n) by loops."""
    n, out = sample.n, []
    first = max(0, n - window)
    for h in range(sample.heads):
        raw = [float(sample.a[h, :, first:, j].sum(-1).mean()) for j in range(n)]
        if skip_window:
            raw[first:] = [0.0] * (n - first)
        row = []
        for j in range(n):
            near = [raw[i] if 0 <= i < n else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
            row.append(sum(near) / kernel if pool == "avgpool" else max(near))
        out.append(row)
    return torch.tensor(out, dtype=torch.double)


def shares(scores, free, base, alpha, normalize):
    """Counts of every head as the official code has them."""
    heads = len(scores)
    ranked = [[float(scores[h, i]) for i in free] for h in range(heads)]
    if normalize:
        ranked = [[s * sum(sorted(row)[::-1][:base]) / sum(row) for s in row] for row in ranked]
    every = sorted(((-s, h, i) for h in range(heads) for i, s in enumerate(ranked[h])))[: heads * base]
    counts = [sum(h == own for _, own, _ in every) for h in range(heads)]
    return [round(c * (1 - alpha) + int(base * alpha)) for c in counts]


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(("alpha", "normalize"), [(0.2, False), (0.5, True), (0.0, False)])
def test_official_all_keys(groups, alpha, normalize):
    w, keep = 3, 8

    def reference(samples):
        out = []
        for s in samples:
            scores = snap(s, w, 3, "maxpool", True)
            free, window = list(range(s.n - w)), list(range(s.n - w, s.n))
            counts = shares(scores, free, keep - w, alpha, normalize)
            out.append([top(scores[h], free, counts[h]) + window for h in range(s.heads)])
        return out

    for budget, own in ((dict(keep=keep), ""), (dict(base_capacity=keep), ""), ({}, f",max_capacity_prompt={keep}")):
        method = tr.AdaKV(
            base="snapkv:window_size=3,kernel_size=3,pooling=maxpool" + own, what="all", floor_alpha=alpha,
            normalize=normalize, **budget,
        )  # fmt: skip
        agrees(method, [case(heads=3, groups=groups, given="attention", seed=groups)], reference)
        agrees(method, [case(heads=3, groups=groups, seed=groups)], reference)


@pytest.mark.parametrize("keep", [3, 0.5, 0.2])
def test_visual_keys_share_and_text_stays(keep):
    def reference(samples):
        out = []
        for s in samples:
            scores = snap(s, 4, 5, "avgpool", False)
            base = keep if isinstance(keep, int) else half_up(keep, len(s.visual))
            counts = shares(scores, s.visual, base, 0.2, False)
            out.append([sorted(s.text + top(scores[h], s.visual, counts[h])) for h in range(s.heads)])
        return out

    agrees(tr.AdaKV(base="snapkv:window_size=4", keep=keep), [case(heads=4)], reference)


def test_kvpress_safeguard_meets_the_total():
    w, n_kept, alpha = 2, 7, 0.4

    def reference(samples):
        out = []
        for s in samples:
            scores = snap(s, w, 5, "avgpool", True)
            scores[:, s.n - w :] = 9.0
            safe = [set(top(scores[h], range(s.n), int(n_kept * alpha))) for h in range(s.heads)]
            every = sorted((-float(scores[h, i]), h, i) for h in range(s.heads) for i in range(s.n) if i not in safe[h])
            for _, h, i in every[: s.heads * n_kept - sum(map(len, safe))]:
                safe[h].add(i)
            assert sum(map(len, safe)) == s.heads * n_kept
            out.append([sorted(x) for x in safe])
        return out

    method = tr.AdaKV(
        base="snapkv:window_size=2", what="all", keep=n_kept, floor_alpha=alpha, safeguard="topk"
    )  # fmt: skip
    agrees(method, [case(heads=3)], reference)


def test_pyramid_counts_of_the_card():
    # N=400, w=8, C=64, beta=20, L=4: 118, 82, 46, 10 prefix positions.
    got = []
    for layer in range(4):
        ev = case(("t" * 400,), heads=1, groups=1, layer=layer, depth=4)
        plan = tr.AdaKV(
            base="snapkv:window_size=8", what="all", base_capacity=72, pyram_mode=True, floor_alpha=1.0
        ).plan(ev)  # fmt: skip
        got.append(plan.k - 8)
    b, low = 64, 64 // 20
    high = 2 * b - low
    assert got == [high - i * ((high - low) // 3) for i in range(4)]


def test_alpha_one_is_the_base_and_skip_too():
    ev = case(heads=3)
    base = tr.SnapKV(window_size=4, keep=0.4)
    assert kept(tr.AdaKV(base="snapkv:window_size=4", keep=0.4, floor_alpha=1.0).plan(ev)) == kept(base.plan(ev))
    skipping = tr.AdaKV(base="snapkv:window_size=4", keep=0.4, floor_alpha=0.0, skip=1)
    assert kept(skipping.plan(ev)) == kept(base.plan(ev))
    later = case(heads=3, layer=1, depth=2)
    assert kept(skipping.plan(later)) != kept(base.plan(later))


def test_samples_do_not_share_and_ties_go_to_the_lower_head():
    rows = torch.zeros(4, 1, 1, 5)
    rows[0, 0, 0] = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    rows[1, 0, 0] = torch.tensor([0.05, 0.04, 0.03, 0.02, 0.86])
    rows[2:] = 0.2
    visual = torch.tensor([[True, True, True, True, False]] * 2)
    ev = tr.CacheEvidence(torch.ones(4, 5, 2), torch.ones(4, 5, 2), attention=rows, kv_heads=2, visual=visual)
    plan = tr.AdaKV(base="snapkv:kernel_size=1", keep=2, floor_alpha=0.0).plan(ev)
    assert kept(plan) == [[0, 1, 2, 3, 4], [4], [0, 1, 2, 3, 4], [4]]


def test_identity_and_bad_settings():
    keeps_all(tr.AdaKV(keep=1.0))
    keeps_all(tr.AdaKV(what="all", base_capacity=17, base="snapkv:window_size=2"), depth=1)
    assert tr.AdaKV(base="knorm").required() == ()
    assert not tr.AdaKV(base="knorm:skip=2").acts_at(1, 4)
    for bad, says in (
        (dict(base="fastv"), "choose .*snapkv"), (dict(base="vl-cache"), "not rank"), (dict(floor_alpha=1.5), "0 to 1"),
        (dict(base="snapkv:keep=3"), "own"), (dict(safeguard="x"), "topk"), (dict(base_capacity=9), "what=all"),
        (dict(base="snapkv:max_capacity_prompt=9"), "what=all"), (dict(base="snapkv:windows=9"), "window_size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            tr.AdaKV(**bad)
    with pytest.raises(ValueError, match="always stay"):
        tr.AdaKV(what="all", keep=3, base="snapkv:window_size=5").plan(case())


def test_counts_are_what_was_asked_on_average():
    for keep, heads in itertools.product((0.3, 4), (2, 4)):
        ev = case(LAYOUTS, heads=heads)
        rows = kept(tr.AdaKV(keep=keep, safeguard="topk").plan(ev))
        for b in range(3):
            visual = LAYOUTS[b].count("v")
            want = keep if isinstance(keep, int) else half_up(keep, visual)
            text = LAYOUTS[b].count("t")
            assert sum(len(r) - text for r in rows[b * heads : (b + 1) * heads]) == want * heads
