"""Continuous batching (``generate_batch``): requests of token ids, whose sequences share rows and a paged cache.

The library takes no images there, so there is nothing to reduce: text goes through as on the unpatched model, and a
prompt with places for images is refused.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tokenreduce.core.undo import Undo

__all__ = ["attach_batching", "is_paged"]

#: Where a model has the tokens that stand for images.
_PLACES = "_tokenreduce_places"


def attach_batching(generator: Any, ids: tuple[int, ...], undo: Undo) -> None:
    """Check what ``generator`` is asked in continuous batching; ``ids`` are the tokens that stand for images."""
    undo.set(generator, _PLACES, ids)
    for name, mixin in (("generate_batch", CheckedBatches), ("init_continuous_batching", CheckedManager)):
        if hasattr(type(generator), name):
            undo.mix_in(generator, mixin)


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, which holds many sequences and has no length."""
    return not hasattr(cache, "get_seq_length")


class CheckedBatches(nn.Module):
    """Mixin of models with ``generate_batch``."""

    def generate_batch(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # The library would log an error of the manager and return nothing, so prompts are checked before.
        for prompt in inputs:
            check_text(prompt, vars(self)[_PLACES])
        return super().generate_batch(inputs, *args, **kwargs)  # type: ignore[misc]


class CheckedManager(nn.Module):
    """Mixin of models with ``init_continuous_batching``."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        manager.add_request = functools.partial(add_request, manager, vars(self)[_PLACES])
        return manager


def add_request(manager: Any, ids: tuple[int, ...], input_ids: Any, *args: Any, **kwargs: Any) -> Any:
    check_text(input_ids, ids)
    return type(manager).add_request(manager, input_ids, *args, **kwargs)


def check_text(prompt: Any, ids: tuple[int, ...]) -> None:
    """Raise ``ValueError`` for a prompt, a list of token ids, with places for images."""
    found = sorted(set(ids) & set(map(int, prompt)))
    if found:
        raise ValueError(
            f"a prompt has the token {found[0]}, which stands for an image or a video, and continuous batching takes "
            f"no images; call model.generate with the images, which also takes batches"
        )
