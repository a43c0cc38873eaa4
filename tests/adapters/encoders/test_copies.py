"""Shallow copies and replicas of a patched model compute with their own weights; deep ones and pickles as ever."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, first_tensor
from support import images, tiny_vit
from torch import Tensor, nn

import tokenreduce as tr


def replica(model: nn.Module, factor: float) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes, on the CPU and with scaled weights."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        mine = copies[id(module)]
        for name, child in module._modules.items():
            if child is None:
                mine._modules[name] = None
            else:
                setattr(mine, name, copies[id(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                mine._parameters[name] = None
            else:
                setattr(mine, name, parameter.detach() * factor)
        for name, buffer in module._buffers.items():
            mine._buffers[name] = buffer
    return copies[id(model)]


def scaled(model: nn.Module, factor: float) -> nn.Module:
    mine = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.mul_(factor)
    return mine


def built(name: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    return model.eval(), inputs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_replicas_compute_with_their_own_weights(name):
    model, inputs = built(name)
    other = tr.patch(scaled(model, 1.25), "tome:r=2")
    tr.patch(model, "tome:r=2")
    want = first_tensor(other(**inputs))
    assert torch.equal(first_tensor(replica(model, 1.25)(**inputs)), want)
    assert not torch.equal(first_tensor(model(**inputs)), want)


@pytest.mark.parametrize("name", ["timm siglip, attention pool", "timm vit", "open_clip vit, average pool"])
@torch.no_grad()
def test_dense_outputs_of_replicas(name):
    model, inputs = built(name)
    x = inputs["x"]
    other = tr.patch(scaled(model, 1.25), "tome:r=2+resize:keep=0.8")
    tr.patch(model, "tome:r=2+resize:keep=0.8")

    def maps(one: nn.Module) -> list[Tensor]:
        out = one.forward_intermediates(x)
        return out["image_intermediates"] if isinstance(out, dict) else out[1]

    for got, want in zip(maps(replica(model, 1.25)), maps(other), strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_a_shallow_copy_with_weights_of_its_own():
    model, x = tiny_vit(global_pool="map", class_token=False), images()
    tr.patch(model, "tome:r=4")
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.attn_pool = scaled(model.attn_pool, 2.0)
    assert not torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="shallow copy"):
        tr.unpatch(other)
    tr.unpatch(model)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_deep_copies_and_pickles_are_patched_on_their_own(name):
    model, inputs = built(name)
    stock = first_tensor(model(**inputs))
    kind, attributes = type(model), set(vars(model))
    tr.patch(model, "tome:r=2")
    want = first_tensor(model(**inputs))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first_tensor(made(**inputs)), want)
        tr.unpatch(made)
        assert torch.equal(first_tensor(made(**inputs)), stock)
        assert type(made) is kind
    assert torch.equal(first_tensor(model(**inputs)), want)
    tr.unpatch(model)
    assert type(model) is kind
    assert set(vars(model)) == attributes


@pytest.mark.parametrize(("name", "part"), [("llava", "multi_modal_projector"), ("qwen2_5_vl", "visual")])
@torch.no_grad()
def test_shallow_copies_of_language_models_encode_with_what_they_have(name, part):
    from vlms import VLMS, prompts

    vlm = VLMS[name]
    model, inputs = vlm.build().eval(), prompts(vlm, ((9, "i"), (5, "i")))
    given = {n: v for n, v in inputs.items() if n in ("pixel_values", "image_grid_thw")}
    kinds = {n: type(m) for n, m in model.named_modules()}
    tr.patch(model, "fastervlm:keep=4")

    def features(inner: nn.Module) -> Tensor:
        return torch.cat(list(inner.get_image_features(**given, return_dict=True).pooler_output))

    own, other = model.model, copy.copy(model.model)
    other._modules = dict(own._modules)
    setattr(other, part, scaled(getattr(own, part), 2.0))
    got, before = features(other), features(own)
    setattr(own, part, getattr(other, part))
    assert torch.equal(features(own), got)
    assert not torch.equal(before, got)
    made = copy.deepcopy(model)
    assert torch.equal(made(**inputs).logits, model(**inputs).logits)
    tr.unpatch(made)
    assert {n: type(m) for n, m in made.named_modules()} == kinds
