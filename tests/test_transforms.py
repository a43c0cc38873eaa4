"""Function transforms and TorchScript on patched models."""

from __future__ import annotations

import copy

import pytest
import torch
from support import ENCODER_METHODS, images, tiny_vit, with_keep
from torch.func import functional_call, grad, vmap

import tokenreduce as tr

every = pytest.mark.parametrize("name", ENCODER_METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::torch.jit.TracerWarning")


def per_sample_gradients(model, x):
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters, one):
        return functional_call(model, parameters, (one[None],)).square().sum()

    return vmap(grad(loss), in_dims=(None, 0))(parameters, x)


@every
def test_per_sample_gradients_are_those_of_a_loop(name):
    model, x = tr.patch(tiny_vit(), with_keep(name, 0.5)), images(3)
    got = per_sample_gradients(model, x)
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(got[key][i], p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()) + 1e-6)


@pytest.mark.parametrize("spec", ["ats", "mustdrop-merge:threshold=0.1", "evit:fuse_token=true", "tome:r=4"])
def test_vmap_over_images_is_the_batch(spec):
    model, x = tr.patch(tiny_vit(), spec), images(3)
    with torch.no_grad():
        got = vmap(lambda one: model(one[None])[0])(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tome", "evit", "random"])
def test_not_a_number_raises_and_stays_one_where_it_cannot(name):
    model, x = tr.patch(tiny_vit(), with_keep(name, 0.5)), images(2)
    x[1, 0, 3, 3] = float("nan")
    with torch.no_grad():
        with pytest.raises(ValueError, match="NaN in the tokens"):
            model(x)
        got = vmap(lambda one: model(one[None])[0])(x)
    assert torch.isfinite(got[0]).all()
    assert got[1].isnan().any()
    one = {k: p.detach() for k, p in model.named_parameters()}
    with pytest.raises(ValueError, match="NaN in the tokens"):  # a gradient alone can ask for values
        grad(lambda p: functional_call(model, p, (x,)).sum())(one)


def test_script_names_the_way():
    model = tiny_vit()
    with tr.patched(model, "tome:r=4"):
        for part in (model, model.blocks[1], torch.nn.Sequential(model), copy.deepcopy(model)):
            with pytest.raises(RuntimeError, match=r"torch\.export"):
                torch.jit.script(part)
    assert "__prepare_scriptable__" not in vars(model)


def test_script_names_the_way_where_no_block_is_patched():
    model = tr.zoo.load("world-llava").model
    with tr.patched(model, "visionzip:keep=8"), pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.script(model)


@every
def test_trace_holds_for_other_batches_and_images(name):
    model = tr.patch(tiny_vit(), with_keep(name, 0.5))
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2), check_trace=False)
        for batch in (1, 5):
            x = torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(batch))
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
