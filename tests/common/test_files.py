"""Files are written whole or not at all, and errors name the file and the reason."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenreduce as tr
from tokenreduce.common import files
from tokenreduce.common.files import append_line, make_folder, write_bytes, write_text, writing


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when a file is to take its place."""

    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", replace)


def test_a_file_appears_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    assert write_text(path, "one ±\n") == path
    assert path.read_bytes() == "one ±\n".encode()
    path.chmod(0o640)
    write_text(path, "two")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("two", 0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    write_text(link, "three")
    assert link.is_symlink()
    assert path.read_text() == "three"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_names_that_are_no_text_are_written_as_escapes(tmp_path: Path) -> None:
    assert write_text(tmp_path / "a", "x\udcff").read_bytes() == b"x\\udcff"


def test_after_an_error_the_earlier_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "earlier")

    def write(error: BaseException) -> None:
        with writing(path) as partial:
            partial.write_text("half")
            assert (partial.parent, partial.suffix) == (tmp_path, ".txt")
            raise error

    with pytest.raises(OSError, match=r"a\.txt: No space left on device; choose") as caught:
        write(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    file = write_text(tmp_path / "file", "")
    for call in (make_folder, lambda path: write_text(path / "y.txt", ""), lambda path: append_line(path / "y", "")):
        with pytest.raises(OSError, match=r"cannot write to .*: a file is where a folder should be; choose"):
            call(file / "x")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}: Is a directory; take another"):
        write_bytes(tmp_path, b"", "take another")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device(tmp_path: Path) -> None:
    link = tmp_path / "a.png"
    link.symlink_to("/dev/full")
    for path in ("/dev/full", link):
        with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device"):
            write_text(path, "x")
        with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device"):
            append_line(path, "x")
    assert link.is_symlink()


def test_a_line_is_appended_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, "first")

    def sync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", sync)
        with pytest.raises(OSError, match=r"rows\.jsonl: No space left"):
            append_line(path, "second, of which some bytes came through")
    assert path.read_text() == "first\n"
    append_line(path, "third")
    assert path.read_text() == "first\nthird\n"


def _plan(path: Path) -> object:
    return tr.Prune(4, torch.tensor([[0, 2]])).save(path)


def _memory(path: Path) -> object:
    from tokenreduce.video import ClipMemory

    return ClipMemory("evs:keep=4", encode=None).save(path)


def _weights(path: Path) -> object:
    from tokenreduce.zoo import weights

    return weights.save(torch.nn.Linear(2, 2), path.name, {}, path)


def _picture(path: Path) -> object:
    from tokenreduce.cli.shared import save_picture

    return save_picture(Image.new("RGB", (4, 4)), path.with_suffix(".png"), "--out")


def _checkpoint(path: Path) -> object:
    from tokenreduce.zoo.training import Schedule, fit

    model = torch.nn.Linear(2, 2)
    return list(fit(model, lambda m, *_: m(torch.ones(1, 2)).sum(), Schedule(steps=1), path))


def _section(path: Path) -> object:
    from tokenreduce.bench.performance.sections import splice

    return splice(path, "x", "text")


def _run(path: Path) -> object:
    from tokenreduce.bench.runs import open_run

    with open_run(path, {"task": "x"}) as writer:
        return writer.update(points=["a"])


@pytest.mark.parametrize("write", [_plan, _memory, _weights, _picture, _checkpoint, _section, _run])
@pytest.mark.usefixtures("full")
def test_every_writer_names_its_file_on_a_full_disk(tmp_path: Path, write: Callable[[Path], object]) -> None:
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/.*: No space left on device; choose another"):
        write(tmp_path / "it")
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "rows.jsonl"]
    assert left == []


def test_the_cache_lies_where_the_system_puts_such_things(tmp_path, monkeypatch):
    from tokenreduce.common.files import cache_folder

    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("TOKENREDUCE_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("TOKENREDUCE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "tokenreduce"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "tokenreduce"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == tmp_path / "home" / "Library" / "Caches" / "tokenreduce"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder() is None
