"""The open_clip adapter against plain references: merged tokens behave like repeated ones, dropped ones are absent."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import dataclass

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    LayerNormFp32,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from support import images
from torch import nn

import tokenreduce as tr
from tokenreduce.adapters.encoders.state import pool_mean
from tokenreduce.core.plan import Identity, Merge, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.vision.encoder.tome import ToMe

LAYERS, SIDE = 4, 6
TOKENS = 1 + SIDE * SIDE


# -- reducers that only the tests need (without a name, so that no registry knows them) ------------------------------
@dataclass(frozen=True)
class Watch(Reducer, needs=("keys", "queries", "values", "attention", "before")):
    """Looks at everything and keeps everything."""

    def plan(self, evidence):
        for tensor in (evidence.keys, evidence.queries, evidence.values, evidence.attention("all"), evidence.before):
            assert torch.isfinite(tensor).all()
        return Identity.like(evidence.x)


@dataclass(frozen=True)
class Keep(Watch):
    """Keeps everything, evidence included."""

    seen: list = None

    def plan(self, evidence):
        e = evidence
        self.seen.append((e.x, e.before, e.queries, e.keys, e.values, e.attention("all")))
        return Identity.like(e.x)


@dataclass(frozen=True)
class Halve(Reducer):
    """Drops every second patch after the attention of one layer."""

    layer: int = 1

    def acts_at(self, layer, depth):
        return layer == self.layer

    def plan(self, evidence):
        keep = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, evidence.n, 2)])
        return Prune(evidence.n, keep.expand(evidence.batch, -1))


@dataclass(frozen=True)
class Ragged(Halve):
    """Keeps the first 20 tokens of sample 0 and the first 20 - 5 b of sample b, padded to 20."""

    def plan(self, evidence):
        place = torch.arange(20).expand(evidence.batch, -1)
        return Prune(evidence.n, place, place < 20 - 5 * torch.arange(evidence.batch)[:, None])


@dataclass(frozen=True)
class Pairs(Halve, needs=("queries", "keys"), position="before"):
    """Merges patches 1 and 2, 3 and 4, ... on the input of one layer and hands the merged attention map on."""

    forwards_attention = True

    def plan(self, evidence):
        n, b = evidence.n, evidence.batch
        keep = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, n, 2)])
        src = torch.arange(2, n, 2)
        return Merge(n, keep.expand(b, -1), src.expand(b, -1), (src // 2).expand(b, -1))


@dataclass(frozen=True)
class Grid(Reducer):
    """Writes down the grid that it is shown."""

    seen: list = None

    def plan(self, evidence):
        self.seen.append((evidence.grid, evidence.n))
        return Identity.like(evidence.x)


@dataclass(frozen=True)
class Shrink(Reducer, position="input"):
    rows: int = 4
    cols: int = 3

    def grid(self, grid):
        return self.rows, self.cols


# -- models ----------------------------------------------------------------------------------------------------------
def widen(model: nn.Module) -> nn.Module:
    """Wide random weights and biases so that mistakes show."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = dict(image_size=24, patch_size=4, width=32, layers=LAYERS, heads=2, mlp_ratio=2.0, output_dim=16)
    return widen(VisionTransformer(**(settings | changes)))


POOLER = dict(attn_pooler_queries=5, attn_pooler_heads=2)
VARIANTS = {
    "token": {},
    "average": dict(pool_type="avg"),
    "average before norm": dict(pool_type="avg", final_ln_after_pool=True, output_tokens=True),
    "odd heads": dict(heads=1, pool_type="avg"),
    "width not a multiple of 8": dict(width=36, heads=6),
    "no norm at entry": dict(no_ln_pre=True, pos_embed_type="sin_cos_2d"),
    "layer scale, tokens": dict(ls_init_value=0.4, output_tokens=True),
    "no pool": dict(pool_type="none"),
    "attention pool": dict(attentional_pool=True, output_tokens=True, **POOLER),
    "attention pool, average": dict(attentional_pool=True, pool_type="avg", output_tokens=True, **POOLER),
    "attention pool, parallel": dict(attentional_pool="parallel", output_tokens=True, output_dim=32, **POOLER),
    "attention pool, cascade": dict(attentional_pool="cascade", output_tokens=True, output_dim=32, **POOLER),
    "custom qk norm": dict(qk_norm=True, pool_type="avg"),
    "custom scales": dict(scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True, qk_norm=True),
    "custom plain": dict(block_type="custom", attentional_pool=True, ls_init_value=0.5, **POOLER),
}
variants = pytest.mark.parametrize("settings", list(VARIANTS.values()), ids=list(VARIANTS))

