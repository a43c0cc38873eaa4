from __future__ import annotations

import math

import pytest
import torch
from cache_cases import agrees, case, keeps_all, kept, layers, top

import tokenreduce as tr


def entropy(weights):
    return -sum(float(w) * math.log(float(w)) for w in weights if w > 0)


def cross(s):
    total = 0.0
    for asking, asked in ((s.text, s.visual), (s.visual, s.text)):
        heads = [(h, g) for h in range(s.heads) for g in range(s.raw.shape[1])]
        rows = [entropy(s.raw[h, g, i, asked].softmax(0)) for h, g in heads for i in asking]
        total += sum(rows) / len(rows) if rows and asked else 0.0
    return total


def full(s):
    per_head = s.a.shape[0] * s.a.shape[1] * s.n
    return -float((s.a.clamp(min=1e-12) * s.a.clamp(min=1e-12).log()).sum()) / per_head


def shares_of(samples, rho, kind):
    e = [kind(s) for s in samples]
    soft = [math.exp(x - max(e)) for x in e]
    return [min(1.0, max(0.01, x / sum(soft) * len(samples) * rho)) for x in soft]


def reference_of(rho, kind, what="visual", fraction=0.75, text="keep"):
    def reference(samples):
        out = []
        for s, a in zip(samples, shares_of(samples, rho, kind), strict=True):
            scores = s.a.sum(2).mean(1)
            heads = []
            for h in range(s.heads):
                if what == "visual":
                    count = max(1, int(a * len(s.visual) + 0.5))
                    heads.append(sorted(s.text + top(scores[h], s.visual, count)))
                    continue
                rec, hh = int(fraction * a * s.n), int((1 - fraction) * a * s.n)
                words = [i for i in s.text if i < s.n - rec]
                stay = words if text == "keep" else top(scores[h], words, hh)
                seen = top(scores[h], [i for i in s.visual if i < s.n - rec], hh - len(words))
                heads.append(sorted(stay + seen + list(range(s.n - rec, s.n))))
            out.append(heads)
        return out

    return reference


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(("name", "kind"), [("cross", cross), ("full", full)])
def test_visual_keys(groups, name, kind):
    evs = layers(3, groups=groups, seed=groups)
    agrees(tr.MEDA(keep=0.4, entropy=name), evs, reference_of(0.4, kind))


@pytest.mark.parametrize("text", ["keep", "budget"])
@pytest.mark.parametrize("fraction", [0.75, 0.5])
def test_all_keys(text, fraction):
    method = tr.MEDA(keep=0.6, what="all", entropy="full", recent_fraction=fraction, text=text)
    agrees(method, layers(3, given="attention"), reference_of(0.6, full, "all", fraction, text))


def test_diffuse_layers_keep_more():
    counts = []
    for scale in (0.1, 3.0):
        evs = layers(2, ("tvvvvvvvvvvvvtttt",), heads=1, groups=1)
        evs[1].drawn = evs[1].queries * scale
        evs[1] = tr.CacheEvidence(
            evs[1].keys, evs[1].values, queries=evs[1].drawn, kv_heads=1, visual=evs[1]._visual, layer=1, depth=2
        )
        counts.append([len(r[0]) for r in map(kept, tr.MEDA(keep=0.4).plans(evs))])
    assert counts[0][1] > counts[0][0]
    assert counts[1][1] < counts[1][0]


def test_merged_by_the_mean():
    evs = layers(2, heads=1)
    for ev, plan in zip(evs, tr.MEDA(keep=3).plans(evs), strict=True):
        assert isinstance(plan, tr.Merge)
        source, out = plan.sources(), plan.reduce(ev.values)
        for row in range(len(out)):
            for slot, ok in enumerate(plan.valid[row]):
                members = ev.values[row][source[row] == slot]
                if ok:
                    torch.testing.assert_close(out[row, slot], members.mean(0), rtol=1e-5, atol=1e-6)
                else:
                    assert not len(members)
        assert (source >= 0).equal(ev.there)


def test_given_attention_is_of_what_is_seen():
    """Rows of attention know nothing behind a query: an image has no entropy over text behind it."""
    rows = torch.zeros(1, 1, 4, 4)
    rows[0, 0] = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.3, 0.3, 0], [0.1, 0.3, 0.2, 0.4]])
    visual = torch.tensor([[True, True, False, False]])
    ev = tr.CacheEvidence(torch.ones(1, 4, 2), torch.ones(1, 4, 2), attention=rows, kv_heads=1, visual=visual)
    want = (entropy([4 / 7, 3 / 7]) + entropy([0.25, 0.75])) / 2
    assert float(tr.MEDA().summary(ev).entropy) == pytest.approx(want, abs=1e-6)


def test_identity_text_and_bad_settings():
    for settings in (dict(), dict(what="all"), dict(entropy="full")):
        keeps_all(tr.MEDA(keep=1.0, **settings))
    assert tr.MEDA(keep=2, what="all").plan(case(("t" * 9, "..ttttttt"))).is_identity
    assert not tr.MEDA().merges_keys(case(mrope=True))
    for bad, says in ((dict(entropy="half"), "cross"), (dict(merge="x"), "pivot"), (dict(recent_fraction=3.0), "0 to")):
        with pytest.raises(ValueError, match=says):
            tr.MEDA(**bad)
