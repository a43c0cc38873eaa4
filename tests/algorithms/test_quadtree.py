"""STTM against the steps of its card, in plain loops; `sttm` and `sttm-llm` share them."""

from __future__ import annotations

import pytest
import torch
from mixed import kept_of, mixed
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.algorithms.quadtree import Forest, grouped


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def film(t, h, w, c=6, seed=0):
    """Smooth in space and time, so that some things merge and others do not."""
    still = noise(1, -(-h // 3), -(-w // 3), c, seed=seed).repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :h, :w]
    return still + 0.35 * noise(t, h, w, c, seed=seed + 1)


def spans(n):
    """First and last child, on a side of n, of every place on the next coarser side."""
    return [(0, 0), *[(2 * r - 1, 2 * r) for r in range(1, (n + 1) // 2)]] if n % 2 else [
        (2 * r, 2 * r + 1) for r in range(n // 2)
    ]  # fmt: skip


def cosine(a, b, d=None):
    if d is not None:
        return sum(cosine(a[i : i + d], b[i : i + d]) for i in range(0, len(a), d)) / (len(a) // d)
    return float(a @ b) / max(float(a.norm()), 1e-12) / max(float(b.norm()), 1e-12)


def reference(x, theta_s, theta_t, root_level=1, border="official", components=False, weighted=False, head_dim=None):
    """[(place of the output, {cell: weight})] of a video (T,H,W,C)."""
    t, h, w, _ = x.shape
    x = x.double()
    sizes = [(h, w)]
    while min(sizes[0]) > 2:
        sizes.insert(0, ((sizes[0][0] + 1) // 2, (sizes[0][1] + 1) // 2))
    sizes = sizes[min(root_level, len(sizes) - 1) :]
    leaves = []
    for f in range(t):
        level = {(r, c): (x[f, r, c], [(r, c)], {(r, c): 1.0}) for r in range(h) for c in range(w)}
        levels = [level]
        for n in range(len(sizes) - 1, 0, -1):
            rows, columns, up = spans(sizes[n][0]), spans(sizes[n][1]), {}
            for r, (r0, r1) in enumerate(rows):
                for c, (c0, c1) in enumerate(columns):
                    kids = [levels[0][i, j] for i in range(r0, r1 + 1) for j in range(c0, c1 + 1)]
                    value = sum(k[0] for k in kids) / (1 if weighted else len(kids))
                    cells = [cell for k in kids for cell in k[1]]
                    share = {cell: v / len(kids) for k in kids for cell, v in k[2].items()}
                    up[r, c] = (value, cells, dict.fromkeys(cells, 1 / len(cells)) if weighted else share)
            levels.insert(0, up)

        def visit(n, r, c, levels=levels, f=f):
            value, cells, share = levels[n][r, c]
            if n < len(sizes) - 1:
                (r0, r1), (c0, c1) = spans(sizes[n + 1][0])[r], spans(sizes[n + 1][1])[c]
                kids = [(i, j) for i in range(r0, r1 + 1) for j in range(c0, c1 + 1)]
                asked = kids + [(0, 0)] * (4 - len(kids)) if border == "official" else kids
                if not all(cosine(levels[n + 1][k][0], value, head_dim) >= theta_s for k in asked):
                    for k in kids:
                        visit(n + 1, *k)
                    return
            leaves.append((f, min(cells), cells, value / (len(cells) if weighted else 1), share))

        for r in range(sizes[0][0]):
            for c in range(sizes[0][1]):
                visit(0, r, c)
    leaves.sort(key=lambda leaf: leaf[:2])
    links = []
    for u, a in enumerate(leaves):
        for v, b in enumerate(leaves):
            inside = set(a[2]) <= set(b[2]) or set(b[2]) <= set(a[2])
            if b[0] == a[0] + 1 and inside and cosine(a[3], b[3], head_dim) >= theta_t:
                links.append((u, v))
    rep = list(range(len(leaves)))
    while theta_t > 0:
        new = list(rep)
        for u, v in links:
            low = min(rep[u], rep[v])
            new[u], new[v] = min(new[u], low), min(new[v], low)
        new = [new[n] for n in new]
        same, rep = new == rep, new
        if same if components else [rep[n] for n in rep] == rep:
            break
    out = []
    for r in sorted(set(rep)):
        mine = [leaf for leaf, n in zip(leaves, rep, strict=True) if n == r]
        cells = {(m[0], *cell): s / len(mine) for m in mine for cell, s in m[4].items()}
        out.append(((leaves[r][0], *leaves[r][1]), cells))
    return out


SHAPES = [(3, 8, 8), (4, 7, 7), (2, 6, 9), (3, 5, 4), (1, 9, 9), (5, 2, 2), (4, 1, 3), (3, 11, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"theta_s": 0.7, "theta_t": 0.4}, {"theta_t": 0.0}, {"border": "valid"}, {"components": True, "theta_t": 0.3},
     {"root_level": 0}, {"weighted_avg": True}, {"head_dim": 3}, {"root_level": 9}],
    ids=str,
)  # fmt: skip
def test_is_the_plan_of_the_card(shape, more):
    t, h, w = shape
    x = torch.stack([film(*shape, seed=0), film(*shape, seed=7)])
    settings = {"theta_s": 0.85, "theta_t": 0.6, **more}
    plan = tr.STTM(**settings).plan(tr.Evidence(x.flatten(1, 3), grid=shape))
    matrix = plan.matrix()
    for b in range(2):
        want = reference(
            x[b], settings["theta_s"], settings["theta_t"], settings.get("root_level", 1),
            settings.get("border", "official"), settings.get("components", False),
            settings.get("weighted_avg", False), settings.get("head_dim"),
        )  # fmt: skip
        valid = plan.validity()
        there = torch.ones(plan.k, dtype=torch.bool) if valid is None else valid[b]
        places = [f * h * w + r * w + c for (f, r, c), _ in want]
        assert plan.representatives()[b][there].tolist() == places
        for slot, (_, cells) in zip(there.nonzero().flatten().tolist(), want, strict=True):
            row = torch.zeros(t * h * w, dtype=torch.double)
            for (f, r, c), weight in cells.items():
                row[f * h * w + r * w + c] = weight
            torch.testing.assert_close(matrix[b, slot], row, rtol=1e-5, atol=1e-6)


def test_rounds_may_end_while_linked_leaves_differ():
    """Leaf 2 has two earlier partners, 0 and 1: it joins 0, and 1 stays alone unless components are asked for."""
    leaf = torch.tensor([[0, 1], [2, 2]])
    value = torch.ones(3, 4)
    assert grouped(leaf, value, 0.5).tolist() == [0, 1, 0]
    assert grouped(leaf, value, 0.5, components=True).tolist() == [0, 0, 0]
    assert grouped(leaf, value, 0.0).tolist() == [0, 1, 2]


def test_a_flat_video_becomes_its_roots():
    x = torch.ones(1, 3 * 8 * 8, 5)
    plan = tr.STTM().plan(tr.Evidence(x, grid=(3, 8, 8)))
    assert plan.k == 16
    assert plan.keep[0].tolist() == [r * 16 + c * 2 for r in range(4) for c in range(4)]
    torch.testing.assert_close(plan.reduce(x), torch.ones(1, 16, 5))
    assert Forest.of(x[0].view(3, 8, 8, 5), 0).sizes == [(2, 2), (4, 4), (8, 8)]


@pytest.mark.parametrize("keep", [1, 5, 40, 0.5, 0.9])
def test_keep_is_exact(keep):
    x = torch.stack([film(4, 7, 7), film(4, 7, 7, seed=4)])
    method = tr.STTM(keep=keep)
    assert method.plan(tr.Evidence(x.flatten(1, 3), grid=(4, 7, 7))).k == method.total(196)


def test_inside_the_language_model_it_is_the_same_merge():
    x = film(3, 4, 4, c=12)
    row = "t" + "v" * 48 + "tt"
    place, number = torch.full((1, 51, 6), -1), torch.arange(48)
    place[0, 1:49] = torch.stack([0 * number, number // 16, number % 16 // 4, number % 4, number, 0 * number + 48], 1)
    films = torch.full((1, 51, 4), -1)
    films[0, 1:49] = torch.stack([0 * number, number // 16, number // 16, number % 16], 1)
    evidence = mixed((row,), place_of=place, frame_of=films)
    evidence.x[0, 1:49] = x.flatten(0, 2)
    got = tr.STTMLLM(theta_s=0.8).plan(evidence)
    want = tr.STTM(theta_s=0.8).plan(tr.Evidence(x.flatten(0, 2)[None], grid=(3, 4, 4)))
    assert kept_of(got, 0) == [0, *(1 + want.representatives()[0]).tolist(), 49, 50]
    torch.testing.assert_close(got.reduce(evidence.x)[0, 1:-2], want.reduce(x.flatten(0, 2)[None])[0])
    films[0, 5] = -1  # a hole: the first frame is no grid any more
    torn = tr.STTMLLM(theta_s=-1.0, theta_t=-1.0, root_level=0).plan(mixed((row,), place_of=place, frame_of=films))
    assert set(range(1, 17)) <= set(kept_of(torn, 0))
    assert torn.k == 3 + 16 + 2 * 4, "the others are merged to the four cells of their root grid"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava"])
def test_in_models(family):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "v"), (5, "v")) if family != "llava" else ((9, "iii"), (6, "iii")))
    for spec in (
        "sttm-llm:layer=1,theta_s=-1.0,theta_t=0.0,root_level=0",
        "sttm:theta_s=-1.0,theta_t=0.0,root_level=0",
    ):
        with torch.no_grad(), tr.patched(model, spec), tr.record(model, flops=False) as trace:
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        if family == "llava":
            (plan,) = [s.plan for s in trace.steps if s.plan is not None]
            visual = (inputs["input_ids"] == 99).sum(1)
            left = ((plan.sources() >= 0) & (inputs["input_ids"] == 99)).sum(1) if plan.batch == 2 else None
            assert plan.k < inputs["input_ids"].shape[1]
            assert left is None or (left <= visual).all()
    pictures = prompts(VLMS[family], ((9, "i"), (5, "i")))
    with torch.no_grad():
        stock = model(**pictures).logits
        with tr.patched(model, "sttm-llm:layer=1,theta_s=-1.0,theta_t=0.1,root_level=0"):
            assert torch.equal(model(**pictures).logits, stock)


@pytest.mark.parametrize(
    "bad", [{"theta_s": 1.5}, {"theta_t": -2.0}, {"root_level": -1}, {"border": "open"}, {"head_dim": 0}]
)
@pytest.mark.parametrize("kind", ["STTM", "STTMLLM"])
def test_bad_settings(bad, kind):
    with pytest.raises(ValueError, match=next(iter(bad))):
        getattr(tr, kind)(**bad)
    with pytest.raises(ValueError, match="does not divide"):
        tr.STTM(head_dim=4).plan(tr.Evidence(noise(1, 32, 6), grid=(2, 4, 4)))
