"""Code around a tower that reads its tokens: served, or refused by name; never a wrong number. See ``equal_tokens``."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from equal_tokens import MERGE, PATCH, SIDE, SMALL, check_equal_tokens, hf, pictures, timm_vit, without_positions
from torch import nn

import tokenreduce as tr


# -- timm --------------------------------------------------------------------------------------------------------------
def subclasses() -> dict[str, type]:
    from timm.models.vision_transformer import VisionTransformer

    class Mean(VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x)[:, 1:].mean(1)

        def forward(self, x):
            return self.head(self.forward_features(x))

    class MAE(VisionTransformer):
        """As published: the norm is taken out, and the blocks are run by the class itself."""

        def __init__(self, **settings):
            super().__init__(**settings)
            self.fc_norm = nn.LayerNorm(self.embed_dim)
            del self.norm

        def forward_features(self, x):
            x = self.patch_embed(x)
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
            for blk in self.blocks:
                x = blk(x)
            return self.fc_norm(x[:, 1:, :].mean(dim=1))

        def forward(self, x):
            return self.head(self.forward_features(x))

    class Head(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return self.head(x.mean(1))

    class Pool(VisionTransformer):
        def pool(self, x, pool_type=None):
            return x[:, 1:].square().mean(1)

    class Map(VisionTransformer):
        def forward_features(self, x):
            x = self.norm(self.blocks(self.norm_pre(self._pos_embed(self.patch_embed(x)))))
            return x[:, 1:].transpose(1, 2).reshape(len(x), -1, SIDE, SIDE)

        def forward(self, x):
            return self.forward_features(x)

    class More(VisionTransformer):
        def embed(self, x):
            return self.forward_features(x)[:, 1:].mean(1)

        def forward(self, x):
            return self.embed(x)

    return {k.__name__: k for k in (Mean, MAE, Head, Pool, Map, More)}


NAMES = ["Mean", "MAE", "Head", "Pool", "Map", "More"]


@pytest.mark.parametrize("name", NAMES)
def test_a_timm_subclass_that_reads_tokens_itself(name):
    model = timm_vit(subclasses()[name])
    check_equal_tokens(model, lambda m: m(pictures()))


@pytest.mark.parametrize("name", ["Mean", "MAE"])
def test_its_mean_after_pruning_is_that_of_what_is_left(name):
    model, x = timm_vit(subclasses()[name]), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    seen = []
    with torch.no_grad(), tr.patched(model, "uniform:keep=0.5"):
        hook = model.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out), prepend=True)
        got = model(x)
        hook.remove()
    with torch.no_grad():
        left = seen[0][:, 1:]
        assert left.shape[1] < 36
        want = model.fc_norm(left.mean(1)) if name == "MAE" else model.norm(left).mean(1)
        torch.testing.assert_close(got, model.head(want), rtol=1e-4, atol=1e-4)


def test_an_eva_subclass_with_blocks_and_rotary_tables_of_its_own():
    from timm.models.eva import Eva

    class Mean(Eva):
        def forward_features(self, x, attn_mask=None, is_causal=False):
            x, rope = self._pos_embed(self.patch_embed(x))
            for _, block in enumerate(self.blocks):
                if self.grad_checkpointing:
                    x = torch.utils.checkpoint.checkpoint(block, x, rope)
                else:
                    x = block(x, rope=rope)
            return self.norm(x)[:, self.num_prefix_tokens :].mean(1)

        def forward_head(self, x, pre_logits=False):
            return self.head(x)

    check_equal_tokens(timm_vit(Mean, use_rot_pos_emb=False), lambda m: m(pictures()))
    roped = timm_vit(Mean, use_rot_pos_emb=True)
    assert tr.describe(roped).towers[0].hands == "inside"
    with torch.no_grad():
        want = roped(pictures())
        assert torch.equal(tr.patch(roped, "tome:r=0")(pictures()), want)
        assert not torch.equal(tr.patch(tr.unpatch(roped), MERGE)(pictures()), want)


def test_blocks_read_in_between_are_refused():
    from timm.models.vision_transformer import VisionTransformer

    class Between(VisionTransformer):
        def forward_features(self, x):
            x, seen = self._pos_embed(self.patch_embed(x)), []
            for block in self.blocks:
                x = block(x)
                seen.append(x.mean(1))
            return torch.stack(seen).mean(0)

    class First(VisionTransformer):
        def forward_features(self, x):
            x = self._pos_embed(self.patch_embed(x))
            for block in self.blocks[:2]:
                x = block(x)
            return x.mean(1)

    class Third(VisionTransformer):
        def forward(self, x):
            return self.blocks[0](self._pos_embed(self.patch_embed(x))).mean(1)

    class Listed(VisionTransformer):
        def forward(self, x):
            x = self._pos_embed(self.patch_embed(x))
            return sum(block(x) for block in self.blocks).mean(1)

    class Super(VisionTransformer):
        def forward(self, x):
            return super().forward_intermediates(x, output_fmt="NLC", intermediates_only=True)[0].mean(1)

    for kind in (Between, First, Third, Listed, Super):
        model = timm_vit(kind)
        for call in (tr.describe, lambda m: tr.patch(m, "tome:r=2")):
            with pytest.raises(TypeError, match=f"{kind.__name__}.*between its blocks"):
                call(model)
        assert "tokenreduce" not in repr(vars(model.blocks[0]))


def test_code_that_only_manages_blocks_is_no_reader():
    from timm.models.vision_transformer import VisionTransformer

    class Frozen(VisionTransformer):
        def freeze(self, n):
            for block in self.blocks[:n]:
                block.requires_grad_(False)
            return len(self.blocks), [p for b in self.blocks for p in b.parameters()]

    model = timm_vit(Frozen, global_pool="avg")
    assert tr.describe(model).towers[0].hands == "all"
    check_equal_tokens(model, lambda m: m(pictures()))


def test_a_subclass_that_lays_its_patches_out_itself_takes_no_smaller_images():
    model = timm_vit(subclasses()["MAE"])
    assert "resize" not in tr.describe(model).methods()
    with pytest.raises(ValueError, match=r"MAE lays its patches out.*smaller images"):
        tr.patch(model, "resize:keep=0.5")


def test_a_forward_features_on_the_instance():
    model = timm_vit()

    def mine(self, x, attn_mask=None, is_causal=False):
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))[:, 1:].mean(1)

    model.forward_features = types.MethodType(mine, model)
    model.forward_head = types.MethodType(lambda self, x, pre_logits=False: self.head(x), model)
    check_equal_tokens(model, lambda m: m(pictures()))


class MeanHead(nn.Module):
    def __init__(self, skip: int = 1) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.skip :].mean(1)


class Features(nn.Module):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = vit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(x)[:, 1:].mean(1)


class Loop(Features):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone._pos_embed(self.backbone.patch_embed(x))
        for block in self.backbone.blocks:
            x = block(x)
        return self.backbone.norm(x)[:, 1:].mean(1)


class Middle(Features):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone._pos_embed(self.backbone.patch_embed(x))
        return self.backbone.blocks[0](x)[:, 1:].mean(1)


class Both(Features):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.backbone.forward_features(x)
        return torch.cat([f[:, 1:].std(1), self.backbone.forward_head(f), self.backbone.forward_head(f.clone())], 1)


class Last(Features):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, maps = self.backbone.forward_intermediates(x, norm=True, output_fmt="NLC")
        return torch.cat([tokens[:, 1:].mean(1), *(m.mean(1) for m in maps)], 1)


@pytest.mark.parametrize("kind", [Features, Loop, Both, Last])
@pytest.mark.parametrize("pool", ["avg", "token", "map"])
def test_a_module_around_a_timm_tower(kind, pool):
    check_equal_tokens(kind(timm_vit(global_pool=pool)), lambda m: m(pictures()))


def test_a_module_that_runs_single_blocks_is_refused():
    with pytest.raises(TypeError, match=r"Middle.forward reads tokens.*between its blocks"):
        tr.patch(Middle(timm_vit()), "tome:r=2")


def test_a_head_of_ones_own_without_pooling():
    model = timm_vit(global_pool="")
    model.head = MeanHead()
    check_equal_tokens(model, lambda m: m(pictures()))
    check_equal_tokens(nn.Sequential(timm_vit(global_pool="", num_classes=0), MeanHead()), lambda m: m(pictures()))


@pytest.mark.parametrize("pool", ["avg", "token", "map"])
@pytest.mark.parametrize("method", [MERGE, "uniform:keep=0.5"])
def test_logits_are_those_without_the_wrapper(pool, method):
    class Service(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    model, x = timm_vit(global_pool=pool), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with tr.patched(model, method):
            want = model(x)
        for wrapped in (Service(model), nn.Sequential(model), nn.DataParallel(model)):
            with tr.patched(wrapped, method):
                assert torch.equal(wrapped(x), want)


def test_only_the_model_that_is_patched_hands_out_fewer_tokens():
    model, x = timm_vit(), pictures()
    with torch.no_grad(), tr.patched(model, "tome:r=3"):
        assert model.forward_features(x).shape[1] == 37 - 9
    with torch.no_grad(), tr.patched(nn.DataParallel(model), "tome:r=3"):
        assert model.forward_features(x).shape[1] == 37 - 9
    with torch.no_grad(), tr.patched(nn.Sequential(model), "tome:r=3"):
        assert model.forward_features(x).shape[1] == 37


# -- open_clip ---------------------------------------------------------------------------------------------------------
def clip_settings(**changes: Any) -> dict[str, Any]:
    settings = dict(image_size=24, patch_size=PATCH, width=32, layers=3, heads=2, mlp_ratio=2.0, output_dim=16)
    return settings | changes


def test_open_clip_subclasses_and_wrappers():
    from open_clip.transformer import VisionTransformer

    class Mean(VisionTransformer):
        def forward(self, x):
            return self.transformer(self._embeds(x))[:, 1:].mean(1)

    class Pooled(VisionTransformer):
        def _global_pool(self, x):
            return x[:, 1:].mean(1), x[:, 1:]

    class Tokens(nn.Module):
        def __init__(self, visual):
            super().__init__()
            self.visual = visual

        def forward(self, x):
            pooled, tokens = self.visual(x)
            return torch.cat([pooled, tokens.mean(1)], 1)

    class Inner(Tokens):
        def forward(self, x):
            return self.visual.transformer(self.visual._embeds(x))[:, 1:].mean(1)

    models = [
        Mean(**clip_settings()),
        Pooled(**clip_settings()),
        Tokens(VisionTransformer(**clip_settings(output_tokens=True))),
        Tokens(VisionTransformer(**clip_settings(output_tokens=True, pool_type="avg"))),
        Inner(VisionTransformer(**clip_settings())),
        nn.Sequential(VisionTransformer(**clip_settings())),
    ]
    for model in models:
        check_equal_tokens(without_positions(model), lambda m: m(pictures()))


# -- transformers ------------------------------------------------------------------------------------------------------
class Hidden(nn.Module):
    """A user's head on the tokens of a transformers tower."""

    def __init__(self, tower: nn.Module, prefix: int) -> None:
        super().__init__()
        self.tower, self.prefix = tower, prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.tower(x, output_hidden_states=True)
        tokens = [out.last_hidden_state, *out.hidden_states, self.tower(x, return_dict=False)[0]]
        return torch.cat([t[:, self.prefix :].mean(1) for t in tokens], 1)


