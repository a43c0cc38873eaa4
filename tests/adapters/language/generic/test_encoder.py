"""Encoder-stage methods inside the towers of discovered models, through plain ``generate``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys.build import IMAGE, TABLE, families
from toys.checks import FORWARD, REFUSED, STOCK_FAILS, plain, toy
from toys.double import in_double
from toys.inputs import features, row_of
from toys.oracles import generate, relative, short_prompts
from toys.towers import compact_too, dropped_inside
from vlms import VIDEO, VLMS, encodes_before, prompts

import tokenreduce as tr
from tokenreduce.adapters import encoder_refusal
from tokenreduce.adapters.language.find import find
from tokenreduce.adapters.language.generic.towers import has_axes

pytestmark = pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")

ROOT = Path(__file__).parents[4]
#: Rows packed in units, rows of single patches, batches, and a tower that makes other tokens between its layers.
FAST = ("qwen3_5", "glm4v", "mistral3", "aya_vision", "ovis2", "minicpmv4_6")
#: Families in whose tower nothing acts, and a word of why.
WITHOUT = {
    "aria": "cross_attn.multihead_attn attends to all patches",
    "chameleon": "not built as one",
    "emu3": "not built as one",
    "deepseek_ocr2": "windows of a map",
    "deepseek_vl_hybrid": "SamVisionModel sees the same pixels",
    "gemma3n": "hierarchical",
    "gemma4": "not built as one",
    "gemma4_unified": "not built as one",
    "granite_docling": "deepstack_hidden_states.append(hidden_states)",
    "got_ocr2": "windows of a map",
    "idefics2": "patch_attention_mask",
    "lfm3_vl": "not built as one",
    "llama4": "not built as one",
    "molmo2": "not built as one",
    "perception_lm": "cannot be told",
    "step3p7": "that others are made of",
    "unlimited_ocr": "windows of a map",
}
#: Toys that multiply rounding in float32, and are compared in float64. There the difference of qwen3_5_moe is 1.3e-14,
#: and that between its stock batch and its stock rows 2.0e-14 (glm5_next: 3.8e-14 and 6.6e-14). In float32 it is
#: 2.8e-5, and the last bit of image features moves the stock logits by 3e-6 (glm5_next: 1.3e-5, and up to 1.5e-5).
NOISY = ("glm5_next", "qwen3_5_moe")
EVERY = [n for n in families() if n not in (*TABLE, *REFUSED, *FORWARD, *STOCK_FAILS)]
NAMES = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in EVERY if n not in WITHOUT]


@pytest.mark.parametrize("name", NAMES)
def test_dropped_patches_are_hidden_from_the_stock_tower(name):
    if name in NOISY:
        with in_double(name) as here:
            far, changed = dropped_inside(here)
        assert far < 1e-12
    else:
        far, changed = dropped_inside(toy(name))
        assert far < 1e-5
    assert changed > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_keep_all_and_unpatch_are_bit_identical(name):
    here = toy(name)
    model, inputs = here.model, here.inputs
    with tr.patched(model, "tome:keep=1.0"):
        same = generate(model, inputs)
    with tr.patched(model, "tome:keep=0.6"):
        generate(model, inputs, 1)
    for got in (same, generate(model, inputs)):
        assert torch.equal(got[0], here.sequences)
        assert torch.equal(got[1], here.logits)
    assert not [k for m in model.modules() for k in vars(m) if "tokenreduce" in k]


@pytest.mark.parametrize("spec", [
    "tofu:keep=0.6", "evit:keep=0.6", "tome:keep=0.6+divprune:keep=0.5+fastv:keep=0.6", "pixelprune:keep=0.6",
    "pixel-diff:keep=0.6+divprune:keep=0.5",
])  # fmt: skip
@pytest.mark.parametrize("name", ["qwen3_5", "glm4v", "mistral3", "minicpmv4_6"])
def test_a_padded_batch_is_its_rows(name, spec):
    here = toy(name)
    if "pixel" in spec and not all("pixels" in t.evidence for t in tr.describe(here.model).towers):
        pytest.skip("its tower shows no pixels, which is refused by name")
    spec += ",layer=2" if "fastv" in spec else ""
    with tr.patched(here.model, spec), tr.record(here.model, flops=False) as trace:
        sequences, logits = generate(here.model, here.inputs)
        for b in range(2):
            alone, want = generate(here.model, row_of(here.inputs, b))
            assert torch.equal(sequences[b, -3:], alone[0, -3:])
            assert relative(logits[b], want[0]) < 1e-5
    # In the last each token of 2x2 patches has one that is left: only the tower is cheaper.
    acted = {s.stage for s in trace.steps if s.plan is not None}
    assert acted >= ({"encoder"} if name == "minicpmv4_6" else {"encoder", "projector"})
    assert relative(logits, here.logits) > 1e-3


@pytest.mark.parametrize("spec", ["pixelprune:keep=0.4", "pixel-diff:keep=0.7"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "glm4v", "exaone4_5"])
def test_units_dropped_by_pixels_are_left_out_of_the_stock_prompt(name, spec):
    """The stock language model on prompts without the columns of dropped units, row by row, so that linear attention
    has no key to hide; with M-RoPE positions are those of the full prompt. What the tower makes of the others is tested
    in tests/adapters/encoders/test_pixels.py."""
    here = toy(name)
    (tower,) = tr.describe(here.model).towers
    with tr.patched(tower.module, spec), tr.record(tower.module, flops=False) as trace:
        ready = features(here.model, here.inputs)
    stay = here.inputs["input_ids"] != IMAGE
    places = {s.plan.n: iter(s.plan.places()) for s in trace.steps if s.plan is not None}  # of images of a size
    stay[~stay] = torch.cat([next(places[units]) for units in (16, 8, 16)])
    with tr.patched(here.model, spec), tr.record(here.model, flops=False) as trace:
        sequences, logits = generate(here.model, here.inputs)
    (step,) = (s for s in trace.steps if s.stage == "projector")
    assert torch.equal(step.plan.sources() >= 0, stay)
    compact = not has_axes(here.model.model) and compact_too(here.model)
    want = short_prompts(replace(here, ready=ready), stay, sequences, compact=compact)
    assert relative(logits, want) < 1e-5
    assert relative(logits, here.logits) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@torch.no_grad()
def test_a_still_video_is_its_first_frame(name):
    """And one unit of every later one: a video's frames are compared with those before, and the language model is the
    stock one on what it would be given but for the columns of the others."""
    model = toy(name).model
    inputs, entered = prompts(VLMS["qwen3_vl"], ((6, "v"),)), {}
    pixels = inputs["pixel_values_videos"]
    inputs["pixel_values_videos"] = torch.cat([pixels[:32], pixels[:32]])
    stock = model(**inputs, logits_to_keep=1).logits
    with tr.patched(model, "pixel-diff"), tr.record(model, flops=False) as trace:
        got = model(**inputs, logits_to_keep=1).logits
    assert trace.steps[0].plan.places().sum(1).tolist() == [8, 1]
    stay = next(s for s in trace.steps if s.stage == "projector").plan.sources() >= 0
    video = inputs["input_ids"] == VIDEO
    assert torch.equal(stay[video], torch.arange(16) < 9)
    assert stay[~video].all()
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: entered.update(k), with_kwargs=True)
    with tr.patched(model.model.visual, "pixel-diff"):
        model(**inputs)
    hook.remove()
    (columns,) = (row.nonzero().flatten() for row in stay)
    out = model.model.language_model(
        inputs_embeds=entered["inputs_embeds"][:, columns], position_ids=entered["position_ids"][..., columns]
    )
    assert relative(got, model.lm_head(out.last_hidden_state[:, -1:])) < 1e-5
    assert relative(got, stock) > 1e-3


@pytest.mark.parametrize("spec", ["pixelprune:keep=1.0", "pixel-diff:keep=1.0"])
def test_all_pixels_are_the_stock_model_and_unpatched_it_is_again(spec):
    here = toy("qwen3_5")
    with tr.patched(here.model, spec):
        same = generate(here.model, here.inputs)
    with tr.patched(here.model, "pixelprune:keep=0.5"):
        generate(here.model, here.inputs, 1)
    for got in (same, generate(here.model, here.inputs)):
        assert torch.equal(got[0], here.sequences)
        assert torch.equal(got[1], here.logits)


def test_levels_are_those_of_the_processor():
    """Qwen3.5's divides by one half, as that of every Qwen3; rows that are no pixels are refused."""
    model, inputs = plain("qwen3_5")
    with pytest.raises(ValueError, match="give std"):
        tr.patch(model, "pixelprune:tolerance=2")
    model.config.name_or_path = "somebody/qwen3-5-of-no-cache"
    assert tr.describe(model).towers[0].std == (0.5,)
    assert {"pixelprune", "pixel-diff"} <= set(tr.describe(model).methods("encoder"))
    tr.unpatch(tr.patch(model, "pixelprune:tolerance=2"))
    model.config.name_or_path = ""
    with tr.patched(model.model.visual, "pixelprune"), pytest.raises(ValueError, match="not those of the patches"):
        model.model.visual(inputs["pixel_values"][:, :48], grid_thw=inputs["image_grid_thw"])


