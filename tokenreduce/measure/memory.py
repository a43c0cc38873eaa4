"""Peak memory of one call, above what was allocated before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Largest number of bytes that tensors held during ``function()``, beyond those alive at its start.

    CUDA: the caching allocator's ``max_memory_allocated``. CPU: the running sum of the allocator events that
    ``torch.profiler`` records, so scratch space inside operators counts and memory of other libraries does not.
    Runs without gradients. Other devices raise ``ValueError``.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return _peak_cuda(function, device)
    if kind == "cpu":
        return _peak_cpu(function)
    raise ValueError(f"peak memory is measured on cpu and cuda, not on {kind}")


def _peak_cuda(function: Callable[[], object], device: torch.device | str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        function()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - start)


def _peak_cpu(function: Callable[[], object]) -> int:
    profiler = torch.autograd.profiler.profile(profile_memory=True, use_kineto=True)
    with _quiet():
        profiler.__enter__()
    try:
        with torch.no_grad():
            result = function()  # kept until the profiler has stopped: the output counts as alive
    finally:
        with _quiet():
            profiler.__exit__(None, None, None)
    del result
    events: Any = profiler.kineto_results.events() if profiler.kineto_results is not None else []
    memory = [e for e in events if e.name() == "[memory]" and e.device_type() == torch.autograd.DeviceType.CPU]
    live = peak = 0
    for event in sorted(memory, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the C++ log lines that starting and stopping the profiler prints to stderr on some builds."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # no stderr at all, as under pythonw
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
