"""Devices by their data sheets: what an operator takes on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from tokenreduce.estimation.ops import Op

__all__ = ["BYTES", "DEVICES", "Device", "Sheet"]

#: Bytes of an element.
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Rows of a matrix that a kernel of a GPU works on at once; fewer cost as much.
TILE = 64
#: Reads and writes that a sort makes of what one copy would.
PASSES = {"sort": 8.0, "norm": 1.0, "move": 1.5}


class Device(Protocol):
    """``launch`` are the seconds that starting an operator takes; with ``behind`` kernels run behind the program, so
    that a part takes the longer of both, otherwise an operator's seconds hold it."""

    @property
    def memory(self) -> float:
        """Bytes."""
        ...

    @property
    def launch(self) -> float: ...

    @property
    def behind(self) -> bool: ...

    def seconds(self, op: Op, batch: int, dtype: str) -> tuple[float, str]:
        """Time of an operator on ``batch`` samples, and what bounds it: "compute", "memory" or "launch"."""
        ...


@dataclass(frozen=True)
class Sheet:
    """A device by its data sheet.

    Attributes:
        flops: dense peak per second by dtype. ``bandwidth``: bytes per second. ``memory``: bytes.
        launch: seconds to start an operator from PyTorch without a graph; ``shortest``: seconds of the smallest kernel.
        matmul, attention, streaming: shares of the peaks that kernels of good libraries reach on large operators.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    launch: float = 6e-6
    shortest: float = 2.5e-6
    matmul: float = 0.7
    attention: float = 0.5
    streaming: float = 0.8
    behind: bool = True
    tile: int = TILE

    def seconds(self, op: Op, batch: int, dtype: str) -> tuple[float, str]:
        size, peak = BYTES[dtype], self.flops[dtype]
        compute = 0.0
        if op.kind == "attention":
            compute = op.flops * batch * (0.5 if op.causal else 1.0) / (peak * self.attention)
        elif op.kind == "matmul" and op.rows:
            rows = op.rows * batch
            compute = op.flops * batch / rows * math.ceil(rows / self.tile) * self.tile / (peak * self.matmul)
        moved = (op.moved * batch * PASSES.get(op.kind, 1.0) + op.weights) * size
        memory = moved / (self.bandwidth * self.streaming)
        each = max(compute, memory) / op.count
        if each < self.shortest:
            return self.shortest * op.count, "launch"
        return each * op.count, "compute" if compute > memory else "memory"


def _sheet(name: str, half: float, single: float, bandwidth: float, memory: float, **more: float) -> Sheet:
    return Sheet(name, {"bf16": half, "fp16": half, "fp32": single}, bandwidth, memory, **more)  # type: ignore[arg-type]


#: Dense peaks in the dtype and of the fp32 units (no TF32), as the makers state them. ``cpu`` stands for a server with
#: 16 cores, AVX-512 and four channels of memory; what this machine really does is ``measured``.
DEVICES: dict[str, Sheet] = {
    "h100": _sheet("h100", 989e12, 67e12, 3.35e12, 80e9),
    "a100": _sheet("a100", 312e12, 19.5e12, 2.04e12, 80e9),
    "l4": _sheet("l4", 121e12, 30.3e12, 300e9, 24e9),
    "rtx4090": _sheet("rtx4090", 165e12, 82.6e12, 1.01e12, 24e9),
    "jetson-orin": _sheet("jetson-orin", 42.5e12, 5.3e12, 204.8e9, 64e9, launch=15e-6, shortest=4e-6),
    "cpu": Sheet(
        "cpu", {"bf16": 1.2e12, "fp16": 1.2e12, "fp32": 1.2e12}, 80e9, 128e9, launch=0.0, shortest=6e-6, matmul=0.6,
        attention=0.35, streaming=0.6, behind=False, tile=4,
    ),
}  # fmt: skip
