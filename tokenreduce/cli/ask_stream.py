"""``tokenreduce ask-stream``: questions in the middle of a video, which a model holds in a cache of fixed size."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import complain, console

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="A Hub id, or a folder with model and processor.")],
    film: Annotated[Path, typer.Argument(help="A video file, an animated picture, or a folder of frames.")],
    ask: Annotated[list[str], typer.Option("--ask", "-p", help="What to ask; may be repeated.")],
    at: Annotated[
        str, typer.Option(help="Seconds of the video at which every question is asked; the end by default.")
    ] = "",
    method: Annotated[
        str, typer.Option(help="Method of the cache stage that caps the cache between blocks.")
    ] = "knorm:keep=2048",
    fps: Annotated[float, typer.Option(help="Frames per second that are looked at.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Frames per second of a folder of frames; --fps, or 1.")] = None,
    block: Annotated[int, typer.Option(min=1, help="Frames that enter the model at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as the weights are stored), fp32, bf16 or fp16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Stream a video through an image/video language model with a capped KV cache, and ask while it runs.

    Frames go through tower and language model block by block; between blocks the method thins the cache of every
    layer. A question is answered from what is held then, and leaves the stream as it was.
    """
    from tokenreduce.bench.vlms import load_vlm
    from tokenreduce.streaming import Stream
    from tokenreduce.video import open_video

    if not all(question.strip() for question in ask):
        raise ValueError("--ask is empty; ask something about the video")
    opened = open_video(film, rate=fps if rate is None and film.is_dir() else rate)
    wanted = opened.choose(fps=fps)
    moments = _moments(at, opened.times[wanted[-1]])
    loaded = load_vlm(model, device, dtype)
    running = Stream(loaded, method, block=block, fps=fps)
    rows: list[dict[str, Any]] = []
    missing, began = 0, time.perf_counter()
    for start in range(0, len(wanted), block):
        part = wanted[start : start + block]
        while moments and moments[0] < opened.times[part[0]]:
            rows += _answers(running, ask, moments.pop(0), max_new_tokens)
        got = opened.read(part)
        missing += len(got.missing)
        running.push(list(got.frames))
    for moment in moments:
        rows += _answers(running, ask, moment, max_new_tokens)
    seconds = time.perf_counter() - began
    if as_json:
        print_json({"file": str(film), "method": running.method.spec(), "seconds": seconds, "answers": rows})
    else:
        _present(rows, running, seconds)
    if missing:
        complain(f"{missing} frames could not be decoded and were not seen")


def _moments(at: str, end: float) -> list[float]:
    """Seconds in ascending order. Raises ``ValueError`` for text that is no number and for times behind the end."""
    try:
        times = sorted(float(part) for part in at.split(",")) if at.strip() else [end]
    except ValueError:
        raise ValueError(f"--at is seconds such as 30,90, not {at!r}") from None
    if times[0] < 0 or times[-1] > end + 1:
        raise ValueError(f"--at {at}: the video's frames are at 0 to {end:.0f} s")
    return times


def _answers(running: Any, ask: list[str], moment: float, tokens: int) -> list[dict[str, Any]]:
    if not running.frames:
        raise ValueError(f"--at {moment:g}: no frame comes before that; ask later")
    return [{"at_s": moment, **asdict(running.ask(question, max_new_tokens=tokens))} for question in ask]


def _present(rows: list[dict[str, Any]], running: Any, seconds: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from tokenreduce.bench.columns import in_bytes

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head, left in (("at", False), ("question", True), ("answer", True), ("frames", False), ("keys", False),
                       ("KV cache", False), ("time", False)):  # fmt: skip
        table.add_column(head, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(
            *map(Text, (f"{row['at_s']:,.0f} s", row["prompt"], row["text"] or "(nothing)", f"{row['frames']:,}",
                        f"{row['keys']:,}", in_bytes(row["cache_bytes"]), f"{row['seconds']:.2f} s")),
        )  # fmt: skip
    screen = console()
    screen.print(table)
    screen.say(f"{running.method.spec()}; keys are visual ones of a head and layer; {seconds:.1f} s in all", "dim")
