"""Run folders: ``run.json`` says what was measured on what, ``rows.jsonl`` grows by one line per measured point.

A row is on the disk before the next one is measured, so a killed run loses nothing but the row it was working on.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any

from tokenreduce.bench.groups import grouped
from tokenreduce.bench.task import FLOPS, Axis
from tokenreduce.common.files import append, cannot_write, make_folder, write_text
from tokenreduce.common.words import plain

__all__ = ["ANSWERS", "Run", "RunWriter", "hardware", "load_run", "open_run", "read_lines", "read_run", "versions"]

#: What an error of writing says next.
OTHER_OUT = "choose another folder with --out"
INFO, ROWS = "run.json", "rows.jsonl"
#: Answers to single questions, of points whose row may not be there yet.
ANSWERS = "answers.jsonl"
#: What --fresh removes; nothing else in a folder is ever touched.
OWN_FILES = (INFO, ROWS, ANSWERS, "rows.csv", "pareto.png", "report.html")
#: Entries of run.json that must agree before rows may stand in one table.
IDENTITY = ("task", "settings", "versions", "hardware")


@dataclass
class Run:
    """A run as it lies in its folder. ``rows`` has the last row of every point, in the order of the points."""

    folder: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    repaired: str = ""

    @property
    def metric(self) -> str:
        return str(self.info.get("metric", "top1"))

    @property
    def axis(self) -> Axis:
        """What budgets are shares of."""
        return Axis(**self.info["axis"]) if self.info.get("axis") else FLOPS

    @property
    def good(self) -> list[dict[str, Any]]:
        """Rows that were measured."""
        return [r for r in self.rows if not r.get("error")]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Rows of points that raised."""
        return [r for r in self.rows if r.get("error")]

    @property
    def missing(self) -> list[str]:
        """Points that have no row yet."""
        there = {r["id"] for r in self.rows}
        return [p for p in self.info.get("points", []) if p not in there]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int, str]:
    """Rows, the number of bytes that hold complete rows, and what is wrong with the end ("" when nothing is).

    Only the last line can be incomplete, because lines are appended whole. Raises ``ValueError`` for other damage.
    """
    raw = path.read_bytes() if path.exists() else b""
    rows: list[dict[str, Any]] = []
    position, number = 0, 0
    while position < len(raw):
        number += 1
        end = raw.find(b"\n", position)
        line = raw[position : len(raw) if end < 0 else end]
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "id" not in row:
                raise ValueError("it is no row")
        except ValueError as error:
            if end < 0 or end == len(raw) - 1:
                return rows, position, f"the last line of {path} was cut off (a killed run)"
            raise ValueError(
                f"line {number} of {path} cannot be read ({error}); repair it by hand, or start again with --fresh"
            ) from error
        rows.append(row)
        if end < 0:
            return rows, len(raw), f"the last line of {path} had no line end (a killed run)"
        position = end + 1
    return rows, position, ""


def _latest(rows: list[dict[str, Any]], info: dict[str, Any]) -> list[dict[str, Any]]:
    last = {r["id"]: r for r in rows}
    order = [last.pop(p) for p in info.get("points", []) if p in last] + list(last.values())
    return grouped(order, Axis(**info["axis"]) if info.get("axis") else FLOPS)


def load_run(folder: str | Path) -> Run:
    """Read a run folder without changing it. Raises ``FileNotFoundError`` or ``ValueError`` that say what to do."""
    folder = Path(folder)
    if not (folder / INFO).is_file():
        found = sorted(p.parent.name for p in folder.glob(f"*/{INFO}")) if folder.is_dir() else []
        hint = f"; run folders in it: {', '.join(found)}" if found else "; `tokenreduce bench ... --out` makes one"
        raise FileNotFoundError(f"{folder} is no run folder: it has no {INFO}{hint}")
    info = _read_info(folder)
    rows, _, wrong = read_lines(folder / ROWS)
    return Run(folder, info, _latest(rows, info), wrong)


def _read_info(folder: Path, name: str = INFO) -> dict[str, Any]:
    try:
        info = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / name} cannot be read ({error}); start again with --fresh") from error
    if not isinstance(info, dict):
        raise ValueError(f"{folder / name} holds no run; start again with --fresh")
    return info


def read_run(rows: str | Path, info: str | Path | None = None) -> Run:
    """A run from its ``rows.jsonl`` alone, or with its ``run.json``, wherever the two lie and whoever wrote them.

    Without ``run.json`` the metric and the axis are those whose keys the rows have. Raises ``ValueError`` for a file
    without rows or with others than a benchmark writes, and ``OSError`` for one that cannot be read.
    """
    rows = Path(rows)
    found, _, wrong = read_lines(rows)
    if not found:
        raise ValueError(f"{rows.name} holds no row of a benchmark")
    for number, row in enumerate(found, 1):
        if bad := [k for k in ("id", "method", "spec") if not isinstance(row.get(k), str)]:
            raise ValueError(f"line {number} of {rows.name} is no row of a benchmark: {', '.join(bad)} is missing")
    if info is not None:
        told = _read_info(Path(info).parent, Path(info).name)
    else:
        keys = {key for row in found for key, value in row.items() if value is not None}
        metric = next((m for m in ("accuracy", "top1") if m in keys), None)
        if metric is None:
            raise ValueError(f"no row of {rows.name} has an accuracy (accuracy or top1)")
        told = {"metric": metric}
        if "visual_share" in keys:
            title = "visual tokens, mean over the language model's layers, % of the unreduced ones"
            told["axis"] = {"key": "visual_share", "label": "visual tokens", "title": title}
    run = Run(rows.parent, told, _latest(found, told), wrong)
    numbers = (run.metric, run.axis.key, "speedup", "mean_tokens", "mean_visual_tokens", "share", "budget")
    for row in run.rows:
        for key in numbers:
            if row.get(key) is not None and not isinstance(row[key], int | float):
                raise ValueError(f"{rows.name}: {key} of {row['id']} is no number: {_short(row[key])}")
    return run


