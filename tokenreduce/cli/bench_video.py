"""``tokenreduce bench video``: methods x budgets on one video language model and questions about clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.bench import Extent, data_of, run
from tokenreduce.cli.engines import Address, Engine, pool_maker
from tokenreduce.cli.options import (
    Against,
    Answer,
    BenchJson,
    Dtype,
    Fresh,
    Full,
    Llm,
    LlmDevice,
    Methods,
    Reduce,
    Repeats,
    RunFolder,
    Split,
    Stage,
    Workers,
)
from tokenreduce.cli.shared import quiet_bars

__all__ = ["command"]

#: Budgets where --budgets says nothing, without and with --full.
BUDGETS = {"tokens": ("0.25", "0.5,0.25,0.1"), "flops": ("0.5", "0.75,0.5,0.35")}
#: Questions where --limit and --full say nothing.
QUICK = 96

Data = Annotated[
    str | None,
    typer.Option(
        help="world, world2 (what world-llava-2 has learned), world2-all, a JSONL file "
        '({"video": path, "question": ..., "answer": ..., "options": [...], "type": ...}; '
        "options and type may be left out), or a folder of MVBench, Video-MME or EgoSchema."
    ),
]
Layout = Annotated[str, typer.Option(help="jsonl, mvbench, videomme or egoschema; auto looks at what is there.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a clip, spread evenly; 8 by default, 16 of world2.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second, in place of --frames.")]
Sampling = Annotated[str, typer.Option(help="uniform, or diverse: the --frames that differ most as small pictures.")]
FrameCacheSize = Annotated[
    float,
    typer.Option("--frame-cache", help="Gigabytes of decoded frames kept on the disk between runs; 0 keeps none."),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        help="Shares of --axis that are left; 0.25 by default, 0.5,0.25,0.1 with --full; of flops 0.5 and "
        "0.75,0.5,0.35."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions to ask; 96 by default.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips per forward.")]


def command(
    ctx: typer.Context,
    model: Llm = "world-llava",
    data: Data = None,
    layout: Layout = "auto",
    split: Split = "test",
    frames: Frames = None,
    fps: Fps = None,
    sampling: Sampling = "uniform",
    frame_cache: FrameCacheSize = 4.0,
    stage: Stage = "projector,language,encoder",
    methods: Methods = None,
    budgets: Budgets = None,
    reduce: Reduce = None,
    limit: Limit = None,
    batch: Batch = 8,
    max_new_tokens: Answer = 16,
    workers: Workers = 1,
    engine: Engine = "processes",
    address: Address = None,
    device: LlmDevice = "auto",
    dtype: Dtype = "auto",
    repeats: Repeats = None,
    out: RunFolder = Path("runs/video"),
    fresh: Fresh = False,
    full: Full = False,
    axis: Against = "tokens",
    as_json: BenchJson = False,
) -> None:
    """Video language models: accuracy by question type, tokens per frame, FLOPs, time of every part and KV cache.

    Budgets are shares of the visual tokens, averaged over the language model's layers: the encoder sees every frame
    whole, so that methods behind it could not come down to a share of the FLOPs (--axis flops). Clips that are missing
    or broken and answers that are not among the options are listed and left out. A killed run continues where it
    stopped when the same command is given again.
    """
    data = data_of(model, data, "a JSONL file or a folder")
    extent = Extent.of(ctx)
    if axis not in BUDGETS:
        raise ValueError(f"--axis is one of {', '.join(BUDGETS)}, not {axis!r}")
    if frames is not None and fps is not None:
        raise ValueError("give --frames or --fps, not both")
    from tokenreduce.bench.video import VideoTask
    from tokenreduce.bench.vlms import pick_device

    place = str(pick_device(device))
    task = VideoTask(
        model=model, data=data, layout=layout, split=split, frames=frames, fps=fps, sampling=sampling,
        frame_cache=frame_cache, limit=extent.most(QUICK), batch=batch, device=place, dtype=dtype,
        repeats=extent.repeats, against=axis, max_new_tokens=max_new_tokens, few=extent.few, workers=workers,
        engine=pool_maker(engine, address, workers), stages=tuple(s.strip() for s in stage.split(",") if s.strip()),
    )  # fmt: skip
    extent.say(extent.cut("asking", QUICK, "question"), stages=True, as_json=as_json)
    quiet_bars()
    run(ctx, {out: task}, budgets=BUDGETS[axis], device=place)
