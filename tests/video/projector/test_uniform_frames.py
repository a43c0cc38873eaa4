"""The baseline that keeps whole frames at equal distances."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.algorithms.temporal import frame_grid
from tokenreduce.video.projector.uniform_frames import UniformFrames


def film(t, h, w, batch=2, **more):
    return tr.Evidence(torch.randn(batch, t * h * w + more.get("protected", 0), 5), grid=(t, h, w), **more)


def kept_by(plan, n):
    """Frame -> places that stay."""
    out = {}
    for i in plan.keep[0].tolist():
        out.setdefault(i // n, []).append(i % n)
    return out


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9, 33])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8])
def test_whole_frames_at_equal_distances(t, frames):
    if frames >= t:
        return
    plan = UniformFrames(keep=frames * 6).plan(film(t, 2, 3))
    want = [0] if frames == 1 else [i * (t - 1) // (frames - 1) for i in range(frames)]
    assert kept_by(plan, 6) == {f: list(range(6)) for f in want}
    assert len(set(want)) == frames
    assert torch.equal(plan.keep[0], plan.keep[1])


def test_published_places():
    """linspace truncated: 8 of 32 frames, both ends among them."""
    plan = UniformFrames(keep=0.25).plan(film(32, 2, 2))
    assert list(kept_by(plan, 4)) == [0, 4, 8, 13, 17, 22, 26, 31]


def test_the_last_frame_is_kept_in_part():
    """4x4 frames: 2 whole ones and a regular 2x2 of the last; 3 of 5 tokens in a row where no sub-grid fits."""
    plan = UniformFrames(keep=36).plan(film(5, 4, 4))
    assert kept_by(plan, 16) == {0: list(range(16)), 2: list(range(16)), 4: [5, 7, 13, 15]}
    plan = UniformFrames(keep=8).plan(film(3, 1, 5))
    assert kept_by(plan, 5) == {0: list(range(5)), 2: [0, 2, 4]}
    plan = UniformFrames(keep=3).plan(film(4, 1, 5))
    assert kept_by(plan, 5) == {0: [0, 2, 4]}, "less than a frame: the first one"


def test_counts_prefixes_and_identity():
    for keep in range(1, 28):
        e = film(3, 3, 3, protected=1)
        plan = UniformFrames(keep=keep).plan(e)
        assert plan.k == keep + 1
        assert plan.representatives()[0].tolist()[0] == 0
        assert (plan.representatives().diff(dim=1) > 0).all()
        assert plan.is_identity is (keep == 27)
    assert UniformFrames(keep=1.0).plan(film(3, 3, 3)).is_identity


def test_frames_of_a_model():
    e = visual(ORIGINS["frames"])
    assert frame_grid(e) == (4, 4)
    assert kept_by(UniformFrames(keep=20).plan(e), 16) == {0: list(range(16)), 2: [5, 7, 13, 15]}


def test_frames_without_a_grid_are_a_row():
    e = tr.Evidence(torch.randn(1, 6, 4))
    assert frame_grid(e) is None
    assert UniformFrames(keep=2).plan(e).keep.tolist() == [[1, 4]]


def test_bad_settings():
    with pytest.raises(ValueError, match="keep"):
        UniformFrames(keep=0)
    with pytest.raises(ValueError, match="newlines"):
        UniformFrames(newlines="rank")
