"""The sections of a run, each in a process of its own until its time is over.

One that loses the device, or is killed, leaves the rows that it has finished, and is started again for the rest while
time is left.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenreduce.bench.performance.cuda.cases import Encoder, Language, compiled, encoders, languages
from tokenreduce.bench.performance.cuda.checks import ALL, run_tests
from tokenreduce.bench.performance.cuda.ledger import Ledger, last_rows, missing

__all__ = ["GRACE", "RESERVE", "ROWS", "SECTIONS", "Run", "keys_of", "measure_section"]

#: Sections in their order, and what share of the time that is left each may use; what it leaves goes to the next.
SECTIONS = {"tests": 0.15, "encoders": 0.4, "languages": 0.55, "compiled": 1.0}
#: Seconds at the end for the page, and that a process may take beyond its time before it is killed.
RESERVE, GRACE = 8.0, 4.0
ROWS = "rows.jsonl"


def keys_of(section: str, tiny: bool) -> list[str]:
    """The rows that a section promises."""
    if section == "tests":
        return [ALL]
    made: Any = {"encoders": encoders, "languages": languages, "compiled": compiled}[section](tiny)
    return [case.key for case in made]


@dataclass(frozen=True)
class Run:
    """One run: where its rows go, when it has to be over, and on what it runs."""

    out: Path
    deadline: float
    device: str
    tiny: bool
    backend: str

    @property
    def rows(self) -> Path:
        return self.out / ROWS

    def section(self, name: str, until: float) -> None:
        """Run a section to its end or up to ``until``; what has no row afterwards gets one that says why."""
        why = "the time of its section was over"
        todo = missing(self.rows, name, keys_of(name, self.tiny))
        while todo and until - time.time() > 1:
            code, before = self._child(name, until), len(todo)
            self._blame(name, code)
            todo = missing(self.rows, name, keys_of(name, self.tiny))
            if code not in (0, None):
                why = f"the process of its section ended with {code}"
            if code == 0 or len(todo) == before:  # one that cannot even begin would not begin again
                break
        Ledger(self.rows, name, until).skip(todo, why)

    def _child(self, name: str, until: float) -> int | None:
        """The exit code of a process that measures a section, None where it was killed."""
        command = [
            sys.executable, "-m", __package__, "section", name, str(self.out), "--until", str(until), "--device",
            self.device, "--backend", self.backend, *(["--tiny"] if self.tiny else []),
        ]  # fmt: skip
        process = subprocess.Popen(command)
        try:
            return process.wait(max(until - time.time(), 0) + GRACE)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _blame(self, name: str, code: int | None) -> None:
        """A row that was begun when its process ended is what ended it."""
        for row in last_rows(self.rows):
            if row["section"] == name and row["status"] == "begun":
                why = (
                    "killed: it took longer than the time that was left"
                    if code is None
                    else f"ended the process ({code})"
                )
                Ledger(self.rows, name, 0).note(row["key"], "error", error=why)


def measure_section(name: str, out: Path, until: float, device: str, backend: str, tiny: bool) -> None:
    """Write the rows of a section to the folder ``out`` until that time."""
    from tokenreduce.bench.performance.cuda.clock import lost

    ledger = Ledger(out / ROWS, name, until, lambda: lost(device))
    if name == "tests":
        run_tests(ledger, Path.cwd(), out, tiny)
        return
    from tokenreduce.bench.performance.cuda.encoders import Encoders
    from tokenreduce.bench.performance.cuda.language import Languages

    how: dict[str, Any] = {"device": device, "backend": backend}
    if tiny:
        from tokenreduce.bench.performance.cuda.clock import Rehearsal

        how |= {"cuda": Rehearsal(), "seconds": 0.0, "backend": "eager"}
    towers, models = Encoders(**how), Languages(**how)
    made: Any = {"encoders": encoders, "languages": languages, "compiled": compiled}[name](tiny)
    for case in made:
        measure: Callable[[Any], dict[str, Any]] = towers if isinstance(case, Encoder) else models
        kind = f"{type(case).__name__} {case.form}"
        ledger.run(case.key, partial(measure, case), kind, 0.5 if tiny else _needs(case))


def _needs(case: Encoder | Language) -> float:
    """Seconds that the first row of a kind may take; the rows behind it are expected to take as long as it did."""
    if case.form == "compiled":
        return 45.0
    return 15.0 if isinstance(case, Language) else 4.0  # a model of 7 billion weights is built
