"""``answers.jsonl`` of a run folder: what was answered, a line per batch of questions, so that a run that ends midway
asks no batch twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenreduce.bench.runs import ANSWERS, OTHER_OUT, read_lines
from tokenreduce.common.files import cannot_write

__all__ = ["AnswerLog", "Part"]


class Part(NamedTuple):
    """Answers of one batch: ``said`` and ``right`` by the id of the question, how many were ``broken``, problems by id,
    and what the method had to say."""

    said: dict[int, str]
    right: dict[int, bool]
    broken: int
    problems: dict[int, dict[str, str]]
    notes: list[str]


class AnswerLog:
    """Parts in ``folder``, whose run the caller has open. Raises ``ValueError`` for a damaged file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANSWERS
        rows, complete, wrong = read_lines(self.path)
        if wrong:
            with open(self.path, "r+b") as handle:
                handle.truncate(complete)
                handle.seek(0, 2)
                if complete and not self.path.read_bytes().endswith(b"\n"):
                    handle.write(b"\n")
        self._there: dict[str, dict[int, Part]] = {}
        for row in rows:
            try:
                said, right, problems = (_keyed(row[key]) for key in ("said", "right", "problems"))
                part = Part(said, right, row["broken"], problems, row["notes"])
                self._there.setdefault(row["spec"], {})[int(row["id"])] = part
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path} holds other things than answers; start again with --fresh") from error

    def of(self, spec: str) -> dict[int, Part]:
        """Parts of a spec by their number."""
        return self._there.get(spec, {})

    def add(self, spec: str, unit: int, part: Part) -> None:
        """Write one line. Raises ``OSError`` that names the file."""
        line = json.dumps({"id": unit, "spec": spec, **part._asdict()}, ensure_ascii=False) + "\n"
        try:
            with open(self.path, "ab", buffering=0) as handle:
                rest = memoryview(line.encode("utf-8", "backslashreplace"))
                while rest:
                    rest = rest[handle.write(rest) or 0 :]
        except OSError as error:
            raise cannot_write(self.path, error, OTHER_OUT) from error
        self._there.setdefault(spec, {})[unit] = part


def _keyed(made: dict[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in made.items()}
