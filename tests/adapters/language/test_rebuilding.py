"""Image/video language models in whose tower patches are set aside: against the unpatched model whose tower runs by
hand, every visual token in its place."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from rebuilt import ByHand, packed_by_hand
from vlms import VLMS, deeper, prompts
from vlms_masked import CASES, close, generate

import tokenreduce as tr


@contextmanager
def by_hand(model, reducer):
    """``model`` with a tower whose output a copy of it makes, image by image, by hand."""
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    stock = copy.deepcopy(tower)
    layer = getattr(model.config, "vision_feature_layer", None)

    def one(pixels, kwargs):
        (about,) = tr.describe(stock).towers
        by = ByHand(reducer, about.prefix)
        with by.on(about.blocks):
            out = stock(pixels, **kwargs)
        states = out.get("hidden_states")
        mine = None if states is None else by.whole(states[layer][0])[None]
        return out.last_hidden_state, mine

    def hook(module, args, kwargs, output):
        if "grid_thw" in kwargs:
            pixels = args[0] if args else kwargs["hidden_states"]
            values, _ = packed_by_hand(stock, reducer, kwargs["grid_thw"], pixels)
            output.last_hidden_state, output.pooler_output = values[:2]
            if len(values) > 2:
                output.deepstack_features = values[2:]
            return output
        kwargs = dict(kwargs)
        pixels = args[0] if args else kwargs.pop("pixel_values")
        last, mine = zip(*(one(p[None], kwargs) for p in pixels), strict=True)
        output.last_hidden_state = torch.cat(last)
        if output.get("hidden_states") is not None:
            states = list(output.hidden_states)
            states[layer] = torch.cat(mine)
            output.hidden_states = tuple(states)
        return output

    handle = tower.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_the_language_model_gets_all_patches_rebuilt(name):
    model, vlm = deeper(name), VLMS[name]
    reducer = tr.IPCV(layer=2, keep=0.5, as_layer=1, top_k=2)
    for case in ("unequal", "video") if vlm.video else ("two images",):
        inputs = prompts(vlm, CASES[case])
        stock = generate(model, inputs)
        with by_hand(model, reducer):
            want = generate(model, inputs)
        with tr.patched(model, reducer):
            got = generate(model, inputs)
        assert torch.equal(got[0], want[0])
        close(got[1], want[1])
        assert not torch.allclose(got[1], stock[1], rtol=1e-3)
        with tr.patched(model, "ipcv:layer=2,keep=1.0"):
            assert torch.equal(generate(model, inputs)[1], stock[1])
        with tr.patched(model, reducer, "divprune:keep=0.5", "fastv:layer=1,keep=0.5"):
            few = generate(model, inputs)[1]
        with by_hand(model, reducer), tr.patched(model, "divprune:keep=0.5", "fastv:layer=1,keep=0.5"):
            close(few, generate(model, inputs)[1])


@torch.no_grad()
def test_looks_at_blocks_that_see_all_patches():
    """VisionZip reads block 3: it must see all patches, and does where attention is over all."""
    model, vlm = deeper("llava"), VLMS["llava"]
    with pytest.raises(ValueError, match=r"looks at block 3 .* give as_layer=2 or more"):
        tr.patch(model, "ipcv:layer=2,as_layer=1", "visionzip:keep=4")
    with pytest.raises(ValueError, match="gets what block 3 of the vision tower"):
        tr.patch(model, "ipcv:layer=4")
    inputs, reducer = prompts(vlm, CASES["two images"]), tr.IPCV(layer=2, keep=0.5, as_layer=2)
    with tr.patched(model, reducer, "fastervlm:keep=4"), tr.record(model, flops=False) as trace:
        got = model(**inputs).logits
    assert torch.isfinite(got).all()
    assert trace.steps[-1].tokens < inputs["input_ids"].shape[1]
