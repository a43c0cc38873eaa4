from __future__ import annotations

import pytest
import torch
from cache_cases import Cache, Plain, agrees, case, keeps_all, kept, layers, top

import tokenreduce as tr


def parts(s):
    """g, and the scores of all slots, by the card's steps 1 to 4."""
    a = s.a.mean((0, 1))
    behind = [i for i in range(s.n) if i > s.visual[-1]]
    g = sum(float(a[i, j]) for i in behind for j in s.visual)
    w = {j: sum(float(a[i, j]) for i in behind if i >= j) / (s.n - j) for j in behind}
    scores = [float(a[:, j].sum()) for j in range(s.n)]
    for j in s.visual:
        scores[j] = sum(w[i] * float(a[i, j]) for i in behind)
    return g, scores


def reference_of(keep, what="all", start=4):
    def reference(samples):
        both = [parts(s) for s in samples]
        among = [list(range(s.n)) if what == "all" else s.visual for s in samples]
        total = sum(map(len, among)) * keep if isinstance(keep, float) else keep * len(samples)
        out = []
        for s, (g, scores), mine in zip(samples, both, among, strict=True):
            gone = max(0, round(len(mine) - total * g / sum(x for x, _ in both)))
            free = [i for i in mine if start <= i < s.n - 1]
            order = sorted(free, key=lambda i: (i in s.text, scores[i], -i))
            out.append([[i for i in range(s.n) if i not in order[:gone]]] * s.heads)
        return out

    return reference


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(("what", "keep"), [("all", 0.6), ("all", 0.2), ("visual", 0.5), ("visual", 3)])
def test_against_the_card(groups, what, keep):
    evs = layers(3, groups=groups, seed=groups, given="attention" if groups == 2 else "queries")
    agrees(tr.TGVKV(keep=keep, what=what), evs, reference_of(keep, what))


def test_start_size_and_ratio():
    evs = layers(3, heads=3)
    agrees(tr.TGVKV(keep=0.4, what="all", start_size=0), evs, reference_of(0.4, start=0))
    agrees(tr.TGVKV(ratio=0.6, what="all"), evs, reference_of(1 - 0.6))
    for bad in (dict(ratio=0.6), dict(ratio=0.6, keep=0.3, what="all")):
        with pytest.raises(ValueError, match="share of all keys that goes"):
            tr.TGVKV(**bad)


def test_what_one_layer_cannot_use_goes_to_others_on_request():
    """One layer attends to images a thousand times as much as the other."""
    visual = torch.tensor([[True] * 6 + [False] * 2])
    evs = []
    for i, much in enumerate((0.9, 0.0009)):
        rows = torch.zeros(1, 1, 8, 8)
        rows[..., :6], rows[..., 6:] = much / 6, (1 - much) / 2
        evs.append(
            tr.CacheEvidence(
                torch.ones(1, 8, 2), torch.ones(1, 8, 2), attention=rows.tril(), kv_heads=1, visual=visual, layer=i,
                depth=2,
            )
        )  # fmt: skip
    lost, shared = (tr.TGVKV(keep=4, start_size=0, redistribute=r).plans(evs) for r in (False, True))
    assert lost[0].is_identity
    assert kept(lost[1]) == [[6, 7]]
    assert shared[0].is_identity
    assert kept(shared[1]) == [[0, 1, 6, 7]]


def test_text_behind_the_image_must_exist():
    with pytest.raises(ValueError, match="ends in an image"):
        tr.TGVKV(keep=2).plan(case(("tttvvvvv", "ttvvvvtt")))
    assert tr.TGVKV(keep=2).plan(case(("tttttttt", "..tttttt"))).is_identity
    both = kept(tr.TGVKV(keep=1, what="all", start_size=0).plan(case(("tttttttt", "tvvvvvtt"), heads=1)))
    assert both[0] == list(range(8))
    assert both[1] == [7]


def test_identity():
    keeps_all(tr.TGVKV(keep=1.0))
    keeps_all(tr.TGVKV(keep=1.0, what="all"))
    keeps_all(tr.TGVKV(keep=99))
    assert tr.TGVKV().every() == 0
    assert tr.TGVKV().score(case()) is None


@pytest.mark.parametrize("keep", [0.6, 0.25])
def test_decode_drops_the_least_attended(keep):
    method = tr.TGVKV(keep=keep, what="all")
    layouts = ("ttvvvvvvvvvvvtttt", "...ttvvvvvvvvtttt")
    starts = []

    def prompt(cache):
        ev = tr.CacheEvidence(
            cache.keys, cache.values, queries=cache.queries, kv_heads=2, visual=cache.visual[::2],
            valid=cache.valid[::2],
        )  # fmt: skip
        ev.drawn = ev.queries
        starts.extend(Plain(ev, b) for b in range(2))
        return method.plan(ev)

    cache = Cache(method, layouts, prompt=prompt)
    plain = [list(row) for row in cache.held()]
    left = [len(row) for row in plain]
    behind = [sum(c >= 13 for c in row) for row in plain]
    prompts = [17, 17, 14, 14]
    dropped = 0
    for step in range(1, 201):
        ev = cache.grow()
        rows = torch.einsum("rgid,rjd->rgij", ev.queries.double(), ev.keys.double()) * ev.scale
        rows = rows.masked_fill(~ev.there[:, None, None], float("-inf")).softmax(-1)[:, :, 0].mean(1)
        weights = [{int(c): float(w) for c, w in zip(ev.columns[r], rows[r], strict=True)} for r in range(4)]
        cache.decide(ev)
        for b in range(2):
            for r in (2 * b, 2 * b + 1):
                plain[r].append(16 + step)
            n, share = len(plain[2 * b]), 1 - left[2 * b] / prompts[2 * b]
            if int(n - (prompts[2 * b] + step) * (1 - share)) > 0:
                free = plain[2 * b][4 : n - max(1, behind[2 * b])]
                mean = {c: weights[2 * b][c] + weights[2 * b + 1][c] for c in free}
                if free:
                    worst = min(free, key=lambda c: (mean[c], -c))
                    dropped += 1
                    for r in (2 * b, 2 * b + 1):
                        plain[r].remove(worst)
        assert cache.held() == plain
    assert dropped > 100


def test_ties_go_to_the_lower_slot():
    visual = torch.tensor([[False] + [True] * 4 + [False] * 2])
    ev = tr.CacheEvidence(
        torch.ones(1, 7, 2), torch.ones(1, 7, 2), queries=torch.ones(1, 1, 7, 2), kv_heads=1, visual=visual
    )
    assert kept(tr.TGVKV(keep=2, start_size=0).plan(ev)) == [[0, 1, 2, 5, 6]]
    assert top([1.0, 1.0], [0, 1], 1) == [0]
