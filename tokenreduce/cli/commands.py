"""The table of commands, and groups that import a command when it is used.

A new command is a module here with a function ``command``, and a line in :data:`COMMANDS`. What the module imports at
its top must be light (no torch, no numpy): help, completion and errors of usage are answered from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["COMMANDS", "GROUPS", "HELP", "Entry", "Tree", "build"]

HELP: dict[str, list[str]] = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True)
class Entry:
    """One command: what is typed (``"bench vision"`` is ``vision`` of the group ``bench``), and an example of what may
    stand behind that, which its help shows. Its module is ``tokenreduce.cli.bench_vision``."""

    name: str
    example: str

    @property
    def module(self) -> str:
        return f"tokenreduce.cli.{self.name.replace(' ', '_').replace('-', '_')}"


#: In the order of the help page.
COMMANDS = (
    Entry("methods", "'to*' --stage encoder"),
    Entry("models", "--library transformers"),
    Entry("describe", "timm:vit_base_patch16_224 --reduce 'tome:r=16'"),
    Entry("estimate", "Qwen/Qwen2.5-VL-7B-Instruct --reduce 'visionzip:keep=0.2' --device h100"),
    Entry("tune", "world-llava --target flops=0.4 --trials 40"),
    Entry("calibrate", "--dtype fp32"),
    Entry("show", "timm:vit_base_patch16_224 cat.jpg --reduce 'tome:r=13' -o cat_tokens.png"),
    Entry(
        "generate",
        "llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt 'What is this?' "
        "--reduce 'visionzip:keep=64+fastv:layer=2,keep=0.5'",
    ),
    Entry(
        "bench vision",
        "--model timm:deit_small_patch16_224 --data /data/imagenet/val --budgets 0.75,0.5 --methods 'tome,pitome'",
    ),
    Entry("bench vlm", "--model llava-hf/llava-1.5-7b-hf --data questions.jsonl --budgets 0.25"),
    Entry("bench video", "--model Qwen/Qwen2.5-VL-7B-Instruct --data /data/MVBench --frames 16"),
    Entry("serve", "llava-hf/llava-1.5-7b-hf --reduce 'fastervlm:keep=64' --port 8000"),
    Entry("encode", "timm:vit_base_patch16_clip_224.openai photos --reduce 'tome:r=13' --workers 4"),
    Entry("export", "timm:vit_base_patch16_224 --reduce 'tome:r=13' --format onnx"),
    Entry("heads", "llava-hf/llava-1.5-7b-hf --out llava_heads.json"),
    Entry("stream", "film.mp4 --fps 1 --state memory.safetensors"),
    Entry("ask-stream", "Qwen/Qwen2.5-VL-7B-Instruct film.mp4 --ask 'What happened?' --at 30,90"),
    Entry(
        "eval",
        "--model llava-hf/llava-1.5-7b-hf --tasks mme,textvqa --reduce 'divprune:keep=64' --reduce 'visionzip:keep=64'",
    ),
    Entry("report", "runs/vision runs/other --out runs/both"),
    Entry("train", "digits-vit --out runs/digits --export"),
    Entry("scene", "scene.png --seed 7 --questions 8"),
    Entry("demo", "--model timm:vit_base_patch16_224 --port 7860"),
)
#: What the help of a group says, and its example.
GROUPS = {
    "bench": (
        "Measure methods at several budgets on real input.",
        "Example: tokenreduce bench vision --model digits-vit --budgets 0.5",
    )
}


def build(entry: Entry) -> Any:
    """The command of ``entry``; imports its module."""
    app = typer.Typer(add_completion=False)
    epilog = f"Example: tokenreduce {entry.name} {entry.example}"
    function = importlib.import_module(entry.module).command
    app.command(entry.name.rpartition(" ")[2], epilog=epilog, context_settings=HELP)(function)
    return typer.main.get_command(app)


def group(name: str) -> Any:
    """The group of the commands whose first word is ``name``."""
    said, epilog = GROUPS[name]
    app = typer.Typer(
        cls=Tree, name=name, help=said, epilog=epilog, no_args_is_help=True, add_completion=False,
        context_settings=HELP,
    )  # fmt: skip
    app.callback()(lambda: None)
    return typer.main.get_command(app)


class Lazy(MutableMapping[str, Any]):
    """The commands behind ``words`` by name, each made when it is asked for; what is set stands behind them."""

    def __init__(self, words: str = "") -> None:
        self.entries: dict[str, Entry | None] = {}
        for entry in COMMANDS:
            if entry.name.startswith(words):
                first, _, rest = entry.name.removeprefix(words).partition(" ")
                self.entries[first] = None if rest else entry
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            entry = self.entries[name]
            self.made[name] = group(name) if entry is None else build(entry)
        return self.made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self.entries.setdefault(name, None)
        self.made[name] = command

    def __delitem__(self, name: str) -> None:
        del self.entries[name]
        self.made.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Tree(TyperGroup):
    """A group whose commands come from :data:`COMMANDS`: all first words, or those behind the group's own name."""

    def __init__(self, **settings: Any) -> None:
        name = settings.get("name")
        settings["commands"] = Lazy(f"{name} " if name in GROUPS else "")
        super().__init__(**settings)
