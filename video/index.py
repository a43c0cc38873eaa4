"""What a video file holds, from its packets alone: one pass over the file that decodes one frame.

A frame's place in the file is not its place in time: with B-frames, packets lie in decoding order. Presentation order,
true timestamps and the keyframe from which a frame can be decoded all come from here, for both readers.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenreduce.common.words import counted
from tokenreduce.video.errors import VideoError, need

__all__ = ["Index", "Way", "check_file", "flow", "pictures", "read_index", "video_stream"]

REENCODE = "try another player's copy, or re-encode it: ffmpeg -i FILE -c:v libx264 OUT.mp4"
#: Containers in which decord 0.6 finds its way by timestamps even with B-frames.
ORDERED = ("mp4", "matroska")
ATTACHED_PICTURE = 0x400  # FFmpeg's flag of a stream that is the cover of a sound file


@dataclass(frozen=True, eq=False)
class Index:
    """The frames of a video in presentation order.

    Attributes:
        times: (count,) float64 seconds; the first frame is at 0.
        start: what the file calls the time of the first frame, in seconds.
        ticks: (count,) int64 timestamps in units of the stream's time base; None where the file does not tell the order
            of its frames (B-frames in AVI), so that all frames before one must be decoded to find it.
        decoding: makes :attr:`way`; only a reader that seeks by itself asks for it.
        width, height: of a frame as it is shown, after ``rotation``.
        rotation: degrees clockwise by which stored pictures must be turned.
        fps: mean frames per second.
        duration: seconds, to the end of the last frame.
        doubts: why decord would not give the right frames; empty when it does.
        warnings: what is wrong with the file.
    """

    times: NDArray[np.float64]
    start: float
    ticks: NDArray[np.int64] | None
    decoding: Callable[[], Way] = field(repr=False)
    width: int
    height: int
    rotation: int
    fps: float
    duration: float
    codec: str
    doubts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.times)

    @functools.cached_property
    def way(self) -> Way:
        """How to get at frames."""
        return self.decoding()


class Way(NamedTuple):
    """How to get at the frames of a video.

    Attributes:
        keys: (K,2) int64, decode position and timestamp to seek to of every keyframe.
        first: (count,) int64, the entry of ``keys`` from which a frame can be decoded.
        position: timestamp to decode position of every packet.
        opened: whether frames that precede a keyframe follow it in the file.
    """

    keys: NDArray[np.int64]
    first: NDArray[np.int64]
    position: dict[int, int]
    opened: bool = False


def check_file(path: Path) -> None:
    """Raises :class:`VideoError` where there is no file, or nothing in it."""
    try:
        found = os.stat(path)
    except PermissionError as error:
        raise VideoError(path, "the file may not be looked at", "check the permissions of its folder") from error
    except OSError as error:
        raise VideoError(path, "there is no such file", "check the path") from error
    if stat.S_ISDIR(found.st_mode):
        raise VideoError(path, "this is a folder", "name one video file in it")
    if not os.access(path, os.R_OK):
        raise VideoError(path, "the file may not be read", "check its permissions")
    if found.st_size == 0:
        raise VideoError(path, "the file is empty (0 bytes)", "copy or download it again")


def read_index(path: Path) -> Index:
    """The index of the file's best video stream, with PyAV.

    Raises :class:`VideoError` where no frame can be read, ``ImportError`` without PyAV.
    """
    check_file(path)
    av = need("av")
    try:
        with av.open(str(path)) as container:
            stream = video_stream(path, container)
            packets, width, height, rotation = _packets(av, container, stream)
            if True not in packets.shown:
                raise VideoError(path, "the video stream holds no frames", "the recording failed; make the file again")
            if not width:
                raise VideoError(path, f"no frame can be decoded ({stream.codec_context.name})", REENCODE)
            return _build(container, stream, packets, width, height, rotation)
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error


def video_stream(path: Path, container: Any) -> Any:
    """The stream to read; raises :class:`VideoError` for a file without one that can be decoded."""
    shows = [s for s in container.streams.video if not int(s.disposition) & ATTACHED_PICTURE]
    if not shows:
        sound = bool(container.streams.audio)
        reason = "the file holds sound but no picture" if sound else "no stream can be read, its header is damaged"
        raise VideoError(path, reason, "name a file with a picture" if sound else "copy or download it again")
    able = [s for s in shows if s.codec_context is not None]
    if not able:
        tag = str(getattr(shows[0], "codec_tag", "")).strip("\0 ")
        named = f"the codec {tag!r} is unknown" if tag.isprintable() and tag else "the codec is not told"
        raise VideoError(path, f"no decoder: {named}, or the header is damaged", REENCODE)
    best = container.streams.best("video")
    return best if best is not None and best.index in {s.index for s in able} else able[0]


class _Packets(NamedTuple):
    """All packets in decoding order, by columns: one object for each would take longer than reading a short file.

    Attributes:
        pts, dts, duration: in units of the stream's time base, or None.
        key: whether it is a keyframe.
        shown: whether its frame is; frames that an edit list cuts off are decoded, but never shown.
        whole: whether it is complete.
    """

    pts: tuple[int | None, ...]
    dts: tuple[int | None, ...]
    duration: tuple[int | None, ...]
    key: tuple[bool, ...]
    shown: tuple[bool, ...]
    whole: tuple[bool, ...]


def _packets(av: Any, container: Any, stream: Any) -> tuple[_Packets, int, int, int]:
    """Packets; width, height and rotation of the first frame, (0, 0, 0) where there is none."""
    out: list[tuple[Any, ...]] = []
    width = height = rotation = 0
    for packet in flow(av, container, stream):
        if not width:  # the rotation is told by a frame, not by the stream
            frames = pictures(av, stream, packet)
            if frames:
                width, height, rotation = frames[0].width, frames[0].height, -frames[0].rotation % 360
        if packet is None:
            out.append((None, None, None, False, False, False))
        elif packet.size:  # the one that flushes the decoder is empty, and so are repeated frames in AVI
            whole = not packet.is_corrupt
            shown = whole and not packet.is_discard
            out.append((packet.pts, packet.dts, packet.duration, packet.is_keyframe, shown, whole))
    return _Packets(*(zip(*out, strict=True) if out else [()] * 6)), width, height, rotation


def flow(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """Packets in decoding order; the last is empty, or None where the file breaks off in the middle of something."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        yield None


