"""One row of the table: accuracy, tokens, latency and throughput of the answers of a point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tokenreduce.bench.asking.runner import Answers
from tokenreduce.bench.questions import Item
from tokenreduce.bench.remote.answers import Answer
from tokenreduce.common.words import counted

__all__ = ["percentile", "row_of", "throughput"]

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` percent of ``values`` do not exceed (nearest rank, so that it is one of them).

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0, 3.0, 2.0], 99)
    (2.0, 4.0)
    """
    found = sorted(values)
    return found[max(0, math.ceil(share / 100 * len(found)) - 1)]


def throughput(answers: Iterable[Answer]) -> float:
    """Answers per second, over the time in which requests were under way: of each session from its first request to
    its last answer, so that pauses between sessions of a resumed run do not count."""
    sessions: dict[str, list[Answer]] = {}
    for answer in answers:
        sessions.setdefault(answer.session, []).append(answer)
    spans = [max(a.began + a.latency_s for a in s) - min(a.began for a in s) for s in sessions.values()]
    return sum(map(len, sessions.values())) / max(sum(spans), 1e-9)


def row_of(
    answers: dict[int, Answer], items: Sequence[Item], refused: Sequence[Answer], baseline: dict[int, Answer] | None
) -> dict[str, Any]:
    """The row of ``answers`` by question; ``baseline`` are the answers with all tokens, where they are known.

    ``prompt_tokens`` and ``answer_tokens`` are means of what the server counts, text included; ``prompt_share`` is the
    part of the baseline's prompt tokens on the same questions. ``agreement`` is the share of questions with the
    baseline's answer.
    """
    good = list(answers.values())
    said = {a.id: a.said for a in good}
    latencies = [a.latency_s for a in good]
    row: dict[str, Any] = {
        **Answers(said, {a.id: a.right for a in good}, 0).accuracies(items),
        "prompt_tokens": _mean([a.prompt_tokens for a in good]),
        "answer_tokens": _mean([a.answer_tokens for a in good]),
        **{f"latency_p{p}_s": percentile(latencies, p) for p in PERCENTILES},
        "latency_mean_s": sum(latencies) / len(latencies),
        "requests_per_s": throughput(good),
        "questions": len(good),
        "problems": len(refused),
        "notes": _notes(good, refused),
    }
    if baseline is not None:
        both = [(answers[i], b) for i, b in baseline.items() if i in answers]
        counts = [(a.prompt_tokens, b.prompt_tokens) for a, b in both if a.prompt_tokens and b.prompt_tokens]
        row["prompt_share"] = sum(a for a, _ in counts) / sum(b for _, b in counts) if counts else None
        row["agreement"] = sum(a.said == b.said for a, b in both) / len(both) if both else None
    return row


def _mean(counts: Sequence[int | None]) -> float | None:
    known = [c for c in counts if c is not None]
    return sum(known) / len(known) if known and len(known) == len(counts) else None


def _notes(good: Sequence[Answer], refused: Sequence[Answer]) -> list[str]:
    notes = []
    if refused:
        first = refused[0]
        notes.append(
            f"the server refused {counted(len(refused), 'question')}, left out of this row; "
            f"the first, question {first.id}: {first.refused}"
        )
    if again := sum(a.tries > 1 for a in good):
        notes.append(f"{counted(again, 'answer')} came after further tries; latencies are of the try that was answered")
    if cut := sum(a.cut for a in good):
        notes.append(f"{counted(cut, 'answer')} ran into the limit of --max-new-tokens")
    if empty := sum(not a.said.strip() for a in good):
        notes.append(f"{counted(empty, 'answer')} had no text; such an answer counts as wrong")
    return notes
