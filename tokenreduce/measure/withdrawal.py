"""From which layer on a language model no longer needs its visual tokens: the search of ``vtw``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from tokenreduce.core.budget import check_count
from tokenreduce.core.registry import get_method
from tokenreduce.patching import patched

__all__ = ["withdrawal_layer"]


def withdrawal_layer(
    model: Any, batches: Iterable[Mapping[str, Tensor]], *, eta: float = 0.003, first: int = 5
) -> tuple[int, list[float]]:
    """``(layer, divergence)`` for ``tr.VTW(layer=...)``: of every candidate layer, from ``first`` on, the divergence
    KL(without visual tokens from there on || with all) of the first answer token, mean over all samples of ``batches``
    (inputs of ``model``, padded on the left); and the first layer where that is at most ``eta``, or the number of
    layers where none is.

    Raises ``ValueError`` without a batch, and for a ``first`` that the model does not have.
    """
    check_count(first, "first")
    inputs = list(batches)
    if not inputs:
        raise ValueError("there was no batch to find the layer on")
    depth = int(model.config.get_text_config().num_hidden_layers)
    if first >= depth:
        raise ValueError(f"first={first}: the language model has layers 0 to {depth - 1}")
    full = [_last(model, one) for one in inputs]
    found = []
    for layer in range(first, depth):
        with patched(model, get_method(f"vtw:layer={layer}", "language")):
            apart = [_divergence(_last(model, one), f) for one, f in zip(inputs, full, strict=True)]
        found.append(float(torch.cat(apart).mean()))
    chosen = next((first + i for i, value in enumerate(found) if value <= eta), depth)
    return chosen, found


def _last(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B,V) float32 logits of the first answer token."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits[:, -1].float()


def _divergence(candidate: Tensor, full: Tensor) -> Tensor:
    """(B,) KL(candidate || full)."""
    return kl_div(full.log_softmax(-1), candidate.softmax(-1), reduction="none").sum(-1)
