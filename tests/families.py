"""One small random-weight model of every supported encoder family, with inputs of two different images."""

from __future__ import annotations

import torch
from torch import nn


def first_tensor(out) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    parts = out.to_tuple() if hasattr(out, "to_tuple") else out
    return next(o for o in parts if isinstance(o, torch.Tensor))


def pixels(size: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def _timm(name: str, **changes):
    def build():
        import timm

        settings = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=7) | changes
        return timm.create_model(name, **settings), {"x": pixels(settings["img_size"])}

    return build


def _open_clip(**changes):
    def build():
        from open_clip.transformer import VisionTransformer

        settings = dict(image_size=48, patch_size=8, width=48, layers=4, heads=4, mlp_ratio=2.0, output_dim=16)
        return VisionTransformer(**(settings | changes)), {"x": pixels()}

    return build


def _hf(model: str, config: str, **changes):
    def build():
        import transformers

        settings = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=48, patch_size=8)
        if "intermediate_size" not in changes and not config.startswith("Dinov2"):
            settings["intermediate_size"] = 96
        kind: type[nn.Module] = getattr(transformers, model)
        return kind(getattr(transformers, config)(**(settings | changes))), {"pixel_values": pixels()}

    return build


FAMILIES = {
    "timm vit": _timm("vit_tiny_patch16_224"),
    "timm vit, registers": _timm("vit_small_patch14_reg4_dinov2", init_values=0.3),
    "timm vit, average pool": _timm("vit_tiny_patch16_224", global_pool="avg", class_token=False),
    "timm siglip, attention pool": _timm("vit_base_patch16_siglip_224"),
    "timm deit, distilled": _timm("deit_tiny_distilled_patch16_224"),
    "timm eva02": _timm("eva02_tiny_patch14_224", head_init_scale=1.0),
    "timm dinov3": _timm("vit_small_patch16_dinov3"),
    "open_clip vit": _open_clip(),
    "open_clip vit, average pool": _open_clip(pool_type="avg"),
    "transformers vit": _hf("ViTForImageClassification", "ViTConfig", num_labels=7),
    "transformers clip": _hf("CLIPVisionModel", "CLIPVisionConfig"),
    "transformers siglip": _hf("SiglipVisionModel", "SiglipVisionConfig"),
    "transformers dinov2": _hf("Dinov2Model", "Dinov2Config"),
    "transformers dinov3": _hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
}


def _siglip2():
    """Two images of different size: 36 and 24 patches of 8x8, padded to 36."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_patches=36, patch_size=8
    )
    patches = torch.randn(2, 36, 3 * 64, generator=torch.Generator().manual_seed(7))
    mask = torch.ones(2, 36, dtype=torch.long)
    mask[1, 24:] = 0
    shapes = torch.tensor([[6, 6], [4, 6]])
    return Siglip2VisionModel(config), {
        "pixel_values": patches,
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


FAMILIES["transformers siglip2, padded"] = _siglip2


def _internvl():
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=48, patch_size=8,
        use_qk_norm=True,
    )  # fmt: skip
    return InternVLVisionModel(config), {"pixel_values": pixels()}


def _idefics3(kind: str = "Idefics3", padded: bool = False):
    """Two tiles; where ``padded``, the second has 6x4 of 6x6 patches."""

    def build():
        import importlib

        module = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
        config = getattr(module, f"{kind}VisionConfig")(
            hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=48,
            patch_size=8,
        )  # fmt: skip
        inputs = {"pixel_values": pixels()}
        if padded:
            inputs["patch_attention_mask"] = torch.ones(2, 6, 6, dtype=torch.bool)
            inputs["patch_attention_mask"][1, :, 4:] = False
        return getattr(module, f"{kind}VisionTransformer")(config), inputs

    return build


FAMILIES["transformers internvl"] = _internvl
FAMILIES["transformers idefics3"] = _idefics3()
FAMILIES["transformers idefics3, padded"] = _idefics3(padded=True)
FAMILIES["transformers smolvlm"] = _idefics3("SmolVLM")


def _clip(model: str, config: str, **changes):
    """Two clips of 8 frames of 48x48: 4 x 3 x 3 tubelets of 2x16x16."""

    def build():
        import transformers

        settings = dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=48,
            num_frames=8,
        )  # fmt: skip
        kind: type[nn.Module] = getattr(transformers, model)
        clips = torch.randn(2, 8, 3, 48, 48, generator=torch.Generator().manual_seed(7))
        return kind(getattr(transformers, config)(**(settings | changes))), {"pixel_values": clips}

    return build


_MAE = dict(config="VideoMAEConfig", patch_size=16, tubelet_size=2, num_labels=7)
FAMILIES["transformers videomae"] = _clip("VideoMAEForVideoClassification", **_MAE)
FAMILIES["transformers videomae, tokens"] = _clip("VideoMAEModel", use_mean_pooling=False, **_MAE)
FAMILIES["transformers vivit"] = _clip("VivitModel", "VivitConfig", tubelet_size=[2, 16, 16])
