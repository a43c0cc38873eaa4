"""VScan's scans and merge against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, anyres, class_row, grid, noise, received, units, visual

import tokenreduce as tr
from tokenreduce.core.budget import count
from tokenreduce.core.plan import Merge
from tokenreduce.vision.projector.vscan import VScan

LOCAL = 1  # of 4 blocks: 5/24 of the depth


def windows_of(shape, place, side):
    """Window of every token, left-over rows and columns in the last one, and how many there are."""
    rows, cols = max(shape[0] // side, 1), max(shape[1] // side, 1)
    out = [(min(r // side, rows - 1), min(c // side, cols - 1)) for r, c in place]
    return out, len(set(out))


def local_scan(score, windows, many, wanted, capped):
    """Indices that the local scan takes, by the card's walk through all tokens."""
    walk = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    quota, given, taken = (-(-wanted // many) if capped else wanted // many), {}, []
    for i in walk:
        if given.get(windows[i], 0) < quota and (not capped or len(taken) < wanted):
            given[windows[i]] = given.get(windows[i], 0) + 1
            taken.append(i)
    return taken


def reference(shallow, deep, windows, many, keep, capped=False, share=0.5):
    """The kept tokens of one view, ascending."""
    near = local_scan(shallow, windows, many, int(keep * share), capped)
    far = sorted((i for i in range(len(deep)) if i not in near), key=lambda i: (-float(deep[i]), i))
    return sorted(near + far[: keep - len(near)])


def groups(x, kept):
    """Members of every kept token, itself first: each other token goes to the most similar one, the first at ties."""
    rows = [r / max(float(r.norm()), 1e-12) for r in x.double()]
    out = [[i] for i in kept]
    for i in range(len(x)):
        if i not in kept:
            out[max(range(len(kept)), key=lambda j: (float(rows[i] @ rows[kept[j]]), -j))].append(i)
    return out


def check(evidence, plan, b, kept):
    assert isinstance(plan, Merge)
    assert plan.representatives()[b].tolist() == kept
    out, sizes, alone = plan.reduce(evidence.x), plan.reduce_size(None), plan.untouched()
    for j, members in enumerate(groups(evidence.x[b], kept)):
        torch.testing.assert_close(out[b, j], evidence.x[b, members].mean(0))
        assert sizes[b, j] == len(members)
        assert bool(alone[b, j]) == (len(members) == 1)
        assert all(plan.sources()[b, i] == j for i in members)


@pytest.mark.parametrize("keep", [16, 40, 37, 143, 2, 3])
def test_worked_example_with_class_token(keep):
    """12 x 12 tokens in four windows of 6 x 6. 37: 18 local picks are 4 of every window, 21 are deep."""
    evidence = visual(ORIGINS["large"])
    windows, many = windows_of((12, 12), ORIGINS["large"].place.tolist(), 6)
    assert many == 4
    plan = VScan(keep=keep).plan(evidence)
    for b in range(2):
        check(
            evidence,
            plan,
            b,
            reference(class_row(evidence, LOCAL, b), class_row(evidence, None, b), windows, many, keep),
        )


@pytest.mark.parametrize("origin", [units(9, 14), units(3, 9), units(4, 5)], ids=["9x14", "3x9", "4x5"])
@pytest.mark.parametrize("keep", [0.167, 7, 10, 2, 1])
def test_worked_example_without_class_token(origin, keep):
    """2x2 units: received attention, mean over the four patches; windows of 4 x 4, one at least; capped quotas."""
    evidence = visual(origin, cls=False)
    windows, many = windows_of(origin.shape, origin.place.tolist(), 4)
    assert many == max(origin.shape[0] // 4, 1) * (origin.shape[1] // 4)
    plan = VScan(keep=keep).plan(evidence)
    wanted = count(keep, origin.n)
    for b in range(2):
        near, far = (received(evidence, look, b)[origin.index].mean(1) for look in (LOCAL, None))
        check(evidence, plan, b, reference(near, far, windows, many, wanted, capped=True))


@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (1, 3), (5, 5), (7, 13), (13, 6)])
@pytest.mark.parametrize("quota", ["equal", "capped"])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_any_grid_and_budget_keeps_exactly_as_many(rows, cols, quota, window):
    evidence = visual(grid(rows, cols), batch=1)
    windows, many = windows_of((rows, cols), evidence.place.tolist(), window or 6)
    for keep in {1, 2, (rows * cols) // 2, rows * cols - 1} - {0, rows * cols}:
        plan = VScan(keep=keep, window=window, quota=quota).plan(evidence)
        near, far = class_row(evidence, LOCAL), class_row(evidence)
        assert plan.keep[0].tolist() == reference(near, far, windows, many, keep, quota == "capped")
        assert plan.k == keep


def test_counts_that_the_official_code_misses():
    """24 x 24 tokens: 98 instead of 100, 560 instead of 575, and nothing below 32."""
    evidence = visual(grid(24, 24), batch=1)
    for keep, local in ((96, 48), (100, 48), (575, 272), (31, 0), (32, 16)):
        reducer = VScan(keep=keep)
        assert int(reducer.scan(evidence, keep).sum()) == local
        assert reducer.plan(evidence).k == keep
    assert VScan().plan(evidence).k == 96


def test_a_flat_deep_score_does_not_bring_local_picks_back():
    """All deep attention on one token: the others tie at 0, and the local picks must not tie with them."""
    rows = torch.zeros(1, 1, 1, 17)
    rows[..., 3] = 1.0
    evidence = tr.Evidence(noise(1, 17, 6), attention=rows, protected=1)
    plan = VScan(keep=9, window=2).plan(evidence)
    near = VScan(keep=9, window=2).scan(evidence, 9)[0].nonzero().flatten().tolist()
    assert near == [0, 2, 8, 10], "the first of every window of 2 x 2; token 2 is the attended one"
    assert plan.keep[0].tolist() == [0, *(1 + i for i in (0, 1, 2, 3, 4, 5, 6, 8, 10))]


def test_ties_go_to_the_lower_index():
    evidence = visual(ORIGINS["square"], batch=1, keys=torch.zeros(1, 2, 17, 8), x=torch.ones(1, 16, 12))
    plan = VScan(keep=6, window=2).plan(evidence)
    assert plan.keep.tolist() == [[0, 1, 2, 3, 4, 5]], "no window gives a whole token of three"
    plan = VScan(keep=8, window=2).plan(evidence)
    assert plan.keep.tolist() == [[0, 1, 2, 3, 4, 5, 8, 10]]
    assert plan.sources()[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 6, 0, 7, *[0] * 5], (
        "all are alike: the first takes them"
    )


@pytest.mark.parametrize("view", [0, 1, 2])
def test_crops_without_their_padding(view):
    """Of crops of 4 x 4, rows that only cover padding are gone: windows there are smaller, and all merge among
    themselves."""
    origin = anyres(4, (1, 2), 1)
    _, part = next((w, e) for i, (w, e) in enumerate(_views(visual(origin, batch=1))) if i == view)
    windows, many = windows_of((4, 4), part.place.tolist(), 2)
    assert part.n == (16 if view == 0 else 8)
    plan = VScan(keep=7, window=2, local=0.6).plan(part)
    near, far = (class_row(part, look)[part.origin.index[:, 0]] for look in (LOCAL, None))
    check(part, plan, 0, reference(near, far, windows, many, 7, share=0.6))


def _views(evidence):
    for where, part in evidence.parts():
        for i in range(len(where)):
            yield where[i], part.batch_of(torch.arange(i, part.batch, len(where)))


def test_windows_without_a_token_do_not_count():
    """A crop of 4 x 4 whose upper half is padding has two windows of 2 x 2, which share the local budget."""
    origin = grid(4, 4).take(torch.arange(8, 16))
    evidence = visual(origin, batch=1)
    reducer = VScan(keep=4, window=2)
    near = reducer.scan(evidence, 4)[0]
    assert int(near.sum()) == 2
    assert [int(near[[0, 1, 4, 5]].sum()), int(near[[2, 3, 6, 7]].sum())] == [1, 1]


def test_plain_evidence_with_class_rows():
    """Rows that a researcher gives stand for both blocks; the class token stays in front."""
    rows = noise(2, 3, 1, 17).softmax(-1)
    evidence = tr.Evidence(noise(2, 17, 6, seed=1), attention=rows, protected=1)
    plan = VScan(keep=5, window=2, local=0.8).plan(evidence)
    score = rows.mean(1)[:, 0, 1:]
    windows, many = windows_of((4, 4), [(i // 4, i % 4) for i in range(16)], 2)
    for b in range(2):
        kept = reference(score[b], score[b], windows, many, 5, share=0.8)
        assert plan.keep[b].tolist() == [0, *(i + 1 for i in kept)]
        out = plan.reduce(evidence.x)[b]
        assert torch.equal(out[0], evidence.x[b, 0])
        for j, members in enumerate(groups(evidence.x[b, 1:], kept)):
            torch.testing.assert_close(out[j + 1], evidence.x[b, [i + 1 for i in members]].mean(0))
    with pytest.raises(ValueError, match=r"no square grid: give Evidence\(grid"):
        VScan(keep=2).plan(tr.Evidence(noise(1, 7, 6), attention=rows[:1, ..., :7], protected=1))


def test_the_mean_is_plain_and_scaling_weighs_the_kept_token():
    evidence = visual(ORIGINS["square"], batch=1)
    size = torch.arange(1.0, 17.0)[None]
    plain, heavy = VScan(keep=3).plan(evidence), VScan(keep=3, scaling=2.5).plan(evidence)
    assert torch.equal(plain.reduce(evidence.x), plain.reduce(evidence.x, size)), "sizes have no part in it"
    out = heavy.reduce(evidence.x)
    assert plain.reduce_size(size).sum() == size.sum()
    for j, members in enumerate(groups(evidence.x[0], plain.keep[0].tolist())):
        x = evidence.x[0, members]
        torch.testing.assert_close(out[0, j], (2.5 * x[0] + x[1:].sum(0)) / (1.5 + len(members)))


def test_scores_of_towers_and_settings():
    evidence = visual(ORIGINS["large"], batch=1)
    windows, many = windows_of((12, 12), evidence.place.tolist(), 4)
    plan = VScan(keep=20, score="received", local_layer=0, layer=-1, window=4, quota="equal").plan(evidence)
    want = reference(received(evidence, 0), received(evidence, 3), windows, many, 20)
    assert plan.keep[0].tolist() == want
    assert VScan(local=0.0, keep=20).plan(evidence).keep[0].tolist() == sorted(
        class_row(evidence).argsort(descending=True, stable=True)[:20].tolist()
    )
    assert VScan(local_layer=0, layer=-1).tower_blocks() == (0, -1)
    assert VScan().tower_blocks() == (5 / 24, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(local=1.5), "local is a share"),
        (dict(local=True), "local is a share"),
        (dict(window=0), "window is an int >= 1"),
        (dict(quota="fair"), "quota is one of"),
        (dict(local_layer="low"), "local_layer is a 0-based block"),
        (dict(scaling=0), "scaling is a positive number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VScan(**settings)
