"""``tokenreduce stream``: a video file of any length through a memory of fixed size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.options import AnyDevice, AsJson
from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import complain, console
from tokenreduce.common.words import counted

if TYPE_CHECKING:
    from tokenreduce.video.memory import Recalled, StreamingMemory
    from tokenreduce.video.reading import Video
    from tokenreduce.video.remembering import Held

__all__ = ["command"]

MEMORIES = ("pyramid", "clips")

File = Annotated[Path, typer.Argument(help="A video file, an animated picture, or a folder of frames.")]
Memory = Annotated[str, typer.Option(help="pyramid (frames, finer the more recent) or clips (compressed one by one).")]
Encoder = Annotated[
    str, typer.Option(help="Whose patches are remembered: world-vit, timm:NAME, open_clip:NAME/TAG, hf:FOLDER.")
]
Fps = Annotated[float, typer.Option(help="Frames per second that are looked at.")]
Rate = Annotated[float | None, typer.Option(help="Frames per second of a folder of frames; --fps, or 1.")]
Capacities = Annotated[str, typer.Option(help="pyramid: frames at full, half and quarter side length.")]
Reducer = Annotated[str, typer.Option(help="clips: temporal method that compresses each clip of 16 frames.")]
Chunk = Annotated[int, typer.Option(min=1, help="Frames read and encoded at once.")]
State = Annotated[Path | None, typer.Option(help="File that holds the memory; it is continued when it is there.")]


def command(
    file: File,
    memory: Memory = "pyramid",
    encoder: Encoder = "world-vit",
    fps: Fps = 1.0,
    rate: Rate = None,
    capacities: Capacities = "2,2,12",
    reducer: Reducer = "evs:keep=128",
    chunk: Chunk = 16,
    state: State = None,
    device: AnyDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """Stream a video through a memory with a fixed token budget, and say what it holds as it goes.

    With --state the memory is written after every chunk, and the same command goes on behind the last frame in it.
    """
    from tokenreduce.bench.models import load_model
    from tokenreduce.measure.features import feature_maps
    from tokenreduce.video import open_video
    from tokenreduce.video.remembering import behind, remember

    make = _maker(memory, capacities, reducer, chunk)
    make(None)  # wrong settings show before anything is read
    film = open_video(file, rate=fps if rate is None and file.is_dir() else rate)
    wanted = film.choose(fps=fps)
    bank = make(feature_maps(load_model(encoder, device)))
    if state is not None and state.exists():
        bank = _continued(bank, state)
        complain(f"{state} holds {counted(bank.seen, 'frame')}; going on behind them")
        wanted = behind(film, wanted, bank)
    steps = list(remember(film, wanted, bank, chunk=chunk, state=state))
    _tell(film, file, _rarer(steps), bank.tokens(), as_json)
    if missing := sum(step.missing for step in steps):
        complain(f"{counted(missing, 'frame')} could not be decoded and not remembered")


def _rarer(steps: list[Held]) -> list[Held]:
    """The steps to show, ever rarer, since streams are long; the last one is among them."""
    return [s for i, s in enumerate(steps, 1) if i == len(steps) or i & (i - 1) == 0]


def _tell(film: Video, file: Path, steps: list[Held], recalled: Recalled, as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "frames_seen": s.frames, "video_s": s.seconds, "tokens": s.tokens, "most_tokens": s.most,
                "held_bytes": s.held_bytes, "frame_s": s.frame_s,
            }
            for s in steps
        ]  # fmt: skip
        spans = zip(recalled.spans.tolist(), recalled.lengths, strict=True)
        pieces = [{"from_s": a, "to_s": b, "tokens": n} for (a, b), n in spans]
        missing, warnings = sum(s.missing for s in steps), list(film.warnings)
        print_json({"file": str(file), "rows": rows, "pieces": pieces, "missing": missing, "warnings": warnings})
    else:
        _present(steps, recalled)
    for line in film.warnings:
        complain(line)


def _present(steps: list[Held], recalled: Recalled) -> None:
    from rich.table import Table

    screen = console()
    table = Table("frames seen", "of video", "tokens", "held", "time per frame", box=None, pad_edge=False)
    for s in steps:
        table.add_row(
            str(s.frames), f"{s.seconds:,.0f} s", f"{s.tokens} (at most {s.most})", f"{s.held_bytes / 1e6:.2f} MB",
            f"{s.frame_s * 1e3:.0f} ms",
        )  # fmt: skip
    screen.print(table)
    screen.say(_pieces(recalled))


def _maker(memory: str, capacities: str, reducer: str, chunk: int) -> Any:
    if memory not in MEMORIES:
        raise ValueError(f"--memory is {' or '.join(MEMORIES)}, not {memory!r}")
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
