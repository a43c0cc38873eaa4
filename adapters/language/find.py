"""The image/video language model inside a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.adapters.language.families import FAMILIES, Language
from tokenreduce.adapters.language.generic.discover import discover
from tokenreduce.adapters.language.projector.tower import vision_of
from tokenreduce.adapters.language.retrieval import is_served, limits, owner_of

__all__ = ["find"]


def find(model: nn.Module) -> Language | None:
    """The image/video language model inside ``model``, or None.

    Raises ``TypeError`` for one whose language model is built from parts that are not decoder layers with a
    ``self_attn``, as all families have by default, and for one outside the table that cannot be served.
    """
    for name, module in model.named_modules():
        family = FAMILIES.get(type(module).__name__)
        if family is not None and type(module).__module__.startswith("transformers."):
            config: Any = module.config
            found = (getattr(config, i, None) for i in family.ids)
            ids = tuple(i for i in found if isinstance(i, int))
            text: Any = module.get_submodule(family.language)
            layers = tuple(getattr(text, family.layers, ()))
            if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
                raise TypeError(
                    f"the language model of {type(module).__name__} is a {type(text).__name__}; supported are language "
                    f"models whose .{family.layers} are decoder layers with a .self_attn (Llama, Mistral, Qwen, Gemma)"
                )
            owners = (m for m in model.modules() if hasattr(m, "_prefill") and getattr(m, "model", None) is module)
            owner = owner_of(model, module)
            return Language(
                name, module, type(module).__name__, text, layers, ids, next(owners, None), vision_of(module), owner,
                limits(owner), is_served(owner), family,
            )  # fmt: skip
    return discover(model)
