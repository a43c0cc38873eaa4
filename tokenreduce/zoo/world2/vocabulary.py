"""The words of the second world. Its seed ranges are those of the first (:data:`tokenreduce.zoo.world.SPLITS`)."""

from __future__ import annotations

from tokenreduce.zoo.world.vocabulary import COLOURS, PATCH, SPLITS, TEXTURES
from tokenreduce.zoo.world.vocabulary import NUMBERS as FEW
from tokenreduce.zoo.world.vocabulary import WORDS as OLD

__all__ = [
    "CANVAS", "CHARACTERS", "COLOURS", "GRID", "KINDS", "NUMBERS", "ORDINALS", "PATCH", "SPLITS", "TEXTURES", "WORDS",
]  # fmt: skip

#: Side of a picture in pixels, and of its grid of labelled patches.
CANVAS = 224
GRID = CANVAS // PATCH

#: What a thing can be. Digits stand on signs and in documents here.
KINDS = (
    "circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart", "moon", "arrow", "bar", "hourglass",
)  # fmt: skip
#: What the font of signs and documents can draw: ten digits and twelve letters that no digit looks like. No "a": that
#: is a word of its own.
CHARACTERS = (*"0123456789", *"cefhklnptuxy")
NUMBERS = (*FEW, "seven", "eight", "nine", "ten")
#: Places of a character on a sign.
ORDINALS = ("first", "second", "third", "fourth")

_ASKING = (
    "sign signs say says that next to letter on row column in document list from describe picture , before after times "
    "changes when rows columns"
)

#: Every word of a question or an answer, each once: the words of the first world, then what is new.
WORDS = tuple(dict.fromkeys((*OLD, *KINDS, *CHARACTERS, *NUMBERS, *ORDINALS, *_ASKING.split())))
