"""``tokenreduce bench video``: methods x budgets on one video language model and questions about clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.bench import FULL_REPEATS, REPEATS, Json, run
from tokenreduce.common.screen import console
from tokenreduce.common.words import counted

__all__ = ["command"]

#: Budgets where --budgets says nothing, without and with --full.
BUDGETS = ("0.25", "0.5,0.25,0.1")
#: Questions where --limit and --full say nothing.
QUICK = 96


def command(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="world-llava, a Hub id, or a folder with model and processor.")] = (
        "world-llava"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help='world, a JSONL file ({"video": path, "question": ..., "answer": ..., "options": [...], "type": ...}; '
            "options and type may be left out), or a folder of MVBench, Video-MME or EgoSchema."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="jsonl, mvbench, videomme or egoschema; auto looks at what is there.")
    ] = "auto",
    split: Annotated[str, typer.Option(help="Part of the world to ask about.")] = "test",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip, spread evenly; 8 by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, in place of --frames.")] = None,
    sampling: Annotated[
        str, typer.Option(help="uniform, or diverse: the --frames that differ most as small pictures.")
    ] = "uniform",
    stage: Annotated[
        str, typer.Option(help="Where methods act: before (projector), inside (language), in the tower (encoder).")
    ] = "projector,language,encoder",
    methods: Annotated[
        str | None, typer.Option(help="Methods and wildcards, 'holitom,ev*,random@language' or '*'; a few by default.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Shares of the visual tokens that stay, averaged over the language model's layers; 0.25 by default, "
            "0.5,0.25,0.1 with --full."
        ),
    ] = None,
    reduce: Annotated[
        list[str] | None,
        typer.Option(help="Methods with explicit settings, 'holitom:keep=0.25+fastv:keep=0.5'; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions to ask; 96 by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips per forward.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer; the world is answered with one word.")
    ] = 16,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as the weights are stored), fp32, bf16 or fp16.")] = "auto",
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Timed rounds per row; 3 by default, 15 with --full.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an earlier run in it is continued.")] = Path(
        "runs/video"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in --out first.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All methods and questions, and more timed rounds.")] = False,
    as_json: Json = False,
) -> None:
    """Video language models: accuracy by question type, tokens per frame, FLOPs, time of every part and KV cache.

    Clips that are missing or broken and answers that are not among the options are listed and left out. A killed run
    continues where it stopped when the same command is given again.
    """
    if data is None:
        if model != "world-llava":
            raise ValueError(f"--data is needed for {model}: a JSONL file or a folder (world for world-llava)")
        data = "world"
    if full and limit is not None:
        raise ValueError("give --full or --limit, not both")
    if frames is not None and fps is not None:
        raise ValueError("give --frames or --fps, not both")
    from tokenreduce.bench.video import VideoTask
    from tokenreduce.bench.vlms import pick_device
    from tokenreduce.cli.generate import quiet_bars

    place = str(pick_device(device))
    few = not full and methods is None
    task = VideoTask(
        model=model, data=data, layout=layout, split=split, frames=frames, fps=fps, sampling=sampling,
        limit=limit if limit is not None or full else QUICK, batch=batch, device=place, dtype=dtype,
        repeats=repeats if repeats is not None else FULL_REPEATS if full else REPEATS, max_new_tokens=max_new_tokens,
        stages=tuple(s.strip() for s in stage.split(",") if s.strip()), few=few,
    )  # fmt: skip
    said = [] if limit is not None or full else [f"asking at most {counted(QUICK, 'question')} (--limit changes that)"]
    if few and not reduce:
        said.append("sweeping a few methods of each stage (--methods '*' takes all)")
    if said:
        console(stderr=as_json).say(f"{'; '.join(said)}; --full takes everything")
    quiet_bars()
    budgets = budgets or BUDGETS[full]
    run(
        ctx,
        {out: task},
        out,
        methods=methods,
        budgets=budgets,
        reduce=reduce or [],
        fresh=fresh,
        device=place,
        as_json=as_json,
    )
