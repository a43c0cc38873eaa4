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


# -- found by how they are built ---------------------------------------------------------------------------------------
def _spread(build):
    """The same with weights in tables that start as zeros, and scales that start near it."""

    def built():
        model, inputs = build()
        g = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "bias_table" in name or "relative_position" in name:
                    p.copy_(torch.randn(p.shape, generator=g) * 0.3)
                elif any(part in name for part in ("lambda_", "gamma_", "layer_scale", "q_bias", "v_bias")):
                    p.copy_(torch.rand(p.shape, generator=g) * 0.4 + 0.3)
        return model, inputs

    return built


def _shuffled(**changes):
    """A masked autoencoder's encoder: the order in which patches are masked is an input."""

    def build():
        model, inputs = _hf("ViTMAEModel", "ViTMAEConfig", **changes)()
        return model, {**inputs, "noise": torch.rand(2, 36, generator=torch.Generator().manual_seed(3))}

    return build


def _vjepa2():
    """Two clips of 4 frames of 48x48: 2 x 6 x 6 tubelets."""
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, crop_size=48, patch_size=8, frames_per_clip=4,
        pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1,
    )  # fmt: skip
    clips = torch.randn(2, 4, 3, 48, 48, generator=torch.Generator().manual_seed(7))
    return VJEPA2Model(config), {"pixel_values_videos": clips}


def _vitpose():
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=[48, 48],
        patch_size=[8, 8], out_features=["stage4"],
    )  # fmt: skip
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone)), {"pixel_values": pixels()}


def _torchvision():
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(48, 8, 4, 4, 48, 96, num_classes=7)
    torch.nn.init.normal_(model.heads[-1].weight)
    return model, {"x": pixels()}


def _naflex(name: str, padded: bool = False, **changes):
    """Images of 6x6 patches of 16x16; where ``padded``, patches of two images, 36 and 24, with their places."""

    def build():
        import timm

        model = timm.create_model(name, **(dict(embed_dim=48, depth=4, num_heads=4, num_classes=7) | changes))
        if not padded:
            return model, {"x": pixels(96)}
        patches = torch.randn(2, 36, 768, generator=torch.Generator().manual_seed(7))
        coord = torch.cartesian_prod(torch.arange(6), torch.arange(6)).repeat(2, 1, 1)
        valid = torch.ones(2, 36, dtype=torch.bool)
        valid[1, 24:] = False
        return model, {"x": patches, "patch_coord": coord, "patch_valid": valid}

    return build


_VIT = {
    "deit": _hf("DeiTModel", "DeiTConfig"),
    "deit, teacher": _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=7),
    "beit": _hf("BeitForImageClassification", "BeitConfig", num_labels=7),
    "beit, relative": _hf("BeitModel", "BeitConfig", use_relative_position_bias=True),
    "beit, both": _hf(
        "BeitModel", "BeitConfig", use_relative_position_bias=True, use_shared_relative_position_bias=True,
        use_mean_pooling=False,
    ),
    "data2vec, relative": _hf("Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True),
    "data2vec, shared": _hf(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", use_shared_relative_position_bias=True
    ),
    "ijepa": _hf("IJepaForImageClassification", "IJepaConfig", num_labels=7),
    "msn": _hf("ViTMSNModel", "ViTMSNConfig"),
    "mae": _shuffled(mask_ratio=0.0),
    "mae, masked": _shuffled(mask_ratio=0.25),
    "metaclip2": _hf("MetaClip2VisionModel", "MetaClip2VisionConfig"),
    "mlcd": _hf("MLCDVisionModel", "MLCDVisionConfig", hidden_size=64),
    "aimv2": _hf("Aimv2VisionModel", "Aimv2VisionConfig"),
    "altclip": _hf("AltCLIPVisionModel", "AltCLIPVisionConfig"),
    "chinese clip": _hf("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    "clipseg": _hf("CLIPSegVisionModel", "CLIPSegVisionConfig"),
    "owlvit": _hf("OwlViTVisionModel", "OwlViTVisionConfig"),
    "owlv2": _hf("Owlv2VisionModel", "Owlv2VisionConfig"),
    "blip": _hf("BlipVisionModel", "BlipVisionConfig", initializer_range=0.02),
    "blip2": _hf("Blip2VisionModel", "Blip2VisionConfig", initializer_range=0.02),
    "instructblip": _hf("InstructBlipVisionModel", "InstructBlipVisionConfig", initializer_range=0.02),
    "vjepa2": _vjepa2,
    "eomt": _hf("EomtForUniversalSegmentation", "EomtConfig", num_blocks=1, num_queries=4, num_upscale_blocks=1),
    "vitpose": _vitpose,
}  # fmt: skip
#: Families without a class of their own in :mod:`tokenreduce.adapters.encoders.hf_layers`, and what else has other
#: readers behind its tokens than those that are known one by one.
OTHERS = {
    **{f"transformers {name}": _spread(build) for name, build in _VIT.items()},
    "timm beit": _spread(_timm("beit_base_patch16_224")),
    "timm beit, shared": _spread(
        _timm("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False, global_pool="token")
    ),
    "timm relative positions": _spread(_timm("vit_relpos_base_patch16_224")),
    "timm relative positions, shared": _spread(_timm("vit_srelpos_small_patch16_224")),
    "timm relative positions, post-norm": _spread(_timm("vit_relpos_base_patch16_rpn_224")),
    "timm relative positions, class token": _spread(_timm("vit_relpos_base_patch16_cls_224")),
    "timm eva02, post-norm": _timm("eva02_tiny_patch14_224", use_post_norm=True, head_init_scale=1.0),
    "timm cait": _spread(_timm("cait_xxs24_224")),
    "timm qwen3": _timm("qwen3_vit_88m"),
    "timm qwen3, merging": _timm("qwen3_vit_88m_merge"),
    "timm deepseek": _timm("deepseek_vit_412m"),
    "timm gemma4": _timm("gemma4_vit_167m", head_dim=12, intermediate_size=96, pooling_kernel_size=2),
    "timm naflex": _naflex("naflexvit_base_patch16_gap"),
    "timm naflex, padded": _naflex("naflexvit_base_patch16_gap", padded=True),
    "timm naflex, attention pool, padded": _naflex("naflexvit_base_patch16_map", padded=True),
    "timm naflex, rope": _naflex("naflexvit_base_patch16_gap", rope_type="axial"),
    "torchvision vit": _torchvision,
}
