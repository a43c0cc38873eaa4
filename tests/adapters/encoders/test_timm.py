"""The timm adapter against plain references: merged tokens behave like duplicates, dropped ones like masked keys."""

from __future__ import annotations

import pytest
import timm
import torch
from support import images, tiny_vit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

import tokenreduce as tr


def tiny_eva(**changes) -> nn.Module:
    torch.manual_seed(0)
    settings = dict(
        img_size=24, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=7, mlp_ratio=2.0,
        use_rot_pos_emb=True, head_init_scale=1.0, **changes,
    )  # fmt: skip
    model = Eva(**settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(10.0)
    return model.eval()


def scaled(**changes):
    return lambda: tiny_vit(**changes)


VITS = {
    "class token": scaled(),
    "layer scale": scaled(init_values=0.3),
    "registers": scaled(reg_tokens=4),
    "no class embedding": scaled(reg_tokens=2, no_embed_class=True),
    "qk norm": scaled(qk_norm=True),
    "pre norm": scaled(pre_norm=True),
    "average pool": scaled(global_pool="avg", class_token=False),
    "average pool with class token": scaled(global_pool="avg"),
    "average and maximum": scaled(global_pool="avgmax"),
    "attention pool": scaled(global_pool="map", class_token=False),
    "attention pool with class token": scaled(global_pool="map"),
    "residual post norm": scaled(block_fn=ResPostBlock),
    "parallel scaling": scaled(block_fn=ParallelScalingBlock, qkv_bias=True),
    "parallel scaling, qk norm": scaled(block_fn=ParallelScalingBlock, qkv_bias=False, qk_norm=True),
    "parallel things": scaled(block_fn=ParallelThingsBlock),
}
EVAS = {
    "eva": lambda: tiny_eva(),
    "eva average pool": lambda: tiny_eva(global_pool="avg"),
    "eva separate qkv": lambda: tiny_eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
    "eva registers, gamma": lambda: tiny_eva(num_reg_tokens=2, init_values=0.4, use_abs_pos_emb=False),
    "eva mixed rope": lambda: tiny_eva(attn_type="rope", rope_type="mixed", use_abs_pos_emb=False),
    "dinov3": lambda: tiny_eva(
        attn_type="rope", rope_type="dinov3", num_reg_tokens=4, use_abs_pos_emb=False, init_values=0.5,
        rope_rotate_half=True,
    ),
}  # fmt: skip
families = pytest.mark.parametrize("build", [*VITS.values(), *EVAS.values()], ids=[*VITS, *EVAS])


@families
@torch.no_grad()
def test_keep_all_and_unpatch_are_bit_identical(build):
    model, x = build(), images()
    want, keys = model(x), list(model.state_dict())
    tr.patch(model, tr.ToMe(r=0))
    assert torch.equal(model(x), want)
    tr.unpatch(model)
    tr.patch(model, tr.ToMe(r=3))
    with tr.record(model, flops=False) as trace:
        got = model(x)
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert not torch.equal(got, want)
    entry = 36 + model.num_prefix_tokens
    assert trace.tokens == [entry - 3 * (i + 1) for i in range(len(model.blocks))]
    tr.unpatch(model)
    assert torch.equal(model(x), want)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("build", VITS.values(), ids=VITS)
@pytest.mark.parametrize("method", ["uniform:keep=0.5,layer=1", "tome:r=[0,2],prop_attn=false", "tome:r=[0,2]"])
def test_a_block_where_nothing_acts_is_the_stock_block(build, method, monkeypatch):
    """Who records sees every block run by itself; the others see the same bits."""
    model, x, ran = build(), images(), []
    tr.patch(model, method)
    with torch.no_grad():
        with tr.record(model, flops=False):
            want = model(x)
        kind = type(model.blocks[0])
        run = kind._run
        monkeypatch.setattr(kind, "_run", lambda self, *args: ran.append(self) or run(self, *args))
        assert torch.equal(model(x), want)
    biased = method == "tome:r=[0,2]"  # log sizes reach every block behind the merge
    assert ran == list(model.blocks[1:] if biased else model.blocks[1:2])


def first_half(block, x, rope):
    """Attention half of a stock block, by its own modules."""
    if hasattr(block, "attns"):
        return x + sum(b.drop_path(b.ls(b.attn(b.norm(x)))) for b in block.attns)
    if isinstance(block, ResPostBlock):
        return x + block.norm1(block.attn(x))
    if hasattr(block, "gamma_1"):
        out = block.attn(block.norm1(x), rope=rope)
        return x + (out if block.gamma_1 is None else block.gamma_1 * out)
    return x + block.ls1(block.attn(block.norm1(x)))


def second_half(block, x):
    if hasattr(block, "ffns"):
        return x + sum(f(x) for f in block.ffns)
    if isinstance(block, ResPostBlock):
        return x + block.norm2(block.mlp(x))
    if hasattr(block, "gamma_1"):
        out = block.mlp(block.norm2(x))
        return x + (out if block.gamma_2 is None else block.gamma_2 * out)
    return x + block.ls2(block.mlp(block.norm2(x)))


def duplicated(model, image, plan):
    """The stock model when every token of a group carries the group's mean (and stands at its representative)."""
    x = model.patch_embed(image)
    x = model._pos_embed(x)
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    p = model.num_prefix_tokens
    place = plan.representatives()[0][plan.sources()[0]][p:] - p
    mixed = rope is not None and rope.dim() == 4
    for i, block in enumerate(model.blocks):
        here = rope[i] if mixed else rope
        if i == 0 and isinstance(block, ParallelScalingBlock):
            x = block(x)
            x = plan.expand(plan.reduce(x))
            continue
        if i == 0:
            x = first_half(block, x, here)
            x = second_half(block, plan.expand(plan.reduce(x)))
        elif rope is None:
            x = block(x)
        else:
            x = block(x, rope=here[..., place, :])
    return model.forward_head(model.norm(x))


@families
@torch.no_grad()
def test_merged_tokens_count_like_duplicates(build):
    """Proportional attention and size-weighted pooling make one token of size s equal to s equal tokens."""
    model, x = build(), images(1)
    stock = model(x)
    with tr.patched(model, tr.ToMe(r=[12])), tr.record(model, flops=False) as trace:
        got = model(x)
    want = duplicated(model, x, trace.plans[0])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    assert float((got - stock).abs().max()) > 1e-3


@pytest.mark.parametrize("build", [VITS["class token"], VITS["average pool"], VITS["attention pool"]])
@torch.no_grad()
def test_sizes_matter(build):
    """The same plan without proportional attention gives something else, so the test above has teeth."""
    model, x = build(), images(1)
    outs = []
    for prop in (True, False):
        with tr.patched(model, tr.ToMe(r=[14, 0, 0], prop_attn=prop)):
            outs.append(model(x))
    assert float((outs[0] - outs[1]).abs().max()) > 1e-3


class _Drop(tr.Reducer):
    """Drops tokens 4..19 before the MLP of layer 1, a different number per sample."""

    def acts_at(self, layer, depth):
        return layer == 1

    def plan(self, evidence):
        p = evidence.prefix
        gone = [range(p + 4, p + 20), range(p + 8, p + 12)]
        rows = [[i for i in range(evidence.n) if i not in g] for g in gone[: evidence.batch]]
        width = max(map(len, rows))
        keep = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        valid = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
        return tr.Prune(evidence.n, keep, valid)


@pytest.mark.parametrize("name", ["class token", "registers", "average pool", "attention pool", "average and maximum"])
@torch.no_grad()
def test_dropped_tokens_count_like_masked_keys_in_ragged_batches(name):
    model, x = VITS[name](), images(2)
    p = model.num_prefix_tokens
    with tr.patched(model, _Drop()):
        got = model(x)
    for i, gone in enumerate([range(p + 4, p + 20), range(p + 8, p + 12)]):
        rest = [t for t in range(36 + p) if t not in gone]
        y = model.norm_pre(model._pos_embed(model.patch_embed(x[i : i + 1])))
        y = model.blocks[0](y)
        y = first_half(model.blocks[1], y, None)[:, rest]
        y = second_half(model.blocks[1], y)
        for block in model.blocks[2:]:
            y = block(y)
        want = model.forward_head(model.norm(y))
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_evidence_is_what_the_attention_used():
    """Keys are the model's own, before RoPE; the CLS row is that of the eager attention, RoPE and qk-norm included."""
    seen = {}

    class Look(tr.Reducer, needs=("attention", "keys", "values")):
        def acts_at(self, layer, depth):
            return layer == 2

        def plan(self, evidence):
            seen.update(
                cls=evidence.attention("cls"), keys=evidence.keys, rope=evidence.attention.rope, grid=evidence.grid
            )
            return tr.get_method("tome").plan(evidence)

    for name in ("qk norm", "dinov3", "eva separate qkv"):
        model = {**VITS, **EVAS}[name]()
        attn = model.blocks[2].attn
        attn.fused_attn = False
        rows, keys = [], []
        attn.attn_drop.register_forward_hook(lambda m, a, out, rows=rows: rows.append(a[0]))
        attn.k_norm.register_forward_hook(lambda m, a, out, keys=keys: keys.append(out))
        with tr.patched(model, Look()):
            model(images())
        torch.testing.assert_close(seen["cls"], rows[0][:, :, :1], rtol=1e-5, atol=1e-6)
        assert torch.equal(seen["keys"], keys[0])
        assert seen["rope"] == (None if name == "qk norm" else "pre")
        assert seen["grid"] == (6, 6)


@pytest.mark.parametrize("build", [VITS["registers"], EVAS["dinov3"], VITS["average pool"]])
@torch.no_grad()
def test_dense_outputs_are_expanded(build):
    model, x = build(), images()
    p = model.num_prefix_tokens
    stock = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    with tr.patched(model, tr.ToMe(r=6)), tr.record(model, flops=False) as trace:
        maps = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True, norm=True)
        pairs = model.forward_intermediates(x, 2, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC")
        listed = model.forward_intermediates(x, indices=[1, 3])
    assert [m.shape for m in maps] == [m.shape for m in stock] == [m.shape for m in listed[1]]
    if p:
        assert pairs[-1][0].shape == (2, 36, 32)
        assert pairs[-1][1].shape == (2, p, 32)
    steps = trace.plans[: len(model.blocks)]
    composed = steps[0].then(steps[1])
    token_map = maps[0].flatten(2).transpose(1, 2)
    groups = composed.sources()[0, p:]
    for g in groups.unique():
        same = token_map[0][groups == g]
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert len(groups.unique()) == 36 - 12
    features = timm.models._features.FeatureGetterNet(model, out_indices=(1, 3))
    with tr.patched(model, tr.ToMe(r=6)):
        assert [m.shape for m in features(x)] == [m.shape for m in stock]


def test_distilled_models_keep_both_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, num_classes=5).eval()
    with torch.no_grad(), tr.patched(model, tr.ToMe(r=2)), tr.record(model, flops=False) as trace:
        model(torch.randn(1, 3, 32, 32))
    assert all(p.sources()[0, :2].tolist() == [0, 1] for p in trace.plans)


