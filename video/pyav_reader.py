"""Frames by PyAV: seeks to the keyframe that a frame needs, and knows every frame by its timestamp."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenreduce.video.errors import need
from tokenreduce.video.index import Index, flow, pictures, video_stream

__all__ = ["decode"]

Keep = Callable[[int, np.ndarray], None]


def decode(path: Path, index: Index, wanted: Sequence[int], keep: Keep) -> tuple[list[int], int]:
    """Call ``keep(i, picture)`` for every frame ``i`` of ``wanted`` (ascending, each once) with (H,W,3) uint8, upright.

    Returns the frames that cannot be decoded, and how many of those given the decoder had to patch up.
    """
    patched, left = 0, list(wanted)
    # A frame that does not come after its keyframe may come when decoding starts one keyframe earlier.
    tries: list[Callable[[], Iterator[tuple[int, Any]]]]
    if index.ticks is None:
        tries = [lambda: _by_order(path, left)]
    else:
        tries = [lambda: _by_time(path, index, left, 0), lambda: _by_time(path, index, left, 1)]
    for run in tries:
        done = set()
        for i, frame in run():
            picture = frame.to_ndarray(format="rgb24")
            keep(i, np.rot90(picture, -(index.rotation // 90)) if index.rotation else picture)
            done.add(i)
            patched += bool(frame.is_corrupt)
        left = [i for i in left if i not in done]
        if not left:
            break
    return left, patched


def _by_order(path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Frames ``wanted``, counted from the beginning as the decoder gives them."""
    av = need("av")
    todo, at = set(wanted), 0
    with av.open(str(path)) as container:
        stream = video_stream(path, container)
        stream.thread_type = "AUTO"
        for packet in flow(av, container, stream):
            for frame in pictures(av, stream, packet):
                if at in todo:
                    yield at, frame
                at += 1
            if at > wanted[-1]:
                return


def _by_time(
    path: Path, index: Index, wanted: Sequence[int], back: int, seek: bool = True
) -> Iterator[tuple[int, Any]]:
    """Frames ``wanted`` that one pass over the file finds, starting ``back`` keyframes before those needed."""
    av = need("av")
    assert index.ticks is not None
    place = {int(tick): i for i, tick in enumerate(index.ticks)}
    todo = list(reversed(wanted))
    with av.open(str(path)) as container:
        stream = video_stream(path, container)
        stream.thread_type = "AUTO"
        packets, reached = flow(av, container, stream), -1
        while todo:
            aim = todo[-1]
            start = _start(index, aim, back)
            if seek and start > reached + 1:
                found = _seek(av, container, stream, index, start)
                if found is None:
                    yield from _by_time(path, index, todo[::-1], back, seek=False)
                    return
                packets = found
            for packet in packets:
                if packet is not None and packet.pts is not None:
                    reached = max(reached, index.way.position.get(packet.pts, -1))
                for frame in pictures(av, stream, packet):
                    i = place.get(frame.pts, -1)
                    while todo and todo[-1] < i:  # it did not come
                        todo.pop()
                    if todo and todo[-1] == i:
                        yield todo.pop(), frame
                if not todo or (todo[-1] != aim and _start(index, todo[-1], back) > reached):
                    break
            else:
                return


def _start(index: Index, frame: int, back: int) -> int:
    """Decode position of the keyframe to start from."""
    return int(index.way.keys[max(int(index.way.first[frame]) - back, 0), 0])


def _seek(av: Any, container: Any, stream: Any, index: Index, start: int) -> Iterator[Any] | None:
    """Packets from the keyframe at ``start`` on, or from further ahead where the container's index leads there; None
    where it cannot seek."""
    key = int(np.searchsorted(index.way.keys[:, 0], start))
    for candidate in dict.fromkeys((key, max(key - 1, 0), max(key - 2, 0), 0)):
        try:
            container.seek(int(index.way.keys[candidate, 1]), stream=stream, backward=True)
        except av.error.FFmpegError:
            return None
        packets = flow(av, container, stream)
        head = next(packets, None)
        if head is not None and head.pts is not None and index.way.position.get(head.pts, start + 1) <= start:
            return itertools.chain([head], packets)
    return None
