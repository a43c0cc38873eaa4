"""EViT against a plain reference written from the card, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, tiny_vit

import tokenreduce as tr


def plain_importance(e, b, cls=True):
    """Softmax attention from the class token, averaged over heads, or the mean attention received."""
    total = [0.0] * e.n
    queries = [0] if cls else range(e.n)
    for h in range(e.keys.shape[1]):
        for i in queries:
            logits = [float(e.queries[b, h, i] @ k) / math.sqrt(e.keys.shape[-1]) for k in e.keys[b, h]]
            top = max(logits)
            weights = [math.exp(v - top) for v in logits]
            for j, w in enumerate(weights):
                total[j] += w / sum(weights) / len(queries) / e.keys.shape[1]
    return total


def plain_evit(e, b, k, fuse, cls=True):
    """Card steps 2-7 for one sample: output rows and, for each, the tokens behind it."""
    importance = plain_importance(e, b, cls)
    patches = range(e.prefix, e.n)
    top = sorted(patches, key=lambda j: (-importance[j], j))[:k]
    rest = [j for j in patches if j not in top]
    members = [[t] for t in range(e.prefix)] + [[t] for t in top]
    rows = [e.x[b, t] for t in (*range(e.prefix), *top)]
    if fuse and rest:
        members.append(sorted(rest, key=lambda j: (-importance[j], j)))
        rows.append(sum(importance[j] * e.x[b, j] for j in rest))
    return torch.stack(rows), members, importance


def agrees(plan, e, k, fuse, cls=True):
    got = plan.reduce(e.x, e.size)
    for b in range(2):
        rows, members, _ = plain_evit(e, b, k, fuse, cls)
        torch.testing.assert_close(got[b], rows, rtol=1e-4, atol=1e-5)
        assert plan.representatives()[b].tolist() == [m[0] for m in members]
        for slot, group in enumerate(members):
            assert sorted(group) == [t for t in range(e.n) if plan.sources()[b, t] == slot]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("n", "prefix"), [(2, 1), (3, 1), (4, 2), (17, 1), (18, 2), (23, 5), (9, 0), (12, 0)])
def test_agrees_with_the_card(n, prefix, fuse):
    """Without a class token the ranking is by mean attention received."""
    e = evidence(n=n, prefix=prefix, layer=3)
    for rate in (0.3, 0.5, 0.9):
        k = math.ceil(rate * (n - prefix) - 1e-6)
        plan = tr.EViT(base_keep_rate=rate, fuse_token=fuse).plan(e)
        if k == n - prefix:
            assert plan.is_identity
        else:
            agrees(plan, e, k, fuse, cls=prefix > 0)


def test_registers_without_a_class_token():
    e = evidence(n=12, prefix=4, layer=3)
    e.cls = False
    agrees(tr.EViT(fuse_token=True).plan(e), e, 6, True, cls=False)


def walk(reducer, n, depth, prefix=1):
    """Patch tokens after each acting layer."""
    left, out = n, []
    for layer in range(depth):
        if reducer.acts_at(layer, depth):
            e = evidence(n=left + prefix, prefix=prefix, layer=layer, depth=depth, entry=n + prefix, batch=1)
            left = reducer.plan(e).k - prefix
            out.append(left)
    return out


def test_published_counts():
    """0.7 of 196 keeps 138, then ceil(0.7*139) = 98, then ceil(0.7*99) = 70, each with its fused token."""
    assert walk(tr.EViT(fuse_token=True), 196, 12) == [139, 99, 71]
    assert walk(tr.EViT(), 196, 12) == [138, 97, 68]
    assert walk(tr.EViT(tokens=50, fuse_token=True), 196, 12) == [51, 51, 51]
    assert walk(tr.EViT(drop_loc=(1, 4)), 10, 5) == [7, 5]


def test_a_whole_number_is_not_rounded_up():
    """0.55 * 100 is 55.00000000000001 in floating point."""
    assert walk(tr.EViT(base_keep_rate=0.55, drop_loc=(0,)), 100, 1) == [55]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 37])
@pytest.mark.parametrize("depth", [3, 6, 12, 24])
@pytest.mark.parametrize("keep", [0.5, 0.1, 1, 2, 9])
def test_keep_is_what_is_left_fused_token_included(keep, depth, n, fuse):
    left = walk(tr.EViT(keep=keep, fuse_token=fuse), n, depth)
    want = min(keep, n) if isinstance(keep, int) else max(1, int(keep * n + 0.5))
    assert left[-1] == want
    assert sorted(left, reverse=True) == left


def known_row(importance, x=None):
    """One sample whose class token attends as told (two heads that average to it)."""
    row = torch.tensor(importance)
    heads = torch.stack([row * 1.5, row * 0.5])[None, :, None]
    x = torch.arange(len(importance)).float()[None, :, None] if x is None else x
    return tr.Evidence(x, attention=heads, protected=1, layer=1, depth=4)


def test_worked_example():
    e = known_row([0.5, 0.1, 0.2, 0.05, 0.15])
    plan = tr.EViT(base_keep_rate=0.5, fuse_token=True).plan(e)
    assert plan.representatives().tolist() == [[0, 2, 4, 1]]
    torch.testing.assert_close(plan.reduce(e.x)[0, :, 0], torch.tensor([0.0, 2.0, 4.0, 0.1 * 1 + 0.05 * 3]))
    assert plan.reduce_size(None).tolist() == [[1.0, 1.0, 1.0, 2.0]]
    plan = tr.EViT(base_keep_rate=0.5, fuse_token=True, normalised=True).plan(e)
    torch.testing.assert_close(plan.reduce(e.x)[0, :, 0], torch.tensor([0.0, 2.0, 4.0, 0.25 / 0.15]))
    assert tr.EViT(base_keep_rate=0.5).plan(e).reduce(e.x)[0, :, 0].tolist() == [0.0, 2.0, 4.0]


def test_sizes_do_not_weigh():
    e = known_row([0.5, 0.1, 0.2, 0.05, 0.15])
    size = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    for normalised in (False, True):
        plan = tr.EViT(tokens=2, fuse_token=True, normalised=normalised).plan(e)
        assert torch.equal(plan.reduce(e.x, size), plan.reduce(e.x))
        assert plan.reduce_size(size).tolist() == [[1.0, 3.0, 5.0, 6.0]]


def test_one_token_left_over_is_fused_with_its_own_weight():
    e = known_row([0.5, 0.1, 0.2, 0.05, 0.15])
    plan = tr.EViT(tokens=3, fuse_token=True).plan(e)
    torch.testing.assert_close(plan.reduce(e.x)[0, :, 0], torch.tensor([0.0, 2.0, 4.0, 1.0, 0.05 * 3]))


@pytest.mark.parametrize("tokens", [4, 5, 100])
def test_keeping_all_patches_does_nothing_at_all(tokens):
    assert tr.EViT(tokens=tokens, fuse_token=True).plan(known_row([0.5, 0.1, 0.2, 0.05, 0.15])).is_identity


def test_a_single_place_goes_to_the_best_patch():
    e = known_row([0.5, 0.1, 0.2, 0.05, 0.15])
    plan = tr.EViT(keep=1, drop_loc=(1,), fuse_token=True).plan(e)
    assert plan.reduce(e.x)[0, :, 0].tolist() == [0.0, 2.0]


def test_ties_go_to_the_lower_index():
    e = known_row([0.2, 0.2, 0.1, 0.2, 0.1, 0.1, 0.1])
    assert tr.EViT(tokens=4).plan(e).keep.tolist() == [[0, 1, 3, 2, 4]]


def test_absent_tokens_are_kept_last_and_weigh_nothing():
    base = evidence(n=10, layer=3, batch=1)
    valid = torch.arange(10)[None] < 7
    e = tr.Evidence(base.x, base.keys, base.queries, protected=1, valid=valid, size=valid.float(), layer=3, depth=6)
    alone = tr.Evidence(base.x[:, :7], base.keys[:, :, :7], base.queries[:, :, :7], protected=1, layer=3, depth=6)
    got, want = (tr.EViT(tokens=4, fuse_token=True).plan(v) for v in (e, alone))
    torch.testing.assert_close(got.reduce(e.x), want.reduce(alone.x))
    weight = e.attention("cls")[0, :, 0].mean(0)
    real = sorted(range(1, 7), key=lambda j: -float(weight[j]))
    assert tr.EViT(tokens=8).plan(e).keep.tolist() == [[0, *real, 7, 8]]


def test_tokens_protected_by_a_mask_stay():
    base = evidence(n=9, layer=3)
    mask = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 1]).bool()
    e = tr.Evidence(base.x, base.keys, base.queries, protected=mask, cls=True, layer=3, depth=6)
    plan = tr.EViT(tokens=2, fuse_token=True).plan(e)
    for b in range(2):
        weight = plain_importance(e, b)
        free = sorted((j for j in range(9) if not mask[j]), key=lambda j: -weight[j])
        assert plan.keep[b].tolist() == [0, 4, 8, *free[:3]]


def test_other_layers_and_layers_beyond_the_model():
    reducer = tr.EViT(drop_loc=(4, 2))
    assert [i for i in range(6) if reducer.acts_at(i, 6)] == [2, 4]
    assert reducer.plan(evidence(layer=3)).is_identity
    assert [i for i in range(12) if tr.EViT().acts_at(i, 12)] == [3, 6, 9]
    with pytest.raises(ValueError, match=r"drop_loc.*0 to 3"):
        reducer.acts_at(0, 4)


def test_in_a_model():
    model = tiny_vit()
    with tr.patched(model, tr.EViT(fuse_token=True)), tr.record(model, flops=False) as trace, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    assert trace.tokens == [37, 28, 28, 21, 16, 16]  # ceil(0.7 * 36) + 2, then of 27 and 20 patch tokens


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(base_keep_rate=0), "base_keep_rate"), (dict(base_keep_rate=1.5), "base_keep_rate"),
        (dict(tokens=0), "tokens"), (dict(keep=0.5, tokens=3), "keep, tokens"),
        (dict(keep=0.5, base_keep_rate=0.5), "base_keep_rate"), (dict(drop_loc=()), "drop_loc"),
        (dict(drop_loc=(1, 1)), "twice"), (dict(drop_loc=(-1,)), "drop_loc"), (dict(drop_loc=3), "drop_loc"),
    ],
)  # fmt: skip
def test_bad_settings(settings, names):
    with pytest.raises(ValueError, match=names):
        tr.EViT(**settings)


def test_settings_as_text():
    assert tr.get_method("evit:drop_loc=[1,2],fuse_token=true") == tr.EViT(drop_loc=(1, 2), fuse_token=True)
    assert not tr.EViT().proportional
