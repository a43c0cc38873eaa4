"""Words that the parts of the plug-in, its command and its users share."""

from __future__ import annotations

__all__ = ["ARCHITECTURE", "FIELD", "KEEP", "MODALITIES", "NATIVE", "PRUNING_RATE", "SETTING", "VERSIONS"]

#: The model class that ``hf_overrides`` select: the plug-in changes no class that vLLM has already.
ARCHITECTURE = "TokenReduceForConditionalGeneration"
#: The one for Qwen3-VL, on vLLM's own class: its Transformers backend leaves DeepStack out.
NATIVE = "TokenReduceQwen3VLForConditionalGeneration"
#: Where ``hf_overrides``, and so the model's config, hold the method.
SETTING = "tokenreduce"
#: What a request may say in ``mm_processor_kwargs``.
KEEP = "tokenreduce_keep"
#: The tensor (one number for each image) that tells the worker how many tokens stay; a modality stands in front.
FIELD = "tokenreduce_kept"
MODALITIES = ("image", "video")
#: The engine's ``video_pruning_rate`` for models with M-RoPE: its machinery that asks a model for positions is on, and
#: 1 - rate is exactly 1, so that it drops nothing itself.
PRUNING_RATE = 1e-17
#: The versions whose interfaces were held against transformers.
VERSIONS = "0.32"
