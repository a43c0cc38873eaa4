"""What is measured, in the order of what matters most: what time is too short for is at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenreduce.bench.performance.shapes import SHAPES, Shape

__all__ = ["Encoder", "Language", "compiled", "encoders", "languages", "shape_of"]


@dataclass(frozen=True)
class Encoder:
    """A timm model with its settings, a batch, how it runs ("eager", "graphs", "compiled"), a method, and how sizes
    go into attention: "mask" or "key" (see :mod:`tokenreduce.adapters.encoders.sizes`), or "none" do."""

    model: str
    batch: int
    form: str
    method: str
    sizes: str
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.model} batch {self.batch} {self.form} {self.method} sizes {self.sizes}"


@dataclass(frozen=True)
class Language:
    """A shape, a method at a stage that leaves a share of the visual tokens, and what is timed: "eager" (prefill and
    decode step), "graphs" (a decode step as a CUDA graph), or "compiled" (a prefill, layer by layer)."""

    shape: str
    method: str
    stage: str
    keep: float
    form: str

    @property
    def key(self) -> str:
        return f"{self.shape} {self.form} {self.method} at {self.keep:.0%} ({self.stage})"


def _methods(r: int) -> tuple[tuple[str, str], ...]:
    pitome = "pitome:ratio=0.9,prop_attn="
    return (
        (f"tome:r={r}", "mask"), (f"tome:r={r}", "key"), (f"tome:r={r},prop_attn=false", "none"),
        ("evit:base_keep_rate=0.7", "none"), ("repshift:ratio=0.7", "none"),
        (f"{pitome}true", "mask"), (f"{pitome}true", "key"), (f"{pitome}false", "none"),
    )  # fmt: skip


#: Models and how many tokens ToMe takes in every layer.
_TOWERS = (("vit_base_patch16_224", 16), ("vit_large_patch16_224", 8), ("vit_base_patch14_dinov2", 80))
_TINY = (("img_size", 64), ("depth", 2))


def encoders(tiny: bool = False) -> list[Encoder]:
    """Every model at batch 64 and 1, eager and as CUDA graphs."""
    if tiny:
        pairs = _methods(2)
        return [Encoder("vit_tiny_patch16_224", 2, f, m, s, _TINY) for f in ("eager", "graphs") for m, s in pairs]
    return [
        Encoder(model, batch, form, method, sizes)
        for form, batch in (("eager", 64), ("eager", 1), ("graphs", 1), ("graphs", 64))
        for model, r in _TOWERS
        for method, sizes in _methods(r)
    ]


_STAGES = (
    ("visionzip", "projector"), ("fastv", "language"), ("snapkv", "cache"), ("divprune", "projector"),
    ("pyramiddrop", "language"), ("knorm", "cache"), ("cdpruner", "projector"),
)  # fmt: skip
_SHARES = (0.25, 0.1)


def languages(tiny: bool = False) -> list[Language]:
    """Both shapes, seven methods at 25 and 10 %; prefills and steps first, then steps as CUDA graphs."""
    shapes = ("llava-tiny", "qwen2.5-vl-tiny") if tiny else ("llava-1.5-7b", "qwen2.5-vl-7b")
    return [
        Language(shape, method, stage, keep, form)
        for shape in shapes
        for form in ("eager", "graphs")
        for keep in _SHARES
        for method, stage in _STAGES
    ]


def compiled(tiny: bool = False) -> Iterable[Encoder | Language]:
    """What a compiler makes of it. Compiling takes longest, so these come last."""
    model, r, settings = ("vit_tiny_patch16_224", 2, _TINY) if tiny else ("vit_base_patch16_224", 16, ())
    shape = "llava-tiny" if tiny else "llava-1.5-7b"
    return [
        Encoder(model, 2 if tiny else 64, "compiled", f"tome:r={r}", "mask", settings),
        Language(shape, "visionzip", "projector", 0.25, "compiled"),
        Encoder(model, 2 if tiny else 64, "compiled", f"tome:r={r}", "key", settings),
        Language(shape, "divprune", "projector", 0.1, "compiled"),
        Encoder(model, 1, "compiled", f"tome:r={r}", "mask", settings),
        Encoder(model, 1, "compiled", f"tome:r={r}", "key", settings),
    ]


#: Qwen2.5-VL-7B on an image of 1008 px (1,296 visual tokens); "tiny" ones only show that everything runs.
_QWEN_7B = Shape((1280, 32, 16, 3420), (3584, 28, 28, 18944), side=72, vocabulary=152_064, kv=4)
_QWEN_TINY = Shape((32, 4, 2, 64), (64, 4, 4, 128), side=8, text=8, vocabulary=512)
_LLAVA_TINY = Shape((32, 4, 2, 64), (64, 4, 4, 128), side=6, text=8, vocabulary=512)


def shape_of(name: str) -> tuple[Shape, bool]:
    """The dimensions that a name stands for, and whether they are a Qwen2.5-VL's."""
    if name.startswith("qwen"):
        return (_QWEN_TINY if name.endswith("tiny") else _QWEN_7B), True
    return (_LLAVA_TINY if name.endswith("tiny") else SHAPES["llava-7b"]), False
