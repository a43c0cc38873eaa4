"""TokenCorr against the steps of its card, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, anyres, grid, noise, visual

import tokenreduce as tr
from tokenreduce.core.plan import Identity, Pool, Prune
from tokenreduce.vision.projector.tokencorr import TokenCorr

CROPS = {"2x2": anyres(4, (2, 2), 0), "cut": anyres(4, (2, 2), 2), "gone": anyres(4, (3, 1), 4)}
CROPS = {name: origin.take(origin.seen()) for name, origin in CROPS.items()}


def keys(origin, batch=2, kinds=5, seed=1):
    """Keys whose patches are copies of a few directions, so that many tokens are alike."""
    views, n = origin.views, origin.patches + 1
    kind = torch.randint(0, kinds, (batch * views, n), generator=torch.Generator().manual_seed(seed))
    base = noise(kinds, 16, seed=seed)[kind]
    return (base + 0.25 * noise(batch * views, n, 16, seed=seed + 1)).view(batch * views, n, 2, 8).transpose(1, 2)


def image(evidence, look, b):
    """Class-token attention and keys (all heads side by side, unit length) of the tokens of image ``b``, as lists."""
    block, origin = evidence.tower(look).patches, evidence.origin
    attention, metric = [], []
    for v in range(origin.views):
        q, k = (t[b * origin.views + v].double() for t in (block.queries, block.keys))
        row = ((q[:, :1] @ k.transpose(1, 2))[:, 0] / q.shape[-1] ** 0.5).softmax(-1).mean(0)[1:]
        joined = k.transpose(0, 1).flatten(1)[1:]
        attention += row.tolist()
        metric += (joined / joined.norm(dim=1, keepdim=True)).tolist()
    index = origin.index[:, 0].tolist()
    return [attention[i] for i in index], torch.tensor([metric[i] for i in index], dtype=torch.float64)


def quartile(values, share):
    """Quantile with linear interpolation."""
    values, at = sorted(values), share * (len(values) - 1)
    low = int(at)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (at - low)


def parts(evidence, method, b):
    """For each view of image ``b``: its tokens, how many are not redundant, its outliers by deep attention, the others
    by low attention, the best first."""
    (low, metric), (deep, _) = image(evidence, method.low_layer, b), image(evidence, method.deep_layer, b)
    views, out = evidence.view.tolist(), []
    for v in range(evidence.origin.views):
        mine = [i for i, view in enumerate(views) if view == v]
        redundant = 0
        for i in mine:
            partners = sum(1 for j in mine if j != i and float(metric[i] @ metric[j]) > method.tau)
            redundant += partners > method.n_max
        outliers = []
        if mine:
            first, third = quartile([deep[i] for i in mine], 0.25), quartile([deep[i] for i in mine], 0.75)
            outliers = [i for i in mine if deep[i] > third + 1.5 * (third - first)]
        by_low = sorted(mine, key=lambda i: (-low[i], i))
        density = 1 - redundant / len(mine) if mine else 0
        local = math.ceil(density * len(mine) - 1e-9)
        out.append((mine, local, sorted(outliers, key=lambda i: (-deep[i], i)), by_low))
    return out, metric


def adaptive(evidence, method, b):
    """The card's steps 1 to 6 on one image: sorted indices."""
    stay, crops = [], evidence.crops is not None
    for v, (mine, local, outliers, by_low) in enumerate(parts(evidence, method, b)[0]):
        if crops and v == 0:
            stay += mine
        elif mine:
            chosen = {*by_low[:local], *outliers}
            stay += chosen or by_low[:1]
    return sorted(stay)


def aggregated(x, stay, views, metric):
    """Step 5: every dropped token goes to the kept one of its view with the most similar key."""
    groups = {i: [(1.0, i)] for i in stay}
    for j in range(len(views)):
        hosts = [i for i in stay if views[i] == views[j]]
        if j in groups or not hosts:
            continue
        cosine = [float(metric[j] @ metric[i]) for i in hosts]
        best = max(range(len(hosts)), key=lambda h: (cosine[h], -h))
        if cosine[best] > 0:
            groups[hosts[best]].append((cosine[best], j))
    rows = [sum(w * x[j].double() for w, j in groups[i]) / sum(w for w, _ in groups[i]) for i in stay]
    return torch.stack(rows), [len(groups[i]) == 1 for i in stay]


def left(plan, b):
    valid = plan.validity()
    return plan.representatives()[b] if valid is None else plan.representatives()[b][valid[b]]


