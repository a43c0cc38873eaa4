"""What a prompt brings: which columns are images and videos, and what the vision tower saw of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.projector.seen import Encoded
from tokenreduce.adapters.language.state import Record

__all__ = ["Brought", "brought_in"]


@dataclass
class Brought(Record):
    """``kinds`` (B,L) are the columns of images and videos, of every call of the tower that is known by a key of its
    own; ``encoded`` is what the tower saw in these calls, which may still come while the prompt's forward runs, and
    ``places`` (B,L) the number of a column's feature in its call, -1 for none, where that is known column by column."""

    kinds: dict[str, Tensor]
    encoded: dict[str, Encoded] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)
    #: Whether columns are neither text nor known.
    strange: bool = False
    #: (B,L) the prompt's tokens, None when embeddings were given.
    ids: Tensor | None = None
    #: The embedding that the model puts at row ends of an image.
    newline: Tensor | None = None

    @property
    def visual(self) -> Tensor:
        return torch.stack(list(self.kinds.values())).any(0)

    def behind(self, front: int) -> Brought:
        """The same with ``front`` columns of text before."""
        kinds = {k: pad(t, (front, 0)) for k, t in self.kinds.items()}
        places = {k: pad(t, (front, 0), value=-1) for k, t in self.places.items()}
        return replace(self, kinds=kinds, places=places, ids=None if self.ids is None else pad(self.ids, (front, 0)))


def brought_in(forward: Forward) -> Brought:
    """What the prompt of a prefill brings."""
    brought = forward.state.get(Brought)
    assert brought is not None
    return brought
