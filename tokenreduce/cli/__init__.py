"""The command line: ``tokenreduce methods | describe | show | generate | stream | bench | report | train | ...``.

One file per command; whatever is heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from tokenreduce.cli import (
    bench,
    bench_video,
    demo,
    describe,
    estimate,
    generate,
    methods,
    report,
    scene,
    show,
    stream,
    train,
    tune,
)
from tokenreduce.cli.shared import Friendly, set_debug

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Friendly,
    help="Fewer tokens for vision transformers and image/video language models, without training.",
    no_args_is_help=True,
    epilog="Example: tokenreduce describe timm:vit_base_patch16_224 --reduce 'tome:r=16'",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import tokenreduce

        typer.echo(f"tokenreduce {tokenreduce.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fewer tokens for vision transformers and image/video language models, without training."""
    set_debug(debug)


#: What stands below the options of every command.
EXAMPLES = {
    "methods": "tokenreduce methods 'to*' --stage encoder",
    "describe": "tokenreduce describe timm:vit_base_patch16_224 --reduce 'tome:r=16'",
    "estimate": "tokenreduce estimate Qwen/Qwen2.5-VL-7B-Instruct --reduce 'visionzip:keep=0.2' --device h100",
    "tune": "tokenreduce tune world-llava --target flops=0.4 --trials 40",
    "calibrate": "tokenreduce calibrate --dtype fp32",
    "show": "tokenreduce show timm:vit_base_patch16_224 cat.jpg --reduce 'tome:r=13' -o cat_tokens.png",
    "generate": "tokenreduce generate llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt 'What is this?' "
    "--reduce 'visionzip:keep=64+fastv:layer=2,keep=0.5'",
    "bench vision": "tokenreduce bench vision --model timm:deit_small_patch16_224 --data /data/imagenet/val --budgets "
    "0.75,0.5 --methods 'tome,pitome'",
    "bench vlm": "tokenreduce bench vlm --model llava-hf/llava-1.5-7b-hf --data questions.jsonl --budgets 0.25",
    "bench video": "tokenreduce bench video --model Qwen/Qwen2.5-VL-7B-Instruct --data /data/MVBench --frames 16",
    "stream": "tokenreduce stream film.mp4 --fps 1 --state memory.safetensors",
    "report": "tokenreduce report runs/vision runs/other --out runs/both",
    "train": "tokenreduce train digits-vit --out runs/digits --export",
    "scene": "tokenreduce scene scene.png --seed 7 --questions 8",
    "demo": "tokenreduce demo --model timm:vit_base_patch16_224 --port 7860",
}
COMMANDS: tuple[tuple[str, Any], ...] = (
    ("methods", methods.command), ("describe", describe.command), ("estimate", estimate.command),
    ("calibrate", estimate.calibrate), ("tune", tune.command), ("show", show.command),
    ("generate", generate.command), ("stream", stream.command), ("report", report.command), ("train", train.command),
    ("scene", scene.command), ("demo", demo.command),
)  # fmt: skip
for _name, _command in COMMANDS:
    app.command(_name, epilog=f"Example: {EXAMPLES[_name]}")(_command)
    if _name == "generate":
        app.add_typer(bench.app, name="bench")
for _name, _command in (("vision", bench.vision), ("vlm", bench.vlm), ("video", bench_video.command)):
    bench.app.command(_name, epilog=f"Example: {EXAMPLES[f'bench {_name}']}")(_command)


def main() -> None:
    """Entry point of the ``tokenreduce`` script and of ``python -m tokenreduce``."""
    sys.exit(app(prog_name="tokenreduce"))
