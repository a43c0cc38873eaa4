"""What the second world tells apart: margins between methods, between reading and seeing, between short and long."""

from __future__ import annotations

import functools

import pytest

import tokenreduce as tr
from tokenreduce.zoo import weights

pytest.importorskip("timm")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
#: Questions with one hop that are no reading.
SEEING = ("colour_of", "kind_of", "at_kind", "at_colour")


@functools.cache
def score(spec: str, *types: str, each: int = 40) -> dict[str, float]:
    if "world-llava-2" not in weights.learned():
        pytest.skip("world-llava-2 has not learned enough yet")
    vlm = tr.zoo.load("world-llava-2")
    return tr.zoo.evaluate(vlm, *filter(None, [spec]), questions=each * len(types), types=types, batch=20)


def test_random_dropping_loses_thirty_points_on_what_is_seen() -> None:
    whole, chance = score("", *SEEING), score("random@projector:keep=0.1", *SEEING)
    assert whole["accuracy"] >= 0.95
    assert chance["accuracy"] <= whole["accuracy"] - 0.3


@pytest.mark.parametrize("spec", ["fastervlm:keep=24", "divprune:keep=24", "tome:r=125"])
def test_reading_breaks_before_colours(spec: str) -> None:
    """By class attention, by diversity and by merging alike."""
    found = score(spec, "colour_of", "read")
    assert found["colour_of"] >= found["read"] + 0.15, found
