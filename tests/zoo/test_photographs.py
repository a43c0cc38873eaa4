from __future__ import annotations

import importlib.util

import pytest

from tokenreduce.zoo.photographs import FILES, photographs


def test_photographs_are_there_and_none_is_large() -> None:
    pytest.importorskip("skimage")
    found = photographs()
    assert [e.truth for e in found] == list(FILES.values())
    assert all(e.image.mode == "RGB" and max(e.image.size) <= 640 for e in found)
    assert len({e.image.tobytes() for e in found}) == len(found)
    assert [e.truth for e in photographs(2)] == ["an astronaut", "a cup of coffee"]


def test_without_scikit_image_there_is_none(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    photographs.cache_clear()
    assert photographs(3) == ()
    photographs.cache_clear()
