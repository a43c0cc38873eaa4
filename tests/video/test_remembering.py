"""Pieces of a film into a memory: what it holds after each, what comes after what it has seen, files of its state."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenreduce.video import PyramidMemory, StreamingMemory
from tokenreduce.video.remembering import behind, remember


class Film:
    """Frames of one number each, two per second; those in ``lost`` cannot be decoded."""

    def __init__(self, count: int, lost: tuple[int, ...] = ()) -> None:
        self.times = np.arange(count) / 2
        self.duration = count / 2
        self.lost, self.reads = lost, []

    def read(self, wanted):
        self.reads.append(list(wanted))
        got = [i for i in wanted if i not in self.lost]
        pictures = torch.stack([torch.full((4, 4, 3), float(i)) for i in got]) if got else torch.empty(0, 4, 4, 3)
        missing = tuple(i for i in wanted if i in self.lost)
        frames = SimpleNamespace(frames=pictures, times=self.times[got], missing=missing)
        return _Sized(frames, len(got))


class _Sized:
    def __init__(self, found, count):
        self.__dict__.update(found.__dict__)
        self.count = count

    def __len__(self):
        return self.count


def memory() -> StreamingMemory:
    return PyramidMemory((1, 1, 2))


def test_every_piece_is_told(tmp_path):
    film, bank = Film(10), memory()
    steps = list(remember(film, range(10), bank, chunk=4, state=tmp_path / "m.safetensors"))
    assert film.reads == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [s.frames for s in steps] == [4, 8, 10]
    assert [s.seconds for s in steps] == [1.5, 3.5, 4.5]
    assert (steps[-1].tokens, steps[-1].most, steps[-1].held_bytes) == (
        len(bank.tokens().x), bank.budget, 4 * bank.stored,
    )  # fmt: skip
    assert all(s.tokens <= s.most and s.missing == 0 for s in steps)
    kept = StreamingMemory.load(tmp_path / "m.safetensors")
    assert torch.equal(kept.tokens().x, bank.tokens().x)


def test_pieces_change_nothing_and_a_stream_goes_on_behind_what_it_has_seen():
    whole, parts = memory(), memory()
    list(remember(Film(9), range(9), whole, chunk=16))
    list(remember(Film(9), range(4), parts, chunk=3))
    assert behind(Film(9), range(9), parts) == [4, 5, 6, 7, 8]
    assert behind(Film(9), range(9), memory()) == list(range(9))
    list(remember(Film(9), behind(Film(9), range(9), parts), parts, chunk=2))
    assert torch.equal(parts.tokens().x, whole.tokens().x)


def test_frames_that_cannot_be_decoded_are_counted_and_not_remembered():
    bank = memory()
    steps = list(remember(Film(6, lost=(0, 1, 4)), range(6), bank, chunk=2))
    assert [s.missing for s in steps] == [2, 0, 1]
    assert (steps[0].frames, steps[0].tokens, steps[0].most) == (0, 0, 0)
    assert steps[0].seconds == pytest.approx(3.0)
    assert bank.seen == 3
