"""The image/video language models of the installed transformers, one by one, as their default configs make them.

Models are built without memory (on torch's meta device), so that nothing is downloaded and nothing is run: what can act
where is read off their structure, as :func:`tokenreduce.describe` does.
"""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from tokenreduce.measure.census import Row

__all__ = ["census_language"]

_ENDS = ("ForConditionalGeneration", "ForCausalLM", "ForRetrieval", "Model")


def census_language(library: str = "transformers") -> list[Row]:
    """A row for every class around a language model with visual tokens; only transformers is a ``library`` with any.
    Raises ``ImportError`` without transformers."""
    if library != "transformers":
        return []
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [row for kind in _classes() if (row := _row(kind)) is not None]
    finally:
        transformers.logging.set_verbosity(before)


def _classes() -> Iterator[Any]:
    """The class of every folder that a user would load, retrieval models besides."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CHAT

    root = os.path.join(os.path.dirname(transformers.__file__), "models")
    chats = {n for value in CHAT.values() for n in ([value] if isinstance(value, str) else value)}
    for folder in sorted(os.listdir(root)):
        path = os.path.join(root, folder, f"modeling_{folder}.py")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            code = file.read()
        sees = "def get_image_features" in code or "def get_video_features" in code
        if not sees and not any(f"class {name}(" in code for name in chats) and "ForRetrieval(" not in code:
            continue
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        own = [c for c in own if issubclass(c, transformers.PreTrainedModel)]
        yield from _chosen(own, chats)


def _chosen(own: list[Any], chats: set[str]) -> list[Any]:
    """Of the classes of a folder: those that answer in text, or the one that makes features."""
    named = [c for c in own if c.__name__ in chats or c.__name__.endswith(_ENDS[:3])]
    named = [c for c in named if any(hasattr(c, f"get_{k}_features") for k in ("image", "video")) or c.__name__ in chats
             or "Retrieval" in c.__name__]  # fmt: skip
    if named:
        return named
    return [c for c in own if hasattr(c, "get_image_features") and c.__name__.endswith(_ENDS[3])][:1]


def _row(kind: Any) -> Row | None:
    """None for a class that has no visual tokens in a language model."""
    from tokenreduce.adapters import describe, encoder_refusal
    from tokenreduce.adapters.language.find import find

    name = kind.__name__
    try:
        config = _named(kind.config_class())
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:
        why = " ".join(str(error).split())
        return Row("transformers", name, "not built", (), f"no model from its default config: {why[:100]}")
    try:
        found = find(model)
    except TypeError as error:
        return Row("transformers", name, "refused", (), _short(str(error)))
    if found is None:
        return _without(name, model)
    if not found.served:
        return Row("transformers", name, "refused", (), "; ".join(found.limits))
    reasons = [f"not inside the language model: {found.why_not_inside}"] if found.why_not_inside else []
    if found.how == "discovered" and (why := encoder_refusal(model, found)):
        reasons.append(f"not inside the vision tower: {_short(why)}")
    return Row("transformers", name, found.how, describe(model).stages, "; ".join(reasons))


def _named(config: Any) -> Any:
    """``config`` with numbers for placeholders that its checkpoints name and its defaults leave open."""
    for kind in ("image", "video"):
        for end in ("token_id", "token_index"):
            name = f"{kind}_{end}"
            if getattr(config, name, 0) is None and name not in (getattr(config, "attribute_map", None) or {}):
                setattr(config, name, 7)
    return config


def _without(name: str, model: Any) -> Row | None:
    from tokenreduce.adapters.encoders.readers import is_vlm

    if not is_vlm(model):
        return None
    why = "no placeholder tokens among embeddings: its images are read in another way (cross-attention, prefixes)"
    return Row("transformers", name, "refused", (), why)


def _short(message: str) -> str:
    """The reason in an error, without who it is about."""
    return message.partition(" is not supported: ")[2] or message
