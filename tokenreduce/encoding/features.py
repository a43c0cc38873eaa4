"""The vector that an image model makes of an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenreduce.bench.models import Loaded

__all__ = ["features"]


def features(loaded: Loaded, x: Tensor) -> Tensor:
    """(B,C,H,W) to (B,D): image features of a model with two towers, outputs of one without a head, and of a
    classifier what goes into its last layer.

    Raises ``ValueError`` for a classifier whose head cannot be found, or takes no vector per image.
    """
    if loaded.kind != "classifier":
        return _vectors(loaded, loaded.forward(loaded.model, x))
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])

    handle = _head(loaded).register_forward_pre_hook(catch)
    try:
        loaded.forward(loaded.model, x)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ValueError(f"{loaded.name} runs its head {len(caught)} times per image; give its backbone without a head")
    return _vectors(loaded, caught[0])


def _vectors(loaded: Loaded, out: Tensor) -> Tensor:
    if out.dim() != 2:
        shape = ",".join(map(str, out.shape))
        raise ValueError(
            f"{loaded.name} makes ({shape}) of a batch and not one vector per image; give a model that pools its tokens"
        )
    return out


def _head(loaded: Loaded) -> nn.Module:
    """The last layer of a classifier, as timm and transformers name it."""
    model: Any = loaded.model
    named = model.get_classifier() if hasattr(model, "get_classifier") else getattr(model, "classifier", None)
    if not isinstance(named, nn.Module) or isinstance(named, nn.Identity):
        raise ValueError(
            f"the last layer of {loaded.name} is not known (get_classifier or classifier names it); give its backbone "
            "without a head"
        )
    return named
