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


@pytest.mark.parametrize("spec", ["divprune:keep=12", "tome:r=125"])
def test_reading_breaks_before_colours(spec: str) -> None:
    """By diversity and by merging alike: a sign needs all its characters, of one or two patches each."""
    found = score(spec, "colour_of", "read")
    assert found["colour_of"] >= found["read"] + 0.15, found


def test_class_attention_reads_as_well_as_it_sees() -> None:
    """It was taught to look at every character as much as at every thing."""
    found = score("fastervlm:keep=24", "colour_of", "read")
    assert min(found["colour_of"], found["read"]) >= 0.85, found
    assert abs(found["colour_of"] - found["read"]) <= 0.12, found


def test_trained_text_keeps_what_a_question_is_about() -> None:
    """A tenth of the tokens, chosen by world-clip-2, answers nearly what all do; as many random ones do not."""
    chosen, chance = score("trim:keep=0.1", *SEEING), score("random@projector:keep=0.1", *SEEING)
    assert chosen["accuracy"] >= 0.9
    assert chosen["accuracy"] >= chance["accuracy"] + 0.25
    reading, plain = score("trim:keep=0.1", "read"), score("trim:keep=0.1,clip=none", "read")
    assert reading["read"] >= plain["read"] + 0.4, "the words of a question alone do not say where a sign is"
