"""How many operators PyTorch runs for one prefill and one decode step of a patched model:
``python -m tokenreduce.bench.performance.operators``.

Small operators cost time by their number, whatever the machine: each is launched on its own. A count is exact, and the
same on every machine with these releases, where a clock is not. The model is LLaVA-1.5's shape made small; counts do
not depend on its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.shapes import SHAPES, build, prompt
from tokenreduce.common.words import speak_everywhere

__all__ = ["Operators", "count"]

METHODS = ("fastervlm:keep=192", "visionzip:keep=192", "fastv:layer=2,keep=192")


@dataclass(frozen=True)
class Operators:
    """Operators of one ``prefill`` (the vision tower included) and of one decode ``step``."""

    prefill: int
    step: int


class _Counter(TorchDispatchMode):
    """Counts what is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _number(run: Callable[[], Any]) -> tuple[int, Any]:
    with torch.no_grad(), _Counter() as counter:
        out = run()
    return counter.number, out


def count(model: Any, inputs: dict[str, torch.Tensor]) -> Operators:
    """Operators of ``model``, patched or not, for a prompt and for the token behind it."""
    model(**inputs)  # what is made once
    prefill, out = _number(lambda: model(**inputs, use_cache=True))
    token, mask = out.logits[:, -1:].argmax(-1), inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    given = {"input_ids": token, "attention_mask": mask, **cache_as(model, cache_of(out))}
    return Operators(prefill, _number(lambda: model(**given))[0])


def main(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods with their settings.")] = None,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "tiny",
    padded: Annotated[bool, typer.Option(help="A batch of two, one of them padded on the left.")] = False,
) -> None:
    """Print the operators of every method, and how many more than the stock model's they are."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}", param_hint="--shape")
    model = build(SHAPES[shape])
    inputs = prompt(SHAPES[shape], batch=2 if padded else 1)
    if padded:
        inputs["attention_mask"][1, :8] = 0
    stock = count(model, inputs)
    print(f"| method | prefill | decode step |\n|---|---|---|\n| stock | {stock.prefill} | {stock.step} |")
    for method in methods or METHODS:
        with tr.patched(model, method):
            made = count(model, inputs)
        prefill, step = made.prefill - stock.prefill, made.step - stock.step
        print(f"| {method} | {made.prefill} ({prefill:+d}) | {made.step} ({step:+d}) |")


if __name__ == "__main__":
    speak_everywhere()
    typer.run(main)
