"""Small denoisers of diffusers with random weights, and a pipeline around one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")
TEXT = 24
PARTS = {
    "in_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": TEXT, "attention_head_dim": 4,
}  # fmt: skip


def unet(*blocks: tuple[str, str], **settings: Any) -> Any:
    """A UNet2DConditionModel with the down and up ``blocks``, outermost first."""
    blocks = blocks or (CROSS, CROSS)
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, out_channels=4, block_out_channels=tuple(16 * 2**i for i in range(len(blocks))),
        down_block_types=tuple(b[0] for b in blocks), up_block_types=tuple(b[1] for b in reversed(blocks)),
        **{**PARTS, **settings},
    ).eval()  # fmt: skip


def controlnet() -> Any:
    torch.manual_seed(1)
    net = ControlNetModel(
        block_out_channels=(16, 32), down_block_types=(CROSS[0],) * 2, conditioning_embedding_out_channels=(8, 16),
        **PARTS,
    )  # fmt: skip
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(module.weight)  # zero in a net that has learned nothing
    return net.eval()


def inputs(batch: int = 2, rows: int = 8, columns: int = 12, seed: int = 0) -> tuple[Any, Any, Any]:
    """Latents (B,4,rows,columns), a timestep, and embeddings of a prompt (B,5,24)."""
    made = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, rows, columns, generator=made)
    return latents, torch.tensor(500), torch.randn(batch, 5, TEXT, generator=made)


WORDS = ("a", "cat", "dog", "with", "red", "hat", "and", "blue", "scarf")


def tokenizer() -> Any:
    """A CLIPTokenizer that knows :data:`WORDS`, "scarf" by several tokens, and letters; prompts of 32 tokens."""
    from transformers import CLIPTokenizer

    pairs = [(w[:i], w[i] + ("</w>" if i == len(w) - 1 else "")) for w in WORDS for i in range(1, len(w))]
    letters = sorted({c for word in WORDS for c in word})
    pieces = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in pairs)]
    vocabulary = dict.fromkeys(["<|startoftext|>", *pieces, "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=list(dict.fromkeys(pairs)), model_max_length=32
    )


def pipeline() -> Any:
    """A StableDiffusionPipeline with a text encoder and a tokenizer of a few words; latents of half an image's size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer()
    torch.manual_seed(2)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=TEXT, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made
