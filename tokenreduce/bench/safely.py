"""Loading weights without running anything that lies beside them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["safetensors_only"]

_lock = threading.RLock()


@contextmanager
def safetensors_only() -> Iterator[None]:
    """Inside, whatever would unpickle weights (``torch.load``, in every model library) raises ``ValueError``.

    Model libraries take safetensors where a checkpoint has them and fall back to pickle elsewhere; a setting of each
    of them would have to be right everywhere. One thread at a time is inside. Code of a hub repository is not run
    anyway: nothing here sets ``trust_remote_code``.
    """
    with _lock:
        before = torch.load
        torch.load = _refuse  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.load = before


def _refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"{file} is stored as pickle, which can run code when it is loaded; convert the weights to safetensors"
    )
