"""A model that is ready to be evaluated, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenreduce.bench import zeroshot
from tokenreduce.common.images import as_rgb

__all__ = ["Converted", "Loaded", "Transform", "input_size"]

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be evaluated.

    Attributes:
        model: in eval mode; what :func:`tokenreduce.patch` takes (all of a CLIP, of which the vision part is patched).
        kind: "classifier" (outputs are logits), "zero-shot" (image features against class prompts) or "features".
        transform: a PIL image to a tensor of ``input_size`` (C,H,W).
        num_classes: outputs, or classes of a zero-shot classifier; 0 where there are none (yet).
        labels: names of the classes in order, where they are known.
        wnids: WordNet ids of the outputs, for ImageNet models.
        forward: ``forward(model, x)`` runs a model with this one's architecture.
        encode: texts to (n, C) features, for zero-shot models.
        templates: name of the prompt templates.
        classifier: (C, classes) of a zero-shot model that knows its classes.
        notes: what a report should say about the model.
    """

    model: nn.Module = field(repr=False)
    name: str
    kind: Literal["classifier", "zero-shot", "features"]
    transform: Transform = field(repr=False)
    input_size: tuple[int, int, int]
    num_classes: int = 0
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    wnids: tuple[str, ...] | None = field(default=None, repr=False)
    forward: Callable[[nn.Module, Tensor], Tensor] = field(default=nn.Module.__call__, repr=False)
    encode: Callable[[list[str]], Tensor] | None = field(default=None, repr=False)
    templates: str = "openai"
    classifier: Tensor | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def predict(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """(B,C,H,W) to logits (B,classes), or features (B,D) where ``kind`` says so.

        ``model`` stands for ``self.model`` (a copy of it). Raises ``ValueError`` for a zero-shot model without classes.
        """
        out = self.forward(self.model if model is None else model, x)
        if self.kind != "zero-shot":
            return out
        if self.classifier is None:
            raise ValueError(f"{self.name} is a zero-shot model and has no classes yet; call with_classes(names)")
        return 100 * F.normalize(out.float(), dim=-1) @ self.classifier

    def with_classes(self, names: Sequence[str]) -> Loaded:
        """A zero-shot model with prompts for ``names``; a classifier whose outputs are called that.

        Raises ``ValueError`` where a classifier has another number of outputs.
        """
        labels = tuple(names)
        if self.kind == "classifier" and len(labels) != self.num_classes:
            raise ValueError(
                f"{self.name} has {self.num_classes} outputs but {len(labels)} class names were given; "
                "give one name per output, in order"
            )
        if self.kind != "zero-shot":
            return replace(self, labels=labels)
        assert self.encode is not None
        made = zeroshot.classifier(self.encode, labels, zeroshot.templates(self.templates))
        return replace(self, labels=labels, num_classes=len(labels), classifier=made)


@dataclass(frozen=True)
class Converted:
    """``inner`` on the image in colour ``mode``; a class, so that worker processes can pickle it."""

    mode: str
    inner: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.inner(as_rgb(image).convert(self.mode))


def input_size(transform: Transform) -> tuple[int, int, int]:
    """(C,H,W) of what ``transform`` makes."""
    c, h, w = transform(Image.new("RGB", (96, 96))).shape
    return int(c), int(h), int(w)
