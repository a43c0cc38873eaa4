"""Sizes ride on the activation tensor: where a reader needs them and they are gone, it says so, or is right."""

from __future__ import annotations

import copy

import pytest
import torch
from support import images, tiny_vit
from torch import nn

import tokenreduce as tr

WAYS = {
    "clone": lambda f: f.clone(),
    "detach": lambda f: f.detach(),
    "dtype": lambda f: f.double().float(),
    "cat": lambda f: torch.cat([f, f]),
    "index": lambda f: f[:1],
}
POOLS = {
    "avg": dict(global_pool="avg"),
    "avg without class token": dict(global_pool="avg", class_token=False),
    "avgmax": dict(global_pool="avgmax"),
    "max": dict(global_pool="max"),
    "map": dict(global_pool="map", class_token=False),
    "avg behind fc_norm": dict(global_pool="avg", fc_norm=True),
}


def cloned(module, args, output):
    """A hook that returns a new tensor, or an output with one, as casting wrappers do."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    output.last_hidden_state = output.last_hidden_state.clone()
    return output


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("settings", POOLS.values(), ids=POOLS)
@torch.no_grad()
def test_timm_pooling_says_so(settings, way):
    model = tr.patch(tiny_vit(**settings), "tome:r=4")
    features = model.forward_features(images())
    assert torch.equal(model.forward_head(features), model(images()))
    with pytest.raises(RuntimeError, match=r"lost them.*tr\.unpatch"):
        model.forward_head(way(features))


@pytest.mark.parametrize("settings", POOLS.values(), ids=POOLS)
@torch.no_grad()
def test_features_that_nothing_reduced_are_pooled_as_ever(settings):
    stock = tiny_vit(**settings)
    features = stock.forward_features(images())
    want = stock.forward_head(features)
    for spec in ("tome:r=0", "uniform:keep=1.0", "tome:r=4", "resize:keep=0.5"):
        with tr.patched(copy.deepcopy(stock), spec) as model:
            assert torch.equal(model.forward_head(features.clone()), want), spec
    with tr.patched(stock, "tome:r=0") as model:
        assert torch.equal(model.forward_head(model.forward_features(images()).clone()), want)


@torch.no_grad()
def test_as_many_tokens_as_the_stock_model_may_still_be_reduced_ones():
    # 64 patches of a larger image, reduced to the 36 that the model's own image has
    model = tr.patch(tiny_vit(global_pool="avg", class_token=False, dynamic_img_size=True), "tome:r=[28,0,0,0,0,0]")
    features = model.forward_features(images(size=32))
    assert features.shape[1] == 36
    with pytest.raises(RuntimeError, match="lost them"):
        model.forward_head(features.clone())
    # samples that keep different numbers fill up to what the longest has
    ragged = tr.patch(tiny_vit(global_pool="avg", class_token=False), "mustdrop-merge:threshold=0.5")
    with pytest.raises(RuntimeError, match="lost them"):
        ragged.forward_head(torch.randn(2, 36, 32))


@torch.no_grad()
def test_a_class_token_needs_no_sizes():
    model = tr.patch(tiny_vit(), "tome:r=4")
    features = model.forward_features(images())
    assert torch.equal(model.forward_head(features.clone()), model(images()))


@pytest.mark.parametrize(
    "settings",
    [dict(pool_type="avg"), dict(output_tokens=True), dict(attentional_pool=True, attn_pooler_queries=5)],
    ids=["avg", "tokens", "attention"],
)
@torch.no_grad()
def test_open_clip_pooling_says_so(settings):
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(24, 4, 32, 3, 2, 2.0, output_dim=8, **settings).eval()
    want = model(images())
    handle = model.transformer.register_forward_hook(cloned)
    with tr.patched(model, "tome:r=0"):
        got = model(images())
    assert torch.equal(got[0] if isinstance(got, tuple) else got, want[0] if isinstance(want, tuple) else want)
    tr.patch(model, "tome:r=4")
    with pytest.raises(RuntimeError, match="lost them"):
        model(images())
    handle.remove()
    model(images())


def _hf(kind: str, config: str, **changes) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    settings = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=24, patch_size=4
    )
    made = getattr(transformers, config)(**(settings | changes))
    if kind in ("SiglipForImageClassification", "CLIPForImageClassification"):
        made = getattr(transformers, config.replace("Vision", ""))(vision_config=made.to_dict())
    return getattr(transformers, kind)(made).eval()


READERS = {
    "siglip head": (lambda: _hf("SiglipVisionModel", "SiglipVisionConfig"), "post_layernorm"),
    "siglip classifier": (lambda: _hf("SiglipForImageClassification", "SiglipVisionConfig"), "post_layernorm"),
    "clip classifier": (lambda: _hf("CLIPForImageClassification", "CLIPVisionConfig"), "encoder.layers.2"),
    "dinov2 classifier": (lambda: _hf("Dinov2ForImageClassification", "Dinov2Config"), "layernorm"),
    "masked images": (lambda: _hf("ViTForMaskedImageModeling", "ViTConfig"), "layernorm"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "where"), READERS.values(), ids=READERS)
@torch.no_grad()
def test_readers_of_transformers_towers_say_so(build, where):
    model = build()
    tr.patch(model, "tome:r=4")
    model(pixel_values=images())
    name = next(n for n, _ in model.named_modules() if n.endswith(where))
    model.get_submodule(name).register_forward_hook(cloned)
    with pytest.raises(RuntimeError, match="lost them"):
        model(pixel_values=images())


@torch.no_grad()
def test_feature_maps_say_so():
    model = _hf("Dinov2Backbone", "Dinov2Config", out_features=["stage1", "stage3"])
    tr.patch(model, "tome:r=4")
    model(pixel_values=images())
    model.layernorm.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with pytest.raises(RuntimeError, match="lost them"):
        model(pixel_values=images())


@torch.no_grad()
def test_qwen_mergers_say_so():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(
        depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=16, patch_size=4, temporal_patch_size=1
    )
    tower = Qwen2VisionTransformerPretrainedModel(config).eval()
    patches, grid = torch.randn(36, 48), torch.tensor([[1, 6, 6]])
    tr.patch(tower, "tome:r=2")
    want = tower(hidden_states=patches, grid_thw=grid)
    assert len(want.pooler_output) == 9
    tower.blocks[-1].register_forward_hook(cloned)
    with pytest.raises(RuntimeError, match="lost them"):
        tower(hidden_states=patches, grid_thw=grid)