TEXT = dict(context_length=7, vocab_size=50, width=32, heads=2, layers=2)
VISION = dict(image_size=24, patch_size=4, width=32, layers=LAYERS, head_width=16)


def clip(kind=open_clip.CLIP, **vision):
    torch.manual_seed(0)
    return widen(kind(16, VISION | vision, TEXT))


def coca(**vision):
    torch.manual_seed(0)
    from open_clip.coca_model import CoCa

    text = TEXT | dict(embed_cls=True, output_tokens=True)
    decoder = dict(context_length=7, vocab_size=50, width=32, heads=2, layers=2)
    model = CoCa(32, decoder, text, VISION | dict(output_tokens=True) | vision)
    nn.init.normal_(model.text_decoder.text_projection, std=32**-0.5)  # which the library leaves as memory was
    return widen(model)


def words() -> torch.Tensor:
    return torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(3))


def parts(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def same(a, b) -> bool:
    return all(torch.equal(s, t) for s, t in zip(parts(a), parts(b), strict=True))


# -- plain references ------------------------------------------------------------------------------------------------
def attention_half(block, x: torch.Tensor) -> torch.Tensor:
    """By the stock modules; ``nn.MultiheadAttention`` without its inference kernel."""
    y = block.ln_1(x)
    y = block.ln_attn(block.attn(y)) if isinstance(block, CustomResidualAttentionBlock) else block.attention(y)
    return x + block.ls_1(y)


def mlp_half(block, x: torch.Tensor) -> torch.Tensor:
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def repeated(x: torch.Tensor, plan) -> torch.Tensor:
    """Every token (B,N,C) replaced by the mean of the tokens that ``plan`` puts into the same output."""
    out = torch.empty_like(x)
    for b, source in enumerate(plan.sources()):
        for k in range(plan.k):
            out[b, source == k] = x[b, source == k].mean(0)
    return out


def reference(model, image: torch.Tensor, after) -> torch.Tensor:
    """Stock blocks with ``after(layer, x)`` applied between their halves; the last block's output."""
    x = model._embeds(image)
    for layer, block in enumerate(model.transformer.resblocks):
        x = mlp_half(block, after(layer, attention_half(block, x)))
    return x


def finish(model, x: torch.Tensor):
    pooled, tokens = model._pool(x)
    return (pooled @ model.proj, tokens) if model.output_tokens else pooled @ model.proj


def composed(trace) -> list:
    """The plan from the entry to each layer's output."""
    out = []
    for plan in trace.plans:
        out.append(plan if not out else out[-1].then(plan))
    return out


# -- keep all, unpatch -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reducer", [Watch(), ToMe(r=0)], ids=["all evidence", "r=0"])
@variants
def test_keep_everything_is_bit_identical(settings, reducer):
    model, x = vit(**settings), images()
    before, keys = dict(model.__dict__), list(model.state_dict())

    def run():
        with torch.no_grad():
            silent = model(x)
        return *parts(silent), *(t.detach() for t in parts(model(x)))

    want = run()
    model.train()
    trained = model(x)
    with tr.patched(model, reducer):
        assert same(model(x), trained)
        model.eval()
        assert same(run(), want)
    assert same(run(), want)
    assert list(model.state_dict()) == keys
    assert model.__dict__ == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_bit_identical_and_keeps_its_norms(dtype):
    model = vit(norm_layer=LayerNormFp32, pool_type="avg").to(dtype)
    for module in model.modules():
        if isinstance(module, LayerNormFp32):
            module.float()
    x = images().to(dtype)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            want = model(x)
            with tr.patched(model, Watch()):
                assert torch.equal(model(x), want)
            with tr.patched(model, ToMe(r=3)):
                got = model(x)
        assert got.dtype == dtype
        assert torch.isfinite(got).all()
        assert not torch.equal(got, want)


@pytest.mark.parametrize("settings", [{}, dict(qk_norm=True), VARIANTS["attention pool, parallel"]])
def test_autocast(settings):
    model, x = vit(**settings), images()
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = model(x.to(dtype))
            with tr.patched(model, Watch()):
                assert same(model(x.to(dtype)), want)
            with tr.patched(model, ToMe(r=3)):
                got = model(x.to(dtype))
        assert [t.dtype for t in parts(got)] == [t.dtype for t in parts(want)]
        assert all(torch.isfinite(t).all() for t in parts(got))


@torch.no_grad()
def test_autocast_of_float32_tokens():
    """On CPU the inference kernel casts its arguments itself."""
    model, x = vit(), torch.randn(2, TOKENS, 32)
    with torch.autocast("cpu", torch.bfloat16):
        want = model.transformer(x)
        with tr.patched(model, Watch()):
            assert torch.equal(model.transformer(x), want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("settings", [dict(width=40), dict(width=40, qk_norm=True)], ids=["plain", "custom"])
def test_evidence_is_what_the_attention_computes(settings, mode):
    model, x = vit(**settings), images()
    seen: list = []
    with mode(), tr.patched(model, Keep(seen)):
        model(x)
    block = model.transformer.resblocks[0]
    with torch.no_grad():
        before = model._embeds(x)
        y = block.ln_1(before)
        packed = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, 2, 20)).permute(2, 0, 3, 1, 4)
        if "qk_norm" in settings:
            q, k = block.attn.ln_q(q), block.attn.ln_k(k)
        rows = (q @ k.transpose(-1, -2) / 20**0.5).softmax(-1)
        after = attention_half(block, before)
    for mine, theirs in zip(seen[0], (after, before, q, k, v, rows), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, dict(heads=1), dict(width=36, heads=6), dict(qk_norm=True)])
