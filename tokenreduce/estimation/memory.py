"""What fits into a device."""

from __future__ import annotations

from collections.abc import Sequence

from tokenreduce.estimation.devices import BYTES
from tokenreduce.estimation.ops import DECODE, Op
from tokenreduce.estimation.record import Recorded
from tokenreduce.estimation.subject import Subject

__all__ = ["cache_bytes", "largest_batch"]

#: Share of the memory that a model may fill, and what is held besides the largest operator's inputs and outputs.
USABLE, HELD = 0.9, 2.0


def cache_bytes(subject: Subject, made: Recorded, dtype: str, more: int = 0) -> float:
    """Keys and values of one sample behind the prompt and ``more`` tokens, in all layers."""
    if subject.keys is None:
        return 0.0
    heads, width = subject.keys
    return sum(2.0 * heads * width * (n + more) * BYTES[dtype] for n in made.cached)


def largest_batch(subject: Subject, made: Recorded, memory: float, dtype: str, answer: int) -> int:
    """Samples that fit beside the weights, with the keys and values of their answers; 0 where the weights do not."""
    left = memory * USABLE - subject.parameters * BYTES[dtype]
    each = cache_bytes(subject, made, dtype, answer) + _activations(made.ops) * BYTES[dtype]
    return max(0, int(left // each))


def _activations(ops: Sequence[Op]) -> float:
    """Elements that are held at once, of one sample: twice what the largest operator of a prefill moves."""
    return HELD * max((op.moved / op.count for op in ops if op.part != DECODE and not op.own), default=0.0)
