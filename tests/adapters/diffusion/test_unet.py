"""tomesd in the denoisers of diffusers: exact where it acts, untouched where it does not, refused where it cannot."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="needs the extra diffusion")

import diffusers
from denoisers import CROSS, PLAIN, controlnet, inputs, unet
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel

import tokenreduce as tr


class Reference(nn.Module):
    """The card in a block of diffusers, by matrices: unmerge(module(merge(norm(x)))) + x."""

    def __init__(self, block, method, layer, sizes):
        super().__init__()
        self.block, self.method, self.layer, self.sizes = block, method, layer, sizes

    def forward(self, x, encoder_hidden_states=None, timestep=None, **_):
        block = self.block
        evidence = tr.Evidence(x, grid=self.sizes[-1], layer=self.layer, depth=7, timestep=500)
        plan = self.method.plan(evidence)
        merge, back = plan.matrix(dtype=torch.float32), plan.sources()

        def around(name, module, y):
            if name not in self.method.modules():
                return module(y)
            out = module(merge @ y)
            return torch.stack([out[b, back[b]] for b in range(len(out))])

        text = encoder_hidden_states
        x = around("attn", block.attn1, block.norm1(x)) + x
        x = around("crossattn", lambda y: block.attn2(y, encoder_hidden_states=text), block.norm2(x)) + x
        return around("mlp", block.ff, block.norm3(x)) + x


def by_the_card(model, method, call):
    """The output of ``call`` with reference blocks where ``method`` acts, whose maps hooks have seen."""
    model, sizes, layer = copy.deepcopy(model), [], 0
    for part, level in ((model.down_blocks, (1, 2)), ([model.mid_block], (4 // 2,)), (model.up_blocks, (2, 1))):
        for block, downsample in zip(part, level, strict=True):
            for module in block.modules():
                if isinstance(module, Transformer2DModel):
                    module.register_forward_pre_hook(lambda m, args: sizes.append(tuple(args[0].shape[-2:])))
                    for i, inner in enumerate(module.transformer_blocks):
                        if downsample <= method.max_downsample:
                            module.transformer_blocks[i] = Reference(inner, method, layer, sizes)
                        layer += 1
    return call(model)


@pytest.mark.parametrize(("batch", "rows", "columns"), [(2, 8, 12), (1, 9, 13), (4, 10, 6)])
@pytest.mark.parametrize(
    "spec",
    ["tomesd", "tomesd:ratio=0.6,merge_crossattn=true,merge_mlp=true,max_downsample=2,seed=3",
     "tomesd:sx=3,sy=2,merge_attn=false,merge_mlp=true,use_rand=false", "tomesd:merge_attn=false,merge_crossattn=true"],
)  # fmt: skip
@torch.no_grad()
def test_a_unet_computes_what_the_card_says(spec, batch, rows, columns):
    model, method = unet(), tr.get_method(spec)
    args = inputs(batch, rows, columns)
    stock = model(*args).sample
    wanted = by_the_card(model, method, lambda m: m(*args).sample)
    assert not torch.allclose(stock, wanted, atol=1e-4), "it does something"
    with tr.patched(model, method):
        torch.testing.assert_close(model(*args).sample, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(*args).sample, model(*args).sample)
    assert torch.equal(model(*args).sample, stock)


@torch.no_grad()
def test_keep_all_and_unpatch_are_bit_identical_and_leave_nothing():
    model, args = unet(), inputs()
    before = {name: (type(m), {k for k in m.__dict__}) for name, m in model.named_modules()}
    stock, hooks = model(*args).sample, len(model._forward_pre_hooks)
    for spec in ("tomesd:ratio=0", "tomesd:keep=1.0,max_downsample=8,merge_crossattn=true,merge_mlp=true"):
        with tr.patched(model, spec):
            assert torch.equal(model(*args).sample, stock)
    tr.patch(model, "tomesd")
    assert "BasicTransformerBlock[tomesd]" in repr(model)
    tr.unpatch(model)
    assert torch.equal(model(*args).sample, stock)
    assert {name: (type(m), {k for k in m.__dict__}) for name, m in model.named_modules()} == before
    assert len(model._forward_pre_hooks) == hooks


@torch.no_grad()
def test_a_trace_has_the_maps_that_the_unet_has():
    model, args = unet(), inputs(2, 9, 13)
    with tr.patched(model, "tomesd:max_downsample=2"), tr.record(model) as trace:
        model(*args)
    assert [(s.stage, s.layer, s.grid, s.tokens) for s in trace.steps] == [
        ("diffusion", i, grid, grid[0] * grid[1] - int(grid[0] * grid[1] * 0.5))
        for i, grid in enumerate([(9, 13), (5, 7), (5, 7), (5, 7), (5, 7), (9, 13), (9, 13)])
    ]
    assert trace.plan is None, "nothing leaves"
    with tr.record(model) as stock:
        model(*args)
    assert 0 < trace.flops < stock.flops


@torch.no_grad()
def test_guidance_in_one_batch_is_guidance_in_two_calls():
    """A row of a batch of even size depends on no other row, since draws are shared and all else is per sample."""
    model = unet()
    latents, time, text = inputs(4)
    with tr.patched(model, "tomesd"):
        whole = model(latents, time, text).sample
        for rows in (slice(0, 2), slice(2, 4)):
            torch.testing.assert_close(model(latents[rows], time, text[rows]).sample, whole[rows])
        assert not torch.allclose(model(latents[:1], time, text[:1]).sample, whole[:1], atol=1e-6), "odd: no draw"


@torch.no_grad()
def test_arguments_may_come_in_any_way():
    model = unet()
    latents, time, text = inputs()
    given = {"scale": 1.0}
    with tr.patched(model, "tomesd"):
        wanted = model(latents, time, text).sample
        assert torch.equal(model(sample=latents, timestep=500, encoder_hidden_states=text).sample, wanted)
        assert torch.equal(model(latents, time, text, None, None, None, dict(given))[0], wanted)
        assert torch.equal(model(latents, time, text, cross_attention_kwargs=given).sample, wanted)
        assert given == {"scale": 1.0}, "the caller's own"
        mask = torch.ones(2, text.shape[1], dtype=torch.bool)
        torch.testing.assert_close(model(latents, time, text, encoder_attention_mask=mask).sample, wanted)
        mask[:, 3:] = False
        padded = model(latents, time, text, encoder_attention_mask=mask).sample
        torch.testing.assert_close(padded, model(latents, time, text[:, :3]).sample, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_with_checkpoints():
    model = unet().train()
    latents, time, text = inputs()
    found = []
    for on in (False, True):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        model.zero_grad()
        with tr.patched(model, "tomesd:merge_mlp=true,max_downsample=2"):
            model(latents, time, text).sample.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@torch.no_grad()
def test_copies_and_pickles_are_patched_and_can_be_unpatched():
    model, args = unet(), inputs()
    stock = model(*args).sample
    tr.patch(model, "tomesd")
    patched = model(*args).sample
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*args).sample, patched)
        assert torch.equal(tr.unpatch(other)(*args).sample, stock)


@torch.no_grad()
def test_half_precision():
    model, args = unet(), inputs()
    with tr.patched(model, "tomesd:merge_mlp=true,use_rand=false"):
        whole = model(*args).sample
    latents, time, text = args
    half = model.to(torch.bfloat16)
    call = (latents.bfloat16(), time, text.bfloat16())
    stock = half(*call).sample
    with tr.patched(half, "tomesd:ratio=0"):
        assert torch.equal(half(*call).sample, stock)
    with tr.patched(half, "tomesd:merge_mlp=true,use_rand=false"):
        made = half(*call).sample
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), whole, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_lora_layers_run_on_merged_tokens():
    peft = pytest.importorskip("peft")
    model, method, args = unet(), tr.ToMeSD(merge_crossattn=True), inputs()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    wanted = by_the_card(model, method, lambda m: m(*args).sample)
    with tr.patched(model, method):
        torch.testing.assert_close(model(*args).sample, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_controlnet():
    model, args = controlnet(), inputs()
    picture = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(3))
    stock = model(*args, picture, return_dict=False)[1]
    with tr.patched(model, "tomesd"), tr.record(model) as trace:
        merged = model(*args, picture, return_dict=False)[1]
    assert [s.grid for s in trace.steps] == [(8, 12)]
    assert not torch.allclose(merged, stock)
    assert torch.equal(model(*args, picture, return_dict=False)[1], stock)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_without_a_break():
    model, args = unet(), inputs()
    with tr.patched(model, "tomesd"):
        wanted = model(*args).sample
        made = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(made(*args).sample, wanted)
        other = inputs(seed=9)
        torch.testing.assert_close(
            made(other[0], torch.tensor(40), other[2]).sample, model(other[0], 40, other[2]).sample
        )
    torch._dynamo.reset()


# -- what cannot be right ----------------------------------------------------------------------------------------------
def test_the_level_without_blocks_is_named():
    model = unet(PLAIN, CROSS)
    assert tr.describe(model).denoisers[0].levels() == {2: 4}
    with pytest.raises(ValueError, match=r"acts nowhere .* 4 at 1/2; set max_downsample to one of \[2\]"):
        tr.patch(model, "tomesd")
    with tr.patched(model, "tomesd:max_downsample=2"), tr.record(model) as trace:
        model(*inputs())
    assert trace.tokens == [12] * 4


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (("tome:r=4",), "stage encoder"),
        (("fastv",), "stage language"),
        (("tomesd", "tomesd:ratio=0.3"), "both merge"),
        (("tomesd:merge_attn=no",), "no module of a block"),
    ],
)
def test_methods_that_do_not_fit(specs, said):
    model = unet()
    with pytest.raises(ValueError, match=said):
        tr.patch(model, *specs)
    assert type(model.down_blocks[0].attentions[0]) is Transformer2DModel
    vit = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    with pytest.raises(ValueError, match="tomesd acts at stage diffusion"):
        tr.patch(vit, "tomesd")


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip


def joint():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip


def without_attention():
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, mid_block_type=None,
        up_block_types=("UpBlock2D",) * 2, cross_attention_dim=8,
    )  # fmt: skip


def of_images():
    return diffusers.UNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


def autoencoder():
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize(
    ("make", "said"),
    [(dit, "DiTTransformer2DModel is a diffusion transformer"),
     (joint, "SD3Transformer2DModel is a diffusion transformer"),
     (without_attention, "no spatial transformer"), (of_images, "UNet2DModel is a denoiser whose blocks"),
     (autoencoder, "no denoiser")],
)  # fmt: skip
def test_other_models_of_diffusers_are_refused_by_name(make, said):
    model = make()
    with pytest.raises(TypeError, match=said):
        tr.patch(model, "tomesd")
    with pytest.raises(TypeError, match=said):
        tr.describe(model)


class Own(BasicTransformerBlock):
    pass


def replaced_block(model):
    model.down_blocks[0].attentions[0].transformer_blocks[0].__class__ = Own


def own_forward(model):
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.forward = block.attn1.forward


def own_processor(model):
    model.set_attn_processor(type("Storing", (AttnProcessor2_0,), {"__module__": "mine"})())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [(replaced_block, TypeError, "Own, not"), (own_forward, ValueError, "method forward of its own"),
     (own_processor, ValueError, "processor mine.Storing")],
)  # fmt: skip
def test_what_was_replaced_is_refused(change, error, said):
    model = unet()
    change(model)
    with pytest.raises(error, match=said):
        tr.patch(model, "tomesd")
    assert not any("tokenreduce" in name for m in model.modules() for name in m.__dict__)


@torch.no_grad()
def test_calls_that_cannot_be_right_are_refused():
    model = unet()
    latents, time, text = inputs()
    with tr.patched(model, "tomesd"):
        with pytest.raises(ValueError, match="mask over places"):
            model(latents, time, text, attention_mask=torch.ones(2, 96))
        own_processor(model)
        with pytest.raises(ValueError, match="processor"):
            model(latents, time, text)
        model.set_attn_processor(AttnProcessor2_0())
        model(latents, time, text)
        with pytest.raises(RuntimeError, match="not told the size"):
            model.down_blocks[0].attentions[0].transformer_blocks[0](torch.zeros(2, 96, 16))
        with pytest.raises(ValueError, match="patched already"):
            tr.patch(model, "tomesd")
        with pytest.raises(ValueError, match="through its parent"):
            tr.unpatch(model.down_blocks[0])
    with tr.patched(model, "tomesd:merge_mlp=true"):
        model.down_blocks[0].attentions[0].transformer_blocks[0].set_chunk_feed_forward(48, dim=1)
        with pytest.raises(RuntimeError, match="chunked feed-forward"):
            model(latents, time, text)
    with tr.patched(model, "tomesd"):
        model(latents, time, text)  # chunks are no matter where the MLP sees all tokens
