"""A lock that is fair: whoever waits longest is next, and may ask how many are before it, or give up."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Place", "Turns"]


class Turns:
    """``with turns: ...`` like a ``threading.Lock``, in the order of arrival.

    A plain lock goes to any thread that happens to run: one that lets go and takes it again at once, as a sweep does
    between two rows, would starve all others. :meth:`join` is for those who want to know how long the line is.
    """

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def join(self) -> Place:
        """Line up, without waiting."""
        return Place(self)

    def __enter__(self) -> Turns:
        self.join().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many hold the lock or wait for it."""
        return len(self._line)


class Place:
    """A place in the line of ``turns``; ``with place: ...`` waits for the turn and gives it to the next behind."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        with turns._changed:
            turns._line.append(self)

    @property
    def ahead(self) -> int:
        """How many are before this one, whoever has the turn included: 0 has it. 0 also for one that left."""
        with self._turns._changed:
            return self._turns._line.index(self) if self in self._turns._line else 0

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the turn has come within ``seconds`` (None: for ever). Raises ``RuntimeError`` for one that left."""
        with self._turns._changed:
            if self not in self._turns._line:
                raise RuntimeError("this place in the line was left; join again")
            return self._turns._changed.wait_for(lambda: self._turns._line[0] is self, seconds)

    def leave(self) -> None:
        """Give up the turn, or the place while it waits; nothing for one that left."""
        with self._turns._changed:
            if self in self._turns._line:
                self._turns._line.remove(self)
                self._turns._changed.notify_all()

    def __enter__(self) -> Place:
        try:
            self.wait()
        except BaseException:  # an interrupt must not leave a place in the line that nobody gives up
            self.leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()
