"""FiCoCo-V against the steps of its card, in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import evidence, images, tiny_vit
from vlms import VLMS, prompts

import tokenreduce as tr


def reference(e, b, r, *, beta=0.35, q=0.998, windows=True, places=None):
    """[(kept token, {token: weight})] of one sample; weights without sizes."""
    n, p = e.n, e.prefix
    k, qs = e.keys[b].double(), e.queries[b].double()
    a = (qs @ k.transpose(1, 2) / qs.shape[-1] ** 0.5).softmax(-1).mean(0).numpy()
    patches = list(range(p, n))
    c = np.array([a[0, i] for i in patches]) if p else np.array([a[:, i].mean() for i in patches])
    m = np.array([np.mean([a[i, j] for j in patches]) for i in patches])
    c, m = c / np.linalg.norm(c), m / np.linalg.norm(m)
    score = dict(zip(patches, beta * c - (1 - beta) * m, strict=True))
    if windows and e.grid is not None:
        columns = e.grid[1]
        places = places or {i: i - p for i in patches}
        cells = {}
        for i in patches:
            row, column = divmod(places[i], columns)
            cells.setdefault((row // 2, column // 2), []).append(i)
        for cell in cells.values():
            low = min(cell, key=lambda i: (score[i], i))
            score[low] = score[low] / 2 if score[low] > 0 else score[low] * 2
    gone = sorted(patches, key=lambda i: (score[i], i))[:r]
    rows = {i: {j: a[i, j] for j in patches if j != i} for i in gone}
    many = max([1, *(sum(v > np.quantile(list(row.values()), q) for v in row.values()) for row in rows.values())])
    out = {i: {i: 1.0} for i in range(n) if i not in gone}
    for i in gone:
        best = sorted(rows[i], key=lambda j: (-rows[i][j], j))[:many]
        total = sum(np.exp(rows[i][j]) for j in best)
        for j in best:
            if j in out:
                out[j][i] = float(np.exp(rows[i][j]) / total)
    return sorted(out.items())


@pytest.mark.parametrize(("n", "prefix"), [(17, 1), (16, 0), (26, 1), (11, 2)])
@pytest.mark.parametrize("more", [{}, {"q": 0.6}, {"beta": 0.8, "windows": False}])
@pytest.mark.parametrize("r", [1, 4])
def test_is_the_plan_of_the_card(n, prefix, more, r):
    e = evidence(n=n, prefix=prefix, layer=3, size=torch.rand(2, n) + 1)
    e.attention.proportional = False
    method = tr.FiCoCoV(
        r=r, beta=more.get("beta", 0.35), quantile=more.get("q", 0.998), windows=more.get("windows", True)
    )
    plan = method.plan(e)
    got = plan.reduce(e.x, e.size)
    for b in range(2):
        want = reference(e, b, r, **more)
        assert plan.representatives()[b].tolist() == [i for i, _ in want]
        for slot, (_, parts) in enumerate(want):
            w = torch.tensor([v * float(e.size[b, i]) for i, v in parts.items()])
            value = (e.x[b, list(parts)] * w[:, None]).sum(0) / w.sum()
            torch.testing.assert_close(got[b, slot], value, rtol=1e-4, atol=1e-5)


def test_windows_are_of_the_places_that_are_left():
    e = evidence(n=13, prefix=1, layer=3, entry=17)
    places = [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 13, 15, 16]
    e.grid, e.origin = (4, 4), torch.tensor([places] * 2)
    plan = tr.FiCoCoV(r=5).plan(e)
    for b in range(2):
        want = reference(e, b, 5, places={i: places[i] - 1 for i in range(1, 13)})
        assert plan.representatives()[b].tolist() == [i for i, _ in want]


def test_numbers_and_where_it_acts():
    assert [i for i in range(24) if tr.FiCoCoV().acts_at(i, 24)] == list(range(12, 24))
    e = evidence(n=61, prefix=1, layer=4)
    assert tr.FiCoCoV(r=100).plan(e).k == 2, "one patch stays"
    assert tr.FiCoCoV().plan(e).k == 61 - 42
    with pytest.raises(ValueError, match="start=6"):
        tr.FiCoCoV(start=6).acts_at(0, 6)


def test_ties_go_to_the_lower_index():
    e = evidence(n=17, prefix=1, layer=3)
    e.attention.k[:] = 0
    plan = tr.FiCoCoV(r=3, windows=False).plan(e)
    assert plan.representatives()[0].tolist() == [0, *range(4, 17)]
    plan = tr.FiCoCoV(r=3).plan(e)
    assert plan.representatives()[0].tolist() == [i for i in range(17) if i not in (1, 3, 9)], "one of each window"


@pytest.mark.parametrize("bad", [{"r": 0}, {"r": 3, "keep": 5}, {"beta": 1.5}, {"quantile": -0.1}, {"start": -1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.FiCoCoV(**bad)


def test_in_a_model_places_travel():
    model, x = tiny_vit(), images()
    with torch.no_grad(), tr.patched(model, tr.FiCoCoV(r=5)), tr.record(model, flops=False) as trace:
        model(x)
    assert trace.tokens[-1] == 37 - 15
    seen = []

    class Look(tr.FiCoCoV):
        def plan(self, e):
            seen.append(e.origin)
            return super().plan(e)

    with torch.no_grad(), tr.patched(model, Look(r=5)):
        model(x)
    assert seen[0] is None
    assert torch.equal(seen[1], trace.plans[0].representatives())
    assert torch.equal(seen[2], trace.plans[1].gather(seen[1]))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_in_the_tower_of_a_language_model(family):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    with torch.no_grad(), tr.patched(model, tr.FiCoCoV(r=2, start=0)), tr.record(model, flops=False) as trace:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    assert [s for s in trace.steps if s.stage == "encoder" and s.plan is not None]
