"""HoloV against the steps of its card, run by run in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, class_row, noise, received, visual

import tokenreduce as tr
from tokenreduce.vision.projector.holov import _share


def cut(n, runs):
    sizes = [n // runs + (i < n % runs) for i in range(runs)]
    starts = [sum(sizes[:i]) for i in range(runs)]
    return [list(range(s, s + size)) for s, size in zip(starts, sizes, strict=True) if size]


def run_scores(a, x, runs, beta=0.09, rescale="run"):
    """Scores of the runs of one image, attention a (N,), embeddings x (N,D), in float64."""
    parts = cut(len(a), runs)
    u = [v / max(float(v.norm()), 1e-12) for v in x.double()]
    variance = []
    for part in parts:
        mine = []
        for i in part:
            s = [float(u[i] @ u[j]) if i != j else 0.0 for j in part]
            mean = sum(s) / max(len(part) - 1, 1)
            mine.append(sum((v - mean) ** 2 for v in s) / max(len(part) - 1, 1) if len(part) > 1 else 0.0)
        variance.append(mine)
    out = []
    for part, mine in zip(parts, variance, strict=True):
        hat = [1000 * float(a[i]) for i in part]
        if rescale == "run":
            scale = (sum(hat) / len(hat)) / (sum(mine) / len(mine) + 1e-6)
        else:
            scale = 1000 * float(a.sum()) / len(a) / (sum(map(sum, variance)) / len(a) + 1e-6)
        out.append(sum(h + beta * v * scale for h, v in zip(hat, mine, strict=True)) / len(part))
    return out


def budgets(scores, sizes, keep):
    """Shared out as on the card; a run that overflows is full, and the others share what is left."""
    full = set()
    while True:
        room = [i for i in range(len(sizes)) if i not in full]
        left = keep - sum(sizes[i] for i in full)
        total = sum(scores[i] for i in room) + 1e-6
        w = {i: scores[i] / total for i in room}
        out = {i: math.floor(w[i] * left) for i in room}
        for i in sorted(room, key=lambda i: (-w[i], i))[: left - sum(out.values())]:
            out[i] += 1
        over = {i for i in room if out[i] > sizes[i]}
        if not over:
            return [sizes[i] if i in full else out[i] for i in range(len(sizes))]
        full |= over


def card(a, x, keep, runs, beta=0.09, rescale="run", order="ascending"):
    parts = cut(len(a), runs)
    out = []
    for part, k in zip(parts, budgets(run_scores(a, x, runs, beta, rescale), list(map(len, parts)), keep), strict=True):
        best = part if k >= len(part) else sorted(part, key=lambda i: (-float(a[i]), i))[:k]
        out += sorted(best) if order == "ascending" else best
    return out


@pytest.mark.parametrize("origin", ["square", "wide", "large"])
@pytest.mark.parametrize("keep", [1, 3, 7, 13])
@pytest.mark.parametrize("runs", [1, 3, 4, 16])
@pytest.mark.parametrize("rescale", ["run", "image"])
@pytest.mark.parametrize("order", ["ascending", "attention"])
def test_is_the_card(origin, keep, runs, rescale, order):
    e = visual(ORIGINS[origin])
    plan = tr.get_method(f"holov:keep={keep},runs={runs},rescale={rescale},order={order},beta=2.0").plan(e)
    for b in range(2):
        assert plan.keep[b].tolist() == card(class_row(e, b=b), e.x[b], keep, runs, 2.0, rescale, order)


@pytest.mark.parametrize("n", [2, 3, 5, 17, 31, 53])
def test_awkward_lengths_are_exact(n):
    x, a = noise(2, n, 6, seed=n), noise(2, 1, 1, n, seed=1).mul(3).softmax(-1)
    for keep in range(1, n):
        for runs in (2, 9, 16):
            plan = tr.get_method(f"holov:keep={keep},runs={runs}").plan(tr.Evidence(x, attention=a))
            for b in range(2):
                assert plan.keep[b].tolist() == card(a[b, 0, 0], x[b], keep, min(runs, n))


def test_worked_example():
    """Runs 0 1 2 | 3 4 | 5 6 with mean attention 0.1, 0.06, 0.25: of 4 tokens 0, 0 and 2, and the two left go one each
    to the last, which is full, and to the first, so that the first two share the other two: 1.25 and 0.75."""
    a = torch.tensor([0.05, 0.15, 0.1, 0.07, 0.05, 0.2, 0.3])
    e = tr.Evidence(noise(1, 7, 4), attention=a[None, None, None])
    assert tr.get_method("holov:keep=4,runs=3").plan(e).keep.tolist() == [[1, 2, 5, 6]]
    assert tr.get_method("holov:keep=3,runs=3").plan(e).keep.tolist() == [[1, 5, 6]]
    assert tr.get_method("holov:keep=5,runs=3,order=attention").plan(e).keep.tolist() == [[1, 2, 3, 5, 6]]


@pytest.mark.parametrize("keep", [192, 400, 575])
def test_a_bright_run_gives_its_excess_to_the_others(keep):
    """The card's case: 16 runs of 36, and zero vectors in the official output."""
    a = torch.full((576,), 0.2 / 540)
    a[72:108] = 0.8 / 36
    e = tr.Evidence(noise(1, 576, 8), attention=a[None, None, None])
    plan = tr.get_method(f"holov:keep={keep}").plan(e)
    assert plan.keep[0].unique().numel() == keep
    assert set(range(72, 108)) <= set(plan.keep[0].tolist())
    others = [sum(36 * r <= i < 36 * (r + 1) for i in plan.keep[0].tolist()) for r in range(16) if r != 2]
    assert max(others) - min(others) <= 1, "equal runs share the excess alike"


