"""Small random-weight image/video language models of the real classes, and prompts with padding and several images."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

IMAGE, VIDEO, OPEN, CLOSE = 99, 98, 97, 96


def encodes_before() -> bool:
    """Whether ``generate`` of this release makes image features before the forward and takes ready ones; releases that
    do not give the beams of a prompt with several images another order of images, reduced or not."""
    from transformers import GenerationMixin

    return hasattr(GenerationMixin, "_expand_multimodal_outputs")


def skip_static_windows(name: str, settings: dict[str, Any]) -> None:
    if name == "gemma3" and settings.get("cache_implementation") == "static" and not encodes_before():
        pytest.skip("this transformers' own static cache fails with sliding windows")


def skip_beams_of_several(settings: dict[str, Any]) -> None:
    if "num_beams" in settings and not encodes_before():
        pytest.skip("this transformers gives the beams of a prompt with several images another order of images")


def _wide(model: Any) -> Any:
    """Wide weights and logits of about 10, so that small mistakes show, and no end-of-sequence token."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mm_input_projection" in name:  # initialised with zeros
                p.normal_(std=0.2)
            elif p.dim() > 1:
                p.mul_(30.0 if "lm_head" in name else 10.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _text(**changes: Any) -> dict[str, Any]:
    settings = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return {**settings, **changes}


def _gemma_text(**changes: Any) -> dict[str, Any]:
    return _text(head_dim=8, query_pre_attn_scalar=8, **changes)


def _tower(size: int, patch: int, **changes: Any) -> dict[str, Any]:
    return dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=size,
        patch_size=patch, **changes,
    )  # fmt: skip


PINPOINTS = [[32, 64], [64, 32]]


def llava(layers: int = 4):
    """LLaVA-1.5: 32 px, patch 8, 16 visual tokens per image, wide weights so that small mistakes show."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(num_hidden_layers=layers)), image_token_index=IMAGE,
        vision_feature_layer=-2,
    )  # fmt: skip
    return _wide(LlavaForConditionalGeneration(config))


def _llava_next():
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    text = MistralConfig(**_text(), sliding_window=None)
    vision = CLIPVisionConfig(**_tower(32, 16))
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )
    return _wide(LlavaNextForConditionalGeneration(config))


def _llava_next_window():
    """A Mistral of before 0.2: every layer slides, over fewer tokens than the prompt has."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    text = MistralConfig(**_text(), sliding_window=12)
    vision = CLIPVisionConfig(**_tower(32, 16))
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )
    return _wide(LlavaNextForConditionalGeneration(config))


def _llava_next_video():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**_tower(32, 16)), text_config=LlamaConfig(**_text()), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return _wide(LlavaNextVideoForConditionalGeneration(config))


def _llava_onevision(size: int = 32, head: bool = False):
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(size, 16), vision_use_head=head), text_config=Qwen2Config(**_text()),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return _wide(LlavaOnevisionForConditionalGeneration(config))


def _video_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**_tower(48, 16)), text_config=LlamaConfig(**_text()), image_token_index=IMAGE,
        video_token_index=VIDEO,
    )  # fmt: skip
    return _wide(VideoLlavaForConditionalGeneration(config))


_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_QWEN = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=OPEN, vision_end_token_id=CLOSE)


def _qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2)
    config = Qwen2VLConfig(vision_config=vision, text_config=_text(rope_parameters=dict(_ROPE)), **_QWEN)
    return _wide(Qwen2VLForConditionalGeneration(config))


def _qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, window_size=16, out_hidden_size=32,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=_text(rope_parameters=dict(_ROPE)), **_QWEN)
    return _wide(Qwen2_5_VLForConditionalGeneration(config))


