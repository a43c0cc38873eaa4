"""Whether calls from several threads at once give what they give one after another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


def mixed_up(call: Callable[[Any], torch.Tensor], inputs: Sequence[Any], times: int = 4) -> list[int]:
    """Indices of the ``inputs`` for which ``call``, made ``times`` times in a thread of its own beside the others, gave
    anything but the serial result, bit for bit; [] when all is well."""
    wrong: list[int] = []
    with torch.no_grad():
        want = [call(i) for i in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(times) if not torch.equal(call(inputs[i]), want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return wrong
