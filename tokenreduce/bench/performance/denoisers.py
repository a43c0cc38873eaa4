"""What denoisers compute in a step: ``python -m tokenreduce.bench.performance.denoisers`` makes the table of
docs/guides/diffusion.md again. Multiply-adds and operators do not depend on the machine; nothing is timed.

Multiply-adds are those of the full models, whose tensors are never made (device "meta"). Operators are those that a CPU
is asked for by models with as many blocks and a tenth of the channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tokenreduce as tr
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.words import speak_everywhere
from tokenreduce.core.flops import count_flops, gmacs
from tokenreduce.measure.operators import count_operators

__all__ = ["NARROW", "SHAPES", "cost"]

#: Settings of UNet2DConditionModel beside the common ones, by model, and the side of the latents of its images.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "Stable Diffusion 1.5": (
        {
            "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
        64,
    ),
    "Stable Diffusion XL": (
        {
            "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        128,
    ),
}  # fmt: skip
#: What makes a model narrow: a tenth of the channels.
NARROW: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8},
    "Stable Diffusion XL": {
        "block_out_channels": (32, 64, 128),
        "norm_num_groups": 8,
        "attention_head_dim": (4, 8, 16),
    },
}
#: What is measured: model, how many times as high and wide as its own images are, methods.
ROWS = (
    (
        "Stable Diffusion 1.5", 1,
        (
            "tomesd:ratio=0.25", "tomesd", "tomesd:ratio=0.6", "tomesd:ratio=0.75",
            "tomesd:merge_crossattn=true,merge_mlp=true", "tomesd:ratio=0",
        ),
    ),
    ("Stable Diffusion 1.5", 2, ("tomesd", "tomesd:ratio=0.75")),
    (
        "Stable Diffusion XL", 1,
        ("tomesd:max_downsample=2", "tomesd:ratio=0.75,max_downsample=2", "tomesd:max_downsample=4"),
    ),
)  # fmt: skip
COLUMNS = ("model", "image", "method", "blocks that merge", "GMACs of a step", "share", "operators of a step")


def built(model: str, device: str, narrow: bool = False) -> Any:
    """A UNet in the shape of ``model``, without trained weights, on ``device``."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise ImportError("denoisers need diffusers: pip install 'tokenreduce[diffusion]'") from error

    with torch.device(device):
        unet: Any = UNet2DConditionModel(**{**SHAPES[model][0], **(NARROW[model] if narrow else {})})
    return unet.eval()


def step(unet: Any, side: int, device: str) -> Any:
    """One step with classifier-free guidance, as a function."""
    latents = torch.zeros(2, 4, side, side, device=device).normal_(generator=None if device == "meta" else _seeded())
    text = torch.zeros(2, 77, unet.config.cross_attention_dim, device=device)
    more = {"text_embeds": torch.zeros(2, 1280, device=device), "time_ids": torch.zeros(2, 6, device=device)}
    return lambda: unet(latents, 500, text, added_cond_kwargs=more).sample


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def cost(model: str, method: str | None, side: int, narrow: bool = False) -> tuple[int, int]:
    """``(FLOPs, blocks that merge)`` of a step with latents of ``side`` x ``side``, a prompt and an empty one."""
    unet = built(model, "meta", narrow)
    call = step(unet, side, "meta")
    if method is None:
        return count_flops(call), 0
    with tr.patched(unet, method):
        with torch.no_grad(), tr.record(unet, flops=False) as trace:
            call()
        return count_flops(call), len(trace.plans)


def operators(model: str, method: str | None, side: int) -> int:
    """Operators of a step of the narrow model on the CPU."""
    torch.manual_seed(0)
    unet = built(model, "cpu", narrow=True)
    call = step(unet, side, "cpu")
    with torch.no_grad():
        if method is None:
            return count_operators(unet, call, []).total
        with tr.patched(unet, method):
            return count_operators(unet, call, []).total


def main(
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """Multiply-adds and operators of denoisers, by method."""
    import diffusers

    speak_everywhere()
    lines = []
    for model, times, methods in ROWS:
        side = SHAPES[model][1] * times
        stock = cost(model, None, side)[0]
        for method in (None, *methods):
            flops, blocks = cost(model, method, side)
            name = "stock" if method is None else f"`{method}`"
            cells = (f"{gmacs(flops):,.0f}", f"{flops / stock:.1%}", f"{operators(model, method, side):,}")
            lines.append((model, f"{8 * side} px", name, str(blocks), *cells))
    about = f"Batch 2 (guidance), without gradients; torch {torch.__version__}, diffusers {diffusers.__version__}."
    deliver("denoisers", COLUMNS, lines, about, markdown)


if __name__ == "__main__":
    typer.run(main)
