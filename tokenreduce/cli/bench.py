"""``tokenreduce bench``: methods x budgets on one model and one data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.shared import again, numbers, print_json
from tokenreduce.common.screen import Screen, complain, console
from tokenreduce.common.words import counted

if TYPE_CHECKING:
    from tokenreduce.bench.sweep import Point
    from tokenreduce.bench.task import Task

__all__ = ["Json", "app", "run"]

#: The option that all ``bench`` commands share.
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables; progress goes to standard error.")
]

app = typer.Typer(
    help="Measure methods at several budgets on real input.",
    epilog="Example: tokenreduce bench vision --model digits-vit --budgets 0.5",
    no_args_is_help=True,
)

#: Timed rounds per row; --full takes more, so that the medians of small speed-ups settle.
REPEATS, FULL_REPEATS = 3, 15
#: Budgets where --budgets says nothing, without and with --full.
BUDGETS = {"vision": ("0.5,0.35", "0.75,0.5,0.35"), "vlm": ("0.25,0.1", "0.5,0.25,0.1")}
#: Images per forward where --batch says nothing.
BATCH, BATCHES = 64, {"world": 32}
#: Embedded classifiers and their data; `bench vision` measures both when no model is named.
EMBEDDED = {"digits-vit": "digits", "world-vit": "world"}
#: Images per row where --limit and --full say nothing: the embedded digits whole, other data in part.
QUICK = {"digits": None, "world": 200}
QUICK_ELSEWHERE = 1000
#: Questions that `bench vlm` asks where --limit and --full say nothing.
QUICK_QUESTIONS = 180


def vision(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="digits-vit, world-vit, timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER; both embedded ones by "
            "default, each in a folder of its own."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, world, an image folder (class/image.jpg), hf:FOLDER (a saved data set) or webdataset shards "
            "(*.tar); an embedded model has its own."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data to evaluate.")] = "test",
    methods: Annotated[
        str | None,
        typer.Option(help="Methods and wildcards, 'tome,pi*' or '*'; a few by default."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Shares of the unreduced FLOPs; 0.5,0.35 by default, 0.75,0.5,0.35 with --full."),
    ] = None,
    reduce: Annotated[
        list[str] | None, typer.Option(help="Methods with explicit settings, 'tome:r=4' or 'a+b'; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images to evaluate; 1,000 by default, 200 scenes of the world.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per forward; 64 by default, 32 scenes of the world.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    amp: Annotated[str | None, typer.Option(help="bf16 or fp16 autocast.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Timed rounds per row; 3 by default, 15 with --full.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names: a text file with one per line, or 'imagenet'.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an earlier run in it is continued.")] = Path(
        "runs/vision"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in --out first.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All methods and images, and more timed rounds.")] = False,
    as_json: Json = False,
) -> None:
    """Image classification: accuracy, FLOPs, clock speed-up and memory of every method at equal FLOPs.

    Without --model on both embedded models: digits-vit, and world-vit on scenes with 3 to 6 things. A killed run
    continues where it stopped when the same command is given again.
    """
    if full and limit is not None:
        raise ValueError("give --full or --limit, not both")
    models = _models(model, data)
    few = not full and methods is None
    from tokenreduce.bench.vision import VisionTask

    jobs: dict[Path, Task] = {}
    said = []
    for name, source in models.items():
        most = limit if limit is not None or full else QUICK.get(source, QUICK_ELSEWHERE)
        if most is not None and limit is None:
            said.append(f"evaluating at most {counted(most, 'image')} of {source} (--limit changes that)")
        jobs[out / name if len(models) > 1 else out] = VisionTask(
            model=name,
            data=source,
            split=split,
            limit=most,
            batch=batch or BATCHES.get(source, BATCH),
            workers=workers,
            device=device,
            amp=amp,
            repeats=repeats if repeats is not None else FULL_REPEATS if full else REPEATS,
            classes=classes,
            few=few,
        )
    if few and not reduce:
        said.append("sweeping a few methods (--methods '*' takes all)")
    if said:
        console(stderr=as_json).say(f"{'; '.join(said)}; --full takes everything")
    budgets = budgets or BUDGETS["vision"][full]
    run(
        ctx,
        jobs,
        out,
        methods=methods,
        budgets=budgets,
        reduce=reduce or [],
        fresh=fresh,
        device=device,
        as_json=as_json,
    )


def _models(model: str | None, data: str | None) -> dict[str, str]:
    """Models to measure, and the data of each."""
    if model is None and data is None:
        return dict(EMBEDDED)
    if model is None:
        own = [name for name, source in EMBEDDED.items() if source == data]
        if not own:
            raise ValueError(f"--model is needed for {data}: timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER")
        return {own[0]: str(data)}
    if data is None and model not in EMBEDDED:
        needed = ", ".join(f"{source} for {name}" for name, source in EMBEDDED.items())
        raise ValueError(f"--data is needed for {model}: an image folder, hf:FOLDER or *.tar shards ({needed})")
    return {model: data or EMBEDDED[model]}


def vlm(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="world-llava, a Hub id, or a folder with model and processor.")] = (
        "world-llava"
    ),
    data: Annotated[
        str | None,
        typer.Option(help='world, or a JSONL file: {"image": path, "question": ..., "answer": ..., "type": ...}.'),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the world to ask about.")] = "test",
    stage: Annotated[
        str, typer.Option(help="Where methods act: before (projector), inside (language), in the tower (encoder).")
    ] = "projector,language,encoder",
    methods: Annotated[
        str | None,
        typer.Option(help="Methods and wildcards, 'divprune,vis*,random@language' or '*'; a few by default."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Shares of the visual tokens that stay, averaged over the language model's layers; 0.25,0.1 by "
            "default, 0.5,0.25,0.1 with --full."
        ),
    ] = None,
    reduce: Annotated[
        list[str] | None,
        typer.Option(help="Methods with explicit settings, 'divprune:keep=64+fastv:keep=0.5'; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions to ask; 180 by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer; the world is answered with one word.")
    ] = 16,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as the weights are stored), fp32, bf16 or fp16.")] = "auto",
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Timed rounds per row; 3 by default, 15 with --full.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an earlier run in it is continued.")] = Path(
        "runs/vlm"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in --out first.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All methods and questions, and more timed rounds.")] = False,
    as_json: Json = False,
) -> None:
    """Image language models: accuracy by question type, visual tokens, FLOPs, time to first token and KV cache.

    Budgets are shares of the visual tokens, averaged over the language model's layers. A killed run continues where it
    stopped when the same command is given again.
    """
    if data is None:
        if model != "world-llava":
            raise ValueError(f"--data is needed for {model}: a JSONL file with questions (world for world-llava)")
        data = "world"
    if full and limit is not None:
        raise ValueError("give --full or --limit, not both")
    from tokenreduce.bench.vlm import VlmTask
    from tokenreduce.bench.vlms import pick_device
    from tokenreduce.cli.generate import quiet_bars

    place = str(pick_device(device))
    task = VlmTask(
        model=model,
        data=data,
        split=split,
        limit=limit if limit is not None or full else QUICK_QUESTIONS,
        batch=batch,
        device=place,
        dtype=dtype,
        repeats=repeats if repeats is not None else FULL_REPEATS if full else REPEATS,
        max_new_tokens=max_new_tokens,
        stages=tuple(s.strip() for s in stage.split(",") if s.strip()),
        few=not full and methods is None,
    )
    if not full:
        said = (
            []
            if limit is not None
            else [f"asking at most {counted(QUICK_QUESTIONS, 'question')} (--limit changes that)"]
        )
        if methods is None and not reduce:
            said.append("sweeping a few methods of each stage (--methods '*' takes all)")
        if said:
            console(stderr=as_json).say(f"{'; '.join(said)}; --full takes everything")
    quiet_bars()
    budgets = budgets or BUDGETS["vlm"][full]
    run(
        ctx,
        {out: task},
        out,
        methods=methods,
        budgets=budgets,
        reduce=reduce or [],
        fresh=fresh,
        device=place,
        as_json=as_json,
    )


def run(
    ctx: typer.Context,
    jobs: Mapping[Path, Task],
    out: Path,
    *,
    methods: str | None,
    budgets: str,
    reduce: list[str],
    fresh: bool,
    device: str,
    as_json: bool = False,
) -> None:
    """Sweep every task of ``jobs`` into its folder with a progress bar, then print the tables and write one report
    into ``out``; with ``as_json`` they are one JSON object, and everything else goes to standard error.

    Every ``bench`` command ends here. Exit status 1 when a row failed, 130 after Ctrl-C.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from tokenreduce.bench.picture import need
    from tokenreduce.bench.report import rebuild
    from tokenreduce.bench.sweep import split_methods, sweep
    from tokenreduce.cli.report import facts, present

    # What the report needs at the end is looked for before the work, not after it.
    need("matplotlib", "the report")
    need("plotly", "the report")
    given = {k: v for k, v in ctx.params.items() if k not in ("fresh", "as_json")}
    defaults = {p.name: p.default for p in ctx.command.params}
    command = again(["bench", str(ctx.info_name)], given, defaults)
    screen = console(stderr=as_json)
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    failed = 0
    for folder, task in jobs.items():
        if len(jobs) > 1:
            screen.say(folder.name, "bold")
        with Progress(*shown, console=screen) as progress:
            watch = _watch(progress, task, screen)
            try:
                result = sweep(
                    task,
                    folder,
                    methods=split_methods(methods) if methods is not None else None,
                    budgets=numbers(budgets, "--budgets"),
                    reduce=reduce,
                    fresh=fresh,
                    device=device,
                    command=command,
                    watch=watch,
                )
            except KeyboardInterrupt:
                progress.stop()
                complain(f"stopped; every finished row is in {folder}. The same command continues there.")
                raise typer.Exit(130) from None
            failed += len(result.errors)
    runs, files = rebuild(list(jobs), None if len(jobs) == 1 else out)
    if as_json:
        print_json(facts(runs, files))
    else:
        present(runs, files, apart=True)
    if failed:
        complain(f"{counted(failed, 'row')} failed, see above; the same command tries again")
        raise typer.Exit(1)


def _watch(progress: Any, task: Task, screen: Screen) -> Any:
    from tokenreduce.bench.columns import COLUMNS, cell, failure, label
    from tokenreduce.bench.sweep import Watch
    from tokenreduce.bench.task import axis_of

    bar = progress.add_task("loading model and data", total=None)
    known = {c.key: c for c in COLUMNS}
    axis = axis_of(task)

    class Told(Watch):
        def say(self, message: str) -> None:
            screen.say(message)  # the progress bar is on the same screen and makes room

        def plan(self, total: int, done: int) -> None:
            progress.update(bar, total=total, completed=done, description="measuring")

        def begin(self, point: Point) -> None:
            progress.update(bar, description=point.id)

        def end(self, point: Point, row: dict[str, Any]) -> None:
            progress.advance(bar)
            if row.get("error"):
                self.say(f"{point.id} failed: {failure(row)}")
                return
            parts = [
                f"{known[key].label} {cell(row, known[key], axis)}"
                for key in dict.fromkeys((axis.key, task.metric, "speedup"))
                if key in known and row.get(key) is not None
            ]
            self.say(f"{label(row)}: {', '.join(parts)}, {row['wall_s']:.1f} s")

    return Told()