@pytest.mark.parametrize(
    ("model", "config", "prefix"),
    [
        ("ViTModel", "ViTConfig", 1),
        ("CLIPVisionModel", "CLIPVisionConfig", 1),
        ("SiglipVisionModel", "SiglipVisionConfig", 0),
        ("Dinov2Model", "Dinov2Config", 1),
    ],
)
def test_a_module_around_a_transformers_tower(model, config, prefix):
    check_equal_tokens(Hidden(hf(model, config), prefix), lambda m: m(pictures()))


def test_a_mean_over_what_a_pruned_tower_hands_out():
    tower, x = hf("ViTModel", "ViTConfig"), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with tr.patched(tower, "uniform:keep=0.5"):
            want = tower(x).last_hidden_state
        with tr.patched(Hidden(tower, 1), "uniform:keep=0.5"):
            got = tower(x)
    assert want.shape[1] < got.last_hidden_state.shape[1] == 37
    torch.testing.assert_close(got.last_hidden_state[:, 1:].mean(1), want[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def test_subclasses_of_transformers_models():
    from transformers import CLIPConfig, CLIPForImageClassification, ViTConfig, ViTModel

    class Mean(ViTModel):
        def forward(self, pixel_values):
            x = self.embeddings(pixel_values)
            for layer in self.layers:
                x = layer(x)
            return self.layernorm(x)[:, 1:].mean(1)

    class Squares(CLIPForImageClassification):
        def forward(self, pixel_values):
            return self.vision_model(pixel_values).last_hidden_state[:, 1:].square().mean(1)

    check_equal_tokens(without_positions(Mean(ViTConfig(**SMALL))), lambda m: m(pictures()))
    config = CLIPConfig(vision_config=SMALL | dict(intermediate_size=64))
    check_equal_tokens(without_positions(Squares(config)), lambda m: m(pictures()))


def depth_pro() -> Any:
    from transformers import DepthProConfig, DepthProForDepthEstimation

    part = dict(
        model_type="dinov2", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=16
    )
    config = DepthProConfig(
        patch_size=16, fusion_hidden_size=8, intermediate_hook_ids=[2, 1], intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1], scaled_images_overlap_ratios=[0.0, 0.2], scaled_images_feature_dims=[8, 8],
        image_model_config=part, patch_model_config=part, fov_model_config=part, use_fov_model=True,
    )  # fmt: skip
    return without_positions(DepthProForDepthEstimation(config))


def test_depth_pro():
    model, x = depth_pro(), torch.ones(2, 3, 64, 64)
    x[..., 40:] = -0.5  # resampling keeps most patches equal
    for method in ("tome:r=[0,0,1]", "tome:r=[2,0,1]"):
        check_equal_tokens(model, lambda m: m(x).predicted_depth, method)
        check_equal_tokens(model, lambda m: m(x).field_of_view, method)
        check_equal_tokens(model.depth_pro, lambda m: torch.cat([f.flatten() for f in m(x).features]), method)
    with pytest.raises(ValueError, match="cannot be resized"):
        tr.patch(model, "resize:keep=0.5")


def encoder_decoder(**decoder: Any) -> Any:
    from transformers import TrOCRConfig, TrOCRForCausalLM, VisionEncoderDecoderModel

    settings = dict(
        vocab_size=40, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        cross_attention_hidden_size=32,
    )  # fmt: skip
    text = TrOCRForCausalLM(TrOCRConfig(**(settings | decoder)))
    model = VisionEncoderDecoderModel(encoder=hf("ViTModel", "ViTConfig"), decoder=text)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return without_positions(model)


def test_cross_attention_counts_a_merged_token_as_often_as_it_stands_for():
    model, ids = encoder_decoder(), torch.tensor([[1, 5, 9, 12], [1, 7, 3, 30]])
    check_equal_tokens(model, lambda m: m(pictures(), decoder_input_ids=ids).logits)
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=2)
    check_equal_tokens(model, lambda m: m.generate(pictures(), **settings).float())


