"""Image/video language models as data: where the parts of a family are, and what a model has.

The families differ in where their parts are (:data:`FAMILIES`) and, in Qwen3-VL, in DeepStack: visual features that
the language model adds after its first layers to columns that may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["EVIDENCE", "FAMILIES", "Family", "Language", "TOWER", "Vision"]

EVIDENCE = (
    "keys", "queries", "values", "attention", "ahead", "plain", "middle", "before", "prompt", "norm", "frames",
    "history", "places", "unrotated", "rotary",
)  # fmt: skip


#: Evidence of the tower that a language-stage method can ask for.
TOWER = ("tower", "cls")


@dataclass(frozen=True)
class Vision:
    """The parts of a family between pixels and language model."""

    towers: tuple[nn.Module, ...]
    blocks: tuple[tuple[nn.Module, ...], ...]
    projector: nn.Module | None
    #: How tokens are made of patches: "plain", "tiled", "shuffled", "pooled" or "packed".
    kind: str
    cls: bool
    #: Block whose output enters the projector.
    feature: int
    #: Whether the family takes videos as such, and not as several images.
    videos: bool = False
    #: Pooling heads of the towers, with a query of their own.
    heads: tuple[nn.Module, ...] = ()
    #: Evidence that there is, where a family was discovered; None where the parts say it.
    given: tuple[str, ...] | None = None
    #: What makes a token of ``unit`` rows of the tower's output, where it makes each by itself.
    through: nn.Module | None = None
    unit: int = 1

    @property
    def depth(self) -> int:
        return len(self.blocks[0])

    @property
    def evidence(self) -> tuple[str, ...]:
        if self.given is not None:
            return self.given
        given = ["tower", "text"]
        given += ["cls"] if self.cls else []
        given += ["clip"] if self.cls and self.projector is not None else []
        given += ["crops"] if self.kind == "tiled" else []
        given += ["head"] if self.heads else []
        given += ["through"] if self.through is not None else []
        given += ["pixels"]
        return tuple(given)


@dataclass(frozen=True)
class Family:
    """Where the parts are. ``ids`` are config attributes that name the placeholder tokens; ``deep`` says that the
    language model takes DeepStack features, ``types`` is the argument that says what every token is: 1 an image's, 2 a
    video's."""

    language: str = "language_model"
    layers: str = "layers"
    ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    deep: bool = False
    types: str = "mm_token_type_ids"


#: Inner model class -> its parts.
FAMILIES: dict[str, Family] = {
    "LlavaModel": Family(),
    "LlavaNextModel": Family(),
    "LlavaNextVideoModel": Family(),
    "LlavaOnevisionModel": Family(),
    "VideoLlavaModel": Family(),
    "Qwen2VLModel": Family(),
    "Qwen2_5_VLModel": Family(),
    "Qwen3VLModel": Family(deep=True),
    "InternVLModel": Family(),
    "Idefics3Model": Family(language="text_model"),
    "SmolVLMModel": Family(language="text_model"),
    "PaliGemmaModel": Family(),
    "Gemma3Model": Family(types="token_type_ids"),
}


@dataclass(frozen=True)
class Language:
    """One language model with visual tokens found inside a model."""

    name: str
    inner: nn.Module
    family: str
    text: nn.Module
    layers: tuple[nn.Module, ...]
    ids: tuple[int, ...]
    generator: nn.Module | None = None
    vision: Vision | None = None
    #: The wrapper that calls the inner model in a way of its own, as retrieval models do.
    owner: nn.Module | None = None
    #: What is not reduced, in sentences.
    limits: tuple[str, ...] = ()
    #: Whether methods can act in it at all.
    served: bool = True
    parts: Family = Family()
    #: "table" for a row of :data:`FAMILIES`, "discovered" for what was found by structure.
    how: str = "table"
    #: Discovered: the module at whose call columns go, and why methods inside the language model cannot act.
    site: nn.Module | None = None
    why_not_inside: str = ""

    @property
    def stages(self) -> tuple[str, ...]:
        """Where methods can act in the language model and before it."""
        if self.how == "discovered":
            return ("projector",) if self.why_not_inside else ("language", "projector", "cache")
        return ("language", "projector") if self.owner is not None else ("language", "projector", "cache")

    @property
    def evidence(self) -> tuple[str, ...]:
        """Evidence inside the language model; what the tower saw comes there as scores."""
        return (*EVIDENCE, *(e for e in self.projector if e in TOWER))

    @property
    def projector(self) -> tuple[str, ...]:
        """Evidence besides the features at the projector stage."""
        return ("text",) if self.vision is None else self.vision.evidence
