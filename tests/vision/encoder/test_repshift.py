"""Representation Shift against the card, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr


def shift(before, after, m) -> float:
    """The distance of one token in float64, as the card and the docstring define it."""
    a, b = [float(v) for v in before], [float(v) for v in after]
    if m.variant == "branch":
        b = [y - x for x, y in zip(a, b, strict=True)]

    def norm(v):
        return math.sqrt(sum(t * t for t in v)) if m.distance != "l1" else sum(abs(t) for t in v)

    if m.distance == "cosine":
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))
    d = norm([y - x for x, y in zip(a, b, strict=True)])
    return d / norm(a) if m.relative else d


def reference(before, after, prefix, k, m):
    """Prefix, then the k tokens with the largest shift, ascending; equal shifts keep the lower position."""
    ranked = sorted(range(prefix, len(after)), key=lambda i: (-shift(before[i], after[i], m), i))
    return [*range(prefix), *sorted(ranked[:k])]


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("variant", ["residual", "branch"])
@pytest.mark.parametrize(("n", "prefix", "left"), [(17, 1, 13), (16, 0, 13), (21, 2, 15), (25, 5, 16), (8, 1, 6)])
def test_agrees_with_the_card(distance, relative, variant, n, prefix, left):
    if relative and distance == "cosine":
        return
    m = tr.RepresentationShift(distance=distance, relative=relative, variant=variant)
    e = evidence(n=n, prefix=prefix)
    plan = m.plan(e)
    want = [reference(e.before[b], e.x[b], prefix, left, m) for b in range(2)]
    assert plan.keep.tolist() == want
    scores = [[shift(e.before[b, i], e.x[b, i], m) for i in range(n)] for b in range(2)]
    torch.testing.assert_close(m.scores(e).double(), torch.tensor(scores, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_worked_example():
    before = torch.tensor([[[9.0, 0], [1, 0], [0, 2], [5, 5], [100, 0]]])
    after = torch.tensor([[[9.0, 0], [1, 3], [0, 2], [5, 4], [104, 0]]])  # shifts 0 (prefix), 3, 0, 1, 4
    e = tr.Evidence(after, before=before, protected=1)
    assert tr.RepresentationShift(ratio=0.5).plan(e).keep.tolist() == [[0, 1, 4]]
    assert tr.RepresentationShift(ratio=0.75).plan(e).keep.tolist() == [[0, 1, 3, 4]]
    # Relative: 3, 0, 1/sqrt(50), 0.04: the large token loses.
    assert tr.RepresentationShift(ratio=0.5, relative=True).plan(e).keep.tolist() == [[0, 1, 3]]
    # Cosine: 4 and 2 do not turn at all, 1 turns most.
    assert tr.RepresentationShift(ratio=0.5, distance="cosine").plan(e).keep.tolist() == [[0, 1, 3]]
    # Branch: the MLP's own output is (0,3), (0,0), (0,-1), (4,0); away from the stream by sqrt 10, 2, sqrt 61, 96.
    assert tr.RepresentationShift(ratio=0.5, variant="branch").plan(e).keep.tolist() == [[0, 3, 4]]


def test_ties_keep_the_lower_position():
    e = tr.Evidence(torch.ones(1, 6, 2), before=torch.zeros(1, 6, 2))
    assert tr.RepresentationShift(keep=3, layers=(0,)).plan(e).keep.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_large_half_precision_features_do_not_overflow(distance):
    before = torch.zeros(1, 4, 2, dtype=torch.float16)
    after = torch.tensor([[[4e4, 6e4], [6e4, 6e4], [5e4, 6e4], [1, 1]]], dtype=torch.float16)  # norms beyond 65504
    e = tr.Evidence(after, before=before)
    m = tr.RepresentationShift(keep=2, layers=(0,), distance=distance)
    assert m.plan(e).keep.tolist() == [[1, 2]]
    assert torch.isfinite(m.scores(e)).all()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("prefix", [0, 1])
def test_tiny_inputs_keep_a_token(n, prefix):
    plan = tr.RepresentationShift(keep=1, layers=(0,)).plan(evidence(n=n, prefix=prefix, depth=1))
    assert plan.k == min(n, prefix + 1)


def test_schedule():
    assert [i for i in range(12) if tr.RepresentationShift().acts_at(i, 12)] == [0, 3, 6]
    assert [i for i in range(6) if tr.RepresentationShift().acts_at(i, 6)] == [0, 1, 3]
    assert [i for i in range(3) if tr.RepresentationShift().acts_at(i, 3)] == [0, 1]
    assert [i for i in range(12) if tr.RepresentationShift(layers=(5, 2)).acts_at(i, 12)] == [2, 5]
    with pytest.raises(ValueError, match="layers"):
        tr.RepresentationShift(layers=(12,)).acts_at(0, 12)
    n, left = 197, []
    for layer in (0, 3, 6):
        n = tr.RepresentationShift().plan(evidence(n=n, layer=layer, depth=12, entry=197)).k
        left.append(n - 1)
    assert left == [157, 126, 101]  # 196 times 0.8 each, rounded half up
    n, left = 65, []
    for layer in range(12):
        n = tr.RepresentationShift(keep=8).plan(evidence(n=n, layer=layer, depth=12, entry=65)).k
        left.append(n - 1)
    assert left == [32] * 3 + [16] * 3 + [8] * 6


def test_samples_do_not_see_each_other_and_empty_slots_go_first():
    m = tr.RepresentationShift(ratio=0.5)
    both = m.plan(evidence(n=18))
    for i in range(2):
        assert torch.equal(m.plan(evidence(n=18, rows=slice(i, i + 1))).keep, both.keep[i : i + 1])
    valid = torch.ones(2, 18, dtype=torch.bool)
    valid[1, [3, 5, 8, 17]] = False
    kept = m.plan(evidence(n=18, valid=valid)).keep
    assert torch.equal(kept[0], both.keep[0])
    assert not {3, 5, 8, 17} & set(kept[1].tolist())


@pytest.mark.parametrize("sub_layer", ["mlp", "attention"])
def test_in_a_model_the_shift_is_that_of_the_sub_layer(sub_layer):
    model, x = tiny_vit(init_values=0.5), images()
    m = tr.RepresentationShift(sub_layer=sub_layer, layers=(2,), ratio=0.5)
    with torch.no_grad():
        y = model._pos_embed(model.patch_embed(x))
        for block in model.blocks[:2]:
            y = block(y)
        block = model.blocks[2]
        middle = y + block.ls1(block.attn(block.norm1(y)))
        out = middle + block.ls2(block.mlp(block.norm2(middle)))
        before, after = (middle, out) if sub_layer == "mlp" else (y, middle)
        with tr.patched(model, m), tr.record(model, flops=False) as trace:
            model(x)
    assert trace.tokens == [37, 37, 19, 19, 19, 19]
    want = [reference(before[b], after[b], 1, 18, m) for b in range(2)]
    assert trace.plans[0].keep.tolist() == want
    assert m.acting_position() == ("after" if sub_layer == "mlp" else "middle")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"sub_layer": "block"}, "sub_layer is one of mlp, attention"),
        ({"distance": "linf"}, "distance"),
        ({"variant": "x"}, "variant"),
        ({"relative": True, "distance": "cosine"}, "relative"),
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"ratio": 0.5, "keep": 3}, "not both"),
        ({"keep": 0}, "keep"),
        ({"layers": (1, 1)}, "layers"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        tr.RepresentationShift(**settings)
