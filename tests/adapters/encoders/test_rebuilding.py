"""Towers in which a method sets patches aside, against the stock blocks run by hand: on all patches, rebuilt in front
of every block, where attention is over all (an MLP sees one token at a time), on those that stay in later blocks."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, OTHERS, first_tensor
from rebuilt import ByHand
from support import images, tiny_vit

import tokenreduce as tr

#: name -> tokens in front of the patches.
TOWERS = {
    "timm vit": 1, "timm vit, registers": 5, "timm vit, average pool": 0, "timm siglip, attention pool": 0,
    "timm eva02": 1, "timm dinov3": 5, "timm deit, distilled": 2, "open_clip vit": 1, "transformers vit": 1,
    "transformers clip": 1, "transformers siglip": 0, "transformers dinov2": 1, "transformers dinov3": 3,
    "transformers internvl": 1, "transformers aimv2": 0, "timm beit, shared": 1, "transformers vivit": 1,
}  # fmt: skip


def wide(name):
    torch.manual_seed(0)
    model, inputs = (FAMILIES | OTHERS)[name]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3.0)
    return model.eval(), inputs


@pytest.mark.parametrize("as_layer", [0, 1, 7])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_is_the_stock_blocks_on_rebuilt_patches(name, as_layer):
    model, inputs = wide(name)
    reducer = tr.IPCV(layer=2, keep=0.4, as_layer=as_layer, top_k=3)
    with tr.patched(model, reducer), tr.record(model, flops=False) as trace:
        got = first_tensor(model(**inputs))
    assert trace.tokens[-1] < trace.tokens[0]
    (tower,) = tr.describe(model).towers
    for i in range(len(got)):
        with ByHand(reducer, TOWERS[name]).on(tower.blocks):
            want = first_tensor(model(**{k: v[i : i + 1] for k, v in inputs.items()}))
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("as_layer", [0, 1, 7])
@torch.no_grad()
def test_all_patches_of_a_call_together(as_layer):
    """``per="all"``: one image loses more than another, and neighbours are of either."""
    model, x = tiny_vit(class_token=False, global_pool="avg"), images(3)
    x[1] *= 0.01
    reducer = tr.IPCV(layer=2, keep=0.3, as_layer=as_layer, top_k=3, per="all")
    with tr.patched(model, reducer), tr.record(model, flops=False) as trace:
        got = model(x)
    left = trace.plan.places().sum(1).tolist()
    assert sum(left) == int(3 * 36 * 0.3)
    assert len(set(left)) > 1
    with tr.patched(model, reducer):
        alone = model(x[1:2])
    with tr.patched(model, tr.IPCV(layer=2, keep=0.3, as_layer=as_layer, top_k=3)):
        torch.testing.assert_close(model(x[1:2]), alone)  # one image: both are the same

    # by hand: blocks on a row of all tokens, each image attending to itself
    blocks, taken = list(model.blocks), []
    h = before = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in blocks[:2]:
        before, h = h, block(h)
    by = ByHand(reducer, 0, groups=[range(3 * 36)])
    by.h = h.flatten(0, 1)
    by.stay, by.near = by.choose(by.h, before.flatten(0, 1))
    y = by.h[by.stay]
    for i, block in enumerate(blocks[2:]):
        if i < as_layer:
            y = block(by.whole(y).view(3, 36, -1)).flatten(0, 1)[by.stay]
            continue
        taken = [[s for s, at in enumerate(by.stay) if at // 36 == image] for image in range(3)]
        y = torch.cat([block(y[rows][None])[0] for rows in taken if rows])
    want = model.forward_head(model.norm(by.whole(y).view(3, 36, -1)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@torch.no_grad()
def test_an_image_that_loses_everything():
    model, x = tiny_vit(class_token=False, global_pool="avg"), images(2)
    x[1] = 0  # all its patches change alike, and less than the best of the other
    for as_layer in (0, 1):
        with tr.patched(model, tr.IPCV(layer=2, keep=1, as_layer=as_layer, per="all")), tr.record(model) as trace:
            got = model(x)
        assert sorted(trace.plan.places().sum(1).tolist()) == [0, 1]
        assert torch.isfinite(got).all()


@torch.no_grad()
def test_layers_in_between_are_handed_out_rebuilt():
    model, x = tiny_vit(), images()
    reducer = tr.IPCV(layer=2, keep=0.4, as_layer=1)
    with tr.patched(model, reducer):
        _, maps = model.forward_intermediates(x, [1, 3, 5], output_fmt="NLC")
    by = ByHand(reducer, 1)
    with by.on(list(model.blocks)):
        _, want = model.forward_intermediates(x[:1], [1, 3, 5], output_fmt="NLC")
    torch.testing.assert_close(maps[0][:1], want[0])
    torch.testing.assert_close(maps[2][:1], want[2])
    torch.testing.assert_close(maps[1][0], by.whole(torch.cat([torch.zeros(1, 32), want[1][0]]))[1:])


@torch.no_grad()
def test_a_norm_comes_behind_the_rebuilding():
    """Features of layers in between are rebuilt in front of a norm, or refused; a backbone's are the stock norm's."""
    from transformers import Dinov2Backbone, Dinov2Config

    reducer = tr.IPCV(layer=2, keep=0.4, as_layer=0)
    model, x = tiny_vit(), images()
    with tr.patched(model, reducer):
        for settings in ({"norm": True}, {"stop_early": True}):
            with pytest.raises(ValueError, match="in front of the tower's norm"):
                model.forward_intermediates(x, [1, 3], **settings)
        model.forward_intermediates(x, [1, 3], stop_early=True, intermediates_only=True)
    torch.manual_seed(0)
    settings = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=48, patch_size=8)
    backbone = Dinov2Backbone(Dinov2Config(**settings, out_features=["stage3", "stage4"])).eval()
    pixels = images(1, 48)
    with tr.patched(backbone, reducer):
        got = backbone(pixels).feature_maps
    layers, outs = list(tr.describe(backbone).towers[0].blocks), [backbone.embeddings(pixels)]
    with ByHand(reducer, 1).on(layers) as by:
        for layer in layers:
            out = layer(outs[-1])
            outs.append(out[0] if isinstance(out, tuple) else out)
    for have, y in zip(got, (by.whole(outs[3][0]), outs[4][0]), strict=True):
        want = backbone.layernorm(y)[1:].view(1, 6, 6, 48).permute(0, 3, 1, 2)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_behind_other_methods():
    """Merged tokens, and patches dropped at the input, are what IPCV sees; sizes go on."""
    model, x = tiny_vit(), images()
    with tr.patched(model, "tome:r=[6,0]+ipcv:layer=3,keep=0.5,as_layer=1"), tr.record(model, flops=False) as trace:
        got = model(x)
    assert trace.tokens == [31, 31, 31, 16, 16, 16]
    with tr.patched(model, "tome:r=[6,0]"):
        merged = model(x)
    assert not torch.equal(got, merged)
    with tr.patched(model, "tome:r=[6,0]+ipcv:layer=3,keep=1.0"):
        assert torch.equal(model(x), merged)
    with tr.patched(model, "pixelprune:keep=20+ipcv:layer=2,keep=0.5"), tr.record(model, flops=False) as trace:
        assert torch.isfinite(model(x)).all()
    assert trace.tokens == [21, 21, 11, 11, 11, 11]


@pytest.mark.parametrize(("specs", "said"), [
    ("ipcv:layer=6", "give a layer from 2 to 5"), ("ipcv+tome:r=2", "acts in block 2"),
    ("ipcv+ipcv:layer=4", "rebuilds what it drops"), ("ipcv:layer=2+evit:drop_loc=[1]", "acts in block 1"),
])  # fmt: skip
def test_what_cannot_go_together_is_refused(specs, said):
    with pytest.raises(ValueError, match=said):
        tr.patch(tiny_vit(), specs)
