"""Comparing generations: counts against the cache and a plain generate, places in the image, forms of prompts."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_folders import save_all
from vlms import IMAGE, VLMS, prompts

import tokenreduce as tr
from tokenreduce.bench.vlms import LoadedVlm, load_vlm
from tokenreduce.core.plan import Merge, Prune
from tokenreduce.core.trace import Step, ViewPlan
from tokenreduce.measure.generation import compare, follow, patches_left
from tokenreduce.measure.kept import Place, draw_kept, places
from tokenreduce.measure.question import Question, ask

NAMES = ("llava", "qwen2_5_vl")
SPEC = "divprune:keep=0.3+fastv:layer=2,keep=0.5"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedVlm]:
    folders = save_all(tmp_path_factory.mktemp("vlms"))
    return {name: load_vlm(str(folder), "cpu") for name, folder in folders.items()}


def photo(width: int = 100, height: int = 80, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(vlm: LoadedVlm, question: Question, tokens: int) -> tuple[int, ...]:
    out = vlm.model.generate(**question.inputs, max_new_tokens=tokens, do_sample=False)
    return tuple(out[0, question.inputs["input_ids"].shape[1] :].tolist())


# -- comparing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_both_answers_are_those_of_generate(name: str, loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded[name]
    question = ask(vlm.processor, [photo(), photo(60, 90, 1)], "what is near the cat?")
    result = compare(vlm.model, vlm.processor, question, SPEC, max_new_tokens=6, rounds=1)
    assert tr.describe(vlm.model).active == ()
    assert result.stock.ids == plain(vlm, question, 6)
    with tr.patched(vlm.model, SPEC):
        assert result.reduced.ids == plain(vlm, question, 6)
    assert result.stock.answer == vlm.processor.tokenizer.decode(result.stock.ids, skip_special_tokens=True).strip()
    assert result.stock.ids != result.reduced.ids  # of wide random weights
    assert not result.agree
    assert result.common < 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [SPEC, "pyramiddrop", "sparsevlm", "divprune:keep=5", "fastv:layer=1,keep=0.25"])
def test_the_cache_holds_the_tokens_that_are_counted(name: str, spec: str, loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded[name]
    question = ask(vlm.processor, [photo()], "what is in this image?")
    result = compare(vlm.model, vlm.processor, question, spec, max_new_tokens=1, rounds=1)
    columns = question.inputs["input_ids"].shape[1]
    visual = int((question.inputs["input_ids"] == IMAGE).sum())
    assert result.stock.layers == (visual,) * 4
    assert result.reduced.mean_tokens < visual
    each = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32
    for side in (result.stock, result.reduced):
        assert side.cache == sum(columns - visual + here for here in side.layers) * each
        assert side.step is None  # one token has no decoding
    assert result.ratios()["tokens_per_s"] is None
    assert result.sites[0].before == visual
    assert result.sites[-1].after == result.reduced.layers[-1]


def test_counts_by_hand(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [photo()], "what?")
    result = compare(vlm.model, vlm.processor, question, SPEC, max_new_tokens=2, rounds=2)
    assert [(s.stage, s.layer, s.before, s.after) for s in result.sites] == [
        ("projector", None, 64, 19),
        ("language", 2, 19, 10),
    ]
    assert result.reduced.layers == (19, 19, 10, 10)
    assert result.reduced.encoder == result.stock.encoder == 64
    ratios = result.ratios()
    assert ratios["entry_tokens"] == pytest.approx(64 / 19)
    assert ratios["mean_layer_tokens"] == pytest.approx(64 / 14.5)
    for side in (result.stock, result.reduced):
        assert len(side.first.times) == 2
        assert side.step is not None
        assert min(*side.first.times, *side.step.times) > 0


@pytest.mark.parametrize("name", NAMES)
def test_choices_in_decode_are_told(name: str, loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded[name]
    question = ask(vlm.processor, [photo()], "what is in this image?")
    entry = int((question.inputs["input_ids"] == IMAGE).sum())
    hidden = compare(vlm.model, vlm.processor, question, "dycoke-cache:layer=2,keep=5", max_new_tokens=4, rounds=1)
    assert hidden.looked == ((2, "dycoke-cache:layer=2,keep=5", 5.0, 0.0),)
    assert hidden.reduced.layers == (entry,) * 4
    spec = "lazyllm:pruning_layers=[1,3],keep=4"
    back = compare(vlm.model, vlm.processor, question, spec, max_new_tokens=4, rounds=1)
    (one, method, _, came), (three, _, seen, _) = back.looked
    assert (one, three, method, seen) == (1, 3, spec, 4.0)
    assert came > 0
    assert back.to_dict()["decode"][1] == {
        "layer": 3, "method": spec, "mean_tokens": 4.0, "mean_came_back": back.looked[1][3],
    }  # fmt: skip
    plain = compare(vlm.model, vlm.processor, question, SPEC, max_new_tokens=2, rounds=1)
    assert plain.looked == ()


def test_a_budget_that_keeps_everything_agrees(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["qwen2_5_vl"]
    question = ask(vlm.processor, [photo()], "what?")
    result = compare(vlm.model, vlm.processor, question, "fastv:layer=1,keep=1.0", max_new_tokens=4, rounds=1)
    assert result.agree
    assert result.common == len(result.stock.ids) == 4
    counted = {k: v for k, v in result.ratios().items() if not k.endswith("_s")}
    # The method scores tokens all the same, and that is work.
    assert 0.99 < counted.pop("flops") < 1
    assert set(counted.values()) == {1.0}


def test_timed_rounds_go_on_behind_the_end_of_the_answer(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [photo()], "what?")
    config = vlm.model.generation_config
    answer, before = plain(vlm, question, 2), config.eos_token_id
    calls: list[int] = []
    hook = vlm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    config.eos_token_id = answer[1]
    try:
        result = compare(vlm.model, vlm.processor, question, "fastv:layer=1,keep=1.0", max_new_tokens=5, rounds=2)
    finally:
        config.eos_token_id = before
        hook.remove()
    assert result.stock.ids == answer
    # Per variant: one look at the prefill, the answer of two tokens, two rounds of five.
    assert len(calls) == 2 * (1 + 2 + 2 * 5)


class Decoder:
    """What ``compare`` needs of a processor."""

    @staticmethod
    def batch_decode(ids: list[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


def given(name: str, kinds: str = "i") -> Question:
    return Question("?", tuple(photo(seed=i) for i in range(len(kinds))), "?", prompts(VLMS[name], ((9, kinds),)))


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "internvl", "idefics3", "paligemma", "gemma3"])
def test_families(name: str) -> None:
    question, vlm = given(name), VLMS[name]
    result = compare(vlm.model, Decoder(), question, SPEC, max_new_tokens=3, rounds=1)
    visual = vlm.image.count(IMAGE)
    assert result.stock.layers == (visual,) * 4
    assert result.reduced.layers[0] < visual
    assert result.reduced.layers[2] < result.reduced.layers[1]
    assert result.reduced.cache < result.stock.cache
    out = vlm.model.generate(**question.inputs, max_new_tokens=3, do_sample=False)
    assert result.stock.answer == " ".join(map(str, out[0, -3:].tolist()))


def test_what_cannot_be_compared(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [photo()], "what?")
    for bad in ({"max_new_tokens": 0}, {"rounds": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is an int >= 1, not 0"):
            compare(vlm.model, vlm.processor, question, SPEC, **bad)
    with (
        tr.patched(vlm.model, "fastv:layer=1"),
        pytest.raises(ValueError, match=r"patched already; call tr\.unpatch\(model\) first"),
    ):
        compare(vlm.model, vlm.processor, question, SPEC)
    with pytest.raises(ValueError, match="layer=9: the language model has layers 0 to 3"):
        compare(vlm.model, vlm.processor, question, "fastv:layer=9")
    none = Question("?", question.images, "?", {**question.inputs, "input_ids": torch.full((1, 8), 5)})
    with pytest.raises(ValueError, match="no visual tokens"):
        compare(vlm.model, vlm.processor, none, SPEC)
    assert tr.describe(vlm.model).active == ()


def test_merging_inside_the_vision_encoder(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [photo()], "what?")
    result = compare(vlm.model, vlm.processor, question, "tome:r=8+fastv:layer=2", max_new_tokens=2, rounds=1)
    assert (result.stock.encoder, result.reduced.encoder) == (
        64,
        64 - 2 * 8,
    )  # the projector reads the last block but one
    first, second = result.sites
    assert (first.stage, first.method, first.before) == ("projector", "tome:r=8", 64)
    assert first.after == second.before < 64
    columns = question.inputs["input_ids"].shape[1]
    assert result.reduced.cache == sum(columns - 64 + here for here in result.reduced.layers) * 128
    draw_kept(result, places(vlm.model, vlm.processor, question), side=64)


@pytest.mark.parametrize("spec", ["tome:r=2", "mustdrop-merge:threshold=0.0,window=2", "tome:r=2+divprune:keep=3"])
def test_merging_inside_a_packed_encoder(spec: str, loaded: dict[str, LoadedVlm]) -> None:
    """Two images of one size and one of another, which may keep different numbers of 2x2 units."""
    vlm = loaded["qwen2_5_vl"]
    question = ask(vlm.processor, [photo(), photo(seed=1), photo(60, 90, 2)], "what?")
    result = compare(vlm.model, vlm.processor, question, spec, max_new_tokens=1, rounds=1)
    assert result.stock.encoder == 4 * result.stock.layers[0] > result.reduced.encoder
    if "mustdrop" not in spec:
        assert result.stock.encoder - result.reduced.encoder == 3 * 2 * 2 * 4  # images, blocks, r, patches
    if "divprune" not in spec:  # a unit that is left is a visual token
        assert result.reduced.encoder == 4 * result.reduced.layers[0]


def test_looking_at_the_tower_is_no_site(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [photo()], "what?")
    result = compare(vlm.model, vlm.processor, question, "mustdrop:keep=4", max_new_tokens=1, rounds=1)
    assert {s.method for s in result.sites} == {"mustdrop:keep=4"}
    assert result.reduced.layers[0] == 64
    assert result.reduced.layers[-1] == result.sites[-1].after == 4


def test_encoder_steps_count_the_patches_that_are_left(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [photo(), photo(seed=1)], "what?")
    steps = [Step("encoder", 0, 41), Step("encoder", 1, 33), Step("projector", 0, 20)]
    assert patches_left(vlm.model, question, 128, steps) == 2 * 32  # the class token is no patch
    assert patches_left(vlm.model, question, 128, steps[2:]) == 128


# -- following columns -------------------------------------------------------------------------------------------------
def test_columns_are_followed_through_merges_and_unordered_plans() -> None:
    # Six columns; 1 and 4 become one token at 4's place or later, 2 is gone, and outputs are not in order.
    merge = Merge.from_assignment(torch.tensor([[2, 1, -1, 0, 1, 3]]), 4)
    prune = Prune(4, torch.tensor([[0, 2]]))
    steps = [
        Step("encoder", 0, 5),
        Step("projector", 0, 4, merge),
        Step("language", 1, 4),
        Step("language", 2, 2, prune),
    ]
    behind = follow(steps, 6)
    assert [s.stage for s, _ in behind] == ["projector", "language", "language"]
    first = merge.representatives()[0]
    place = {int(output): i for i, output in enumerate(first.argsort())}
    want = [place[2], place[1], -1, place[0], place[1], place[3]]
    assert behind[0][1].tolist() == behind[1][1].tolist() == want
    assert behind[2][1].tolist() == [{0: 0, 2: 1}.get(w, -1) for w in want]


def test_merges_before_the_language_model_are_followed_to_the_columns_that_they_take() -> None:
    # Columns 1-4 are visual; 1 and 3 merge, 2 is dropped, 4 stays; behind a class token, which takes no column.
    plan = Merge.from_assignment(torch.tensor([[0, 2, -1, 2, 1]]), 3)
    hosts = torch.tensor([[-1, 1, 4]])  # outputs in another order than their columns
    stay = Prune(6, torch.tensor([[0, 1, 4, 5]]))
    parts = (ViewPlan(torch.tensor([[0]]), torch.tensor([[1, 2, 3, 4]]), plan),)
    ((_, where),) = follow([Step("projector", 0, 4, stay, "m", parts, (hosts,))], 6)
    assert where.tolist() == [0, 2, -1, 2, 1, 3]


@pytest.mark.parametrize("name", NAMES)
def test_merging_methods_name_every_token_that_is_left(name: str, loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded[name]
    question = ask(vlm.processor, [photo()], "what?")
    result = compare(vlm.model, vlm.processor, question, "visionzip:keep=12+fastv:layer=2", max_new_tokens=1, rounds=1)
    assert [s.after for s in result.sites] == [12, 6]
    (_, before), (_, inside) = follow(result.steps, len(result.visual))
    mine = before[result.visual]
    assert int((mine >= 0).sum()) > 12  # several patches in one token
    groups = {int(place): set((before == place).nonzero().flatten().tolist()) for place in mine[mine >= 0].unique()}
    assert len(groups) == 12 - (name == "llava")  # one is the class token there
    alone = [{i} for i in range(len(before))]
    for place in inside[inside >= 0].unique():  # a token goes or stays with all that is in it
        assert set((inside == place).nonzero().flatten().tolist()) in [*groups.values(), *alone]
    draw_kept(result, places(vlm.model, vlm.processor, question), side=64)


# -- places and pictures -----------------------------------------------------------------------------------------------
class Resizing:
    """An image processor that halves contrast around grey and resizes to 32 x 32."""

    @staticmethod
    def image_processor(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        array = torch.from_numpy(np.array(images.resize((32, 32)))).float().permute(2, 0, 1)
        return {"pixel_values": (array / 255 - 0.5)[None] * 2}


@pytest.mark.parametrize("name", ["llava", "internvl", "idefics3", "smolvlm", "paligemma", "gemma3"])
def test_places_of_square_images(name: str) -> None:
    question = given(name, "ii")
    found = places(VLMS[name].model, Resizing, question)
    columns = (question.inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert [p.grid for p in found] == [(4, 4), (4, 4)]
    assert torch.equal(torch.cat([p.columns for p in found]), columns)
    assert np.array_equal(found[1].seen, photo(seed=1).resize((32, 32)))


def test_places_of_images_of_different_sizes(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["qwen2_5_vl"]
    question = ask(vlm.processor, [photo(96, 48), photo(40, 80, 1)], "what?")
    first, second = places(vlm.model, vlm.processor, question)
    grids = question.inputs["image_grid_thw"]
    assert [first.grid, second.grid] == [(int(h) // 2, int(w) // 2) for _, h, w in grids]
    assert first.grid[1] > first.grid[0]
    assert second.grid[0] > second.grid[1]
    assert (first.seen.width, first.seen.height) == (8 * first.grid[1], 8 * first.grid[0])
    columns = (question.inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert torch.equal(torch.cat([first.columns, second.columns]), columns)


def test_the_crop_that_the_model_saw(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    image = Image.new("RGB", (192, 64), "red")
    image.paste("blue", (64, 0, 128, 64))  # the middle third is all that a centre crop leaves
    (place,) = places(vlm.model, vlm.processor, ask(vlm.processor, [image], "what?"))
    assert place.grid == (8, 8)
    assert abs(np.asarray(place.seen, dtype=int) - np.array([0, 0, 255])).max() <= 2


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiled_images_are_an_overview_and_all_crops_together(name: str) -> None:
    """Two crops side by side: an overview of 2x2, then two rows of four tokens with a row end each."""
    question = given(name)
    overview, crops = places(VLMS[name].model, Resizing, question)
    columns = (question.inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert (overview.grid, crops.grid) == ((2, 2), (2, 4))
    assert torch.equal(overview.columns, columns[:4])
    assert torch.equal(crops.columns, columns[[4, 5, 6, 7, 9, 10, 11, 12]])
    assert tr.describe(VLMS[name].model).active == ()


@pytest.mark.parametrize("name", ["internvl"])
def test_tiles_without_places_are_refused(name: str) -> None:
    question = given(name)
    question.inputs["pixel_values"] = torch.cat([question.inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match=r"cannot tell where the 16 visual tokens .*LLaVA-1\.5, Qwen-VL"):
        places(VLMS[name].model, Resizing, question)


def test_the_picture_dims_what_is_gone(loaded: dict[str, LoadedVlm]) -> None:
    vlm = loaded["llava"]
    question = ask(vlm.processor, [Image.new("RGB", (64, 64), "white")], "what?")
    result = compare(vlm.model, vlm.processor, question, SPEC, max_new_tokens=1, rounds=1)
    where = places(vlm.model, vlm.processor, question)
    drawn = np.asarray(draw_kept(result, where, side=256))
    left = [behind[where[0].columns].view(8, 8) >= 0 for _, behind in follow(result.steps, len(result.visual))]
    assert [int(x.sum()) for x in left] == [19, 10]
    half = drawn.shape[0] // 2
    for i, kept in enumerate(left):
        body = drawn[(i + 1) * half - 12 - 256 : (i + 1) * half - 12, 24 + 256 : 24 + 512]
        middles = body[16::32, 16::32].mean(-1)
        assert np.array_equal(middles > 200, kept.numpy())


def test_nothing_to_draw(loaded: dict[str, LoadedVlm]) -> None:
    result = SimpleNamespace(steps=(), visual=torch.ones(4, dtype=torch.bool), spec="x", sites=())
    with pytest.raises(ValueError, match="x does nothing before or inside the language model"):
        draw_kept(result, [Place(torch.arange(4), (2, 2), photo())])  # type: ignore[arg-type]


# -- prompts -----------------------------------------------------------------------------------------------------------
def test_forms_of_prompts(loaded: dict[str, LoadedVlm]) -> None:
    llava, qwen = loaded["llava"].processor, loaded["qwen2_5_vl"].processor
    assert ask(llava, [photo()] * 2, "what?").text == "USER: <image>\n<image>\nwhat? ASSISTANT:"
    assert ask(llava, [photo()], "<image> a cat").text == "<image> a cat"
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert ask(qwen, [photo()] * 2, "what?").text == (
        f"<|im_start|>user : {pad}{pad}what?<|im_end|><|im_start|>assistant : "
    )


def test_a_template_may_write_the_beginning_of_sequence(loaded: dict[str, LoadedVlm], monkeypatch) -> None:
    from tokenizers.processors import TemplateProcessing

    processor = loaded["llava"].processor
    backend = processor.tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    try:
        assert ask(processor, [photo()], "cat").inputs["input_ids"][0].tolist().count(1) == 1
        monkeypatch.setattr(processor, "chat_template", "<s> <image> {{ messages[0]['content'][-1]['text'] }}")
        assert ask(processor, [photo()], "cat").inputs["input_ids"][0].tolist().count(1) == 1
    finally:
        backend.post_processor = before


def test_paligemma_gets_images_and_prompt_without_labels(loaded: dict[str, LoadedVlm]) -> None:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    pixels = SiglipImageProcessor(size={"height": 32, "width": 32})
    pixels.image_seq_length = 16
    processor = PaliGemmaProcessor(pixels, copy.deepcopy(loaded["llava"].processor.tokenizer))
    question = ask(processor, [photo()], "what?")
    assert question.text == "<image>what?"
    assert int((question.inputs["input_ids"] == IMAGE).sum()) == 16
    assert "labels" not in question.inputs


def test_bad_prompts(loaded: dict[str, LoadedVlm], monkeypatch) -> None:
    processor = loaded["llava"].processor
    with pytest.raises(ValueError, match="the prompt is empty"):
        ask(processor, [photo()], " \n")
    with pytest.raises(ValueError, match="no image is given"):
        ask(processor, [], "what?")
    with pytest.raises(ValueError, match="the prompt has 2 <image> for 1 image;"):
        ask(processor, [photo()], "<image> <image> what?")
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="chat template writes no <image>"):
        ask(processor, [photo()], "what?")
    bare = SimpleNamespace(tokenizer=processor.tokenizer, chat_template=None)
    with pytest.raises(ValueError, match="neither a chat template nor an image_token"):
        ask(bare, [photo()], "what?")


def test_folders_never_ask_the_network(tmp_path: Path, loaded: dict[str, LoadedVlm], monkeypatch) -> None:
    import transformers

    seen: list[bool] = []
    for kind in (transformers.AutoConfig, transformers.AutoProcessor, transformers.AutoModelForImageTextToText):
        original = kind.from_pretrained
        monkeypatch.setattr(
            kind, "from_pretrained",
            lambda *a, original=original, **k: seen.append(k["local_files_only"]) or original(*a, **k),
        )  # fmt: skip
    again = load_vlm("hf:" + loaded["llava"].name, "cpu", "bf16")
    assert len(seen) >= 3  # the processor looks at the configuration again
    assert all(seen)
    assert again.dtype == torch.bfloat16
    assert not again.model.training