def test_cross_attention_to_what_is_left_is_that_with_the_others_masked():
    model, ids = encoder_decoder(), torch.tensor([[1, 5, 9, 12], [1, 7, 3, 30]])
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with tr.patched(model, "uniform:keep=0.5"):
            got, left = model(x, decoder_input_ids=ids).logits, model.encoder(x).last_hidden_state
        want = model.decoder(input_ids=ids, encoder_hidden_states=left).logits
        assert left.shape[1] < 37
        torch.testing.assert_close(got, want)
        with tr.patched(model, "uniform:keep=0.9,layer=1+tome:r=[3,0,0]"), pytest.raises(ValueError, match="not both"):
            model(x, decoder_input_ids=ids)


@pytest.mark.parametrize("reader", ["DepthAnythingForDepthEstimation", "DPTForDepthEstimation", "UperNet"])
def test_readers_of_a_backbone_get_maps(reader):
    import transformers as hf

    backbone = hf.Dinov2Config(
        **SMALL, out_features=["stage1", "stage2", "stage3"], reshape_hidden_states=reader == "UperNet"
    )
    if reader == "UperNet":
        made = hf.UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, pool_scales=[1, 2])
        model, name = hf.UperNetForSemanticSegmentation(made), "logits"
    else:
        settings = dict(
            backbone_config=backbone, neck_hidden_sizes=[8, 8, 8], fusion_hidden_size=8, reassemble_factors=[2, 1, 0.5],
            reassemble_hidden_size=32, head_hidden_size=8, head_in_index=-1, patch_size=PATCH,
        )  # fmt: skip
        kind = "DepthAnythingConfig" if reader.startswith("DepthA") else "DPTConfig"
        model, name = getattr(hf, reader)(getattr(hf, kind)(**settings)), "predicted_depth"
    check_equal_tokens(without_positions(model), lambda m: m(pictures())[name])


