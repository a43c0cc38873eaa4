"""Streaming memory: a video without end, frame by frame, in a fixed number of tokens."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenreduce.core.budget import check_count

__all__ = ["Recalled", "StreamingMemory"]


@dataclass(frozen=True, eq=False)
class Recalled:
    """What a memory gives to a language model: tokens in the order of time, and where they are from.

    A piece (frame or clip) is what gets delimiters and a time stamp of its own in the prompt.

    Args:
        x: (K,C) tokens, piece by piece.
        frames: (K,) int64 number in the stream of the frame that each token is from.
        times: (K,) float64 seconds of these frames.
        lengths: tokens of every piece.
        spans: (P,2) float64 seconds of the first and the last frame that a piece stands for.
    """

    x: Tensor
    frames: Tensor
    times: Tensor
    lengths: tuple[int, ...]
    spans: Tensor


class StreamingMemory(ABC):
    """Base of memories for streams: :meth:`push` frames as they come, ask for :meth:`tokens` at any time.

    Frames are feature maps (T,h,w,C), in front of or behind the projector, all of one shape and dtype; or whatever
    ``encode`` turns into feature maps. Memory and tokens are bounded by the settings however long the stream is, and
    how the stream is cut into calls of :meth:`push` changes nothing (beyond the rounding of ``encode`` at other batch
    sizes). Features are kept as they come, in their dtype and on their device, without gradients; nothing of the
    tensors that were pushed is kept alive.

    :meth:`state_dict` and :meth:`load_state_dict`, or :meth:`save` and :meth:`load` (safetensors), continue a stream
    bit for bit.

    Args:
        encode: takes a slice of the frames that are pushed (anything with a length and slices) to (T,h,w,C).
        chunk: most frames that ``encode`` gets at once.
    """

    KINDS: ClassVar[dict[str, type[StreamingMemory]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        StreamingMemory.KINDS[cls.__name__] = cls

    def __init__(self, *, encode: Callable[[Any], Tensor] | None = None, chunk: int = 32) -> None:
        check_count(chunk, "chunk", 1)
        self.encode, self.chunk = encode, chunk
        self.clear()

    # -- what a memory says ------------------------------------------------------------------------------------------
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the constructor takes besides functions, as JSON knows it."""

    @abstractmethod
    def tokens(self, question: Tensor | None = None) -> Recalled:
        """What is remembered, for a question (C,) or (M,C) where the memory selects by it; changes nothing."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """Most tokens that :meth:`tokens` gives. Raises ``ValueError`` before the first frame."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """How many feature values are held."""

    @abstractmethod
    def _add(self, frame: Tensor, number: int, time: float) -> None:
        """Remember a frame (h,w,C), a view of what was pushed: it must be copied."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """All that is remembered."""

    @abstractmethod
    def _restore(self, state: Mapping[str, Tensor]) -> None:
        """The opposite of :meth:`_state`, on an empty memory."""

    # -- the stream --------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget everything, as for a new stream."""
        self.seen, self._last = 0, float("-inf")
        self._shape: tuple[int, ...] | None = None
        self._dtype: torch.dtype | None = None
        self._clear()

    @property
    def shape(self) -> tuple[int, ...]:
        """(h,w,C) of the frames. Raises ``ValueError`` before the first one."""
        if self._shape is None:
            raise ValueError("the memory has seen no frame yet: push some first")
        return self._shape

    def push(self, frames: Any, times: Tensor | Sequence[float] | None = None) -> None:
        """Remember more frames: (T,h,w,C), or what ``encode`` takes; ``times`` (T,) seconds, by default their numbers.

        Raises ``ValueError`` for times that run backwards or are not as many, and for features of another shape or
        dtype than before, or that are not finite; frames before the chunk that failed are then in.
        """
        total = len(frames)
        if times is None:
            times = range(self.seen, self.seen + total)
        when = [float(t) for t in times]
        if len(when) != total or any(
            not a <= b < float("inf") for a, b in zip([self._last, *when], when, strict=False)
        ):
            raise ValueError(
                f"times are {total} finite seconds that never run backwards, from {self._last} on, not {when[:8]}"
            )
        for start in range(0, total, self.chunk):
            part = frames[start : start + self.chunk]
            with torch.no_grad():
                maps = part if self.encode is None else self.encode(part)
                self._check(maps, min(self.chunk, total - start))
                for frame, time in zip(maps, when[start:], strict=False):
                    self._add(frame, self.seen, time)
                    self.seen, self._last = self.seen + 1, time

    def _check(self, maps: Any, expected: int) -> None:
        if not isinstance(maps, Tensor) or maps.dim() != 4 or len(maps) != expected or not maps.is_floating_point():
            given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(
                f"frames are float feature maps ({expected},h,w,C), not {given}: name a function in encode"
            )
        if self._shape is None:
            if not maps[0].numel():
                raise ValueError(f"frames of shape {tuple(maps.shape[1:])} hold nothing")
            self._shape, self._dtype = tuple(maps.shape[1:]), maps.dtype
        if tuple(maps.shape[1:]) != self._shape or maps.dtype != self._dtype:
            raise ValueError(
                f"all frames of a stream are {self._shape} {self._dtype}, not {tuple(maps.shape[1:])} {maps.dtype}"
            )
        # The sum is not finite where one of them is not, and costs a fraction of looking at each.
        if not bool(maps.sum(dtype=torch.promote_types(maps.dtype, torch.float32)).isfinite()):
            raise ValueError(f"features of frames {self.seen} to {self.seen + expected - 1} hold NaN or infinity")

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is remembered, as tensors; empty before the first frame."""
        if self._shape is None:
            return {}
        return {
            "stream.seen": torch.tensor(self.seen),
            "stream.last": torch.tensor(self._last, dtype=torch.float64),
            "stream.shape": torch.tensor(self._shape),
            "stream.like": torch.empty(0, dtype=self._dtype),
            **self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a memory of the same settings was when it gave ``state``. Raises ``ValueError`` for a state that
        does not fit, and the memory is then empty."""
        self.clear()
        if not state:
            return
        try:
            self.seen, self._last = int(state["stream.seen"]), float(state["stream.last"])
            self._shape, self._dtype = tuple(state["stream.shape"].tolist()), state["stream.like"].dtype
            self._restore({k: v for k, v in state.items() if not k.startswith("stream.")})
        except (KeyError, ValueError) as wrong:
            self.clear()
            raise ValueError(f"this state is not of a {type(self).__name__} of these settings: {wrong}") from wrong

    def save(self, path: str | Path) -> None:
        """Write settings and state to a safetensors file, whole or not at all; functions are not saved.

        Raises ``OSError`` that names the file.
        """
        from safetensors.torch import save as to_bytes

        from tokenreduce.common.files import write_bytes

        about = {"kind": type(self).__name__, "settings": self.settings()}
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_bytes(path, to_bytes(state, {"memory": json.dumps(about)}))

    @staticmethod
    def load(path: str | Path, device: str = "cpu", **functions: Any) -> StreamingMemory:
        """The memory in a file of :meth:`save`; ``functions`` are those of its constructor (``encode``, ``embed``).

        Raises ``ValueError`` for a safetensors file without a memory.
        """
        from safetensors import safe_open

        with safe_open(str(path), "pt", device=device) as file:
            about = json.loads((file.metadata() or {}).get("memory", "{}"))
            kind = StreamingMemory.KINDS.get(about.get("kind", ""))
            if kind is None:
                raise ValueError(
                    f"{path} holds no memory of a known kind ({', '.join(StreamingMemory.KINDS)}); write one with "
                    f"memory.save(path), and read it with tokenreduce.video.StreamingMemory, which knows all kinds"
                )
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
        out = kind(**about["settings"], **functions)
        out.load_state_dict(state)
        return out
