"""Image language models with random weights and their prompts: what clocks and FLOPs need, without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PACKED", "SHAPES", "Shape", "build", "build_packed", "config_of", "packed_config", "packed_prompt", "prompt",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Dimensions of a LLaVA-1.5 (``pinpoints`` empty) or LLaVA-NeXT model and of one prompt.

    ``tower`` and ``llm`` are (width, layers, heads, MLP width); heads are as many for keys, but a Qwen2.5-VL's, which
    are ``kv`` (a quarter where that is None). The tower is CLIP's, read at its last layer but one. ``text`` tokens
    stand around ``side`` x ``side`` patches of 14 px; LLaVA-NeXT cuts an image of ``pixels`` (height, width) into
    crops of that size, and adds an overview and row ends. The last 64 ids of the ``vocabulary`` are special, and the
    first of these is the placeholder :attr:`image`.
    """

    tower: tuple[int, int, int, int]
    llm: tuple[int, int, int, int]
    side: int = 24
    text: int = 64
    vocabulary: int = 32_064
    pinpoints: tuple[tuple[int, int], ...] = ()
    pixels: tuple[int, int] = (336, 336)
    budgets: tuple[int, ...] = (192, 128, 64)
    kv: int | None = None

    @property
    def image(self) -> int:
        """Placeholder of a visual token; text ids are below it."""
        return self.vocabulary - 64

    @property
    def crops(self) -> tuple[int, int]:
        """(rows, columns) of crops, (0, 0) where there is only the image."""
        size = self.side * 14
        return (self.pixels[0] // size, self.pixels[1] // size) if self.pinpoints else (0, 0)

    @property
    def visual(self) -> int:
        """Visual tokens of an image, row ends included."""
        rows, columns = self.crops
        return self.side**2 * (1 + rows * columns) + self.side * rows


_CLIP_L = (1024, 24, 16, 4096)
_VICUNA_7B = (4096, 32, 32, 11008)
#: ``small`` is LLaVA-1.5 for a CPU: as many visual tokens, a tower a quarter as wide as the language model that takes
#: the same small share of the FLOPs (4 %), and an output layer of 3 % of the weights. ``tiny`` only shows that every
#: method runs.
SHAPES: dict[str, Shape] = {
    "tiny": Shape((32, 4, 2, 64), (64, 4, 4, 128), vocabulary=512),
    "small": Shape((256, 8, 4, 1024), (1024, 12, 16, 2816), vocabulary=4096),
    "llava-7b": Shape(_CLIP_L, _VICUNA_7B),
    "llava-next-7b": Shape(
        _CLIP_L, _VICUNA_7B, pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        pixels=(672, 672), budgets=(640, 320, 160),
    ),
}  # fmt: skip


#: Qwen2.5-VL for a CPU, with a tower that takes more than a tenth of the FLOPs.
PACKED = Shape((320, 8, 5, 856), (1024, 12, 16, 2816), vocabulary=4096)


def _sizes(dims: tuple[int, int, int, int]) -> dict[str, Any]:
    width, layers, heads, mlp = dims
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp)


def config_of(shape: Shape) -> Any:
    """The config of transformers. Raises ``ImportError`` that names the extra where transformers is missing."""
    try:
        import transformers as hf
    except ImportError as error:
        raise ImportError("image language models need transformers: pip install 'tokenreduce[hf]'") from error
    vision = hf.CLIPVisionConfig(**_sizes(shape.tower), image_size=shape.side * 14, patch_size=14)
    text = hf.LlamaConfig(**_sizes(shape.llm), vocab_size=shape.vocabulary, max_position_embeddings=8192)
    more: dict[str, Any] = {}
    config: Any = hf.LlavaConfig
    if shape.pinpoints:
        config = hf.LlavaNextConfig
        more["image_grid_pinpoints"] = [list(p) for p in shape.pinpoints]
    return config(
        vision_config=vision, text_config=text, image_token_index=shape.image, vision_feature_layer=-2, **more
    )


def packed_config(shape: Shape) -> Any:
    """The same as a Qwen2.5-VL: every fourth block of the tower sees the whole image, the others windows of 112 px,
    and four heads of queries share one of keys. Needs transformers."""
    import transformers as hf

    width, layers, heads, mlp = shape.tower
    vision = dict(
        depth=layers, hidden_size=width, intermediate_size=mlp, num_heads=heads, patch_size=14, window_size=112,
        out_hidden_size=shape.llm[0], fullatt_block_indexes=list(range(3, layers, 4)),
    )  # fmt: skip
    head = shape.llm[0] // shape.llm[2] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 4, head * 3 // 8, head * 3 // 8]}
    text = dict(**_sizes(shape.llm), num_key_value_heads=shape.kv or max(shape.llm[2] // 4, 1),
                vocab_size=shape.vocabulary,
                rope_parameters=rope, max_position_embeddings=32_768)  # fmt: skip
    return hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=shape.image, video_token_id=shape.image + 1,
        vision_start_token_id=shape.image + 2, vision_end_token_id=shape.image + 3,
    )  # fmt: skip


def build(shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model of transformers, with random weights and fused attention, in eval mode. Raises ``ImportError`` that
    names the extra where transformers is missing."""
    try:
        import transformers as hf
    except ImportError as error:
        raise ImportError("image language models need transformers: pip install 'tokenreduce[hf]'") from error
    model: Any = hf.LlavaNextForConditionalGeneration if shape.pinpoints else hf.LlavaForConditionalGeneration
    torch.manual_seed(seed)
    with torch.device(device):
        return model._from_config(config_of(shape), dtype=dtype, attn_implementation="sdpa").eval()


def build_packed(
    shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A Qwen2.5-VL as :func:`build` builds a LLaVA. Needs transformers."""
    import transformers as hf

    torch.manual_seed(seed)
    model: Any = hf.Qwen2_5_VLForConditionalGeneration
    with torch.device(device):
        return model._from_config(packed_config(shape), dtype=dtype, attn_implementation="sdpa").eval()


def packed_prompt(
    shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """A Qwen2.5-VL's prompt of one image of ``side`` x ``side`` patches, four of which are a visual token, and
    ``shape.text`` text tokens, two of them around the image."""
    g = torch.Generator().manual_seed(seed)
    visual, half = shape.side**2 // 4, shape.text // 2
    ids = torch.randint(3, shape.image, (1, shape.text + visual), generator=g)
    ids[:, half : half + visual] = shape.image
    ids[:, half - 1], ids[:, half + visual] = shape.image + 2, shape.image + 3
    pixels = torch.randn(shape.side**2, 3 * 2 * 14**2, generator=g)
    out = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype),
        "image_grid_thw": torch.tensor([[1, shape.side, shape.side]]), "mm_token_type_ids": (ids == shape.image).int(),
    }  # fmt: skip
    return {name: t.to(device) for name, t in out.items()}


def prompt(
    shape: Shape, batch: int = 1, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """``batch`` prompts of one image and ``shape.text`` random text tokens, half of them behind the image."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, shape.image, (batch, shape.text + shape.visual), generator=g)
    first = shape.text // 2
    ids[:, first : first + shape.visual] = shape.image
    rows, columns = shape.crops
    size = shape.side * 14
    views = (1 + rows * columns,) if shape.pinpoints else ()
    pixels = torch.randn(batch, *views, 3, size, size, generator=g)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    if shape.pinpoints:
        out["image_sizes"] = torch.tensor([shape.pixels] * batch)
    return {name: t.to(device) for name, t in out.items()}
