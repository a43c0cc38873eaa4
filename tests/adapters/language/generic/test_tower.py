"""What is known of the tower of a discovered model: which patches a token is made of, what its attention saw, grids."""

from __future__ import annotations

import pytest
import torch
from toys.build import IMAGE, VIDEO
from toys.checks import before, plain, stays, toy
from toys.inputs import noise
from toys.oracles import generate, relative
from vlms import VLMS, encodes_before, prompts
from vlms_masked import CASES

import tokenreduce as tr
from tokenreduce.adapters.language import find
from tokenreduce.adapters.language.generic.grids import shapes
from tokenreduce.adapters.language.generic.patches import tokens_of_slots

pytestmark = pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")


# -- tokens of slots -------------------------------------------------------------------------------------------------
class _Tower(torch.nn.Module):
    """Two blocks on a class token and 4x4 patches, and what ``merge`` makes of them."""

    def __init__(self, merge):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.merge = merge

    def run(self):
        x = torch.randn(1, 17, 4, generator=torch.Generator().manual_seed(0))
        for block in self.blocks:
            x = block(x)
            x = x + x.mean(1, keepdim=True)
        return self.merge(x)

    def tokens(self):
        return tokens_of_slots(list(self.blocks), self.run)


def _shuffle(x):
    x = x[:, 1:].view(2, 2, 2, 2, 4).transpose(1, 2).reshape(1, 4, 16)
    return torch.nn.functional.layer_norm(x, (16,))


def test_slots_tell_their_token():
    tower = _Tower(_shuffle)
    assert tower.tokens() is None  # a mean stands behind the last block: every token sees all
    tower.run = lambda: _shuffle(tower.blocks[1](tower.blocks[0](torch.randn(1, 17, 4))))
    want = torch.tensor([-1, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    assert torch.equal(tower.tokens(), want)


def test_row_ends_answer_to_no_slot_and_blocks_that_feed_nothing_do_not_count():
    one, two = (torch.nn.Linear(4, 4) for _ in range(2))
    end = torch.nn.Parameter(torch.ones(1, 1, 4))

    def run():
        x = one(torch.randn(1, 4, 4))
        two(x)
        return torch.cat([x[:, :2], end, x[:, 2:]], 1)

    assert torch.equal(tokens_of_slots([one, two], run), torch.tensor([0, 1, 3, 4]))
    assert tokens_of_slots([two], run) is None


def test_gradients_are_left_as_they_were():
    tower = _Tower(_shuffle)
    with torch.no_grad():
        tower.tokens()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in tower.parameters())
    assert not any(block._forward_hooks for block in tower.blocks)


# -- grids -----------------------------------------------------------------------------------------------------------
def test_sizes_say_the_grid_where_they_fit():
    grid = torch.tensor([[1, 8, 8], [2, 8, 4]])
    assert shapes({"image_grid_thw": grid}, [16, 16]) == ([16, 16], [(1, 4, 4), (2, 4, 2)])
    assert shapes({"sizes": grid[:, 1:]}, [24]) == ([16, 8], [(1, 4, 4), (1, 4, 2)])  # one tensor for both
    assert shapes({"sizes": grid[:, 1:]}, [18]) == ([18], [None])
    assert shapes({"pixel_values": torch.zeros(2, 3, 32, 32)}, [16, 15]) == ([16, 15], [(1, 4, 4), None])
    assert shapes({"pixel_values": torch.zeros(2, 3, 32, 16)}, [16]) == ([16], [None])


# -- the same as where a table says it ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3"])
def test_the_tables_families_choose_the_same_without_their_rows(name, monkeypatch):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"])

    def kept():
        with tr.patched(vlm.model, "fastervlm:keep=5,score=received"), tr.record(vlm.model, flops=False) as trace:
            generate(vlm.model, inputs, 1)
        return stays(trace)

    want = kept()
    monkeypatch.setattr(find, "FAMILIES", {})
    assert torch.equal(kept(), want)


def _row(inputs, b):
    """The inputs of one row of a batch whose images have a grid each: the first image, or the other two."""
    images = slice(0, 1) if b == 0 else slice(1, 3)
    ends = [0, *inputs["image_grid_thw"].prod(1).cumsum(0).tolist()]
    real = inputs["attention_mask"][b].bool()
    more = {k: inputs[k][b : b + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    pixels = inputs["pixel_values"][ends[images.start] : ends[images.stop]]
    return {**more, "pixel_values": pixels, "image_grid_thw": inputs["image_grid_thw"][images]}


@pytest.mark.parametrize("spec", ["divprune:keep=0.4", "visionzip:keep=5,score=received", "fastv:layer=2,keep=0.4"])
@pytest.mark.parametrize("name", ["qwen3_5", "glm4v"])
def test_a_padded_batch_is_its_rows(name, spec):
    here = toy(name)
    with tr.patched(here.model, spec):
        sequences, logits = generate(here.model, here.inputs)
        for b in range(2):
            alone, want = generate(here.model, _row(here.inputs, b))
            assert torch.equal(sequences[b, -3:], alone[0, -3:])
            assert relative(logits[b], want[0]) < 1e-5
    assert relative(logits, here.logits) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_5", "mistral3"])
def test_methods_that_look_at_the_tower_leave_a_short_prompt(name):
    assert before(name, "fastervlm:keep=5,score=received,positions=original", False) < 1e-5


def test_row_ends_are_kept_and_seen_by_no_method():
    here = toy("hunyuan_vl")  # 22 and 14 features for 4x4 and 4x2 units
    with tr.patched(here.model, "divprune:keep=4"), tr.record(here.model, flops=False) as trace:
        generate(here.model, here.inputs, 1)
    seen = [columns.shape[1] for _, columns, _ in trace.steps[0].parts]
    assert sorted(seen) == [8, 16]
    stay, visual = stays(trace), here.inputs["input_ids"] == IMAGE
    assert (stay & visual).sum(1).tolist() == [4 + 6, 2 * (4 + 6)]


def test_features_of_which_each_sees_all_have_no_patches():
    model, inputs = plain("idefics2")
    with tr.patched(model, "visionzip:keep=4,score=received"), pytest.raises(ValueError, match="may see all patches"):
        generate(model, inputs, 1)


def test_videos_frame_by_frame():
    model, _ = plain("qwen3_5")
    row = [11, 12]
    for stamp in range(4):
        row += [20 + stamp, *[VIDEO] * 16]
    ids = torch.tensor([[*row, 13, 14, 15]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": 2 * (ids == VIDEO).long(),
        "pixel_values_videos": noise(4 * 64, 96), "video_grid_thw": torch.tensor([[4, 8, 8]]),
    }  # fmt: skip
    with tr.patched(model, "uniform-frames:keep=0.5"), tr.record(model, flops=False) as trace:
        generate(model, inputs, 2)
    frames = stays(trace)[0][ids[0] == VIDEO].view(4, 16)
    assert sorted(frames.sum(1).tolist()) == [0, 0, 16, 16]
