"""What the image tab shows of a picture that goes through a model: predictions, tokens, FLOPs and time."""

from __future__ import annotations

from typing import Any

from PIL import Image

from tokenreduce.bench.columns import seconds
from tokenreduce.bench.models import Loaded
from tokenreduce.demo.common import literal
from tokenreduce.measure.image import ImageComparison
from tokenreduce.zoo.examples import Example, digit_examples, scene2_examples, scene_examples

__all__ = ["SEVERAL", "drawn", "enlarged", "examples_of", "facts", "in_flops", "probabilities", "thumbnails"]

#: Models whose classes do not exclude each other: their outputs are probabilities one by one.
SEVERAL = ("world-vit", "world-vit-2")


def examples_of(model: str) -> tuple[Example, ...]:
    """Pictures to try ``model`` on."""
    if model == "world-vit-2":
        return scene2_examples(6)
    return digit_examples(6) if model == "digits-vit" else scene_examples(6)


def probabilities(loaded: Loaded, outputs: Any, most: int = 5) -> dict[str, float] | None:
    """The likeliest classes, None for a model without classes."""
    if loaded.kind == "features" or (loaded.kind == "zero-shot" and loaded.classifier is None):
        return None
    shares = outputs.sigmoid() if loaded.name in SEVERAL else outputs.softmax(-1)
    best = shares.topk(min(most, len(shares)))
    names = loaded.labels or [f"class {i}" for i in range(len(shares))]
    return {names[i]: float(p) for p, i in zip(best.values, best.indices.tolist(), strict=True)}


def facts(comparison: ImageComparison, clock: tuple[Any, Any] | None, batch: int) -> str:
    """Tokens, FLOPs and time as a table."""
    a, b = comparison.stock, comparison.reduced
    rows = [
        (
            "tokens after the last layer",
            f"{a.tokens[-1]}",
            f"{b.tokens[-1]}",
            f"{a.tokens[-1] / b.tokens[-1]:.2f}x fewer",
        ),
        ("FLOPs of one image", in_flops(a.flops), in_flops(b.flops), f"{100 * b.flops / a.flops:.1f} %"),
    ]
    name = f"time for {batch} images"
    if clock is None:
        rows.append((name, "measuring", "measuring", ""))
    else:
        ratio = clock[0].ratio(clock[1])
        said = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        rows.append((name, seconds(clock[0].median), seconds(clock[1].median), said))
    rows.append(("likeness of the outputs (cosine)", "", "", f"{comparison.similarity:.3f}"))
    lines = ["| | unreduced | reduced | |", "|:--|--:|--:|--:|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([*lines, "", *(f"Note: {literal(note)}" for note in comparison.notes)])


def in_flops(value: float) -> str:
    """
    >>> in_flops(1.5e9), in_flops(2.5e6)
    ('1.50 G', '2.5 M')
    """
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def drawn(made: ImageComparison, layer: float, truth: str = "", side: int = 320) -> tuple[Image.Image, str]:
    """What became of the tokens after ``layer`` (from 1; the last one for larger numbers): the picture, and a sentence
    that also says what is there."""
    at = min(int(layer), made.look.depth)
    about = f"After layer {at}: {made.look.caption(at - 1)}." + (f" In the picture: {truth}." if truth else "")
    return made.look.overlay(at - 1, side=side), about


def thumbnails(model: str) -> list[tuple[Image.Image, str]]:
    """Small pictures of the examples of ``model`` with their captions."""
    return [(enlarged(e.image, 84), e.truth if len(e.truth) < 4 else "") for e in examples_of(model)]


def enlarged(image: Image.Image, least: int = 320) -> Image.Image:
    """An image whose shorter side has at least ``least`` pixels; small ones keep their pixels visible."""
    factor = max(1, -(-least // min(image.size)))
    how = Image.Resampling.NEAREST if min(image.size) <= 112 else Image.Resampling.BICUBIC
    return image.resize((image.width * factor, image.height * factor), how) if factor > 1 else image
