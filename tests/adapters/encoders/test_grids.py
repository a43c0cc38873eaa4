"""The grid that methods see is that of the forward, also where another has as many patches."""

from __future__ import annotations

import pytest
import torch
from support import tiny_vit
from torch import nn

import tokenreduce as tr
from tokenreduce.algorithms.baseline import regular

WIDE = torch.randn(2, 3, 16, 36, generator=torch.Generator().manual_seed(3))  # 4x9 patches of a model of 6x6


def _eva(**changes) -> nn.Module:
    from timm.models.eva import Eva

    torch.manual_seed(0)
    return Eva(img_size=24, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=7, **changes)


def _hf(kind: str, **changes):
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        settings = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4)
        config = kind.removesuffix("Model") + "Config"
        return getattr(transformers, kind)(getattr(transformers, config)(**(settings | changes)))

    return build


def _open_clip() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(24, 4, 32, 3, 2, 2.0, output_dim=8)


def _siglip2() -> nn.Module:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_patches=36, patch_size=4
    )
    return Siglip2VisionModel(config)


PIXELS = dict(pixel_values=WIDE)
ANY = dict(pixel_values=WIDE, interpolate_pos_encoding=True)
NAFLEX = dict(
    pixel_values=torch.randn(2, 36, 48, generator=torch.Generator().manual_seed(3)),
    pixel_attention_mask=torch.ones(2, 36, dtype=torch.long),
    spatial_shapes=torch.tensor([[4, 9], [4, 9]]),
)
MODELS = {
    "timm vit": (lambda: tiny_vit(dynamic_img_size=True), dict(x=WIDE)),
    "timm vit with a norm before": (lambda: tiny_vit(dynamic_img_size=True, pre_norm=True), dict(x=WIDE)),
    "timm eva": (lambda: _eva(dynamic_img_size=True), dict(x=WIDE)),
    "timm eva with rope": (lambda: _eva(dynamic_img_size=True, use_rot_pos_emb=True), dict(x=WIDE)),
    "open_clip": (_open_clip, dict(x=WIDE)),
    "vit": (_hf("ViTModel"), ANY),
    "clip": (_hf("CLIPVisionModel"), ANY),
    "siglip": (_hf("SiglipVisionModel"), ANY),
    "siglip without interpolation": (_hf("SiglipVisionModel"), PIXELS),
    "siglip2": (_siglip2, NAFLEX),
    "dinov2": (_hf("Dinov2Model"), PIXELS),
    "dinov2 with registers": (_hf("Dinov2WithRegistersModel"), PIXELS),
    "dinov3": (_hf("DINOv3ViTModel"), PIXELS),
}
everywhere = pytest.mark.parametrize(("build", "inputs"), MODELS.values(), ids=MODELS)


def _run(model: nn.Module, spec: str, inputs: dict) -> tr.Trace:
    with torch.no_grad(), tr.patched(model.eval(), spec), tr.record(model, flops=False) as trace:
        model(**inputs)
    return trace


@everywhere
def test_uniform_keeps_columns_of_this_image(build, inputs):
    model = build()
    trace = _run(model, "uniform:keep=0.5", inputs)
    assert trace.steps[0].grid == (4, 9)
    prefix = tr.describe(model).towers[0].prefix
    (plan,) = trace.plans
    want = regular(36, 18, (4, 9), torch.device("cpu")).nonzero().flatten() + prefix
    assert plan.representatives()[0, prefix:].tolist() == want.tolist()
    assert want.tolist() != (regular(36, 18, (6, 6), torch.device("cpu")).nonzero().flatten() + prefix).tolist()


@everywhere
def test_windows_are_of_this_image(build, inputs):
    """Windows of 3x3 that all merge: 1x3 of them fit into 4x9, and the last row stays; 2x2 would into 6x6."""
    model = build()
    trace = _run(model, "mustdrop-merge:threshold=-1", inputs)
    prefix = tr.describe(model).towers[0].prefix
    assert trace.tokens[-1] == prefix + 3 + 9


@pytest.mark.parametrize("spec", ["uniform:keep=0.5", "mustdrop-merge:threshold=-1"])
def test_images_of_different_shapes_have_no_grid_in_common(spec):
    """An answer must not depend on the other images of a batch."""
    shapes = NAFLEX | dict(spatial_shapes=torch.tensor([[4, 9], [9, 4]]))
    with pytest.raises(ValueError, match="images of 4x9, 9x4 patches; give images of one shape per batch"):
        _run(_siglip2(), spec, shapes)
    assert _run(_siglip2(), "tome:r=4", shapes).tokens[-1] == 24, "methods without a grid take any"


@torch.no_grad()
def test_patch_dropout_and_masked_clips_have_no_grid():
    model = tr.patch(tiny_vit(patch_drop_rate=0.5).train(), "uniform:keep=0.5")
    with tr.record(model, flops=False) as trace:
        model(torch.randn(2, 3, 24, 24))
    assert trace.steps[0].grid is None
    model.eval()
    with tr.record(model, flops=False) as trace:
        model(torch.randn(2, 3, 24, 24))
    assert trace.steps[0].grid == (6, 6)


def test_clips_have_three_sides():
    from transformers import VideoMAEConfig, VideoMAEModel, VivitConfig, VivitModel

    sides = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_frames=4)
    clip = dict(pixel_values=torch.randn(1, 4, 3, 24, 24))
    mae = VideoMAEModel(VideoMAEConfig(image_size=24, patch_size=8, tubelet_size=2, **sides))
    assert _run(mae, "uniform:keep=0.5", clip).steps[0].grid == (2, 3, 3)
    vivit = VivitModel(VivitConfig(image_size=24, tubelet_size=[2, 8, 8], **sides))
    assert _run(vivit, "uniform:keep=0.5", clip).steps[0].grid == (2, 3, 3)


@torch.no_grad()
def test_dense_outputs_and_smaller_images_have_this_grid():
    for model in (tiny_vit(dynamic_img_size=True), _open_clip().eval()):
        stock = model.forward_intermediates(WIDE, indices=[1])
        for spec, shape in (("tome:r=4", (4, 9)), ("resize:keep=0.5", (3, 6))):
            with tr.patched(model, spec), tr.record(model, flops=False) as trace:
                got = model.forward_intermediates(WIDE, indices=[1])
            maps = got["image_intermediates"] if isinstance(got, dict) else got[1]
            assert maps[0].shape[-2:] == shape
            assert trace.steps[0].grid == shape
        assert stock is not None


def test_pictures_are_of_this_image():
    from types import SimpleNamespace

    from PIL import Image

    from tokenreduce.measure.picture import look

    loaded = SimpleNamespace(
        model=tiny_vit(dynamic_img_size=True), forward=lambda model, x: model(x), transform=lambda image: WIDE[0]
    )
    assert look(loaded, Image.new("RGB", (36, 16)), "tome:r=4").grid == (4, 9)
