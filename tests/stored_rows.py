"""Made-up stored rows of embedded models that are quick, so that the first tab has something to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenreduce.bench.runs import Run
from tokenreduce.demo.stored import write_run

AXIS = {"key": "share", "label": "FLOPs", "title": "FLOPs, % of the unreduced model"}


def row(method: str, budget: float, value: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    keep = {0.75: 0.5, 0.5: 0.35, 0.35: 0.2}[budget]
    out = {"id": f"{method}@{budget:g}", "method": method, "spec": f"{method}:keep={keep}", "budget": budget}
    return {**out, "share": budget, metric: value, f"{metric}_stderr": 0.01, "notes": [], "settings": [], **more}


def run_of(model: str, data: str, task: str, metric: str, rows: list[dict[str, Any]]) -> Run:
    settings = {"model": model, "data": data, "split": "test", "limit": 500, "threads": 1}
    whole = {"id": "unreduced", "method": "unreduced", "spec": "", "budget": 1.0, "share": 1.0, metric: 0.98}
    info = {"task": task, "metric": metric, "axis": AXIS, "settings": settings, "command": f"tokenreduce bench {task}"}
    return Run(Path("runs"), info, [whole, *rows])


def digits() -> Run:
    rows = [
        row("tome", 0.75, 0.97, "top1", hard=0.9, speedup=1.2, speedup_low=1.1, speedup_high=1.3),
        row("evit", 0.75, 0.96, "top1"), row("random", 0.75, 0.8, "top1"), row("ats", 0.75, 0.5, "top1"),
        row("tome", 0.5, 0.93, "top1"), row("evit", 0.5, 0.95, "top1", share=0.51),
        row("pitome", 0.5, 0.97, "top1", share=0.7), row("random", 0.5, 0.6, "top1"),
        row("tome", 0.35, 0.9, "top1"), row("evit", 0.35, 0.85, "top1"), row("random", 0.35, 0.3, "top1"),
    ]  # fmt: skip
    return run_of("digits-vit", "digits", "vision", "top1", rows)


def questions() -> Run:
    rows = [
        row("visionzip", 0.5, 0.97, kv_share=0.4), row("fastv", 0.5, 0.9, kv_share=0.6),
        row("random@projector", 0.5, 0.7), row("visionzip", 0.35, 0.95),
    ]  # fmt: skip
    return run_of("world-llava", "world", "vlm", "accuracy", rows)


def write(folder: Path) -> Path:
    """A folder with both, as the package has one."""
    for run in (digits(), questions()):
        write_run(run, folder)
    return folder
