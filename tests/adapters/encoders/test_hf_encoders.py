"""transformers encoders: exactness against stock models, for every family."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers.models.idefics3 import modeling_idefics3 as idefics3  # noqa: E402
from transformers.models.smolvlm import modeling_smolvlm as smolvlm  # noqa: E402

import tokenreduce as tr  # noqa: E402
from tokenreduce.adapters.encoders.block import Reduced  # noqa: E402
from tokenreduce.core.evidence import Evidence  # noqa: E402
from tokenreduce.core.plan import Identity, Plan, Prune  # noqa: E402
from tokenreduce.core.reducer import Reducer  # noqa: E402
from tokenreduce.vision.encoder.tome import ToMe  # noqa: E402

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
IMAGE = dict(image_size=32, patch_size=8)
MLP = dict(intermediate_size=48)
LABELS = dict(num_labels=5)
CLIP = dict(image_size=16, num_frames=8)  # with tubelets of 2x8x8, a clip is 4 x 2 x 2 of them
TEXT = dict(**SMALL, **MLP, vocab_size=50, max_position_embeddings=12)


def _siglip2_config() -> Any:
    return transformers.Siglip2VisionConfig(**SMALL, **MLP, patch_size=8, num_patches=16)


def _both(kind: str) -> Any:
    """A text-and-image config of CLIP, SigLIP or SigLIP2."""
    text = getattr(transformers, f"{kind}TextConfig")(**TEXT, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    size = dict(patch_size=8, num_patches=16) if kind == "Siglip2" else IMAGE
    vision = getattr(transformers, f"{kind}VisionConfig")(**SMALL, **MLP, **size)
    return getattr(transformers, f"{kind}Config")(text_config=text.to_dict(), vision_config=vision.to_dict(), **LABELS)


def _dino(kind: str, **more: Any) -> Any:
    extra = MLP if kind == "DINOv3ViT" else dict(mlp_ratio=2)
    return getattr(transformers, f"{kind}Config")(**SMALL, **IMAGE, **LABELS, **extra, **more)


def _internvl(**more: Any) -> nn.Module:
    return transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**SMALL, **MLP, **IMAGE, **more))


def _videomae(kind: str = "VideoMAEModel", **more: Any) -> nn.Module:
    config = transformers.VideoMAEConfig(**SMALL, **MLP, **CLIP, patch_size=8, tubelet_size=2, **more)
    return getattr(transformers, kind)(config)


def _vivit(kind: str = "VivitModel", **more: Any) -> nn.Module:
    return getattr(transformers, kind)(transformers.VivitConfig(**SMALL, **MLP, **CLIP, tubelet_size=[2, 8, 8], **more))


#: family -> a function that builds it; keyed by what the tests print
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, **MLP, **IMAGE)),
    "vit classifier": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, **MLP, **IMAGE, **LABELS)
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **MLP, **IMAGE)),
    "clip projection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**SMALL, **MLP, **IMAGE, projection_dim=6)
    ),
    "clip classifier": lambda: transformers.CLIPForImageClassification(_both("CLIP")),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **MLP, **IMAGE)),
    "siglip classifier": lambda: transformers.SiglipForImageClassification(_both("Siglip")),
    "siglip2": lambda: transformers.Siglip2VisionModel(_siglip2_config()),
    "siglip2 classifier": lambda: transformers.Siglip2ForImageClassification(_both("Siglip2")),
    "dinov2": lambda: transformers.Dinov2Model(_dino("Dinov2", drop_path_rate=0.1)),
    "dinov2 swiglu": lambda: transformers.Dinov2Model(_dino("Dinov2", use_swiglu_ffn=True)),
    "dinov2 classifier": lambda: transformers.Dinov2ForImageClassification(_dino("Dinov2")),
    "dinov2 registers": lambda: transformers.Dinov2WithRegistersModel(
        _dino("Dinov2WithRegisters", num_register_tokens=2)
    ),
    "dinov2 registers classifier": lambda: transformers.Dinov2WithRegistersForImageClassification(
        _dino("Dinov2WithRegisters", num_register_tokens=2)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(_dino("DINOv3ViT", num_register_tokens=2)),
    "internvl": lambda: _internvl(),
    "internvl qk norm": lambda: _internvl(use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False),
    "idefics3": lambda: idefics3.Idefics3VisionTransformer(idefics3.Idefics3VisionConfig(**SMALL, **MLP, **IMAGE)),
    "smolvlm": lambda: smolvlm.SmolVLMVisionTransformer(smolvlm.SmolVLMVisionConfig(**SMALL, **MLP, **IMAGE)),
    "videomae": lambda: _videomae(),
    "videomae normed": lambda: _videomae(use_mean_pooling=False),
    "videomae classifier": lambda: _videomae("VideoMAEForVideoClassification", **LABELS),
    "vivit": lambda: _vivit(),
    "vivit classifier": lambda: _vivit("VivitForVideoClassification", **LABELS),
}
VIDEO = ("videomae", "vivit")
TOWERS = (
    "vit", "clip", "siglip", "siglip2", "dinov2", "dinov2 registers", "dinov3", "internvl", "internvl qk norm",
    "idefics3", "smolvlm", "videomae", "vivit",
)  # fmt: skip
PREFIX = {
    "vit": 1, "clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2 registers": 3, "dinov3": 3, "internvl": 1,
    "internvl qk norm": 1, "idefics3": 0, "smolvlm": 0, "videomae": 0, "vivit": 1,
}  # fmt: skip


def prefix_of(name: str) -> int:
    return next(PREFIX[key] for key in sorted(PREFIX, key=len, reverse=True) if name.startswith(key))


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights wide enough that attention is far from uniform: small mistakes must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    return model.eval()


def build(name: str, attention: str = "sdpa") -> nn.Module:
    model = spread(MODELS[name]())
    model.set_attn_implementation(attention)
    return model


def inputs(name: str, batch: int = 2, seed: int = 1, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name.startswith(VIDEO):
        return {"pixel_values": torch.randn(batch, 8, 3, 16, 16, generator=generator)}
    if not name.startswith("siglip2"):
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    shapes = [(4, 4), (3, 4)] if padded else [(4, 4), (2, 8)]
    mask = torch.zeros(batch, 16, dtype=torch.long)
    for row in range(batch):
        mask[row, : shapes[row % 2][0] * shapes[row % 2][1]] = 1
    return {
        "pixel_values": torch.randn(batch, 16, 192, generator=generator),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([shapes[row % 2] for row in range(batch)]),
    }


def tensors(output: Any) -> dict[str, Tensor]:
    return {k: v for k, v in output.items() if isinstance(v, Tensor)}


def feature(output: Any) -> Tensor:
    """What a tower is for: its pooled image, or its tokens where it pools none."""
    pooled = output.get("pooler_output")
    return output.last_hidden_state if pooled is None else pooled


def tower_of(model: nn.Module) -> Any:
    for name in ("vit", "vision_model", "dinov2", "dinov2_with_registers", "videomae", "vivit"):
        if hasattr(model, name):
            return getattr(model, name)
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    tower = tower_of(model)
    if hasattr(tower, "layers"):
        return tower.layers
    inner = tower.encoder if hasattr(tower, "encoder") else tower.model
    return inner.layers if hasattr(inner, "layers") else inner.layer


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-4) -> None:
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


# -- reducers for tests (without a name they are not registered) -------------------------------------------------------
@dataclass(frozen=True)
class Everything(Reducer, needs=("keys", "queries", "values", "attention", "before")):
    """Looks at everything and keeps everything."""

    place: str = "middle"

    def acting_position(self) -> str:
        return self.place

    def required(self) -> tuple[str, ...]:
        return tuple(n for n in self.needs if n != "before" or self.place != "before")

    def plan(self, evidence: Evidence) -> Plan:
        assert evidence.attention("all").shape[-1] == evidence.n == evidence.keys.shape[2] == evidence.values.shape[2]
        return Identity.like(evidence.x)


@dataclass(frozen=True)
class Drop(Reducer):
    """Keeps the patches at ``keep`` in one layer, others in the second sample."""

    keep: tuple[int, ...] = (0, 2, 3, 5, 7, 8)
    layer: int = 1
    place: str = "middle"

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer == self.layer

    def acting_position(self) -> str:
        return self.place

    def plan(self, evidence: Evidence) -> Plan:
        p, rows = evidence.prefix, []
        for row in range(evidence.batch):
            rows.append([*range(p), *(p + k + row for k in self.keep)])
        return Prune(evidence.n, torch.tensor(rows))


@dataclass(frozen=True)
class DropMap(Drop, needs=("attention",)):
    """Drops before the layer and hands the attention map on."""

    place: str = "before"
    forwards_attention = True


# -- the reference: stock layers on all N tokens, merged tokens being copies of each other -----------------------------
def part(attn: Any, name: str) -> nn.Module:
    """A projection ("query", "key", "value", "output") under the names of all supported releases."""
    short = {
        "query": ("q_proj",),
        "key": ("k_proj",),
        "value": ("v_proj",),
        "output": ("o_proj", "out_proj", "projection_layer"),
    }[name]
    core = getattr(attn, "attention", attn) if name != "output" else attn
    found = next((getattr(core, n) for n in short if hasattr(core, n)), None)
    return found or (core.output.dense if name == "output" else getattr(core, name))


def projection(attn: Any, name: str) -> Any:
    """Queries, keys or values of features, normalised where the family does."""
    norm = getattr(attn, {"query": "q_norm", "key": "k_norm"}.get(name, ""), None)
    return part(attn, name) if norm is None else nn.Sequential(part(attn, name), norm)


def attention_of(layer: Any) -> Any:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def first_norm(layer: Any) -> nn.Module:
    return next(getattr(layer, n) for n in ("layer_norm1", "layernorm_before", "norm1") if hasattr(layer, n))


def split(x: Tensor, projection: nn.Module) -> Tensor:
    return projection(x).unflatten(-1, (4, 8)).transpose(-2, -3)


def attend(layer: Any, x: Tensor, mask: Tensor | None, tables: Any) -> Tensor:
    """A plain attention branch, norm included; ``mask`` is bool or additive."""
    attn, y = attention_of(layer), first_norm(layer)(x)
    q, k, v = (split(y, projection(attn, n)) for n in ("query", "key", "value"))
    if tables is not None:
        cos, sin = tables
        n = cos.shape[-2]

        def turn(t: Tensor) -> Tensor:
            half = torch.cat([-t[..., 4:], t[..., :4]], -1)[..., -n:, :]
            return torch.cat([t[..., :-n, :], t[..., -n:, :] * cos + half * sin], -2)

        q, k = turn(q), turn(k)
    logits = q @ k.transpose(-1, -2) / 8**0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    out = part(attn, "output")((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return scaled(layer, 1, out)


def scaled(layer: Any, half: int, out: Tensor) -> Tensor:
    """The output of the attention (1) or MLP half (2) behind its layer scale."""
    if hasattr(layer, f"lambda_{half}"):
        return getattr(layer, f"lambda_{half}") * out
    return getattr(layer, f"layer_scale{half}")(out) if hasattr(layer, "layer_scale1") else out


def feed(layer: Any, x: Tensor) -> Tensor:
    """A stock layer's MLP half, residual included (evaluation mode)."""
    norm = next(getattr(layer, n) for n in ("layer_norm2", "layernorm_after", "norm2") if hasattr(layer, n))
    if hasattr(layer, "intermediate"):
        return x + layer.output.dense(layer.intermediate(norm(x)))
    return x + scaled(layer, 2, layer.mlp(norm(x)))