@pytest.mark.parametrize("name", ["2x2", "cut", "gone", "square", "large", "frames"])
@pytest.mark.parametrize(("tau", "n_max"), [(0.9, 0), (0.6, 1), (0.5, 3), (-1.0, 0), (1.0, 0)])
def test_is_the_choice_of_the_card(name, tau, n_max):
    origin = {**ORIGINS, **CROPS}[name]
    method = TokenCorr(tau=tau, n_max=n_max)
    e = visual(origin, batch=3, keys=keys(origin, 3)).in_vision(False)
    plan = method.plan(e)
    lengths = []
    for b in range(3):
        want = adaptive(e, method, b)
        lengths.append(len(want))
        assert left(plan, b).tolist() == want
        if plan.is_identity:
            continue
        there = torch.ones(plan.k, dtype=torch.bool) if plan.validity() is None else plan.validity()[b]
        rows, alone = aggregated(e.x[b], want, e.view.tolist(), parts(e, method, b)[1])
        torch.testing.assert_close(plan.reduce(e.x)[b][there], rows.float())
        assert plan.untouched()[b][there].tolist() == alone
        single = visual(origin, batch=3, keys=keys(origin, 3), rows=slice(b, b + 1)).in_vision(False)
        assert method.plan(single).representatives()[0].tolist() == want
    if name in ("2x2", "frames") and tau == 0.6:
        assert len(set(lengths)) > 1, "samples have lengths of their own"
        assert plan.validity()[:, -1].all(), "empty slots are on the left"


@pytest.mark.parametrize("name", ["2x2", "cut", "gone", "square", "frames"])
@pytest.mark.parametrize("keep", [1, 5, 0.3, 0.8])
def test_a_given_keep_is_shared_by_density(name, keep):
    origin = {**ORIGINS, **CROPS}[name]
    method = TokenCorr(tau=0.6, n_max=1, keep=keep)
    e = visual(origin, batch=3, keys=keys(origin, 3))
    plan, wanted = method.plan(e), method.total(e.n)
    assert plan.representatives().shape == (3, wanted)
    assert plan.validity() is None
    for b in range(3):
        views, _ = parts(e, method, b)
        stay = plan.representatives()[b].tolist()
        assert stay == sorted(set(stay))
        counts = [sum(i in mine for i in stay) for mine, *_ in views]
        mass = sum(local for _, local, _, _ in views)
        for count, (mine, local, outliers, by_low) in zip(counts, views, strict=True):
            ranked = outliers + [i for i in by_low if i not in outliers]
            assert {i for i in stay if i in mine} == set(ranked[:count])
            full = any(wanted * n > mass * len(m) for m, n, _, _ in views)
            assert full or abs(count - wanted * local / mass) < 1


def test_redundancy_worked_example():
    """Three copies of one key and two of their own: redundancy 3/5, and two local tokens; none is an outlier."""
    k = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [-1, 0]])[None, None]
    rows = torch.tensor([0.30, 0.10, 0.15, 0.25, 0.20]).view(1, 1, 1, 5)
    x = torch.arange(5.0).view(1, 5, 1)
    e = tr.Evidence(x, keys=k, attention=rows)
    assert TokenCorr(aggregate=False).plan(e) == Prune(5, torch.tensor([[0, 3]]))
    assert TokenCorr(aggregate=False, n_max=1).plan(e) == Prune(5, torch.tensor([[0, 3]])), "two partners each"
    assert TokenCorr(n_max=2).plan(e) == Identity.like(x)
    merged = TokenCorr().plan(e)
    assert isinstance(merged, Pool)
    assert merged.reduce(x).flatten().tolist() == [0.5, 3.0], "1 joins 0; 2 and 4 are like neither"
    assert merged.untouched().tolist() == [[False, True]]
    assert merged.sources().tolist() == [[0, 0, -1, 1, -1]]


def test_outliers_of_the_deep_block_stay():
    """All keys alike: no local token, but token 5 is an outlier; without one the most attended token stays."""
    k = torch.ones(1, 1, 8, 2)
    rows = torch.tensor([0.1, 0.11, 0.1, 0.12, 0.1, 0.3, 0.11, 0.1]).view(1, 1, 1, 8)
    assert TokenCorr(aggregate=False).plan(tr.Evidence(k[:, 0], keys=k, attention=rows)).keep.tolist() == [[5]]
    flat = torch.tensor([0.10, 0.11, 0.12, 0.13, 0.14, 0.14, 0.13, 0.13]).view(1, 1, 1, 8)
    assert TokenCorr(aggregate=False).plan(tr.Evidence(k[:, 0], keys=k, attention=flat)).keep.tolist() == [[4]]


