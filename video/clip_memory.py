"""Clips of a stream, each compressed by a temporal method, selected by the question (interface of arXiv 2405.16009)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import evenly
from tokenreduce.algorithms.projector import top
from tokenreduce.algorithms.scoring import unit
from tokenreduce.algorithms.temporal import Temporal
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import Evidence
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_method
from tokenreduce.video.memory import Recalled, StreamingMemory

__all__ = ["ClipMemory"]


@dataclass(frozen=True, eq=False)
class _Clip:
    x: Tensor
    frames: Tensor
    times: Tensor
    about: Tensor
    span: tuple[float, float]


class ClipMemory(StreamingMemory):
    """Clips of ``clip`` frames, each compressed by ``reducer`` as if it were a video; a question gets the ``select``
    clips that are most similar to it and ``spread`` others at equal distances, in the order of time.

    This has the interface of VideoStreaming (arXiv 2405.16009) and nothing of its trained encoder: summary tokens and
    propagated memory, which carry its results, have no training-free counterpart, so no figure of that paper applies.
    The similarity is the cosine between the question and a clip's indicator: its mean feature, or what ``embed`` makes
    of its feature maps. Both must lie in one space (towers of CLIP or SigLIP); embeddings of a language model are not
    comparable in this way. Ties go to the earlier clip; a question of several vectors is the mean of their directions.
    The clips that are spread stand for questions about the whole video: they are those at floor((i + 1/2) R / spread)
    of the R clips that were not selected. Without a question, or with a zero vector, all are spread.

    Memory is bounded by ``capacity`` clips: when there is one more, of the two neighbours with the most similar
    indicators (equal: the first pair) the earlier is dropped, and the span of the later one begins where that began.
    Tokens of two clips lie at different places, so that a mean of them would be of unrelated things. The frames at the
    end that do not fill a clip yet are compressed on the fly, to a number of tokens in proportion, and stand for
    selection like others.

    Args:
        reducer: any temporal method (or text such as "evs:keep=64") that has a ``keep`` and reads nothing but
            embeddings (no tower); its ``keep`` is of one clip. It sees no question, because none is known yet.
        clip: frames of a clip; 16 in the paper.
        select: clips by similarity; 4 in the paper. 0 spreads all.
        spread: other clips.
        capacity: most clips that are held.
        embed: takes the feature maps (T,h,w,C) of a clip to its indicator (E,).
        encode, chunk: see :class:`~tokenreduce.video.memory.StreamingMemory`.

    Raises ``ValueError`` for settings other than these.
    """

    _clips: list[_Clip]
    #: Room for the frames of the clip that is open, and the times of those that are there.
    _open: Tensor | None
    _seconds: list[float]

    def __init__(
        self,
        reducer: Temporal | str,
        *,
        clip: int = 16,
        select: int = 4,
        spread: int = 2,
        capacity: int = 64,
        embed: Callable[[Tensor], Tensor] | None = None,
        encode: Callable[[Any], Tensor] | None = None,
        chunk: int = 32,
    ) -> None:
        method: Reducer = get_method(reducer, "projector") if isinstance(reducer, str) else reducer
        if not isinstance(method, Temporal) or method.keep is None:
            raise ValueError(f"reducer is a temporal method with a budget, keep=..., not {reducer!r}")
        missing = sorted(set(method.required()) - {"text", "times"})
        if missing:
            raise ValueError(f"{method.name} reads {', '.join(missing)}, which a stream of features does not have")
        self.reducer = method
        check_count(clip, "clip", 1)
        check_count(select, "select")
        check_count(spread, "spread")
        if select + spread < 1:
            raise ValueError("select and spread are both 0: no clip would ever be given")
        check_count(capacity, "capacity", select + spread)
        self.clip, self.select, self.spread, self.capacity, self.embed = clip, select, spread, capacity, embed
        super().__init__(encode=encode, chunk=chunk)

    def settings(self) -> dict[str, Any]:
        return {
            "reducer": self.reducer.spec(), "clip": self.clip, "select": self.select, "spread": self.spread,
            "capacity": self.capacity, "chunk": self.chunk,
        }  # fmt: skip

    def tokens(self, question: Tensor | None = None) -> Recalled:
        """Tokens of the clips for ``question`` (E,) or (M,E), or of clips at equal distances without one. Raises
        ``ValueError`` before the first frame and for a question of another length than the indicators."""
        _ = self.shape
        clips = [*self._clips, *([self._compress()] if self._seconds else [])]
        held = [clips[i] for i in self._choose(clips, question)]
        return Recalled(
            torch.cat([c.x for c in held]), torch.cat([c.frames for c in held]), torch.cat([c.times for c in held]),
            tuple(len(c.x) for c in held), torch.tensor([c.span for c in held], dtype=torch.float64),
        )  # fmt: skip

    @property
    def budget(self) -> int:
        return (self.select + self.spread) * self._room(self.clip)

    @property
    def stored(self) -> int:
        return sum(c.x.numel() + c.about.numel() for c in self._clips) + (
            0 if self._open is None else self._open.numel()
        )

    def _room(self, frames: int) -> int:
        """Tokens of a clip of ``frames`` frames."""
        h, w, _ = self.shape
        whole = self.reducer.total(self.clip * h * w)
        return max(1, (2 * whole * frames + self.clip) // (2 * self.clip))

    # -- clips -------------------------------------------------------------------------------------------------------
    def _choose(self, clips: list[_Clip], question: Tensor | None) -> list[int]:
        wanted, chosen = self.select + self.spread, list[int]()
        if question is not None:
            about = torch.stack([c.about for c in clips])
            rows = question.detach().reshape(-1, question.shape[-1]).to(about)
            if rows.shape[1] != about.shape[1]:
                raise ValueError(f"question is a vector of {about.shape[1]} numbers or several, not {rows.shape[1]}")
            asked = unit(rows).mean(0)
            if bool((asked != 0).any()):
                chosen = top((unit(about) * unit(asked)).sum(-1)[None], min(self.select, len(clips)))[0].tolist()
                wanted = self.spread
        rest = [i for i in range(len(clips)) if i not in chosen]
        if wanted and rest:
            stay = evenly(torch.arange(len(rest)), min(wanted, len(rest)), len(rest)).tolist()
            chosen += [i for i, s in zip(rest, stay, strict=True) if s]
        return sorted(chosen)

    @torch.no_grad()
    def _compress(self) -> _Clip:
        assert self._open is not None
        maps = self._open[: len(self._seconds)]
        t, h, w, c = maps.shape
        x = maps.reshape(1, t * h * w, c)
        seconds = torch.tensor(self._seconds, dtype=torch.float64)
        first = self.seen // self.clip * self.clip  # numbers start at 0, and only whole clips are taken out
        at = torch.arange(t).repeat_interleave(h * w)
        times = seconds[at].float().to(x.device)[None]
        plan = self.reducer.at(self._room(t)).plan(Evidence(x, grid=(t, h, w), times=times))
        valid = plan.validity()
        there = slice(None) if valid is None else valid[0]
        mine = at[plan.representatives()[0][there].cpu()]
        about = maps.float().mean((0, 1, 2)) if self.embed is None else self.embed(maps).detach().float()
        if about.dim() != 1:
            raise ValueError(f"embed gives one vector (E,) for a clip, not {tuple(about.shape)}")
        span = float(seconds[0]), float(seconds[-1])
        return _Clip(plan.reduce(x)[0][there].clone(), mine + first, seconds[mine], about.clone(), span)

    def _add(self, frame: Tensor, number: int, time: float) -> None:
        if self._open is None:
            self._open = frame.new_empty(self.clip, *frame.shape)
        self._open[len(self._seconds)] = frame
        self._seconds.append(time)
        if len(self._seconds) < self.clip:
            return
        self._clips.append(self._compress())
        self._seconds.clear()
        if len(self._clips) > self.capacity:
            about = unit(torch.stack([c.about for c in self._clips]))
            i = int((about[1:] * about[:-1]).sum(-1).argmax())
            lost, kept = self._clips.pop(i), self._clips[i]
            self._clips[i] = _Clip(kept.x, kept.frames, kept.times, kept.about, (lost.span[0], kept.span[1]))

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def _clear(self) -> None:
        self._clips, self._open, self._seconds = [], None, []

    def _state(self) -> dict[str, Tensor]:
        out = {}
        if self._clips:
            for name in ("x", "frames", "times", "about"):
                out[f"clips.{name}"] = torch.stack([getattr(c, name) for c in self._clips])
            out["clips.span"] = torch.tensor([c.span for c in self._clips], dtype=torch.float64)
        if self._open is not None and self._seconds:
            out["open.maps"] = self._open[: len(self._seconds)].clone()
            out["open.times"] = torch.tensor(self._seconds, dtype=torch.float64)
        return out

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        if "clips.x" in state:
            x = state["clips.x"]
            if len(x) > self.capacity or x.shape[1] != self._room(self.clip):
                raise ValueError(f"{self.capacity} clips of {self._room(self.clip)} tokens, not {tuple(x.shape[:2])}")
            x, frames, times, about = (state[f"clips.{name}"].clone() for name in ("x", "frames", "times", "about"))
            for *row, (first, last) in zip(x, frames, times, about, state["clips.span"].tolist(), strict=True):
                self._clips.append(_Clip(row[0], row[1], row[2], row[3], (first, last)))
        if "open.maps" in state:
            maps, self._seconds = state["open.maps"], state["open.times"].tolist()
            if len(maps) >= self.clip or len(maps) != len(self._seconds):
                raise ValueError(f"{len(maps)} frames of an open clip of {self.clip}, at {len(self._seconds)} times")
            self._open = maps.new_empty(self.clip, *maps.shape[1:])
            self._open[: len(maps)] = maps
