"""HiPrune against the steps of its card, token by token."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, noise, received, visual

import tokenreduce as tr
from tokenreduce.core.evidence import resolve


def card(m, d, keep, alpha, place, flat=None):
    """The card's steps on one image: attention received in the middle (N,) and deep (N,) block; ``flat`` is the grid's
    width for the official neighbours. Sorted indices."""
    n = len(m)
    anchors = sorted(range(n), key=lambda i: (-float(m[i]), i))[: round(keep * alpha / 5)]
    cells = {tuple(p): i for i, p in enumerate(place.tolist())}
    near = set(anchors)
    for i in anchors:
        if flat is None:
            r, c = place[i].tolist()
            near |= {cells[p] for p in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if p in cells}
        else:
            near |= {min(max(p, 0), n - 1) for p in (i - 1, i + 1, i - flat, i + flat)}
    if len(near) > keep:
        return sorted(sorted(near, key=lambda i: (-float(m[i]), i))[:keep])
    rest = sorted((i for i in range(n) if i not in near), key=lambda i: (-float(d[i]), i))
    return sorted([*near, *rest[: keep - len(near)]])


@pytest.mark.parametrize("origin", ["square", "wide", "large"])
@pytest.mark.parametrize("keep", [1, 3, 8, 15])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("buffers", ["grid", "flat"])
@pytest.mark.parametrize("cls", [True, False])
def test_is_the_card(origin, keep, alpha, buffers, cls):
    e = visual(ORIGINS[origin], cls=cls)
    plan = tr.get_method(f"hiprune:keep={keep},alpha={alpha},buffers={buffers},object_layer=0").plan(e)
    for b in range(2):
        m, d = received(e, 0, b), received(e, None, b)
        assert plan.keep[b].tolist() == card(m, d, keep, alpha, e.place, e.shape[1] if buffers == "flat" else None)


def test_published_blocks():
    """A third of the depth is the card's layer 9 of 24, counted from 1; other depths take the same share."""
    look = tr.get_method("hiprune").tower_blocks()[0]
    assert resolve(look, 24, 22) == resolve(8 / 24, 24, 22) == 8
    assert resolve(look, 12, 10) == 4
    e = visual(ORIGINS["square"], depth=6)  # block 2 of 6, and block 4, whose output enters the projector
    assert tr.get_method("hiprune:keep=8,alpha=1").plan(e).keep[0].tolist() == card(
        received(e, 2), received(e, 4), 8, 1.0, e.place
    )


def corner(index, shape=(4, 4)):
    """Evidence whose middle and deep attention are highest at ``index``, and next at the end of the image."""
    n = shape[0] * shape[1]
    a = torch.linspace(0.01, 0.02, n)
    a[index] = 0.5
    return tr.Evidence(noise(1, n, 4), attention=a[None, None, None], grid=shape)


def test_neighbours_stay_inside_the_grid():
    """Anchor 4 is the first of the second row: 3 ends the row above it."""
    e = corner(4)
    assert tr.get_method("hiprune:keep=4,alpha=1").plan(e).keep.tolist() == [[0, 4, 5, 8]]
    assert tr.get_method("hiprune:keep=5,alpha=1,buffers=flat").plan(e).keep.tolist() == [[0, 3, 4, 5, 8]]
    # Anchor 2 of the first row: the official rule keeps token 0 for the missing row above.
    e = corner(2)
    assert tr.get_method("hiprune:keep=5,alpha=1").plan(e).keep.tolist() == [[1, 2, 3, 6, 15]]
    assert tr.get_method("hiprune:keep=5,alpha=1,buffers=flat").plan(e).keep.tolist() == [[0, 1, 2, 3, 6]]
    e = corner(4, (2, 8))
    assert tr.get_method("hiprune:keep=4,alpha=1").plan(e).keep.tolist() == [[3, 4, 5, 12]]


def test_patches_cut_off_as_padding_are_no_neighbours():
    e = visual(ORIGINS["anyres"])
    crop = e.parts()[1][1]  # rows 1 and 2 of 4: the others are padding
    assert crop.n == 8
    plan = tr.get_method("hiprune:keep=5,alpha=1,object_layer=0").plan(crop)
    rows = crop.origin.index[:, 0]
    for b in range(2):
        want = card(received(crop, 0, b)[rows], received(crop, None, b)[rows], 5, 1.0, crop.place)
        assert plan.keep[b].tolist() == want


