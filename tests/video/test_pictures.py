"""Videos that are pictures: folders of frames, and animated WebP."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from films import painted, shown
from PIL import Image

from tokenreduce.video import VideoError, open_video, read_frames, select_frames


def frames(folder: Path, count: int = 12, size: tuple[int, int] = (64, 48), end: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(painted(i, *size)).save(folder / f"frame{i + 1}{end}")
    return folder


def seen(read) -> list[int]:
    return [shown(f) for f in read.frames]


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    folder = frames(tmp_path / "film")
    (folder / ".hidden.png").write_bytes(b"")
    read = read_frames(folder, n=4)
    assert seen(read) == read.indices.tolist() == [0, 3, 7, 11]  # frame10 stands behind frame9
    assert (read.count, read.fps, read.duration, read.reader, read.size) == (12, 1.0, 12.0, "pillow", (64, 48))
    assert read.times.tolist() == [0, 3, 7, 11]
    assert read.warnings == ()
    assert seen(read_frames(str(folder), indices=[5, 2, 5])) == [5, 2, 5]
    assert seen(read_frames(folder, n=100)) == list(range(12))
    assert len(read_frames(folder, n=15, repeat=True)) == 15
    assert read_frames(folder, n=2, size=24).size == (32, 24)


def test_the_rate_of_a_folder_makes_its_times(tmp_path: Path) -> None:
    folder = frames(tmp_path / "film", end=".jpg")
    rated = read_frames(folder, fps=3)  # alone it says what the frames are, and all of them are read
    assert seen(rated) == list(range(12))
    assert rated.times == pytest.approx(np.arange(12) / 3)
    assert (rated.fps, rated.duration) == pytest.approx((3, 4))
    some = read_frames(folder, n=3, fps=4)
    assert (seen(some), some.times.tolist()) == ([0, 5, 11], [0, 1.25, 2.75])
    at = read_frames(folder, times=[0.0, 1.0, 3.9], fps=3)
    assert seen(at) == [0, 3, 11]
    sampled = read_frames(folder, fps=1, rate=3)
    assert (seen(sampled), sampled.times.tolist()) == ([0, 3, 6, 9], [0, 1, 2, 3])
    assert open_video(folder, rate=6).duration == 2
    with pytest.raises(VideoError, match="0 to 4"):
        read_frames(folder, times=[5.0], fps=3)
    assert select_frames(folder, 3, "uniform", rate=2).times.tolist() == [0, 2.5, 5.5]


def test_folders_that_are_no_video_say_what_is_wrong(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VideoError, match=r"this is a folder without a picture \(it holds nothing\)"):
        read_frames(empty, n=2)
    (empty / "film.mp4").write_bytes(b"x")
    with pytest.raises(VideoError, match=r"holds film.mp4\); name one video file in it"):
        read_frames(empty, n=2)
    mixed = frames(tmp_path / "mixed", 3)
    Image.new("RGB", (10, 20)).save(mixed / "frame4.png")
    with pytest.raises(VideoError, match=r"differ in size: frame1.png is 64x48, frame4.png 10x20"):
        read_frames(mixed, n=2)
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(2):
        (bad / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"none of its 2 pictures can be read \(1.png: its contents are no image"):
        read_frames(bad, n=2)
    good = frames(tmp_path / "good", 2)
    for rate in (0, -1, float("nan"), True):
        with pytest.raises(ValueError, match="rate of a folder"):
            read_frames(good, n=1, rate=rate)
    with pytest.raises(VideoError, match="reads video files"):
        read_frames(good, n=1, reader="pyav")
    with pytest.raises(ValueError, match="a rate is for a folder"):
        open_video(good / "frame1.png", rate=3)


def test_broken_pictures_in_a_folder_are_named_and_left_out(tmp_path: Path) -> None:
    folder = frames(tmp_path / "film", 6)
    whole = (folder / "frame3.png").read_bytes()
    (folder / "frame3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "frame1.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    read = read_frames(folder, n=6)
    assert seen(read) == read.indices.tolist() == [1, 3, 4, 5]
    assert read.missing == (0, 2)
    assert read.count == 6
    assert "1 file that is no picture left out: notes.txt" in read.warnings[0]
    assert "2 of the frames asked for cannot be decoded" in read.warnings[1]
    assert "frame1.png" in read.warnings[1]
    with pytest.raises(VideoError, match=r"none of the frames asked for can be decoded \(frame3.png"):
        read_frames(folder, indices=[2])


def test_frames_of_sixteen_bits_are_not_blank(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    for i in range(2):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    read = read_frames(tmp_path, n=2)
    assert len(np.unique(read.frames)) > 200


DURATIONS = [100, 200, 100, 300, 100, 100, 500, 100]


def animated(path: Path, **settings) -> Path:
    pictures = [Image.fromarray(painted(i, 64, 48)) for i in range(len(DURATIONS))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=DURATIONS, loop=0, **settings)
    return path


def check_animation(read) -> None:
    assert seen(read) == list(range(8))
    assert read.times == pytest.approx(np.cumsum([0, *DURATIONS[:-1]]) / 1000)
    assert read.duration == pytest.approx(sum(DURATIONS) / 1000)
    assert (read.count, read.size) == (8, (64, 48))


def test_animated_webp_has_its_durations_as_times(tmp_path: Path) -> None:
    path = animated(tmp_path / "a.webp", lossless=True)
    read = read_frames(path, n=8)
    check_animation(read)
    assert read.reader == "pillow"
    assert seen(read_frames(path, times=[0.0, 0.35, 1.45])) == [0, 2, 7]
    assert read_frames(path, fps=2).times.tolist() == pytest.approx([0, 0.4, 0.9])
    (tmp_path / "b.webp").write_bytes(path.read_bytes()[:200])
    with pytest.raises(VideoError, match="animated picture") as error:
        read_frames(tmp_path / "b.webp", n=2)
    assert "ffmpeg" not in str(error.value)


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_other_animations_are_read_with_and_without_a_video_library(tmp_path: Path, name: str, monkeypatch) -> None:
    path = animated(tmp_path / name)
    pytest.importorskip("av")
    check_animation(read_frames(path, n=8))
    from tokenreduce.video import picture_reader

    find = picture_reader.importlib.util.find_spec
    monkeypatch.setattr(picture_reader.importlib.util, "find_spec", lambda n, *a: None if n == "av" else find(n, *a))
    read = read_frames(path, n=8)
    check_animation(read)
    assert read.reader == "pillow"


def test_pictures_need_no_video_library(tmp_path: Path, monkeypatch) -> None:
    for library in ("av", "decord"):
        monkeypatch.setitem(sys.modules, library, None)
    assert seen(read_frames(frames(tmp_path / "film", 3), n=3)) == [0, 1, 2]
    assert len(read_frames(animated(tmp_path / "a.webp", lossless=True), n=3)) == 3
