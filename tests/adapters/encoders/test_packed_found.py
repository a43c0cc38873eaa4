"""Packed towers that are found by how they are built, against those of the table, and what is said of others."""

from __future__ import annotations

import copy

import pytest
import torch
from vlms import VLMS, encodes_before

import tokenreduce as tr
from tokenreduce.adapters.encoders import packed_found
from tokenreduce.adapters.encoders.packed_layout import Laid, bounds_of, loops_of, start_of
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.core.plan import Merge, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

pytestmark = pytest.mark.skipif(not encodes_before(), reason="towers of earlier releases are called in another way")

#: Two images of one size, and between them a video of two frames of another.
GRIDS = torch.tensor([[1, 8, 8], [2, 4, 12], [1, 8, 8]])


class Chosen(Reducer):
    """Plans by a seed, so that two adapters that show other keys are given the same."""

    def __init__(self, kind, site, counts):
        for name, value in {"kind": kind, "site": site, "prop_attn": counts}.items():
            object.__setattr__(self, name, value)

    def required(self):
        return ("keys", "attention", "before")

    def acting_position(self):
        return self.site

    def acts_at(self, layer, depth):
        return layer < 2

    def plan(self, evidence):
        assert evidence.attention("all").shape[-1] == evidence.n
        g = torch.Generator().manual_seed(100 * evidence.layer + evidence.n)
        order = torch.stack([torch.randperm(evidence.n, generator=g) for _ in range(evidence.batch)])
        if self.kind == "drop":
            return Prune(evidence.n, order[:, : evidence.n * 2 // 3])
        if self.kind == "ragged":
            valid = torch.ones(evidence.batch, evidence.n * 2 // 3, dtype=torch.bool)
            valid[::2, 1] = False
            keep = order[:, : evidence.n * 2 // 3]
            there = valid if evidence.valid is None else valid & evidence.valid.gather(1, keep)
            return Prune(evidence.n, keep, there)
        src = order[:, evidence.n // 2 : evidence.n // 2 + 3]
        return Merge(evidence.n, order[:, : evidence.n // 2], src, torch.tensor([0, 0, 1]).expand_as(src))

    def spec(self):
        return "chosen"


def _towers():
    """Towers of the table, one with windows of 2x2 units."""
    from transformers.models.qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Kind

    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=4, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, window_size=16, out_hidden_size=32,
        fullatt_block_indexes=[2],
    )  # fmt: skip
    windows = Kind._from_config(config).eval()
    with torch.no_grad():
        for p in windows.parameters():
            p.mul_(10.0 if p.dim() > 1 else 1.0)
    return {"windows": windows, **{n: copy.deepcopy(VLMS[n].model.model.visual) for n in ("qwen2_vl", "qwen3_vl")}}


@pytest.mark.parametrize("site", ["before", "middle", "after"])
@pytest.mark.parametrize("kind", ["drop", "ragged", "merge", "count"])
@torch.no_grad()
def test_a_tower_by_its_structure_is_that_of_the_table(kind, site):
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 96, generator=torch.Generator().manual_seed(3))
    method = Chosen("merge" if kind == "count" else kind, site, kind == "count")
    for name, tower in _towers().items():
        stock = tower(pixels, grid_thw=GRIDS)
        with tr.patched(tower, method):
            want = tower(pixels, grid_thw=GRIDS)
        undo = Undo((method,), tower)
        packed_found.attach(packed_found.tower_of("", tower), (method,), undo)
        with tr.record(tower, flops=False) as trace:
            got = tower(pixels, grid_thw=GRIDS)
        undo.revert()
        assert len({s.tokens for s in trace.steps}) > 1
        scale = float(stock.pooler_output.abs().max())
        kept = _left(trace)  # places of dropped units hold the mean of tokens there, and the token of a mean here
        assert float((want.pooler_output - got.pooler_output)[kept].abs().max()) < 1e-4 * scale, name
        assert float((want.pooler_output - stock.pooler_output)[kept].abs().max()) > 1e-2 * scale
        again = tower(pixels, grid_thw=GRIDS)
        assert torch.equal(again.pooler_output, stock.pooler_output)


def _left(trace):
    """(N,) bool of the units of a call that a method left as they are, in the order of the images."""
    shapes = list(dict.fromkeys((h * w // 4) for _, h, w in GRIDS.tolist()))
    plans = {n: None for n in shapes}
    for step in trace.steps:
        if step.plan is None:
            continue
        n = next(
            n for n in shapes if (plans[n] is None and step.plan.n == n) or (plans[n] and step.plan.n == plans[n].k)
        )
        plans[n] = step.plan if plans[n] is None else plans[n].then(step.plan)
    rows = {n: iter(p.places()) for n, p in plans.items()}
    return torch.cat([next(rows[h * w // 4]) for t, h, w in GRIDS.tolist() for _ in range(t)])


def test_what_is_found_and_what_is_not():
    from transformers.models.pixtral import PixtralVisionConfig, PixtralVisionModel

    config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    tower = PixtralVisionModel(config).eval()
    (found,) = tr.describe(tower).towers
    assert (found.family, found.prefix, found.rope, found.resizes) == (
        "transformers PixtralVisionModel",
        0,
        "post",
        False,
    )
    assert isinstance(found, Tower)
    with pytest.raises(ValueError, match="smaller max_pixels"):
        tr.patch(tower, "resize:keep=0.5")
    images, sizes = torch.randn(2, 3, 32, 32), torch.tensor([[32, 32], [32, 16]])
    with torch.no_grad():
        stock = tower(images, image_sizes=sizes).last_hidden_state
        with tr.patched(tower, "tome:keep=1.0"):
            assert torch.equal(tower(images, image_sizes=sizes).last_hidden_state, stock)
        with tr.patched(tower, "tome:keep=0.5"), tr.record(tower, flops=False) as trace:
            both = tower(images, image_sizes=sizes).last_hidden_state
            alone = tower(images[1:], image_sizes=sizes[1:]).last_hidden_state
    assert both.shape == stock.shape
    assert [s.tokens for s in trace.steps[:4]] == [48, 24, 32, 16]
    torch.testing.assert_close(both[:, 64:], alone, rtol=1e-4, atol=1e-4)


def test_where_patches_lie_when_four_became_one():
    laid = Laid([[1, 4, 8], [1, 4, 4]], 1)
    assert bounds_of(laid.row(torch.zeros(1, 48, 3))).tolist() == [0, 32, 48]
    small = laid.row(torch.zeros(1, 12, 3))
    assert small.shapes == ((2, 4), (2, 2))
    assert bounds_of(small).tolist() == [0, 8, 12]
    with pytest.raises(ValueError, match="a row of 11 tokens is not what images of 48 patches are made of"):
        laid.row(torch.zeros(1, 11, 3))


class _Reads(torch.nn.Module):
    """A tower that looks at tokens between its layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, grid_thw):
        for layer in self.layers:
            x = layer(x)
            y = x.mean(0)
        return x, y


class _Remakes(_Reads):
    def forward(self, x, grid_thw):
        at = self.inserted if grid_thw is not None else -1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == at:
                x = self.merge(x, grid_thw)
        return x


def test_code_between_the_layers_is_read():
    layer = copy.deepcopy(VLMS["qwen2_vl"].model.model.visual.blocks[0])
    tower = _Reads(torch.nn.ModuleList([layer, copy.deepcopy(layer)]))
    assert [loop.odd for loop in loops_of(tower)] == ["y = x.mean(0)"]
    tower = _Remakes(tower.layers)
    tower.inserted = 0
    assert [loop.odd for loop in loops_of(tower)] == [None]
    assert start_of(tower) == 1