def test_two_encoders_side_by_side():
    from transformers import BertConfig, BertModel, VisionTextDualEncoderModel

    text = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    model = without_positions(VisionTextDualEncoderModel(vision_model=hf("ViTModel", "ViTConfig"), text_model=text))
    ids = torch.tensor([[1, 4, 5], [1, 6, 7]])
    check_equal_tokens(model, lambda m: m(input_ids=ids, pixel_values=pictures()).logits_per_image)


def test_a_library_model_that_nobody_checked_is_refused():
    class Novel(nn.Module):
        def __init__(self, tower):
            super().__init__()
            self.tower = tower

        def forward(self, x):
            return self.tower(x).last_hidden_state.mean(1)

    class Mine(Novel):
        pass

    Novel.__module__ = "transformers.models.novel.modeling_novel"
    for model in (Novel(hf("ViTModel", "ViTConfig")), nn.Sequential(Mine(hf("ViTModel", "ViTConfig")))):
        for call in (tr.describe, lambda m: tr.patch(m, "tome:r=2")):
            with pytest.raises(TypeError, match=r"Novel reads.*in a way that no adapter knows.*SiglipModel"):
                call(model)
        assert "tokenreduce" not in repr(model)


# -- timm inside timm and transformers ---------------------------------------------------------------------------------
ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = dict(img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=32, depth=3, num_heads=2)


