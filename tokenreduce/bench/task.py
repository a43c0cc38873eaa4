"""What a benchmark task offers. The sweep and the reports know tasks by this page and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tokenreduce.core.reducer import Reducer

__all__ = ["FLOPS", "Axis", "Task", "axis_of", "spent"]


@dataclass(frozen=True)
class Axis:
    """What budgets are shares of. ``key`` is the key of a row that holds the share reached, ``label`` what it is a
    share of, and ``title`` stands below a picture."""

    key: str
    label: str
    title: str


FLOPS = Axis("share", "FLOPs", "FLOPs, % of the unreduced model")


@runtime_checkable
class Task(Protocol):
    """One model on one data set.

    ``name`` is the word behind ``tokenreduce bench``; ``metric`` the key of a measured row that ranks methods (a
    fraction, higher is better), whose standard error may stand under ``<metric>_stderr``. ``stages`` says of which
    stages the methods are; a name that several have means the first of them in ``--reduce``.

    Optional: ``axis`` (:class:`Axis`) and ``spent(reducers)`` where budgets are shares of something else than FLOPs;
    ``baselines``, full names of the methods that stand in every table, where these are others than the sweep's own;
    ``keep_in(folder)``, called before :meth:`prepare`, where answers are kept in the run folder as they come.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def stages(self) -> tuple[str, ...]: ...

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
        """Full names of the methods that the model can serve."""
        ...

    def flops(self, reducers: Sequence[Reducer]) -> int:
        """FLOPs per input with ``reducers``, () for the unreduced model; exact and repeatable."""
        ...

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row: ``flops`` (per input), the metric, and any further numbers, lists and ``notes``."""
        ...


def axis_of(task: Task) -> Axis:
    """What the budgets of ``task`` are shares of."""
    axis: Axis = getattr(task, "axis", FLOPS)
    return axis


def spent(task: Task, reducers: Sequence[Reducer]) -> float:
    """What ``reducers`` cost on the axis of ``task``; () for the unreduced model."""
    return float(getattr(task, "spent", task.flops)(tuple(reducers)))
