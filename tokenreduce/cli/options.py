"""Options that several commands share, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Against", "Answer", "AnyDevice", "AsJson", "BenchJson", "Classes", "Dtype", "Fresh", "Full", "Llm", "LlmDevice",
    "Methods", "Reduce", "Repeats", "RunFolder", "Split", "Stage", "Workers",
]  # fmt: skip

#: The option of commands that print one table or text.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
#: A device for models of images.
AnyDevice = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]

# -- image and video language models -----------------------------------------------------------------------------------
Llm = Annotated[str, typer.Option(help="world-llava, world-llava-2, a Hub id, or a folder with model and processor.")]
LlmDevice = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto (as the weights are stored), fp32, bf16 or fp16.")]

# -- bench -------------------------------------------------------------------------------------------------------------
Methods = Annotated[str | None, typer.Option(help="Methods and wildcards, 'tome,pi*' or '*'; a few by default.")]
Reduce = Annotated[
    list[str] | None, typer.Option(help="Methods with explicit settings, 'tome:r=4' or 'a+b'; may be repeated.")
]
Repeats = Annotated[int | None, typer.Option(min=0, help="Timed rounds per row; 3 by default, 15 with --full.")]
Workers = Annotated[
    int,
    typer.Option(min=1, help="Processes that share the questions, each with the model (on cuda, all GPUs in turn)."),
]
Stage = Annotated[
    str, typer.Option(help="Where methods act: before (projector), inside (language), in the tower (encoder).")
]
Split = Annotated[str, typer.Option(help="Part of the world to ask about.")]
Answer = Annotated[
    int, typer.Option(min=1, help="Longest answer; the world is answered with one word, world2 with up to 64.")
]
Against = Annotated[
    str,
    typer.Option(
        "--axis",
        help="What budgets are shares of: flops, tokens (visual ones in the language model), or, of pictures, kv "
        "(bytes of keys and values, long answers).",
    ),
]
RunFolder = Annotated[Path, typer.Option("--out", "-o", help="Run folder; an earlier run in it is continued.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in --out first.")]
Full = Annotated[bool, typer.Option("--full", help="All methods and inputs, and more timed rounds.")]
BenchJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables; progress goes to standard error.")
]
Classes = Annotated[str | None, typer.Option(help="Class names: a text file with one per line, or 'imagenet'.")]
