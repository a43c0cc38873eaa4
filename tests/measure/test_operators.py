"""How many operators and calls a block takes: what was gained must not leak away. Counts depend on no machine."""

from __future__ import annotations

import pytest
import torch
from support import images, tiny_vit

import tokenreduce as tr
from tokenreduce.measure.operators import count_operators, entered

#: Operators of a block of the stock model.
STOCK = 27
#: Of the block that takes most: operators beside the stock model's, those of them that make and apply a plan (the
#: others are the bias of log sizes), and functions of this package that a block enters beside those of one without a
#: method.
BOUNDS = {
    "tome:r=2": (25, 23, 68),
    "tome:r=2,prop_attn=false": (23, 23, 68),
    "pitome:ratio=0.9": (33, 33, 82),
    "evit:base_keep_rate=0.7": (22, 22, 78),
    "evit:base_keep_rate=0.7,fuse_token=true": (51, 51, 88),
    "diffrate:keep=0.3": (62, 60, 138),
    "tofu:r=2": (29, 29, 68),
    "repshift:ratio=0.7": (9, 9, 57),
    "random:r=2": (15, 15, 68),
}
#: Functions that a whole forward enters where nothing acts: 6 blocks of 5, and what is around them.
QUIET = 60


def counted(model, x):
    with torch.no_grad():
        model(x)  # constants of this shape are made
    return count_operators(model, lambda: model(x), list(model.blocks))


@pytest.mark.parametrize("spec", BOUNDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_starts_no_more_operators_than_it_did(spec, batch):
    model, x = tiny_vit(), images(batch)
    stock = counted(model, x)
    assert set(stock.per_block) == {STOCK}
    with tr.patched(model, spec):
        got = counted(model, x)
        with torch.no_grad():
            calls = entered(lambda: model(x)).total()
    most, own, functions = BOUNDS[spec]
    assert max(got.per_block) - STOCK <= most, got.blocks[got.per_block.index(max(got.per_block))] - stock.blocks[0]
    assert max(got.own_per_block) <= own
    acting = sum(n > 0 for n in got.own_per_block)
    assert calls <= QUIET + functions * acting
    assert acting


def test_keeping_everything_is_the_stock_forward():
    model, x = tiny_vit(), images()
    stock = counted(model, x)
    with tr.patched(model, "tome:r=0"):
        got = counted(model, x)
        with torch.no_grad():
            assert entered(lambda: model(x)).total() <= QUIET
    assert got.blocks == stock.blocks
    assert got.around == stock.around
    assert not any(got.own)


def test_operators_are_counted_where_they_are_started():
    class Block(torch.nn.Module):
        def forward(self, x):
            return (x + 1).exp()

    blocks = torch.nn.ModuleList([Block(), Block()])
    got = count_operators(blocks, lambda: blocks[1](blocks[0](torch.ones(2)).neg()), list(blocks))
    assert [dict(c) for c in got.blocks] == [{"aten.add": 1, "aten.exp": 1}] * 2
    assert got.around == {"aten.ones": 1, "aten.neg": 1}
    assert (got.total, got.per_block, got.own_per_block) == (6, (2, 2), (0, 0))
    assert not blocks[0]._forward_hooks
    assert not blocks[0]._forward_pre_hooks
