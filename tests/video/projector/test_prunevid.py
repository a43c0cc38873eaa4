"""PruneVid's merging against the steps of its card in plain loops, in float64."""

from __future__ import annotations

import pytest
import torch
from visual import frames, noise, visual

import tokenreduce as tr
from tokenreduce.core.plan import Identity
from tokenreduce.core.plan import mix as plans
from tokenreduce.video.projector.prunevid import PruneVid, contiguous, likeness

WIDTH = 6


def film(count, rows, cols, still=0.6, scene=4, jitter=0.2, seed=0):
    """(T*n,C): scenes of ``scene`` frames in which a part of the places hardly changes."""
    n = rows * cols
    moving = noise(count, n, WIDTH, seed=seed)
    base = noise(-(-count // scene), n, WIDTH, seed=seed + 1).repeat_interleave(scene, 0)[:count]
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < still
    return torch.where(mask[None, :, None], base + jitter * moving, moving).flatten(0, 1)


def given(x, count, rows, cols):
    return tr.Evidence(x, grid=(count, rows, cols))


def dpc(x, count, k=7):
    """Centres, best first, and the centre of every point, of points (m,C)."""
    m, c = x.shape
    d = ((x[:, None] - x[None]).norm(dim=-1) / c**0.5).tolist()
    density = []
    for row in d:
        close = sorted(row)[: min(k, m)]
        density.append(-sum(v * v for v in close) / len(close))
    largest = max(max(row) for row in d)
    score = []
    for i in range(m):
        denser = [d[i][j] for j in range(m) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(min(denser, default=largest) * 2.718281828459045 ** density[i])
    centres = sorted(range(m), key=lambda i: (-score[i], i))[:count]
    own = [
        centres.index(i) if i in centres else min(range(count), key=lambda c: (d[i][centres[c]], c)) for i in range(m)
    ]
    return centres, own


def runs(labels):
    """(label, first, behind the last) of equal labels in a row."""
    out = []
    for i, label in enumerate(labels):
        if out and out[-1][0] == label:
            out[-1][2] = i + 1
        else:
            out.append([label, i, i + 1])
    return [tuple(r) for r in out]


def in_a_row(labels):
    """Step 3 of the card, frame by frame."""
    labels, t = list(labels), len(labels)
    length = {}
    for label, a, b in runs(labels):
        length[label] = max(length.get(label, 0), b - a)
    out = list(labels)
    for label, a, b in runs(labels):
        if b - a < length[label] or length[label] == 1:
            out[a:b] = [None] * (b - a)
    i = 0
    while i < t:
        if out[i] is not None:
            i += 1
            continue
        end = i
        while end < t and out[end] is None:
            end += 1
        left = right = 0
        while i - left - 1 >= 0 and out[i - left - 1] == out[i - 1]:
            left += 1
        while end + right < t and out[end + right] == out[end]:
            right += 1
        if left == right == 0:
            label = 0
        else:
            label = out[i - 1] if left >= right else out[end]
        out[i:end] = [label] * (end - i)
    return out


def groups_of(x, ratio=0.25, tau=0.8, k=7):
    """Groups in output order: (frames, places, features (m,C) of each) of ``x`` (T,n,C)."""
    t, n = x.shape[:2]
    labels = dpc(x.mean(1), max(1, int(t * ratio)), k)[1]
    out = []
    for _, a, b in runs(in_a_row(labels)):
        static = []
        for j in range(n):
            cosine = [[float(u @ v / u.norm() / v.norm()) for u in x[a:b, j]] for v in x[a:b, j]]
            pairs = [c for s, row in enumerate(cosine) for u, c in enumerate(row) if s != u]
            if pairs and sum(pairs) / len(pairs) > tau:
                static.append(j)
        moving = [j for j in range(n) if j not in static]
        if static:
            out.append((list(range(a, b)), static, x[a:b, static].mean(0)))
        for f in range(a, b) if moving else ():
            out.append(([f], moving, x[f, moving]))
    return out


def reference(x, t, numbers=None, cluster=0.5, least=14, **settings):
    """(representative, members) of every output of a video (T*n,C)."""
    x = x.double().view(t, -1, x.shape[-1])
    n, out = x.shape[1], []
    for g, (over, places, features) in enumerate(groups_of(x, **settings)):
        m = len(places)
        count = (m if m <= least else max(1, int(m * cluster))) if numbers is None else numbers[g]
        if count == m:
            centres, own = list(range(m)), list(range(m))
        else:
            centres, own = dpc(features, count, settings.get("k", 7))
        for c, centre in enumerate(centres):
            members = sorted(f * n + places[j] for f in over for j in range(m) if own[j] == c)
            out.append((over[0] * n + places[centre], members))
    return out


def check(plan, x, b, wanted):
    k = plan.k
    valid = plan.validity()
    empty = 0 if valid is None else int((~valid[b]).sum())
    assert empty == k - len(wanted)
    assert valid is None or not valid[b, :empty].any(), "empty slots are on the left"
    assert plan.representatives()[b, empty:].tolist() == [r for r, _ in wanted]
    source, value = plan.sources()[b], plan.reduce(x)[b]
    for j, (rep, members) in enumerate(wanted):
        assert (source == empty + j).nonzero().flatten().tolist() == members
        torch.testing.assert_close(value[empty + j], x[b, members].mean(0))
        assert bool(plan.untouched()[b, empty + j]) == (members == [rep])
        assert plan.reduce_size(None)[b, empty + j] == len(members)


@pytest.mark.parametrize(
    ("t", "rows", "cols"), [(1, 4, 5), (2, 3, 5), (3, 1, 1), (5, 4, 4), (8, 5, 7), (9, 3, 3), (13, 4, 5), (24, 3, 6)]
)
def test_the_steps_of_the_card(t, rows, cols):
    x = torch.stack([film(t, rows, cols, seed=s) for s in (0, 5)])
    plan = PruneVid().plan(given(x, t, rows, cols))
    for b in range(2):
        check(plan, x, b, reference(x[b], t))


def test_the_film_has_all_cases():
    """The test above would say little if nothing were static, or clustered, or no segments were found."""
    groups = groups_of(film(24, 3, 6).double().view(24, 18, -1))
    assert len({g[0][0] for g in groups}) > 3
    assert any(len(g[0]) > 1 for g in groups)
    large = groups_of(film(8, 5, 7).double().view(8, 35, -1))
    assert any(len(g[0]) > 1 and len(g[1]) > 14 for g in large)
    assert any(len(g[0]) == 1 and len(g[1]) > 14 for g in groups_of(film(8, 5, 7, still=0.3).double().view(8, 35, -1)))


@pytest.mark.parametrize(
    "settings", [{"tau": 0.95}, {"tau": -1.0}, {"tau": 1.0}, {"k": 2}, {"temporal_segment_ratio": 0.6},
                 {"cluster_ratio": 0.3}, {"min_group": 3}, {"cluster_ratio": 0.01}],
)  # fmt: skip
def test_settings(settings):
    t, rows, cols = 12, 4, 5
    x = film(t, rows, cols)[None]
    names = {"temporal_segment_ratio": "ratio", "cluster_ratio": "cluster", "min_group": "least"}
    plan = PruneVid(**settings).plan(given(x, t, rows, cols))
    check(plan, x, 0, reference(x[0], t, **{names.get(key, key): v for key, v in settings.items()}))


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([0, 0, 1, 0, 2, 2, 2], [0, 0, 2, 2, 2, 2, 2]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([1], [0]),
        ([1, 1, 0, 0], [1, 1, 0, 0]),
        ([3, 3, 5, 1, 1], [3, 3, 3, 1, 1]),  # runs beside it are as long: the left one
        ([3, 3, 5, 1, 1, 1], [3, 3, 1, 1, 1, 1]),
        ([4, 4, 0, 4, 4], [4, 4, 4, 4, 4]),  # both runs are the longest
        ([0, 1, 1], [1, 1, 1]),
        ([1, 1, 0], [1, 1, 1]),
        ([0, 0, 2, 1, 1, 3, 4, 4, 4], [0, 0, 0, 1, 1, 4, 4, 4, 4]),
        # The run of 0 takes a frame first, is then 3 long beside the 2 of label 1, and so on.
        ([0, 0, 9, 0, 1, 1, 1, 8, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]),
    ],
)
def test_frames_of_a_segment_stand_in_a_row(labels, wanted):
    assert contiguous(labels) == wanted == in_a_row(labels)


def test_frames_in_a_row_on_many_labels():
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4, (int(torch.randint(1, 14, (1,), generator=g)),), generator=g).tolist()
        assert contiguous(labels) == in_a_row(labels), labels


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("keep", [1, 2, 7, 0.1, 0.5, 0.9])
def test_keep_is_exact_and_places_differ(t, keep):
    x = torch.stack([film(t, 3, 5, seed=s) for s in (0, 7)])
    reducer = PruneVid(keep)
    plan = reducer.plan(given(x, t, 3, 5))
    assert plan.k == reducer.total(t * 15)
    if plan.is_identity:
        return
    assert plan.validity() is None
    for b in range(2):
        assert len(set(plan.representatives()[b].tolist())) == plan.k
        assert set(plan.sources()[b].tolist()) - {-1} == set(range(plan.k))


def test_the_rules_own_number_gives_the_rule():
    for seed in range(5):
        x = film(12, 4, 5, seed=seed)[None]
        e = given(x, 12, 4, 5)
        rule = PruneVid().plan(e)
        assert PruneVid(rule.k).plan(e) == rule


@pytest.mark.parametrize("off", [-30, -7, -1, 1, 7, 20])
def test_other_numbers_are_shared_out_in_proportion(off):
    t = 8
    x = film(t, 5, 7)[None]
    e = given(x, t, 5, 7)
    groups = [len(p) for _, p, _ in groups_of(x[0].double().view(t, 35, -1))]
    ruled = [m if m <= 14 else m // 2 for m in groups]
    keep = sum(ruled) + off
    numbers = PruneVid().numbers(groups, keep)
    assert sum(numbers) == keep
    assert all(1 <= c <= m for c, m in zip(numbers, groups, strict=True))
    rest = keep - len(groups)
    free = [m - 1 for m in ruled]
    for c, f, m in zip(numbers, free, groups, strict=True):
        ideal = 1 + rest * f / sum(free)
        if max(1 + rest * g / sum(free) - n for g, n in zip(free, groups, strict=True)) <= 0:  # none is full
            assert abs(c - ideal) < 1
        assert c <= m
    check(PruneVid(keep).plan(e), x, 0, reference(x[0], t, numbers))


def test_fewer_outputs_than_groups_are_spread_over_the_video():
    t = 8
    x = noise(1, t * 9, WIDTH)  # nothing is static: a group per frame
    plan = PruneVid(4, tau=1.0).plan(given(x, t, 3, 3))
    assert [r // 9 for r in plan.representatives()[0].tolist()] == [1, 3, 5, 7]
    source = plan.sources()[0].view(t, 9)
    assert (source[0::2] == -1).all()
    assert (source[1::2] == torch.arange(4)[:, None]).all()


def test_sources_tell_static_outputs_and_no_token_is_lost():
    t, n = 12, 20
    x = film(t, 4, 5)[None]
    plan = PruneVid().plan(given(x, t, 4, 5))
    source = plan.sources()[0]
    assert (source >= 0).all()
    seen = []
    for j in range(plan.k):
        over = {i // n for i in (source == j).nonzero().flatten().tolist()}
        seen.append(len(over))
        assert over == set(range(min(over), max(over) + 1))
        assert int(plan.representatives()[0, j]) // n == min(over)
    assert max(seen) > 1
    assert min(seen) == 1
    assert plan.reduce_size(None).sum() == t * n


def test_a_batch_is_its_samples():
    t = 9
    x = torch.stack([film(t, 4, 5, still=s, seed=3) for s in (0.9, 0.1, 0.6)])
    together = PruneVid().plan(given(x, t, 4, 5))
    assert together.validity() is not None
    for b in range(3):
        alone = PruneVid().plan(given(x[b : b + 1], t, 4, 5))
        there = together.validity()[b]
        assert torch.equal(together.representatives()[b, there], alone.representatives()[0])
        torch.testing.assert_close(together.reduce(x)[b, there], alone.reduce(x[b : b + 1])[0], rtol=0, atol=0)
        assert (together.reduce_size(None)[b][~there] == 0).all()


@pytest.mark.parametrize("t", [1, 2, 3, 8])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_videos(t, value):
    x = torch.full((1, t * 16, WIDTH), value)
    for keep in (None, 5, 1):
        plan = PruneVid(keep).plan(given(x, t, 4, 4))
        torch.testing.assert_close(plan.reduce(x), torch.full((1, plan.k, WIDTH), value))
        assert len(set(plan.representatives()[0].tolist())) == plan.k


def test_a_still_video_is_one_segment_of_static_tokens():
    x = noise(1, 16, WIDTH).repeat(1, 6, 1)
    plan = PruneVid().plan(given(x, 6, 4, 4))
    assert plan.k == 8
    assert (plan.sources()[0].view(6, 16) == plan.sources()[0][:16]).all()
    assert PruneVid(tau=1.0).plan(given(x, 6, 4, 4)).k == 6 * 8, "not above 1: nothing is static"


def test_zero_tokens_are_not_static_and_no_error():
    x = noise(1, 16, WIDTH).repeat(1, 6, 1)
    x.view(6, 16, -1)[:, 3] = 0
    own = likeness(x.view(6, 16, -1))
    assert own[3] == 0
    assert (own > 0.999999).sum() == 15


def test_a_segment_of_one_frame_has_nothing_static():
    assert not PruneVid(tau=-1.0).static(noise(1, 9, WIDTH), [(0, 1)], None).any()


def test_more_outputs_than_groups_have_tokens():
    """The least similar static places then have a token in every frame, as few places as will do."""
    t, n = 12, 20
    x = film(t, 4, 5)[None]
    e, per = given(x, t, 4, 5), x[0].view(t, n, WIDTH)
    bounds = PruneVid().segments(per)
    before = PruneVid().static(per, bounds, None)
    tokens = sum(int(s.sum()) + (b - a) * int((~s).sum()) for s, (a, b) in zip(before, bounds, strict=True))
    for keep in (tokens, tokens + 1, tokens + 20, t * n - 1):
        after = PruneVid().static(per, bounds, keep)
        places = [(float(likeness(per[a:b])[j]), b - a, (i, j)) for i, (a, b) in enumerate(bounds) for j in range(n)]
        have, now = tokens, before.clone()
        for _, length, at in sorted(p for p in places if before[p[2]]):
            if have < keep:
                have, now[at] = have + length - 1, False
        assert torch.equal(after, now)
        plan = PruneVid(keep).plan(e)
        assert plan.k == keep
        assert plan.validity() is None
        assert set(plan.sources()[0].tolist()) == set(range(keep))


def test_protected_tokens_stay_in_front():
    x = torch.cat([noise(1, 2, WIDTH, seed=9), film(8, 3, 5)[None]], 1)
    plan = PruneVid().plan(tr.Evidence(x, grid=(8, 3, 5), protected=2))
    bare = PruneVid().plan(given(x[:, 2:], 8, 3, 5))
    assert plan.k == bare.k + 2
    assert torch.equal(plan.representatives()[:, 2:], bare.representatives() + 2)
    assert torch.equal(plan.reduce(x)[:, :2], x[:, :2])
    assert torch.equal(plan.reduce(x)[:, 2:], bare.reduce(x[:, 2:]))


def test_evidence_of_an_adapter():
    e = visual(frames(8, 3, 5), batch=1, x=film(8, 3, 5)[None].repeat(1, 1, 2))
    assert PruneVid().plan(e) == PruneVid().plan(given(e.x, 8, 3, 5))


def test_plans_are_sparse():
    x = film(16, 4, 4)[None]
    assert PruneVid().plan(given(x, 16, 4, 4)).src.shape == (1, 256)


def test_means_of_many_frames_in_half_precision():
    """512 equal-weight members; adding up in bfloat16 would stand still long before the end."""
    x = (noise(1, 4, WIDTH).repeat(1, 512, 1) + 2).bfloat16()
    plan = PruneVid(2).plan(given(x, 512, 2, 2))
    assert plan.k == 2
    for j in range(2):
        members = plan.sources()[0] == j
        torch.testing.assert_close(plan.reduce(x)[0, j], x[0, members].float().mean(0).bfloat16())


def test_entries_are_added_in_parts(monkeypatch):
    x = film(9, 4, 5)[None]
    plan = PruneVid().plan(given(x, 9, 4, 5))
    whole = plan.reduce(x)
    monkeypatch.setattr(plans, "_CHUNK", 7)
    torch.testing.assert_close(plan.reduce(x), whole)
    x.requires_grad_()
    plan.reduce(x).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(float(plan.k * WIDTH)))


def test_everything_kept_is_the_identity_and_none_of_keep_is_not():
    x = film(4, 4, 5)[None]
    assert isinstance(PruneVid(1.0).plan(given(x, 4, 4, 5)), Identity)
    assert PruneVid().plan(given(x, 4, 4, 5)).k < 80


def test_not_a_number_is_refused():
    x = film(4, 4, 5)[None]
    x[0, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        PruneVid().plan(given(x, 4, 4, 5))


@pytest.mark.parametrize(
    ("name", "bad"),
    [("keep", 0), ("keep", 1.5), ("temporal_segment_ratio", 0), ("temporal_segment_ratio", 2), ("cluster_ratio", 0.0),
     ("cluster_ratio", True), ("tau", 2), ("tau", "high"), ("k", 0), ("k", 2.5), ("min_group", -1),
     ("newlines", "rank"), ("positions", "some")],
)  # fmt: skip
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        PruneVid(**{name: bad})


def test_text_and_json():
    for reducer in (PruneVid(), PruneVid(0.2, tau=0.7)):
        assert tr.get_method(reducer.spec(), "projector") == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
