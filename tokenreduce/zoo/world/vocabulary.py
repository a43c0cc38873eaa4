"""The words of the small world and its seed ranges."""

from __future__ import annotations

__all__ = ["CANVAS", "COLOURS", "KINDS", "MOTIONS", "NUMBERS", "PATCH", "SPLITS", "TEXTURES", "WORDS"]

#: Side of a picture and of a labelled patch in pixels.
CANVAS, PATCH = 112, 8

#: What a thing can be. The digits are the characters "0".."9"; counts are written out ("zero"), so no word means both.
KINDS = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart", *"0123456789")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
TEXTURES = ("plain", "stripes", "dots", "checker", "clouds")
MOTIONS = ("left", "right", "up", "down", "still")
#: Counts that are asked for; a larger count is never a question.
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_ASKING = (
    "what which how many is are there does did a the of at with and or color thing things other shares way move "
    "comes first last appear above below top bottom background yes no"
)

#: Every word of a question or an answer, each once; special tokens belong to the tokenizer.
WORDS = tuple(dict.fromkeys((*KINDS, *COLOURS, *TEXTURES, *MOTIONS, *NUMBERS, *_ASKING.split(), "frame")))

#: Seeds by split. The shipped models were trained on seeds of "train" only and their accuracy is measured on "test";
#: seeds in no split are free, for instance to evaluate on data that nobody has looked at.
SPLITS = {
    "train": range(0, 1_000_000_000),
    "validation": range(1_000_000_000, 1_000_100_000),
    "test": range(2_000_000_000, 2_000_100_000),
}
