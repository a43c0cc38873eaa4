"""Small random-weight image/video language models of the real classes, and prompts with padding and several images."""

from __future__ import annotations

import torch

IMAGE = 99


def llava(layers: int = 4):
    """LLaVA-1.5: 32 px, patch 8, 16 visual tokens per image, wide weights so that small mistakes show."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, max_position_embeddings=512,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return model.eval()


def batch(pad: str = "left", rows: tuple[tuple[int, int], ...] = ((9, 1), (5, 1))) -> dict[str, torch.Tensor]:
    """Prompts given as (text tokens, images), padded on one side; 16 placeholders per image."""
    g = torch.Generator().manual_seed(1)
    prompts = []
    for text, images in rows:
        words = torch.randint(3, 90, (text,), generator=g)
        parts = [words[:2]]
        for i in range(images):
            parts += [torch.full((16,), IMAGE), words[2 + i : 3 + i]]
        prompts.append(torch.cat([*parts, words[2 + images :]]))
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if pad == "left" else slice(0, len(prompt))
        ids[i, at], mask[i, at] = prompt, 1
    out = {"input_ids": ids, "attention_mask": mask}
    if total := sum(n for _, n in rows):
        out["pixel_values"] = torch.randn(total, 3, 32, 32, generator=g)
    return out
