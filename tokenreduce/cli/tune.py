"""``tokenreduce tune``: which methods at which budgets, for a model and data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import console

if TYPE_CHECKING:
    from tokenreduce.tuning.search import Tried

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="world-vit, world-llava, timm:NAME, a Hub id or a folder.")],
    data: Annotated[
        str | None, typer.Option(help="What bench takes: images, or a JSONL of questions; the world by default.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="flops=0.4, kv=0.2 or ttft=0.5: shares of the unreduced model.")
    ] = "flops=0.5",
    max_drop: Annotated[float | None, typer.Option(help="Points of the score that may be lost.")] = None,
    stages: Annotated[str | None, typer.Option(help="projector,language,encoder; all by default.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 60,
    limit: Annotated[int, typer.Option(min=1, help="Samples; half of them are held out.")] = 480,
    batch: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 32,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")] = "auto",
    on: Annotated[str, typer.Option(help="Device that ttft is estimated on; see estimate.")] = "h100",
    seed: Annotated[int, typer.Option(help="Draws samples and settings.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a killed search in it goes on.")] = Path(
        "runs/tune"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the trials in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Search methods, settings and a split of the budget; the score is of samples that nothing was chosen on."""
    from tokenreduce.tuning import tune

    log = console(stderr=True)

    def done(tried: Tried, number: int, best: Tried | None) -> None:
        what = f"{100 * tried.share:.1f} %, "
        what += f"score {100 * tried.score:.1f}" if tried.n else "which is as little as it can"
        what = tried.error or what + (" of few samples, thrown out" if tried.thrown and tried.n else "")
        line = f"{number}/{trials} {tried.reduce or '+'.join(map(str, tried.params.values()))}: {what}"
        if best is not None:
            line += f" (best {100 * best.score:.1f} ±{100 * best.stderr:.1f}: {best.reduce})"
        log.say(line)

    found = tune(
        model, data, target, max_drop=max_drop, stages=_list(stages), trials=trials, limit=limit, batch=batch, out=out,
        device=device, on=on, seed=seed, fresh=fresh, done=done,
    )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
        return
    screen = console()
    for line in str(found).splitlines():
        screen.say(line)


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
