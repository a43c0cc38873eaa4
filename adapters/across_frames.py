"""Methods that make one of several frames of a video inside a vision tower, and where frames lie so that they can."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.core.reducer import Reducer

__all__ = ["check_frames", "why_not_frames"]

#: Models whose language model gets class tokens of frames among the visual tokens.
_WITH_CLASS = ("VideoLlavaModel",)


def why_not_frames(model: nn.Module, towers: Any, language: Any, merging: bool) -> str | None:
    """Why frames of a video cannot become fewer in ``towers`` (adapters and towers), None where they can: as frames
    that merge between two blocks (``merging``), or as several that are one already in front of the first."""
    if language is None:
        return f"{type(model).__name__} does not see videos frame by frame"
    if not hasattr(language.inner, "get_video_features"):
        return f"{language.family} takes a video as single images"
    if any(tower.rope and not getattr(adapter, "EXPANDS", False) for adapter, tower in towers):
        return "its tower has rotary positions"
    if merging and (language.how != "table" or any(hasattr(a, "EXPANDS") or t.grid is None for a, t in towers)):
        return f"{language.family} packs frames, or runs them in an order that is not known"
    if merging and type(language.inner).__name__ in _WITH_CLASS:
        return f"{language.family} gives its language model the class token of every frame, too"
    return None


def check_frames(model: nn.Module, reducers: tuple[Reducer, ...], towers: Any, language: Any) -> None:
    """Raise ``ValueError`` for methods across frames where frames of a video do not run through one tower."""
    across = [r for r in reducers if r.stage == "encoder" and (r.merges_frames or getattr(r, "frames", 1) > 1)]
    if not across:
        return
    merging = across[0].merges_frames
    why = why_not_frames(model, towers, language, merging)
    if why is not None and merging:
        raise ValueError(
            f"{across[0].spec()} cannot act here: it merges frames in vision towers that see those of a video as a "
            f"batch (LLaVA-OneVision, LLaVA-NeXT-Video), and {why}; choose a method for videos before the "
            f"language model (evs, holitom, fastvid)"
        )
    if why is not None:
        raise ValueError(
            f"{across[0].spec()}: frames is for vision towers that see the frames of a video one by one "
            f"(LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA, Qwen-VL), and {why}; leave frames out"
        )
    looking = [r for r in reducers if r.stage != "encoder" and "tower" in r.required()]
    looking = [r for r in looking if r not in across[0].parts()]
    if looking:
        raise ValueError(
            f"{looking[0].spec()} looks at what the tower saw of every frame, of which {across[0].spec()} makes one; "
            "choose a method on embeddings, or leave frames out"
        )
