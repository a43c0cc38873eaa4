"""``tokenreduce train``: the training behind the models that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.shared import again, progress_bar
from tokenreduce.common.files import make_folder
from tokenreduce.common.screen import Screen, console

if TYPE_CHECKING:
    from tokenreduce.zoo.trainable import Trainable

__all__ = ["command"]

Name = Annotated[
    str,
    typer.Argument(
        help="The model to train: digits-vit, world-vit, world-llava, world-vit-2, world-llava-2 or world-clip-2."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for checkpoint and weights; runs/train-NAME.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after this many minutes in total; run again to go on.")]
Workers = Annotated[int | None, typer.Option(help="Processes that make training data (world-*); default 1.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Use torch.compile (world-*); needs a C++ compiler on CPU.")]
Encoder = Annotated[
    Path | None,
    typer.Option(help="Folder of an exported world-vit (world-llava) or world-vit-2; default is the embedded one."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Go on from these weights of the same model (world-*-2): embedded, or a folder that --export wrote; by "
        "default they start from the first world's.",
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(help="Only these stages of the training (world-*-2), such as named,whole; needs a folder of its own."),
]
Average = Annotated[
    float | None,
    typer.Option(
        help="With --from: what is exported is so much of the trained weights and the rest of those it went on from "
        "(arXiv 2109.01903), which keeps what a short training forgets; in (0, 1)."
    ),
]
#: How often it is said how far measuring is, beside the bar.
TOLD = 10
#: Options whose names are not those of the arguments.
SPELT = {"compiled": "compile", "start": "from"}
Export = Annotated[bool, typer.Option("--export", help="Write weights and card into --out when training has ended.")]


def command(
    name: Name,
    out: Out = None,
    device: Device = "cpu",
    minutes: Minutes = None,
    workers: Workers = None,
    compiled: Compiled = False,
    encoder: Encoder = None,
    start: From = None,
    stages: Stages = None,
    average: Average = None,
    export: Export = False,
) -> None:
    """Train an embedded model from scratch, or continue where an earlier call stopped."""
    from tokenreduce.zoo import weights
    from tokenreduce.zoo.trainable import trainable

    lesson = trainable(name)
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes is a positive number, not {minutes:g}")
    if average is not None and (start is None or not export or not 0 < average < 1):
        raise ValueError("--average is a number between 0 and 1, and goes with --from and --export")
    more: dict[str, Any] = {"workers": workers, "compiled": compiled or None, "encoder": encoder}
    more["stages"] = None if stages is None else tuple(name.strip() for name in stages.split(","))
    more["start"] = weights.FOLDER if start == "embedded" else None if start is None else Path(start)
    more = {k: v for k, v in more.items() if v is not None}
    for option in more:
        if option not in lesson.takes:
            raise ValueError(f"--{SPELT.get(option, option)} is not for {name}")
    steps = lesson.steps_of(more.get("stages"))
    folder = out or Path("runs") / f"train-{name}"
    make_folder(folder, "choose another folder with --out")
    screen = console()
    model, at = _trained(lesson, folder, screen, device=device, minutes=minutes, **more)
    if at is not None and at < steps:
        screen.say(f"stopped at step {at} of {steps}; the same command with more --minutes continues")
    if export:
        if average is not None:
            lesson.average(model, more["start"], average)
        given = {"device": device, "minutes": minutes, **more, "compile": more.get("compiled", False)}
        given.pop("compiled", None)
        if stages is not None:
            given["stages"] = stages
        if given.pop("start", None) is not None:
            given["from"] = start
        if average is not None:
            given["average"] = average
        _export(model, name, folder, screen, again(["train", name], given, {"device": "cpu", "compile": False}))


def _trained(lesson: Trainable, folder: Path, screen: Screen, **settings: Any) -> tuple[Any, int | None]:
    """Train with a bar; the model, and the step that was reached in this call, None where nothing was left to do."""
    chosen = settings.get("stages")
    recorded, steps = {} if chosen else lesson.recorded(), lesson.steps_of(chosen)
    last: dict[str, Any] = {}
    if found := sorted(folder.glob("checkpoint*.pt")):
        screen.say(f"continuing from {found[-1]}")
    with progress_bar(screen) as progress:
        bar = progress.add_task("steps", total=steps)

        def report(row: dict[str, Any]) -> None:
            last.update(row)
            progress.update(bar, completed=row["step"])
            then = ""
            if row["step"] in recorded:
                loss, accuracy = recorded[row["step"]]
                then = f"  (recorded: {loss:.4f}, {100 * accuracy:.2f} %)"
            screen.say(
                f"step {row['step']:>6}  loss {row['loss']:.4f}  accuracy {100 * row['accuracy']:.2f} %  "
                f"{row['minutes']:.1f} min{then}"
            )

        try:
            model = lesson.train(folder, report=report, **settings)
        except KeyboardInterrupt:
            progress.stop()
            screen.say("stopped; the same command continues at the last checkpoint")
            raise typer.Exit(130) from None
        if not last:  # nothing was left to do
            progress.update(bar, completed=steps)
    return model, last.get("step")


def _export(model: Any, name: str, folder: Path, screen: Screen, command: str) -> None:
    from tokenreduce import zoo
    from tokenreduce.zoo.training import curve, progress

    done, spent = progress(folder)
    card: dict[str, Any] = {"command": command, "steps": done, "minutes": round(spent, 1)}
    if made := curve(folder):
        card["curve"] = made
    screen.say("measuring on held-out data what the weights can do, rounded as they are stored")
    with progress_bar(screen) as bars:

        def told(done: int, total: int) -> None:
            if not bars.tasks:
                bars.add_task("batches", total=total)
            bars.update(bars.tasks[0].id, completed=done)
            if done * TOLD // total > (done - 1) * TOLD // total:  # logs have no bar
                screen.say(f"measured {done} of {total} batches")

        facts = zoo.export(model.cpu(), name, card, folder=folder, progress=told)
    screen.say(f"wrote {folder / name}.safetensors, accuracy {100 * facts['accuracy']:.2f} %")
