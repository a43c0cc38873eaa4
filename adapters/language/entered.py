"""What travels through one call of a discovered model, in a context variable: no keyword reaches code that we do not
know."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tokenreduce.adapters.language.generation import Forward

__all__ = ["Entered", "entered", "forward_of"]


@dataclass
class Entered:
    """A call of ``site`` that is under way: its cache, where in its generation it is (None where nothing is reduced),
    and the features that its own ``get_image_features`` and ``get_video_features`` are to answer with."""

    site: nn.Module
    cache: Any
    forward: Forward | None
    answers: dict[str, Any] = field(default_factory=dict)


#: The call that is under way in this thread.
entered: ContextVar[Entered | None] = ContextVar("tokenreduce_entered", default=None)


def forward_of(site: nn.Module) -> Forward | None:
    """Where in its generation the call of ``site`` that is under way is."""
    call = entered.get()
    return None if call is None or call.site is not site else call.forward
