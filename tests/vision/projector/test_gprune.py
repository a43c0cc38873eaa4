"""G-Prune against the steps of its card, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, visual

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x, similarity=0.5, temperature=0.03, steps=5):
    """What every token of one graph (N,C) holds, with the matrix power as the card has it."""
    n = len(x)
    rows = []
    for i in range(n):
        logits = []
        for j in range(n):
            length = max(float(x[i].norm()), 1e-12) * max(float(x[j].norm()), 1e-12)
            a = float(x[i] @ x[j]) / length
            a = 0.0 if a < similarity else a / temperature
            logits.append(-5000.0 if abs(a) < 1e-6 else a)
        rows.append(torch.tensor(logits).softmax(0))
    p = torch.stack(rows)
    degree = [sum(1 for v in row if v > 0) for row in p.tolist()]
    held = x.norm(dim=1).double() @ torch.linalg.matrix_power(p.double(), steps)
    return [float(h) / d for h, d in zip(held, degree, strict=True)]


def cloud(n, seed=0):
    """Some directions with tokens around them, so that graphs have edges."""
    centre = noise(4, 10, seed=seed)
    return centre[torch.arange(n) % 4] * (1 + torch.arange(n) % 3)[:, None] + 0.4 * noise(n, 10, seed=seed + 1)


@pytest.mark.parametrize("n", [2, 9, 16, 31])
@pytest.mark.parametrize("keep", [1, 5, 0.5, 0.3])
def test_is_the_choice_of_the_card(n, keep):
    x = torch.stack([cloud(n, 0), cloud(n, 5)])
    plan = tr.GPrune(keep=keep).plan(tr.Evidence(x))
    want = min(keep, n) if isinstance(keep, int) else max(1, int(keep * n))
    for b in range(2):
        held = reference(x[b])
        best = sorted(range(n), key=lambda i: (-round(held[i], 4), i))[:want]
        assert plan.representatives()[b].tolist() == sorted(best)
        torch.testing.assert_close(tr.GPrune().score(x)[b].tolist(), held, rtol=1e-4, atol=1e-4)


def test_worked_example():
    """Two equal tokens share what they have; the one alone keeps its length and wins, as the longest one does not."""
    x = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 2.0]]])
    held = tr.GPrune().score(x)[0].tolist()
    assert held == pytest.approx([1.5, 1.5, 2.0])
    assert tr.GPrune(keep=1).plan(tr.Evidence(x)).keep.tolist() == [[2]]
    assert tr.GPrune(keep=2).plan(tr.Evidence(x)).keep.tolist() == [[0, 2]], "ties go to the lower index"


def test_a_zero_token_has_no_neighbour_and_sends_to_all():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert tr.GPrune().score(x)[0].tolist() == pytest.approx(reference(x[0]))


def test_totals_are_rounded_down():
    assert [tr.GPrune(keep=0.1).total(n) for n in (576, 9, 19)] == [57, 1, 1]


def test_overview_and_crops_are_two_graphs_and_frames_one_each():
    e = visual(ORIGINS["anyres"].take(ORIGINS["anyres"].seen()))
    plan = tr.GPrune(keep=0.5).plan(e)
    sizes = [int((e.view == 0).sum()), int((e.view > 0).sum())]
    for b in range(2):
        left, want = plan.representatives()[b].tolist(), []
        for graph, size in zip((e.view == 0, e.view > 0), sizes, strict=True):
            where = graph.nonzero().flatten().tolist()
            held = reference(e.x[b, where])
            want += [where[i] for i in sorted(range(size), key=lambda i: (-held[i], i))[: size // 2]]
        assert left == sorted(want)
    frames = visual(ORIGINS["frames"])
    left = tr.GPrune(keep=7).plan(frames).representatives()
    assert [int((frames.view[left[0]] == t).sum()) for t in range(3)] == [3, 2, 2]


def test_protected_and_missing_tokens():
    x, valid = cloud(12)[None].repeat(2, 1, 1), torch.ones(2, 12, dtype=torch.bool)
    valid[1, :3] = False
    plan = tr.GPrune(keep=4).plan(tr.Evidence(x, valid=valid))
    held = reference(x[1, 3:])
    best = sorted(range(9), key=lambda i: (-held[i], i))[:4]
    assert plan.keep[1][plan.valid[1] if plan.valid is not None else slice(None)].tolist() == [
        3 + i for i in sorted(best)
    ]


@pytest.mark.parametrize(
    "bad", [{"similarity": 1.5}, {"temperature": 0.0}, {"iterate_num": 0}, {"temperature": float("inf")}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.GPrune(**bad)


def test_is_finite_for_sharp_temperatures():
    assert math.isfinite(float(tr.GPrune(temperature=1e-4).score(cloud(9)[None]).sum()))
