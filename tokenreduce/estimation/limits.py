"""What a stage can give at most, and the budget from which on it gives something."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenreduce.estimation.devices import Device
from tokenreduce.estimation.ops import DECODE, PARTS, PREFILL, TOWER, Op
from tokenreduce.estimation.record import Recorded
from tokenreduce.estimation.roofline import seconds_of
from tokenreduce.estimation.subject import Subject

__all__ = ["FIRST", "WORTH", "Worth", "first_acting", "first_token", "limit", "seconds_by", "worth_from"]

#: Parts of the time to the first token.
FIRST = PARTS[:3]
#: The gain that a budget is looked for.
WORTH = 1.05
Seconds = Callable[[Iterable[Op]], float]


def seconds_by(device: Device, batch: int, dtype: str) -> Seconds:
    """Time of operators, part by part."""

    def total(ops: Iterable[Op]) -> float:
        found = list(ops)
        return sum(seconds_of([op for op in found if op.part == p], device, batch, dtype) for p in PARTS)

    return total


def first_token(made: Recorded, seconds: Seconds) -> float:
    """Seconds to the first token, or of an encoder's forward."""
    return seconds(op for op in made.ops if op.part in FIRST)


def limit(subject: Subject, stock: Recorded, stage: str, first_layer: int, seconds: Seconds) -> float:
    """Stock time over the time that is left where ``stage`` takes away all visual tokens and costs nothing itself.

    Encoder: the blocks of the tower vanish (a language model behind it gets all tokens again). Projector: the prefill
    is one of text alone. Language: the same from ``first_layer`` on. Cache: a decode step sees no visual token; this
    is the only stage whose gain is of decode steps and not of the time to the first token.
    """
    text = subject.text / (subject.text + subject.visual) if subject.answers else 0.0

    def left(op: Op) -> Op:
        if stage == "encoder" and op.part == TOWER and op.layer >= 0:
            return op.shortened(0.0)
        if stage == "projector" and op.part == PREFILL:
            return op.shortened(text)
        if stage == "language" and op.part == PREFILL and op.layer >= first_layer:
            return op.shortened(text)
        if stage == "cache" and op.part == DECODE and op.kind == "attention":
            return op.shortened(text)
        return op

    parts = (DECODE,) if stage == "cache" else FIRST
    ops = [op for op in stock.ops if op.part in parts]
    whole, rest = seconds(ops), seconds(map(left, ops))
    return whole / rest if rest > 0 else float("inf")


@dataclass(frozen=True)
class Worth:
    """``tokens`` (mean over the layers of ``part``) of ``all`` from which on down the gain is :data:`WORTH`; None where
    no budget reaches it."""

    part: str
    tokens: float | None
    all: float


def worth_from(subject: Subject, stock: Recorded, made: Recorded, seconds: Seconds) -> Worth:
    """Between the stock model and the setting that was recorded, and beyond that down to no visual token, every layer's
    tokens are drawn along a line; the method's own work stays as recorded."""
    part = PREFILL if subject.answers and made.tokens(PREFILL) < stock.tokens(PREFILL) else TOWER
    before, behind = stock.rows(part), made.rows(part)
    least = subject.text if part == PREFILL else 0.0
    cut = {i: before[i] - behind.get(i, before[i]) for i in before}
    if not any(c > 0 for c in cut.values()):
        return Worth(part, None, stock.tokens(part))
    # What the reduced model starts besides the operators that the stock model has, own work above all.
    extra = [op for op in made.ops if op.own and op.part in FIRST]
    most = min((before[i] - least) / c for i, c in cut.items() if c > 0)
    base = first_token(stock, seconds)

    def at(t: float) -> tuple[float, float]:
        rows = {i: max(before[i] - t * c, least, 1.0) for i, c in cut.items()}
        ops = [
            op.shortened(rows[op.layer] / before[op.layer]) if op.part == part and op.layer in rows else op
            for op in stock.ops
            if op.part in FIRST
        ]
        return base / seconds([*ops, *extra]), sum(rows.values()) / len(rows)

    low, high = 0.0, max(most, 1.0)
    if at(high)[0] < WORTH:
        return Worth(part, None, stock.tokens(part))
    for _ in range(24):
        middle = (low + high) / 2
        if at(middle)[0] >= WORTH:
            high = middle
        else:
            low = middle
    return Worth(part, at(high)[1], stock.tokens(part))


def first_acting(stock: Recorded, made: Recorded) -> int:
    """The first decoder layer with fewer tokens than in the stock model, 1 where there is none."""
    before, behind = stock.rows(PREFILL), made.rows(PREFILL)
    fewer = [i for i in sorted(before) if behind.get(i, 0.0) < before[i]]
    return fewer[0] if fewer else 1