def test_order_by_attention_keeps_runs_that_lose_nothing_as_they_are():
    a = torch.tensor([0.1, 0.12, 0.08, 0.02, 0.03, 0.65])
    e = tr.Evidence(noise(1, 6, 4), attention=a[None, None, None])
    plan = tr.get_method("holov:keep=5,runs=2,order=attention").plan(e)
    assert plan.keep.tolist() == [[1, 0, 3, 4, 5]]
    assert tr.get_method("holov:keep=5,runs=2").plan(e).keep.tolist() == [[0, 1, 3, 4, 5]]


@pytest.mark.parametrize("n", [53, 64, 576])
def test_with_the_scale_of_each_run_the_variance_cancels(n):
    x, a = noise(1, n, 8), noise(1, 1, 1, n, seed=4).softmax(-1)
    plans = [tr.get_method(f"holov:keep=20,beta={b}").plan(tr.Evidence(x, attention=a)) for b in (0.0, 0.09, 1.0, 10.0)]
    assert all(p == plans[0] for p in plans)


def test_one_scale_for_the_image_rewards_varied_runs():
    """Both runs have the attention of the other; the second holds two opposite groups, the first equal tokens."""
    x = torch.zeros(1, 16, 2)
    x[0, :8, 0] = 1
    x[0, 8:, 1] = torch.tensor([1.0, -1]).repeat(4)
    e = tr.Evidence(x, attention=torch.full((1, 1, 1, 16), 1 / 16))
    kept = tr.get_method("holov:keep=8,runs=2,beta=3.0,rescale=image").plan(e).keep[0]
    assert (kept >= 8).sum() > (kept < 8).sum()
    assert kept.tolist() == card(torch.full((16,), 1 / 16), x[0], 8, 2, 3.0, "image")
    even = tr.get_method("holov:keep=7,runs=2,beta=3.0").plan(e).keep[0]
    assert (even >= 8).sum() in (3, 4)


def test_runs_of_one_token_count_like_others():
    """17 tokens in 16 runs: the first has two. Without the factor 1000, token 16 would lose to it."""
    a = torch.full((17,), 0.001)
    a[[0, 1]], a[16] = 0.1, 0.7
    e = tr.Evidence(noise(1, 17, 4), attention=a[None, None, None])
    assert tr.get_method("holov:keep=1,runs=16").plan(e).keep.tolist() == [[16]]


def test_number_of_runs_by_the_rule_for_qwen():
    x, a = noise(1, 576, 4), noise(1, 1, 1, 576, seed=1).mul(2).softmax(-1)
    e = tr.Evidence(x, attention=a)
    assert tr.get_method("holov:keep=64,runs=none").plan(e) == tr.get_method("holov:keep=64,runs=16").plan(e)
    assert tr.get_method("holov:keep=192,runs=none").plan(e) == tr.get_method("holov:keep=192,runs=5").plan(e)
    assert tr.get_method("holov:keep=575,runs=none").plan(e) == tr.get_method("holov:keep=575,runs=1").plan(e)


def test_one_selection_over_overview_and_crops():
    e = visual(ORIGINS["anyres"])
    seen = e.origin.seen()
    method = tr.get_method("holov:keep=9,runs=5")
    assert method.whole
    mine = tr.Evidence(e.x[:, seen], attention=torch.stack([overall(e, b)[seen] for b in range(2)])[:, None, None])
    plan = method.plan(mine)
    for b in range(2):
        assert plan.keep[b].tolist() == card(overall(e, b)[seen], e.x[b, seen], 9, 5)


def overall(e, b):
    """Class rows of all views of an image, taken to its tokens."""
    views, n = e.origin.views, e.origin.patches
    block = e.tower().patches
    rows = []
    for v in range(views):
        q, k = block.queries[b * views + v].double(), block.keys[b * views + v].double()
        rows.append((q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:].mean(0))
    assert len(rows[0]) == n
    return torch.cat(rows)[e.origin.index[:, 0]].float()


@pytest.mark.parametrize("cls", [True, False])
def test_towers_without_class_token_and_a_prefix(cls):
    e = visual(ORIGINS["units"], cls=cls)
    plan = tr.get_method("holov:keep=7,runs=4").plan(e)
    for b in range(2):
        s = (class_row(e, b=b) if cls else received(e, b=b))[e.origin.index].mean(1)
        assert plan.keep[b].tolist() == card(s, e.x[b], 7, 4)
    x, a = noise(1, 12, 4), noise(1, 2, 1, 12, seed=1).softmax(-1)
    plan = tr.get_method("holov:keep=5,runs=3").plan(tr.Evidence(x, attention=a, protected=1))
    assert plan.keep[0].tolist() == [0, *(i + 1 for i in card(a[0].mean((0, 1))[1:], x[0, 1:], 5, 3))]


def test_shares_without_any_attention_are_even_and_exact():
    got = _share(torch.tensor([[0.0, 0, 0], [5.0, 0, 0], [1e-9, 1e-9, 0]]), torch.tensor([4, 4, 3]), 9)
    assert got.tolist() == [[3, 3, 3], [4, 3, 2], [3, 3, 3]]


def test_nan_in_the_embeddings_is_an_error():
    x, a = noise(1, 32, 4), noise(1, 1, 1, 32).softmax(-1)
    x[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tr.get_method("holov:keep=8").plan(tr.Evidence(x, attention=a))


@pytest.mark.parametrize(
    ("bad", "name"),
    [("runs=0", "runs"), ("runs=2.5", "runs"), ("beta=-1", "beta"), ("beta=true", "beta"), ("order=raster", "order"),
     ("rescale=none", "rescale")],
)  # fmt: skip
def test_bad_settings(bad, name):
    with pytest.raises(ValueError, match=name):
        tr.get_method(f"holov:{bad}")
