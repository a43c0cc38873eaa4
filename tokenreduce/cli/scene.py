"""``tokenreduce scene``: a picture of the generated world, with questions that the embedded models can answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli.shared import picture_format, print_json, save_picture
from tokenreduce.common.screen import console

__all__ = ["command"]


def command(
    out: Annotated[Path, typer.Argument(help="Where the picture goes.")] = Path("scene.png"),
    seed: Annotated[
        int, typer.Option(min=0, help="Scene of the test split, from 0; no embedded model was trained on these.")
    ] = 7,
    objects: Annotated[str, typer.Option(help="How many things are there: 4, or 3-6.")] = "3-6",
    questions: Annotated[int, typer.Option(min=0, help="How many questions to print.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Draw a scene and print questions about it with their answers."""
    from PIL import Image
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from tokenreduce.zoo.world import SPLITS, ask, scene

    picture_format(out, "OUT")
    span = SPLITS["test"]
    if seed >= len(span):
        raise ValueError(f"--seed is 0 to {len(span) - 1}, not {seed}: the test split ends there")
    made = scene(span[seed], objects=_range(objects))
    asked = ask(made, span[seed], questions)
    save_picture(Image.fromarray(made.image), out, "OUT")
    things = [f"{thing.colour} {thing.kind}" for thing in made.objects]
    if as_json:
        lines = [{"question": q.text, "answer": q.answer, "type": q.type} for q in asked]
        print_json({"out": str(out), "background": made.background, "things": things, "questions": lines})
        return
    screen = console()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("question", "answer", "type"):
        table.add_column(head)
    for question in asked:
        table.add_row(question.text, question.answer, question.type)
    if questions:
        screen.print(table)
    screen.say(f"wrote {out}: {', '.join(things)}, on {made.background}")


def _range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise ValueError(f"--objects is a number or a range such as 3-6, not {text!r}") from None