def test_two_blocks_are_read():
    e = visual(grid(4, 4), batch=1, seed=9)
    assert TokenCorr(low_layer=0, deep_layer=3).tower_blocks() == (0, 3)
    plans = [TokenCorr(keep=6, low_layer=a, deep_layer=d).plan(e) for a in (0, 1) for d in (None, 2, 3)]
    assert plans[0] == plans[1], "the feature layer of this tower"
    assert any(p != plans[0] for p in plans[3:])
    rows = [image(e, i, 0)[0] for i in (1, 3)]
    outliers = [i for i in range(16) if rows[1][i] > 2.5 * quartile(rows[1], 0.75) - 1.5 * quartile(rows[1], 0.25)]
    kept = TokenCorr(keep=6, deep_layer=3).plan(e).representatives()[0].tolist()
    others = sorted((i for i in range(16) if i not in outliers), key=lambda i: (-rows[0][i], i))
    assert kept == sorted(outliers + others[: 6 - len(outliers)])


def test_overview_stays_whole_where_the_number_is_found():
    e = visual(CROPS["2x2"], batch=2, keys=torch.ones(10, 2, 17, 8))
    plan = TokenCorr(aggregate=False).plan(e)
    for b in range(2):
        views = e.view[left(plan, b)].tolist()
        assert views == sorted(views, key=lambda v: v > 0)
        assert [views.count(v) for v in range(5)] == [16, 1, 1, 1, 1]


def test_all_redundant_views_share_a_keep_evenly():
    e = visual(CROPS["2x2"], batch=1, keys=torch.ones(5, 2, 17, 8))
    views = e.view[TokenCorr(keep=12).plan(e).representatives()[0]].tolist()
    assert [views.count(v) for v in range(5)] == [3, 3, 2, 2, 2]


def test_class_token_stays_in_front_of_plain_evidence():
    k = torch.tensor([[9.0, 9], [1, 0], [1, 0], [0, 1], [1, 0], [0.5, 0.5]])[None, None].expand(2, -1, -1, -1)
    rows = torch.tensor([0.5, 0.1, 0.05, 0.15, 0.08, 0.12]).view(1, 1, 1, 6).expand(2, -1, -1, -1)
    x = noise(2, 6, 3)
    e = tr.Evidence(x, keys=k, attention=rows, protected=1)
    for method in (TokenCorr(), TokenCorr(keep=2), TokenCorr(aggregate=False)):
        plan = method.plan(e)
        assert plan.representatives().tolist() == [[0, 3, 5]] * 2
        assert torch.equal(plan.reduce(x)[:, 0], x[:, 0])
    near = (x[0, 5] + 0.5**0.5 * (x[0, 1] + x[0, 2] + x[0, 4])) / (1 + 3 * 0.5**0.5)
    torch.testing.assert_close(TokenCorr(keep=2).plan(e).reduce(x)[0, 2], near)


def test_stochastic_draw_is_reproducible_and_follows_attention():
    rows = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)
    e = tr.Evidence(torch.zeros(1, 4, 2), keys=torch.eye(4)[None, None], attention=rows)
    method = TokenCorr(keep=1, sampling="stochastic", aggregate=False, seed=3)
    assert method.plan(e) == method.plan(e)
    state = torch.random.get_rng_state()
    drawn = [int(TokenCorr(keep=1, sampling="stochastic", seed=s).plan(e).representatives()[0, 0]) for s in range(1000)]
    assert torch.equal(state, torch.random.get_rng_state()), "no global random numbers"
    share = torch.bincount(torch.tensor(drawn), minlength=4) / 1000
    torch.testing.assert_close(share, rows.flatten(), atol=0.05, rtol=0)
    assert TokenCorr(keep=1).plan(e).representatives().tolist() == [[0]]


def test_every_token_counts_once_when_all_are_alike():
    """A flat page: everything goes into one token, their mean."""
    x = noise(1, 9, 3)
    e = tr.Evidence(x, keys=torch.ones(1, 2, 9, 4), attention=torch.full((1, 2, 1, 9), 1 / 9))
    torch.testing.assert_close(TokenCorr().plan(e).reduce(x)[:, 0], x.mean(1))


def test_needs_a_class_token_and_keys():
    assert "cls" in TokenCorr().required()
    with pytest.raises(ValueError, match="class token"):
        TokenCorr().plan(visual(ORIGINS["square"], cls=False))
    with pytest.raises(ValueError, match="keys"):
        TokenCorr().plan(tr.Evidence(noise(1, 4, 2), attention=torch.full((1, 1, 1, 4), 0.25)))


@pytest.mark.parametrize(("name", "bad"), [
    ("tau", 1.5), ("tau", True), ("tau", float("nan")), ("n_max", -1), ("n_max", 0.5), ("low_layer", "low"),
    ("deep_layer", 1.5), ("aggregate", 1), ("sampling", "random"), ("seed", -1),
])  # fmt: skip
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        TokenCorr(**{name: bad})


@pytest.mark.parametrize("block", [1, 2])
def test_nan_in_either_block_is_an_error(block):
    e = visual(ORIGINS["square"], batch=1)
    e.blocks[block].attention.k[0, :, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        TokenCorr().plan(e)
