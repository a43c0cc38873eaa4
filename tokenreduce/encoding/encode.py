"""A run that encodes: a folder of Parquet files that grows by one part at a time, whoever works on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tokenreduce.bench.runs import OTHER_OUT, RunWriter, open_run, versions
from tokenreduce.bench.workers import PoolMaker, Workers, devices_for
from tokenreduce.common.files import writing
from tokenreduce.encoding.task import Encoding, Features

__all__ = ["Encoded", "encode"]


@dataclass(frozen=True)
class Encoded:
    """A finished run.

    Attributes:
        folder: with ``part-00000.parquet`` and so on; columns ``id`` (int64, position in the data), ``path`` (string)
            and ``embedding`` (a list of D numbers).
        images: how many have a row.
        width: D.
        problems: images that could not be used: {"path", "reason"}.
        seconds: what this call took to encode, loading left out.
        encoded: images of this call; the others were there.
        flops: of one image, the stock model's and with the methods.
        died: workers that had to be replaced.
        notes: what there is to say about the data.
    """

    folder: Path
    images: int
    width: int
    problems: list[dict[str, str]]
    seconds: float
    encoded: int
    flops: tuple[int, int]
    died: int
    notes: list[str]


def encode(
    task: Encoding,
    out: str | Path,
    *,
    workers: int = 1,
    engine: PoolMaker = Workers,
    fresh: bool = False,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded:
    """Encode all images of ``task`` into the folder ``out``, by ``workers`` processes that ``engine`` makes.

    A run that was killed goes on with the parts that are missing; the files are those of one process whoever made
    them. ``watch`` is told how many images of how many are done.

    Raises ``ImportError`` without pyarrow, ``ValueError`` for a folder with another run, ``OSError`` for one that
    cannot be written or that another process writes to, and what :class:`~tokenreduce.encoding.Encoding` raises.
    """
    _pyarrow()
    task.load()
    stock, reduced = task.flops()
    # An image more or less would give others another position, so that parts of two listings do not fit together.
    settings = {**task.settings(), "images": len(task.images), "listing": task.listing()}
    info = {"task": "encode", "settings": settings, "versions": versions()}
    with open_run(out, info, fresh=fresh) as writer:
        folder = writer.run.folder
        if fresh:
            for old in folder.glob("part-*.parquet"):
                old.unlink()
        names = [_name(unit) for unit in range(task.parts)]
        if strange := sorted(file.name for file in folder.glob("part-*.parquet") if file.stem not in names):
            raise ValueError(
                f"{folder} has files of another run ({strange[0]}); delete them with --fresh, or use another --out"
            )
        writer.update(points=names, flops=[stock, reduced], notes=task.images.notes)
        there = {row["id"] for row in writer.run.rows if (folder / f"{row['id']}.parquet").is_file()}
        todo = [unit for unit in range(task.parts) if _name(unit) not in there]
        before = sum(row["images"] for row in writer.run.rows if row["id"] in there)
        pool = engine(_tasks(task, workers), max(1, torch.get_num_threads() // workers)) if workers > 1 else None
        began, encoded, done = time.perf_counter(), 0, min(len(there) * task.rows, len(task.images))
        watch(done, len(task.images))
        try:
            made = _here(task, todo) if pool is None else pool.run(task.reducers, todo)
            for unit, part in made:
                _keep(writer, unit, part, task)
                encoded += len(part.ids)
                done = min(done + task.rows, len(task.images))
                watch(done, len(task.images))
        finally:
            if pool is not None:
                pool.close()
        rows = writer.run.rows
        problems = [{"path": p.path, "reason": p.reason} for p in task.images.problems]
        problems += [problem for row in rows for problem in row["problems"]]
        return Encoded(
            folder, before + encoded, max((row["width"] for row in rows), default=0), problems,
            time.perf_counter() - began, encoded, (stock, reduced), 0 if pool is None else pool.died,
            list(task.images.notes),
        )  # fmt: skip


def _tasks(task: Encoding, workers: int) -> list[Encoding]:
    return [replace(task, device=device) for device in devices_for(task.device, workers)]


def _here(task: Encoding, todo: list[int]) -> Iterator[tuple[int, Features]]:
    return ((unit, task.part(task.reducers, unit)) for unit in todo)


def _name(unit: int) -> str:
    return f"part-{unit:05d}"


def _keep(writer: RunWriter, unit: int, part: Features, task: Encoding) -> None:
    """Write the file of a part, then its line: a line whose file is whole."""
    pa, parquet = _pyarrow()
    folder, name = writer.run.folder, _name(unit)
    width = part.vectors.shape[1]
    kind = pa.float16() if task.half else pa.float32()
    flat = pa.array(part.vectors.reshape(-1), type=kind)
    # A part without a readable image has no width: its list is one of nothing.
    vectors = pa.FixedSizeListArray.from_arrays(flat, width) if width else pa.array([], type=pa.list_(kind, 1))
    said = {"tokenreduce": json.dumps(task.settings())}
    table = pa.table({"id": part.ids, "path": part.places, "embedding": vectors}).replace_schema_metadata(said)
    with writing(folder / f"{name}.parquet", OTHER_OUT) as partial:
        parquet.write_table(table, partial)
    problems = [{"path": p.path, "reason": p.reason} for p in part.problems]
    writer.append({"id": name, "images": len(part.ids), "width": width, "problems": problems})


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("pyarrow is not installed: pip install 'tokenreduce[data]'") from error
    return pyarrow, pyarrow.parquet
