"""What users put on or into the attention of a model: hooks run, replaced code is refused, other modules are called."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, first_tensor
from support import images, tiny_vit
from torch import nn
from torch.nn.utils import parametrize

import tokenreduce as tr

everywhere = pytest.mark.parametrize("name", FAMILIES)
KEEP_ALL = ("tome:r=0", "tome:keep=1.0", "evit:keep=1.0")


def louder(module, args, output):
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def quieter(module, args, kwargs):
    """Three tensors of one where a module is called with query, key and value."""
    return tuple(a * 0.9 if isinstance(a, torch.Tensor) else a for a in args), kwargs


def built(name: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 0.2)
    return model.eval(), inputs


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in ("attn", "self_attn", "attention")]


@everywhere
@torch.no_grad()
def test_hooks_on_attention_run(name):
    """Registered before the patch or behind it, with or without gradients, and in layers that a method looks at."""
    model, inputs = built(name)
    bare = first_tensor(model(**inputs))
    stock = copy.deepcopy(model)
    for one in (stock, model):
        attentions(one)[1].register_forward_hook(louder)
    want = first_tensor(stock(**inputs))
    assert not torch.equal(want, bare)
    for spec in KEEP_ALL:
        with tr.patched(model, spec):
            assert torch.equal(first_tensor(model(**inputs)), want), spec
    handles = [attentions(one)[-1].register_forward_pre_hook(quieter, with_kwargs=True) for one in (stock,)]
    want = first_tensor(stock(**inputs))
    for spec in KEEP_ALL:
        with tr.patched(model, spec):
            late = attentions(model)[-1].register_forward_pre_hook(quieter, with_kwargs=True)
            assert torch.equal(first_tensor(model(**inputs)), want), spec
            late.remove()
    assert handles


@everywhere
@torch.no_grad()
def test_hooks_run_behind_a_merge(name):
    model, inputs = built(name)
    seen: list[int] = []
    tr.patch(model, "tome:r=2")
    for attention in attentions(model):
        attention.register_forward_hook(lambda module, args, output: seen.append(1))
    first_tensor(model(**inputs))
    assert len(seen) == len(attentions(model))


@everywhere
@torch.no_grad()
def test_own_attention_is_refused_by_name(name):
    model, inputs = built(name)
    attention = attentions(model)[1]
    attention.forward = lambda *args, **kwargs: args[0]
    with pytest.raises(ValueError, match=f"{type(attention).__name__} has a method forward of its own"):
        tr.patch(model, "tome:r=2")
    del attention.forward
    tr.patch(model, "tome:r=2")
    attention.forward = lambda *args, **kwargs: args[0]
    with pytest.raises(ValueError, match="forward of its own"):
        model(**inputs)
    del attention.forward
    model(**inputs)


def test_attention_replaced_on_its_class_is_refused(monkeypatch):
    from timm.layers.attention import Attention

    monkeypatch.setattr(Attention, "forward", lambda self, x, **kwargs: x)
    with pytest.raises(ValueError, match=r"Attention\.forward was replaced by .*test_own_code"):
        tr.patch(tiny_vit(), "tome:r=2")


@torch.no_grad()
def test_own_attention_of_an_open_clip_block_is_refused():
    model, inputs = built("open_clip vit")
    block = model.transformer.resblocks[1]
    block.attention = lambda q_x, **kwargs: q_x
    with pytest.raises(ValueError, match="ResidualAttentionBlock has a method attention of its own"):
        tr.patch(model, "tome:r=2")
    del block.attention
    tr.patch(model, "tome:r=2")
    block.attention = lambda q_x, **kwargs: q_x
    with pytest.raises(ValueError, match="attention of its own"):
        model(**inputs)


def test_own_pooling_is_refused():
    model = tiny_vit(global_pool="avg")
    model.pool = lambda x, pool_type=None: x[:, 1:].mean(1)
    with pytest.raises(ValueError, match="VisionTransformer has a method pool of its own"):
        tr.patch(model, "tome:r=2")
    siglip, _ = built("transformers siglip")
    siglip.head.forward = lambda x: x.mean(1)
    with pytest.raises(ValueError, match="forward of its own"):
        tr.patch(siglip, "tome:r=2")


class Adapted(nn.Module):
    """A linear layer with a low-rank part, and without ``weight``, as adapters and quantised layers are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", [n for n in FAMILIES if "open_clip" not in n and "eva02" not in n])
@torch.no_grad()
def test_layers_in_place_of_linear_ones_are_called(name):
    model, inputs = built(name)
    torch.manual_seed(1)
    for attention in attentions(model):
        for child, module in list(attention.named_children()):
            if isinstance(module, nn.Linear) and not isinstance(attention, nn.MultiheadAttention):
                setattr(attention, child, Adapted(module))
    want = first_tensor(model(**inputs))
    for spec in KEEP_ALL:
        with tr.patched(model, spec):
            assert torch.equal(first_tensor(model(**inputs)), want), spec
    with tr.patched(model, "tome:r=2"):
        first_tensor(model(**inputs))


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.1


@pytest.mark.parametrize(("name", "parameter"), [("open_clip vit", "in_proj_weight"), ("timm vit", "qkv.weight")])
@torch.no_grad()
def test_parametrized_weights(name, parameter):
    model, inputs = built(name)
    path, _, weight = parameter.rpartition(".")
    parametrize.register_parametrization(attentions(model)[1].get_submodule(path), weight, Scaled())
    want = first_tensor(model(**inputs))
    for spec in KEEP_ALL:
        with tr.patched(model, spec):
            assert torch.equal(first_tensor(model(**inputs)), want), spec
            assert torch.equal(first_tensor(copy.deepcopy(model)(**inputs)), want)
    assert torch.equal(first_tensor(model(**inputs)), want)


def test_a_class_that_changed_since_is_not_taken_back_silently():
    model = tr.patch(tiny_vit(), "tome:r=2")
    attention = model.blocks[0].attn
    kind = type(attention)
    attention.__class__ = type("Wrapped", (kind,), {})
    with pytest.raises(ValueError, match="another class"):
        tr.unpatch(model)
    attention.__class__ = kind
    tr.unpatch(model)


@torch.no_grad()
def test_global_hooks_run():
    model, x = tiny_vit(), images()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.1 if hasattr(module, "qkv") else None
    )
    try:
        want = model(x)
        with tr.patched(model, "tome:r=0"):
            assert torch.equal(model(x), want)
        with tr.patched(model, "tome:keep=1.0"):
            assert torch.equal(model(x), want)
    finally:
        handle.remove()
    assert not torch.equal(model(x), want)


@torch.no_grad()
def test_a_pre_hook_where_a_method_looks_before_the_attention():
    model = tiny_vit()
    model.blocks[1].attn.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    tr.patch(model, "mctf:r=2")
    with pytest.raises(ValueError, match="pre-hook on Attention"):
        model(images())


@torch.no_grad()
def test_a_hook_on_one_of_several_branches():
    from timm.models.vision_transformer import ParallelThingsBlock

    model = tiny_vit(block_fn=ParallelThingsBlock)
    tr.patch(model, "tome:r=2")
    model.blocks[0].attns[0].register_forward_hook(louder)
    with pytest.raises(ValueError, match="hook on Sequential"):
        model(images())
