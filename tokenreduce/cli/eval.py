"""``tokenreduce eval``: methods on the tasks of lmms-eval, by its own command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import again, print_json
from tokenreduce.common.screen import complain, console
from tokenreduce.common.words import counted

__all__ = ["command"]

Model = Annotated[str, typer.Option(help="A Hub id, or a folder with model and processor.")]
Tasks = Annotated[str, typer.Option(help="Tasks of lmms-eval that generate: mme,textvqa.")]
Kind = Annotated[
    str, typer.Option("--class", help="Model class: llava_hf, llava_onevision, qwen2_5_vl, qwen3_vl or internvl_hf.")
]
Reduce = Annotated[list[str] | None, typer.Option(help="Methods with settings, 'divprune:keep=64' or 'a+b'; repeated.")]
ModelArgs = Annotated[str, typer.Option(help="More arguments of lmms-eval's class: device=cpu,device_map=cpu.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of every task; all by default.")]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with tasks of your own, whose names are new ones.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions per forward, where the class takes more than one.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the questions (torchrun).")]
Python = Annotated[str, typer.Option("--python", help="Interpreter of an environment that has tokenreduce[lmms].")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; an earlier one in it is continued.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure everything again.")]


def command(
    ctx: typer.Context,
    model: Model,
    tasks: Tasks,
    kind: Kind = "llava_hf",
    reduce: Reduce = None,
    model_args: ModelArgs = "",
    limit: Limit = None,
    include_path: IncludePath = None,
    batch: Batch = 1,
    workers: Workers = 1,
    python: Python = sys.executable,
    out: Out = Path("runs/lmms"),
    fresh: Fresh = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Evaluate methods on tasks of lmms-eval: the unreduced model, every --reduce, and random choice and resizing at as
    many visual tokens.

    Each is a run of lmms-eval's own command with a model class of ours (tokenreduce_llava_hf and so on). A run that
    ends without all its answers is an error. The same command continues where it stopped.
    """
    from tokenreduce.bench.report import write_csv
    from tokenreduce.integrations.lmms_eval import MODELS
    from tokenreduce.integrations.lmms_eval.command import Evaluation
    from tokenreduce.integrations.lmms_eval.sweep import sweep

    if kind not in MODELS:
        raise ValueError(f"--class is one of {', '.join(MODELS)}, not {kind!r}")
    _check_python(python)
    screen = console(stderr=as_json)
    evaluation = Evaluation(kind, model, tasks, model_args, limit, include_path, batch, workers, python)
    given = {k: v for k, v in ctx.params.items() if k not in ("fresh", "as_json")}
    line = again(["eval"], given, {p.name: p.default for p in ctx.command.params}).replace("--kind", "--class")
    run = sweep(evaluation, reduce or (), out, fresh=fresh, command=line, say=screen.say)
    if run.good:
        write_csv([run], out / "rows.csv")
    if as_json:
        print_json({"folder": str(out), "rows": run.rows})
    else:
        screen.print(_table(run))
    for row in run.errors:
        complain(f"{row['id']} failed: {row['error']}")
    if run.errors:
        complain(f"{counted(len(run.errors), 'evaluation')} failed; the same command tries again")
        raise typer.Exit(1)


def _check_python(python: str) -> None:
    """Raises ``ImportError`` where the interpreter has no lmms-eval."""
    import subprocess

    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmms_eval') is None)"
    if subprocess.run([python, "-c", look], check=False).returncode:
        raise ImportError(
            f"{python} has no lmms-eval: pip install 'tokenreduce[lmms]', best in an environment of its own that "
            "--python names"
        )


def _table(run: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from tokenreduce.bench.methods import UNREDUCED, is_baseline
    from tokenreduce.integrations.lmms_eval.sweep import metrics_in

    metrics = metrics_in(run)
    table = Table("method", "entry", "visual %", "GFLOPs", *metrics, caption="° baseline")
    for row in run.rows:
        name = row["id"] + ("°" if is_baseline(row["method"]) else "")
        if row.get("error"):
            table.add_row(Text(name), "error", *[""] * (2 + len(metrics)), style="red")
            continue
        cells = [
            f"{row['entry_tokens']:.1f}" if "entry_tokens" in row else "-",
            f"{100 * row['visual_share']:.1f}" if "visual_share" in row else "-",
            f"{row['prefill_flops'] / 1e9:.3f}" if "prefill_flops" in row else "-",
        ]
        for key in metrics:
            error = row.get(f"{key}_stderr")
            cells.append("-" if key not in row else f"{row[key]:.4g}" + ("" if error is None else f" ±{error:.2g}"))
        table.add_row(Text(name), *cells, style="bold" if row["id"] == UNREDUCED else "")
    return table