def flat(maps: Any) -> torch.Tensor:
    return torch.cat([m.flatten() for m in maps])


def test_features_only_models_give_maps_to_whoever_reads_them():
    import timm

    model = without_positions(timm.create_model(ARCHITECTURE, features_only=True, **ARGUMENTS))
    for reader in (model, nn.Sequential(model)):
        check_equal_tokens(reader, lambda m: flat(m(pictures())))


def test_timm_models_in_transformers():
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture=ARCHITECTURE, model_args=ARGUMENTS)
    model = without_positions(TimmWrapperModel(config))
    check_equal_tokens(model, lambda m: m(pictures()).pooler_output)
    check_equal_tokens(nn.Sequential(model), lambda m: m(pictures()).last_hidden_state.mean(1))


def test_the_backbone_of_timm_in_transformers():
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone=ARCHITECTURE, use_pretrained_backbone=False, out_indices=[1, 2])
    model = without_positions(TimmBackbone(config))
    x = pictures(side=14, patch=16, batch=1)
    check_equal_tokens(model, lambda m: flat(m(x).feature_maps), "tome:r=4")


# -- what the tower is called by ---------------------------------------------------------------------------------------
class Alias(Features):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vit = self.backbone
        return vit.blocks[0](vit._pos_embed(vit.patch_embed(x))).mean(1)


def test_a_local_name_of_the_tower_is_seen_through():
    with pytest.raises(TypeError, match=r"Alias.forward reads tokens.*between its blocks"):
        tr.patch(Alias(timm_vit()), "tome:r=2")


def test_describe_says_who_reads():
    assert "handed out again" in str(tr.describe(Features(timm_vit())))
    assert "a decoder attends" in str(tr.describe(encoder_decoder()))
    patched = tr.patch(Features(timm_vit()), MERGE)
    assert tr.describe(patched).towers[0].hands == "all"
    assert "its tokens" not in str(tr.describe(timm_vit()))


def test_copies_and_compiled_models_hand_out_the_same():
    model, x = Features(timm_vit(global_pool="avg")), pictures()
    with torch.no_grad():
        plain = model(x)
        want = tr.patch(model, MERGE)(x)
        assert torch.equal(copy.deepcopy(model)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), want)
        assert torch.equal(tr.unpatch(model)(x), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parts_of_ones_own_inside_a_tower():
    class Runs(nn.Sequential):
        pass

    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) - super().forward(x).mean(1, keepdim=True)

    model = timm_vit()
    model.norm = Norm(32)
    check_equal_tokens(model, lambda m: m(pictures()))
    model.blocks = Runs(*model.blocks)
    with pytest.raises(TypeError, match="Runs runs the blocks of timm VisionTransformer"):
        tr.patch(model, MERGE)
    tower = hf("ViTModel", "ViTConfig")
    tower.pooler = MeanHead()
    check_equal_tokens(tower, lambda m: m(pictures()).pooler_output)