def _qwen3_vl():
    """DeepStack features after layers 0, 1 and 2: behind the cut and, for entries 1 and 2, within it."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = dict(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, out_hidden_size=32,
        num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2],
    )  # fmt: skip
    text = _text(head_dim=8, rope_parameters={**_ROPE, "mrope_interleaved": True})
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **_QWEN)
    return _wide(Qwen3VLForConditionalGeneration(config))


def _internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**_tower(32, 4)), text_config=Qwen2Config(**_text()), image_token_id=IMAGE,
        tie_word_embeddings=False,
    )  # fmt: skip
    return _wide(InternVLForConditionalGeneration(config))


def _idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        vision_config=_tower(32, 4), text_config={"model_type": "llama", **_text()}, image_token_id=IMAGE,
        pad_token_id=0,
    )  # fmt: skip
    return _wide(Idefics3ForConditionalGeneration(config))


def _smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config=_tower(32, 4), text_config={"model_type": "llama", **_text()}, image_token_id=IMAGE,
        pad_token_id=0,
    )  # fmt: skip
    return _wide(SmolVLMForConditionalGeneration(config))


def _paligemma(model_type: str = "gemma", **changes: Any):
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = {"model_type": model_type, **_gemma_text(**changes)}
    vision = {"model_type": "siglip_vision_model", **_tower(32, 8), "vision_use_head": False}
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32,
        vocab_size=120,
    )  # fmt: skip
    return _wide(PaliGemmaForConditionalGeneration(config))


def _gemma3(window: int):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = _gemma_text(sliding_window=window, layer_types=kinds)
    vision = {"model_type": "siglip_vision_model", **_tower(32, 4), "vision_use_head": False}
    config = Gemma3Config(
        vision_config=vision, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=16, boi_token_index=OPEN,
        eoi_token_index=CLOSE,
    )  # fmt: skip
    return _wide(Gemma3ForConditionalGeneration(config))


Inputs = dict[str, torch.Tensor]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _plain(images: list[int]) -> Inputs:
    return {"pixel_values": _noise(sum(images), 3, 32, 32)}


def _anyres(images: list[int]) -> Inputs:
    return {"pixel_values": _noise(sum(images), 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]] * sum(images))}


def _video_llava_pixels() -> str:
    """What Video-LLaVA calls its images: another name in early releases."""
    from transformers import VideoLlavaForConditionalGeneration

    names = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
    return "pixel_values" if "pixel_values" in names else "pixel_values_images"


def _per_row(images: list[int]) -> Inputs:
    """(rows, most images of a row, ...), where images that are not there are zeros."""
    pixels = torch.zeros(len(images), max(images), 3, 32, 32)
    noise = iter(_noise(sum(images), 3, 32, 32))
    for row, n in enumerate(images):
        for i in range(n):
            pixels[row, i] = next(noise)
    return {"pixel_values": pixels}


def _patches(images: list[int]) -> Inputs:
    grid = torch.tensor([[1, 8, 8]] * sum(images))
    return {"pixel_values": _noise(sum(images) * 64, 96), "image_grid_thw": grid}


def _frames(count: int, size: int) -> Callable[[int], Inputs]:
    return lambda videos: {"pixel_values_videos": _noise(videos, count, 3, size, size)}


def _patches_video(videos: int) -> Inputs:
    grid = torch.tensor([[2, 4, 8]] * videos)
    return {"pixel_values_videos": _noise(videos * 64, 96), "video_grid_thw": grid}


@dataclass(frozen=True)
class Vlm:
    """How to build a model and its inputs: ``image`` and ``video`` are the ids that stand for one in a prompt."""

    build: Callable[[], Any]
    inner: str
    image: tuple[int, ...]
    pixels: Callable[[list[int]], Inputs]
    video: tuple[int, ...] = ()
    frames: Callable[[int], Inputs] | None = None
    types: str | None = None
    text: str = "language_model"

    @functools.cached_property
    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build()


def _run(n: int, token: int = IMAGE) -> tuple[int, ...]:
    return (token,) * n


_EYES = (OPEN, *_run(16), CLOSE)
_FILM = (OPEN, *_run(16, VIDEO), CLOSE)
_STAMPED = (5, OPEN, *_run(8, VIDEO), CLOSE, 6, OPEN, *_run(8, VIDEO), CLOSE)

VLMS: dict[str, Vlm] = {
    "llava": Vlm(llava, "LlavaModel", _run(16), _plain),
    "llava_next": Vlm(_llava_next, "LlavaNextModel", _run(14), _anyres),
    "llava_next_window": Vlm(_llava_next_window, "LlavaNextModel", _run(14), _anyres),
    "llava_next_video": Vlm(
        _llava_next_video, "LlavaNextVideoModel", _run(14), _anyres, _run(8, VIDEO), _frames(8, 32)
    ),
    "llava_onevision": Vlm(_llava_onevision, "LlavaOnevisionModel", _run(14), _anyres, _run(9, VIDEO), _frames(8, 32)),
    "video_llava": Vlm(
        _video_llava, "VideoLlavaModel", _run(9), lambda n: {_video_llava_pixels(): _noise(sum(n), 3, 48, 48)},
        _run(20, VIDEO), _frames(2, 48),
    ),
    "qwen2_vl": Vlm(_qwen2_vl, "Qwen2VLModel", _EYES, _patches, _FILM, _patches_video, "mm_token_type_ids"),
    "qwen2_5_vl": Vlm(_qwen2_5_vl, "Qwen2_5_VLModel", _EYES, _patches, _FILM, _patches_video, "mm_token_type_ids"),
    "qwen3_vl": Vlm(_qwen3_vl, "Qwen3VLModel", _EYES, _patches, _STAMPED, _patches_video, "mm_token_type_ids"),
    "internvl": Vlm(_internvl, "InternVLModel", _run(16), _plain),
    "idefics3": Vlm(_idefics3, "Idefics3Model", _EYES, _per_row, text="text_model"),
    "smolvlm": Vlm(_smolvlm, "SmolVLMModel", _EYES, _per_row, text="text_model"),
    "paligemma": Vlm(_paligemma, "PaliGemmaModel", _run(16), _plain, types="prefix"),
    "paligemma2": Vlm(
        functools.partial(_paligemma, "gemma2", sliding_window=12, attn_logit_softcapping=1.0), "PaliGemmaModel",
        _run(16), _plain, types="prefix",
    ),
    "gemma3": Vlm(functools.partial(_gemma3, 12), "Gemma3Model", _EYES, _plain, types="token_type_ids"),
    "gemma3_wide": Vlm(functools.partial(_gemma3, 512), "Gemma3Model", _EYES, _plain, types="token_type_ids"),
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def onevision_with_head() -> Vlm:
    """LLaVA-OneVision whose tower has kept its pooling head, which checkpoints drop; frames of 2x2 tokens."""

    def build() -> Any:
        model = _llava_onevision(64, head=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("attention.in_proj_weight"):  # attention to more than one patch
                    p.mul_(0.03)
        return model

    return Vlm(build, "LlavaOnevisionModel", (), _anyres, _run(33, VIDEO), _frames(8, 64))


def prompts(vlm: Vlm, rows: tuple[tuple[int, str], ...], pad: str = "left") -> Inputs:
    """Prompts given as (text tokens, "i" and "v" for images and videos), padded on one side."""
    g = torch.Generator().manual_seed(1)
    parts = []
    for text, kinds in rows:
        words = torch.randint(10, 90, (text,), generator=g)
        row = [words[:2]]
        for i, kind in enumerate(kinds):
            row += [torch.tensor(vlm.image if kind == "i" else vlm.video), words[2 + i : 3 + i]]
        parts.append(torch.cat([*row, words[2 + len(kinds) :]]))
    width = max(map(len, parts))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(parts):
        at = slice(width - len(row), width) if pad == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    out = {"input_ids": ids, "attention_mask": mask}
    if vlm.types == "prefix":  # the whole prompt but its last two tokens see each other
        out["token_type_ids"] = torch.zeros_like(ids)
        for i, row in enumerate(parts):
            end = width if pad == "left" else len(row)
            out["token_type_ids"][i, end - 2 : end] = 1
    elif vlm.types is not None:
        out[vlm.types] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    images = [kinds.count("i") for _, kinds in rows]
    if sum(images):
        out.update(vlm.pixels(images))
    if videos := sum(kinds.count("v") for _, kinds in rows):
        assert vlm.frames is not None
        out.update(vlm.frames(videos))
    return out


def batch(pad: str = "left", rows: tuple[tuple[int, int], ...] = ((9, 1), (5, 1))) -> Inputs:
    """Prompts for :func:`llava`, given as (text tokens, images), padded on one side; 16 placeholders per image."""
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


def deeper(name: str) -> Any:
    """The small model of a family with a vision tower of five blocks."""
    config = copy.deepcopy(VLMS[name].model.config)
    setattr(config.vision_config, "depth" if "qwen" in name else "num_hidden_layers", 5)
    if name == "qwen3_vl":
        config.vision_config.deepstack_visual_indexes = [2, 3]
    if name == "qwen2_5_vl":
        config.vision_config.fullatt_block_indexes = [1, 3]
    torch.manual_seed(0)
    return _wide(type(VLMS[name].model)(config))
