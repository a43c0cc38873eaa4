"""How many operators PyTorch runs for one prefill and one decode step of a patched model:
``python -m tokenreduce.bench.performance.language_operators``.

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

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.shapes import SHAPES, build, prompt
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.operators import count_operators

__all__ = ["Operators", "count"]

METHODS = ("fastervlm:keep=192", "visionzip:keep=192", "fastv:layer=2,keep=192")


@dataclass(frozen=True)
class Operators:
    """Operators of one ``prefill`` (the vision tower included) and of one decode ``step``."""

    prefill: int
    step: int


def _number(model: Any, run: Callable[[], Any]) -> tuple[int, Any]:
    made = []
    with torch.no_grad():
        counted = count_operators(model, lambda: made.append(run()), [])
    return counted.total, made[-1]


def count(model: Any, inputs: dict[str, torch.Tensor]) -> Operators:
    """Operators of ``model``, patched or not, for a prompt and for the token behind it."""
    model(**inputs)  # what is made once
    prefill, out = _number(model, lambda: model(**inputs, use_cache=True))
    token, mask = out.logits[:, -1:].argmax(-1), inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    given = {"input_ids": token, "attention_mask": mask, **cache_as(model, cache_of(out))}
    return Operators(prefill, _number(model, lambda: model(**given))[0])


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
