"""Traces: what happened in one forward. Reports and pictures are made from them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.common.words import counted
from tokenreduce.core.plan import Plan

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

__all__ = ["CacheStep", "DecodeStep", "Step", "Trace", "ViewPlan", "active", "record"]

_active: ContextVar[Trace | None] = ContextVar("tokenreduce_trace", default=None)


def active() -> Trace | None:
    """The trace that is being recorded in this thread, or None (always None while compiling)."""
    return None if torch.compiler.is_compiling() else _active.get()


@dataclass(frozen=True)
class CacheStep:
    """What a method of the cache stage did to ``layer``, at the prompt (``step`` 0) or in a decode step.

    ``before`` and ``kept`` (B,Hkv) are the keys of every sample and KV head; bytes are those that the layer's tensors
    hold, where all heads of a batch have as many slots as the largest.
    """

    layer: int
    step: int
    method: str
    before: Tensor
    kept: Tensor
    bytes_before: int
    bytes_held: int
    #: Whether all layers were thinned together, behind the last one's prefill.
    together: bool = False


class ViewPlan(NamedTuple):
    """Rows (P,1) and columns (P,N) of the prompt of views that were chosen from together, and the plan on them."""

    rows: Tensor
    columns: Tensor
    plan: Plan


@dataclass(frozen=True)
class Step:
    """One site of one forward: ``tokens`` (including prefix) leave it; ``plan`` is None where nothing acted."""

    stage: str
    layer: int
    tokens: int
    plan: Plan | None = None
    method: str = ""
    #: Projector stage: the plans of all views; ``plan`` then says which columns of the prompt stay.
    parts: tuple[ViewPlan, ...] = field(default=(), repr=False)
    #: For each of ``parts``: (P,K) the column that each output of its plan takes, -1 where there is none.
    slots: tuple[Tensor, ...] = field(default=(), repr=False)
    #: Encoder stage: patches of all views together that leave it, where views of one size come as one step of several
    #: (Qwen's towers); ``tokens`` is then of one view.
    patches: int | None = None
    #: Encoder stage: (rows, columns) of patches at the tower's entry in this forward, or (frames, rows, columns) of a
    #: clip; None where they fill no grid.
    grid: tuple[int, ...] | None = None
    #: Encoder stage: whether tokens are set aside there, which come back behind the tower (IPCV).
    aside: bool = False

    @property
    def hosts(self) -> tuple[Tensor, ...]:
        """The old name of :attr:`slots`."""
        warnings.warn("step.hosts is step.slots now", DeprecationWarning, stacklevel=2)
        return self.slots


@dataclass(frozen=True)
class DecodeStep:
    """A choice that a method made in one decode step: ``seen`` (B,L) marks the visual tokens of the prompt that the new
    token sees from ``layer`` on, ``back`` (B,) how many of them came back there."""

    layer: int
    method: str
    seen: Tensor = field(repr=False)
    back: Tensor = field(repr=False)


@dataclass(repr=False)
class Trace:
    """What happened in the forwards inside :func:`record`, in the order of execution."""

    steps: list[Step] = field(default_factory=list)
    #: Choices in decode steps, of methods that make any.
    decode: list[DecodeStep] = field(default_factory=list)
    #: What methods of the cache stage did to the layers.
    cache: list[CacheStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: frozenset[int] = frozenset()
    #: Seconds spent on making and applying plans (CPU wall clock), when recorded with ``timing=True``.
    seconds: float = 0.0
    timing: bool = False
    #: Entered around making and applying plans, for whoever looks at what runs inside.
    own: Callable[[], AbstractContextManager[Any]] = nullcontext
    _counter: Any = None

    @property
    def tokens(self) -> list[int]:
        """Tokens after every site, prefix included; samples that keep fewer are padded to this number."""
        return [s.tokens for s in self.steps]

    @property
    def plans(self) -> list[Plan]:
        """The plans that were applied (layers without action are left out)."""
        return [s.plan for s in self.steps if s.plan is not None]

    @property
    def plan(self) -> Plan | None:
        """All plans of an encoder forward composed: entry tokens to final tokens; None if nothing acted. Plans of the
        diffusion stage are undone behind their module, so there is nothing to compose."""
        composed: Plan | None = None
        for step in self.steps:
            if step.plan is not None and step.stage != "diffusion":
                composed = step.plan if composed is None else composed.then(step.plan)
        return composed

    @property
    def flops(self) -> int:
        """Floating point operations counted by ``torch.utils.flop_counter`` (two per multiply-add)."""
        return 0 if self._counter is None else int(self._counter.get_total_flops())

    def __repr__(self) -> str:
        acted = [s for s in self.steps if s.plan is not None]
        said = [counted(len(self.steps), "step"), counted(len(acted), "plan")]
        if self.steps:
            counts = [str(t) for i, t in enumerate(self.tokens) if i == 0 or t != self.tokens[i - 1]]
            said.append(f"tokens {'>'.join(counts if len(counts) <= 6 else [*counts[:3], '..', counts[-1]])}")
        said += [f"{counted(len(self.decode), 'choice')} in decode"] if self.decode else []
        said += [f"{counted(len(self.cache), 'choice')} in the cache"] if self.cache else []
        said += [f"{self.flops / 1e9:.3g} GFLOPs"] if self._counter is not None else []
        said += [f"{self.seconds * 1e3:.1f} ms of its own"] if self.timing else []
        said += [counted(len(self.notes), "note")] if self.notes else []
        return f"Trace({', '.join(said)})"

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)

    def add(self, module: nn.Module, step: Step) -> None:
        # A checkpointed block runs again during backward; that replay is not another step.
        if id(module) in self.modules and torch._C._current_graph_task_id() == -1:
            self.steps.append(step)

    def add_decode(self, module: nn.Module, step: DecodeStep) -> None:
        if id(module) in self.modules:
            self.decode.append(step)

    def add_cache(self, module: nn.Module, step: CacheStep) -> None:
        if id(module) in self.modules:
            self.cache.append(step)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Adds the time spent inside to :attr:`seconds` when timing was asked for, and enters :attr:`own`."""
        with self.own():
            if not self.timing:
                yield
                return
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began


@contextmanager
def record(
    model: nn.Module,
    *,
    flops: bool = True,
    timing: bool = False,
    own: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Trace]:
    """Record what the reducers do to ``model`` inside the block: ``with tr.record(model) as trace: model(x)``.

    ``trace.tokens``, ``trace.plans`` and ``trace.flops`` describe every forward made inside; an unpatched model only
    has FLOPs. ``timing=True`` also measures the reduction's own work (CPU wall clock; leave ``flops`` off then,
    counting costs time), and ``own()`` is entered around that work. A compiled model runs, but its graph reports
    nothing: record the model before compiling.
    """
    counter: FlopCounterMode | None = None
    if flops:
        from tokenreduce.core.flops import flop_counter

        counter = flop_counter()
    trace = Trace(modules=_ids(model), timing=timing, own=own, _counter=counter)
    token = _active.set(trace)
    try:
        if counter is None:
            yield trace
        else:
            with counter:
                yield trace
    finally:
        _active.reset(token)


def _ids(model: Any) -> frozenset[int]:
    """Those of all modules of a model, or of the parts of a pipeline."""
    parts = [model] if isinstance(model, nn.Module) else model.components.values()
    return frozenset(id(m) for part in parts if isinstance(part, nn.Module) for m in part.modules())
