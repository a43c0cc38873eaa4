"""DPC-KNN against a plain reference written from the card, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, tiny_vit

import tokenreduce as tr


def plain_dpc(x, left, k):
    """Card steps 1-6 for one sample: centres by falling score, and for each its members."""
    n, c = x.shape
    x = x.double()
    d = [[float((x[i] - x[j]).square().sum() / c) ** 0.5 for j in range(n)] for i in range(n)]
    k = min(k, n)
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / k) for row in d]
    score = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * (min(denser) if denser else max(max(row) for row in d)))
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:left]
    members = [[m] for m in centres]
    for i in range(n):
        if i not in centres:
            members[min(range(left), key=lambda m: (d[i][centres[m]], m))].append(i)
    return members


def agrees(plan, e, members, size=None):
    got, mass = plan.reduce(e.x, size), plan.reduce_size(size)
    size = torch.ones(e.batch, e.n) if size is None else size
    for b, groups in enumerate(members):
        assert plan.representatives()[b].tolist() == [g[0] for g in groups]
        for slot, group in enumerate(groups):
            assert sorted(group) == [t for t in range(e.n) if plan.sources()[b, t] == slot]
            total = sum(float(size[b, t]) for t in group)
            want = sum(e.x[b, t] * size[b, t] for t in group) / total
            torch.testing.assert_close(got[b, slot], want, rtol=1e-5, atol=1e-5)
            assert float(mass[b, slot]) == pytest.approx(total)


def expected(e, b, left, k, order):
    groups = plain_dpc(e.x[b, e.prefix :], left, k)
    groups = groups if order == "score" else sorted(groups)
    return [[t] for t in range(e.prefix)] + [[e.prefix + t for t in g] for g in groups]


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize(("n", "prefix"), [(2, 0), (3, 1), (6, 2), (17, 1), (22, 5), (40, 0)])
def test_agrees_with_the_card(n, prefix, order):
    """Above 25 tokens torch computes distances by matrix products."""
    size = torch.randint(1, 5, (2, n)).float()
    e = evidence(n=n, prefix=prefix, layer=3, size=size)
    for left in (1, 2, 5):
        for k in (1, 3, 5, 100):
            if left < n - prefix:
                plan = tr.DPCKNN(keep=left, k=k, order=order, layers=(3,)).plan(e)
                agrees(plan, e, [expected(e, b, left, k, order) for b in range(2)], size)


def line(values):
    """One sample of one-dimensional tokens."""
    return tr.Evidence(torch.tensor(values)[None, :, None], layer=0, depth=1)


def test_worked_example():
    """Three groups on a line. With k=2 the densities follow the distance to the nearest neighbour."""
    e = line([10.0, 0.0, 1.0, 0.5, 10.5, 30.0])
    # D^2/2 of the nearest: 0.125 for 0, 1, 2, 3, 4 and 190 for 5: equal densities, token 0 counts as the densest.
    # Isolation: token 0 30 (the largest distance), 1: 10, 2: 1 (to 1), 3: 0.5, 4: 0.5, 5: 19.5 at density 0.
    plan = tr.DPCKNN(keep=2, k=2, layers=(0,), order="score").plan(e)
    assert plan.keep.tolist() == [[0, 1]]
    assert plan.sources().tolist() == [[0, 1, 1, 1, 0, 0]]
    assert plan.reduce(e.x).flatten().tolist() == pytest.approx([50.5 / 3, 0.5])
    plan = tr.DPCKNN(keep=3, k=2, layers=(0,), order="score").plan(e)
    assert plan.keep.tolist() == [[0, 1, 2]]
    assert plan.sources().tolist() == [[0, 1, 2, 1, 0, 0]], "token 3 is as near to 1 as to 2: the higher score wins"


def test_order_does_not_change_the_clusters():
    """Ties between centres go to the higher score even when the outputs are in the order of position."""
    e = line([4.0, 4.25, 3.75, 2.0, 0.0, 0.125, -0.125])
    by_score = tr.DPCKNN(keep=2, k=3, layers=(0,), order="score").plan(e)
    by_position = tr.DPCKNN(keep=2, k=3, layers=(0,)).plan(e)
    assert by_score.keep.tolist() == [[4, 0]]
    assert by_score.sources().tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    assert by_position.keep.tolist() == [[0, 4]]
    assert by_position.sources().tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def test_duplicates_do_not_all_become_centres():
    """A flat region is one cluster: only its first token stays, the other centres are elsewhere."""
    e = line([5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 0.0, 9.0, 20.0])
    plan = tr.DPCKNN(keep=4, k=3, layers=(0,)).plan(e)
    assert plan.keep.tolist() == [[0, 6, 7, 8]]
    assert plan.sources().tolist() == [[0, 0, 0, 0, 0, 0, 1, 2, 3]]
    plan = tr.DPCKNN(keep=2, layers=(0,)).plan(line([3.0] * 6))
    assert plan.keep.tolist() == [[0, 1]]


def test_large_features_do_not_underflow():
    """exp(-D^2) is 0 in float32 for all of them; the order of the densities still counts."""
    e = evidence(n=12, prefix=0, layer=0)
    e.x.mul_(40)
    groups = [plain_dpc_logs(e.x[b], 4) for b in range(2)]
    agrees(tr.DPCKNN(keep=4, layers=(0,)).plan(e), e, groups)


def plain_dpc_logs(x, left):
    """The reference with distances scaled down in the density would change the order, so it ranks logarithms."""
    d = torch.cdist(x.double(), x.double()) / x.shape[1] ** 0.5
    log = [-sum(v * v for v in sorted(row)[:5]) / 5 for row in d.tolist()]
    assert all(math.exp(v) < 1e-45 for v in log)
    score = []
    for i in range(len(x)):
        denser = [float(d[i, j]) for j in range(len(x)) if log[j] > log[i]]
        score.append(log[i] + math.log(min(denser) if denser else float(d.max())))
    centres = sorted(sorted(range(len(x)), key=lambda i: -score[i])[:left])
    members = [[c] for c in centres]
    for i in set(range(len(x))) - set(centres):
        members[int(d[i, centres].argmin())].append(i)
    return members


def test_half_precision_clusters_like_its_values_in_float32():
    e = evidence(n=30, layer=3, dtype=torch.bfloat16)
    e.x.add_(50)
    same = tr.Evidence(e.x.float(), protected=1, layer=3, depth=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = tr.DPCKNN(keep=9, layers=(3,)).plan(e)
    assert plan.sources().equal(tr.DPCKNN(keep=9, layers=(3,)).plan(same).sources())


def test_equal_weights_on_request():
    size = torch.rand(2, 17) + 0.5
    e = evidence(layer=1, size=size)
    plan = tr.DPCKNN(keep=0.3, weighted=False).plan(e)
    assert torch.equal(plan.reduce(e.x, size), plan.reduce(e.x))
    torch.testing.assert_close(plan.reduce_size(size).sum(), size.sum())


def test_masked_tokens_take_no_part():
    """Absent tokens join a cluster without weight; tokens protected by a mask are clusters of their own."""
    base = evidence(n=14, prefix=0, batch=1)
    base.x[:, [3, 8]] *= 0.01  # in the middle of everything, so that they would be dense
    out = [3, 8]
    free = [t for t in range(14) if t not in out]
    mask = torch.zeros(1, 14, dtype=torch.bool)
    mask[:, out] = True
    want = sorted([free[t] for t in g] for g in plain_dpc(base.x[0, free], 4, 5))
    reducer = tr.DPCKNN(keep=4, layers=(0,))
    absent = tr.Evidence(base.x, valid=~mask, size=(~mask).float())
    plan = reducer.plan(absent)
    got = [[int(plan.keep[0, k])] for k in range(4)]
    for t in free:
        k = int(plan.sources()[0, t])
        got[k] += [t] if t != got[k][0] else []
    assert got == want
    for k, group in enumerate(want):
        torch.testing.assert_close(plan.reduce(base.x)[0, k], base.x[0, group].mean(0))
    plan = reducer.plan(tr.Evidence(base.x, protected=mask))
    assert plan.keep.tolist() == [sorted([*out, *(g[0] for g in want)])]
    agrees(plan, tr.Evidence(base.x), [sorted([*want, [3], [8]])])


def test_more_centres_than_real_tokens():
    base = evidence(n=8, prefix=0, batch=1)
    valid = torch.tensor([[0, 1, 0, 1, 0, 0, 1, 0]]).bool()
    plan = tr.DPCKNN(keep=5, layers=(0,)).plan(tr.Evidence(base.x, valid=valid))
    assert {1, 3, 6} < set(plan.keep[0].tolist())
    assert torch.equal(plan.reduce(base.x)[plan.gather(valid)], base.x[valid])
    one = torch.arange(8)[None] == 5
    plan = tr.DPCKNN(keep=3, layers=(0,)).plan(tr.Evidence(base.x, valid=one))
    assert 5 in plan.keep[0].tolist()


def test_where_and_how_much():
    reducer = tr.DPCKNN()
    assert reducer.acting_position() == "before"
    assert [i for i in range(12) if reducer.acts_at(i, 12)] == [3, 6, 9]
    assert reducer.plan(evidence(layer=2, depth=12)).is_identity
    counts = [tr.DPCKNN().plan(evidence(n=n + 1, layer=3, depth=12)).k - 1 for n in (196, 49, 13, 4, 3, 2, 1)]
    assert counts == [49, 13, 4, 1, 1, 1, 1]
    # 0.55 * 100 is 55.00000000000001 in floating point
    assert tr.DPCKNN(sample_ratio=0.55).plan(evidence(n=100, prefix=0, layer=3, depth=12)).k == 55


@pytest.mark.parametrize("n", [1, 2, 3, 36])
@pytest.mark.parametrize("depth", [3, 6, 12, 24])
@pytest.mark.parametrize("keep", [0.5, 0.1, 1, 7])
def test_keep_falls_by_equal_ratios(keep, depth, n):
    reducer, left, counts = tr.DPCKNN(keep=keep), n, []
    for layer in range(depth):
        if reducer.acts_at(layer, depth):
            left = reducer.plan(evidence(n=left + 2, prefix=2, layer=layer, depth=depth, entry=n + 2, batch=1)).k - 2
            counts.append(left)
    target = min(keep, n) if isinstance(keep, int) else max(1, int(keep * n + 0.5))
    share = (target / n) ** (1 / 3)
    assert counts == [max(target, int(share * n + 0.5)), max(target, int(share**2 * n + 0.5)), target]


def test_in_a_model():
    model = tiny_vit()
    with tr.patched(model, tr.DPCKNN(sample_ratio=0.5)), tr.record(model, flops=False) as trace, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    assert trace.tokens == [37, 19, 19, 10, 6, 6]
    assert float(trace.plan.reduce_size(torch.ones(1, 37)).sum()) == 37


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(sample_ratio=0), "sample_ratio"), (dict(sample_ratio=2), "sample_ratio"), (dict(k=0), "k is"),
        (dict(k=2.5), "k is"), (dict(order="size"), "order"), (dict(layers=(2, 2)), "twice"),
        (dict(keep=0.5, sample_ratio=0.5), "sample_ratio or keep"),
    ],
)  # fmt: skip
def test_bad_settings(settings, names):
    with pytest.raises(ValueError, match=names):
        tr.DPCKNN(**settings)


def test_layers_beyond_the_model():
    with pytest.raises(ValueError, match=r"layers.*0 to 5"):
        tr.DPCKNN(layers=(3, 6)).acts_at(0, 6)
