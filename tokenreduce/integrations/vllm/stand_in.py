"""A LLaVA-1.5 with random weights and a processor of its own, to measure a server with: no network, any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["save_stand_in"]

_WORDS = ("describe", "what", "is", "this", "a", "the", "picture", "of")
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
#: The chat template: pictures first, no roles.
_TEMPLATE = (
    "{% for turn in messages %}{% if turn.content is string %}{{ turn.content }}{% else %}"
    "{% for part in turn.content %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def save_stand_in(folder: Path, *, layers: int = 12, width: int = 1024, image: int = 336, patch: int = 14) -> Path:
    """Write a LLaVA-1.5 of bfloat16 noise to ``folder``: pictures of ``image`` pixels in (image/patch)^2 visual tokens,
    a language model of ``layers`` layers of ``width``, and a tower of 4 layers of 256.

    Weights have the names of the published checkpoints, which vLLM's own class and transformers both read.
    """
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=image,
        patch_size=patch,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=len(_SPECIAL) + len(_WORDS) + 51, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_SPECIAL.index("<image>"),
        image_seq_length=(image // patch) ** 2,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({_published(name): value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    _processor(image, patch).save_pretrained(folder)
    return folder


def _published(name: str) -> str:
    """The name of a weight in published checkpoints."""
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        return f"{tower}vision_model.{name.removeprefix(tower)}"
    return name


def _processor(image: int, patch: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*_SPECIAL, *_WORDS))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    pixels = CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image})
    return LlavaProcessor(
        pixels, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )  # fmt: skip
