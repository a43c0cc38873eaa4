"""Tiny models in folders that vLLM loads, and questions about pictures and films for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import vlm_folders
import vlms
from PIL import Image

Cases = list[dict[str, Any]]


def save_world(folder: Path) -> Path:
    from tokenreduce.integrations.vllm.source import save_embedded

    save_embedded(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    """Qwen2.5-VL of width 128 with heads of 32, which vLLM's attention takes. Videos keep their frame rate in vLLM only
    with ``do_sample_frames`` in the processor."""
    return vlm_folders.save_qwen(
        folder, 256, 8,
        vision=dict(hidden_size=64, intermediate_size=128, out_hidden_size=128, tokens_per_second=2),
        text=dict(
            hidden_size=128, intermediate_size=256, num_key_value_heads=2, max_position_embeddings=2048,
            architectures=["Qwen2ForCausalLM"],
            rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        ),
        films=dict(do_sample_frames=True),
    )  # fmt: skip


def save_qwen3(folder: Path) -> Path:
    """Qwen3-VL of width 128 with heads of 32 and DeepStack features of two blocks of its tower: patches of 8 pixels,
    2x2 of which are a visual token, at most 256 of an image. Digits are words, so that times between frames differ."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    special = vlm_folders.QWEN_SPECIAL
    vision = dict(
        depth=3, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=8, out_hidden_size=128,
        num_position_embeddings=64, deepstack_visual_indexes=[0, 2],
    )  # fmt: skip
    text = vlms._text(
        hidden_size=128, intermediate_size=256, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
        vocab_size=140, rope_parameters={
            "rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0, "mrope_interleaved": True,
        },
    )  # fmt: skip
    config = Qwen3VLConfig(
        vision_config=vision, text_config=text, image_token_id=vlms.IMAGE, video_token_id=vlms.VIDEO,
        vision_start_token_id=special["<|vision_start|>"], vision_end_token_id=special["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(6)  # answers that differ
    vlms._wide(Qwen3VLForConditionalGeneration(config)).save_pretrained(folder)
    token = 16**2  # pixels
    # vLLM normalises pixels on the device, those of films by the numbers of images.
    sizes: dict[str, Any] = dict(patch_size=8, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tokenizer = vlm_folders._tokenizer(special)
    tokenizer.add_tokens([*"0123456789", "seconds"])
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 16 * token, "longest_edge": 256 * token}),
        tokenizer,
        Qwen3VLVideoProcessor(**sizes, size={"shortest_edge": 16 * token, "longest_edge": 1024 * token}),
        chat_template=vlm_folders.QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return folder


#: Of width 128 with heads of 32, which vLLM's attention takes.
_TEXT: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_key_value_heads=2, max_position_embeddings=2048
)  # fmt: skip
#: Tiles (rows, columns) of images.
_TILES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


def save_onevision(folder: Path) -> Path:
    """LLaVA-OneVision of 64 tokens a tile; images of more than two tiles are interpolated."""
    return vlm_folders.save_onevision(
        folder, 64, 8, vision=dict(hidden_size=64, intermediate_size=128),
        text={**_TEXT, "architectures": ["Qwen2ForCausalLM"]}, tiles=_TILES, most=2, narrow=0.2,
    )  # fmt: skip


def save_next(folder: Path) -> Path:
    """LLaVA-NeXT of 64 tokens a tile."""
    return vlm_folders.save_llava_next(
        folder, 64, 8, vision=dict(hidden_size=64, intermediate_size=128),
        text={**_TEXT, "architectures": ["LlamaForCausalLM"]}, tiles=_TILES,
    )  # fmt: skip


def questions(folder: Path, *, single: int = 10) -> Cases:
    """Questions about pictures of the world: one picture each, then two at once, then other budgets."""
    from tokenreduce.zoo.world import SPLITS, ask, scene

    folder.mkdir(parents=True, exist_ok=True)
    span, files, words = SPLITS["test"], [], []
    for i in range(single):
        made = scene(span[i])
        files.append(str(folder / f"{i}.png"))
        Image.fromarray(made.image).save(files[-1])
        words.append(ask(made, span[i], 1)[0].text)
    out: Cases = [{"prompt": f"<image> {w}", "images": [f]} for f, w in zip(files, words, strict=True)]
    out += [{"prompt": f"<image> <image> {words[i]}", "images": [files[i], files[i + 1]]} for i in range(2)]
    return out + [{"prompt": f"<image> {words[0]}", "images": [files[0]], "keep": k} for k in (16, 98, 0.25, 196)]


