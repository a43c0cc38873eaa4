"""Rows of sweeps that ship with the package, so that the page has something to show before anything is computed.

``python -m tokenreduce.demo.stored runs/results/world-vit-2 ...`` writes them from run folders, one file per model. The
first line of a file says what was measured, every other one is a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenreduce.bench.columns import again
from tokenreduce.bench.runs import Run, load_run
from tokenreduce.common.files import make_folder, write_text

__all__ = ["FOLDER", "main", "stored_runs", "write_run"]

FOLDER = Path(__file__).parent / "stored"
#: What the page offers first; models that are not named here follow by name.
ORDER = ("world-vit-2", "world-llava-2", "world-vit", "world-llava", "digits-vit")
#: Keys of a row that are kept, beside the metric and what budgets are shares of.
KEYS = (
    "id", "method", "spec", "settings", "budget", "share", "found", "simple", "simple_stderr", "hard", "hard_stderr",
    "hard_samples", "visual_share", "speedup", "speedup_low", "speedup_high", "speedup_noise_low", "speedup_noise_high",
    "kv_share", "cache_bytes", "agreement", "notes",
)  # fmt: skip
TEXTS = ("id", "method", "spec")
NO_NUMBERS = (*TEXTS, "settings", "notes")
#: Entries of a run's settings that the first line keeps.
SETTINGS = ("model", "data", "split", "limit")
LONGEST_NOTE, MOST_NOTES = 160, 2
#: The wheel is downloaded by people who never open the page.
MOST_BYTES = 150_000
_FIX = "make it again with `python -m tokenreduce.demo.stored RUN_FOLDER`, or reinstall the package"


def stored_runs(folder: Path | None = None) -> list[Run]:
    """The runs whose rows lie in ``folder`` (the package's own by default), in a fixed order.

    Raises ``ValueError`` that names the line for a damaged file, and ``OSError`` for one that cannot be read.
    """
    runs = [_read(file) for file in sorted((folder or FOLDER).glob("*.jsonl"))]
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(runs, key=lambda run: (place.get(run.folder.stem, len(ORDER)), run.folder.stem))


def write_run(run: Run, folder: Path | None = None) -> Path:
    """Write what the page needs of ``run`` to ``<model>.jsonl`` in ``folder``, in place of what is there.

    Raises ``ValueError`` for a run without a model or without a measured row, and ``OSError`` where it cannot write.
    """
    settings = run.info.get("settings") or {}
    model = settings.get("model")
    if not isinstance(model, str) or "/" in model:
        raise ValueError(f"{run.folder} is no run of an embedded model (its model is {model!r}); nothing was written")
    if not run.good:
        raise ValueError(f"{run.folder} has no measured row; let `tokenreduce bench` go on")
    keys = {*KEYS, run.metric, f"{run.metric}_stderr", run.axis.key}
    head = {
        "task": run.info.get("task"), "metric": run.metric, "axis": vars(run.axis),
        "settings": {k: settings[k] for k in SETTINGS if k in settings}, "command": again(run),
    }  # fmt: skip
    lines = [head, *({k: _short(k, v) for k, v in row.items() if k in keys and v is not None} for row in run.good)]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    file = make_folder(folder or FOLDER) / f"{model}.jsonl"
    write_text(file, text)
    return file


def _short(key: str, value: Any) -> Any:
    """Numbers to the digits that are ever shown, and one line of each of the first notes."""
    if key == "notes":
        lines = [str(note).splitlines()[0] for note in value if str(note).strip()][:MOST_NOTES]
        return [line if len(line) <= LONGEST_NOTE else line[: LONGEST_NOTE - 3] + "..." for line in lines]
    return float(f"{value:.5g}") if isinstance(value, float) and key != "budget" else value


def _read(file: Path) -> Run:
    head: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            if number == 1:
                head = _checked_head(entry)
            else:
                rows.append(_checked_row(entry, str(head["metric"])))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {file} cannot be read ({error}); {_FIX}") from error
    if not rows:
        raise ValueError(f"{file} holds no row; {_FIX}")
    return Run(file, {**head, "points": [row["id"] for row in rows]}, rows)


def _checked_head(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
        raise ValueError("the first line names no metric")
    if not isinstance(entry.get("settings"), dict) or not isinstance(entry["settings"].get("model"), str):
        raise ValueError("the first line names no model")
    if {*(entry.get("axis") or {})} != {"key", "label", "title"}:
        raise ValueError("the first line names no axis")
    return entry


def _checked_row(entry: Any, metric: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), str) for key in TEXTS):
        raise ValueError(f"a row has {', '.join(TEXTS)}")
    for key, value in entry.items():
        if key not in NO_NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key} is no number")
    if metric not in entry:
        raise ValueError(f"{entry['id']} has no {metric}")
    return entry


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: run folders in, one line about each file out."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenreduce.demo.stored",
        description="Keep rows of finished sweeps for the first tab of the page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that `tokenreduce bench ... --out` wrote")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the files go; the package itself by default")
    given = parser.parse_args(arguments)
    try:
        for folder in given.runs:
            run = load_run(folder)
            file = write_run(run, given.out)
            size = file.stat().st_size
            more = f", more than the {MOST_BYTES / 1e3:.0f} kB that a wheel should carry" if size > MOST_BYTES else ""
            print(f"{file}: {len(run.good)} rows, {size / 1e3:.1f} kB{more}")
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
