"""A CLIP or SigLIP model as the encoder that chooses frames (:func:`tokenreduce.video.select_frames`).

Models are known by their methods, not by their classes: ``encode_image`` and ``encode_text`` (open_clip),
``get_image_features`` and ``get_text_features`` (transformers' CLIPModel, SiglipModel and their like).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["FrameEncoder", "frame_encoder"]


@dataclass(frozen=True, eq=False)
class FrameEncoder:
    """Pictures and texts into one space; made by :func:`frame_encoder`.

    Args:
        model: the model, in the mode, device and dtype that it has.
        prepare: an open_clip preprocessing transform, or a transformers processor.
        tokenizer: that of open_clip; None for a processor, which has its own.
        size: short side in pixels to which frames are shrunk before.
    """

    model: nn.Module
    prepare: Any
    tokenizer: Any = None
    size: int = 448

    @property
    def _own(self) -> bool:
        return hasattr(self.model, "encode_image")

    @torch.no_grad()
    def images(self, frames: Any) -> Tensor:
        """(T,H,W,3) uint8 to (T,E) float32, of unit length."""
        pictures = [Image.fromarray(frame) for frame in frames]
        if self._own:
            pixels = torch.stack([self.prepare(p) for p in pictures])
        else:
            pixels = self.prepare(images=pictures, return_tensors="pt")["pixel_values"]
        weight = next(self.model.parameters())
        return _unit(self._call("image", pixels.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Texts, cut at the length that the model takes, to (M,E) float32, of unit length."""
        device = next(self.model.parameters()).device
        if self._own:
            return _unit(self._call("text", self.tokenizer(texts).to(device)))
        # SigLIP was trained on texts filled up to its full length, and takes no mask for that; CLIP's mask hides it.
        tokens = self.prepare(text=texts, padding="max_length", truncation=True, return_tensors="pt").to(device)
        return _unit(self._call("text", **tokens))

    def _call(self, kind: str, *args: Any, **kwargs: Any) -> Tensor:
        function = getattr(self.model, f"encode_{kind}" if self._own else f"get_{kind}_features")
        out = function(*args, **kwargs)
        pooled: Tensor = out if isinstance(out, Tensor) else out.pooler_output  # an output object since release 5
        return pooled


def frame_encoder(model: nn.Module, prepare: Any, tokenizer: Any = None) -> FrameEncoder:
    """An encoder of an open_clip model (with its preprocessing and tokenizer) or of a transformers CLIPModel or
    SiglipModel (with its processor).

    Raises ``ValueError`` for a model without image and text features, or open_clip without tokenizer.
    """
    if hasattr(model, "encode_image") and hasattr(model, "encode_text"):
        if tokenizer is None:
            raise ValueError("an open_clip model needs its tokenizer: open_clip.get_tokenizer(name)")
    elif not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(
            f"{type(model).__name__} has neither encode_image and encode_text (open_clip) nor get_image_features and "
            f"get_text_features (transformers): give a CLIP or SigLIP model with both towers"
        )
    return FrameEncoder(model, prepare, tokenizer)


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows.float(), dim=-1)
