"""Pyramid memory bank of VideoChat-Online (arXiv 2501.00584): recent and salient frames fine, older ones coarse."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from tokenreduce.algorithms.scoring import unit
from tokenreduce.core.budget import check_count
from tokenreduce.video.memory import Recalled, StreamingMemory

__all__ = ["PyramidMemory"]

ORDERS = ("time", "list")


@dataclass(frozen=True, eq=False)
class _Frame:
    number: int
    time: float
    map: Tensor
    mean: Tensor

    @classmethod
    def of(cls, number: int, time: float, map: Tensor) -> _Frame:
        return cls(number, time, map, map.float().mean((0, 1)))


class PyramidMemory(StreamingMemory):
    """Levels of frames at falling resolution: a frame enters the level that its number says, pooled to its size; from
    a full level one frame of the most similar pair of neighbours moves down, and from the last one it is forgotten.

    Frame i enters the first level whose ``pattern`` divides i: by default every 8th the first (whole), every 4th of the
    others the second, all others the last. Numbers are those of the stream, so that calls of :meth:`push` change
    nothing (officially the pattern starts anew with every chunk). Similarity is the cosine between the means of two
    maps; the EARLIER frame of the pair leaves (equal pairs: the first pair), resized bilinearly, without antialiasing,
    to the next level. The side of a map on a level is that of the frames divided by ``pooling``, rounded down, at least
    1 (officially it must divide). Features stay as they came, so that maps from before a projector go through it after
    :meth:`tokens`.

    ``cascade=True`` is the sensible reading of the paper: a frame that comes down into a full level pushes one of
    there further down. In the official code, ``cascade=False``, that one is dropped. ``order="time"`` sorts a level by
    time, so that neighbours are neighbours in time; in the official code, ``order="list"``, a frame that comes down
    is appended behind newer ones. A level for one frame, which fails there, hands its frame on.

    Args:
        capacities: frames of every level; in the paper's scripts (2, 2, 12) for streams and (24, 24, 144).
        pattern: a frame enters the first level whose number here divides its own; the last is 1.
        pooling: by what the sides of a map are divided on every level.
        cascade, order: see above.
        encode, chunk: see :class:`~tokenreduce.video.memory.StreamingMemory`.

    Raises ``ValueError`` for settings other than these.
    """

    def __init__(
        self,
        capacities: Sequence[int] = (64, 64, 64),
        *,
        pattern: Sequence[int] = (8, 4, 1),
        pooling: Sequence[int] = (1, 2, 4),
        cascade: bool = True,
        order: str = "time",
        encode: Callable[[Any], Tensor] | None = None,
        chunk: int = 32,
    ) -> None:
        self.capacities, self.pattern, self.pooling = tuple(capacities), tuple(pattern), tuple(pooling)
        for name in ("capacities", "pattern", "pooling"):
            values = getattr(self, name)
            if not values or len(values) != len(self.capacities):
                raise ValueError(f"{name} has one number for every level, {len(self.capacities)}, not {values}")
            for value in values:
                check_count(value, name, 1)
        if self.pattern[-1] != 1:
            raise ValueError(f"pattern ends with 1, so that every frame has a level, not {self.pattern}")
        if order not in ORDERS:
            raise ValueError(f"order is one of {ORDERS}, not {order!r}")
        self.cascade, self.order = bool(cascade), order
        super().__init__(encode=encode, chunk=chunk)

    def settings(self) -> dict[str, Any]:
        return {
            "capacities": self.capacities, "pattern": self.pattern, "pooling": self.pooling, "cascade": self.cascade,
            "order": self.order, "chunk": self.chunk,
        }  # fmt: skip

    def tokens(self, question: Tensor | None = None) -> Recalled:
        """All frames that are held, by time, each in raster order of its own level; the question has no part in it.
        Raises ``ValueError`` before the first frame."""
        channels = self.shape[2]
        held = sorted((f for level in self._levels for f in level), key=lambda f: f.number)
        lengths = [f.map.shape[0] * f.map.shape[1] for f in held]
        times = torch.tensor([f.time for f in held], dtype=torch.float64)
        each = torch.tensor(lengths)
        return Recalled(
            torch.cat([f.map.reshape(-1, channels) for f in held]),
            torch.tensor([f.number for f in held]).repeat_interleave(each),
            times.repeat_interleave(each),
            tuple(lengths),
            torch.stack([times, times], 1),
        )

    @property
    def budget(self) -> int:
        return sum(c * self._side(i)[0] * self._side(i)[1] for i, c in enumerate(self.capacities))

    @property
    def stored(self) -> int:
        return sum(f.map.numel() + f.mean.numel() for level in self._levels for f in level)

    def levels(self) -> list[list[int]]:
        """Numbers of the frames on every level, as they are neighbours there."""
        return [[f.number for f in level] for level in self._levels]

    # -- the bank ----------------------------------------------------------------------------------------------------
    def _side(self, level: int) -> tuple[int, int]:
        h, w, _ = self.shape
        return max(1, h // self.pooling[level]), max(1, w // self.pooling[level])

    def _add(self, frame: Tensor, number: int, time: float) -> None:
        level = next(i for i, p in enumerate(self.pattern) if number % p == 0)
        self._make_room(level)
        map = self._resized(frame, level, adaptive_avg_pool2d)
        own = map.clone(memory_format=torch.contiguous_format) if map is frame else map
        self._levels[level].append(_Frame.of(number, time, own))

    def _make_room(self, level: int, *, drop: bool = False) -> None:
        held = self._levels[level]
        if len(held) < self.capacities[level]:
            return
        loser = held.pop(_closest(held))
        if drop or level + 1 == len(self._levels):
            return
        self._make_room(level + 1, drop=not self.cascade)
        lower = self._levels[level + 1]
        smaller = partial(interpolate, mode="bilinear", align_corners=False)
        place = bisect([f.number for f in lower], loser.number) if self.order == "time" else len(lower)
        lower.insert(place, _Frame.of(loser.number, loser.time, self._resized(loser.map, level + 1, smaller)))

    def _resized(self, map: Tensor, level: int, how: Callable[..., Tensor]) -> Tensor:
        side = self._side(level)
        if map.shape[:2] == side:
            return map
        return how(map.permute(2, 0, 1)[None].float(), side)[0].permute(1, 2, 0).to(map.dtype).contiguous()

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def _clear(self) -> None:
        self._levels: list[list[_Frame]] = [[] for _ in self.capacities]

    def _state(self) -> dict[str, Tensor]:
        out = {}
        for i, level in enumerate(self._levels):
            if level:
                out[f"{i}.maps"] = torch.stack([f.map for f in level])
                out[f"{i}.frames"] = torch.tensor([f.number for f in level])
                out[f"{i}.times"] = torch.tensor([f.time for f in level], dtype=torch.float64)
        return out

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        for i, (level, most) in enumerate(zip(self._levels, self.capacities, strict=True)):
            maps = state.get(f"{i}.maps")
            if maps is None:
                continue
            if len(maps) > most or tuple(maps.shape[1:3]) != self._side(i):
                raise ValueError(f"level {i} has room for {most} maps of {self._side(i)}, not {tuple(maps.shape[:3])}")
            numbers, times = state[f"{i}.frames"].tolist(), state[f"{i}.times"].tolist()
            level.extend(_Frame.of(n, t, m.clone()) for n, t, m in zip(numbers, times, maps, strict=True))


def _closest(held: list[_Frame]) -> int:
    """Place of the earlier frame of the most similar pair of neighbours; 0 where there is no pair."""
    if len(held) < 2:
        return 0
    means = unit(torch.stack([f.mean for f in held]))
    return int((means[1:] * means[:-1]).sum(-1).argmax())
