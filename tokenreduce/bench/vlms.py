"""Image language models by name: the one place where commands and benchmarks load them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce.bench.loaders.shared import NETWORK, first_lines, library

__all__ = ["DTYPES", "LoadedVlm", "is_vlm", "load_vlm", "pick_device"]

DTYPES: dict[str, Any] = {
    "auto": "auto", "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


#: The models that ship with the package, with the data of each.
EMBEDDED = {"world-llava": "world", "world-llava-2": "world2"}


@dataclass(frozen=True)
class LoadedVlm:
    """A model in eval mode on its device, and the processor that makes its inputs."""

    name: str
    model: nn.Module = field(repr=False)
    processor: Any = field(repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def is_vlm(name: str) -> bool:
    """Whether ``name`` (an embedded one, a Hub id or a folder, ``hf:`` may stand in front) is a model that answers
    questions about images; False also for what is no transformers model at all."""
    if name in EMBEDDED:
        return True
    if not name.startswith("hf:") and not Path(name).is_dir():
        return False
    try:
        transformers = library("transformers", "hf")
        source, local = _source(name)
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
    except (ImportError, OSError, ValueError):
        return False
    return type(config) in transformers.AutoModelForImageTextToText._model_mapping


def load_vlm(name: str, device: torch.device | str = "auto", dtype: str = "auto") -> LoadedVlm:
    """An image language model of transformers with its processor.

    Args:
        name: ``world-llava`` or ``world-llava-2``, the embedded models; a Hub id; or a folder that ``save_pretrained``
            of model and processor wrote (never the network then). ``hf:`` may stand in front of the last two, as in the
            other commands.
        device: "auto" is CUDA where there is one and the CPU otherwise.
        dtype: "auto" is what the weights are stored in; or fp32, bf16, fp16.

    Raises ``ValueError`` for a model of another kind, a processor without image or text part, a bad device or dtype;
    ``OSError`` for a folder, weights or a processor that are not there (or damaged embedded weights);
    ``ImportError`` without transformers.
    """
    place, kind = pick_device(device), _dtype(dtype)
    from tokenreduce import zoo

    if name in EMBEDDED:
        made = zoo.load(name, device=place)
        return LoadedVlm(name, made.model if kind == "auto" else made.model.to(kind), made.processor)
    if name in zoo.names():
        raise ValueError(f"{name} classifies images; embedded models that answer questions: {', '.join(EMBEDDED)}")
    transformers = library("transformers", "hf")
    source, local = _source(name)

    def get(what: str, function: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return function(source, local_files_only=local, **kwargs)
        except ImportError:
            raise
        except Exception as error:
            fix = (
                f"save it there with {what}.save_pretrained" if local else f"give a folder that is there, or {NETWORK}"
            )
            raise OSError(f"cannot load the {what} of {name}: {first_lines(error)} Fix: {fix}") from error

    config = get("configuration", transformers.AutoConfig.from_pretrained)
    if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{name} is a {config.model_type} model, not one that answers questions about images; give a LLaVA, "
            f"Qwen-VL, InternVL, PaliGemma, Gemma3 or similar model (tokenreduce describe shows vision transformers)"
        )
    processor = get("processor", transformers.AutoProcessor.from_pretrained)
    lacks = [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]
    if lacks:
        raise ValueError(
            f"{name} has no processor with image_processor and tokenizer (found a {type(processor).__name__}); write "
            f"one beside the weights with processor.save_pretrained"
        )
    model, info = get(
        "model", transformers.AutoModelForImageTextToText.from_pretrained, dtype=kind, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise OSError(f"{name}: {len(missing)} weights are missing ({', '.join(missing[:4])}...); use complete weights")
    return LoadedVlm(name, model.eval().to(place), processor)


def _source(name: str) -> tuple[str, bool]:
    """What transformers shall load, and whether that is a folder."""
    text = name.removeprefix("hf:")
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise OSError(f"{name} has no config.json; give a folder that model.save_pretrained wrote")
        return str(folder), True
    if folder.exists():
        raise OSError(f"{name} is a file; give the folder that model.save_pretrained wrote")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise OSError(f"there is no folder {text}; give one that model.save_pretrained wrote, or a Hub id (owner/name)")
    return text, False


def pick_device(name: torch.device | str) -> torch.device:
    """``"auto"`` to CUDA or CPU. Raises ``ValueError`` for a device that is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = "auto, cpu" + (", cuda" if cuda else "")
        raise ValueError(f"device {str(name)!r} is not available; available: {there}") from error
    return device


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]
