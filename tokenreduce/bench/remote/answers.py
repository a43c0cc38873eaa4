"""``answers.jsonl`` of a run folder: a line per question and point, written as answers come, so that a run that ends
midway asks no question twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenreduce.bench.runs import ANSWERS, OTHER_OUT, read_lines
from tokenreduce.common.files import cannot_write, write_text

__all__ = ["ANSWERS", "Answer", "AnswerFile"]


@dataclass(frozen=True)
class Answer:
    """One answered question of one point. ``session`` tells runs of the command apart, whose times do not overlap;
    ``refused`` is why the server gave none, "" where it did."""

    point: str
    id: int
    session: str
    began: float
    latency_s: float
    tries: int
    said: str = ""
    right: bool = False
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    cut: bool = False
    refused: str = ""


class AnswerFile:
    """The answers in ``folder``, whose run the caller has open (one writer). A line that a killed run left half written
    is taken away.

    Raises ``ValueError`` for a file with other damage, ``OSError`` for one that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANSWERS
        rows, complete, wrong = read_lines(self.path)
        self._there = rows
        try:
            self._handle = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise cannot_write(self.path, error, OTHER_OUT) from error
        if wrong:
            self._handle.truncate(complete)
            if complete and not self.path.read_bytes().endswith(b"\n"):
                self._handle.write(b"\n")

    def of(self, point: str) -> dict[int, Answer]:
        """Answers of a point by question; those that the server refused are asked again."""
        try:
            found = [Answer(**row) for row in self._there if row.get("point") == point]
        except TypeError as error:
            raise ValueError(f"{self.path} holds other things than answers; start again with --fresh") from error
        return {answer.id: answer for answer in found if not answer.refused}

    def add(self, answer: Answer) -> None:
        """Write one line; not waiting for the disk, which would be in the way of the clock. Raises ``OSError``."""
        row: dict[str, Any] = asdict(answer)
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._handle.write(rest) or 0 :]
        except OSError as error:
            raise cannot_write(self.path, error, OTHER_OUT) from error
        self._there.append(row)

    def drop(self, point: str) -> None:
        """Forget a point, whose answers turned out to be of something else. Raises ``OSError``."""
        self._there = [row for row in self._there if row.get("point") != point]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._there)
        self._handle.close()
        write_text(self.path, lines, OTHER_OUT)
        self._handle = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._handle.close()
