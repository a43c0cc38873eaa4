"""Memory of a stream: ``python -m tokenreduce.bench.performance.streams MODEL`` makes its section of
docs/performance.md again.

Seeded frames, one for every second of ``--hours``, go through :class:`tokenreduce.streaming.Stream`. What has to stay
flat is read at marks on the way: keys and bytes that the cache holds, the largest number of bytes that tensors took
while one block entered, what the process has in memory, and the time of a block. A question is asked at every mark.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.pinned import load_of_machine, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.streaming import Stream

__all__ = ["Mark", "frames", "growth", "measure"]

#: Shares of the stream at which it is looked at; before the first, caches and allocators fill.
MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)
#: Blocks behind a mark whose times give its median.
TIMED = 8
ASK = "what is in this video"


@dataclass(frozen=True)
class Mark:
    """The stream after ``frames``: ``keys`` of a head, ``held`` bytes of the cache, ``peak`` bytes of tensors while a
    block entered beyond those alive before, ``resident`` bytes of the process (0 where the system does not tell),
    ``block_s`` and ``ask_s`` seconds."""

    frames: int
    keys: int
    held: int
    peak: int
    resident: int
    block_s: float
    ask_s: float


def frames(count: int, side: int, seed: int = 0) -> Iterator[np.ndarray[Any, Any]]:
    """``count`` frames (side,side,3) of uint8: a square that moves over noise which changes every ten frames."""
    g = np.random.default_rng(seed)
    size = max(side // 4, 1)
    for t in range(count):
        if t % 10 == 0:
            ground = g.integers(0, 255, (side, side, 3), dtype=np.uint8)
        frame = ground.copy()
        x, y = (t * 3) % (side - size + 1), (t * 5) % (side - size + 1)
        frame[y : y + size, x : x + size] = (t * 7) % 256
        yield frame


def measure(loaded: Any, method: str, count: int, *, block: int = 8, side: int = 64, tokens: int = 8) -> list[Mark]:
    """The marks of a stream of ``count`` frames of ``side`` pixels through ``loaded``
    (:func:`tokenreduce.bench.vlms.load_vlm`), with ``tokens`` of answer at each.

    Raises ``ValueError`` for a stream too short to have blocks to time behind its first mark.
    """
    blocks = count // block
    at = sorted({max(round(share * blocks), 1) for share in MARKS})
    if at[0] < 2 or len(at) < len(MARKS):
        raise ValueError(f"{count} frames in blocks of {block} are too few to see growth; give at least {20 * block}")
    running = Stream(loaded, method, block=block)
    film = frames(blocks * block, side)
    times: list[float] = []
    marks: list[Mark] = []
    for number in range(1, blocks + 1):
        part = [next(film) for _ in range(block)]
        if number not in at:
            began = time.perf_counter()
            running.push(part)
            times.append(time.perf_counter() - began)
            continue
        peak = peak_bytes(partial(running.push, part), loaded.model.device)
        reply = running.ask(ASK, max_new_tokens=tokens)
        seconds = statistics.median(times[-TIMED:])
        marks.append(Mark(running.frames, running.keys, running.cache_bytes, peak, _resident(), seconds, reply.seconds))
    return marks


def _resident() -> int:
    """Bytes of this process in memory, 0 where ``/proc`` does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError):
        return 0


def growth(marks: Sequence[Mark]) -> dict[str, float]:
    """Largest later value over the first, less 1, of what memory takes from the mark on at which the cap is met.

    Raises ``ValueError`` where fewer than two marks have met it.
    """
    capped = [m for m in marks if m.keys == marks[-1].keys]
    if len(capped) < 2:
        raise ValueError("the stream is too short to meet its cap; give more --hours, or keep fewer keys")
    out = {}
    for name in ("held", "peak", "resident"):
        values = [getattr(m, name) for m in capped]
        out[name] = max(values[1:]) / values[0] - 1 if values[0] else 0.0
    return out


COLUMNS = ("model", "frames", "keys of a head", "cache", "peak of a block", "process", "a block", "an answer")


def cells(name: str, mark: Mark) -> tuple[str, ...]:
    return (
        name, f"{mark.frames:,}", f"{mark.keys:,}", f"{mark.held / 2**20:.2f} MiB", f"{mark.peak / 2**20:.2f} MiB",
        f"{mark.resident / 2**20:.0f} MiB", f"{mark.block_s * 1e3:.0f} ms", f"{mark.ask_s * 1e3:.0f} ms",
    )  # fmt: skip


def main(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of models that take a stream.")],
    method: Annotated[str, typer.Option(help="what caps the cache")] = "streammem:keep=1024",
    hours: Annotated[float, typer.Option(help="of video, a frame per second")] = 1.0,
    block: Annotated[int, typer.Option(min=1, help="frames that enter at once")] = 8,
    side: Annotated[int, typer.Option(min=8, help="pixels of a frame's side")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """What a stream takes in memory as it gets longer."""
    from tokenreduce.bench.vlms import load_vlm

    speak_everywhere()
    lines: list[tuple[str, ...]] = []
    grown: list[str] = []
    for model in models:
        loaded = load_vlm(model, device, "auto")
        name = type(loaded.model).__name__.removesuffix("ForConditionalGeneration")
        marks = measure(loaded, method, round(hours * 3600), block=block, side=side)
        lines += [cells(name, mark) for mark in marks]
        grown.append(f"{name}: " + ", ".join(f"{what} {share:.1%}" for what, share in growth(marks).items()))
    load = load_of_machine()
    busy = "" if load is None else f", {load:.1f} processes per core wanted to run"
    about = (
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, allocator pinned{busy}; {method}, blocks of "
        f"{block} frames of {side}x{side} pixels. Growth from the first mark with a full cache on: {'; '.join(grown)}."
    )
    deliver("streams", COLUMNS, lines, about, markdown)


if __name__ == "__main__":
    pin()
    typer.run(main)
