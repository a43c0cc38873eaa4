"""What a language model pays to a place of an image whatever the image shows: the prior of ``d2pruner``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenreduce.common.files import write_bytes
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.patching import patched

__all__ = ["attention_prior"]

#: (sum of attention (n,), number of images) so far.
_SEEN: ContextVar[list[tuple[Tensor, Tensor, Tensor]] | None] = ContextVar("tokenreduce_prior", default=None)


@dataclass(frozen=True)
class _Listen(Reducer, stage="language", needs=("attention", "places")):
    """Drops nothing, and notes the attention of the last token with the places of the visual ones."""

    layer: int = 2

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: LanguageEvidence) -> Plan:
        seen = _SEEN.get()
        if seen is not None and evidence.visual is not None:
            row = evidence.attention(evidence.last())[:, :, 0].mean(1)
            place, marked = evidence.place_of, evidence.visual
            seen.append((row[marked].cpu(), place[marked][:, 4].cpu(), place[marked][:, 5].cpu()))
        return Identity.like(evidence.x)


def attention_prior(
    model: Any, batches: Iterable[Mapping[str, Tensor]], path: str | Path | None = None, *, layer: int = 2
) -> Tensor:
    """(n,) mean attention that the last token of a prompt pays, in the layer before ``layer``, to every token of an
    image of n tokens: over all images of ``batches``, which are inputs of ``model`` with one generic question (the
    paper takes 1000 images). Written to ``path`` where one is given, for ``tr.D2Pruner(prior=path)``.

    Raises ``ValueError`` without an image, and for images with different numbers of tokens.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    token = _SEEN.set(seen)
    try:
        with torch.no_grad(), patched(model, _Listen(layer)):
            for inputs in batches:
                model(**inputs)
    finally:
        _SEEN.reset(token)
    sizes = sorted({int(n) for _, _, counts in seen for n in counts.unique()})
    if len(sizes) != 1:
        raise ValueError(f"a prior is for images of one number of tokens; the batches have images of {sizes or 'none'}")
    total, number = torch.zeros(sizes[0], dtype=torch.double), torch.zeros(sizes[0], dtype=torch.double)
    for row, index, _ in seen:
        total.index_add_(0, index, row.double())
        number.index_add_(0, index, torch.ones_like(row, dtype=torch.double))
    prior = (total / number.clamp(min=1)).float()
    if path is not None:
        from safetensors.torch import save

        name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        write_bytes(path, save({"prior": prior}, {"model": name, "layer": str(layer), "tokens": str(sizes[0])}))
    return prior
