"""vid-TLDR against the card, written down as loops over the tokens of one sample."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr
from tokenreduce.video.encoder.vidtldr import VidTLDR


def weights_of(a, free):
    """Saliency {token: weight} of one sample from its map (H,N,N) without size bias, in the card's steps 2 to 4."""
    mean_map = a.mean(0).tolist()
    s = {i: sum(p * math.log(p) for p in mean_map[i] if p > 0) for i in free}
    low = min(s.values())
    s = {i: v - low for i, v in s.items()}
    high = max(s.values())
    s = {i: v / high for i, v in s.items()}
    mean = sum(s.values()) / len(s)
    top = max(v - mean for v in s.values())
    return {i: max(0.0, (v - mean) / top) for i, v in s.items()}


def reference(x, keys, queries, size, r, prefix):
    """The card for one sample: output tokens, their values and masses, and where every token went."""
    n = x.shape[0]
    a = torch.softmax(queries.double() @ keys.double().transpose(1, 2) / math.sqrt(keys.shape[-1]), -1)
    free = range(prefix, n)
    s = weights_of(a, free)
    evens, odds = [i for i in free if i % 2 == 0], [i for i in free if i % 2]
    cosine = {(i, j): float(torch.cosine_similarity(x[i].double(), x[j].double(), dim=0)) for i in evens for j in odds}
    best = {i: max(odds, key=lambda j: cosine[i, j]) for i in evens}
    gone = sorted(evens, key=lambda i: -cosine[i, best[i]])[:r]
    out = [*range(prefix), *(i for i in evens if i not in gone), *odds]
    m = [1.0] * n if size is None else size.tolist()
    values, masses, went = [], [], [-1] * n
    for place, b in enumerate(out):
        joined = [i for i in gone if best[i] == b]
        mass = m[b] + sum(s[i] * m[i] for i in joined)
        values.append((m[b] * x[b].double() + sum(s[i] * m[i] * x[i].double() for i in joined)) / mass)
        masses.append(mass)
        went[b] = place
        for i in joined:
            went[i] = place if s[i] > 0 else -1
    return out, torch.stack(values), torch.tensor(masses), went


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("r", [3, 7])
def test_the_card_step_by_step(prefix, sized, r):
    size = torch.rand(2, 17, generator=torch.Generator().manual_seed(3)) * 3 + 1 if sized else None
    e = evidence(n=17, prefix=prefix, size=size, seed=r)
    plan = VidTLDR(r=[r]).plan(e)
    dropped = 0
    for b in range(2):
        one = None if size is None else size[b]
        out, values, masses, went = reference(e.x[b], e.keys[b], e.queries[b], one, r, prefix)
        assert plan.representatives()[b].tolist() == out
        assert plan.sources()[b].tolist() == went
        torch.testing.assert_close(plan.reduce(e.x.double(), size)[b], values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plan.reduce_size(size)[b].double(), masses.double(), rtol=1e-4, atol=1e-5)
        dropped += went.count(-1)
    assert dropped, "some source is background"


def test_saliency_ignores_sizes_and_values_do_not():
    """The same plan comes out whatever the sizes, although the model's attention is biased by them."""
    sizes = torch.rand(2, 17) * 5 + 1
    plain, sized = VidTLDR(r=[5]).plan(evidence(prefix=0)), VidTLDR(r=[5]).plan(evidence(prefix=0, size=sizes))
    assert plain == sized
    x = evidence(prefix=0).x
    assert not torch.allclose(plain.reduce(x), plain.reduce(x, sizes))


def test_rows_in_parts_are_the_whole_map():
    from tokenreduce.video.encoder import vidtldr

    e = evidence(n=29)
    whole = vidtldr._sharpness(e)
    torch.testing.assert_close(vidtldr._sharpness(e, chunk=4), whole)
    given = tr.Evidence(e.x, attention=e.attention("all"), protected=1)
    torch.testing.assert_close(vidtldr._sharpness(given), whole)


@pytest.mark.parametrize("a", [torch.eye(8), torch.full((8, 8), 1 / 8)], ids=["one-hot", "uniform"])
def test_rows_without_a_difference_weigh_one(a):
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    plan = VidTLDR(r=[4]).plan(tr.Evidence(x, attention=a.expand(1, 2, 8, 8)))
    assert torch.equal(plan.weights, torch.ones(1, 8))
    assert float(plan.reduce_size(None).sum()) == 8


def test_background_leaves_no_trace():
    """Token 0 looks everywhere, tokens 2, 4 and 6 at one place: 0 is gone, whatever its value."""
    a = torch.eye(8)
    a[0] = a[1] = a[3] = 1 / 8
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))
    plan = VidTLDR(r=[4]).plan(tr.Evidence(x, attention=a.expand(1, 2, 8, 8)))
    assert plan.sources()[0, 0] == -1
    assert (plan.sources()[0, 1:] >= 0).all()
    other = x.clone()
    other[0, 0] = 100.0
    assert torch.equal(plan.reduce(other), plan.reduce(x))
    assert float(plan.reduce_size(None).sum()) == 7
    assert torch.equal(plan.expand(torch.ones(1, 4, 1), 5.0)[0, :, 0], torch.tensor([5.0] + [1.0] * 7))


def test_padding_neither_scores_nor_joins():
    """A sample with empty slots is reduced like the same sample without them."""
    whole = evidence(n=12, prefix=0)
    q, k, x = (torch.cat([t, torch.randn_like(t)], t.dim() - 2) for t in (whole.queries, whole.keys, whole.x))
    valid = torch.arange(24).expand(2, -1) < 12
    padded = tr.Evidence(x, k, q, size=valid.float(), valid=valid)
    for r in (4, 9):
        plan, want = VidTLDR(r=[r]).plan(padded), VidTLDR(r=[min(r, 6)]).plan(whole)
        real = plan.reduce_size(padded.size) > 0
        for b in range(2):
            got = plan.reduce(x, padded.size)[b, real[b]]
            torch.testing.assert_close(got, want.reduce(whole.x)[b])


def test_counts_shares_and_where_they_act():
    model = tiny_vit()
    with torch.no_grad(), tr.patched(model, VidTLDR(r=[10, 0, 0.25])), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens == [27, 27, 21, 21, 21, 21], "a quarter of 26 is 6"
    with torch.no_grad(), tr.patched(model, VidTLDR(r=[30])), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens[0] == 1 + 18
    assert "clamped" in trace.notes[0]
    with torch.no_grad(), tr.patched(model, VidTLDR(keep=9, blocks=2)), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens == [19, 10, 10, 10, 10, 10]


def test_mass_is_the_key_bias_of_later_blocks():
    """A model whose later blocks get log(mass) is another one than without."""
    model, x = tiny_vit(), images()
    with torch.no_grad():
        with tr.patched(model, VidTLDR(r=[12])):
            with_bias = model(x)
        with tr.patched(model, VidTLDR(r=[12], prop_attn=False)):
            without = model(x)
    assert not torch.allclose(with_bias, without)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"r": 5}, "list"), ({"r": "5"}, "list"), ({"r": [-1]}, "r lists"), ({"r": [1.0]}, "r lists"),
        ({"r": [True]}, "r lists"), ({"r": [5], "keep": 0.5}, "r or keep"), ({"blocks": 0}, "blocks"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        VidTLDR(**settings)


def test_a_list_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="6"):
        tr.patch(tiny_vit(), VidTLDR(r=[1] * 7))
