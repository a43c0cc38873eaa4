"""lmms-eval with fewer tokens: models ``tokenreduce_<id>`` that take ``tokenreduce=SPEC`` among their arguments.

lmms-eval finds them by the entry point group ``lmms_eval.models``; they are its own classes, with its own prompts and
settings, and a patched model inside.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MODELS", "manifests"]

#: Ids behind ``tokenreduce_``, with the classes of lmms-eval that they stand on: ``module.Class`` for conversations
#: and for plain prompts, "" where it has none. Its own ``llava_onevision`` runs the code of the LLaVA-NeXT repository,
#: which is no transformers model; ``llava_hf`` loads the transformers one.
MODELS: dict[str, tuple[str, str]] = {
    "llava_hf": ("chat.llava_hf.LlavaHf", "simple.llava_hf.LlavaHf"),
    "llava_onevision": ("chat.llava_hf.LlavaHf", "simple.llava_hf.LlavaHf"),
    "qwen2_5_vl": ("chat.qwen2_5_vl.Qwen2_5_VL", "simple.qwen2_5_vl.Qwen2_5_VL"),
    "qwen3_vl": ("chat.qwen3_vl.Qwen3_VL", "simple.qwen3_vl.Qwen3_VL"),
    "internvl_hf": ("chat.internvl_hf.InternVLHf", ""),
}


def manifests() -> list[Any]:
    """What lmms-eval registers: one manifest per model of :data:`MODELS`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = f"{__name__}.models"
    return [
        ModelManifest(
            model_id=f"tokenreduce_{name}",
            chat_class_path=f"{here}.chat_{name}" if chat else None,
            simple_class_path=f"{here}.simple_{name}" if simple else None,
        )
        for name, (chat, simple) in MODELS.items()
    ]