def test_what_a_budget_leaves_of_units_is_what_the_language_model_sees():
    here = toy("glm4v")
    with tr.patched(here.model, "tome:keep=0.5"), tr.record(here.model, flops=False) as trace:
        generate(here.model, here.inputs, 1)
    visual = here.inputs["input_ids"] == IMAGE
    inside = [s.tokens for s in trace.steps if s.stage == "encoder"]
    assert inside[-2:] == [8, 4]  # of 4x4 and 4x2 units
    (step,) = (s for s in trace.steps if s.stage == "projector")
    assert ((step.plan.sources() >= 0) & visual).sum(1).tolist() == [8, 4 + 8]


def test_methods_that_look_at_a_reduced_tower_are_refused_and_others_not():
    model = toy("qwen3_5").model
    with pytest.raises(ValueError, match=r"visionzip.* looks at what the vision tower saw .* choose one on embeddings"):
        tr.patch(model, "tome:keep=0.5+visionzip:keep=4,score=received")
    with pytest.raises(ValueError, match="frames is for"):
        tr.patch(model, "tome:keep=0.5,frames=2")
    with pytest.raises(ValueError, match="use resize@projector"):
        tr.patch(model, "resize@encoder:keep=0.5")
    assert "tome" in tr.describe(model).methods("encoder")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("aria", "step3p7") else pytest.mark.slow) for n in WITHOUT]
)
def test_what_cannot_be_reduced_says_why(name):
    if name not in families():
        pytest.skip("not in this release")
    model, _ = plain(name)
    assert WITHOUT[name] in encoder_refusal(model, find(model))
    with pytest.raises(ValueError, match=r"acts at stage encoder, which is not available .*: .*\(stages there:"):
        tr.patch(model, "tome:keep=0.5")