def qwen_cases(folder: Path) -> Cases:
    """Pictures of several sizes, with text before and behind, and films of several lengths and frame rates."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    see, film = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    files = []
    for i, (h, w) in enumerate([(128, 128), (128, 256), (256, 128), (192, 224)]):
        noise = rng.integers(0, 255, (h // 16, w // 16, 3), dtype=np.uint8)
        files.append(str(folder / f"{i}.png"))
        Image.fromarray(noise).resize((w, h)).save(files[-1])
    out: Cases = [{"prompt": f"{see} what is in this image", "images": [f]} for f in files]
    out += [{"prompt": f"the cat sits near {see} what colour is the {words}", "images": [files[1]]}
            for words in ("cat", "dog , red and small")]  # fmt: skip
    out += [{"prompt": f"{see} and {see} what is there", "images": files[2:]}]
    out += [{"prompt": f"{see} what is on the table", "images": [files[0]], "keep": k} for k in (8, 0.5, 64)]
    for t, fps, keep in ((4, 1.0, None), (6, 2.0, None), (8, 0.5, 12)):
        name = str(folder / f"film{t}.npy")
        np.save(name, rng.integers(0, 255, (t, 96, 128, 3), dtype=np.uint8))
        case: dict[str, Any] = {"prompt": f"the {film} what is in this", "video": name, "fps": fps}
        out.append(case if keep is None else {**case, "keep": keep})
    return out


def qwen3_cases(folder: Path) -> Cases:
    """Those of :func:`qwen_cases`, films that nothing stands before or of which all stays, and a picture beside one."""
    out = qwen_cases(folder)
    see, film = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    seen = {"video": out[-1]["video"], "fps": 2.0}
    out += [{"prompt": f"{film} what is there", **seen, "keep": k} for k in (5, 0.5, 1.0)]
    beside = {**seen, "images": out[3]["images"]}
    return [*out, {"prompt": f"{see} and {film} red", **beside}, {"prompt": f"{film} {see} red", **beside, "keep": 7}]


def tiled_cases(folder: Path, *, films: bool = False) -> Cases:
    """Pictures whose tiles are padded on one side, by several rows or none, alone and two at once, and films."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = []
    sizes = [(64, 128), (48, 128), (200, 130), (120, 90), (100, 60), (50, 170), (64, 64), (192, 48), (64, 160)]
    for i, (h, w) in enumerate(sizes):
        noise = rng.integers(0, 255, (h // 8, w // 8, 3), dtype=np.uint8)
        files.append(str(folder / f"{i}.png"))
        Image.fromarray(noise).resize((w, h)).save(files[-1])
    out: Cases = [{"prompt": "<image> what is in this image", "images": [f]} for f in files[:7]]
    out += [{"prompt": f"the cat sits near <image> what colour is the {words}", "images": [files[1]]}
            for words in ("cat", "dog , red and small")]  # fmt: skip
    # The last two of LLaVA-NeXT have as many tokens, with 24 and 8 row ends among them.
    for pair in (files[:2], files[2:4], files[5:1:-3], files[7:]):
        out += [{"prompt": "<image> and <image> what is there", "images": pair}]
    out += [{"prompt": "<image> what is on the table", "images": [files[2]], "keep": k} for k in (8, 0.5, 64, 5000)]
    out += [{"prompt": "<image> and <image> what is there", "images": files[3:5], "keep": 16}]
    for t, keep in ((2, None), (5, None), (3, 12), (3, 0.5)) if films else ():
        name = str(folder / f"film{t}.npy")
        np.save(name, rng.integers(0, 255, (t, 64, 64, 3), dtype=np.uint8))
        case: dict[str, Any] = {"prompt": "the <video> what is in this", "video": name, "fps": 2.0}
        out.append(case if keep is None else {**case, "keep": keep})
    return out
