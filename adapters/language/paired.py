"""Two layers of a cache that store their keys and values together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenreduce.core.cache_codec import CacheCodec, Paired

__all__ = ["PairedLayer", "Shared", "pair_up"]


@dataclass
class Shared:
    """What both layers of a pair store; ``waiting`` are new keys and values (B,H,Q,d) that the lower layer has got and
    the upper one has not."""

    method: CacheCodec
    keys: Paired
    values: Paired
    waiting: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class PairedLayer(DynamicLayer):
    """The lower (0) or upper (1) layer of a pair. Keys and values are made whenever they are asked for; what changes
    both layers alike is done with the upper one, which comes last."""

    def __init__(self, shared: Shared, which: int, like: Tensor) -> None:
        self.shared, self.which = shared, which
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True

    def _states(self, name: int) -> Tensor:
        stored = (self.shared.keys, self.shared.values)[name].restore(self.which)
        waiting = self.shared.waiting if self.which == 0 else None
        return stored if waiting is None else torch.cat([stored, waiting[name]], 2)

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self._states(0)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._states(1)

    @property
    def nbytes(self) -> int:
        """Half of what the pair holds."""
        return self.shared.nbytes // 2

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New tokens go to attention as they are, and are stored together once both layers have them."""
        new, shared = (key_states, value_states), self.shared
        whole = tuple(torch.cat([self._states(i), states], 2) for i, states in enumerate(new))
        if self.which == 0:
            shared.waiting = new
            return whole[0], whole[1]
        if shared.waiting is None or shared.waiting[0].shape != key_states.shape:
            raise ValueError(
                f"two layers of {shared.method.spec()} were given other tokens; nothing may leave between them"
            )
        keys, values = (
            shared.method.encode(lower, upper, None, False) for lower, upper in zip(shared.waiting, new, strict=True)
        )
        shared.keys, shared.values, shared.waiting = shared.keys.then(keys), shared.values.then(values), None
        return whole[0], whole[1]

    def get_seq_length(self) -> int:
        waiting = self.shared.waiting
        return self.shared.keys.n + (waiting[0].shape[2] if self.which == 0 and waiting is not None else 0)

    def crop(self, tokens_to_remove: int) -> None:
        left = self.shared.keys.n + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if self.which == 1 and left < self.shared.keys.n:
            self.shared.keys, self.shared.values = (
                s.first(max(left, 0)) for s in (self.shared.keys, self.shared.values)
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.which == 1:
            self.shared.keys, self.shared.values = (s.rows(indices) for s in (self.shared.keys, self.shared.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.shared.keys.direction.shape[0], device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        raise ValueError(f"a cache that {self.shared.method.spec()} packed cannot be emptied; make a new one")

    offload = prefetch = reset


def pair_up(method: CacheCodec, cache: Any, pair: tuple[int, int], there: Tensor | None) -> None:
    """Let a ``pair`` of layers of ``cache`` store theirs together; ``there`` (B,N) marks what is no padding."""
    lower, upper = pair
    layers = cache.layers[lower], cache.layers[upper]
    for layer in layers:
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"{method.spec()} packs two layers of the cache into one, and a {type(layer).__name__} cannot be "
                f"packed; leave cache_implementation out, for a dynamic cache"
            )
    if layers[0].keys.shape != layers[1].keys.shape:
        raise ValueError(
            f"layers {lower} and {upper} hold {tuple(layers[0].keys.shape)} and {tuple(layers[1].keys.shape)}; "
            f"{method.spec()} pairs layers that hold the same tokens: set start so that no pair lies across a cut"
        )
    keys = method.encode(layers[0].keys, layers[1].keys, there, True)
    values = method.encode(layers[0].values, layers[1].values, there, True)
    shared, like = Shared(method, keys, values), layers[0].keys
    cache.layers[lower], cache.layers[upper] = PairedLayer(shared, 0, like), PairedLayer(shared, 1, like)
