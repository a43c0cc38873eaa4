"""K-medoids against a plain reference written from the card, token by token."""

from __future__ import annotations

import pytest
import torch
from support import evidence, tiny_vit

import tokenreduce as tr


def plain_kmedoids(x, weight, left, rounds, cost):
    """One sample: medoids in the order of the initial ones."""
    x = x.double()
    n = len(x)
    d = [[float((x[i] - x[j]).norm()) for j in range(n)] for i in range(n)]
    medoids = sorted(range(n), key=lambda i: (-weight[i], i))[:left]
    for _ in range(rounds):
        clusters = [[m] for m in medoids]
        for i in range(n):
            if i not in medoids:
                clusters[min(range(left), key=lambda m: (d[i][medoids[m]], m))].append(i)
        if cost == "members":
            price = [{i: sum(weight[j] * d[i][j] for j in c) for i in c} for c in clusters]
        else:
            price = [{i: weight[i] * sum(d[i]) for i in c} for c in clusters]
        medoids = [min(c, key=lambda i: (p[i], i)) for c, p in zip(clusters, price, strict=True)]
    return medoids


@pytest.mark.parametrize("cost", ["members", "all"])
@pytest.mark.parametrize(("n", "prefix"), [(3, 0), (4, 1), (12, 2), (17, 1), (40, 5)])
def test_agrees_with_the_card(n, prefix, cost):
    e = evidence(n=n, prefix=prefix, layer=2)
    scale = e.keys.shape[-1] ** -0.5
    rows = (e.queries @ e.keys.transpose(2, 3) * scale).softmax(-1)
    weight = rows.sum((1, 2))[:, prefix:]  # over heads and queries, the class token's included
    for left in (1, 2, 7):
        for rounds in (0, 1, 3):
            if left < n - prefix:
                plan = tr.KMedoids(keep=left, layers=(2,), cluster_iters=rounds, cost=cost).plan(e)
                for b in range(2):
                    want = plain_kmedoids(e.x[b, prefix:], weight[b].tolist(), left, rounds, cost)
                    assert plan.keep[b].tolist() == [*range(prefix), *(prefix + m for m in want)]


def line(values, weight, **more):
    """One sample of one-dimensional tokens that receive attention as told."""
    return tr.Evidence(torch.tensor(values)[None, :, None], attention=torch.tensor(weight)[None, None, None], **more)


def test_worked_example():
    """The medoid moves to the middle of its cluster; the code's cost moves it away from attended tokens."""
    e = line([0.0, 1.0, 2.0, 20.0, 21.0, 22.0], [0.3, 0.1, 0.1, 0.1, 0.1, 0.3])
    reducer = tr.KMedoids(keep=2, layers=(0,))
    assert reducer.plan(e).keep.tolist() == [[0, 5]]  # 0 and 5 carry as much as their two neighbours together
    e = line([0.0, 1.0, 2.0, 20.0, 21.0, 22.0], [0.26, 0.2, 0.15, 0.1, 0.14, 0.15])
    assert tr.KMedoids(keep=2, layers=(0,), cluster_iters=0).plan(e).keep.tolist() == [[0, 1]]
    assert reducer.plan(e).keep.tolist() == [[1, 4]]
    e = line([0.0, 1.0, 2.0, 20.0, 21.0, 22.0], [0.3, 0.1, 0.2, 0.1, 0.1, 0.2])
    # Distances to all: 66, 62, 60 and 60, 62, 66; times attention the cheapest are 1 (6.2) and 3 (6.0).
    assert tr.KMedoids(keep=2, layers=(0,), cost="all").plan(e).keep.tolist() == [[1, 3]]


def test_duplicates_and_equal_attention():
    """A medoid stays in its own cluster beside its duplicates; no output appears twice."""
    e = line([1.0] * 6, [1 / 6] * 6)
    assert tr.KMedoids(keep=3, layers=(0,)).plan(e).keep.tolist() == [[0, 1, 2]]
    e = line([1.0] * 3, [0.3, 0.5, 0.2])
    assert tr.KMedoids(keep=2, layers=(0,)).plan(e).keep.tolist() == [[1, 0]]


def test_masked_tokens_take_no_part():
    base = evidence(n=12, prefix=0, batch=1)
    out = [1, 4]
    free = [t for t in range(12) if t not in out]
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, out] = True
    for cost in ("members", "all"):
        reducer = tr.KMedoids(keep=3, layers=(0,), cost=cost)
        absent = tr.Evidence(base.x, base.keys, base.queries, valid=~mask)
        alone = tr.Evidence(base.x[:, free], base.keys[:, :, free], base.queries[:, :, free])
        want = [free[t] for t in reducer.plan(alone).keep[0].tolist()]
        assert reducer.plan(absent).keep.tolist() == [want]
        kept = reducer.plan(tr.Evidence(base.x, base.keys, base.queries, protected=mask)).keep[0].tolist()
        assert kept[:2] == out
        assert len(set(kept)) == 5
    few = tr.Evidence(base.x, base.keys, base.queries, valid=mask)
    assert set(out) < set(tr.KMedoids(keep=5, layers=(0,)).plan(few).keep[0].tolist())


def test_where_and_how_much():
    """Blocks 3, 6, 9 of 12 see fewer tokens, so the outputs of 2, 5, 8 are reduced."""
    reducer = tr.KMedoids(keep=0.125)
    assert reducer.acting_position() == "after"
    assert [i for i in range(12) if reducer.acts_at(i, 12)] == [2, 5, 8]
    assert not tr.KMedoids().acts_at(2, 12)
    assert tr.KMedoids().plan(evidence(layer=2, depth=12)).is_identity
    assert reducer.plan(evidence(layer=3, depth=12)).is_identity
    model = tiny_vit()
    with tr.patched(model, reducer), tr.record(model, flops=False) as trace, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    assert trace.tokens == [20, 20, 11, 6, 6, 6]  # 36 to 5 (4.5 rounded) by equal ratios: 19, 10, 5


@pytest.mark.parametrize("n", [1, 2, 3, 36])
@pytest.mark.parametrize("depth", [3, 6, 12, 24])
@pytest.mark.parametrize("keep", [0.5, 1, 7])
def test_keep_is_what_is_left(keep, depth, n):
    reducer, left = tr.KMedoids(keep=keep), n
    for layer in range(depth):
        if reducer.acts_at(layer, depth):
            left = reducer.plan(evidence(n=left + 1, layer=layer, depth=depth, entry=n + 1, batch=1)).k - 1
    assert left == (min(keep, n) if isinstance(keep, int) else max(1, int(keep * n + 0.5)))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(cluster_iters=-1), "cluster_iters"), (dict(cost="sum"), "cost"), (dict(layers=(1.5,)), "layers"),
        (dict(layers="3"), "layers"),
    ],
)  # fmt: skip
def test_bad_settings(settings, names):
    with pytest.raises(ValueError, match=names):
        tr.KMedoids(**settings)


def test_layers_beyond_the_model():
    with pytest.raises(ValueError, match=r"layers.*0 to 5"):
        tr.KMedoids(keep=0.5, layers=(6,)).acts_at(0, 6)
