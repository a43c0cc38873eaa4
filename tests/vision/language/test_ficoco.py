"""FiCoCo-L against the steps of its card in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, maps, mixed
from vlms import VLMS, prompts

import tokenreduce as tr


def reference(evidence, layouts, b, r, *, text="rows", protect=True, q=0.998, g=0.6, a=0.6):
    """{place: {source: weight}} of what is left of a sample."""
    row = layouts[b]
    v = [i for i, c in enumerate(row) if c == "v"]
    t = [i for i, c in enumerate(row) if c == "t" and v and i > v[-1]]
    m = maps(evidence, b).mean(0).numpy()
    s = {}
    for i in v:
        cross = (m[i, t] if text == "rows" else m[t, i]).mean() if t else 0.0
        s[i] = g * m[i, v].sum() - (1 - g) * cross
    if protect and v:
        s[v[0]] = -np.inf
    gone = sorted(v, key=lambda i: (-s[i], i))[:r]
    related = {}
    for i in gone:
        line = []
        for j in v:
            over = sum((m[i, k] if text == "rows" else m[k, i]) * m[k, j] for k in t)
            line.append(-np.inf if i == j else a * m[i, j] + (1 - a) * over)
        related[i] = np.array(line)
    count = max([1, *(int((line > np.quantile(line, q)).sum()) for line in related.values())]) if len(v) > 2 else 1
    out = {i: {i: 1.0} for i in range(len(row)) if row[i] != "v" or i not in gone}
    for i in gone:
        p = np.exp(related[i]) / np.exp(related[i]).sum()
        best = sorted(range(len(v)), key=lambda j: (-p[j], j))[: min(count, len(v) - 1)]
        for j in best:
            if v[j] in out:
                out[v[j]][i] = float(p[j] / sum(p[k] for k in best))
    return out


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vtvvtvvt", "tvvvvvvv")], ids=str)
@pytest.mark.parametrize(
    "more", [{}, {"text": "tv"}, {"q": 0.5}, {"q": 0.6, "text": "tv", "g": 0.2, "a": 0.3}, {"protect": False}], ids=str
)
@pytest.mark.parametrize("r", [1, 3])
def test_is_the_plan_of_the_card(layouts, more, r):
    evidence = mixed(layouts, layer=3)
    method = tr.FiCoCoL(
        r=r, start=1, text=more.get("text", "rows"), quantile=more.get("q", 0.998), g=more.get("g", 0.6),
        a=more.get("a", 0.6), protect_first=more.get("protect", True),
    )  # fmt: skip
    plan = method.plan(evidence)
    got = plan.reduce(evidence.x)
    for b in range(len(layouts)):
        want = reference(evidence, layouts, b, r, **more)
        kept = kept_of(plan, b)
        assert kept == sorted(want)
        for slot, i in enumerate(kept, plan.k - len(kept)):
            value = sum(w * evidence.x[b, j].double() for j, w in want[i].items())
            torch.testing.assert_close(got[b, slot], value.float(), rtol=1e-4, atol=1e-4)


def test_nothing_is_divided_and_targets_that_go_lose_their_share():
    evidence = mixed(LAYOUTS, layer=3)
    plan = tr.FiCoCoL(r=6, start=1, quantile=0.0).plan(evidence)
    rows = plan.matrix()[0]
    visual = evidence.visual[0][plan.keep[0]]
    assert (rows[visual].sum(1) >= 1).all()
    assert float(rows[visual].sum()) < 10 - 1e-3, "6 of 10 gave, and a part of it went to those that go"


def test_numbers_and_where_it_acts():
    assert [i for i in range(32) if tr.FiCoCoL().acts_at(i, 32)] == list(range(6, 32))
    assert [i for i in range(4) if tr.FiCoCoL().acts_at(i, 4)] == [3]
    first, left = "t" + "v" * 60 + "t", 60
    for layer in range(3, 8):
        row = "t" + "v" * left + "t"
        plan = tr.FiCoCoL(keep=10, start=2).plan(mixed((row,), layer=layer, depth=8, prompt=(first,)))
        left = plan.k - 2
        assert left == 60 - 50 * (layer - 2) // 5
    assert tr.FiCoCoL(r=42).plan(mixed((first,), layer=7, depth=8)).k == 60 - 42 + 2
    assert tr.FiCoCoL(r=100).plan(mixed((first,), layer=7, depth=8)).k == 3, "one stays"
    assert kept_of(tr.FiCoCoL(r=100).plan(mixed((first,), layer=7, depth=8)), 0) == [0, 1, 61]
    with pytest.raises(ValueError, match="start=3"):
        tr.FiCoCoL(start=3).acts_at(0, 4)


def test_equal_tokens_tie_to_the_lower_index():
    evidence = mixed(("vvvvtt",), layer=3)
    rows = torch.full((1, 1, 6, 6), 1 / 6)
    plan = tr.FiCoCoL(r=2, start=1).plan(mixed(("vvvvtt",), layer=3, attention=rows))
    assert kept_of(plan, 0) == [0, 3, 4, 5]
    assert plan.n == evidence.n


@pytest.mark.parametrize(
    "bad", [{"r": 0}, {"r": 3, "keep": 5}, {"g": 1.5}, {"a": -0.1}, {"quantile": 2.0}, {"text": "vt"}, {"start": -1}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.FiCoCoL(**bad)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_in_a_padded_batch(family):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    with torch.no_grad(), tr.patched(model, tr.FiCoCoL(r=4)), tr.record(model, flops=False) as trace:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert trace.plans[0].k == inputs["input_ids"].shape[1] - 4