class Copies:
    """A stock layer's forward on all N tokens: members of a group share their mean, dropped tokens are no keys."""

    def __init__(self, layer: nn.Module, before: Plan | None, after: Plan | None, prefix: int) -> None:
        self.layer, self.before, self.after, self.prefix = layer, before, after, prefix

    def __call__(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        tables = kwargs.get("position_embeddings")
        if self.before is not None:
            source = self.before.sources()
            dropped = torch.where(source < 0, float("-inf"), 0.0)[:, None, None]
            if bool((source < 0).any()):
                if attention_mask is not None and attention_mask.dtype == torch.bool:
                    attention_mask = torch.where(attention_mask, 0.0, float("-inf"))
                attention_mask = dropped if attention_mask is None else attention_mask + dropped
            if tables is not None:
                leader = self.before.representatives().gather(1, source.clamp(min=0))[:, self.prefix :] - self.prefix
                tables = tuple(t[leader].unsqueeze(1) for t in tables)
        x = x + attend(self.layer, x, attention_mask, tables)
        if self.after is not None:
            source, mixed = self.after.sources(), x.clone()
            for row in range(x.shape[0]):
                for group in source[row].unique().tolist():
                    if group >= 0:
                        members = source[row] == group
                        mixed[row, members] = x[row, members].mean(0)
            x = mixed
        return feed(self.layer, x)


def reference(model: nn.Module, steps: list[Any], prefix: int) -> nn.Module:
    """A stock copy of ``model`` whose layers treat merged tokens as copies, by the plans of a recorded forward."""
    stock = copy.deepcopy(model)
    layers, composed = layers_of(stock), None
    for i, step in enumerate(steps):
        after = composed
        if step.plan is not None:
            after = step.plan if composed is None else composed.then(step.plan)
        layers[i].forward = Copies(layers[i], composed, after, prefix)  # type: ignore[method-assign]
        composed = after
    return stock


def merged(name: str, reducer: Reducer, attention: str = "sdpa", **how: Any) -> tuple[Any, Any, Any]:
    """Outputs of the patched model and of the reference, and the trace."""
    model, given = build(name, attention), inputs(name, **how)
    plain = copy.deepcopy(model)
    tr.patch(model, reducer)
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        got = model(**given)
    stock = reference(plain, trace.steps, prefix_of(name))
    with torch.no_grad():
        want = stock(**given)
    return got, want, trace


# -- keep everything, and taking it back -------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_keep_everything_is_bit_identical(name: str, attention: str) -> None:
    model, given = build(name, attention), inputs(name)
    with torch.no_grad():
        want = tensors(model(**given))
        for reducer in (ToMe(r=0), Everything(), Everything("before"), Everything("after")):
            with tr.patched(model, reducer):
                got = tensors(model(**given))
            assert got.keys() == want.keys()
            assert all(torch.equal(got[k], want[k]) for k in want), (reducer, name)


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        name: (type(m), {k: id(v) for k, v in vars(m).items() if not k.startswith("_")}, set(vars(m)),
               [len(vars(m)[h]) for h in hooks])
        for name, m in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_reduction_acts_and_is_taken_back(name: str) -> None:
    model, given = build(name), inputs(name)
    prefix = prefix_of(name)
    with torch.no_grad():
        want, keys, before = tensors(model(**given)), list(model.state_dict()), snapshot(model)
        config = copy.deepcopy(model.config.to_dict())
        tr.patch(model, ToMe(r=3))
        assert list(model.state_dict()) == keys
        assert model.config.to_dict() == config
        with tr.record(model) as trace:
            got = tensors(model(**given))
        assert trace.tokens == [prefix + n for n in (13, 10, 7)]
        assert trace.flops > 0
        tr.unpatch(model)
        again = tensors(model(**given))
    assert not any(isinstance(m, Reduced) for m in model.modules())
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    for key in want:
        assert torch.equal(again[key], want[key])
        assert not torch.equal(got[key], want[key]) if got[key].shape == want[key].shape else key == "last_hidden_state"
        assert torch.isfinite(got[key]).all()
        if key != "last_hidden_state":
            assert got[key].shape == want[key].shape


def test_models_that_share_a_config_do_not_meet() -> None:
    config = transformers.CLIPVisionConfig(**SMALL, **MLP, **IMAGE)
    one, two = spread(transformers.CLIPVisionModel(config)), spread(transformers.CLIPVisionModel(config))
    given = inputs("clip")
    with torch.no_grad():
        want = tensors(two(**given))
        tr.patch(one, ToMe(r=3))
        one(**given)
        got = tensors(two(**given))
    assert one.config is two.config
    assert config._attn_implementation == "sdpa"
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert not any(isinstance(m, Reduced) for m in two.modules())
    assert layers_of(two)[0].self_attn.config is config
    tr.unpatch(one)
    assert layers_of(one)[0].self_attn.config is config


# -- exactness ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_tokens_equal_copies(name: str, attention: str) -> None:
    """Proportional attention over merged tokens, through every layer, head and mean, equals attention over copies."""
    got, want, trace = merged(name, ToMe(r=3), attention)
    got, want = tensors(got), tensors(want)
    if "last_hidden_state" in got:
        got["last_hidden_state"] = trace.plan.expand(got["last_hidden_state"])
    if name.startswith("siglip2"):  # what a padded slot holds means nothing
        there = inputs(name)["pixel_attention_mask"].bool()
        for out in (got, want):
            if "last_hidden_state" in out:
                out["last_hidden_state"] = out["last_hidden_state"][there]
    close(got, want)


@pytest.mark.parametrize("name", TOWERS)
def test_dropping_equals_masking(name: str) -> None:
    """Tokens dropped in a layer are those that nobody attends to from the next layer on."""
    got, want, trace = merged(name, Drop())
    kept = trace.plan.representatives()
    left = want.last_hidden_state.gather(1, kept[..., None].expand(-1, -1, 32))
    there = slice(None) if name != "siglip2" else inputs(name)["pixel_attention_mask"].bool().gather(1, kept)
    torch.testing.assert_close(got.last_hidden_state[there], left[there], rtol=2e-4, atol=2e-4)
    assert trace.tokens == [PREFIX[name] + n for n in (16, 6, 6)]
    if PREFIX[name] and "pooler_output" in got:
        close({"pooled": got.pooler_output}, {"pooled": want.pooler_output})


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_attention_pooling_sees_only_kept_tokens(name: str) -> None:
    got, want, trace = merged(name, Drop())
    head, kept = build(name).head, trace.plan.representatives()
    with torch.no_grad():
        for row in range(2):
            there = kept[row]
            if name == "siglip2":
                there = there[inputs(name)["pixel_attention_mask"][row, there].bool()]
            alone = head(want.last_hidden_state[row : row + 1, there])
            torch.testing.assert_close(got.pooler_output[row : row + 1], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", [n for n in MODELS if n.endswith("classifier") and n[:3] not in ("vit", "viv")])
def test_mean_pooling_counts_only_kept_tokens(name: str) -> None:
    model, given, p = build(name), inputs(name), prefix_of(name)
    plain, tower = copy.deepcopy(model), tower_of(model)
    tr.patch(model, Drop())
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        got, direct = model(**given).logits, tower(**given).last_hidden_state
        stock = reference(plain, trace.steps[:3], p)
        full, kept = tower_of(stock)(**given).last_hidden_state, trace.steps[1].plan.representatives()
        for row in range(2):
            there = kept[row, p:]
            if name.startswith("siglip2"):
                there = there[given["pixel_attention_mask"][row, there].bool()]
            mean = full[row, there].mean(0)
            features = torch.cat([full[row, 0], mean]) if "dinov2" in name else mean
            features = plain.fc_norm(features) if name.startswith("videomae") else features
            torch.testing.assert_close(got[row], plain.classifier(features), rtol=2e-4, atol=2e-4)
    assert direct.shape[1] == p + 6  # the tower on its own returns what is left


def test_siglip2_without_padding() -> None:
    got, want, trace = merged("siglip2", ToMe(r=3), padded=False)
    close({"pooled": got.pooler_output}, {"pooled": want.pooler_output})
    torch.testing.assert_close(trace.plan.expand(got.last_hidden_state), want.last_hidden_state, rtol=2e-4, atol=2e-4)


def test_siglip2_padding_is_never_matched_nor_counted() -> None:
    """A padded image gives what it gives alone, without padding: also when padded slots hold something else."""
    model, given = build("siglip2"), inputs("siglip2")
    alone = {k: v[1:] for k, v in given.items()}
    alone = {**alone, **{k: alone[k][:, :12] for k in ("pixel_values", "pixel_attention_mask")}}
    noisy = {**given, "pixel_values": given["pixel_values"].clone()}
    noisy["pixel_values"][1, 12:] = 100.0
    tr.patch(model, ToMe(r=[2, 2, 0]))
    with torch.no_grad():
        pooled = [model(**g).pooler_output[-1] for g in (given, alone, noisy)]
    torch.testing.assert_close(pooled[0], pooled[1], rtol=2e-4, atol=2e-4)
    assert torch.equal(pooled[0], pooled[2])


def test_siglip2_small_image_beside_a_large_one() -> None:
    """More merges than an image has patches must not lose its last one."""
    model, given = build("siglip2"), inputs("siglip2")
    given["pixel_attention_mask"][1] = 0
    given["pixel_attention_mask"][1, :3] = 1
    given["spatial_shapes"][1] = torch.tensor([1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tr.patch(model, ToMe(r=8))
        with torch.no_grad():
            got = model(**given)
            alone = model(**{k: v[1:] for k, v in given.items()})
    assert torch.isfinite(got.pooler_output).all()
    torch.testing.assert_close(got.pooler_output[1:], alone.pooler_output, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_padded_tiles(name: str, attention: str) -> None:
    """Hidden patches are neither keys nor matched, whatever they hold; patches that are there equal copies."""
    model, given = build(name, attention), inputs(name)
    given["patch_attention_mask"] = torch.ones(2, 4, 4, dtype=torch.bool)
    given["patch_attention_mask"][1, :, 3] = False
    noisy = {**given, "pixel_values": given["pixel_values"].clone()}
    noisy["pixel_values"][1, :, :, 24:] += 5.0
    plain, there = copy.deepcopy(model), given["patch_attention_mask"].flatten(1)
    tr.patch(model, ToMe(r=3))
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        got = model(**given).last_hidden_state
    with torch.no_grad():
        other = model(**noisy).last_hidden_state
        want = reference(plain, trace.steps, 0)(**given).last_hidden_state
    plan = trace.plan
    torch.testing.assert_close(plan.expand(got)[there], want[there], rtol=2e-4, atol=2e-4)
    assert torch.equal(plan.expand(got)[there], plan.expand(other)[there])
    shared = plan.sources().masked_fill(there, -1)[1]
    assert not torch.isin(shared[shared >= 0], plan.sources()[1][there[1]]).any()


def test_vit_attention_mask() -> None:
    """ViT takes a mask over its tokens: masked ones are neither keys nor matched."""
    model, given = build("vit"), inputs("vit")
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 14:] = 0
    changed = {"pixel_values": given["pixel_values"].clone()}
    changed["pixel_values"][0, :, 24:, 16:] += 5.0  # patches 14 and 15, tokens 15 and 16
    tr.patch(model, ToMe(r=3))
    with torch.no_grad():
        one = model(**given, attention_mask=mask).pooler_output
        two = model(**changed, attention_mask=mask).pooler_output
        free = model(**changed).pooler_output
        assert torch.equal(one[0], two[0])
        assert not torch.equal(one[0], free[0])
        with pytest.raises(ValueError, match="attention_mask of shape"):
            model(**given, attention_mask=torch.zeros(2, 1, 17, 17))


# -- evidence ----------------------------------------------------------------------------------------------------------
SEEN: list[Evidence] = []


@dataclass(frozen=True)
class Witness(Everything):
    def plan(self, evidence: Evidence) -> Plan:
        SEEN.append(evidence)
        return Identity.like(evidence.x)


@pytest.mark.parametrize("place", ["middle", "before"])
@pytest.mark.parametrize("name", TOWERS)
def test_evidence_is_what_the_layer_computed(name: str, place: str) -> None:
    """Keys come from the key projection (before RoPE), attention rows equal the eager weights of the model."""
    model, given = build(name, "eager"), inputs(name)
    SEEN.clear()
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions if name != "siglip2" else None
        with tr.patched(model, Witness(place)):
            model(**given)
    for i, layer in enumerate(layers_of(model)):
        evidence = SEEN[i]
        attn, x = attention_of(layer), evidence.x if place == "before" else evidence.before
        with torch.no_grad():
            keys, values = (split(first_norm(layer)(x), projection(attn, n)) for n in ("key", "value"))
        assert torch.equal(evidence.keys, keys)
        assert torch.equal(evidence.values, values)
        assert evidence.prefix == PREFIX[name]
        assert evidence.grid == (None if name == "siglip2" else (4, 2, 2) if name in VIDEO else (4, 4))
        if weights is not None and weights:
            torch.testing.assert_close(evidence.attention("all"), weights[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["vit", "siglip", "dinov2 registers", "dinov3", "internvl qk norm", "idefics3", *VIDEO]
)
def test_given_attention_map(name: str) -> None:
    """A method before the layer may hand its reduced map on: the layer then uses it instead of computing one."""
    model, given = build(name, "eager"), inputs(name)
    seen: dict[str, Tensor] = {}
    layers = layers_of(model)
    hook = layers[1].register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions[1]
        hook.remove()
        keep = Drop().plan(Evidence(seen["x"], protected=PREFIX[name])).representatives()
        wanted = []
        for row in range(2):
            x, chosen = seen["x"][row, keep[row]], weights[row][:, keep[row]][..., keep[row]]
            attn = attention_of(layers[1])
            values = part(attn, "value")(first_norm(layers[1])(x))
            heads = [chosen[h] @ values[:, 8 * h : 8 * h + 8] for h in range(4)]
            out = part(attn, "output")(torch.cat(heads, -1))
            wanted.append(feed(layers[1], (x + scaled(layers[1], 1, out))[None])[0])
        tr.patch(model, DropMap())
        outs: list[Tensor] = []
        layers[1].register_forward_hook(lambda m, args, out: outs.append(out))
        model(**given)
    torch.testing.assert_close(outs[0], torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["before", "after"])
def test_plans_before_and_after_a_layer(place: str) -> None:
    """Dropping after layer 0 is dropping before layer 1."""
    model, given = build("dinov3"), inputs("dinov3")
    with torch.no_grad():
        with tr.patched(model, Drop(layer=1 if place == "before" else 0, place=place)):
            got = model(**given).last_hidden_state
        plain = copy.deepcopy(model)
        with tr.patched(model, Drop(layer=0, place="after")), tr.record(model, flops=False) as trace:
            model(**given)
        kept = trace.plan.representatives()
        want = reference(plain, trace.steps, 3)(**given).last_hidden_state
    torch.testing.assert_close(got, want.gather(1, kept[..., None].expand(-1, -1, 32)), rtol=2e-4, atol=2e-4)


# -- models with text --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Siglip2"])
def test_text_tower_is_untouched(kind: str) -> None:
    model = spread(getattr(transformers, f"{kind}Model")(_both(kind)))
    given = inputs(kind.lower())
    ids = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
    with torch.no_grad():
        want = model(input_ids=ids, **given)
        text = snapshot(model.text_model)
        tr.patch(model, ToMe(r=3))
        with tr.record(model, flops=False) as trace:
            got = model(input_ids=ids, **given)
        assert snapshot(model.text_model) == text
        tr.unpatch(model)
        back = model(input_ids=ids, **given)
    assert torch.equal(got.text_embeds, want.text_embeds)
    assert not torch.equal(got.image_embeds, want.image_embeds)
    assert got.logits_per_image.shape == want.logits_per_image.shape
    assert torch.equal(back.logits_per_image, want.logits_per_image)
    assert len(trace.tokens) == 3
    assert tr.describe(model).towers[0].name == "vision_model"


# -- dense outputs -----------------------------------------------------------------------------------------------------
BACKBONES = [
    ("Dinov2", dict()),
    ("Dinov2", dict(apply_layernorm=False)),
    ("Dinov2", dict(reshape_hidden_states=False)),
    ("Dinov2WithRegisters", dict(num_register_tokens=2)),
    ("DINOv3ViT", dict(num_register_tokens=2)),
    ("DINOv3ViT", dict(num_register_tokens=2, apply_layernorm=False)),
    ("DINOv3ViT", dict(num_register_tokens=2, return_class_token=True)),
]


@pytest.mark.parametrize(("kind", "more"), BACKBONES)
def test_backbones_give_full_grids(kind: str, more: dict[str, Any]) -> None:
    """Feature maps equal those of the reference, whose merged tokens are copies; dropped tokens are zero."""
    config = _dino(kind, out_features=["stem", "stage1", "stage2", "stage3"], **more)
    model, given = spread(getattr(transformers, f"{kind}Backbone")(config)), inputs("dino")
    prefix = 1 + more.get("num_register_tokens", 0)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**given)
        with tr.patched(model, Everything()):
            same = model(**given)
        assert all(torch.equal(a, b) for a, b in zip(same.feature_maps, want.feature_maps, strict=True))
        with tr.patched(model, ToMe(r=3)), tr.record(model, flops=False) as trace:
            got = model(**given)
        want = reference(plain, trace.steps, prefix)(**given)
        assert trace.tokens == [prefix + n for n in (13, 10, 7)]
        for a, b in zip(got.feature_maps, want.feature_maps, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
        if more.get("return_class_token"):
            for a, b in zip(got.cls_tokens, want.cls_tokens, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
        with tr.patched(model, Drop()), tr.record(model, flops=False) as trace:
            got = model(**given)
        want = reference(plain, trace.steps, prefix)(**given)
    kept = (trace.plan.sources() >= 0)[:, prefix:]
    a, b = got.feature_maps[-1], want.feature_maps[-1]
    a, b = (t.flatten(2).transpose(1, 2) if t.dim() == 4 else t[:, -16:] for t in (a, b))
    assert (a[~kept] == 0).all()
    torch.testing.assert_close(a[kept], b[kept], rtol=2e-4, atol=2e-4)


def test_masked_image_modelling_gets_its_grid_back() -> None:
    config = transformers.ViTConfig(**SMALL, **MLP, **IMAGE, encoder_stride=8)
    model, given = spread(transformers.ViTForMaskedImageModeling(config)), inputs("vit")
    plain = copy.deepcopy(model)
    given["bool_masked_pos"] = torch.arange(16).expand(2, -1) % 3 == 0
    with torch.no_grad():
        with tr.patched(model, ToMe(r=3)), tr.record(model, flops=False) as trace:
            got = model(**given)
        want = reference(plain, trace.steps, 1)(**given)
    torch.testing.assert_close(got.reconstruction, want.reconstruction, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-4, atol=2e-4)


def test_masked_video_modelling_gets_its_visible_tubelets_back() -> None:
    """The decoder needs a token at the place of every visible tubelet, and the tower sees those alone."""
    model, given = spread(_videomae("VideoMAEForPreTraining", decoder_num_attention_heads=4)), inputs("videomae")
    plain = copy.deepcopy(model)
    given["bool_masked_pos"] = torch.arange(16).expand(2, -1) % 4 == 1
    with torch.no_grad():
        want = model(**given).logits
        with tr.patched(model, ToMe(r=3)), tr.record(model, flops=False) as trace:
            got = model(**given)
        assert trace.tokens == [9, 6, 3]
        assert not torch.equal(got.logits, want)
        assert torch.equal(model(**given).logits, want)
        want = reference(plain, trace.steps, 0)(**given)
    torch.testing.assert_close(got.logits, want.logits, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-4, atol=2e-4)


def test_recorded_hidden_states_become_ragged() -> None:
    for name in ("clip", "vit", "dinov2", "videomae", "vivit"):
        model, given, p = build(name), inputs(name), PREFIX[name]
        tr.patch(model, ToMe(r=3))
        with torch.no_grad():
            states = model(**given, output_hidden_states=True).hidden_states
        assert [h.shape[1] for h in states] == [p + n for n in (16, 13, 10, 7)]


@pytest.mark.parametrize("name", ["vit", "videomae"])
def test_attention_weights_are_recorded_under_eager(name: str) -> None:
    model, given, p = build(name, "eager"), inputs(name), PREFIX[name]
    tr.patch(model, ToMe(r=3))
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions
    assert [w.shape[-2:] for w in weights] == [(p + n, p + n) for n in (16, 13, 10)]


# -- attention implementations -----------------------------------------------------------------------------------------
def test_switching_the_implementation_of_a_patched_model() -> None:
    model, given = build("clip"), inputs("clip")
    tr.patch(model, ToMe(r=3))
    with torch.no_grad():
        one = model(**given).pooler_output
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
        two = model(**given, output_attentions=True)
    assert len(two.attentions) == 3
    torch.testing.assert_close(one, two.pooler_output, rtol=2e-4, atol=2e-4)


def test_kernels_without_masks_are_used_until_sizes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes no bias: it runs as long as none is needed, then sdpa does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls: list[int] = []

    def flashy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        assert mask is None
        calls.append(q.shape[2])
        return sdpa_attention_forward(module, q, k, v, None, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flashy", flashy)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flashy", lambda *args, **kwargs: None)
    model, given = build("clip"), inputs("clip")
    with torch.no_grad():
        with tr.patched(model, ToMe(r=3)):
            want = model(**given).pooler_output
        model.config._attn_implementation_internal = "flashy"
        with tr.patched(model, ToMe(r=3)):
            got = model(**given).pooler_output
        assert calls == [17]
        assert torch.equal(got, want)
        with tr.patched(model, ToMe(r=3, prop_attn=False)):
            model(**given)
    assert calls == [17, 17, 14, 11]


# -- training, copies, threads, compile, dtypes ------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_and_checkpointing(name: str) -> None:
    model, given = build(name), inputs(name)
    for module in model.modules():
        if type(module).__name__ == "Dinov2DropPath":
            module.drop_prob = 0.0  # replay draws the same numbers, but two runs do not
    tr.patch(model, ToMe(r=3))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.zero_grad()
        with tr.record(model, flops=False) as trace:
            torch.manual_seed(0)  # DINOv3 augments its rotary tables in training
            feature(model(**given)).square().sum().backward()
        assert len(trace.steps) == 3
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])
    assert any(("k_proj" in k or ".key." in k) and grads[0][k].abs().max() > 0 for k in grads[0])


@pytest.mark.parametrize("name", [*TOWERS, "siglip2 classifier", "dinov2 classifier"])
def test_copies_and_pickles(name: str) -> None:
    model, given = build(name), inputs(name)
    with torch.no_grad():
        plain = tensors(model(**given))
        tr.patch(model, ToMe(r=3))
        want = tensors(model(**given))
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for parameter in model.parameters():
            parameter.zero_()
        for twin in twins:
            got = tensors(twin(**given))
            assert all(torch.equal(got[k], want[k]) for k in want)
            tr.unpatch(twin)
            got = tensors(twin(**given))
            assert all(torch.equal(got[k], plain[k]) for k in plain)


@pytest.mark.parametrize("name", ["clip", "siglip2", "dinov2 classifier"])
def test_threads(name: str) -> None:
    model = build(name)
    tr.patch(model, ToMe(r=3))
    work = [inputs(name, seed=s) for s in range(3)]
    with torch.no_grad():
        want = [tensors(model(**g)) for g in work]
    wrong: list[str] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                got = tensors(model(**work[i]))
                wrong.extend(f"{i} {k}" for k in got if not torch.equal(got[k], want[i][k]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip2 classifier", "dinov2 classifier", "dinov3", "internvl", *VIDEO])
def test_compile(name: str) -> None:
    model, given = build(name), inputs(name)
    layers_of(model).pop(-1)  # two layers are enough, and compile faster
    tr.patch(model, ToMe(r=3))
    with torch.no_grad():
        want = tensors(model(**given))
        torch._dynamo.reset()
        got = tensors(torch.compile(model, fullgraph=True, backend="aot_eager")(**given))
    close(got, want, 1e-5)


@pytest.mark.parametrize("spec", ["uniform:keep=0.5", "mustdrop-merge"])
def test_a_compiled_siglip2_refuses_methods_on_a_grid(spec: str) -> None:
    """Its shapes are data; without the grid other tokens would be chosen than in eager mode."""
    name = next(n for n in TOWERS if "siglip2" in n)
    model, given = build(name), inputs(name)
    tr.patch(model, spec)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="lays tokens out on the grid of the image"):
        torch.compile(model, fullgraph=True, backend="eager")(**given)


@pytest.mark.parametrize("name", TOWERS)
def test_half_precision(name: str) -> None:
    model, given = build(name), inputs(name)
    tr.patch(model, ToMe(r=3))
    with torch.no_grad():
        want = feature(model(**given))
        with torch.autocast("cpu", torch.bfloat16):
            cast = feature(model(**given))
        for dtype in (torch.bfloat16, torch.float16):
            lower = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
            got = feature(model.to(dtype)(**lower))
            assert got.dtype == dtype
            assert torch.isfinite(got).all()
    if want.dim() == 3:  # which tokens merge may differ
        want, cast = want.mean(1), cast.mean(1)
    assert (cast.float() - want).norm() < 0.2 * want.norm()


# -- resizing ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shrink(Reducer, position="input"):
    side: int = 3

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return (min(self.side, grid[0]), min(2, grid[1])) if self.side < 4 else grid


@pytest.mark.parametrize("name", [t for t in TOWERS if t != "siglip2" and t not in VIDEO])
def test_resize_equals_a_smaller_image(name: str) -> None:
    model, given = build(name), inputs(name)
    small = torch.nn.functional.interpolate(
        given["pixel_values"], size=(24, 16), mode="bicubic", align_corners=False, antialias=True
    )
    flag = {} if name.startswith(("dino", "internvl", "idefics3", "smolvlm")) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        full, want = feature(model(**given)), feature(model(pixel_values=small, **flag))
        with tr.patched(model, Shrink()), tr.record(model, flops=False) as trace:
            got = feature(model(**given))
        with tr.patched(model, Shrink(4)):
            same = feature(model(**given))
    assert torch.equal(got, want)
    assert torch.equal(same, full)
    assert trace.tokens == [PREFIX[name] + 6] * 3


def test_masks_of_tiles_are_resized() -> None:
    """4x4 patches to 3x2: a patch is there when any part of it is."""
    model, given = build("idefics3"), inputs("idefics3")
    mask, less = torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(2, 3, 2, dtype=torch.bool)
    small = torch.nn.functional.interpolate(
        given["pixel_values"], size=(24, 16), mode="bicubic", align_corners=False, antialias=True
    )
    with torch.no_grad():
        for columns, left in ((4, 2), (3, 2), (2, 1)):
            mask[1, :, columns:], less[1, :, left:] = False, False
            want = model(small, less).last_hidden_state
            with tr.patched(model, Shrink()):
                assert torch.equal(model(**given, patch_attention_mask=mask).last_hidden_state, want)
                assert torch.equal(model(given["pixel_values"], mask).last_hidden_state, want)


def test_resize_refuses_what_cannot_shrink() -> None:
    with pytest.raises(ValueError, match="max_num_patches"):
        tr.patch(build("siglip2"), Shrink())
    with pytest.raises(ValueError, match="full grid"):
        tr.patch(transformers.Dinov2Backbone(_dino("Dinov2")), Shrink())
    model = spread(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, **MLP, **IMAGE)))
    with pytest.raises(ValueError, match="full grid"):
        tr.patch(model, Shrink())
    for name in VIDEO:
        with pytest.raises(ValueError, match="full grid"):
            tr.patch(build(name), Shrink())
    model = transformers.Dinov2Model(_dino("Dinov2")).eval()
    tr.patch(model, Shrink())
    with pytest.raises(ValueError, match="bool_masked_pos"):
        model(**inputs("dinov2"), bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_unknown_attention_classes_are_refused() -> None:
    model = build("vit")

    class Other(type(layers_of(model)[1].attention)):  # type: ignore[misc]
        pass

    layers_of(model)[1].attention.__class__ = Other
    before = snapshot(model)
    with pytest.raises(TypeError, match="Other is not supported"):
        tr.patch(model, ToMe(r=1))
    assert snapshot(model) == before


def test_video_models_that_cannot_lose_tokens_are_refused() -> None:
    config = transformers.TimesformerConfig(**SMALL, **MLP, **CLIP, patch_size=8)
    for act in (tr.describe, lambda m: tr.patch(m, ToMe(r=1))):
        with pytest.raises(TypeError, match="time and over space"):
            act(transformers.TimesformerForVideoClassification(config))
    model = _videomae("VideoMAEForVideoClassification", use_mean_pooling=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="use_mean_pooling"):
        tr.patch(model, ToMe(r=1))
    assert snapshot(model) == before


def test_dispatched_layers_are_refused_and_left_alone() -> None:
    model = build("clip")
    layer = layers_of(model)[1]
    layer.forward = layer.forward
    before = snapshot(model)
    with pytest.raises(ValueError, match="before dispatching"):
        tr.patch(model, ToMe(r=1))
    assert snapshot(model) == before


def test_description() -> None:
    about = tr.describe(build("dinov3")).towers[0]
    assert (about.family, about.prefix, about.cls, about.grid, about.tokens) == (
        "transformers DINOv3",
        3,
        True,
        (4, 4),
        19,
    )
    assert about.rope == "pre"
    about = tr.describe(build("siglip2 classifier")).towers[0]
    assert (about.name, about.prefix, about.cls, about.grid, about.tokens) == ("vision_model", 0, False, None, None)
    about = tr.describe(build("vivit classifier"))
    assert about.towers[0].grid == (4, 2, 2)
    assert "1 + 4x2x2 = 17" in str(about)
    assert "resize" in tr.describe(build("clip")).methods()
    assert "resize" not in tr.describe(build("siglip2")).methods()
