"""A task without a model for worker processes: it squares numbers, fails at some, and dies at others."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Squares:
    """``fails`` raises ``ValueError``; ``kills`` ends the process, ``times`` times in all (counted in ``folder``);
    ``broken`` cannot load."""

    folder: Path
    fails: int | None = None
    kills: int | None = None
    times: int = 1
    broken: bool = False

    def load(self) -> None:
        if self.broken:
            raise OSError("there are no weights")

    def part(self, reducers: tuple[Any, ...], unit: int) -> tuple[int, list[str]]:
        if unit == self.fails:
            raise ValueError(f"{unit} does not fit")
        dead = len(list(self.folder.glob("dead-*")))
        if unit == self.kills and dead < self.times:
            (self.folder / f"dead-{dead}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return unit * unit, [r.spec() for r in reducers]
