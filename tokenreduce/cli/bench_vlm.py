"""``tokenreduce bench vlm``: methods x budgets on one image language model and questions about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.bench import Extent, data_of, run
from tokenreduce.cli.bench_server import Concurrency, Keep, Prompt, Server, Timeout, ask_server, check_local
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
    Workers,
)
from tokenreduce.cli.shared import quiet_bars

__all__ = ["command"]

#: Budgets where --budgets says nothing, without and with --full.
BUDGETS = {
    "flops": ("0.5,0.35", "0.75,0.5,0.35"), "tokens": ("0.25,0.1", "0.5,0.25,0.1"), "kv": ("0.25,0.1", "0.5,0.25,0.1"),
}  # fmt: skip
#: Questions where --limit and --full say nothing.
QUICK = 110
#: Words of the longest answer in the second world, in place of the default.
LONGEST = 64

Data = Annotated[
    str | None,
    typer.Option(
        help="world, world2 (what world-llava-2 has learned), world2-all, or a JSONL file: "
        '{"image": path, "question": ..., "answer": ..., "type": ...}.'
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        help="Shares of --axis that are left; 0.5,0.35 by default, 0.75,0.5,0.35 with --full; of tokens and kv "
        "0.25,0.1 and 0.5,0.25,0.1."
    ),
]
#: What --axis takes, and the stages that are measured then.
AXES = {"flops": "projector,language,encoder", "tokens": "projector,language,encoder", "kv": "cache"}
Stages = Annotated[
    str | None,
    typer.Option(help="Stages to measure: projector,language,encoder; cache with --axis kv."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions to ask; 110 by default.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions per forward.")]


def command(
    ctx: typer.Context,
    model: Llm = "world-llava-2",
    data: Data = None,
    split: Split = "test",
    stage: Stages = None,
    methods: Methods = None,
    budgets: Budgets = None,
    reduce: Reduce = None,
    limit: Limit = None,
    batch: Batch = 32,
    max_new_tokens: Answer = 16,
    workers: Workers = 1,
    engine: Engine = "processes",
    address: Address = None,
    device: LlmDevice = "auto",
    dtype: Dtype = "auto",
    repeats: Repeats = None,
    out: RunFolder = Path("runs/vlm"),
    fresh: Fresh = False,
    full: Full = False,
    axis: Against = "flops",
    server: Server = None,
    concurrency: Concurrency = 32,
    keep: Keep = None,
    prompt: Prompt = None,
    timeout: Timeout = 120.0,
    as_json: BenchJson = False,
) -> None:
    """Image language models: accuracy by question type, visual tokens, FLOPs, time to first token and KV cache.

    Budgets are shares of the FLOPs of vision encoder and prefill; with --axis tokens, of the visual tokens, averaged
    over the language model's layers. With --axis kv, methods of the cache stage are measured: budgets are shares of the
    bytes of keys and values, and answers are long. With --server
    the questions go to an OpenAI-compatible server: accuracy, prompt tokens, latency and throughput. A killed run
    continues where it stopped when the same command is given again.
    """
    if server is not None:
        return ask_server(ctx, QUICK)
    check_local(ctx)
    if axis not in AXES:
        raise ValueError(f"--axis is one of {', '.join(AXES)}, not {axis!r}")
    stages = tuple(s.strip() for s in (stage or AXES[axis]).split(",") if s.strip())
    if "cache" in stages and axis != "kv":
        raise ValueError(
            "stages are among projector, language, encoder; methods of the cache stage leave all visual tokens, and "
            "are measured with --axis kv"
        )
    data = data_of(model, data, "a JSONL file with questions")
    extent = Extent.of(ctx)
    from tokenreduce.bench.cached import CacheTask
    from tokenreduce.bench.questions import SECOND
    from tokenreduce.bench.vlm import VlmTask
    from tokenreduce.bench.vlms import pick_device

    if data in SECOND and max_new_tokens == 16:
        max_new_tokens = LONGEST
    place = str(pick_device(device))
    if axis == "kv" and workers > 1:
        raise ValueError("--workers shares questions; with --axis kv a few long answers are measured, by one process")
    kind = CacheTask if axis == "kv" else VlmTask
    task = kind(
        model=model, data=data, split=split, limit=extent.most(QUICK), batch=batch, device=place, dtype=dtype,
        repeats=extent.repeats, max_new_tokens=max_new_tokens,
        stages=stages, against=axis, few=extent.few, workers=workers, engine=pool_maker(engine, address, workers),
    )  # fmt: skip
    extent.say(extent.cut("asking", QUICK, "question"), stages=True, as_json=as_json)
    quiet_bars()
    run(ctx, {out: task}, budgets=BUDGETS[axis], device=place)
