"""``make gpu``: ``python -m tokenreduce.bench.performance.cuda`` measures everything on a CUDA device within a time."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.bench.performance.cuda.ledger import Ledger, last_rows
from tokenreduce.bench.performance.cuda.page import page
from tokenreduce.bench.performance.cuda.run import RESERVE, ROWS, SECTIONS, Run, measure_section
from tokenreduce.common.files import make_folder, write_text
from tokenreduce.common.words import speak_everywhere

__all__ = ["app"]

PAGE = "performance-cuda.md"
app = typer.Typer(add_completion=False)
Device = Annotated[str, typer.Option(help="cuda, or cuda:1")]
Backend = Annotated[str, typer.Option(help="of torch.compile")]


@app.command("run")
def run(
    minutes: Annotated[float, typer.Option(help="when to be over, counted from --began", min=0.1)] = 9.0,
    began: Annotated[float | None, typer.Option(help="seconds since 1970; now by default")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the rows; runs/cuda-TIME by default")] = None,
    markdown: Annotated[Path | None, typer.Option(help=f"the page; {PAGE} in --out by default")] = None,
    sections: Annotated[str, typer.Option(help=f"which of {','.join(SECTIONS)}")] = ",".join(SECTIONS),
    device: Device = "cuda",
    backend: Backend = "inductor",
    tiny: Annotated[bool, typer.Option("--tiny", "--dry-run", help="tiny shapes on the CPU: does all run?")] = False,
) -> None:
    """Measure all sections within the time, and write the page behind each."""
    speak_everywhere()
    names = [name for name in sections.split(",") if name]
    if not names or any(name not in SECTIONS for name in names):
        raise typer.BadParameter(f"--sections are some of {','.join(SECTIONS)}, not {sections!r}")
    device = "cpu" if tiny else _device(device)
    out = Path("runs") / time.strftime("cuda-%Y%m%d-%H%M%S") if out is None else out
    if (out / ROWS).exists():
        raise typer.BadParameter(f"{out / ROWS} is there already: choose another --out")
    make_folder(out)
    deadline = (time.time() if began is None else began) + 60 * minutes - RESERVE
    one, target = Run(out, deadline, device, tiny, backend), out / PAGE if markdown is None else markdown
    if deadline - time.time() < 1:
        raise typer.BadParameter(f"nothing is left of the {minutes:g} minutes; give --minutes more")
    command = f"python -m {__package__}{' --tiny' if tiny else ''} --minutes {minutes:g}"
    Ledger(one.rows, "run", deadline).note("conditions", "ok", command=command, about=_conditions(device), tiny=tiny)
    for i, name in enumerate(names):
        left = max(deadline - time.time(), 0)
        one.section(name, time.time() + left * (1.0 if i == len(names) - 1 else SECTIONS[name]))
        write_page(out, target)
    rows = [row for row in last_rows(one.rows) if row["section"] != "run"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "error", "skipped")}
    print(f"{counts['ok']} rows, {counts['error']} failed, {counts['skipped']} not measured: {one.rows}, {target}")
    if not counts["ok"]:
        raise typer.Exit(1)


@app.command("page")
def again(out: Path, markdown: Annotated[Path | None, typer.Option(help=f"{PAGE} there by default")] = None) -> None:
    """Make the page of a run again, of the rows that it left in the folder OUT."""
    if not any(row["section"] == "run" for row in last_rows(out / ROWS)):
        raise typer.BadParameter(f"there is no run in {out}: it has no {ROWS}, or one without its conditions")
    write_page(out, out / PAGE if markdown is None else markdown)


@app.command("section", hidden=True)
def section(
    name: str,
    out: Path,
    until: Annotated[float, typer.Option()],
    device: Device = "cuda",
    backend: Backend = "inductor",
    tiny: bool = False,
) -> None:
    """One section, in this process."""
    measure_section(name, out, until, device, backend, tiny)


def write_page(out: Path, target: Path) -> None:
    """The page of the rows in the folder ``out``."""
    rows = last_rows(out / ROWS)
    (run,) = (row for row in rows if row["section"] == "run")
    write_text(target, page(rows, run["command"], run["about"], run["tiny"]))


def _device(name: str) -> str:
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise typer.BadParameter(f"--device is cuda or cuda:N, not {name!r}") from error
    if kind != "cuda" or (torch.device(name).index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()}"
        raise typer.BadParameter(
            f"no CUDA device {name!r}: {found}; --tiny runs everything with tiny shapes on the CPU"
        )
    return name


def _conditions(device: str) -> str:
    """The machine and the libraries, in words."""
    import torch

    from tokenreduce.bench.runs import versions

    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    if torch.device(device).type != "cuda":
        return f"CPU; {found}; {platform.system()}."
    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, {card.total_memory >> 30} GiB, CUDA {torch.version.cuda}; {found}; {platform.system()}."


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("run", "section", "page"):
        sys.argv.insert(1, "run")
    app()
