"""``tokenreduce bench vlm --server``: the same questions, asked of an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import again, print_json, progress_bar
from tokenreduce.common.screen import complain, console
from tokenreduce.common.words import counted

__all__ = ["Concurrency", "Keep", "Prompt", "Server", "Timeout", "ask_server", "check_local"]

Server = Annotated[
    str | None,
    typer.Option(help="Ask this OpenAI-compatible server, http://127.0.0.1:8000/v1, in place of a model in here."),
]
Concurrency = Annotated[int, typer.Option(min=1, help="With --server: requests under way at once.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="With --server, one of `tokenreduce serve`: visual tokens per request, counts or ratios, 64,0.25; all of "
        "them are measured besides. The server as it is where nothing is said."
    ),
]
Prompt = Annotated[
    str | None, typer.Option(help="With --server: text of a question, with {question} where the question goes.")
]
Timeout = Annotated[float, typer.Option(help="With --server: seconds for one try of one request.")]

#: Options that mean a model in this process, and those that mean a server.
LOCAL = (
    "stage", "methods", "budgets", "reduce", "batch", "device", "dtype", "repeats", "axis", "workers", "engine",
    "address",
)  # fmt: skip
REMOTE = ("concurrency", "keep", "prompt", "timeout")


def _given(ctx: typer.Context, names: Sequence[str]) -> list[str]:
    """Those of the options that were typed."""
    sources = {name: ctx.get_parameter_source(name) for name in names if name in ctx.params}
    return ["--" + n.replace("_", "-") for n, source in sources.items() if source and source.name == "COMMANDLINE"]


def check_local(ctx: typer.Context) -> None:
    """Raise ``ValueError`` where an option of ``--server`` stands without it."""
    if found := _given(ctx, REMOTE):
        raise ValueError(f"{', '.join(found)}: only together with --server")


def ask_server(ctx: typer.Context, quick: int) -> None:
    """The command with ``--server``; ``quick`` questions where ``--limit`` and ``--full`` say nothing.

    Exit status 1 when a row failed, 2 when the server went away (answers so far are kept), 130 after Ctrl-C. Raises
    ``ValueError`` for options that mean a model in this process.
    """
    given = ctx.params
    if found := _given(ctx, LOCAL):
        raise ValueError(
            f"{', '.join(found)}: not together with --server, whose model and method are its own; --keep sets the "
            "tokens of a request where the server is one of `tokenreduce serve`"
        )
    if given["full"] and given["limit"] is not None:
        raise ValueError("give --full or --limit, not both")
    from tokenreduce.bench.remote.sweep import Remote

    named = _given(ctx, ["model"])
    if given["data"] is None and named and given["model"] != "world-llava":
        raise ValueError(f"--data is needed for {given['model']}: a JSONL file with questions, or world")
    task = Remote(
        server=given["server"], model=given["model"] if named else None, keeps=_keeps(given["keep"]),
        data=given["data"] or "world", split=given["split"], prompt=given["prompt"],
        limit=given["limit"] if given["limit"] is not None or given["full"] else quick,
        concurrency=given["concurrency"], timeout=given["timeout"], max_new_tokens=given["max_new_tokens"],
    )  # fmt: skip
    _run(ctx, task)


def _keeps(text: str | None) -> tuple[int | float, ...]:
    """``"64,0.25"`` to a count and a ratio."""
    out: list[int | float] = []
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        try:
            out.append(int(part) if part.isdigit() else float(part))
        except ValueError:
            raise ValueError(f"--keep lists numbers such as 64,0.25, not {text!r}") from None
    return tuple(out)


def _run(ctx: typer.Context, task: Any) -> None:
    from tokenreduce.bench.picture import need
    from tokenreduce.bench.report import rebuild
    from tokenreduce.cli.report import facts, present

    need("matplotlib", "the report")
    need("plotly", "the report")
    given = ctx.params
    screen = console(stderr=given["as_json"])
    command = again(
        ["bench", str(ctx.info_name)], {k: v for k, v in given.items() if k not in ("fresh", "as_json")},
        {p.name: p.default for p in ctx.command.params},
    )  # fmt: skip
    out = Path(given["out"])
    with progress_bar(screen) as progress:
        watch = _watch(progress, screen)
        try:
            run = task.sweep(out, fresh=given["fresh"], command=command, watch=watch, tick=watch.tick)
        except KeyboardInterrupt:
            progress.stop()
            complain(f"stopped; every answer is in {out}. The same command asks the other questions.")
            raise typer.Exit(130) from None
    if not run.good:
        complain(f"nothing could be measured; {counted(len(run.errors), 'row')} failed, see above")
        raise typer.Exit(1)
    runs, files = rebuild([out])
    if given["as_json"]:
        print_json(facts(runs, files))
    else:
        present(runs, files)
    if run.errors:
        complain(f"{counted(len(run.errors), 'row')} failed, see above; the same command tries again")
        raise typer.Exit(1)


def _watch(progress: Any, screen: Any) -> Any:
    from tokenreduce.bench.columns import failure, label, seconds
    from tokenreduce.bench.watch import Point, Watch

    bar = progress.add_task("asking the server", total=None)

    class Told(Watch):
        def say(self, message: str) -> None:
            screen.say(message)

        def tick(self, done: int, total: int) -> None:
            progress.update(bar, total=total, completed=done)

        def begin(self, point: Point) -> None:
            progress.update(bar, description=point.id)

        def end(self, point: Point, row: dict[str, Any]) -> None:
            if row.get("error"):
                self.say(f"{point.id} failed: {failure(row)}")
                return
            tokens = "" if row["prompt_tokens"] is None else f"{row['prompt_tokens']:.1f} prompt tokens, "
            self.say(
                f"{label(row)}: accuracy {100 * row['accuracy']:.1f} %, {tokens}p50 {seconds(row['latency_p50_s'])}, "
                f"p99 {seconds(row['latency_p99_s'])}, {row['requests_per_s']:.2f} requests/s"
            )

    return Told()
