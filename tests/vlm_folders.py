"""Folders with a tiny image language model and its processor, as ``save_pretrained`` writes them, made without a
network: ``python tests/vlm_folders.py OUT_DIR`` writes them. The weights are random, and so are the answers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from vlms import IMAGE, VIDEO, _text, _tower, _wide

Settings = dict[str, Any]

WORDS = re.findall(
    r"\S+",
    "what is in this image the a an of and to on at with near cat dog man woman child hat helmet suit rocket cup "
    "coffee spoon table red blue green white black small large one two three left right up down sits stands holds "
    "looks smiles there are no yes picture photo colour user assistant system you helpful : . , ? !",
)
QWEN_SPECIAL = {
    "<|im_start|>": 95, "<|im_end|>": 94, "<|vision_end|>": 96, "<|vision_start|>": 97, "<|video_pad|>": VIDEO,
    "<|image_pad|>": IMAGE,
}  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant : {% endif %}"
)

ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}> {% endif %}"
    "{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def _tokenizer(special: dict[str, int], **named: str) -> Any:
    """Words to ids 4.. of a vocabulary of 120; ``special`` tokens have the ids of the models in ``vlms.py``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **special}
    free = (i for i in range(4, 120) if i not in vocabulary.values())
    vocabulary.update(zip(WORDS, free, strict=False))
    vocabulary.update((f"<extra_{i}>", i) for i in free)
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=list(special), clean_up_tokenization_spaces=False, **named,
    )  # fmt: skip


def save_llava(folder: Path, size: int = 64, patch: int = 8) -> Path:
    """LLaVA-1.5 without chat template: images of (size, size) pixels in (size/patch)^2 visual tokens."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=size,
        patch_size=patch,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text()), image_token_index=IMAGE, vision_feature_layer=-2,
        image_seq_length=(size // patch) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    _wide(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    LlavaProcessor(
        pixels, _tokenizer({"<image>": IMAGE}), patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_qwen(
    folder: Path, most: int = 64, patch: int = 4, vision: Settings | None = None, text: Settings | None = None,
    films: Settings | None = None,
) -> Path:  # fmt: skip
    """Qwen2.5-VL with a chat template: patches of 4 pixels, 2x2 of which are a visual token, at most ``most``; other
    settings of its tower, of its language model and of the processor of films where they are given."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tower = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=patch, window_size=4 * patch,
        out_hidden_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config=tower | (vision or {}), text_config=_text(**({"rope_parameters": rope} | (text or {}))),
        image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=QWEN_SPECIAL["<|vision_start|>"], vision_end_token_id=QWEN_SPECIAL["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    _wide(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    token = 4 * patch**2  # pixels
    sizes: Settings = dict(
        patch_size=patch, merge_size=2, size={"shortest_edge": 16 * token, "longest_edge": most * token}
    )
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), _tokenizer(QWEN_SPECIAL), Qwen2VLVideoProcessor(**sizes | (films or {})),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_onevision(
    folder: Path, size: int = 32, patch: int = 8, vision: Settings | None = None, text: Settings | None = None,
    tiles: tuple[tuple[int, int], ...] = ((1, 2), (2, 1)), most: int = 9, narrow: float = 1.0,
) -> Path:  # fmt: skip
    """LLaVA-OneVision with a chat template: frames of (size, size) pixels, (size/patch/2)^2 visual tokens each; other
    settings of its tower and of its language model where they are given. Images come in one of the ``tiles`` (rows,
    columns), interpolated where these have far more tokens than ``most`` tiles. SigLIP's own first weights are wide;
    ``narrow`` multiplies those of the tower, so that another order of sums shows less."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    pinpoints = [[rows * size, columns * size] for rows, columns in tiles]
    aspect = f"anyres_max_{most}"
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(size, patch) | (vision or {}), vision_use_head=False),
        text_config=Qwen2Config(**_text(**(text or {}))), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints, vision_aspect_ratio=aspect,
    )  # fmt: skip
    torch.manual_seed(0)
    model = _wide(LlavaOnevisionForConditionalGeneration(config))
    with torch.no_grad():
        for p in model.model.vision_tower.parameters():
            p.mul_(narrow if p.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    square = {"height": size, "width": size}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
        _tokenizer({"<video>": VIDEO, "<image>": IMAGE}), LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(size // patch) ** 2, vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE, vision_aspect_ratio=aspect,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_llava_next(
    folder: Path, size: int = 32, patch: int = 8, vision: Settings | None = None, text: Settings | None = None,
    tiles: tuple[tuple[int, int], ...] = ((1, 2), (2, 1)),
) -> Path:  # fmt: skip
    """LLaVA-NeXT without chat template: an overview and ``tiles`` (rows, columns) of (size, size) pixels; other
    settings of its tower and of its language model where they are given."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    pinpoints = [[rows * size, columns * size] for rows, columns in tiles]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(size, patch) | (vision or {})),
        text_config=LlamaConfig(**_text(**(text or {}))), image_token_index=IMAGE, image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    torch.manual_seed(0)
    _wide(LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
        ),
        _tokenizer({"<image>": IMAGE}), patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_all(folder: Path) -> dict[str, Path]:
    """The models in ``folder``/llava, ``folder``/qwen2_5_vl and ``folder``/onevision."""
    return {
        "llava": save_llava(folder / "llava"), "qwen2_5_vl": save_qwen(folder / "qwen2_5_vl"),
        "onevision": save_onevision(folder / "onevision"),
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/vlm_folders.py OUT_DIR")
    for path in save_all(Path(sys.argv[1])).values():
        print(path)
