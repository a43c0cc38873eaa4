"""FlashVID's projector part against the card's steps in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from density import check, cosine, film, noise, peaks_of, rows, shared_out, video
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.video.projector.flashvid import FlashVID


def segments(means, method):
    """Step 1, with unique cuts and one segment per four frames at most."""
    t = len(means)
    alike = [cosine(means[f], means[f + 1]) for f in range(t - 1)]
    cuts = {f for f in range(t - 1) if alike[f] < method.segment_threshold}
    for f in sorted(range(t - 1), key=lambda f: (alike[f], f)):
        if len(cuts) + 1 < min(method.min_segments, t // 4):
            cuts.add(f)
    bounds = [0, *[f + 1 for f in sorted(cuts)], t]
    return [(bounds[i], bounds[i + 1]) for i in range(len(bounds) - 1)]


def selected(x, score, centre, count, method):
    """Step 3 on a frame x (n,C); ``centre`` is the mean of the segment's frame means."""
    n = len(x)
    if method.selection == "attn":
        return sorted(range(n), key=lambda j: (-float(score[j]), j))[:count]
    factor = [1.0 if method.selection == "div" else 1e6 * float(score[j]) for j in range(n)]
    if method.selection == "attn_div_v2":
        factor = [w * max(0.0, float(x[j].double() @ centre.double())) for j, w in enumerate(factor)]
    d = [[max(0.0, 1 - cosine(x[i], x[j])) * factor[j] for j in range(n)] for i in range(n)]
    out: list[int] = []
    while len(out) < count:
        others = out or range(n)
        far = {j: min((d[i][j] for i in others if i != j), default=0.0) for j in range(n) if j not in out}
        out.append(max(far, key=lambda j: (far[j], -j)))
    return out


