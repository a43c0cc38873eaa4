"""Showing a film to a streaming memory, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenreduce.video.memory import StreamingMemory
from tokenreduce.video.reading import Video

__all__ = ["Held", "behind", "remember"]


@dataclass(frozen=True)
class Held:
    """What a memory holds after a piece of a film.

    Args:
        frames: frames seen so far, of the whole stream.
        seconds: where in the film the last of them is.
        tokens: tokens that the memory gives.
        most: the most that it can give.
        held_bytes: size of the features that it holds, as float32.
        frame_s: seconds of reading, encoding and remembering per frame of this piece.
        missing: frames of this piece that could not be decoded; they are not remembered.
    """

    frames: int
    seconds: float
    tokens: int
    most: int
    held_bytes: int
    frame_s: float
    missing: int


def behind(film: Video, wanted: Sequence[int], memory: StreamingMemory) -> list[int]:
    """Those of the frames ``wanted`` that lie behind the last one in ``memory``; all of them for an empty memory."""
    if not memory.seen:
        return list(wanted)
    last = float(memory.tokens().spans.max())
    return [i for i in wanted if film.times[i] > last]


def remember(
    film: Video, wanted: Sequence[int], memory: StreamingMemory, *, chunk: int = 16, state: Path | None = None
) -> Iterator[Held]:
    """Read frames ``wanted`` of ``film``, ``chunk`` at once, push them into ``memory`` and say what it holds each time.

    With ``state`` the memory is written there after every piece. Raises what reading, the memory's ``encode`` and
    writing raise; pieces before are then in.
    """
    for start in range(0, len(wanted), chunk):
        piece = wanted[start : start + chunk]
        began = time.perf_counter()
        got = film.read(piece)
        if len(got):
            memory.push(got.frames, got.times.tolist())
        each = (time.perf_counter() - began) / len(piece)
        if state is not None:
            memory.save(state)
        seconds = float(got.times[-1]) if len(got) else film.duration
        if memory.seen:
            tokens, most, held = len(memory.tokens().x), memory.budget, memory.stored * 4
        else:  # nothing of the film could be decoded yet
            tokens = most = held = 0
        yield Held(memory.seen, seconds, tokens, most, held, each, len(got.missing))
