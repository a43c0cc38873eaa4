"""Finding the parts of an image/video language model by its structure, and saying why one cannot be served."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin

from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generic.inside import layers_of, parts_of
from tokenreduce.adapters.language.generic.towers import vision_in

__all__ = ["KINDS", "discover", "parameters_of", "placeholders", "refusal"]

KINDS = ("image", "video")
#: The first release of transformers in which features are handed on in one form.
SINCE = "5.18"


def parameters_of(function: Any) -> tuple[str, ...]:
    """Names of what a method takes, behind its decorators."""
    return tuple(inspect.signature(inspect.unwrap(function)).parameters)


def placeholders(config: Any) -> dict[str, int]:
    """Kind -> the token that stands for one of its features."""
    out = {}
    for kind in KINDS:
        found = (getattr(config, f"{kind}_{name}", None) for name in ("token_id", "token_index"))
        token = next((t for t in found if isinstance(t, int) and not isinstance(t, bool)), None)
        if token is not None:
            out[kind] = token
    return out


def said(config: Any, name: str) -> Any:
    """What a config says, None where it says nothing or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception as error:
        if type(error).__module__.startswith("transformers."):
            return None
        raise


def _sees(module: Any) -> bool:
    return any(callable(getattr(module, f"get_{kind}_features", None)) for kind in KINDS)


def discover(model: nn.Module) -> Language | None:
    """The image/video language model inside ``model``, None for one without placeholders of images or videos.

    Raises ``TypeError`` for one that cannot be reduced exactly, with the reason.
    """
    found = _inner(model)
    if found is None:
        return None
    name, inner = found
    if not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        raise TypeError(
            f"{type(model).__name__} is not supported: models are found by their structure with transformers {SINCE} "
            f"or newer, earlier releases hand features on in forms of their own; this is {transformers.__version__}"
        )
    ids = placeholders(inner.config)
    generator = _generator(model, inner)
    why = refusal(inner, generator)
    if why is not None:
        raise TypeError(f"{type(generator or inner).__name__} is not supported: {why}")
    text = _text(inner)
    wrapper = _wrapper(model, inner, generator)
    layers, why_not = layers_of(inner, text)
    if wrapper is not None or generator is None:
        why_not = why_not or "it makes no new tokens, and what reads its hidden states counts columns"
    return Language(
        name, inner, type(inner).__name__, inner if text is None else text, layers, tuple(ids.values()), generator,
        vision_in(inner, text), limits=_limits(inner, generator, wrapper), parts=parts_of(inner, text),
        how="discovered", site=inner if wrapper is None else wrapper, why_not_inside=why_not,
    )  # fmt: skip


def _inner(model: nn.Module) -> tuple[str, Any] | None:
    """The module that merges features into embeddings: the innermost that makes them, of those under ``.model``."""
    for name, module in model.named_modules():
        if not _sees(module) or not hasattr(getattr(module, "config", None), "get_text_config"):
            continue
        if not placeholders(module.config):
            continue
        inner: Any = module
        while _sees(getattr(inner, "model", None)):
            inner, name = inner.model, f"{name}.model" if name else "model"
        return name, inner
    return None


def _generator(model: nn.Module, inner: nn.Module) -> Any:
    """The model with a language head around ``inner``, which may be itself; None where there is none."""
    around = (m for m in model.modules() if hasattr(m, "_prefill") and getattr(m, "model", None) is inner)
    return next(around, inner if hasattr(inner, "_prefill") and hasattr(inner, "generate") else None)


def _wrapper(model: nn.Module, inner: nn.Module, generator: nn.Module | None) -> Any:
    """The outermost model around ``inner`` that takes token ids and is not its generator: it may read masks and
    columns of what it is given, so that columns have to go there."""
    for module in model.modules():
        if module is generator or module is inner:
            return None
        inside = any(m is inner for m in module.modules())
        if inside and hasattr(module, "config") and "input_ids" in parameters_of(type(module).forward):
            return module
    return None


def _text(inner: Any) -> Any:
    """The language model inside, the one without a head; None where ``inner`` is its own."""
    text = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    return None if text is None or text is inner else text


def refusal(inner: Any, generator: Any) -> str | None:
    """Why a model with image features and placeholders cannot be reduced, None where nothing speaks against it."""
    config = inner.config
    takes = parameters_of(type(inner).forward)
    if getattr(config, "is_encoder_decoder", False) or getattr(config.get_text_config(), "is_encoder_decoder", False):
        return "it is an encoder-decoder: visual tokens are read by cross-attention, not as columns of a prompt"
    if said(config.get_text_config(), "cross_attention_layers"):
        return "its language model reads the image by cross-attention, not as columns of the prompt"
    if "input_ids" not in takes or "attention_mask" not in takes:
        return (
            f"{type(inner).__name__}.forward takes no input_ids or attention_mask, by which columns are told and hidden"
        )
    if generator is not None and (call := _own_generate(type(generator))) is not None:
        return (
            f"its own generate calls {call} with embeddings that it merged itself, past the model's forward, so that "
            f"nothing would be reduced there; give it smaller images instead"
        )
    return None


def _own_generate(kind: Any) -> str | None:
    """What a ``generate`` of a class's own calls in place of the library's."""
    try:
        source = inspect.getsource(kind.generate)
    except (OSError, TypeError):
        return None
    found = re.search(r"self\.[\w.]+\.generate\(", source)
    return None if found is None else found.group()[:-1]


def _limits(inner: Any, generator: Any, wrapper: Any) -> tuple[str, ...]:
    return tuple(_sentences(inner, generator, wrapper))


def _sentences(inner: Any, generator: Any, wrapper: Any) -> Iterator[str]:
    yield (
        "discovered by its structure: tokens go at the call of "
        f"{type(wrapper if wrapper is not None else inner).__name__}, before the language model"
    )
    config = inner.config.get_text_config()
    if any(said(config, name) for name in ("sliding_window", "attention_chunk_size")):
        yield "windows count the tokens that are left, as for a prompt that was this short"
    if generator is not None:
        yield "the first images of a generation are reduced; images of later turns stay, with a warning"
