"""Which models vLLM serves with fewer tokens, read off a config alone, so that the others are refused at the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_class
from tokenreduce.integrations.vllm.counts import fitting
from tokenreduce.integrations.vllm.names import ARCHITECTURE, NATIVE

__all__ = ["ROW_ENDS", "Family", "family_of"]

#: Every tile of an image is an image to a method, as in a patched model.
_TILED = ("internvl", "idefics3", "smolvlm")
_ENDS = "its images have row ends, and vLLM with it was never held against a patched model"
#: Families whose images are an overview and crops without padding, with row ends, see :mod:`.blanks`.
ROW_ENDS = ("llava_next", "llava_onevision")
_PREFIX = "its visual tokens see each other both ways, which vLLM does by their places in the whole prompt"
_REFUSED = {
    "llava_next_video": _ENDS, "granite4_vision": _ENDS, "gemma3": _PREFIX, "paligemma": _PREFIX,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What is known of a model: its ``name`` (``model_type``), whether positions are places in the image (M-RoPE),
    whether images come in tiles, and whether videos come as such."""

    name: str
    axes: bool
    tiled: bool
    videos: bool
    #: Whether it is served by vLLM's own class, of whose tower attention alone is seen, and a video comes frame by
    #: frame with text between, so that every frame is an image to methods that do not look across them.
    native: bool = False

    @property
    def architecture(self) -> str:
        """The class that serves it."""
        return NATIVE if self.native else ARCHITECTURE

    def check_class(self, name: str) -> None:
        """Raise ``ValueError`` unless ``name`` is the class that serves it."""
        if name != self.architecture:
            raise ValueError(f"{self.name} is served by {self.architecture}: give it in hf_overrides, not {name}")

    def check(self, reducer: Projector) -> None:
        """Raise ``ValueError`` for settings of ``reducer`` that this model cannot have in vLLM."""
        if self.native and not _shown(reducer):
            fits = [n for n in fitting() if _shown(get_class(n, "projector")(keep=64))]  # type: ignore[call-arg]
            raise ValueError(
                f"{reducer.spec()} looks at what vLLM's own class of {self.name} does not show "
                f"({', '.join(reducer.required())}); methods that fit: {', '.join(fits)}"
            )
        if reducer.positions == "compact" and self.axes:
            raise ValueError(
                f"{reducer.name}: positions='compact' is not possible on {self.name}, whose positions are places in "
                f"the image; set positions='original' or leave it out"
            )
        if reducer.positions == "original" and not self.axes:
            raise ValueError(
                f"{reducer.name}: positions='original' is not possible in vLLM on {self.name}, where the tokens of a "
                f"prompt are counted one by one; set positions='compact' or leave it out"
            )
        if reducer.temporal and not self.videos:
            raise ValueError(
                f"{reducer.name} looks across the frames of a video, and {self.name} takes a video as single images, "
                f"of which vLLM encodes each alone; choose a method for images"
            )
        if self.name in ROW_ENDS:
            reducer.check_row_ends()
        if self.name in ROW_ENDS and (why := _of_crops(reducer, self.name)) is not None:
            raise ValueError(f"{reducer.name} cannot be served on {self.name}: {why}")


def _of_crops(reducer: Projector, name: str) -> str | None:
    """What ``reducer`` cannot do with crops and row ends; a patched model says it when it sees such an image."""
    if reducer.name == "resize@projector" and name == "llava_onevision":
        return (
            "it takes full grids of tokens, and large images are resampled across their crops, which then are none; "
            "choose pool, which takes any shape"
        )
    if "through" in reducer.required() and name == "llava_onevision":
        return (
            "it asks how the projector makes every token, and those of videos and of large images are made of several "
            "behind it; choose another method"
        )
    return None


def family_of(config: Any) -> Family:
    """The family of a model's ``config`` (of transformers).

    Raises ``ValueError`` for a model of text alone, and for one that cannot be right, with the reason.
    """
    name = str(getattr(config, "model_type", "") or type(config).__name__)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(
            f"{name} has no vision_config: it is no image/video language model whose tokens can be reduced"
        )
    native = name == "qwen3_vl"
    if getattr(vision, "deepstack_visual_indexes", None) and not native:
        raise ValueError(
            f"{name} cannot be served: its language model takes features of several tower blocks (DeepStack), which "
            f"vLLM's Transformers backend leaves out, so that even the whole model answers otherwise there; serve it "
            f"with vLLM's own class and no method, or use tr.patch with transformers"
        )
    if (why := _REFUSED.get(name)) is not None:
        raise ValueError(f"{name} cannot be served with fewer tokens: {why}; use tr.patch with transformers")
    text = config.get_text_config()
    if _windows(text):
        raise ValueError(
            f"{name} cannot be served with fewer tokens: its sliding windows count the tokens of the whole prompt, and "
            f"in vLLM those that are left; use tr.patch with transformers"
        )
    videos = getattr(config, "video_token_id", getattr(config, "video_token_index", None)) is not None
    return Family(name, _axes(text), name in _TILED, videos, native)


def _shown(reducer: Reducer) -> bool:
    """Whether ``reducer`` looks at nothing but embeddings and what patches of the tower pay each other."""
    return {*reducer.required()} <= {"tower"}


def _axes(text: Any) -> bool:
    """Whether positions are places in time and image."""
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(text, name, None) or {}
        if any("mrope_section" in part for part in (given, *(v for v in given.values() if isinstance(v, dict)))):
            return True
    return False


def _windows(text: Any) -> bool:
    """Whether a layer sees a window alone."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return any(kind == "sliding_attention" for kind in kinds)
    return getattr(text, "sliding_window", None) is not None and bool(getattr(text, "use_sliding_window", True))
