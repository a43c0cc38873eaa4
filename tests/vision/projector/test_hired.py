"""HiRED against the steps of its card, in plain loops, with the remainders that the card says to hand out."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, anyres, class_row, received, visual

import tokenreduce as tr
from tokenreduce.algorithms.views import apportion
from tokenreduce.vision.projector.hired import HiRED

CROPS = {
    name: origin.take(origin.seen())
    for name, origin in {
        "1x2": anyres(4, (1, 2), 0), "2x2": anyres(4, (2, 2), 0), "cut": anyres(4, (2, 2), 2),
        "3x1": anyres(4, (3, 1), 1), "odd": anyres(5, (2, 3), 1), "gone": anyres(4, (3, 1), 4),
    }.items()
}  # fmt: skip


def attention(evidence, look, b=0):
    """Attention of the class token to every visual token of image ``b``, view by view: softmax per head, mean."""
    block, origin = evidence.tower(look).patches, evidence.origin
    rows = []
    for v in range(origin.views):
        q, k = (t[b * origin.views + v].double() for t in (block.queries, block.keys))
        logits = (q[:, :1] @ k.transpose(1, 2))[:, 0] / q.shape[-1] ** 0.5
        rows.append(logits.softmax(-1).mean(0)[1:])
    return torch.stack([rows[i // origin.patches][i % origin.patches] for i in origin.index[:, 0].tolist()])


def largest_remainder(total, weights, room):
    """Fill views that overflow one after the other, then hand out the fractions."""
    quota, free, left = [0.0] * len(room), [i for i, r in enumerate(room) if r], float(min(total, sum(room)))
    while free and left > 1e-9:
        mass = sum(weights[i] for i in free)
        part = {i: (weights[i] / mass if mass else 1 / len(free)) * left for i in free}
        for i in list(free):
            given = min(part[i], room[i] - quota[i])
            quota[i] += given
            left -= given
            if quota[i] >= room[i] - 1e-12:
                free.remove(i)
    out = [int(q + 1e-6) for q in quota]
    order = sorted((i for i in range(len(room)) if out[i] < room[i]), key=lambda i: (-round(quota[i] - out[i], 6), i))
    for i in order[: min(total, sum(room)) - sum(out)]:
        out[i] += 1
    return out


def budget(evidence, keep, alpha, content, b):
    """The card's steps 2 to 4 on one image."""
    origin, early = evidence.origin, attention(evidence, 0, b)
    (h, w), (rows, columns) = origin.shape, origin.crops
    views, places = origin.view.tolist(), origin.place.tolist()
    n, k = views.count(0), rows * columns
    room = [views.count(c) for c in range(1, k + 1)]
    first = max(min(int(keep * alpha + 1e-9), n), keep - sum(room))
    worth = [0.0] * k
    if content == "mass":
        for i in range(n):
            r, c = min(places[i][0] // (h // rows), rows - 1), min(places[i][1] // (w // columns), columns - 1)
            worth[r * columns + c] += float(early[i])
    else:
        voters = sorted(range(n), key=lambda i: (-float(early[i]), i))[: int(n * (1 - alpha) + 1e-9)]
        for i in voters:
            worth[i * k // n] += 1
    return [first, *largest_remainder(keep - first, worth, room)]


def selection(evidence, counts, b):
    late, views = attention(evidence, None, b), evidence.view.tolist()
    stay = []
    for v, count in enumerate(counts):
        mine = [i for i, view in enumerate(views) if view == v]
        stay += sorted(mine, key=lambda i: (-float(late[i]), i))[:count]
    return sorted(stay)


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize("content", ["mass", "votes"])
@pytest.mark.parametrize(
    ("keep", "alpha"), [(1, 0.5), (7, 0.5), (0.2, 0.5), (0.5, 0.3), (0.9, 0.1), (12, 0.0), (9, 1.0)]
)
def test_is_the_choice_of_the_card(name, content, keep, alpha):
    e = visual(CROPS[name], batch=3, seed=4)
    method = HiRED(keep=keep, alpha=alpha, content=content)
    wanted = method.total(e.n)
    plan, counts = method.plan(e), method.budgets(e, wanted)
    assert plan.keep.shape == (3, wanted)
    for b in range(3):
        want = budget(e, wanted, alpha, content, b)
        assert counts[b].tolist() == want
        assert plan.keep[b].tolist() == selection(e, want, b)
        alone = method.plan(visual(CROPS[name], batch=3, seed=4, rows=slice(b, b + 1)))
        assert torch.equal(alone.keep[0], plan.keep[b])


def test_samples_of_a_batch_split_differently():
    e = visual(CROPS["2x2"], batch=3, seed=4)
    assert len({tuple(row) for row in HiRED().budgets(e, 30).tolist()}) > 1


def pointing(origin, targets, strength=6.0, batch=1):
    """Queries and keys with which the class token of the overview looks at the patches ``targets``."""
    views, n = origin.views, origin.patches
    q, k = torch.zeros(batch * views, 2, n + 1, 8), torch.zeros(batch * views, 2, n + 1, 8)
    q[:, :, 0, 0] = strength
    k[::views, :, [t + 1 for t in targets], 0] = strength
    return q, k


def test_regions_are_quadrants_in_the_paper_and_bands_in_the_code():
    """The overview looks at its right column (3, 7, 11, 15): the quadrants 2 and 4, but every band of one row."""
    q, k = pointing(CROPS["2x2"], [3, 7, 11, 15])
    e = visual(CROPS["2x2"], batch=1, queries=q, keys=k)
    mass = HiRED(keep=20, alpha=0.4).budgets(e, 20).tolist()
    assert mass == [[8, 0, 6, 0, 6]]
    votes = HiRED(keep=20, alpha=0.75, content="votes").budgets(e, 20).tolist()
    assert votes == [[15, 2, 1, 1, 1]]


def test_overflow_of_a_crop_goes_to_the_others_and_then_to_the_overview():
    """All the mass is in the first crop, which holds 16 tokens."""
    q, k = pointing(CROPS["1x2"], [0, 1])
    e = visual(CROPS["1x2"], batch=1, queries=q, keys=k)
    assert HiRED().budgets(e, 20).tolist() == [[10, 10, 0]]
    assert HiRED().budgets(e, 40).tolist() == [[16, 16, 8]]
    assert HiRED(alpha=0.1).budgets(e, 40).tolist() == [[8, 16, 16]], "crops are full, the overview takes the rest"


def test_a_crop_that_is_all_padding_gets_nothing():
    e = visual(CROPS["gone"], batch=2)
    counts = HiRED().budgets(e, 20)
    assert (counts[:, [1, 3]] == 0).all()
    assert (counts.sum(1) == 20).all()


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("keep", [1, 3, 0.2, 0.5])
def test_one_view_keeps_the_highest_late_attention(cls, keep):
    e = visual(ORIGINS["wide"], cls=cls, seed=2)
    plan = HiRED(keep=keep).plan(e)
    for b in range(2):
        late = class_row(e, None, b) if cls else received(e, None, b)
        order = sorted(range(21), key=lambda i: (-float(late[i]), i))
        assert plan.keep[b].tolist() == sorted(order[: HiRED(keep=keep).total(21)])


def test_without_class_token_both_scores_are_received_attention():
    e = visual(CROPS["2x2"], batch=1, cls=False)
    block, origin = e.tower(0).patches, e.origin
    maps = (block.queries.double() @ block.keys.double().transpose(2, 3) / 8**0.5).softmax(-1).mean((1, 2))[0]
    worth = [float(maps.view(4, 4)[r : r + 2, c : c + 2].sum()) for r in (0, 2) for c in (0, 2)]
    assert HiRED().budgets(e, 40)[0].tolist() == [16, *largest_remainder(24, worth, [16] * 4)]
    assert origin.views == 5


def test_frames_share_evenly():
    e = visual(ORIGINS["frames"], batch=2)
    plan = HiRED(keep=11).plan(e)
    for b in range(2):
        assert plan.keep[b].tolist() == selection(e, [4, 4, 3], b)


def test_layers_are_those_that_are_named():
    e = visual(CROPS["2x2"], batch=2)
    assert HiRED(l_init=1, l_final=0).tower_blocks() == (1, 0)
    assert not torch.equal(HiRED(l_init=1).budgets(e, 40), HiRED(l_init=3).budgets(e, 40))
    assert HiRED(l_final=0).plan(e) != HiRED(l_final=3).plan(e)
    assert HiRED(l_final=2).plan(e) == HiRED().plan(e), "the feature layer of this tower"


def test_plain_evidence_with_given_rows():
    rows = torch.tensor([0.5, 0.1, 0.1, 0.05, 0.2, 0.05]).expand(1, 2, 1, 6)
    plan = HiRED(keep=2).plan(tr.Evidence(torch.randn(1, 6, 4), attention=rows, protected=1))
    assert plan.keep.tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("seed", range(40))
def test_apportion_sums_up_within_the_room(seed):
    r = torch.Generator().manual_seed(seed)
    views = 1 + seed % 6
    room = torch.randint(0, 20, (views,), generator=r)
    weights = torch.rand(3, views, generator=r) * (torch.rand(3, views, generator=r) > 0.3)
    total = int(torch.randint(0, 60, (1,), generator=r))
    out = apportion(total, weights, room)
    assert (out <= room).all()
    assert (out >= 0).all()
    for b in range(3):
        assert out[b].tolist() == largest_remainder(total, weights[b].double().tolist(), room.tolist())


def test_apportion_ties_go_to_the_first():
    assert apportion(5, torch.ones(1, 3), torch.tensor([9, 9, 9])).tolist() == [[2, 2, 1]]
    assert apportion(5, torch.zeros(1, 3), torch.tensor([9, 9, 1])).tolist() == [[2, 2, 1]]
    thirds = torch.tensor([[1 / 3, 1 / 3 + 1e-8, 1 / 3]])
    assert apportion(1, thirds, torch.tensor([4, 4, 4])).tolist() == [[1, 0, 0]]


def test_bad_settings_are_refused():
    for name in ("alpha", "l_init", "l_final", "content"):
        for bad in (1.5, "some", True):
            with pytest.raises(ValueError, match=name):
                HiRED(**{name: bad})


def test_nan_in_the_early_block_is_an_error():
    e = visual(CROPS["2x2"], batch=1)
    e.blocks[0].attention.k[0, :, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        HiRED(keep=9).plan(e)
