"""What a benchmark task offers. The sweep and the reports know tasks by this page and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tokenreduce.reducer import Reducer

__all__ = ["Task", "plain"]


@runtime_checkable
class Task(Protocol):
    """One model on one data set.

    ``name`` is the word behind ``tokenreduce bench``; ``metric`` the key of a measured row that ranks methods (a
    fraction, higher is better), whose standard error may stand under ``<metric>_stderr``. ``stage`` says which
    methods the sweep tries by default.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def stage(self) -> str: ...

    @property
    def problems(self) -> list[dict[str, str]]:
        """Inputs that could not be used: {"path", "reason"}; they are counted and listed in the report."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that makes two rows comparable, JSON-able; known before :meth:`prepare`."""
        ...

    def prepare(self) -> None:
        """Load model and data; called once before anything else."""
        ...

    def methods(self) -> list[str]:
        """Names of the methods that the model can serve."""
        ...

    def flops(self, reducers: Sequence[Reducer]) -> int:
        """FLOPs per input with ``reducers``, () for the unreduced model; exact and repeatable."""
        ...

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row: ``flops`` (per input), the metric, and any further numbers, lists and ``notes``."""
        ...


def plain(value: Any) -> Any:
    """``value`` as JSON can carry it: numpy and torch scalars become numbers, tuples lists, nan and inf None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
