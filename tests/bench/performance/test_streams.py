"""What a stream takes in memory, measured in small."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")

import itertools

import vlm_folders

from tokenreduce.bench.performance.streams import Mark, frames, growth, measure
from tokenreduce.bench.vlms import load_vlm


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_vlm(str(vlm_folders.save_onevision(tmp_path_factory.mktemp("model") / "onevision")), "cpu", "auto")


def test_a_capped_stream_does_not_grow(loaded):
    marks = measure(loaded, "knorm:keep=24", 80, block=4, side=32, tokens=2)
    assert [m.frames for m in marks] == [8, 20, 40, 60, 80]
    assert {m.keys for m in marks} == {24}
    got = growth(marks)
    assert got["held"] == 0
    assert got["peak"] < 0.02


def test_one_without_a_cap_does(loaded):
    marks = measure(loaded, "knorm:keep=100000", 80, block=4, side=32, tokens=2)
    assert [m.keys for m in marks] == [16 / 4 * m.frames for m in marks]
    assert marks[-1].held > 5 * marks[0].held
    assert marks[-1].peak > marks[0].peak
    with pytest.raises(ValueError, match="too short to meet its cap"):
        growth(marks)


def test_too_few_frames_and_growth_of_numbers(loaded):
    with pytest.raises(ValueError, match="give at least 80"):
        measure(loaded, "knorm:keep=8", 12, block=4)
    few = [Mark(f, 9, 100 + f, 50, 0, 0.1, 0.1) for f in (1, 2, 3)]
    assert growth([few[0].__class__(1, 4, 1, 1, 1, 0.1, 0.1), *few])["held"] == pytest.approx(103 / 101 - 1)


def test_frames_are_seeded_and_change():
    a, b = list(frames(12, 16)), list(frames(12, 16))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(not np.array_equal(x, y) for x, y in itertools.pairwise(a))