def test_keep_everything_is_bit_identical_on_cuda(settings, dtype):
    model, x = vit(**settings).to("cuda", dtype), images().to("cuda", dtype)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            want = model(x)
            with tr.patched(model, Watch()):
                assert torch.equal(model(x), want)


# -- merging and dropping --------------------------------------------------------------------------------------------
@variants
@torch.no_grad()
def test_merging_equals_repeated_tokens(settings):
    model, x = vit(**settings), images()
    want = model(x)
    with tr.patched(model, ToMe(r=3)), tr.record(model, flops=False) as trace:
        got = model(x)
    assert trace.tokens == [TOKENS - 3 * (i + 1) for i in range(LAYERS)]
    assert [t.shape for t in parts(got)] == [t.shape for t in parts(want)]
    assert not same(got, want)
    plans = composed(trace)
    oracle = finish(model, reference(model, x, lambda i, y: repeated(y, plans[i])))
    for mine, theirs in zip(parts(got), parts(oracle), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("settings", [{}, dict(qk_norm=True)])
@torch.no_grad()
def test_without_size_bias_no_attention_is_weighted(settings):
    model, x = vit(**settings), images()
    with tr.patched(model, ToMe(r=3, prop_attn=False)), tr.record(model, flops=False) as trace:
        got = model(x)
    y, size = model._embeds(x), None
    for block, plan in zip(model.transformer.resblocks, trace.plans, strict=True):
        y = attention_half(block, y)
        y, size = plan.reduce(y, size), plan.reduce_size(size)
        y = mlp_half(block, y)
    torch.testing.assert_close(got, finish(model, y), rtol=1e-4, atol=1e-4)


@variants
@torch.no_grad()
def test_dropped_tokens_are_absent(settings):
    model, x = vit(**settings), images()
    with tr.patched(model, Halve()), tr.record(model, flops=False) as trace:
        got = model(x)
    left = 1 + SIDE * SIDE // 2
    assert trace.tokens == [TOKENS, left, left, left]
    keep = trace.plans[0].keep[0]
    oracle = finish(model, reference(model, x, lambda i, y: y[:, keep] if i == 1 else y))
    for mine, theirs in zip(parts(got), parts(oracle), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@variants
@torch.no_grad()
def test_samples_that_keep_different_numbers(settings):
    model, x = vit(**settings), images()
    with tr.patched(model, Ragged()):
        got = parts(model(x))
    dense = settings.get("output_tokens") and not settings.get("attentional_pool")
    for b in range(2):
        left = 20 - 5 * b
        oracle = parts(finish(model, reference(model, x[b : b + 1], lambda i, y, n=left: y[:, :n] if i == 1 else y)))
        mine = [t[b : b + 1] for t in got]
        if dense:  # on the full grid, zero where dropped
            assert mine[1].shape[1] == SIDE * SIDE
            assert not mine[1][:, left - 1 :].any()
            mine[1] = mine[1][:, : left - 1]
        elif settings.get("pool_type") == "none":
            mine[0] = mine[0][:, :left]
        for one, other in zip(mine, oracle, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_the_weighted_mean_of_half_precision_does_not_overflow():
    x = torch.tensor([300.0, 100.0]).half().reshape(1, 2, 1).repeat(1, 200, 1)  # the plain sum is 80000
    size = torch.tensor([3.0, 1.0]).repeat(200)[None]
    assert pool_mean(x, size).item() == 250.0


@pytest.mark.parametrize("settings", [{}, VARIANTS["custom scales"]], ids=["plain", "custom"])
@torch.no_grad()
def test_a_reducer_before_the_block_may_hand_on_its_attention_map(settings):
    model, x = vit(**settings), images()
    with tr.patched(model, Pairs()), tr.record(model, flops=False) as trace:
        got = model(x)
    assert trace.tokens == [TOKENS, 19, 19, 19]
    blocks = model.transformer.resblocks
    y = mlp_half(blocks[0], attention_half(blocks[0], model._embeds(x)))
    mean = trace.plans[0].matrix(dtype=y.dtype)  # (B,K,N)
    total = (mean > 0).to(y.dtype)
    block, attn = blocks[1], blocks[1].attn

    def heads(y, third):
        weight, bias = attn.in_proj_weight.chunk(3)[third], attn.in_proj_bias.chunk(3)[third]
        return F.linear(y, weight, bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)

    q, k = heads(block.ln_1(y), 0), heads(block.ln_1(y), 1)
    if settings:
        q, k = attn.ln_q(q), attn.ln_k(k)
    full = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    small = mean[:, None] @ full @ total.transpose(1, 2)[:, None]
    y = mean @ y
    out = small @ heads(block.ln_1(y), 2)
    if settings:
        out = out * attn.head_scale
    out = out.transpose(1, 2).flatten(2)
    out = block.ln_attn(attn.out_proj(attn.ln_inner(out))) if settings else attn.out_proj(out)
    y = mlp_half(block, y + block.ls_1(out))
    for block in blocks[2:]:  # no size bias: Pairs has no prop_attn
        y = mlp_half(block, attention_half(block, y))
    torch.testing.assert_close(got, finish(model, y), rtol=1e-4, atol=1e-4)


# -- whole models ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@torch.no_grad()
def test_clip_keeps_its_text_tower(kind):
    model, x, text = clip(kind), images(), words()
    image, spoken, scale = model(x, text)
    classes = [type(m) for n, m in model.named_modules() if not n.startswith("visual")]
    tr.patch(model, ToMe(r=3))
    assert [type(m) for n, m in model.named_modules() if not n.startswith("visual")] == classes
    with tr.record(model, flops=False) as trace:
        got = model(x, text)
    assert trace.tokens == [34, 31, 28, 25]
    assert torch.equal(got[1], spoken)
    assert torch.equal(got[2], scale)
    assert torch.equal(model.encode_text(text, normalize=True), spoken)
    assert got[0].shape == image.shape
    assert not torch.equal(got[0], image)
    assert not any(hasattr(m, "_tokenreduce_site") for n, m in model.named_modules() if not n.startswith("visual"))
    tr.unpatch(model)
    assert same(model(x, text), (image, spoken, scale))


@pytest.mark.parametrize("settings", [dict(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2), {}])
@torch.no_grad()
def test_coca_decodes_from_reduced_images(settings):
    model, x, text = coca(**settings), images(), words()
    want = model(x, text)
    with tr.patched(model, ToMe(r=3)):
        with tr.record(model, flops=False) as trace:
            got = model(x, text)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        assert torch.equal(got["text_features"], want["text_features"])
    assert not torch.equal(got["logits"], want["logits"])
    # The decoder attends to merged tokens as if it saw each of them as often as it stands for a patch.
    plans = composed(trace)
    pooled, tokens = finish(model.visual, reference(model.visual, x, lambda i, y: repeated(y, plans[i])))
    oracle = model(x, text, F.normalize(pooled, dim=-1), tokens)
    torch.testing.assert_close(got["logits"], oracle["logits"], rtol=2e-4, atol=2e-4 * float(oracle["logits"].max()))
    with tr.patched(model, Halve()):
        assert model(x, text)["logits"].shape == want["logits"].shape
    again = model(x, text)
    assert all(torch.equal(again[k], want[k]) for k in want)


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_a_timm_tower_works_through_its_own_adapter(kind, pool):
    model = clip(kind, timm_model_name="test_vit", timm_pool=pool, image_size=160)
    x, text = images(2, 160), words()
    with torch.no_grad():
        want = model(x, text)
        assert [t.name for t in tr.describe(model).towers] == ["visual.trunk"]
        with tr.patched(model, ToMe(r=0)):
            assert same(model(x, text), want)
        with tr.patched(model, ToMe(r=9)):
            with tr.record(model, flops=False) as trace:
                got = model(x, text)
            inner = model.forward_intermediates(x, image_indices=[1, 4])
        assert trace.tokens == [101 - 9 * (i + 1) for i in range(6)]
        assert [t.shape for t in inner["image_intermediates"]] == [(2, 64, 10, 10)] * 2
        torch.testing.assert_close(inner["image_features"], got[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(got[1], want[1])
        assert got[0].shape == want[0].shape
        assert not torch.equal(got[0], want[0])
        assert same(model(x, text), want)


def test_describe():
    (tower,) = tr.describe(clip()).towers
    assert (tower.name, tower.prefix, tower.grid, tower.tokens, len(tower.blocks)) == (
        "visual", 1, (SIDE, SIDE), TOKENS, LAYERS,
    )  # fmt: skip
    assert tower.cls


# -- copies, compilation, gradients ----------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, VARIANTS["custom scales"], VARIANTS["attention pool, cascade"]])
@torch.no_grad()
def test_copies_are_independent(settings):
    model, x = vit(**settings), images()
    want = model(x)
    tr.patch(model, ToMe(r=3), Shrink(5, 5))
    got = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(copied(x), got)
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        assert same(model(x), got)
        tr.unpatch(copied)
        assert same(model(x), got)
        copied.load_state_dict(model.state_dict())
        assert same(copied(x), want)
    tr.unpatch(model)
    assert same(model(x), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(layers=2),
        dict(layers=2, qk_norm=True, pool_type="avg"),
        VARIANTS["attention pool, parallel"] | dict(layers=2),
    ],
    ids=["token", "custom average", "attention pool"],
)
def test_compiles_to_one_graph(settings):
    model, x = tr.patch(vit(**settings), ToMe(r=3)), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for mine, theirs in zip(parts(compiled(x)), parts(model(x)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, dict(pool_type="avg"), VARIANTS["attention pool, parallel"], dict(qk_norm=True)]
)
def test_gradients_flow_and_checkpointing_changes_nothing(settings):
    model, x = tr.patch(vit(**settings), ToMe(r=3)).train(), images()

    def gradients():
        model.zero_grad()
        sum(t.square().sum() for t in parts(model(x))).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert set(plain) == {n for n, _ in model.named_parameters()}
    assert all(torch.isfinite(g).all() and g.any() for g in plain.values())
    model.set_grad_checkpointing(True)
    again = gradients()
    assert all(torch.equal(again[n], g) for n, g in plain.items())


def test_gradients_agree_with_repeated_tokens():
    model, x = vit(pool_type="avg"), images().requires_grad_()
    with tr.patched(model, ToMe(r=3)), tr.record(model, flops=False) as trace:
        (mine,) = torch.autograd.grad(model(x).square().sum(), x)
    plans = composed(trace)
    mixing = []
    for plan in plans:  # (B,N,N): the mean over the members of a token's group
        together = (plan.sources()[:, :, None] == plan.sources()[:, None, :]).float()
        mixing.append(together / together.sum(-1, keepdim=True))
    out = finish(model, reference(model, x, lambda i, y: mixing[i] @ y))
    (theirs,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_patch_dropout_only_acts_while_training():
    model, x = vit(patch_dropout=0.5), images()
    seen: list = []
    tr.patch(model, Grid(seen))
    with torch.no_grad():
        model(x)
        model.train()(x)
    assert seen[:LAYERS] == [((SIDE, SIDE), TOKENS)] * LAYERS
    assert seen[LAYERS:] == [(None, 1 + SIDE * SIDE // 2)] * LAYERS  # the patches no longer form the grid
    tr.unpatch(model)
    with tr.patched(model, Shrink(4, 4)), tr.record(model, flops=False) as trace:
        model(x)
    assert trace.tokens == [1 + 16 // 2] * LAYERS


# -- intermediate layers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_intermediates_are_expanded_to_the_grid(norm):
    model, x = vit(pool_type="avg"), images()
    settings = dict(indices=[3, 0, -2], normalize_intermediates=norm, output_extra_tokens=True)
    stock = model.forward_intermediates(x, **settings)
    with tr.patched(model, ToMe(r=3)):
        with tr.record(model, flops=False) as trace:
            final = model(x)
        got = model.forward_intermediates(x, **settings)
        flat = model.forward_intermediates(x, output_fmt="NLC", **settings)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert {k: [t.shape for t in v] for k, v in got.items()} == {k: [t.shape for t in v] for k, v in stock.items()}
    torch.testing.assert_close(got["image_features"], final)
    assert list(early) == ["image_intermediates"]
    plans, layers = composed(trace), []
    reference(model, x, lambda i, y: layers.append(repeated(y, plans[i])) or layers[-1])
    for i, layer in enumerate([0, 2, 3]):
        want = mlp_half(model.transformer.resblocks[layer], layers[layer])
        want = model.ln_post(want) if norm else want
        torch.testing.assert_close(flat["image_intermediates"][i], want[:, 1:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got["image_intermediates_prefix"][i], want[:, :1], rtol=1e-3, atol=1e-3)
        grid = flat["image_intermediates"][i].transpose(1, 2).reshape(2, 32, SIDE, SIDE)
        assert torch.equal(got["image_intermediates"][i], grid)
    assert early["image_intermediates"][0].shape == (2, 32, SIDE, SIDE)


@torch.no_grad()
def test_dropped_places_are_zero_in_intermediates():
    model, x = vit(), images()
    stock = model.forward_intermediates(x, indices=[0, 2], normalize_intermediates=True, output_fmt="NLC")
    with tr.patched(model, Halve()):
        got = model.forward_intermediates(x, indices=[0, 2], normalize_intermediates=True, output_fmt="NLC")
        with pytest.raises(ValueError, match="NCHW"):
            model.forward_intermediates(x, output_fmt="NHWC")
    first, last = got["image_intermediates"]
    assert torch.equal(first, stock["image_intermediates"][0])
    assert not last[:, 1::2].any()
    assert last[:, ::2].abs().sum(-1).min() > 0


# -- resizing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, dict(pool_type="avg", no_ln_pre=True), VARIANTS["attention pool"]])
@torch.no_grad()
def test_resize_equals_a_model_for_smaller_images(settings):
    model, x = vit(**settings), images()
    table, want = model.positional_embedding.clone(), model(x)
    small = vit(**settings, image_size=(16, 12))
    state = {"visual." + k: v for k, v in model.state_dict().items()}
    holder = nn.Module()
    holder.visual = small
    open_clip.model.resize_pos_embed(state, holder)
    holder.load_state_dict(state)
    oracle = small(F.interpolate(x, (16, 12), mode="bicubic", antialias=True, align_corners=False))
    with tr.patched(model, Shrink(4, 3)):
        with tr.record(model, flops=False) as trace:
            got = model(x)
        inner = model.forward_intermediates(x, indices=1)["image_intermediates"]
    assert trace.tokens == [13] * LAYERS
    assert inner[0].shape == (2, 32, 4, 3)
    for mine, theirs in zip(parts(got), parts(oracle), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.positional_embedding, table)
    with tr.patched(model, Shrink(SIDE, SIDE)):
        assert same(model(x), want)
    assert same(model(x), want)


@torch.no_grad()
def test_resize_and_merging_combine():
    model, x = vit().bfloat16(), images().bfloat16()
    seen: list = []
    with tr.patched(model, Shrink(4, 4), ToMe(r=[2, 0, 0, 0])), tr.record(model, flops=False) as trace:
        got = model(x)
    assert trace.tokens == [15] * LAYERS
    assert torch.isfinite(got).all()
    with tr.patched(model, Shrink(4, 4), Grid(seen)):
        model(x)
    assert seen == [((4, 4), 17)] * LAYERS


# -- FLOPs -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_flops_count_the_inference_kernel():
    model, x, n, c = vit(), images(), TOKENS, 32
    with tr.record(model) as stock:
        model(x)
    layer = 2 * n * c * 4 * c + 2 * 2 * n * n * c + 2 * 2 * n * c * 2 * c
    assert stock.flops == 2 * (2 * SIDE * SIDE * 48 * c + LAYERS * layer + 2 * c * 16)
    with tr.patched(model, Halve()), tr.record(model) as trace:
        model(x)
    k = 1 + SIDE * SIDE // 2
    less = 2 * k * c * 4 * c + 2 * 2 * k * k * c + 2 * 2 * k * c * 2 * c
    half = 2 * n * c * 4 * c + 2 * 2 * n * n * c + 2 * 2 * k * c * 2 * c
    assert trace.flops == 2 * (2 * SIDE * SIDE * 48 * c + layer + half + 2 * less + 2 * c * 16)


# -- refusals --------------------------------------------------------------------------------------------------------
class OwnAttention(nn.MultiheadAttention):
    pass


class OwnBlock(ResidualAttentionBlock):
    pass


def _swapped(what: str):
    model = vit(layers=2)
    block = model.transformer.resblocks[1]
    if what == "subclass":
        block.attn = OwnAttention(32, 2, batch_first=True)
    elif what == "bias":
        block.attn = nn.MultiheadAttention(32, 2, batch_first=True, add_bias_kv=True)
    elif what == "block":
        model.transformer.resblocks[1] = OwnBlock(32, 2)
    elif what == "pooler":
        model.attn_pool, model.attn_pool_contrastive = nn.Identity(), None
    return model


def _sequence_first():
    model = vit(layers=2)
    model.transformer = Transformer(32, 2, 2, 2.0, batch_first=False)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (functools.partial(vit, scaled_cosine_attn=True), "scaled_cosine_attn"),
        (_sequence_first, "batch_first=True"),
        (functools.partial(_swapped, "subclass"), "OwnAttention.*supported: MultiheadAttention"),
        (functools.partial(_swapped, "bias"), "add_bias_kv"),
        (functools.partial(_swapped, "block"), "OwnBlock.*ResidualAttentionBlock"),
        (functools.partial(_swapped, "pooler"), "Identity.*AttentionalPooler"),
    ],
)
def test_what_cannot_be_served_is_refused_and_left_as_it_was(build, message):
    model = build()
    kinds, before = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    with pytest.raises(TypeError, match=message):
        tr.patch(model, ToMe(r=3))
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == before


@pytest.mark.parametrize("settings", [{}, dict(qk_norm=True)])
def test_masks_are_refused(settings):
    model = tr.patch(vit(**settings), ToMe(r=3))
    with pytest.raises(ValueError, match="unpatch"):
        model.transformer(model._embeds(images()), attn_mask=torch.zeros(TOKENS, TOKENS))


def test_a_resnet_has_no_adapter():
    with pytest.raises(TypeError, match="no adapter"):
        tr.patch(clip(layers=[1, 1, 1, 1], image_size=64), ToMe(r=3))
