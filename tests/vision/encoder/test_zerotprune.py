"""Zero-TPrune against the card, written down as loops over heads and tokens of one sample."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr
from tokenreduce.core.plan import Identity
from tokenreduce.vision.encoder.zerotprune import ZeroTPrune

F64 = torch.float64


def attention(e, b):
    """(H,N,N) softmax map of sample ``b``."""
    q, k = e.queries[b].to(F64), e.keys[b].to(F64)
    bias = 0.0 if e.valid is None else torch.where(e.valid[b], 0.0, float("-inf"))
    return torch.stack([torch.softmax(q[h] @ k[h].T / math.sqrt(q.shape[-1]) + bias, -1) for h in range(len(q))])


def rank(maps, alive, patches, cls, rounds, low, high):
    """Steps 1, 2, 4 and 5 among the tokens ``alive``: a score for each of ``patches``."""
    n = len(alive)
    kept, squares = [], []
    for a in maps:
        s = [math.sqrt(n) if cls and i == 0 else 1.0 for i in alive]
        s = [v / sum(s) for v in s]
        for _ in range(rounds):
            new = [0.0] * n
            for i, voter in enumerate(alive):
                row = [float(a[voter, j]) for j in alive]
                for j in range(n):
                    new[j] += row[j] / sum(row) * s[i]
            s = new
        score = {t: s[i] * n for i, t in enumerate(alive) if t in patches}
        mean = sum(score.values()) / len(score)
        variance = sum((v - mean) ** 2 for v in score.values()) / len(score)
        kept.append(low <= variance <= high)
        squares.append(score)
    if not any(kept):
        kept = [True] * len(kept)
    chosen = [s for s, k in zip(squares, kept, strict=True) if k]
    return {t: math.sqrt(sum(s[t] ** 2 for s in chosen) / len(chosen)) for t in chosen[0]}, kept


def reference(e, b, prefix, r, k, rounds, low=0.01, high=0.7, cls=None):
    """The tokens that one sample keeps, in original order, and the heads heard in either ranking."""
    cls = prefix > 0 if cls is None else cls
    there = list(range(e.n)) if e.valid is None else [i for i in range(e.n) if e.valid[b, i]]
    patches, heard = [i for i in there if i >= prefix], []
    maps = attention(e, b)
    if r:
        first, kept = rank(maps, there, patches, cls, 1, low, high)
        heard.append(kept)
        order = sorted(patches, key=lambda i: (-first[i], i))
        less = len(order) // 2
        important, rest = order[: len(order) - less], order[len(order) - less :]
        keys = e.keys[b].to(F64).transpose(0, 1).flatten(1)
        best = {i: max(float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in important) for i in rest}
        gone = sorted(rest, key=lambda i: -best[i])[:r]
        patches = [i for i in patches if i not in gone]
    if k < len(patches):
        alive = [i for i in there if i < prefix or i in patches]
        score, kept = rank(maps, alive, patches, cls, rounds, low, high)
        heard.append(kept)
        patches = sorted(sorted(patches, key=lambda i: (-score[i], i))[:k])
    return list(range(prefix)) + patches, heard


@pytest.mark.parametrize("start", ["cls", "uniform"])
@pytest.mark.parametrize(
    ("n", "prefix", "r", "k"),
    [
        (12, 1, 3, 5),
        (13, 1, 0, 6),
        (13, 1, 4, 99),
        (10, 0, 5, 2),
        (12, 2, 2, 7),
        (16, 5, 3, 4),
        (4, 1, 1, 1),
        (3, 1, 1, 1),
    ],
)
def test_follows_the_card(n, prefix, r, k, start):
    e = evidence(n=n, prefix=prefix, layer=4, depth=12)
    plan = ZeroTPrune(layers=(4,), r=r, k=k, start=start).plan(e)
    for b in range(2):
        want, _ = reference(e, b, prefix, r, k, 5, cls=prefix > 0 and start == "cls")
        assert plan.representatives()[b].tolist() == want


def test_the_start_matters():
    plans = [ZeroTPrune(layers=(0,), k=8, iterations=1, start=s).plan(evidence(n=33)) for s in ("cls", "uniform")]
    assert plans[0] != plans[1]


@pytest.mark.parametrize("bounds", [(0.0, 0.1), (0.06, 0.3), (0.1, 9.0), (50.0, 60.0)])
def test_heads_are_filtered_by_variance(bounds):
    e = evidence(n=12, batch=4, layer=0, depth=1)
    plan = ZeroTPrune(layers=(0,), r=2, k=4, iterations=2, v_min=bounds[0], v_max=bounds[1]).plan(e)
    heads = []
    for b in range(4):
        want, heard = reference(e, b, 1, 2, 4, 2, *bounds)
        assert plan.representatives()[b].tolist() == want
        heads += [sum(kept) for kept in heard]
    assert (min(heads) == 3) == (bounds[0] == 50)  # with no head in range all are heard, else some were left out


def test_rounds_by_depth():
    method = ZeroTPrune()
    assert [method.rounds(i, 12) for i in range(12)] == [30, 30, 30, 5, 5, 5, 5, 5, 5, 1, 1, 1]
    assert [method.rounds(i, 3) for i in range(3)] == [5, 5, 5]
    assert ZeroTPrune(iterations=7).rounds(0, 12) == 7
    e = evidence(n=17, layer=0, depth=4)
    for iterations, rounds in (((3, 8, 9), 3), (2, 2)):
        plan = ZeroTPrune(layers=(0,), k=6, iterations=iterations).plan(e)
        assert plan.representatives()[0].tolist() == reference(e, 0, 1, 0, 6, rounds)[0]


def test_near_copies_go_and_their_originals_stay():
    """Two unimportant patches have the keys of two important ones: these are dropped, although others rank lower."""
    k = torch.eye(8).view(1, 1, 8, 8).clone()
    k[0, 0, 5], k[0, 0, 6] = k[0, 0, 1], k[0, 0, 2]
    columns = torch.tensor([0.2, 0.2, 0.18, 0.16, 0.14, 0.05, 0.04, 0.03])  # everyone attends alike
    e = tr.Evidence(torch.zeros(1, 8, 4), k, attention=columns.expand(1, 1, 8, 8), protected=1, layer=0, depth=1)
    assert ZeroTPrune(layers=(0,), r=2).plan(e).representatives().tolist() == [[0, 1, 2, 3, 4, 7]]
    # Without the similarity step the last two go; equally similar patches go from the more important one on.
    assert ZeroTPrune(layers=(0,), k=5).plan(e).representatives().tolist() == [[0, 1, 2, 3, 4, 5]]
    assert ZeroTPrune(layers=(0,), r=1).plan(e).representatives().tolist() == [[0, 1, 2, 3, 4, 6, 7]]
    assert ZeroTPrune(layers=(0,), r=1, k=4).plan(e).representatives().tolist() == [[0, 1, 2, 3, 4]]


def test_votes_of_the_dropped_do_not_count():
    """Patch 3 lives from the votes of patch 4; once 4 is dropped as a copy of 1, it ranks last."""
    a = torch.tensor(
        [
            [0.1, 0.4, 0.3, 0.1, 0.1],
            [0.1, 0.4, 0.3, 0.1, 0.1],
            [0.1, 0.4, 0.3, 0.1, 0.1],
            [0.1, 0.4, 0.3, 0.1, 0.1],
            [0.0, 0.0, 0.0, 1.0, 0.0],
        ]
    ).view(1, 1, 5, 5)
    k = torch.eye(5).view(1, 1, 5, 5).clone()
    k[0, 0, 4] = k[0, 0, 1]
    e = tr.Evidence(torch.zeros(1, 5, 4), k, attention=a, protected=1, layer=0, depth=1)
    settings = {"layers": (0,), "iterations": 1, "start": "uniform"}
    assert ZeroTPrune(k=3, **settings).plan(e).representatives().tolist() == [[0, 1, 2, 3]]
    assert ZeroTPrune(r=1, k=2, **settings).plan(e).representatives().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("there", [[11, 7], [3, 11], [5, 4]])
@pytest.mark.parametrize(("r", "k"), [(2, 5), (0, 4), (3, 99)])
def test_padding_does_not_change_a_sample(there, r, k):
    valid = torch.arange(12) <= torch.tensor(there)[:, None]
    e = evidence(n=12, layer=0, depth=4, valid=valid)
    plan = ZeroTPrune(layers=(0,), r=r, k=k).plan(e)
    for b, count in enumerate(there):
        mine = [i for i in plan.representatives()[b].tolist() if valid[b, i]]
        assert mine == reference(e, b, 1, min(r, count // 2), k, 30)[0]


def test_too_many_copies_are_clamped_and_reported():
    e = evidence(n=8, layer=0, depth=1)
    with pytest.warns(UserWarning, match="zerotprune: r=5 is more than half"):
        plan = ZeroTPrune(layers=(0,), r=5).plan(e)
    assert plan.k == 8 - 3
    with tr.record(torch.nn.Identity(), flops=False) as trace:
        ZeroTPrune(layers=(0,), r=5).plan(e)
    assert trace.notes == ["zerotprune: r=5 clamped to 3 at layer 0 (7 patches)"]


def test_keep_is_spread_by_equal_ratios():
    method = ZeroTPrune(keep=8)
    got = [method.amounts(evidence(n=1 + n, entry=65, layer=i)) for i, n in ((1, 64), (3, 32), (4, 16), (2, 64))]
    assert got == [(11, 32), (5, 16), (3, 8), (0, 64)]  # a third of 32, 16 and 8 removed; layer 2 rests
    assert ZeroTPrune(keep=8, s_share=0.0).amounts(evidence(n=65, layer=1)) == (0, 32)
    assert ZeroTPrune(keep=0.01, s_share=1.0, layers=(0,)).amounts(evidence(n=10)) == (4, 1)
    for layer, n in ((1, 65), (3, 33), (4, 17)):
        e = evidence(n=n, entry=65, layer=layer)
        r, k = method.amounts(e)
        assert method.plan(e) == ZeroTPrune(layers=(layer,), r=r, k=k).plan(e)
        assert method.plan(e).k == 1 + k


def test_where_it_acts():
    assert [i for i in range(12) if ZeroTPrune(keep=0.5).acts_at(i, 12)] == [3, 6, 9]
    assert [i for i in range(12) if ZeroTPrune(k=90, layers=[7, 2]).acts_at(i, 12)] == [2, 7]
    assert not any(m.acts_at(i, 12) for m in (ZeroTPrune(), ZeroTPrune(keep=1.0)) for i in range(12))
    assert isinstance(ZeroTPrune(layers=(0,)).plan(evidence(layer=0)), Identity)
    assert isinstance(ZeroTPrune(layers=(0,), k=16).plan(evidence(layer=0)), Identity)
    assert isinstance(ZeroTPrune(layers=(1,), k=4).plan(evidence(layer=0)), Identity)


def test_numbers_per_layer_in_a_model():
    model = tr.patch(tiny_vit(), ZeroTPrune(layers=(1, 2, 4), r=(4, 0, 3), k=(20, 14, 99)))
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens == [37, 21, 15, 15, 12, 12]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": -1}, "r is"),
        ({"k": 0}, "k is"),
        ({"k": (5, 0)}, "k is"),
        ({"r": None}, "r is"),
        ({"r": 2, "keep": 0.5}, "keep or r and k"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": (3, 1)}, "three"),
        ({"layers": (1, 1)}, "twice"),
        ({"s_share": 1.5}, "s_share"),
        ({"v_min": 0.8}, "v_min"),
        ({"start": "uni"}, "'cls' or 'uniform'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ZeroTPrune(**settings)


def test_settings_that_a_model_refuses():
    with pytest.raises(ValueError, match="layers 0 to 5"):
        tr.patch(tiny_vit(), ZeroTPrune(layers=(6,), k=3))
    with pytest.raises(ValueError, match="r lists 2 numbers for 3 layers"):
        tr.patch(tiny_vit(), ZeroTPrune(r=(3, 3)))
