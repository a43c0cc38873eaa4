"""Choose frames of a video by what they show: relevance to a question, or diversity, on candidates at one per second.

An encoder is any object with ``images(frames) -> (T, E)`` for (T,H,W,3) uint8 and ``texts(list of str) -> (M, E)``,
both in one space, as arrays or tensors; :func:`tokenreduce.adapters.language.projector.frame_scores.frame_encoder`
makes one of a CLIP or
SigLIP model. For long videos the encoder is the cost: one pass per candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenreduce.video.reading import Frames, open_video
from tokenreduce.video.sampling import aks, by_fps, max_min, uniform

__all__ = ["METHODS", "Encoder", "Selection", "select_frames"]

METHODS = ("uniform", "fps", "aks", "diverse")


class Encoder(Protocol):
    """A joint space of pictures and texts. ``size``, if there, is the short side that it looks at."""

    def images(self, frames: NDArray[np.uint8]) -> Any: ...

    def texts(self, texts: list[str]) -> Any: ...


@dataclass(frozen=True, eq=False)
class Selection(Frames):
    """Chosen frames, with their true times.

    Attributes:
        method: the one that chose; another than asked for where something was lacking, as ``warnings`` says.
        candidates: indices of the frames that were looked at; empty for "uniform" and "fps".
        scores: relevance of each candidate (cosine), None without a question.
    """

    method: str = "uniform"
    candidates: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    scores: NDArray[np.float64] | None = field(default=None, repr=False)


def select_frames(
    video: str | PathLike[str] | Frames,
    n: int,
    method: str = "aks",
    *,
    query: str | Sequence[str] | None = None,
    encoder: Encoder | None = None,
    pool: float = 1.0,
    most: int | None = 1000,
    pairs: bool = False,
    size: int | None = None,
    max_pixels: int | None = None,
    reader: str = "auto",
    batch: int = 32,
    rate: float | None = None,
) -> Selection:
    """``n`` frames of a video file, or of :class:`Frames` read before (then those are the candidates).

    Args:
        video: a file, or frames.
        n: frames; all of them where there are fewer.
        method: "uniform" over all frames; "fps", candidates at ``pool`` per second thinned out evenly; "aks", relevance
            with coverage (:func:`aks`); "diverse", farthest points (:func:`max_min`), weighed by relevance if there is
            a query. Without a query, or with one to which all candidates are equally relevant, "aks" becomes "diverse";
            without an encoder, both become "uniform".
        query: what the frames are for; of several, a candidate counts by the nearest.
        encoder: see above.
        pool: candidates per second.
        most: at most that many candidates, spread evenly.
        pairs: choose pairs of neighbouring candidates, for models whose temporal patches hold two frames; n is even.
        size, max_pixels, reader, rate: of the frames returned, as in :func:`tokenreduce.video.read_frames`.
        batch: candidates decoded and encoded at a time.

    Raises ``ValueError`` for settings that make no sense, :class:`VideoError` for files that cannot be read.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is an int >= 1, not {batch!r}")
    if isinstance(video, Frames) and (size is not None or max_pixels is not None):
        raise ValueError("size and max_pixels are for files: these frames are read already")
    queries = [] if query is None else [query] if isinstance(query, str) else list(query)
    queries = [q for q in queries if q.strip()]
    notes = []
    if method in ("aks", "diverse") and encoder is None:
        notes.append(f"chosen by uniform: {method} needs an encoder")
        method = "uniform"
    source = _Read(video) if isinstance(video, Frames) else open_video(video, reader, rate=rate)
    if method == "uniform":
        chosen = uniform(source.count, n, pairs=pairs)
        return _selection(_take(source, chosen, size, max_pixels), notes, method)
    candidates = by_fps(source.times, pool, source.duration, most=most)
    if isinstance(video, Frames) and method != "fps":
        candidates = uniform(source.count, most or source.count)
    if method == "fps":
        chosen = [candidates[i] for i in uniform(len(candidates), n, pairs=pairs)]
        return _selection(_take(source, chosen, size, max_pixels), notes, method)
    assert encoder is not None
    features, candidates = _encode(source, candidates, encoder, batch)
    scores = None
    if queries:
        texts = _unit(_array(encoder.texts(queries)))
        if texts.ndim != 2 or texts.shape[1] != features.shape[1]:
            raise ValueError(f"encoder gives texts {texts.shape} and images {features.shape}: that is not one space")
        scores = (features @ texts.T).max(1).astype(np.float64)
    if method == "aks" and (scores is None or scores.max() == scores.min()):
        notes.append("chosen by diverse: " + ("there is no query" if scores is None else "all are equally relevant"))
        method = "diverse"
    if method == "aks":
        assert scores is not None
        picks = aks(scores, n, pairs=pairs)
    else:
        picks = max_min(features, n, scores, pairs=pairs)
    read = _take(source, [candidates[i] for i in picks], size, max_pixels)
    return _selection(read, notes, method, np.array(candidates, np.int64), scores)


class _Read:
    """Frames in memory, as a video whose frames they are."""

    def __init__(self, frames: Frames) -> None:
        order = np.argsort(frames.times, kind="stable")
        self._frames, self._order = frames, order
        self.times = frames.times[order] - frames.times[order[0]]
        self.count = len(frames)
        step = float(np.median(np.diff(self.times))) if self.count > 1 else 1.0
        self.duration = float(self.times[-1]) + step

    def read(self, indices: Sequence[int], *, size: int | None = None, max_pixels: int | None = None) -> Frames:
        at = self._order[list(indices)]
        frames = self._frames
        return replace(frames, frames=frames.frames[at], times=frames.times[at], indices=frames.indices[at])


def _take(source: Any, chosen: list[int], size: int | None, max_pixels: int | None) -> Frames:
    read: Frames = source.read(chosen, size=size, max_pixels=max_pixels)
    return read


def _encode(source: Any, candidates: list[int], encoder: Encoder, batch: int) -> tuple[NDArray[Any], list[int]]:
    """(count, E) of unit length, and the candidates that could be decoded."""
    rows, kept = [], []
    for at in range(0, len(candidates), batch):
        part = candidates[at : at + batch]
        # The encoder sees small pictures: memory stays that of one batch at its own resolution.
        read = source.read(part, size=getattr(encoder, "size", None))
        lost = set(read.missing) if not isinstance(source, _Read) else set()
        row = _array(encoder.images(read.frames))
        if row.ndim != 2 or len(row) != len(read):
            raise ValueError(f"encoder.images gives shape {row.shape} for {len(read)} frames, not ({len(read)}, E)")
        rows.append(row)
        kept += [i for i in part if i not in lost]
    return _unit(np.concatenate(rows)), kept


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _selection(
    read: Frames,
    notes: list[str],
    method: str,
    candidates: NDArray[np.int64] | None = None,
    scores: NDArray[np.float64] | None = None,
) -> Selection:
    values = {f.name: getattr(read, f.name) for f in fields(Frames)}
    values["warnings"] = (*read.warnings, *notes)
    if candidates is not None:
        values["candidates"] = candidates
    return Selection(**values, method=method, scores=scores)