def pictures(av: Any, stream: Any, packet: Any) -> list[Any]:
    """The frames that come out when a packet goes in, none where it cannot be decoded."""
    try:
        found: list[Any] = stream.decode(packet) if packet is None else packet.decode()
    except av.error.FFmpegError:
        return []
    return found


def _build(container: Any, stream: Any, packets: _Packets, width: int, height: int, turn: int) -> Index:
    base, rate = Fraction(stream.time_base), float(stream.average_rate or stream.guessed_rate or 25)
    shown = [i for i, yes in enumerate(packets.shown) if yes]
    pts = [packets.pts[i] for i in shown]
    names = container.format.name
    reorders = bool(stream.codec_context.has_b_frames)
    told = None not in pts and len(set(pts)) == len(pts) and not (reorders and "avi" in names)
    doubts, at = [], np.array(shown)
    if told:
        ticks = np.array(pts, np.int64)
        order = ticks.argsort(kind="stable")
        stamps = ticks[order]
        back = order[1:] < order[:-1]
        decoding = functools.partial(_way, packets, at[order], stamps)
        # Where frames are shown in the order of the file, none precedes its keyframe.
        if back.any() or len(at) < len(packets.pts):
            way = decoding()
            decoding = functools.partial(Way, *way)
            if way.opened:
                doubts.append("frames that precede a keyframe follow it in the file (open GOP)")
        if not any(n in names for n in ORDERED) and back.any():
            doubts.append(f"B-frames in a container of type {names}")
    else:
        doubts.append("the file does not tell the order of its frames")
        # The decoder puts frames into order; the instants at which they are shown are those of AVI's slots.
        dts = [packets.dts[i] for i in shown]
        slots = None not in dts and len(set(dts)) == len(dts)
        stamps = np.sort(np.array(dts, np.int64)) if slots else np.arange(len(at))
        base = base if slots else Fraction(1) / Fraction(rate).limit_denominator(100000)
        decoding = functools.partial(Way, np.zeros((0, 2), np.int64), np.zeros(len(at), np.int64), {})
    seconds = stamps.astype(np.float64) * base.numerator / base.denominator
    times = seconds - seconds[0]
    steps = times[1:] - times[:-1]
    fps = float(len(steps) / times[-1]) if len(steps) and times[-1] > 0 else rate
    last = packets.duration[at[order[-1]]] if told else None
    tail = float(last * base) if last else 1 / fps
    warnings = _warnings(container, stream, packets, float(seconds[-1] + tail), max(steps.max(initial=0), 1 / fps))
    if False in packets.whole or warnings:
        doubts.append("the file is damaged")
    if len(at) < packets.whole.count(True):
        doubts.append("an edit list hides frames")
    if turn % 90:
        warnings = (*warnings, f"the file asks to be turned by {turn} degrees, which is no right angle: left as it is")
        turn = 0
    if turn:
        doubts.insert(0, f"the picture must be turned by {turn} degrees")
    if turn % 180:
        width, height = height, width
    return Index(
        times, float(seconds[0]), stamps if told else None, decoding, width, height, turn, fps, float(times[-1] + tail),
        stream.codec_context.name, tuple(doubts), warnings,
    )  # fmt: skip


