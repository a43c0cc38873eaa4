"""Positions of a stream's blocks against those of the whole video."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from vlms import VLMS

from tokenreduce.adapters.language.find import find
from tokenreduce.streaming.entry import PackedEntry


@pytest.mark.parametrize("seconds", [2.0, 1.0, 2 / 3, 0.1, 7.3])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 4)])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_blocks_stand_where_the_whole_video_puts_them(name, grid, seconds):
    entry = PackedEntry(None, find(VLMS[name].model), 1.0)
    given = [seconds] if name == "qwen2_5_vl" else None
    entry._learn(grid, given)
    for units in (1, 2, 5, 40, 301):
        whole = entry._asked(units, grid, given)
        blocks = [entry._places(first, min(3, units - first), grid) for first in range(0, units, 3)]
        assert torch.equal(torch.cat(blocks, -1), whole[..., :-1])
        assert whole[..., -1].tolist() == [[entry._after(units, grid)]] * 3


def test_a_model_that_places_time_otherwise_cannot_stream(monkeypatch):
    found = find(VLMS["qwen2_5_vl"].model)
    known = type(found.inner).get_rope_index
    monkeypatch.setattr(type(found.inner), "get_rope_index", lambda self, *a, **k: (known(self, *a, **k)[0] * 2, None))
    with pytest.raises(TypeError, match="cannot take a stream"):
        PackedEntry(None, found, 1.0)._learn((3, 5), [2.0])
