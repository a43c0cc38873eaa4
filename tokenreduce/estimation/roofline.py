"""What operators take on a device, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenreduce.estimation.devices import BYTES, Device
from tokenreduce.estimation.ops import Op

__all__ = ["Part", "part_of", "seconds_of"]


@dataclass(frozen=True)
class Part:
    """One part of a model on a device, for a whole batch.

    ``tokens`` are the mean over its layers, of one sample; ``launches`` operators are started; ``own`` seconds make and
    apply plans; ``bound`` is what most of the time goes to: "compute", "memory" or "launch".
    """

    name: str
    tokens: float
    flops: float
    bytes: float
    seconds: float
    own: float
    launches: int
    bound: str


def seconds_of(ops: Sequence[Op], device: Device, batch: int, dtype: str) -> float:
    """Time of ``ops`` one behind the other; where kernels run behind the program, no less than starting them takes."""
    busy = sum(device.seconds(op, batch, dtype)[0] for op in ops)
    return max(busy, device.launch * sum(op.count for op in ops)) if device.behind else busy


def part_of(name: str, ops: Sequence[Op], tokens: float, device: Device, batch: int, dtype: str) -> Part:
    """``ops`` of one part."""
    spent = {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    own = 0.0
    for op in ops:
        seconds, bound = device.seconds(op, batch, dtype)
        spent[bound] += seconds
        own += seconds if op.own else 0.0
    busy, launches = sum(spent.values()), sum(op.count for op in ops)
    bound = max(spent, key=lambda key: spent[key])
    if device.behind and device.launch * launches > busy:
        bound = "launch"
        own = device.launch * sum(op.count for op in ops if op.own)
    size = BYTES[dtype]
    return Part(
        name, tokens, sum(op.flops for op in ops) * batch,
        sum(op.moved * batch + op.weights for op in ops) * size,
        seconds_of(ops, device, batch, dtype), own, round(launches), bound,
    )  # fmt: skip