def test_more_neighbours_than_budget_are_trimmed_by_middle_attention():
    """The card's case T = 8, alpha = 1: two anchors far apart have ten tokens around them."""
    m = torch.full((36,), 0.001)
    m[[14, 21]] = torch.tensor([0.3, 0.2])
    m[[8, 13, 15, 20]] = torch.tensor([0.1, 0.01, 0.02, 0.03])
    e = tr.Evidence(noise(1, 36, 4), attention=m[None, None, None])
    plan = tr.get_method("hiprune:keep=8,alpha=1").plan(e)
    assert plan.keep[0].tolist() == card(m, m, 8, 1.0, e.place)
    assert plan.keep[0].tolist() == [8, 13, 14, 15, 20, 21, 22, 27]
    m[:] = 0.001
    m[[7, 28]] = torch.tensor([0.3, 0.2])
    m[[1, 22]] = 0.1
    e = tr.Evidence(noise(1, 36, 4), attention=m[None, None, None])
    assert tr.get_method("hiprune:keep=8,alpha=1").plan(e).keep[0].tolist() == [1, 6, 7, 8, 13, 22, 27, 28]


def test_anchors_are_rounded_half_to_even():
    """keep 5, alpha 0.5: round(0.5) = 0 anchors, so deep attention alone; 15 tokens: round(1.5) = 2."""
    e = visual(ORIGINS["square"])
    plan = tr.get_method("hiprune:keep=5,alpha=0.5,object_layer=0").plan(e)
    assert plan.keep[0].tolist() == sorted(received(e).argsort(descending=True)[:5].tolist())
    e = visual(ORIGINS["large"])
    plan = tr.get_method("hiprune:keep=15,alpha=0.5,object_layer=0").plan(e)
    two = received(e, 0).argsort(descending=True)[:2].tolist()
    assert set(two) <= set(plan.keep[0].tolist())
    assert plan.keep[0].tolist() == card(received(e, 0), received(e), 15, 0.5, e.place)


def test_an_anchor_with_attention_above_one_is_chosen_once():
    """Summed over queries, attention exceeds 1: less 1, an anchor would still lead the deep list."""
    a = torch.full((16,), 0.1)
    a[5] = 9.0
    e = tr.Evidence(noise(1, 16, 4), attention=a[None, None, None])
    plan = tr.get_method("hiprune:keep=8,alpha=0.7").plan(e)
    assert plan.keep.tolist() == [[0, 1, 2, 3, 4, 5, 6, 9]]


def test_ties_go_to_the_lower_index():
    e = tr.Evidence(noise(1, 16, 4), attention=torch.full((1, 1, 1, 16), 1 / 16))
    assert tr.get_method("hiprune:keep=6,alpha=1").plan(e).keep.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert tr.get_method("hiprune:keep=5,alpha=1").plan(e).keep.tolist() == [[0, 1, 2, 3, 4]]


def test_class_token_in_front_votes_and_stays():
    q, k = noise(2, 2, 17, 8), noise(2, 2, 17, 8, seed=1)
    e = tr.Evidence(noise(2, 17, 4), keys=k, queries=q, protected=1)
    plan = tr.get_method("hiprune:keep=7,alpha=1").plan(e)
    for b in range(2):
        a = (q[b].double() @ k[b].double().transpose(1, 2) / 8**0.5).softmax(-1).mean((0, 1))[1:]
        assert plan.keep[b].tolist() == [0, *(i + 1 for i in card(a, a, 7, 1.0, e.place))]


def test_merged_patches_take_their_mean():
    e = visual(ORIGINS["units"], cls=False)
    plan = tr.get_method("hiprune:keep=10,alpha=1,object_layer=0,layer=-1").plan(e)
    for b in range(2):
        m, d = (received(e, look, b)[e.origin.index].mean(1) for look in (0, -1))
        assert plan.keep[b].tolist() == card(m, d, 10, 1.0, e.place)


@pytest.mark.parametrize(
    ("bad", "name"),
    [("alpha=1.5", "alpha"), ("alpha=-1", "alpha"), ("object_layer=middle", "object_layer"), ("buffers=all", "buffers"),
     ("object_layer=1.5", "object_layer"), ("layer=true", "layer")],
)  # fmt: skip
def test_bad_settings(bad, name):
    with pytest.raises(ValueError, match=name):
        tr.get_method(f"hiprune:{bad}")
    with pytest.raises(ValueError, match="layers 0 to 3"):
        tr.get_method("hiprune:keep=4,object_layer=9").plan(visual(ORIGINS["square"]))