def reference(x, score, t, keep, method):
    n = len(x) // t
    at = [[f * n + j for j in range(n)] for f in range(t)]
    means = [torch.stack([x[i] for i in frame]).double().mean(0) for frame in at]
    each = [keep // t + (f < keep % t) for f in range(t)]
    unchanged = [math.ceil(round(b * method.alpha, 9)) for b in each]
    out: dict[int, dict[int, float]] = {}
    for a, b in segments(means, method):
        centre = torch.stack(means[a:b]).mean(0)
        chosen = set()
        for f in range(a, b):
            mine = selected(x[f * n : f * n + n], score[f * n : f * n + n], centre, unchanged[f], method)
            chosen |= {at[f][j] for j in mine}
        out |= {i: {i: 1.0} for i in chosen}
        links = []
        for f in range(a + 1, b):
            for i in at[f]:
                before = [p for p in at[f - 1] if p not in chosen]
                if i not in chosen and before:
                    alike = [cosine(x[i], x[p]) for p in before]
                    top = max(range(len(before)), key=lambda j: (alike[j], -j))
                    if alike[top] > method.temporal_threshold:
                        links.append((alike[top], i, before[top]))
        links = sorted(links, key=lambda e: (-e[0], e[1]))[: n * (b - a) - sum(each[a:b])]
        parent = {i: p for _, i, p in links}
        trees: dict[int, list[int]] = {}
        for f in range(a, b):
            for i in at[f]:
                root = i
                while root in parent:
                    root = parent[root]
                if i not in chosen:
                    trees.setdefault(root, []).append(i)
        many = {r: len(m) if method.counts == "tree" else 1 + list(parent.values()).count(r) for r, m in trees.items()}
        roots = [[r for r in at[f] if r in trees] for f in range(a, b)]
        wanted = shared_out(sum(each[a:b]) - sum(unchanged[a:b]), [len(r) for r in roots])
        for mine, count in zip(roots, wanted, strict=True):
            points = [sum(x[i].double() for i in trees[r]) / many[r] for r in mine]
            centres = peaks_of(points, count, min(7, count))
            for c in set(centres) - {-1}:
                group = [mine[i] for i, m in enumerate(centres) if m == c]
                out[mine[c]] = {i: 1 / many[r] / len(group) for r in group for i in trees[r]}
    return sorted(out.items())


def compare(method, x, t, attention=None):
    attention = rows(x) if attention is None else attention
    keep = method.total(x.shape[1])
    plan = method.plan(video(x, t, attention))
    want = [reference(x[b], attention[b, 0, 0], t, keep, method) for b in range(len(x))]
    assert all(len(outputs) == keep for outputs in want)
    check(plan, x, want)
    return plan


@pytest.mark.parametrize(("t", "n"), [(1, 9), (2, 7), (3, 5), (5, 9), (8, 7), (9, 5)])
@pytest.mark.parametrize("keep", [0.25, 0.6, 1, 4])
@pytest.mark.parametrize("selection", ["attn_div_v2", "attn_div"])
def test_the_cards_steps(t, n, keep, selection):
    compare(FlashVID(keep=keep, selection=selection), film(t, n, batch=2, seed=t + n), t)


@pytest.mark.parametrize(
    "settings",
    [
        {"selection": "attn"},
        {"selection": "div"},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": 0.5, "temporal_threshold": 0.2},
        {"alpha": 0.2, "segment_threshold": -1.0},
        {"alpha": 0.2, "segment_threshold": -1.0, "temporal_threshold": -1.0},
        {"alpha": 0.3, "segment_threshold": 1.0},
        {"alpha": 0.2, "segment_threshold": -1.0, "min_segments": 1, "counts": "children"},
        {"temporal_threshold": 1.0},
    ],
)
def test_settings(settings):
    for t, n in ((5, 9), (9, 7)):
        x = film(t, n, batch=2, seed=5, still=0.8, shots=1)
        for keep in (0.3, 0.7):
            compare(FlashVID(keep=keep, **settings), x, t)


def test_numbers_by_hand():
    """Three frames of two tokens: one kept each, and one place that stays the same over time becomes one output."""
    still = torch.tensor([0.0, 0.0, 0.0, 5.0])
    x = torch.stack([torch.eye(4)[0], still, torch.eye(4)[1], 2 * still, torch.eye(4)[2], 3 * still])[None]
    attention = torch.tensor([3.0, 1, 3, 1, 3, 1]).view(1, 1, 1, 6)
    plan = FlashVID(keep=4, alpha=0.5, selection="attn").plan(video(x, 3, attention))
    # Four of three frames: 2, 1, 1; ceil(0.5 B) = 1 of each stays as it is and one output is left for the tree.
    assert plan.representatives()[0].tolist() == [0, 1, 2, 4]
    assert plan.untouched()[0].tolist() == [True, False, True, True]
    torch.testing.assert_close(plan.reduce(x)[0, 1], 2 * still)
    # The official count of the root is one and its only child: (1 + 2 + 3) / 2.
    official = FlashVID(keep=4, alpha=0.5, selection="attn", counts="children").plan(video(x, 3, attention))
    torch.testing.assert_close(official.reduce(x)[0, 1], 3 * still)


def test_no_more_links_than_the_budget_leaves():
    """All tokens are alike: with B outputs in every frame of a segment the most similar links alone are made."""
    x = torch.ones(1, 15, 4)
    plan = FlashVID(keep=11, alpha=0.0).plan(video(x, 3))
    assert plan.k == 11
    sizes = [plan.sources()[0].tolist().count(k) for k in range(11)]
    assert sum(sizes) == 15, "nothing is dropped while every frame has roots enough"


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("selection", ["attn_div_v2", "attn_div", "attn", "div"])
@pytest.mark.parametrize("keep", [1, 3, 7, 20, 23])
def test_a_video_that_never_changes(value, selection, keep):
    x = torch.full((1, 24, 4), value)
    plan = FlashVID(keep=keep, selection=selection).plan(video(x, 4, torch.ones(1, 1, 1, 24)))
    own = plan.representatives()[0].tolist()
    assert sorted(set(own)) == own
    assert len(own) == keep
    torch.testing.assert_close(plan.reduce(x), x[:, :keep])


def test_nothing_is_chosen_twice_where_tokens_point_away_from_the_frame_mean():
    """Products with the frame mean are negative for half of the tokens."""
    x = torch.cat([noise(20, 6, seed=1), -3 * noise(5, 6, seed=2)])[None]
    plan = compare(FlashVID(keep=0.9), x, 1)
    assert len(set(plan.representatives()[0].tolist())) == 23


def test_frames_alone_do_not_merge_what_they_keep():
    x = film(4, 9, seed=8)
    plan = compare(FlashVID(keep=0.5, segment_threshold=1.0), x, 4)
    kept = plan.representatives()[0][plan.untouched()[0]]
    sources = plan.sources()[0]
    own = torch.arange(plan.k)[plan.untouched()[0]]
    assert torch.equal(sources[kept], own)
    assert all(sources.tolist().count(k) == 1 for k in own.tolist())


def test_short_videos_are_not_cut_into_single_frames():
    x = film(8, 6, seed=9, still=1.0, shots=1)
    plan = compare(FlashVID(keep=0.2, alpha=0.0, min_segments=8), x, 8)
    spans = [{i // 6 for i, s in enumerate(plan.sources()[0].tolist()) if s == k} for k in range(plan.k)]
    assert max(map(len, spans)) > 1


@pytest.mark.parametrize("keep", [1, 2, 5, 8])
@pytest.mark.parametrize("selection", ["attn_div_v2", "attn"])
def test_one_token_per_frame(keep, selection):
    compare(FlashVID(keep=keep, selection=selection), film(9, 1, seed=5), 9)


def test_equal_scores_go_to_the_lower_index():
    x = noise(1, 12, 6)
    plan = FlashVID(keep=5, alpha=1.0, selection="attn").plan(video(x, 3, torch.ones(1, 1, 1, 12)))
    assert plan.representatives()[0].tolist() == [0, 1, 4, 5, 8]


def test_expansion_is_a_factor_on_keep():
    x = film(4, 10, seed=3)
    wide = FlashVID(keep=0.25, expansion=1.25)
    assert wide.total(40) == 13
    assert FlashVID(keep=8, expansion=1.25).total(40) == 10
    assert wide.plan(video(x, 4)) == FlashVID(keep=0.3125).plan(video(x, 4))
    assert wide.at(7).total(40) == 7
    assert FlashVID(keep=0.9, expansion=1.25).plan(video(x, 4)).is_identity, "never more than there are"


def test_a_batch_is_its_samples():
    x = film(5, 9, batch=3, seed=6)
    attention = rows(x)
    plan = FlashVID(keep=17).plan(video(x, 5, attention))
    for b in range(3):
        alone = FlashVID(keep=17).plan(video(x[b : b + 1], 5, attention[b : b + 1]))
        assert torch.equal(alone.representatives()[0], plan.representatives()[b])
        torch.testing.assert_close(alone.reduce(x[b : b + 1])[0], plan.reduce(x)[b])


def test_protected_tokens_stay_in_front():
    x, front = film(4, 6, seed=7), noise(1, 2, 8, seed=8)
    attention = rows(x)
    plain = FlashVID(keep=9).plan(video(x, 4, attention))
    wide = torch.cat([front, x], 1)
    padded = torch.cat([torch.zeros(1, 1, 1, 2), attention], 3)
    plan = FlashVID(keep=9).plan(video(wide, 4, padded, protected=2, cls=True))
    assert plan.representatives()[0].tolist() == [0, 1, *(plain.representatives()[0] + 2).tolist()]
    torch.testing.assert_close(plan.reduce(wide)[:, 2:], plain.reduce(x))
    assert torch.equal(plan.reduce(wide)[:, :2], front)


def test_attention_is_that_received_in_the_tower():
    evidence = visual(ORIGINS["frames"], batch=1, cls=False)
    method = FlashVID(keep=12)
    block = evidence.tower(None).patches
    q, k = block.queries.double(), block.keys.double()
    score = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean(1).mean(1).flatten()
    check(method.plan(evidence), evidence.x, [reference(evidence.x[0], score, 3, 12, method)])


def test_diversity_alone_asks_for_no_attention():
    assert FlashVID(selection="div").required() == () == FlashVID(selection="div").tower_blocks()
    assert FlashVID(layer=3).required() == ("tower",)
    assert FlashVID(layer=3).tower_blocks() == (3,)
    x = film(3, 7, seed=2)
    assert FlashVID(keep=8, selection="div").plan(tr.Evidence(x, grid=(3, 1, 7))).k == 8


def test_half_precision():
    x = film(4, 6, seed=9)
    attention = rows(x)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        plan = FlashVID(keep=9).plan(video(low, 4, attention))
        assert plan == FlashVID(keep=9).plan(video(low.float(), 4, attention))
        assert plan.reduce(low).dtype == dtype


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("alpha", 1.1), ("alpha", "much"), ("selection", "best"), ("temporal_threshold", 2),
        ("segment_threshold", True), ("min_segments", 0), ("expansion", 0.5), ("counts", "all"), ("keep", None),
        ("newlines", "rank"),
    ],
)  # fmt: skip
def test_bad_settings(name, bad):
    with pytest.raises(ValueError, match=name):
        FlashVID(**{name: bad})


def test_bad_evidence():
    x = noise(1, 10, 4)
    with pytest.raises(ValueError, match="frames of one size"):
        FlashVID(keep=3).plan(tr.Evidence(x, grid=(3, 1, 3), attention=rows(x)))
    x[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        FlashVID(keep=3).plan(video(x, 2))


def test_known_by_name():
    assert tr.get_method("flashvid:keep=0.25,expansion=1.25") == FlashVID(keep=0.25, expansion=1.25)
