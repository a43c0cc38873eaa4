"""What the ``tokenreduce bench`` commands share: how much is measured, the sweep with its bar, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenreduce.cli.shared import again, numbers, print_json, progress_bar
from tokenreduce.common.screen import Screen, complain, console
from tokenreduce.common.words import counted

if TYPE_CHECKING:
    from tokenreduce.bench.sweep import Point
    from tokenreduce.bench.task import Task

__all__ = ["Extent", "data_of", "run"]

#: Timed rounds per row; --full takes more, so that the medians of small speed-ups settle.
REPEATS, FULL_REPEATS = 3, 15


@dataclass(frozen=True)
class Extent:
    """How much of a sweep was asked for, with the options ``--full``, ``--limit``, ``--methods``, ``--reduce`` and
    ``--repeats`` of all ``bench`` commands."""

    full: bool
    limit: int | None
    methods: str | None
    reduce: tuple[str, ...]
    repeats: int

    @classmethod
    def of(cls, ctx: typer.Context) -> Extent:
        """Raises ``ValueError`` for ``--full`` together with ``--limit``."""
        given = ctx.params
        full, limit, repeats = given["full"], given["limit"], given["repeats"]
        if full and limit is not None:
            raise ValueError("give --full or --limit, not both")
        rounds = repeats if repeats is not None else FULL_REPEATS if full else REPEATS
        return cls(full, limit, given["methods"], tuple(given["reduce"] or ()), rounds)

    @property
    def few(self) -> bool:
        """Whether a few methods stand for all."""
        return not self.full and self.methods is None

    def most(self, quick: int | None) -> int | None:
        """How many inputs are measured where ``quick`` are without ``--limit`` and ``--full``; None for all."""
        return self.limit if self.limit is not None or self.full else quick

    def cut(self, verb: str, quick: int | None, noun: str, of: str = "") -> list[str]:
        """What is said where ``quick`` limits the inputs and nobody asked for it."""
        if quick is None or self.limit is not None or self.full:
            return []
        return [f"{verb} at most {counted(quick, noun)}{of} (--limit changes that)"]

    def say(self, cuts: Sequence[str], stages: bool, as_json: bool) -> None:
        """One sentence about what is left out, if anything is."""
        said = list(cuts)
        if self.few and not self.reduce:
            said.append(f"sweeping a few methods{' of each stage' if stages else ''} (--methods '*' takes all)")
        if said:
            console(stderr=as_json).say(f"{'; '.join(said)}; --full takes everything")


def data_of(model: str, data: str | None, kinds: str) -> str:
    """The data of an image or video language model; the embedded one has its own. Raises ``ValueError`` for others."""
    from tokenreduce.bench.vlms import EMBEDDED

    if data is None and model not in EMBEDDED:
        raise ValueError(f"--data is needed for {model}: {kinds} (world for world-llava)")
    return data or EMBEDDED[model]


def run(ctx: typer.Context, jobs: Mapping[Path, Task], *, budgets: tuple[str, str], device: str) -> None:
    """Sweep every task of ``jobs`` into its folder with a progress bar, then print the tables and write one report
    into ``--out``; with ``--json`` they are one JSON object, and everything else goes to standard error.

    Every ``bench`` command ends here, with its options as ``ctx`` has them; ``budgets`` are those where ``--budgets``
    says nothing, without and with ``--full``. Exit status 1 when a row failed, 130 after Ctrl-C.
    """
    from tokenreduce.bench.picture import need
    from tokenreduce.bench.report import rebuild
    from tokenreduce.cli.report import facts, present

    # What the report needs at the end is looked for before the work, not after it.
    need("matplotlib", "the report")
    need("plotly", "the report")
    as_json = ctx.params["as_json"]
    screen = console(stderr=as_json)
    shares = numbers(ctx.params["budgets"] or budgets[ctx.params["full"]], "--budgets")
    failed = 0
    for folder, task in jobs.items():
        if len(jobs) > 1:
            screen.say(folder.name, "bold")
        failed += _sweep(ctx, folder, task, shares, device, screen)
    runs, files = rebuild(list(jobs), None if len(jobs) == 1 else Path(ctx.params["out"]))
    if as_json:
        print_json(facts(runs, files))
    else:
        present(runs, files, apart=True)
    if failed:
        complain(f"{counted(failed, 'row')} failed, see above; the same command tries again")
        raise typer.Exit(1)


def _sweep(ctx: typer.Context, folder: Path, task: Task, budgets: list[float], device: str, screen: Screen) -> int:
    """Measure one task; returns how many rows failed."""
    from tokenreduce.bench.methods import split_methods
    from tokenreduce.bench.sweep import sweep

    given = {k: v for k, v in ctx.params.items() if k not in ("fresh", "as_json")}
    command = again(["bench", str(ctx.info_name)], given, {p.name: p.default for p in ctx.command.params})
    methods = given["methods"]
    with progress_bar(screen) as progress:
        try:
            result = sweep(
                task, folder, methods=split_methods(methods) if methods is not None else None, budgets=budgets,
                reduce=list(given["reduce"] or ()), fresh=ctx.params["fresh"], device=device, command=command,
                watch=_watch(progress, task, screen),
            )  # fmt: skip
        except KeyboardInterrupt:
            progress.stop()
            complain(f"stopped; every finished row is in {folder}. The same command continues there.")
            raise typer.Exit(130) from None
    return len(result.errors)


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
