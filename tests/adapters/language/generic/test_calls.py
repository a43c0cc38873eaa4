"""Calls of a discovered model beyond one greedy generation: beams, static caches, later turns, labels, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from toys.build import IMAGE
from toys.checks import plain, stays, toy
from toys.oracles import _of_row, generate, relative, stock
from vlms import encodes_before

import tokenreduce as tr

pytestmark = pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")


SPEC = "random@projector:keep=0.4,positions=original"


def _short(here, stay, b):
    """The inputs of one row without what was dropped, for the stock ``generate``."""
    ids = here.inputs["input_ids"]
    columns = (stay[b] & here.inputs["attention_mask"][b].bool()).nonzero().flatten()
    more = {k: here.inputs[k][b : b + 1, columns] for k in ("mm_token_type_ids",) if k in here.inputs}
    return {
        "input_ids": ids[b : b + 1, columns], "attention_mask": torch.ones(1, len(columns), dtype=torch.long),
        "mm_encoder_outputs": {"image": _of_row(here.ready, ids, b, columns)},
        "position_ids": here.positions[..., b : b + 1, :][..., columns], **more,
    }  # fmt: skip


def test_beams_are_those_of_short_prompts():
    here = toy("qwen3_5")
    with tr.patched(here.model, SPEC):
        got, _ = generate(here.model, here.inputs, num_beams=3)
        with tr.record(here.model, flops=False) as trace:
            generate(here.model, here.inputs, 1)
    length = here.inputs["input_ids"].shape[1]
    for b in range(2):
        want, _ = generate(here.model, _short(here, stays(trace), b), num_beams=3)
        assert torch.equal(got[b, length:], want[0, -3:])


@pytest.mark.parametrize("name", ["qwen3_5", "glm4v", "gemma4"])
def test_static_caches(name):
    here = toy(name)
    with tr.patched(here.model, SPEC):
        dynamic, static = (generate(here.model, here.inputs, cache_implementation=c) for c in (None, "static"))
    assert torch.equal(dynamic[0], static[0])
    assert relative(static[1], dynamic[1]) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_5", "mistral3"])
def test_a_later_turn_goes_on_where_one_prompt_would(name):
    here = toy(name)
    model, inputs = here.model, here.inputs
    with tr.patched(model, SPEC), torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13], [14, 15, 16]])], 1)
        whole = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 6).long()], 1)}
        if "mm_token_type_ids" in inputs:
            whole["mm_token_type_ids"] = (ids == IMAGE).long()
        second = generate(model, {**whole, "past_key_values": first.cache})
        at_once = generate(model, {**inputs, **whole})
    assert torch.equal(second[0], at_once[0])
    assert relative(second[1], at_once[1]) < 1e-5


@pytest.mark.parametrize("name", ["glm4v", "mistral3"])
def test_without_a_cache_and_in_a_plain_forward(name):
    here = toy(name)
    with tr.patched(here.model, SPEC), torch.no_grad():
        want = generate(here.model, here.inputs)
        bare = generate(here.model, here.inputs, use_cache=False)
        plainly = here.model(**here.inputs).logits[:, -1]
        columns, valid = tr.kept_columns(here.model)
    assert relative(bare[1], want[1]) < 1e-5
    assert relative(plainly, want[1][:, 0]) < 1e-5
    assert columns.shape == valid.shape
    assert not valid.all()


def test_labels_stand_at_the_callers_columns():
    here = toy("mistral3")
    model, ids = here.model, here.inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | ~here.inputs["attention_mask"].bool(), -100)
    labels[torch.arange(2), here.inputs["attention_mask"].argmax(1)] = -100  # nothing real predicts a row's first token
    with tr.patched(model, SPEC), tr.record(model, flops=False) as trace, torch.no_grad():
        out = model(**here.inputs, labels=labels)
    assert out.logits.shape[1] == ids.shape[1]
    stay, losses = stays(trace), []
    for b in range(2):
        given = _short(here, stay, b)
        columns = (stay[b] & here.inputs["attention_mask"][b].bool()).nonzero().flatten()
        with torch.no_grad():
            logits = model(**given).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[b, columns][1:], reduction="none"))
    want = torch.cat(losses)
    want = want.sum() / (labels[:, 1:] != -100).sum()
    assert abs(float(out.loss - want)) < 1e-4


def test_interleaved_generations_and_copies():
    here = toy("mistral3")
    with tr.patched(here.model, SPEC) as model:
        twin = copy.deepcopy(model)
        assert torch.equal(generate(twin, here.inputs)[1], generate(model, here.inputs)[1])
        tr.unpatch(twin)
    assert torch.equal(generate(twin, here.inputs)[1], here.logits)


def test_a_class_written_here_is_found():
    """What counts is the structure: a subclass that no table and no release knows."""
    model, inputs = plain("mistral3")
    model.__class__ = type("Mine", (type(model),), {})
    model.model.__class__ = type("MyModel", (type(model.model),), {})
    about = tr.describe(model)
    assert about.language.how == "discovered"
    assert about.stages == ("language", "projector", "cache", "encoder")
    assert "discovered by its structure" in str(about)
    want = stock(model, inputs)
    with tr.patched(model, SPEC):
        assert relative(generate(model, inputs)[1], want.logits) > 1e-3


# -- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["blip_2", "instructblip"])
def test_an_own_generate_is_refused(name):
    from toys.build import build

    with pytest.raises(TypeError, match=r"its own generate calls self.language_model.generate"):
        tr.patch(build(name), "divprune:keep=0.5")


def test_what_comes_past_the_place_where_columns_go_is_refused():
    here = toy("mistral3")
    with tr.patched(here.model, SPEC), torch.no_grad():
        embeds = here.model.get_input_embeddings()(here.inputs["input_ids"])
        with pytest.raises(ValueError, match="merged embeddings past Mistral3Model"):
            here.model.model.language_model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
            here.model(inputs_embeds=embeds)
        text = {"input_ids": here.inputs["input_ids"].clamp(max=90)}
        want = here.model.model.language_model(**text)  # ids alone bring no image
    with torch.no_grad():
        got = here.model.model.language_model(**text)
    assert torch.equal(got[0], want[0])


def test_features_that_do_not_match_their_places():
    here = toy("mistral3")
    ids = here.inputs["input_ids"].clone()
    ids[0, -1] = IMAGE
    with tr.patched(here.model, SPEC), torch.no_grad(), pytest.raises(ValueError, match="41 places for image features"):
        here.model(**{**here.inputs, "input_ids": ids})


def test_methods_that_ask_for_what_is_not_known():
    model = toy("qwen3_5").model
    for spec, message in (
        ("visionzip:keep=4,score=cls", "the class token of the vision tower"),
        ("divprune:keep=0.5,positions=compact", "positions='compact' is not possible"),
        ("fastv:layer=1,keep=0.5", "would look at layer 0"),
        ("tome:r=2,frames=2", "frames is for"),
    ):
        with pytest.raises(ValueError, match=message):
            tr.patch(model, spec)
    with pytest.raises(ValueError, match="needs attention of the vision tower"):
        tr.patch(plain("got_ocr2")[0], "visionzip:keep=2,score=received")


def test_hybrids_say_where_a_method_can_act():
    with pytest.raises(ValueError, match=r"it can act before 2$"):
        tr.patch(toy("qwen3_5").model, "fastv:layer=3,keep=0.5")


def test_a_cache_of_another_patch_is_refused():
    here = toy("mistral3")
    with tr.patched(here.model, SPEC), torch.no_grad():
        cache = here.model(**here.inputs, use_cache=True).cache
    ids = torch.tensor([[5], [6]])
    mask = torch.cat([here.inputs["attention_mask"], torch.ones(2, 1).long()], 1)
    with (
        tr.patched(here.model, "divprune:keep=0.5"),
        torch.no_grad(),
        pytest.raises(ValueError, match="patch it as"),
    ):
        here.model(input_ids=ids, attention_mask=mask, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="not patched with that"):
        here.model(input_ids=ids, attention_mask=mask, cache=cache)
