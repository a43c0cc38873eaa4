"""Clips as inputs of a plain ``LlavaForConditionalGeneration``: frames encoded as pictures, 2x2 tokens pooled to one.

LLaVA has no videos; what it has is the argument ``mm_encoder_outputs``, features made before the call, which
``forward`` and ``generate`` take instead of pixels. A prompt reads "frame <image> frame <image> ... question".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenreduce.zoo import world2_words, world_words

__all__ = ["clip_pixels", "video_inputs"]


def pool(features: torch.Tensor) -> torch.Tensor:
    """(F,N/4,D) from the projected tokens (F,N,D) of frames with an even square grid: the mean of 2x2."""
    half = math.isqrt(features.shape[1]) // 2
    return features.unflatten(1, (half, 2, half, 2)).mean((2, 4)).flatten(1, 2)


def _reading(model: Any, processor: Any) -> Any:
    """``processor``, or the one of the world that ``model`` answers about."""
    second = model.config.text_config.vocab_size == world2_words.SIZE
    return processor or (world2_words if second else world_words).processor()


def clip_pixels(clips: Sequence[np.ndarray], processor: Any = None) -> torch.Tensor:
    """(frames of all clips,3,S,S): what the vision tower gets, 112 or 224 pixels on a side as ``processor`` has it
    (that of the first world where none is given). Raises ``ValueError`` for a clip that is not (T,H,W,3)."""
    from PIL import Image

    for clip in clips:
        if clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
            raise ValueError(f"a clip is (T,H,W,3) with at least one frame, not {tuple(clip.shape)}")
    reading = processor or world_words.processor()
    frames = [Image.fromarray(np.asarray(f)) for clip in clips for f in clip]
    made: torch.Tensor = reading.image_processor(images=frames, return_tensors="pt")["pixel_values"]
    return made


@torch.no_grad()
def video_inputs(
    model: Any,
    clips: Sequence[np.ndarray],
    texts: Sequence[str],
    *,
    processor: Any = None,
    pixels: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Inputs for ``model(**inputs)`` and ``model.generate(**inputs)``: one question about each clip.

    ``model`` is ``world-llava`` (frames of 112 px, 49 tokens each) or ``world-llava-2`` (224 px, 196 tokens, 16
    frames); ``clips`` are (T,H,W,3) uint8 frames (resized where they have another size), ``texts`` the questions
    without placeholders; shorter prompts are padded on the left. Make the inputs under the patch that is to act: a
    patched model's features carry what its methods look at; ``pixels``, made by :func:`clip_pixels` before, are the
    same under every patch. Raises ``ValueError`` for clips and texts of different number or a clip that is not
    (T,H,W,3).
    """
    if len(clips) != len(texts) or not len(clips):
        raise ValueError(f"one question per clip: {len(clips)} clips and {len(texts)} questions")
    reading = _reading(model, processor)
    pixel_values = clip_pixels(clips, reading) if pixels is None else pixels
    seen = model.model.get_image_features(
        pixel_values=pixel_values.to(model.device, model.dtype),
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    )
    features = pool(torch.stack(list(seen.pooler_output)))
    seen.pooler_output = list(features)
    _retell(seen, features)
    one = "frame " + "<image>" * features.shape[1]
    prompts = [" ".join([one] * len(clip)) + f" {text}" for clip, text in zip(clips, texts, strict=True)]
    words = reading.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {k: words[k].to(model.device) for k in ("input_ids", "attention_mask")}
    return {**inputs, "mm_encoder_outputs": {"image": seen}}


def _retell(seen: Any, features: torch.Tensor) -> None:
    """Tell methods before the language model, if any, that a token is four patches now."""
    from tokenreduce.adapters.language.projector.origin import pooled
    from tokenreduce.adapters.language.projector.seen import Entry, encoded_in

    encoded = encoded_in(seen)
    if encoded is not None and encoded.entries:
        origin = pooled(pool, encoded.entries[0].origin.patches, features.device)
        encoded.entries = [Entry(origin, entry.first) for entry in encoded.entries]