def _way(packets: _Packets, at: NDArray[np.int64], ticks: NDArray[np.int64]) -> Way:
    """The way to the frames at decode positions ``at``, shown at ``ticks``."""
    columns = zip(packets.key, packets.whole, packets.pts, packets.dts, strict=True)
    found = [
        (i, pts, pts if dts is None else min(pts, dts))
        for i, (key, whole, pts, dts) in enumerate(columns)
        if key and whole and pts is not None
    ]
    if not found or found[0][0] > at.min():
        found.insert(0, (0, int(ticks[0]), int(ticks[0])))  # starts without a keyframe: decode from the very beginning
    table = np.array(found, np.int64)
    entry = table[:, 0].searchsorted(at, side="right") - 1
    # A frame shown before the keyframe that it follows in the file also needs the GOP before.
    leading = table[entry, 1] > ticks
    first = np.maximum(entry - leading, 0)
    position = {tick: i for i, tick in enumerate(packets.pts) if tick is not None}
    return Way(table[:, ::2], first, position, bool((leading & (entry > 0)).any()))


def _warnings(container: Any, stream: Any, packets: _Packets, end: float, step: float) -> tuple[str, ...]:
    out = []
    broken = packets.whole.count(False)
    if broken:
        out.append(f"{counted(broken, 'incomplete packet')} left out: the file is damaged or cut off")
    stated = _stated_end(container, stream)
    # Stated lengths are rounded, and count the sound that ends a little later.
    if stated is not None and stated - end > max(3 * step, 0.02 * stated):
        out.append(f"the file says that it lasts until {stated:.2f} s, but its frames end at {end:.2f} s (cut off)")
    return tuple(out)


def _stated_end(container: Any, stream: Any) -> float | None:
    """Seconds at which the file says that the stream ends."""
    begin = float((stream.start_time or 0) * stream.time_base)
    if "avi" in container.format.name and stream.frames:
        return begin + float(stream.frames / stream.average_rate) if stream.average_rate else None
    if stream.duration is not None:
        return begin + float(stream.duration * stream.time_base)
    written = stream.metadata.get("DURATION", "")
    if written.count(":") == 2:
        hours, minutes, seconds = (float(v) for v in written.split(":"))
        return hours * 3600 + minutes * 60 + seconds
    if container.duration is not None and len(container.streams) == 1:
        return (container.start_time or 0) / 1e6 + container.duration / 1e6
    return None


def _unreadable(path: Path, error: Exception) -> VideoError:
    with path.open("rb") as file:
        head = file.read(4096)
    if head[4:8] == b"ftyp":
        return VideoError(
            path, "an MP4 file whose index (moov) is missing or damaged: it was cut off or never finished",
            "copy or download it again, or rebuild the index from a sound file of the same camera (untrunc)",
        )  # fmt: skip
    if isinstance(error, EOFError):
        return VideoError(path, "the file ends before its first frame", "the recording failed; make the file again")
    text = all(b in (9, 10, 13) or 32 <= b < 127 for b in head)
    what = "this is a text file" if text else f"not a video that FFmpeg knows ({str(error).split(':')[0]})"
    return VideoError(path, f"{what}, or its header is damaged", "check that it plays, copy or download it again")