def test_unsupported_parts_are_named():
    with pytest.raises(TypeError, match="ResNet"):
        tr.patch(timm.create_model("resnet18"), tr.ToMe(r=1))
    model = tiny_vit()
    model.blocks[2].attn.__class__ = type("OddAttention", (type(model.blocks[2].attn),), {})
    with pytest.raises(TypeError, match="attention class OddAttention is not supported"):
        tr.patch(model, tr.ToMe(r=1))
    model = tiny_vit()
    model.blocks[2].__class__ = type("OddBlock", (type(model.blocks[2]),), {})
    with pytest.raises(TypeError, match="block class OddBlock is not supported; supported: Block"):
        tr.patch(model, tr.ToMe(r=1))
    patched = tr.patch(tiny_vit(), tr.ToMe(r=1))
    with pytest.raises(ValueError, match="no attn_mask"):
        patched(images(), attn_mask=torch.ones(37, 37, dtype=torch.bool))


@torch.no_grad()
def test_half_precision_and_training_mode():
    model = tiny_vit(drop_path_rate=0.2, proj_drop_rate=0.1).to(torch.bfloat16)
    x = images().to(torch.bfloat16)
    want = model(x)
    with tr.patched(model, tr.ToMe(r=0)):
        assert torch.equal(model(x), want)
    with tr.patched(model, tr.ToMe(r=3)):
        assert model(x).dtype == torch.bfloat16
        model.train()
        assert torch.isfinite(model(x)).all()
