"""GlobalCom2 against the steps of its card, in plain loops, with the remainders that the card says to hand out."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, anyres, visual

import tokenreduce as tr
from tokenreduce.algorithms.scoring import cls_logits
from tokenreduce.core.plan import Prune
from tokenreduce.vision.projector.globalcom2 import GlobalCom2

CROPS = {
    name: origin.take(origin.seen())
    for name, origin in {
        "1x2": anyres(4, (1, 2), 0), "2x2": anyres(4, (2, 2), 0), "cut": anyres(4, (2, 2), 2),
        "3x1": anyres(4, (3, 1), 1), "odd": anyres(5, (2, 3), 1), "gone": anyres(4, (3, 1), 4),
    }.items()
}  # fmt: skip


def logits(evidence, look, b):
    """Scaled logits of the class token to every visual token of image ``b``, mean over heads, in float64."""
    block, origin = evidence.tower(look).patches, evidence.origin
    rows = []
    for v in range(origin.views):
        q, k = (t[b * origin.views + v].double() for t in (block.queries, block.keys))
        heads = [
            [float(q[h, 0] @ k[h, j]) / math.sqrt(q.shape[-1]) for j in range(1, k.shape[1])] for h in range(len(q))
        ]
        rows.append([sum(column) / len(heads) for column in zip(*heads, strict=True)])
    return [rows[i // origin.patches][i % origin.patches] for i in origin.index[:, 0].tolist()]


def bilinear(table, height, width):
    """A table (list of rows) resized as images are, corners not aligned."""
    h, w = len(table), len(table[0])

    def at(i, n, size):
        x = max((i + 0.5) * n / size - 0.5, 0.0)
        low = min(int(x), n - 1)
        return low, min(low + 1, n - 1), x - low

    out = []
    for r in range(height):
        r0, r1, u = at(r, h, height)
        row = []
        for c in range(width):
            c0, c1, t = at(c, w, width)
            upper = table[r0][c0] * (1 - t) + table[r0][c1] * t
            row.append(upper * (1 - u) + (table[r1][c0] * (1 - t) + table[r1][c1] * t) * u)
        out.append(row)
    return out


def shares(evidence, own, keep, temperature):
    """The card's steps 2 to 4 on one image, as exact counts: overview, then crops."""
    origin = evidence.origin
    (h, w), (rows, columns) = origin.shape, origin.crops
    views, places = origin.view.tolist(), origin.place.tolist()
    rich = [0.0] * (rows * columns)
    for a, v, (r, c) in zip(own, views, places, strict=True):
        if v == 0:
            rich[min(r // (h // rows), rows - 1) * columns + min(c // (w // columns), columns - 1)] += a
    z = [math.exp((g - max(rich)) / temperature) for g in rich]
    sigma = [x / (sum(z) + 1e-8) for x in z]
    ratio = [1 + s - sum(sigma) / len(sigma) for s in sigma]
    room = [views.count(c) for c in range(1, len(rich) + 1)]
    first = keep * views.count(0) // len(views)
    quota, left = [0.0] * len(room), float(keep - first)
    free = [c for c, m in enumerate(room) if m]
    while free and left > 1e-9:
        mass = sum(ratio[c] * room[c] for c in free)
        part = {c: left * ratio[c] * room[c] / mass for c in free}
        for c in list(free):
            given = min(part[c], room[c] - quota[c])
            quota[c], left = quota[c] + given, left - given
            if quota[c] >= room[c] - 1e-12:
                free.remove(c)
    out = [int(q + 1e-6) for q in quota]
    order = sorted((c for c in range(len(room)) if out[c] < room[c]), key=lambda c: (-round(quota[c] - out[c], 6), c))
    for c in order[: keep - first - sum(out)]:
        out[c] += 1
    return [first, *out]


def selection(evidence, own, counts, alpha):
    """The card's steps 2 and 5 to 9 on one image: indices in the order of the language model."""
    origin = evidence.origin
    views, places = origin.view.tolist(), origin.place.tolist()
    side = origin.shape
    table = [[0.0] * side[1] for _ in range(side[0])]
    thumb = [i for i, v in enumerate(views) if v == 0]
    for i in thumb:
        table[places[i][0]][places[i][1]] = own[i]
    crops = [i for i, v in enumerate(views) if v > 0]
    top, left = (min(places[i][axis] for i in crops) for axis in (0, 1))
    height, width = (max(places[i][axis] for i in crops) + 1 - start for axis, start in ((0, top), (1, left)))
    resized = bilinear(table, height, width)
    stay = sorted(thumb, key=lambda i: (-own[i], i))[: counts[0]]
    later = []
    for crop in sorted({views[i] for i in crops}):
        mine = [i for i in crops if views[i] == crop]
        seen = {i: resized[places[i][0] - top][places[i][1] - left] for i in mine}
        a, b = (math.sqrt(sum(v * v for v in x)) for x in ([own[i] for i in mine], seen.values()))
        score = {i: (1 - alpha) * own[i] / a + alpha * seen[i] / b for i in mine}
        later += sorted(mine, key=lambda i: (-score[i], i))[: counts[crop]]
    return stay + sorted(later)


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize(("keep", "alpha", "temperature"), [
    (1, 0.5, 10), (7, 0.5, 10), (0.25, 0.5, 10), (0.1, 0.2, 1.0), (0.9, 1.0, 0.5), (0.5, 0.0, 10),
])  # fmt: skip
def test_is_the_choice_of_the_card(name, keep, alpha, temperature):
    e = visual(CROPS[name], batch=3, seed=5)
    method = GlobalCom2(keep=keep, alpha=alpha, temperature=temperature)
    wanted = method.total(e.n)
    plan = method.plan(e)
    assert plan.keep.shape == (3, wanted)
    for b in range(3):
        own = logits(e, -1, b)
        counts = shares(e, own, wanted, temperature)
        assert plan.keep[b].tolist() == selection(e, own, counts, alpha)
        alone = method.plan(visual(CROPS[name], batch=3, seed=5, rows=slice(b, b + 1)))
        assert torch.equal(alone.keep[0], plan.keep[b])


def test_samples_of_a_batch_split_differently():
    e = visual(CROPS["2x2"], batch=3, seed=5)
    own = e.tower(-1).per_token(cls_logits)
    assert len({tuple(row) for row in GlobalCom2(temperature=1.0).budgets(own, e, 30).tolist()}) > 1


def test_richness_worked_example():
    """1 x 2 crops of 4 x 4; the left half of the overview sums to 10, the right half to 0; keep 12 of 48 is R = 1/4.

    sigma = (1, 1/e) / (1 + 1/e) = (0.731, 0.269); ratios R (1.231, 0.769): 4.92 and 3.08 tokens, and 4 of the overview.
    """
    e = visual(CROPS["1x2"], batch=1)
    own = torch.zeros(1, 48)
    own[0, [0, 5]] = 5.0
    assert GlobalCom2().budgets(own, e, 12).tolist() == [[4, 5, 3]]
    assert GlobalCom2(temperature=1e4).budgets(own, e, 12).tolist() == [[4, 4, 4]]
    assert GlobalCom2(temperature=1e-3).budgets(own, e, 12).tolist() == [[4, 6, 2]], "R (1 + 1/2) and R (1 - 1/2)"
    assert GlobalCom2(temperature=1e-3).budgets(own, e, 40).tolist() == [[13, 16, 11]], "no more than there are"
    assert GlobalCom2(temperature=1e-3).budgets(own - 100, e, 12).tolist() == [[4, 6, 2]], "negative logits"


def test_a_crop_that_is_all_padding_gets_nothing():
    e = visual(CROPS["gone"], batch=2)
    view = e.view[GlobalCom2(keep=20).plan(e).keep]
    assert set(view.flatten().tolist()) == {0, 2}


def test_overview_tokens_come_by_falling_score_and_crops_in_raster_order_over_all():
    e = visual(CROPS["2x2"], batch=1, seed=3)
    plan, own = GlobalCom2(keep=40).plan(e), torch.tensor(logits(e, -1, 0))
    index = plan.keep[0]
    first = index[e.view[index] == 0]
    assert torch.equal(index[: len(first)], first)
    assert (own[first].diff() <= 0).all()
    assert first.tolist() != first.sort().values.tolist()
    places = e.place[index[len(first) :]]
    flat = places[:, 0] * 8 + places[:, 1]
    assert (flat.diff() > 0).all()
    assert len(e.view[index[len(first) :]].unique()) > 1


@pytest.mark.parametrize("origin", ["square", "wide"])
@pytest.mark.parametrize("keep", [1, 3, 0.25, 0.8])
def test_one_view_is_an_overview_alone(origin, keep):
    e = visual(ORIGINS[origin])
    plan = GlobalCom2(keep=keep).plan(e)
    for b in range(2):
        own = logits(e, -1, b)
        want = sorted(range(e.n), key=lambda i: (-own[i], i))[: plan.k]
        assert plan.keep[b].tolist() == want


def test_frames_share_evenly_in_raster_order():
    e = visual(ORIGINS["frames"])
    plan = GlobalCom2(keep=11).plan(e)
    for b in range(2):
        own, want = logits(e, -1, b), []
        for v, count in enumerate((4, 4, 3)):
            want += sorted(range(16 * v, 16 * v + 16), key=lambda i: (-own[i], i))[:count]
        assert plan.keep[b].tolist() == sorted(want)


def test_ties_go_to_the_lower_index():
    e = visual(CROPS["1x2"], batch=1)
    for block in e.blocks.values():
        block.attention.q.zero_()
    assert GlobalCom2(keep=12).plan(e).keep[0].tolist() == [0, 1, 2, 3, *sorted([16, 17, 18, 19, 20, 21, 22, 23])]


def test_logits_are_those_before_softmax():
    """Softmax per head and then a mean would rank the second head's favourite first."""
    q = torch.zeros(1, 2, 4, 1)
    q[:, :, 0] = 1.0
    k = torch.zeros(1, 2, 4, 1)
    k[0, 0, :, 0] = torch.tensor([0.0, 3.0, -8.0, 0.0])
    k[0, 1, :, 0] = torch.tensor([50.0, 0.0, 8.0, -3.0])
    e = tr.Evidence(torch.randn(1, 4, 3), k, q, protected=1)
    assert cls_logits(e)[0].tolist() == [25.0, 1.5, 0.0, -1.5]
    assert GlobalCom2(keep=2).plan(tr.Evidence(torch.randn(1, 4, 3), k, q, protected=1, grid=(1, 3))).keep.tolist() == [
        [0, 1, 2]
    ]
    assert torch.equal(cls_logits(tr.Evidence(torch.randn(1, 4, 3), k, q, protected=1, scale=0.5)), cls_logits(e) / 2)


def test_given_rows_stand_for_logits():
    logit = torch.tensor([[[[0.3, 2.0, -4.0, 1.0]], [[0.0, -1.0, 4.0, 0.5]]]])
    plan = GlobalCom2(keep=2).plan(tr.Evidence(torch.randn(1, 4, 3), attention=logit.softmax(-1)))
    assert plan == Prune(4, torch.tensor([[3, 1]])), "means 0.15, 0.5, 0 and 0.75"


def test_needs_a_class_token():
    assert "cls" in GlobalCom2().required()
    with pytest.raises(ValueError, match="class token"):
        GlobalCom2().plan(visual(ORIGINS["square"], cls=False))


def test_features_keep_their_dtype():
    e = visual(CROPS["2x2"], batch=1)
    assert GlobalCom2().plan(e).reduce(e.x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "bad"), [
    ("temperature", 0), ("temperature", -1.0), ("temperature", float("inf")), ("temperature", True),
    ("alpha", 1.5), ("alpha", "half"), ("alpha", float("nan")), ("layer", 1.5), ("layer", "last"),
])  # fmt: skip
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        GlobalCom2(**{name: bad})


def test_nan_in_a_crop_is_an_error():
    e = visual(CROPS["2x2"], batch=1)
    e.blocks[3].attention.k[3, :, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        GlobalCom2(keep=9).plan(e)
