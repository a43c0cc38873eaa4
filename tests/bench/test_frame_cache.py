"""Frames kept between runs: hits and misses, what makes a clip another one, the bound, other processes, a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenreduce.bench import frame_cache as frame_cache_module
from tokenreduce.bench.clip_frames import Sampler
from tokenreduce.bench.clips import ClipItem
from tokenreduce.bench.frame_cache import FrameCache
from tokenreduce.bench.video import VideoTask

pytest.importorskip("av")
from films import film


def made(value: int, count: int = 2, side: int = 10):
    return lambda: (np.full((count, side, side, 3), value, np.uint8), np.arange(count, dtype=np.float64))


def clip(folder: Path, name: str = "clip") -> Path:
    path = folder / name
    path.write_text(name)
    return path


def test_a_clip_is_decoded_once_for_each_way_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "film.mp4", 24, rate=8)
    item = ClipItem(0, "what", ("x",), None, path)
    cache = FrameCache(tmp_path / "kept", 10**8)
    ways = [Sampler(4), Sampler(5), Sampler(None, 2.0), Sampler(4, sampling="diverse")]
    plain = [way.read(item) for way in ways]
    for _ in range(2):
        for way, right in zip(ways, plain, strict=True):
            shown = Sampler(way.frames, way.fps, way.sampling, cache).read(item)
            assert np.array_equal(shown.frames, right.frames)
            assert np.array_equal(shown.times, right.times)
    assert (cache.misses, cache.hits) == (4, 4)
    spanned = ClipItem(0, "what", ("x",), None, path, (), (1.0, 2.0))
    assert len(Sampler(3, cache=cache).read(spanned).frames) == 3
    assert cache.misses == 5
    import tokenreduce.video.reading as reading

    def never(*args, **kwargs):
        raise AssertionError("it was opened")

    monkeypatch.setattr(reading, "open_video", never)
    assert Sampler(4, cache=FrameCache(tmp_path / "kept", 10**8)).read(item).kept


def test_a_changed_clip_is_another_one(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "kept", 10**6)
    path = clip(tmp_path)
    cache.read(path, {}, made(1))
    before = path.stat()
    path.write_text("clap")  # as long, and as old
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.read(path, {}, made(2))[0].max() == 2
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    cache.read(folder, {}, made(3))
    Image.new("RGB", (4, 4)).save(folder / "2.png")
    assert not cache.read(folder, {}, made(4))[2]
    with pytest.raises(ValueError, match="gone"):  # what decoding raises is raised
        cache.read(tmp_path / "none", {}, lambda: (_ for _ in ()).throw(ValueError("gone")))


def test_the_size_is_bounded_and_the_latest_stay(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "kept", 10_000)  # each takes 600 bytes and its file's own
    clips = [clip(tmp_path, str(i)) for i in range(12)]
    for at, path in enumerate(clips):
        cache.read(path, {}, made(at))
        for file in (tmp_path / "kept").glob("*.npz"):  # as if some seconds went by
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 5))
        cache.read(clips[0], {}, made(0))  # used all the time
        assert sum(f.stat().st_size for f in (tmp_path / "kept").iterdir()) <= 10_000
    again = FrameCache(tmp_path / "kept", 10_000)
    assert again.read(clips[0], {}, made(0))[2]
    assert again.read(clips[-1], {}, made(11))[2]
    assert not again.read(clips[1], {}, made(1))[2]
    small = FrameCache(tmp_path / "small", 100)
    small.read(clips[0], {}, made(0))
    assert not list((tmp_path / "small").glob("*")) if (tmp_path / "small").exists() else True


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file", b"no archive"])
def test_damage_is_decoded_again(tmp_path: Path, damage: bytes) -> None:
    cache, path = FrameCache(tmp_path / "kept", 10**6), clip(tmp_path)
    cache.read(path, {}, made(1))
    (file,) = (tmp_path / "kept").glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(damage or whole[:-30] + b"x" * 30)
    assert cache.read(path, {}, made(1))[2] is False
    assert cache.read(path, {}, made(1))[2] is True


def test_a_flipped_byte_is_seen(tmp_path: Path) -> None:
    cache, path = FrameCache(tmp_path / "kept", 10**6), clip(tmp_path)
    cache.read(path, {}, made(7))
    (file,) = (tmp_path / "kept").glob("*.npz")
    data = bytearray(file.read_bytes())
    data[data.index(b"\x07" * 50) + 10] ^= 1
    file.write_bytes(bytes(data))
    assert cache.read(path, {}, made(7))[2] is False


def test_a_full_disk_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    cache, path = FrameCache(tmp_path / "kept", 10**6), clip(tmp_path)
    monkeypatch.setattr(frame_cache_module.np, "savez", full)
    for _ in range(2):
        assert cache.read(path, {}, made(1))[0].max() == 1
    assert cache.trouble == "No space left on device"
    assert not list((tmp_path / "kept").iterdir())
    (tmp_path / "file").write_text("")
    nowhere = FrameCache(tmp_path / "file", 10**6)  # a file is where the folder should be
    assert nowhere.read(path, {}, made(1))[2] is False
    assert nowhere.trouble


def test_processes_share_it(tmp_path: Path) -> None:
    """Two write and throw out at once; both get what they ask for, and nothing half written stays."""
    code = (
        "import sys; import numpy as np; from pathlib import Path\n"
        "from tokenreduce.bench.frame_cache import FrameCache\n"
        "c = FrameCache(Path(sys.argv[1]) / 'kept', 20_000)\n"
        "for turn in range(60):\n"
        "    for i in range(9):\n"
        "        make = lambda: (np.full((2, 20, 20, 3), i, np.uint8), np.arange(2.0))\n"
        "        assert (c.read(Path(sys.argv[1]) / str(i), {}, make)[0] == i).all()\n"
        "assert not c.trouble, c.trouble\n"
    )
    for i in range(9):
        clip(tmp_path, str(i))
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    left = list((tmp_path / "kept").iterdir())
    assert all(f.suffix == ".npz" for f in left)


def test_a_second_benchmark_opens_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "a.mp4", 24, rate=8)
    line = {"video": "a.mp4", "question": "what is it", "answer": "red"}
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({**line, "answer": a}) for a in ("red", "blue")))
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path / "cache"))

    def source(**settings):
        return VideoTask(data=str(tmp_path / "q.jsonl"), frames=4, **settings).source()

    first = source()
    assert [first.open(item).kept for item in first.items] == [False, True]
    second = source()
    assert all(second.open(item).kept for item in second.items)
    assert "nothing was decoded" in second.notes[-1]
    assert "nothing was decoded" not in "".join(first.notes)
    none = source(frame_cache=0)
    assert not none.open(none.items[0]).kept
    with pytest.raises(ValueError, match="--frame-cache is a size"):
        VideoTask(frame_cache=-1)
