"""SAP against the steps of its card, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, class_row, grid, received, visual

import tokenreduce as tr
from tokenreduce.vision.projector.sap import SpatialAugmented


def spaced(h, w, keep, beta):
    """Places (row, column) of the card's step 4, with the offset clipped to the grid."""
    most = math.floor(beta * keep + 0.5)
    if most == 0:
        return set()
    g = 1
    while math.ceil(h / g) * math.ceil(w / g) > most:
        g += 1
    rows = range(min(g // 2, h - 1), h, g)
    return {(r, c) for r in rows for c in range(min(g // 2, w - 1), w, g)}


def chosen(scores, h, w, keep, beta):
    """The card's steps 4 to 6 on one image: scores (h*w,) to sorted indices."""
    stay = sorted(r * w + c for r, c in spaced(h, w, keep, beta))
    rest = sorted((i for i in range(h * w) if i not in stay), key=lambda i: (-float(scores[i]), i))
    return sorted(stay + rest[: keep - len(stay)])


def test_the_cards_example_has_36_spatial_tokens():
    e = tr.Evidence(torch.randn(1, 576, 4), attention=torch.rand(1, 2, 1, 576))
    marks = SpatialAugmented(keep=144).grid(e, 144)
    assert marks.sum() == 36
    at = marks.nonzero().flatten()
    assert sorted({int(i) // 24 for i in at}) == sorted({int(i) % 24 for i in at}) == [2, 6, 10, 14, 18, 22]


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (1, 9), (5, 2), (12, 12), (1, 2)])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 2, 5, 9])
@pytest.mark.parametrize("cls", [True, False])
def test_is_the_choice_of_the_card(shape, beta, keep, cls):
    h, w = shape
    if keep >= h * w:
        pytest.skip("keeps everything")
    e = visual(grid(h, w), batch=2, cls=cls, seed=h)
    plan = SpatialAugmented(keep=keep, beta=beta).plan(e)
    for b in range(2):
        scores = class_row(e, None, b) if cls else received(e, None, b)
        assert plan.keep[b].tolist() == chosen(scores, h, w, keep, beta)


@pytest.mark.parametrize(
    ("keep", "count"), [(1, 0), (2, 1), (5, 1), (7, 1), (14, 4), (16, 4), (61, 9), (62, 16), (64, 16)]
)
def test_number_of_spatial_tokens(keep, count):
    """round(beta * keep) at most, half up, on a grid of 12 x 12; a stride beyond the grid leaves one in the middle."""
    marks = SpatialAugmented(keep=keep).grid(visual(grid(12, 12)), keep)
    assert marks.sum() == len(spaced(12, 12, keep, 0.25)) == count
    if count == 1:
        assert marks.nonzero().tolist() == [[6 * 12 + 6]]


def test_ties_go_to_the_lower_index_beside_the_grid():
    e = tr.Evidence(torch.randn(1, 16, 4), attention=torch.full((1, 2, 1, 16), 1 / 16))
    assert SpatialAugmented(keep=4).plan(e).keep.tolist() == [[0, 1, 2, 10]]
    assert SpatialAugmented(keep=4, beta=0).plan(e).keep.tolist() == [[0, 1, 2, 3]]


def test_plain_evidence_with_a_class_token_keeps_it_in_front():
    rows = torch.arange(13.0).softmax(0).expand(2, 3, 1, 13)
    plan = SpatialAugmented(keep=3).plan(tr.Evidence(torch.randn(2, 13, 4), attention=rows, protected=1, grid=(3, 4)))
    reference = chosen(torch.arange(1.0, 13.0), 3, 4, 3, 0.25)
    assert plan.keep.tolist() == [[0, *(i + 1 for i in reference)]] * 2


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="grid"):
        SpatialAugmented(keep=8).plan(tr.Evidence(torch.randn(1, 12, 4), attention=torch.rand(1, 1, 1, 12)))


def test_tokens_protected_by_a_mask_leave_the_grid_to_the_others():
    mask = torch.zeros(1, 13, dtype=torch.bool)
    mask[0, 5] = True
    e = tr.Evidence(torch.randn(1, 13, 4), attention=torch.full((1, 1, 1, 13), 1.0), protected=mask, grid=(2, 6))
    free = [i for i in range(13) if i != 5]
    want = sorted([5, *(free[i] for i in chosen(torch.ones(12), 2, 6, 4, 0.5))])
    assert SpatialAugmented(keep=4, beta=0.5).plan(e).keep.tolist() == [want]


def test_padding_that_was_cut_off_takes_no_place_of_the_grid():
    """The crops of this image lack a row: each view is chosen from on its own, on its own grid."""
    origin = ORIGINS["anyres"].take(ORIGINS["anyres"].seen())
    whole = visual(origin, batch=1)
    method, seen = SpatialAugmented(keep=4, beta=1.0), 0
    for where, part in whole.parts():
        assert part.shape == (4, 4)
        plan = method.plan(part)
        places = part.place.tolist()
        marks = [tuple(p) in spaced(4, 4, 4, 1.0) for p in places]
        assert method.grid(part, 4).tolist() == marks
        for row in plan.keep.tolist():
            assert len(row) == 4
            assert {i for i, m in enumerate(marks) if m} <= set(row)
        seen += where.numel()
    assert seen == whole.n


@pytest.mark.parametrize("beta", [-0.1, 1.5, True, "half", float("nan")])
def test_bad_settings_are_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        SpatialAugmented(beta=beta)
