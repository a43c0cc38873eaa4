"""HoliTom's part before the language model against the card's steps in plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from density import check, cosine, film, noise, peaks_of, rows, shared_out, video
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.video.projector.holitom import HoliTom, _segments


def saved(spans, same):
    """Tokens that one copy of the static ones saves, place by place."""
    return sum(
        b - a - 1
        for a, b in spans
        for j in range(len(same[0]) if same else 0)
        if all(same[u][j] for u in range(a, b - 1))
    )


def segments(same, t, longest):
    """Steps 2 and 3: windows in full, from the first frame to the last."""
    best, length = [0], []
    for i in range(t):
        top, size = best[i], 1
        for w in range(2, min(i + 1, longest) + 1):
            value = best[i + 1 - w] + saved([(i + 1 - w, i + 1)], same)
            if value > top:
                top, size = value, w
        best.append(top)
        length.append(size)
    spans, stop = [], t
    while stop:
        spans.insert(0, (stop - length[stop - 1], stop))
        stop -= length[stop - 1]
    return spans


def mix_of(points, ids, count, method, each):
    """Step 7: (head, weights) of every cluster; ``each`` gives the tokens behind a point."""
    centre = peaks_of(points, count, min(method.k, count))
    out = []
    for c in sorted({c for c in centre if c >= 0}):
        others = [i for i, m in enumerate(centre) if m == c and i != c]
        parts = {c: 1.0} if not others else {c: method.beta, **{i: (1 - method.beta) / len(others) for i in others}}
        mix = {token: w / len(each[i]) for i, w in parts.items() for token in each[i]}
        out.append((ids[c], mix))
    return out


def reference(x, score, t, keep, method):
    """The card on one sample, x (t*n,C): outputs in order."""
    n = len(x) // t
    at = [[f * n + j for j in range(n)] for f in range(t)]
    alike = [[cosine(x[at[f][j]], x[at[f + 1][j]]) for j in range(n)] for f in range(t - 1)]
    same = [[v > method.tau for v in row] for row in alike]
    spans = segments(same, t, method.max_window)
    left = t * n - saved(spans, same)
    still = {(a, b): [j for j in range(n) if b - a > 1 and all(same[u][j] for u in range(a, b - 1))] for a, b in spans}
    if keep >= left:
        links = sorted((alike[u][j], u, j) for (a, b), places in still.items() for u in range(a, b - 1) for j in places)
        cut = {(u, j) for _, u, j in links[: keep - left]}
        out = []
        for a, b in spans:
            for f in range(a, b):
                for j in still[a, b]:
                    if f == a or (f - 1, j) in cut:
                        run = list(itertools.takewhile(lambda u, j=j: (u - 1, j) not in cut, range(f + 1, b)))
                        out.append((at[f][j], {at[u][j]: 1 / (1 + len(run)) for u in [f, *run]}))
                out += [(at[f][j], {at[f][j]: 1.0}) for j in range(n) if j not in still[a, b]]
        return out
    sizes = [m for span in spans for m in (len(still[span]), *[n - len(still[span])] * (span[1] - span[0]))]
    counts = iter(shared_out(keep, sizes))
    out = []
    for a, b in spans:
        places = still[a, b]
        means = [torch.stack([x[at[f][j]] for f in range(a, b)]).mean(0) for j in places]
        groups = [[at[f][j] for f in range(a, b)] for j in places]
        out += mix_of(means, [at[a][j] for j in places], next(counts), method, groups)
        for f in range(a, b):
            count = next(counts)
            moving = [i for j, i in enumerate(at[f]) if j not in places]
            best = sorted(moving, key=lambda i: (-float(score[i]), i))[: int(count * (1 - method.d) + 0.5)]
            out += [(i, {i: 1.0}) for i in sorted(best)]
            rest = [i for i in moving if i not in best]
            out += mix_of([x[i] for i in rest], rest, count - len(best), method, [[i] for i in rest])
    return out


def compare(method, x, t, keep, attention=None):
    attention = rows(x) if attention is None else attention
    plan = method.plan(video(x, t, attention))
    check(plan, x, [reference(x[b], attention[b, 0, 0], t, keep, method) for b in range(len(x))])
    return plan


@pytest.mark.parametrize(("t", "n"), [(1, 7), (2, 9), (3, 5), (5, 7), (8, 9), (9, 5)])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1, 3])
def test_the_cards_steps(t, n, keep):
    x = film(t, n, batch=2, seed=t + n)
    method = HoliTom(keep=keep)
    compare(method, x, t, method.total(t * n))


@pytest.mark.parametrize("settings", [{"d": 0.5}, {"d": 1.0, "beta": 0.3}, {"d": 0.3, "k": 2}, {"tau": 0.5}])
@pytest.mark.parametrize(("t", "n"), [(1, 9), (5, 11), (8, 9)])
def test_merging_dynamic_tokens_too(settings, t, n):
    x = film(t, n, batch=2, seed=3, still=0.4)
    for keep in (n, 2 * t, t * n // 2):
        compare(HoliTom(keep=keep, **settings), x, t, min(keep, t * n))


@pytest.mark.parametrize("longest", [1, 2, 3, 5])
def test_segments_are_no_longer_than_the_largest_window(longest):
    x = film(6, 5, seed=4, still=1.0, shots=1)
    method = HoliTom(keep=12, max_window=longest)
    plan = compare(method, x, 6, 12)
    frames = [{i // 5 for i, s in enumerate(plan.sources()[0].tolist()) if s == k} for k in range(12)]
    assert max(map(len, frames)) <= longest


@pytest.mark.parametrize("seed", range(20))
def test_the_segmentation_saves_most(seed):
    t, n = 7, 4
    same = torch.rand(t - 1, n, generator=torch.Generator().manual_seed(seed)) < 0.6
    spans, linked = _segments(same, 1024)
    ways = []
    for cuts in itertools.product([False, True], repeat=t - 1):
        bounds = [0, *[i + 1 for i, c in enumerate(cuts) if c], t]
        ways.append(saved(list(itertools.pairwise(bounds)), same.tolist()))
    assert saved(spans, same.tolist()) == max(ways) == int(linked.sum())
    assert spans == segments(same.tolist(), t, 1024)


def test_ties_prefer_a_frame_alone_and_then_the_shorter_segment():
    # Frames 0-1 share place 0, frames 1-2 share place 1: either pair saves one token, and so does none more.
    same = torch.tensor([[True, False], [False, True]])
    assert _segments(same, 1024)[0] == [(0, 2), (2, 3)]
    # All three frames save 2 by place 0; the first two alone save 2 by both places: the last frame stays alone.
    assert _segments(torch.tensor([[True, True], [True, False]]), 1024)[0] == [(0, 2), (2, 3)]
    # The last two save 2, and so do all three: the shorter one is taken.
    assert _segments(torch.tensor([[True, False], [True, True]]), 1024)[0] == [(0, 1), (1, 3)]
    assert _segments(torch.zeros(0, 4, dtype=torch.bool), 1024)[0] == [(0, 1)]


def test_a_long_still_video_is_one_segment():
    spans, linked = _segments(torch.ones(999, 3, dtype=torch.bool), 1024)
    assert spans == [(0, 1000)]
    assert bool(linked.all())


def test_numbers_by_hand():
    """Two frames of 4 places, two of them still: 2 means over time and 4 dynamic tokens, of which 3 stay: 1, 1, 1."""
    still, left, right = noise(2, 6, seed=1), noise(2, 6, seed=2), noise(2, 6, seed=3)
    x = torch.cat([still, left, still, right])[None]
    attention = torch.tensor([9.0, 9, 1, 2, 9, 9, 4, 3]).view(1, 1, 1, 8)
    plan = HoliTom(keep=3, tau=0.99).plan(video(x, 2, attention))
    assert plan.representatives()[0].tolist()[1:] == [3, 6]
    assert plan.untouched()[0].tolist() == [False, True, True]
    own = plan.representatives()[0, 0].item()
    torch.testing.assert_close(plan.reduce(x)[0, 0], 0.6 * x[0, own] + 0.4 * x[0, 1 - own])
    # Six are left by averaging alone; seven come out when the weaker of two links is cut.
    x[0, 4] += 0.05
    plan = HoliTom(keep=7, tau=0.9).plan(video(x, 2, attention))
    assert plan.representatives()[0].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert plan.untouched()[0].tolist() == [True, False, True, True, True, True, True]
    torch.testing.assert_close(plan.reduce(x)[0, 1], (x[0, 1] + x[0, 5]) / 2)


def test_equal_attention_goes_to_the_lower_index_and_equal_frames_to_the_first():
    x = noise(1, 12, 6)
    plan = HoliTom(keep=5, tau=1.0).plan(video(x, 3, torch.ones(1, 1, 1, 12)))
    assert plan.representatives()[0].tolist() == [0, 1, 4, 5, 8]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("keep", [1, 2, 7, 13, 23])
def test_a_video_that_never_changes(value, keep):
    x = torch.full((1, 24, 4), value)
    plan = HoliTom(keep=keep).plan(video(x, 4, torch.ones(1, 1, 1, 24)))
    own = plan.representatives()[0].tolist()
    assert len(set(own)) == len(own) == keep
    torch.testing.assert_close(plan.reduce(x), x[:, :keep])


@pytest.mark.parametrize("d", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 2, 6, 7, 8])
def test_one_token_per_frame(keep, d):
    x = film(9, 1, seed=5)
    plan = HoliTom(keep=keep, d=d).plan(video(x, 9))
    assert plan.k == keep


def test_a_batch_is_its_samples():
    x, attention = film(5, 7, batch=3, seed=6), None
    attention = rows(x)
    plan = HoliTom(keep=13, d=0.4).plan(video(x, 5, attention))
    for b in range(3):
        alone = HoliTom(keep=13, d=0.4).plan(video(x[b : b + 1], 5, attention[b : b + 1]))
        assert torch.equal(alone.representatives()[0], plan.representatives()[b])
        torch.testing.assert_close(alone.reduce(x[b : b + 1])[0], plan.reduce(x)[b])


def test_protected_tokens_stay_in_front():
    x = film(4, 6, seed=7)
    front = noise(1, 2, 8, seed=8)
    attention = rows(x)
    plain = HoliTom(keep=9, d=0.5).plan(video(x, 4, attention))
    wide = torch.cat([front, x], 1)
    padded = torch.cat([torch.zeros(1, 1, 1, 2), attention], 3)
    plan = HoliTom(keep=9, d=0.5).plan(video(wide, 4, padded, protected=2, cls=True))
    assert plan.representatives()[0].tolist() == [0, 1, *(plain.representatives()[0] + 2).tolist()]
    torch.testing.assert_close(plan.reduce(wide)[:, 2:], plain.reduce(x))
    assert torch.equal(plan.reduce(wide)[:, :2], front)


def test_attention_is_that_received_in_the_tower():
    evidence = visual(ORIGINS["frames"], batch=1, cls=False)
    method = HoliTom(keep=9, tau=1.0)
    block = evidence.tower(None).patches
    q, k = block.queries.double(), block.keys.double()
    maps = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    score = maps.mean(1).mean(1).flatten()
    check(method.plan(evidence), evidence.x, [reference(evidence.x[0], score, 3, 9, method)])


def test_half_precision():
    x = film(4, 6, seed=9)
    attention = rows(x)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        plan = HoliTom(keep=9).plan(video(low, 4, attention))
        assert plan == HoliTom(keep=9).plan(video(low.float(), 4, attention))
        assert plan.reduce(low).dtype == dtype


@pytest.mark.parametrize(
    ("name", "bad"),
    [("tau", 1.5), ("tau", "high"), ("beta", -0.1), ("beta", True), ("d", 2), ("k", 0), ("max_window", 0), ("keep", 0)],
)
def test_bad_settings(name, bad):
    with pytest.raises(ValueError, match=name):
        HoliTom(**{name: bad})


def test_bad_evidence():
    x = noise(1, 10, 4)
    with pytest.raises(ValueError, match="frames of one size"):
        HoliTom(keep=3).plan(tr.Evidence(x, grid=(3, 1, 3), attention=rows(x)))
    x[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        HoliTom(keep=3).plan(video(x, 2))


def test_known_by_name():
    assert tr.get_method("holitom:keep=0.25,tau=0.65") == HoliTom(keep=0.25, tau=0.65)
