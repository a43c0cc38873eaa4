from __future__ import annotations

import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenreduce.demo.apart import apart
from tokenreduce.demo.uploads import LONGEST, image_from, is_video, video_from


def picture(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    Image.new(mode, size, "red" if mode == "RGB" else 0).save(path)
    return path


def bomb(path: Path, side: int) -> Path:
    """A PNG of some bytes that claims ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
def test_images_come_out_as_rgb(tmp_path: Path, name: str) -> None:
    made = image_from(picture(tmp_path / name))
    assert made.size == (40, 30)
    assert made.mode == "RGB"
    assert np.abs(np.asarray(made)[15, 20].astype(int) - (255, 0, 0)).max() < 8


def test_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.asarray(image_from(tmp_path / "a.png")).min() == 255


def test_images_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert image_from(tmp_path / "a.jpg").size == (30, 40)


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    assert max(image_from(picture(tmp_path / "a.png", (LONGEST + 400, 100))).size) == LONGEST


@pytest.mark.parametrize("side", [7_000, 200_000])
def test_huge_images_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    with pytest.raises(ValueError, match="pixels"):
        image_from(bomb(tmp_path / "bomb.png", side))


def test_broken_and_foreign_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.png", (200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.svg").write_text("<svg/>")
    for name, words in (
        ("cut.png", "cut.png cannot be read as an image"), ("text.png", "no image"), ("empty.png", "is empty"),
        ("page.svg", "no image that is read here"), ("gone.png", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            image_from(tmp_path / name)
        assert str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="at most 0 MB"):
        image_from(tmp_path / "a.png", most_bytes=10)


def test_contents_must_be_of_a_format_that_is_let_in(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.ppm")
    (tmp_path / "a.ppm").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="contents are no image"):
        image_from(tmp_path / "a.png")


def test_names_tell_videos_from_images() -> None:
    assert is_video("a.MP4")
    assert not is_video("a.gif")


def test_a_process_of_its_own_answers_raises_dies_and_is_stopped() -> None:
    assert apart(dict, [["a", 2], ["b", [1, 3]]])["b"].tolist() == [1, 3]
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "x")
    with pytest.raises(ValueError, match="the file ended without a result"):
        apart(os._exit, 3, what="the file")
    began = time.monotonic()
    with pytest.raises(ValueError, match="took longer than 2 seconds"):
        apart(time.sleep, 600, seconds=2)
    assert time.monotonic() - began < 300


def test_videos_are_decoded_apart(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 16 * i, np.uint8), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    frames, times = video_from(tmp_path / "film.mp4", 4, side=48)
    assert [f.size for f in frames] == [(48, 32)] * 4
    assert times == sorted(times)
    levels = [float(np.asarray(f).mean()) for f in frames]
    assert levels == sorted(levels)
    assert levels[-1] - levels[0] > 200


def test_a_text_called_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    with pytest.raises(ValueError, match=r"text\.mp4") as error:
        video_from(tmp_path / "text.mp4", 4)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="no video that is read here"):
        video_from(tmp_path / "text.txt", 4)
