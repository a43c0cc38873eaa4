"""Decoded frames of clips, kept on the disk between runs: reading video dominates large evaluations.

One file per clip and way to choose frames, in the folder ``frames`` of tokenreduce's cache. Processes share it: files
appear whole, and one that is gone was thrown out by another process. Nothing here ever fails a benchmark: what cannot
be written is decoded again the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.common.files import cache_folder

__all__ = ["GIGABYTES", "FrameCache", "fingerprint"]

#: What frames may take on the disk where nothing is said, in 10^9 bytes.
GIGABYTES = 4.0
#: When room is needed, the oldest go until this share of it is taken.
LEFT = 0.9
#: Seconds after which an unfinished file is one of a killed process.
STALE = 3600
#: Part of every key; to be raised when what is stored changes.
FORMAT = 1


def fingerprint(path: Path) -> str:
    """What tells this file from any other, and from itself before it was changed: its place, size and times of change
    (of all files of a folder), hashed. Its content is not read. Raises ``OSError`` where it is not there."""
    path = path.resolve()
    told = hashlib.blake2b(str(path).encode("utf-8", "surrogateescape"), digest_size=16)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        stat = file.stat()
        one = (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        told.update(repr(one).encode("utf-8", "backslashreplace"))
    return told.hexdigest()


@dataclass
class FrameCache:
    """At most ``limit`` bytes of frames in ``folder``; those used least recently go first. ``folder`` None keeps
    nothing. ``hits`` and ``misses`` count clips, ``trouble`` is why nothing is written any more."""

    folder: Path | None
    limit: int
    hits: int = 0
    misses: int = 0
    trouble: str = ""
    _versions: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def usual(cls, gigabytes: float = GIGABYTES) -> FrameCache:
        """In the folder of :func:`~tokenreduce.common.files.cache_folder`; 0 keeps nothing. Raises ``ValueError`` for
        a size below 0."""
        if not gigabytes >= 0:
            raise ValueError(f"--frame-cache is a size in gigabytes, 0 for none, not {gigabytes!r}")
        base = cache_folder() if gigabytes else None
        return cls(None if base is None else base / "frames", int(1e9 * gigabytes))

    def __post_init__(self) -> None:
        for name in ("av", "decord", "pillow", "numpy"):  # other decoders may give other pixels
            with contextlib.suppress(metadata.PackageNotFoundError):
                self._versions[name] = metadata.version(name)

    def read(
        self, path: Path, how: dict[str, Any], make: Callable[[], tuple[NDArray[np.uint8], NDArray[np.float64]]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64], bool]:
        """Frames (T,H,W,3) uint8 of ``path`` chosen by ``how``, their seconds (T,), and whether they were kept here;
        otherwise ``make()`` decodes them. Raises what ``make`` raises."""
        file = self._file(path, how)
        found = None if file is None else self._load(file)
        if found is not None:
            self.hits += 1
            return (*found, True)
        self.misses += 1
        frames, times = make()
        if file is not None and not self.trouble:
            try:
                self._store(file, frames, times)
            except OSError as error:
                self.trouble = error.strerror or str(error) or type(error).__name__
        return frames, times, False

    def _file(self, path: Path, how: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        try:
            clip = fingerprint(path)
        except OSError:
            return None  # reading it says what is wrong
        told = json.dumps([FORMAT, clip, how, self._versions], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(told.encode(), digest_size=20).hexdigest()}.npz"

    def _load(self, file: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]] | None:
        try:
            with np.load(file, allow_pickle=False) as stored:
                frames, times = stored["frames"], stored["times"]
            if frames.ndim != 4 or frames.dtype != np.uint8 or times.shape != (len(frames),):
                raise ValueError("these are no frames")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with contextlib.suppress(OSError):  # damaged
                file.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # used last
        return frames, times

    def _store(self, file: Path, frames: NDArray[np.uint8], times: NDArray[np.float64]) -> None:
        size = frames.nbytes + times.nbytes + 1024
        if size > self.limit:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(size)
        partial = file.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            with open(partial, "wb") as handle:
                np.savez(handle, frames=frames, times=times)
            os.replace(partial, file)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        kept = sorted(self._kept())
        total = sum(bytes_ for _, bytes_, _ in kept)
        if total + size <= self.limit:
            return
        for _, bytes_, file in kept:
            if total + size <= LEFT * self.limit:
                break
            with contextlib.suppress(OSError):
                file.unlink()
            total -= bytes_

    def _kept(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, file) of what is there; what killed processes left is thrown out."""
        assert self.folder is not None
        for file in self.folder.iterdir():
            with contextlib.suppress(OSError):
                stat = file.stat()
                if file.suffix == ".npz":
                    yield stat.st_mtime, stat.st_size, file
                elif file.suffix == ".partial" and time.time() - stat.st_mtime > STALE:
                    file.unlink()
