"""What a reduction does to one image: the answer, tokens and FLOPs of every layer, a picture, and the clock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenreduce.core.flops import flops_by_layer
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.core.trace import Trace, record
from tokenreduce.measure.picture import Look, looked, only_tower
from tokenreduce.measure.timing import Timing, fused_attention, interleaved
from tokenreduce.patching import patched, twin

__all__ = ["ImageComparison", "ImageSide", "clock_image", "compare_image"]


@dataclass(frozen=True)
class ImageSide:
    """One model on one image.

    Attributes:
        outputs: (classes,) logits, or (D,) features of a model without classes.
        tokens: after each layer, prefix included.
        layer_flops: of each layer, its share of the reduction's own work included.
        flops: of the whole model; the layers' and everything around them.
    """

    outputs: Tensor = field(repr=False)
    tokens: tuple[int, ...]
    layer_flops: tuple[int, ...]
    flops: int


@dataclass(frozen=True)
class ImageComparison:
    """``stock`` against ``reduced``; ``look`` draws what became of the tokens."""

    reducers: tuple[Reducer, ...]
    stock: ImageSide
    reduced: ImageSide
    look: Look
    notes: tuple[str, ...] = ()

    @property
    def similarity(self) -> float:
        """Cosine of the two outputs: 1 where the reduction changed nothing."""
        return float(F.cosine_similarity(self.stock.outputs, self.reduced.outputs, dim=0))


def compare_image(
    loaded: Any, image: Image.Image, reducers: Reducer | str | Sequence[Reducer | str]
) -> ImageComparison:
    """Run ``image`` through a model without and with ``reducers``, () for none.

    ``loaded`` is what :func:`tokenreduce.bench.models.load_model` returns. A copy that shares its weights is patched,
    so that other threads may use ``loaded`` meanwhile. Raises what :func:`tokenreduce.measure.picture.look` raises.
    """
    chosen = _parsed(reducers)
    model = twin(loaded.model)
    tower = only_tower(model)
    x = _input(loaded, model, image)
    sides: list[ImageSide] = []
    # An unpatched model reports no tokens: a method that never acts makes it.
    for some in (parse("tome:r=0"), chosen)[: 2 if chosen else 1]:
        with torch.no_grad(), patched(model, *some), record(model) as trace, _layers(tower, trace) as layers:
            out = _answered(loaded, model, x)
        sides.append(ImageSide(out[0].float().cpu(), tuple(trace.tokens), tuple(layers), trace.flops))
    look = looked(loaded, image, chosen, trace.steps)
    return ImageComparison(chosen, sides[0], sides[-1], look, tuple(trace.notes))


def clock_image(
    loaded: Any,
    image: Image.Image,
    reducers: Reducer | str | Sequence[Reducer | str],
    *,
    batch: int = 8,
    rounds: int = 5,
) -> tuple[Timing, Timing]:
    """Seconds per forward of ``batch`` copies of ``image``, without and with ``reducers``, in interleaved rounds.

    Raises ``ValueError`` for numbers below 1 and what :func:`tokenreduce.patch` raises.
    """
    if batch < 1:
        raise ValueError(f"batch is an int >= 1, not {batch!r}")
    chosen = _parsed(reducers)
    stock, reduced = twin(loaded.model), twin(loaded.model)
    x = _input(loaded, stock, image).expand(batch, -1, -1, -1).contiguous()
    with patched(reduced, *chosen) if chosen else nullcontext(), torch.inference_mode(), fused_attention(x.device):
        times = interleaved(
            {"stock": lambda: loaded.forward(stock, x), "reduced": lambda: loaded.forward(reduced, x)},
            rounds, device=x.device,
        )  # fmt: skip
    return times["stock"], times["reduced"]


def _layers(tower: Any, trace: Trace) -> AbstractContextManager[list[int]]:
    return flops_by_layer(tower.blocks, lambda: trace.flops)


def _parsed(reducers: Reducer | str | Sequence[Reducer | str]) -> tuple[Reducer, ...]:
    return parse(*((reducers,) if isinstance(reducers, Reducer | str) else reducers))


def _input(loaded: Any, model: Any, image: Image.Image) -> Tensor:
    """(1,C,H,W) on the model's device."""
    return loaded.transform(image).unsqueeze(0).to(next(model.parameters()).device)


def _answered(loaded: Any, model: Any, x: Tensor) -> Tensor:
    """Logits; of a zero-shot model without class names its features."""
    if loaded.kind == "zero-shot" and loaded.classifier is None:
        return loaded.forward(model, x)
    return loaded.predict(x, model)
