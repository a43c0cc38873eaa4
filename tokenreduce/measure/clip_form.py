"""In which form a model takes the frames of a clip, and how many it is shown: one rule for whoever asks about clips."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

__all__ = ["USUAL", "ClipForm", "clip_form", "knows_the_world", "takes_videos"]

#: Frames where nothing is said. Clips of the first world have as many.
USUAL = 8
#: A vocabulary of more tokens is that of a language, which has the words of a small world too.
SMALL = 1_000


class ClipForm(NamedTuple):
    """``kind`` is "own" (frames pooled 2x2, "frame <image> frame <image> ... question", as the embedded models were
    taught), "video" (one video with its times) or "images" (one per frame, in order). ``frames`` are shown where
    nobody says how many: of an embedded model those that it was taught with."""

    kind: Literal["own", "video", "images"]
    frames: int


def clip_form(processor: Any) -> ClipForm:
    """The form of the model that ``processor`` makes inputs for, by its tokenizer and its kind; names do not matter, so
    that a copy of an embedded model in a folder is asked as the model itself is."""
    if knows_the_world(processor.tokenizer):
        from tokenreduce.zoo import evaluation2, world2

        second = set(world2.WORDS) <= processor.tokenizer.get_vocab().keys()
        return ClipForm("own", evaluation2.FRAMES if second else USUAL)
    return ClipForm("video" if takes_videos(processor) else "images", USUAL)


def knows_the_world(tokenizer: Any) -> bool:
    """Whether every word of the world is one token, and there are few others."""
    from tokenreduce.zoo.world import WORDS

    known = tokenizer.get_vocab()
    return len(known) <= SMALL and all(word in known for word in WORDS)


def takes_videos(processor: Any) -> bool:
    """Whether a processor takes videos as such, and not only images."""
    return getattr(processor, "video_processor", None) is not None and bool(getattr(processor, "video_token", None))
