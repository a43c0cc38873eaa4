"""A lock that is fair: whoever waits longest is next."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Turns"]


class Turns:
    """``with turns: ...`` like a ``threading.Lock``, in the order of arrival.

    A plain lock goes to any thread that happens to run: one that lets go and takes it again at once, as a sweep does
    between two rows, would starve all others.
    """

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def __enter__(self) -> Turns:
        me = object()
        with self._changed:
            self._line.append(me)
            try:
                while self._line[0] is not me:
                    self._changed.wait()
            except BaseException:  # an interrupt must not leave a place in the line that nobody gives up
                self._line.remove(me)
                self._changed.notify_all()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many hold the lock or wait for it."""
        return len(self._line)
