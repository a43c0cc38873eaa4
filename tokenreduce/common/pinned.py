"""An allocator that keeps what it was given: without it, freed memory goes back and is page-faulted in again.

glibc returns large blocks to the system as soon as they are freed. The stock model, whose tensors are the largest,
pays most for taking them anew in every forward, which flatters every speed-up.
"""

from __future__ import annotations

import os
import sys
import time

__all__ = ["PINNED", "Others", "faults", "is_pinned", "load_of_machine", "pin"]

#: What glibc reads when a process starts.
PINNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def is_pinned() -> bool:
    """Whether this process runs with :data:`PINNED`, or on a system without glibc, where there is nothing to pin."""
    return not sys.platform.startswith("linux") or all(os.environ.get(k) == v for k, v in PINNED.items())


def pin() -> None:
    """Start this process again with :data:`PINNED`, as it was called; returns where it is pinned already."""
    if is_pinned():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **PINNED})


def faults() -> int:
    """Page faults of this process so far that needed no disk; 0 where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


def load_of_machine() -> float | None:
    """Processes that want a core, mean over the last minute, for each core; None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


class Others:
    """How busy other processes keep the machine, from the moment that this is made: the load also counts this process,
    and last minute's work."""

    def __init__(self) -> None:
        self._began = _used()

    def cores(self) -> float | None:
        """Cores that other processes used on average since then; None where the system does not say."""
        now = _used()
        if self._began is None or now is None:
            return None
        (all_then, own_then, then), (all_now, own_now, at) = self._began, now
        return max(0.0, (all_now - all_then) - (own_now - own_then)) / max(at - then, 1e-3)


def _used() -> tuple[float, float, float] | None:
    """Seconds of CPU time that all processes and this one have used, and the time of asking."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:8])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    own = os.times()
    return (user + nice + system + sum(interrupts)) / ticks, own.user + own.system, time.monotonic()
