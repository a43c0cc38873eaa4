"""Questions about clips to one video language model, unreduced and with each ``--reduce``: a table, and rows as JSONL.

::

    python -m tokenreduce.video.benchmark --model llava-hf/llava-onevision-qwen2-7b-ov-hf --data /data/MVBench \\
        --reduce holitom:keep=0.25 --reduce "vidcom2:keep=0.25+fastv:keep=0.5" --frames 32 --device cuda
    python -m tokenreduce.video.benchmark --model Qwen/Qwen2.5-VL-7B-Instruct --data questions.jsonl --reduce evs

The data is a JSONL file of one's own, a folder of MVBench, Video-MME or EgoSchema with the videos unpacked, or
``world``, the generated clips of the embedded ``world-llava``; see :func:`tokenreduce.bench.clips.load_clips`.
Everything is measured by :class:`tokenreduce.bench.video.VideoTask`; ``tokenreduce bench video`` sweeps methods and
budgets with it, and continues where it was killed.

This is a script: unlike the methods beside it, it imports the benchmark, and no method imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

KEYS = (
    "visual_tokens", "mean_visual_tokens", "gmacs", "visual_share", "share", "accuracy", "agreement", "speedup",
    "first_token_s", "tower_s", "decode_s", "tokens_per_frame", "cache_bytes",
)  # fmt: skip


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def command(
    model: Annotated[str, typer.Option(help="world-llava, a Hub id, or a folder with model and processor.")],
    data: Annotated[str, typer.Option(help="world, a JSONL file, or a folder of MVBench, Video-MME or EgoSchema.")],
    reduce: Annotated[
        list[str] | None, typer.Option(help="Methods such as 'holitom:keep=0.25'; may be repeated, each gives one row.")
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, jsonl, mvbench, videomme or egoschema.")] = "auto",
    split: Annotated[str, typer.Option(help="Part of the world.")] = "test",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip, spread evenly; 8 by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, in place of --frames.")] = None,
    sampling: Annotated[str, typer.Option(help="uniform or diverse.")] = "uniform",
    limit: Annotated[int | None, typer.Option(help="Questions, drawn by --seed; all by default.")] = None,
    batch: Annotated[int, typer.Option(help="Clips per forward.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed rounds per row; 0 measures no time.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File that gets each row as a JSON line.")] = None,
) -> None:
    """Evaluate one video language model on questions about clips, unreduced and with each --reduce."""
    from tokenreduce.bench.script import run_script
    from tokenreduce.bench.video import VideoTask
    from tokenreduce.bench.vlms import pick_device
    from tokenreduce.cli.shared import quiet_bars
    from tokenreduce.core.registry import parse

    chosen = [parse(text, stage="projector") for text in reduce or []]
    task = VideoTask(
        model=model, data=data, layout=layout, split=split, frames=frames, fps=fps, sampling=sampling, limit=limit,
        batch=batch, max_new_tokens=max_new_tokens, device=str(pick_device(device)), dtype=dtype, repeats=repeats,
        seed=seed,
    )  # fmt: skip
    quiet_bars()
    run_script(task, chosen, f"{model} on {data}", _table, out, "question")


def _table(rows: list[dict[str, Any]], width: int) -> Any:
    from rich.table import Table

    from tokenreduce.bench.columns import BY_TYPE, COLUMNS, Column, cell
    from tokenreduce.common.words import counted

    shown = [c for c in COLUMNS if c.key in KEYS and any(row.get(c.key) is not None for row in rows)]
    kinds = [k for k in rows[0] if k.startswith(BY_TYPE) and not k.endswith("_stderr")]
    shown += [Column(k, f"{k.removeprefix(BY_TYPE)} %", lambda v: f"{100 * v:.1f}", "") for k in kinds]
    made = Table(
        title=f"{counted(rows[0]['questions'], 'question')}, {counted(rows[0]['frames'], 'frame')} of each clip"
    )
    made.title_justify = "left"
    made.add_column("method", overflow="fold")
    for column in shown:
        made.add_column(column.label, justify="right", no_wrap=width >= 200)
    for row in rows:
        made.add_row(row["method"], *(cell(row, column) for column in shown))
    return made


def main() -> None:
    """Entry point: bad input becomes one message and exit status 2."""
    from tokenreduce.cli.shared import run_program

    run_program(app, "python -m tokenreduce.video.benchmark")


if __name__ == "__main__":
    main()
