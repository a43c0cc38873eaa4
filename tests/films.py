"""Video files for tests, written with PyAV: every frame shows its own index, and a red corner says which side is up."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

BITS = 8  # of an index, painted as black and white blocks, 4 to a row, the lowest bit first
PLACES = ("/usr/share/doc/opencv-doc/examples/data", "/usr/share/opencv4/samples/data")


def painted(index: int, width: int, height: int, shade: float = 0.3) -> np.ndarray:
    """(height, width, 3) uint8: ``index`` in binary above, a red block below to the left, ``shade`` of 0..1 elsewhere.

    The picture is a grid of 4 columns and 3 rows: two rows of bits, one of marks.
    """
    picture = np.full((height, width, 3), round(255 * shade), np.uint8)
    for bit in range(BITS):
        row, column = divmod(bit, 4)
        picture[_block(row, column, width, height)] = 255 if index >> bit & 1 else 0
    picture[_block(2, 0, width, height)] = (255, 0, 0)
    return picture


def _block(row: int, column: int, width: int, height: int) -> tuple[slice, slice]:
    return (
        slice(row * height // 3, (row + 1) * height // 3),
        slice(column * width // 4, (column + 1) * width // 4),
    )


def shown(picture: np.ndarray) -> int:
    """The index that an upright frame shows; raises ``AssertionError`` where the red block is not below to the left."""
    height, width = picture.shape[:2]
    red, green, blue = (float(v) for v in _middle(picture[_block(2, 0, width, height)]))
    assert red > 170, f"no red block below to the left: {red}, {green}, {blue}"
    assert max(green, blue) < 90, f"no red block below to the left: {red}, {green}, {blue}"
    index = 0
    for bit in range(BITS):
        grey = _middle(picture[_block(*divmod(bit, 4), width, height)]).mean()
        assert not 90 < grey < 165, f"bit {bit} is grey, {grey}"
        index |= int(grey > 127) << bit
    return index


def _middle(block: np.ndarray) -> np.ndarray:
    h, w = block.shape[:2]
    return block[h // 4 : h - h // 4, w // 4 : w - w // 4].reshape(-1, 3).mean(0)


def film(
    path: Path | str,
    count: int = 48,
    *,
    size: tuple[int, int] = (96, 72),
    rate: Fraction | int = 24,
    ticks: Sequence[int] | None = None,
    tick: Fraction | None = None,
    codec: str | None = None,
    pixels: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    shades: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    turned: int = 0,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Write ``count`` frames of ``size`` (width, height), one keyframe every ``gop`` frames.

    Frames lie ``1/rate`` seconds apart, or at ``ticks`` (in units of ``tick`` seconds) for a variable rate. H.264
    where there is an encoder for it and the size is even, else MPEG-4. ``options`` are the encoder's, ``muxer`` the
    container's. With ``turned``, an MP4 file holds pictures that lie ``turned`` degrees away from upright, and says by
    how many degrees clockwise they must be turned back; ``size`` is that of upright ones.
    """
    import av

    width, height = size if turned % 180 == 0 else size[::-1]
    codec = codec or ("libx264" if has_codec("libx264") and width % 2 == height % 2 == 0 else "mpeg4")
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream: Any = container.add_stream(
            codec, rate=rate, options={"g": str(gop), "bf": str(b_frames)} | (options or {})
        )
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.gop_size = gop
        base = tick or 1 / Fraction(rate)
        stream.codec_context.time_base = base
        if codec != "libx264":
            stream.bit_rate = 2_000_000
        container.start_encoding()
        for i in range(count):
            shade = shades[i] if shades is not None else 0.3
            picture = np.rot90(painted(i % (1 << BITS), *size, shade), turned // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = i if ticks is None else ticks[i]
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if turned:
        _ask_turn(Path(path), turned)
    return Path(path)


def has_codec(name: str) -> bool:
    """Whether PyAV's FFmpeg encodes it."""
    import av

    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return False
    return True


def sound(path: Path | str, seconds: float = 1.0) -> Path:
    """A file with a tone and no picture."""
    import av

    rate = 16000
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=rate)
        wave = np.sin(np.arange(int(rate * seconds)) * 2 * math.pi * 440 / rate).astype(np.float32)[None]
        for at in range(0, wave.shape[1] - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(wave[:, at : at + 1024].copy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def _ask_turn(path: Path, clockwise: int) -> None:
    """Write into an MP4 file's track header that players must turn it ``clockwise`` by 90, 180 or 270 degrees."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    assert data[at] == 0, "a track header of version 0"
    one = 1 << 16
    matrix = (cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, at + 40, *matrix)
    path.write_bytes(data)


def cut(path: Path | str, share: float) -> Path:
    """Keep the first ``share`` of a file's bytes."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])
    return Path(path)


def real(name: str) -> Path | None:
    """One of the videos of Debian's package opencv-doc (``vtest.avi``), from the folder in the environment variable
    ``TOKENREDUCE_VIDEOS`` or where the package puts it; None where it is not installed."""
    own = os.environ.get("TOKENREDUCE_VIDEOS")
    for folder in (own,) if own else PLACES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None
