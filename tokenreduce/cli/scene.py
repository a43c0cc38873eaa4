"""``tokenreduce scene``: a picture of a generated world, with questions that the embedded models can answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    world: Annotated[
        int, typer.Option(min=1, max=2, help="Which world: 1, or 2 with signs and documents (world-*-2).")
    ] = 1,
    text: Annotated[
        list[str] | None, typer.Option(help="Text of a sign, 1 to 4 digits and letters (--world 2); may be repeated.")
    ] = None,
    type: Annotated[
        list[str] | None, typer.Option(help="Type of question to ask, for example read; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Draw a scene and print questions about it with their answers."""
    from PIL import Image
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from tokenreduce.zoo import world as first
    from tokenreduce.zoo import world2 as second

    picture_format(out, "OUT")
    span = first.SPLITS["test"]
    if seed >= len(span):
        raise ValueError(f"--seed is 0 to {len(span) - 1}, not {seed}: the test split ends there")
    if text and world != 2:
        raise ValueError("--text is for the signs of --world 2; the first world has none")
    made: Any
    asked: list[first.Question]
    if world == 2:
        made = second.scene(span[seed], objects=_range(objects), texts=text)
        asked = second.ask(made, span[seed], questions, type)
    else:
        made = first.scene(span[seed], objects=_range(objects))
        asked = first.ask(made, span[seed], questions, type)
    save_picture(Image.fromarray(made.image), out, "OUT")
    things = [f"{thing.colour} {thing.kind}" for thing in made.objects]
    things += [f"{sign.colour} sign {sign.text.upper()}" for sign in getattr(made, "signs", ())]
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
