"""Models of transformers: ``hf:ID`` or ``hf:FOLDER``; classifiers, CLIP and SigLIP, backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenreduce.bench import zeroshot
from tokenreduce.bench.loaders.loaded import Converted, Loaded, input_size
from tokenreduce.bench.loaders.shared import NETWORK, first_lines, known, library
from tokenreduce.common.known_words import check_words

__all__ = ["load", "with_towers"]


_TWO_TOWERS = ("clip", "siglip", "metaclip_2")


def _hf_logits(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).logits


def _hf_features(model: Any, x: Tensor) -> Tensor:
    out = model(pixel_values=x)
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state[:, 0] if pooled is None else pooled


def _hf_first_token(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).last_hidden_state[:, 0]


def _hf_image_features(model: Any, x: Tensor) -> Tensor:
    out = model.get_image_features(pixel_values=x)
    return out if isinstance(out, Tensor) else out.pooler_output


@dataclass(frozen=True)
class _HfPixels:
    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


@dataclass
class _HfText:
    model: Any
    tokenizer: Any
    device: torch.device
    lower: bool
    name: str

    def __call__(self, texts: list[str]) -> Tensor:
        # SigLIP was trained on lower-case text padded to full length; CLIP masks its padding, so the same is right.
        texts = [t.lower() for t in texts] if self.lower else texts
        for text in texts:
            check_words(self.tokenizer, text, self.name)
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        if self.lower:
            batch.pop("attention_mask", None)
        out = self.model.get_text_features(**{k: v.to(self.device) for k, v in batch.items()})
        return out if isinstance(out, Tensor) else out.pooler_output


def with_towers(loaded: Loaded, tokenizer: Any, device: torch.device, lower: bool = False) -> Loaded:
    """``loaded``, whose model has an image and a text tower, with what runs them on ``device``; ``lower`` for text in
    lower case, padded to full length."""
    encode = _HfText(loaded.model, tokenizer, device, lower, loaded.name)
    return replace(loaded, forward=_hf_image_features, encode=encode)


def load(name: str, source: str, options: dict[str, Any], device: torch.device) -> Loaded:
    transformers = library("transformers", "hf")
    known(name, options, ("templates",))
    templates = str(options.get("templates", "openai"))
    source = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source

    def get(what: str, function: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return function(source, **kwargs)
        except ImportError:
            raise
        except Exception as error:
            fix = f"give a folder written by save_pretrained (with its processor), or {NETWORK}"
            raise OSError(f"cannot load the {what} of {name}: {first_lines(error)} Fix: {fix}") from error

    config = get("configuration", transformers.AutoConfig.from_pretrained)
    built = tuple(getattr(config, "architectures", None) or ())
    classifies = any(a.endswith("ForImageClassification") for a in built)
    if config.model_type == "siglip2":
        raise ValueError(
            f"{name} takes patches of variable size (SigLIP2 NaFlex), which a batch of images cannot be made of here; "
            "use a checkpoint with fixed resolution"
        )
    image_processor = get("image processor", transformers.AutoImageProcessor.from_pretrained)
    transform = Converted("RGB", _HfPixels(image_processor))
    if config.model_type in _TWO_TOWERS and not classifies:
        model, _ = _hf_weights(get, transformers.AutoModel, name)
        zeroshot.templates(templates)
        tokenizer = get("tokenizer", transformers.AutoTokenizer.from_pretrained)
        made = Loaded(model.eval().to(device), name, "zero-shot", transform, input_size(transform), templates=templates)
        return with_towers(made, tokenizer, device, lower=config.model_type == "siglip")
    if classifies:
        model, _ = _hf_weights(get, transformers.AutoModelForImageClassification, name)
        count = int(config.num_labels)
        named = {int(k): str(v) for k, v in (config.id2label or {}).items()}
        labels = tuple(named[i] for i in range(count)) if sorted(named) == list(range(count)) else None
        if labels is not None and all(label == f"LABEL_{i}" for i, label in enumerate(labels)):
            labels = None  # transformers' placeholders
        wnids = _imagenet_ids() if count == 1000 else None
        return Loaded(
            model.eval().to(device), name, "classifier", transform, input_size(transform), count, labels, wnids,
            forward=_hf_logits,
        )  # fmt: skip
    model, missing = _hf_weights(get, transformers.AutoModel, name, optional=("pooler",))
    forward = _hf_first_token if missing else _hf_features
    return Loaded(model.eval().to(device), name, "features", transform, input_size(transform), forward=forward)


def _hf_weights(get: Any, kind: Any, name: str, optional: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """The model and which of the ``optional`` parts it lacks; anything else missing would be random, hence an error."""
    model, info = get("weights", kind.from_pretrained, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    bad = [key for key in missing if not any(part in key for part in optional)]
    if bad:
        raise OSError(f"{name}: the checkpoint lacks {len(bad)} weights ({', '.join(bad[:4])}...); use a complete one")
    return model, missing


def _imagenet_ids() -> tuple[str, ...] | None:
    """WordNet ids of the 1,000 classes, from timm's table where timm is installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return None
    return tuple(ImageNetInfo("imagenet-1k").label_names())