class RunWriter:
    """An open run folder: appends rows and keeps ``run.json`` up to date. One writer per folder at a time."""

    def __init__(self, run: Run, handle: FileIO) -> None:
        self.run = run
        self._handle = handle

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write one row and wait until it is on the disk; an older row of the same point is replaced in ``run``."""
        row = plain(row)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        append(self._handle, line.encode("utf-8", "backslashreplace"), self.run.folder / ROWS, OTHER_OUT)
        self.run.rows = _latest([*self.run.rows, row], self.run.info)
        return row

    def update(self, **info: Any) -> None:
        """Change entries of ``run.json``; written whole and atomically, and only when something changed."""
        info = plain(info)
        if any(self.run.info.get(k) != v for k, v in info.items()):
            self.run.info.update(info)
            text = json.dumps(self.run.info, indent=1, ensure_ascii=False) + "\n"
            write_text(self.run.folder / INFO, text, OTHER_OUT)

    def close(self) -> None:
        self._handle.close()


@contextlib.contextmanager
def open_run(folder: str | Path, info: dict[str, Any], *, fresh: bool = False) -> Iterator[RunWriter]:
    """Open ``folder`` for writing, empty or with earlier rows of the same :data:`IDENTITY`.

    A cut-off last line is taken away (``run.repaired`` says so). Raises ``OSError`` for a folder that cannot be
    written or that another process writes to, and ``ValueError`` when it holds a run with other settings.
    """
    folder = Path(folder)
    make_folder(folder, OTHER_OUT)
    try:
        handle = open(folder / ROWS, "ab", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise cannot_write(folder / ROWS, error, OTHER_OUT) from error
    try:
        _lock(handle, folder)
        if fresh:
            handle.truncate(0)
            for name in OWN_FILES:
                if name != ROWS:
                    (folder / name).unlink(missing_ok=True)
        writer = RunWriter(_resume(folder, plain(info), handle), handle)
        writer.update(**{k: v for k, v in info.items() if k not in writer.run.info})
        yield writer
    finally:
        handle.close()


def _resume(folder: Path, info: dict[str, Any], handle: FileIO) -> Run:
    rows, complete, wrong = read_lines(folder / ROWS)
    begun = {"format": 1, "started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    answered = (folder / ANSWERS).exists() and (folder / ANSWERS).stat().st_size > 0
    if not (folder / INFO).exists():
        if rows or wrong or answered:
            what = ROWS if rows or wrong else ANSWERS
            raise ValueError(f"{folder} has {what} but no {INFO}; start again with --fresh, or use another --out")
        return Run(folder, begun)
    there = _read_info(folder)
    if not rows and not wrong and not answered and any(there.get(key) != info[key] for key in IDENTITY if key in info):
        return Run(folder, begun)  # of a run that failed before its first row, nothing is worth keeping
    differences: list[str] = []
    for key in IDENTITY:
        if key in info:
            differences += _differences(there.get(key), info[key], "" if key == "settings" else key)
    if differences:
        shown = "; ".join(differences[:6]) + (f"; and {len(differences) - 6} more" if len(differences) > 6 else "")
        raise ValueError(
            f"{folder} holds a run with other settings ({shown}). "
            "Delete its rows with --fresh, or write to another folder with --out."
        )
    if wrong:
        handle.truncate(complete)
        if complete and not (folder / ROWS).read_bytes().endswith(b"\n"):
            append(handle, b"\n", folder / ROWS, OTHER_OUT)
            wrong += "; the row is whole and was kept"
        else:
            wrong += "; it was removed and its point is measured again"
    return Run(folder, there, _latest(rows, there), wrong)


def _differences(there: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*there, *(k for k in now if k not in there)]:
            yield from _differences(there.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif there != now:
        yield f"{name}: {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(handle: FileIO, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows; two writers then are the user's own look-out
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"another process is writing to {folder}; wait for it, or choose another --out") from error
    except OSError:  # some network file systems have no locks
        return


def versions() -> dict[str, str]:
    """Versions of what decides about results and speed; libraries that are not installed are left out."""
    out = {"python": platform.python_version()}
    for name in ("tokenreduce", "torch", "torchvision", "timm", "open_clip_torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine that times were measured on: processor, threads, and the GPU when ``device`` is one."""
    import torch

    out: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    out["system"] = f"{platform.system()} {platform.machine()}"
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device))
        out["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        out["cuda"] = torch.version.cuda
    return out


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