def test_stored_differences_cover_every_tower():
    """docs/models.json has a number of each, and the reason where nothing acts."""
    stored = json.loads((ROOT / "docs" / "models.json").read_text())
    assert set(EVERY) - set(stored) == set(), "run python tests/toys/measure.py docs/models.json"
    for name in EVERY:
        row = stored[name]
        if name in WITHOUT:
            assert WITHOUT[name] in row["no_encoder"]
        else:
            assert row["encoder"] < (5e-5 if name in NOISY else 1e-5)
    assert all(stored[name]["encoder"] < 1e-5 for name in TABLE)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "llava" else pytest.mark.slow) for n in TABLE])
def test_towers_of_the_table_by_the_same_oracle(name):
    far, changed = dropped_inside(toy(name))
    assert far < 1e-5
    assert changed > 1e-3


def test_the_tower_alone():
    model, inputs = plain("qwen3_5")
    tower = model.model.visual
    (found,) = tr.describe(tower).towers
    assert (found.family, found.hands) == ("transformers Qwen3_5VisionModel", "own")
    given = dict(hidden_states=inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    with torch.no_grad():
        stock = tower(**given).pooler_output
        with tr.patched(tower, "tome:keep=0.5"):
            got = tower(**given).pooler_output
    assert got.shape == stock.shape
    assert len(got.unique(dim=0)) <= 20 < len(stock.unique(dim=0))
