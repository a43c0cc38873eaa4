from __future__ import annotations

import pytest
import torch
from cache_cases import agrees, case, keeps_all, kept, layers, top

import tokenreduce as tr


def window_of(s, alpha, skip_first=False):
    last = s.text[-1] if s.text else None
    if last is None:
        return [s.n - 1]
    text = s.text
    row = torch.zeros(s.n, dtype=torch.double)
    for h in range(s.heads):
        for g in range(s.a.shape[1]):
            seen = s.a[h, g, last, text]
            row[text] += seen / seen.sum() / (s.heads * s.a.shape[1])
    if skip_first:
        text = [j for j in text if j > 0]
    largest = max(float(row[j]) for j in text)
    first = s.visual[0]
    return [j for j in text if float(row[j]) >= alpha * largest - 1e-12 and j > first] or [s.n - 1]


def worths(s, window):
    out = torch.zeros(s.heads, s.n, dtype=torch.double)
    cols = sorted(set(s.visual) | set(window))
    for h in range(s.heads):
        for g in range(s.a.shape[1]):
            for i in window:
                seen = s.a[h, g, i, cols]
                for j, w in zip(cols, seen / seen.sum(), strict=True):
                    if j in s.visual:
                        out[h, j] += w / len(window) / s.a.shape[1]
    return out


def skew(x):
    n = len(x)
    if n < 3:
        return 0.0
    mean = sum(x) / n
    sd = (sum((v - mean) ** 2 for v in x) / (n - 1)) ** 0.5
    return n / ((n - 1) * (n - 2)) * sum(((v - mean) / sd) ** 3 for v in x) if sd > 1e-9 else 0.0


def reference_of(keep, alpha, **more):
    def reference(samples):
        values = [worths(s, window_of(s, alpha, **more)) for s in samples]
        strength = [float(v.mean(0).sum()) for v in values]
        bent = [max(0.0, skew(v.mean(0)[s.visual].tolist())) for v, s in zip(values, samples, strict=True)]
        level = [[x / (sum(xs) / len(xs)) if sum(xs) else 1.0 for x in xs] for xs in (strength, bent)]
        n = len(samples[0].visual)
        total = int(keep * n * len(samples) + 0.5) if isinstance(keep, float) else keep * len(samples)
        share = [(a + b) / 2 for a, b in zip(*level, strict=True)]
        exact = [x / sum(share) * total for x in share]
        assert all(1 <= x <= n for x in exact), "this reference knows no bounds; test_shares does"
        counts = [int(x) for x in exact]
        for i in sorted(range(len(exact)), key=lambda i: -(exact[i] - counts[i]))[: total - sum(counts)]:
            counts[i] += 1
        return [
            [sorted(s.text + top(v[h], s.visual, c)) for h in range(s.heads)]
            for s, v, c in zip(samples, values, counts, strict=True)
        ]

    return reference


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("given", ["queries", "attention"])
def test_against_the_card(groups, given):
    evs = layers(3, groups=groups, given=given, seed=groups)
    agrees(tr.AirCache(keep=0.5), evs, reference_of(0.5, 0.9))


@pytest.mark.parametrize(("alpha", "skip_first"), [(0.3, False), (0.0, True), (1.0, True)])
def test_windows(alpha, skip_first):
    method = tr.AirCache(keep=4, alpha=alpha, skip_first=skip_first)
    agrees(method, layers(3, heads=3, seed=4), reference_of(4, alpha, skip_first=skip_first))


def test_an_image_at_the_end_is_judged_by_its_last_token():
    agrees(tr.AirCache(keep=0.5), layers(2, ("tttvvvvvvvvv", "..tvvvvvvvvv")), reference_of(0.5, 0.9))


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.35, 0.9, 3])
def test_totals_over_layers(keep):
    evs = layers(5, heads=2, seed=9)
    plans = [kept(p) if not p.is_identity else None for p in tr.AirCache(keep=keep).plans(evs)]
    for b in range(3):
        visual = set(evs[0].visual[2 * b].nonzero().flatten().tolist())
        counts = [len(visual & set(rows[2 * b])) for rows in plans]
        assert counts == [len(visual & set(rows[2 * b + 1])) for rows in plans]
        whole = 5 * len(visual)
        assert sum(counts) == max(5, int(keep * whole + 0.5) if isinstance(keep, float) else keep * 5)
        assert min(counts) >= 1


def test_equal_worths_and_few_visual_keys_share_evenly():
    rows = torch.full((1, 1, 4, 4), 0.25)
    visual = torch.tensor([[True, True, False, False]])
    ev = [tr.CacheEvidence(torch.ones(1, 4, 2), torch.ones(1, 4, 2), attention=rows, kv_heads=1, visual=visual)] * 2
    assert [kept(p) for p in tr.AirCache(keep=1).plans(ev)] == [[[0, 2, 3]]] * 2


def test_text_only_samples_and_keep_all():
    keeps_all(tr.AirCache(keep=1.0))
    keeps_all(tr.AirCache(keep=50))
    assert tr.AirCache(keep=1).plan(case(("tttttt", ".ttttt"))).is_identity
    both = tr.AirCache(keep=1).plan(case(("ttttttt", "tvvvvtt")))
    assert [len(r) for r in kept(both)] == [7, 7, 4, 4]
    with pytest.raises(ValueError, match="from 0 to 1"):
        tr.AirCache(alpha=1.5)
