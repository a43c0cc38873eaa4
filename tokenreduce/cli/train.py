"""``tokenreduce train``: the training behind the models that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import again
from tokenreduce.common.files import make_folder
from tokenreduce.common.screen import console

__all__ = ["command"]


def _recorded(name: str) -> dict[int, str]:
    """By step, what the card of the embedded weights says of their own training."""
    from tokenreduce.zoo import weights

    made = weights.read_card(name).get("curve") if name in weights.stored() else None
    if not made:
        return {}
    points = zip(made["step"], made["loss"], made["accuracy"], strict=True)
    return {step: f"  (recorded: {loss:.4f}, {100 * accuracy:.2f} %)" for step, loss, accuracy in points}


def command(
    name: Annotated[str, typer.Argument(help="The model to train: digits-vit, world-vit or world-llava.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for checkpoint and weights; runs/train-NAME.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this many minutes in total; run again to go on.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that make training data (world-*); default 1.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile (world-*); needs a C++ compiler on CPU.")
    ] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of an exported world-vit (world-llava); default is the embedded one.")
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write weights and card into --out when training has ended.")
    ] = False,
) -> None:
    """Train an embedded model from scratch, or continue where an earlier call stopped."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from tokenreduce import zoo

    trainable = {
        "digits-vit": "tokenreduce.zoo.digits",
        "world-vit": "tokenreduce.zoo.world_vit",
        "world-llava": "tokenreduce.zoo.world_llava",
    }
    if name not in trainable:
        raise ValueError(f"cannot train {name!r}; trainable models: {', '.join(trainable)}")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes is a positive number, not {minutes:g}")
    import importlib

    from tokenreduce.zoo.training import curve
    from tokenreduce.zoo.training import progress as saved

    more: dict[str, Any] = {"workers": workers, "compiled": compiled or None, "encoder": encoder}
    more = {k: v for k, v in more.items() if v is not None}
    for option in more:
        if name == "digits-vit" or (option == "encoder" and name != "world-llava"):
            raise ValueError(f"--{'compile' if option == 'compiled' else option} is not for {name}")
    again_with = {**more, "compile": more.get("compiled", False)}
    again_with.pop("compiled", None)
    module = importlib.import_module(trainable[name])
    if name == "world-llava":
        more["encoder"] = (zoo.load("world-vit") if encoder is None else zoo.load("world-vit", folder=encoder)).model
    folder = out or Path("runs") / f"train-{name}"
    make_folder(folder, "choose another folder with --out")
    screen = console()
    stages = getattr(module, "STAGES", None)
    steps = module.SCHEDULE.steps if stages is None else sum(s.schedule.steps for s in stages)
    last: dict[str, Any] = {}
    recorded = _recorded(name)
    if found := sorted(folder.glob("checkpoint*.pt")):
        screen.say(f"continuing from {found[-1]}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen) as progress:
        bar = progress.add_task("steps", total=steps)

        def report(row: dict[str, Any]) -> None:
            last.update(row)
            progress.update(bar, completed=row["step"])
            screen.say(
                f"step {row['step']:>6}  loss {row['loss']:.4f}  accuracy {100 * row['accuracy']:.2f} %  "
                f"{row['minutes']:.1f} min{recorded.get(row['step'], '')}"
            )

        try:
            model = module.train(folder, device=device, stop_after=minutes, report=report, **more)
        except KeyboardInterrupt:
            progress.stop()
            screen.say("stopped; the same command continues at the last checkpoint")
            raise typer.Exit(130) from None
        if not last:  # nothing was left to do
            progress.update(bar, completed=steps)
    ended = not last or last["step"] >= steps
    if not ended:
        screen.say(f"stopped at step {last['step']} of {steps}; the same command with more --minutes continues")
    if export:
        done, spent = saved(folder)
        given = {"device": device, "minutes": minutes, **again_with}
        card = {
            "command": again(["train", name], given, {"device": "cpu", "compile": False}),
            "steps": done,
            "minutes": round(spent, 1),
            **({"curve": made} if (made := curve(folder)) else {}),
        }
        facts = zoo.export(model.cpu(), name, card, folder=folder)
        screen.say(f"wrote {folder / name}.safetensors, accuracy {100 * facts['accuracy']:.2f} %")
