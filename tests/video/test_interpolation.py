"""Interleaved subsequences of INTP and NTK-aware scaling."""

from __future__ import annotations

import math

import pytest
import torch

from tokenreduce.video.interpolation import interleave, ntk_base, subsequences


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 16, 31, 32])
def test_every_pass_spans_the_video_and_comes_back_in_order(frames, n):
    index = subsequences(frames, n)
    m = math.ceil(frames / n)
    assert index.shape == (m, n)
    for a in range(m):
        assert index[a].tolist() == [min(a + f * m, frames - 1) for f in range(n)]
    film = torch.randn(frames, 5, generator=torch.Generator().manual_seed(frames))
    tokens = film[index][..., None, :].expand(-1, -1, 3, -1)  # an encoder that gives three tokens for a frame
    assert torch.equal(interleave(tokens, frames), film[:, None].expand(-1, 3, -1))


def test_card_example():
    """m = 4 passes of 8: pass 1 sees 1, 5, 9, ...; token f of pass a stands at f m + a."""
    assert subsequences(32, 8)[1].tolist() == [1, 5, 9, 13, 17, 21, 25, 29]
    named = torch.tensor([[10 * a + f for f in range(8)] for a in range(4)])
    assert interleave(named, 32)[:9].tolist() == [0, 10, 20, 30, 1, 11, 21, 31, 2]


def test_wrong_numbers_are_refused():
    for bad in ((0, 8), (8, 0), (8, 2.0)):
        with pytest.raises(ValueError, match="is an int >= 1"):
            subsequences(*bad)
    for shape in ((3, 8), (5, 8), (32,)):
        with pytest.raises(ValueError, match="32 frames come from"):
            interleave(torch.zeros(shape), 32)
    with pytest.raises(ValueError, match="frames is an int >= 1"):
        interleave(torch.zeros(1, 2), 0)


def test_scaled_base_slows_the_last_rotation_by_s_and_keeps_the_first():
    d, base, s = 128, 10000.0, 4.0
    scaled = ntk_base(base, s, d)
    frequency = lambda b, i: b ** (-2 * i / d)
    assert frequency(scaled, 0) == frequency(base, 0)
    assert math.isclose(frequency(base, d // 2 - 1) / frequency(scaled, d // 2 - 1), s, rel_tol=1e-9)
    assert ntk_base(base, 0.5, d) == ntk_base(base, 1, d) == base


def test_scaled_base_refuses_nonsense():
    for bad, name in [((0, 2, 64), "base"), ((1e4, 0, 64), "s"), ((1e4, float("inf"), 64), "s"),
                      ((1e4, 2, 2), "d"), ((1e4, 2, 65), "d")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} is"):
            ntk_base(*bad)
