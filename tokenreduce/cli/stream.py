"""``tokenreduce stream``: a video file of any length through a memory of fixed size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import complain, console
from tokenreduce.common.words import counted

if TYPE_CHECKING:
    from tokenreduce.video.memory import Recalled, StreamingMemory

__all__ = ["command"]

MEMORIES = ("pyramid", "clips")


def command(
    file: Annotated[Path, typer.Argument(help="A video file, an animated picture, or a folder of frames.")],
    memory: Annotated[
        str, typer.Option(help="pyramid (frames, finer the more recent) or clips (compressed one by one).")
    ] = "pyramid",
    encoder: Annotated[
        str, typer.Option(help="Whose patches are remembered: world-vit, timm:NAME, open_clip:NAME/TAG, hf:FOLDER.")
    ] = "world-vit",
    fps: Annotated[float, typer.Option(help="Frames per second that are looked at.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Frames per second of a folder of frames; --fps, or 1.")] = None,
    capacities: Annotated[str, typer.Option(help="pyramid: frames at full, half and quarter side length.")] = "2,2,12",
    reducer: Annotated[
        str, typer.Option(help="clips: temporal method that compresses each clip of 16 frames.")
    ] = "evs:keep=128",
    chunk: Annotated[int, typer.Option(min=1, help="Frames read and encoded at once.")] = 16,
    state: Annotated[
        Path | None, typer.Option(help="File that holds the memory; it is continued when it is there.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Stream a video through a memory with a fixed token budget, and say what it holds as it goes.

    With --state the memory is written after every chunk, and the same command goes on behind the last frame in it.
    """
    from tokenreduce.bench.models import load_model
    from tokenreduce.measure.features import feature_maps
    from tokenreduce.video import open_video

    if memory not in MEMORIES:
        raise ValueError(f"--memory is {' or '.join(MEMORIES)}, not {memory!r}")
    make = _maker(memory, capacities, reducer, chunk)
    make(None)  # wrong settings show before anything is read
    film = open_video(file, rate=fps if rate is None and file.is_dir() else rate)
    wanted = film.choose(fps=fps)
    bank = make(feature_maps(load_model(encoder, device)))
    if state is not None and state.exists():
        bank = _continued(bank, state)
        complain(f"{state} holds {counted(bank.seen, 'frame')}; going on behind them")
        last = float(bank.tokens().spans.max()) if bank.seen else -1.0
        wanted = [i for i in wanted if film.times[i] > last]
    rows: list[dict[str, Any]] = []
    missing = 0
    for start in range(0, len(wanted), chunk):
        began = time.perf_counter()
        got = film.read(wanted[start : start + chunk])
        missing += len(got.missing)
        if len(got):
            bank.push(got.frames, got.times)
        each = (time.perf_counter() - began) / len(wanted[start : start + chunk])
        if state is not None:
            bank.save(state)
        done = start + chunk
        if done >= len(wanted) or (done & (done - 1)) == 0:  # ever rarer: streams are long
            seconds = got.times[-1] if len(got) else film.duration
            rows.append(
                {
                    "frames_seen": bank.seen, "video_s": seconds, "tokens": len(bank.tokens().x),
                    "most_tokens": bank.budget, "held_bytes": bank.stored * 4, "frame_s": each,
                }
            )  # fmt: skip
    recalled = bank.tokens()
    if as_json:
        spans = zip(recalled.spans.tolist(), recalled.lengths, strict=True)
        pieces = [{"from_s": a, "to_s": b, "tokens": n} for (a, b), n in spans]
        warnings = list(film.warnings)
        print_json({"file": str(file), "rows": rows, "pieces": pieces, "missing": missing, "warnings": warnings})
    else:
        _present(rows, recalled)
    for line in film.warnings:
        complain(line)
    if missing:
        complain(f"{counted(missing, 'frame')} could not be decoded and not remembered")


def _present(rows: list[dict[str, Any]], recalled: Recalled) -> None:
    from rich.table import Table

    screen = console()
    table = Table("frames seen", "of video", "tokens", "held", "time per frame", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row["frames_seen"]), f"{row['video_s']:,.0f} s", f"{row['tokens']} (at most {row['most_tokens']})",
            f"{row['held_bytes'] / 1e6:.2f} MB", f"{row['frame_s'] * 1e3:.0f} ms",
        )  # fmt: skip
    screen.print(table)
    screen.say(_pieces(recalled))


def _maker(memory: str, capacities: str, reducer: str, chunk: int) -> Any:
    from tokenreduce.video import ClipMemory, PyramidMemory

    if memory == "clips":
        return lambda encode: ClipMemory(reducer, encode=encode, chunk=chunk)
    try:
        sizes = tuple(int(part) for part in capacities.split(","))
    except ValueError:
        raise ValueError(f"--capacities are three whole numbers such as 2,2,12, not {capacities!r}") from None
    return lambda encode: PyramidMemory(sizes, encode=encode, chunk=chunk)


def _continued(bank: StreamingMemory, state: Path) -> StreamingMemory:
    from tokenreduce.video import StreamingMemory

    kept = StreamingMemory.load(state, encode=bank.encode)
    if type(kept) is not type(bank) or kept.settings() != bank.settings():
        raise ValueError(
            f"{state} holds a {type(kept).__name__} with {kept.settings()}, not one with {bank.settings()}; give the "
            f"same settings or another --state"
        )
    return kept


def _pieces(recalled: Recalled) -> str:
    parts = [
        f"{begin:.0f}-{end:.0f} s: {n}" if end > begin else f"{begin:.0f} s: {n}"
        for (begin, end), n in zip(recalled.spans.tolist(), recalled.lengths, strict=True)
    ]
    return f"tokens by time: {', '.join(parts)}"
