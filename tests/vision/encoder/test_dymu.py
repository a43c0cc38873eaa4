"""DyMU's threshold merging against the steps of its card, its calibration, and sizes to a power."""

from __future__ import annotations

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr
from tokenreduce.core.evidence import Attention
from tokenreduce.measure.thresholds import merge_thresholds


def edges(e, b):
    """(cosine, even, odd) of every even token that may move, from keys averaged over heads."""
    keys = e.keys[b].double().mean(0)
    there = [i for i in range(e.n) if e.valid is None or e.valid[b, i]]
    odd = [i for i in there if i % 2 and i >= e.prefix]
    out = []
    for i in there:
        if i % 2 or i < e.prefix or not odd:
            continue
        cos = {j: float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in odd}
        best = max(odd, key=lambda j: (cos[j], -j))
        out.append((cos[best], i, best))
    return out


@pytest.mark.parametrize(("n", "prefix"), [(17, 1), (16, 0), (18, 2), (4, 1), (2, 1)])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.55, 0.8])
@pytest.mark.parametrize("padded", [False, True])
def test_every_pair_above_the_threshold_merges(n, prefix, threshold, padded):
    size = torch.rand(2, n, generator=torch.Generator().manual_seed(3)) * 3 + 1
    e = evidence(n=n, prefix=prefix, size=size, depth=1)
    if padded:
        valid = torch.ones(2, n, dtype=torch.bool)
        valid[1, -1:] = False
        e = evidence(n=n, prefix=prefix, size=size * valid, valid=valid, depth=1)
    plan = tr.DyMU(thresholds=(threshold,)).plan(e)
    got, sizes = plan.reduce(e.x, e.size), plan.reduce_size(e.size)
    for b in range(2):
        merged = {i: j for s, i, j in edges(e, b) if s > threshold}
        there = [i for i in range(n) if e.valid is None or e.valid[b, i]]
        stay = [i for i in there if i not in merged]
        order = [i for i in stay if i < prefix]
        order += [i for i in stay if i >= prefix and i % 2 == 0] + [i for i in stay if i >= prefix and i % 2]
        valid = plan.validity()
        real = torch.ones(plan.k, dtype=torch.bool) if valid is None else valid[b]
        if plan.is_identity:
            assert not merged
            continue
        assert plan.representatives()[b][real].tolist() == order
        for slot, i in enumerate(order):
            members = [i] + [s for s, j in merged.items() if j == i]
            w = e.size[b, members]
            torch.testing.assert_close(got[b, slot], (e.x[b, members] * w[:, None]).sum(0) / w.sum())
            torch.testing.assert_close(sizes[b, slot], w.sum())


def test_a_number_instead_is_tome():
    e = evidence(depth=1)
    assert tr.DyMU(r=3).plan(e) == tr.ToMe(r=3).plan(e)


def test_ties_take_the_lower_index_and_1_merges_nothing():
    e = evidence(n=9, prefix=1, depth=2)
    e.attention.k[:] = 1.0
    plan = tr.DyMU(thresholds=(0.5, 1.0)).plan(e)
    assert plan.representatives()[0].tolist() == [0, 1, 3, 5, 7]
    assert plan.sources()[0].tolist() == [0, 1, 1, 2, 1, 3, 1, 4, 1]
    assert [tr.DyMU(thresholds=(0.5, 1.0)).acts_at(i, 2) for i in range(2)] == [True, False]


def test_in_a_model_images_lose_different_numbers():
    model, x = tiny_vit(), images(4)
    x[0] = 0.01 * x[0] + 1.0
    method = tr.DyMU(thresholds=(0.9,) * 6)
    with torch.no_grad(), tr.patched(model, method), tr.record(model, flops=False) as trace:
        together = model(x)
        counts = [int(p.validity()[0].sum()) if p.validity() is not None else p.k for p in trace.plans]
        alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    assert counts
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_calibration_merges_as_many_on_average():
    model, batches = tiny_vit(), [images(6, 24), 0.3 * images(6, 24).flip(0)]
    found = merge_thresholds(model, batches, r=2)
    assert len(found) == 6
    assert all(0 <= t <= 1 for t in found)
    with torch.no_grad(), tr.patched(model, tr.DyMU(thresholds=found)), tr.record(model, flops=False) as trace:
        model(batches[0])
    last = trace.steps[-1]
    assert abs(last.patches / 6 - (36 - 12)) <= 4, "2 in each of 6 layers"
    one = merge_thresholds(model, batches[:1], r=(3, 0, 0, 0, 0, 0))
    assert one[1:] == (1.0,) * 5
    seen = []

    class Look(tr.DyMU):
        def plan(self, e):
            seen.append(e)
            return super().plan(e)

    with torch.no_grad(), tr.patched(model, Look(thresholds=(0.999, *(1.0,) * 5))):
        model(batches[0])
    every = sorted((s for b in range(6) for s, _, _ in edges(seen[0], b)), reverse=True)
    assert one[0] == pytest.approx(max(every[18], 0.0), abs=1e-5), "the best behind 3 of each of 6 images"
    with pytest.raises(ValueError, match="no batch"):
        merge_thresholds(model, [], r=2)


@pytest.mark.parametrize(
    "bad", [{"thresholds": ()}, {"thresholds": (0.5,), "r": 3}, {"size_bias": "cube"}, {"size_bias": 2.0}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"thresholds|size_bias"):
        tr.DyMU(**bad)
    with pytest.raises(ValueError, match="for 2 layers and the model has 6"):
        tr.patch(tiny_vit(), tr.DyMU(thresholds=(0.5, 0.6)))


# -- sizes to a power ------------------------------------------------------------------------------------------------
def twins():
    """A model without positions, and an image of which every second patch repeats the one before."""
    model = tiny_vit()
    with torch.no_grad():
        model.pos_embed.zero_()
    x = images(2).unflatten(3, (3, 2, 4))
    x[..., 1, :] = x[..., 0, :]
    return model, x.flatten(3)


@pytest.mark.parametrize(
    "make",
    [lambda **s: tr.ToMe(r=(18, 0, 0, 0, 0, 0), **s), lambda **s: tr.DyMU(thresholds=(0.99999, *(1.0,) * 5), **s)],
)
def test_merged_duplicates_count_as_if_they_were_there(make):
    model, x = twins()
    with torch.no_grad():
        model.cls_token.zero_()
        want = model.forward_features(x)[:, 0]
        out = {}
        for bias in (None, "log", 1.0, "sqrt", 0.5, "none"):
            with tr.patched(model, make(size_bias=bias)), tr.record(model, flops=False) as trace:
                out[bias] = model.forward_features(x)[:, 0]
            assert trace.tokens[-1] == 19
    torch.testing.assert_close(out["log"], want, rtol=1e-4, atol=1e-4)
    assert torch.equal(out["log"], out[None])
    assert torch.equal(out["log"], out[1.0])
    assert torch.equal(out["sqrt"], out[0.5])
    for bias in ("sqrt", "none"):
        assert float((out[bias] - want).abs().max()) > 1e-3
    with torch.no_grad(), tr.patched(model, make(prop_attn=False)):
        assert torch.equal(model.forward_features(x)[:, 0], out["none"])


def test_rows_that_methods_see_have_the_same_power():
    q, k, size = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.tensor([[1.0, 2, 3, 1, 4]])
    half = Attention(q, k, size=size, proportional=0.5)(torch.tensor([0]))
    logits = (q[:, :, :1] @ k.transpose(2, 3)) / 2 + 0.5 * size.log()[:, None, None]
    torch.testing.assert_close(half, logits.softmax(-1))
    assert tr.get_method("tome:r=4,size_bias=sqrt").size_power == 0.5
    assert tr.get_method("pitome:ratio=0.9").size_power == 0.0
    assert tr.get_method("pitome:ratio=0.9,size_bias=0.25").size_power == 0.25


COUNTING = ("tome", "tome_kth", "pitome", "tofu", "mctf", "diffrate", "dpcknn", "vid-tldr", "dymu")


@pytest.mark.parametrize("name", COUNTING)
def test_every_method_that_can_count_sizes_has_the_option(name):
    kind = tr.get_method(name).__class__
    assert kind(keep=0.5, size_bias="sqrt").size_power == 0.5
    assert kind(keep=0.5, prop_attn=True).size_power == 1.0
    assert kind(keep=0.5, prop_attn=True, size_bias="none").size_power == 0.0
    assert tr.get_method(kind(keep=0.5, size_bias=0.25).spec()) == kind(keep=0.5, size_bias=0.25)
    with pytest.raises(ValueError, match="size_bias"):
        kind(size_bias="square")
    model, x, out = tiny_vit(), images(), {}
    with torch.no_grad():
        for bias in (None, "log", 0.5, "none"):
            with tr.patched(model, kind(keep=0.4, prop_attn=True, size_bias=bias)):
                out[bias] = model(x)
    assert torch.equal(out[None], out["log"])
    assert float((out[0.5] - out["log"]).abs().max()) > 1e-5
    assert float((out[0.5] - out["none"]).abs().max()) > 1e-5
