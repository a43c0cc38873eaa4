"""The projector stage of every family. With original positions, dropping tokens before the language model is hiding
them as keys from layer 0 on; with compact ones it is a shorter prompt."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from vlms import IMAGE, VIDEO, VLMS, encodes_before, prompts, skip_static_windows
from vlms_masked import CASES, FILMS, FLAT, close, dropped_by, flash, generate, hidden, layers_of, shortened

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_of
from tokenreduce.adapters.language.projector.images import runs
from tokenreduce.algorithms.projector import Projector

#: Image features that are ready can be given to the model, which makes the reference for compact positions.
needs_ready_features = pytest.mark.skipif(not encodes_before(), reason="this transformers takes no mm_encoder_outputs")
ORIGINAL = tr.DivPrune(keep=0.3, positions="original")


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in VLMS for c in CASES if c != "video" or n in FILMS])
def test_generation_is_what_masking_would_give(name, case):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    settings = {"num_beams": 3} if case == "beams" else {}
    with tr.patched(vlm.model, ORIGINAL):
        sequences, logits, trace = generate(vlm.model, inputs, **settings)
    dropped = dropped_by(trace, inputs)
    (step,) = trace.steps
    assert (step.stage, step.layer, step.method) == ("projector", 0, ORIGINAL.spec())
    assert step.tokens == dropped.shape[1] - int(dropped.sum(1).min())
    assert case in ("alone", "two images") or len(set(dropped.sum(1).tolist())) > 1
    with hidden(layers_of(name, vlm.model), dropped, 0):
        want_sequences, want, _ = generate(vlm.model, inputs, **settings)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)
    far = generate(vlm.model, inputs, **settings)[1]
    assert float((far[:, 0] - logits[:, 0]).abs().max()) > 0.1, "the reduction changes something"


@pytest.mark.parametrize("name", VLMS)
def test_right_padding_in_a_forward(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"], "right")
    with torch.no_grad(), tr.patched(vlm.model, ORIGINAL), tr.record(vlm.model) as trace:
        got = vlm.model(**inputs).logits
    dropped = dropped_by(trace, inputs)
    with torch.no_grad(), hidden(layers_of(name, vlm.model), dropped, 0):
        want = vlm.model(**inputs).logits
    place = trace.plans[0].sources()
    for i, real in enumerate(inputs["attention_mask"].sum(1).tolist()):
        kept = (~dropped[i, :real]).nonzero().flatten()
        close(got[i, place[i, kept]], want[i, kept])


@pytest.mark.parametrize("spec", ["fastv:layer=1,keep=0.5", "fastv:layer=1,keep=0.6+fastv:layer=3,keep=0.4"])
@pytest.mark.parametrize("case", ["unequal", "beams"])
@pytest.mark.parametrize("name", VLMS)
def test_with_the_language_stage(name, case, spec):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    settings = {"num_beams": 3} if case == "beams" else {}
    with tr.patched(vlm.model, "divprune:keep=0.6,positions=original+" + spec):
        sequences, logits, trace = generate(vlm.model, inputs, **settings)
    assert [s.stage for s in trace.steps] == ["projector"] + ["language"] * spec.count("fastv")
    plan, gone = trace.plans[0], [trace.plans[0].sources() < 0]
    for later in trace.plans[1:]:
        plan = plan.then(later)
        gone.append(plan.sources() < 0)
        assert (gone[-1] & ~gone[-2]).any()
    layers = layers_of(name, vlm.model)
    ends = [1, 3, len(layers)] if len(gone) == 3 else [1, len(layers)]
    hooks = [hidden(layers[: ends[i]], g, [0, 1, 3][i]) for i, g in enumerate(gone)]
    for h in hooks:
        h.__enter__()
    try:
        want_sequences, want, _ = generate(vlm.model, inputs, **settings)
    finally:
        for h in hooks:
            h.__exit__()
    assert torch.equal(sequences, want_sequences)
    close(logits, want)


@needs_ready_features
@pytest.mark.parametrize("case", ["unequal", "alone", "two images"])
@pytest.mark.parametrize("name", FLAT)
def test_compact_positions_are_a_shorter_prompt(name, case):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    with tr.patched(vlm.model, tr.DivPrune(keep=0.3)):  # the default
        sequences, logits, trace = generate(vlm.model, inputs)
    want_sequences, want, _ = generate(vlm.model, shortened(vlm, inputs, dropped_by(trace, inputs)))
    assert torch.equal(sequences[:, -4:], want_sequences[:, -4:])
    close(logits, want)
    with tr.patched(vlm.model, ORIGINAL):
        far = generate(vlm.model, inputs)[1]
    assert float((far - logits).abs().max()) > 0.1, "positions matter"


@needs_ready_features
@pytest.mark.parametrize("name", ["llava", "video_llava", "internvl"])
def test_compact_positions_with_beams_and_the_language_stage(name):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    vlm, settings = VLMS[name], {"num_beams": 3}
    inputs = prompts(vlm, CASES["beams"])
    with tr.patched(vlm.model, "divprune:keep=6+fastv:layer=2,keep=0.4"):
        sequences, logits, trace = generate(vlm.model, inputs, **settings)
    short = shortened(vlm, inputs, trace.plans[0].sources()[::3] < 0)
    features = short["mm_encoder_outputs"]["image"].pooler_output
    each = torch.cat(list(features)).split(6)  # the library repeats images for beams
    each = list(each) if isinstance(features, list) else torch.stack(each)
    short["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=each)}
    with tr.patched(vlm.model, tr.FastV(layer=2, keep=0.4)):
        want_sequences, want, _ = generate(vlm.model, short, **settings)
    assert torch.equal(sequences[:, -4:], want_sequences[:, -4:])
    close(logits, want)


@needs_ready_features
@pytest.mark.parametrize("name", FLAT)
def test_compact_positions_without_mask_and_cache(name):
    """Position ids that stand still look like packed sequences to the library, if there is neither."""
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["alone"])
    assert inputs.pop("attention_mask").all()
    with torch.no_grad(), tr.patched(vlm.model, tr.DivPrune(keep=0.3)), tr.record(vlm.model) as trace:
        got = vlm.model(**inputs, use_cache=False).logits
    ones = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    short = shortened(vlm, ones, dropped_by(trace, inputs))
    with torch.no_grad():
        close(got, vlm.model(**{k: v for k, v in short.items() if k != "attention_mask"}, use_cache=False).logits)


@pytest.mark.parametrize("name", [n for n in VLMS if n not in FLAT])
def test_compact_positions_are_refused_where_they_cannot_be(name):
    vlm = VLMS[name]
    with pytest.raises(ValueError, match=r"positions='compact' is not possible .* set positions='original'"):
        tr.patch(vlm.model, "divprune:positions=compact")
    inputs = prompts(vlm, CASES["unequal"])
    with tr.patched(vlm.model, tr.DivPrune(keep=0.3)):
        got = generate(vlm.model, inputs)
    with tr.patched(vlm.model, ORIGINAL):
        want = generate(vlm.model, inputs)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", VLMS)
def test_keep_all_and_unpatch_are_bit_identical(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((5, "v"), (8, "iv")) if vlm.video else CASES["unequal"])
    before = generate(vlm.model, inputs)
    with tr.patched(vlm.model, "divprune:keep=1.0+fastv:keep=1.0"):
        same = generate(vlm.model, inputs)
        text = vlm.model.model.get_submodule(vlm.text)
        assert f"{type(text).__name__}[divprune:keep=1.0]" in repr(vlm.model)
    with tr.patched(vlm.model, tr.DivPrune(keep=3)):
        generate(vlm.model, inputs)
    after = generate(vlm.model, inputs)
    assert torch.equal(same[1], before[1])
    assert torch.equal(after[1], before[1])
    assert torch.equal(same[0], before[0])
    assert not [k for m in vlm.model.modules() for k in vars(m) if "tokenreduce" in k]


@pytest.mark.parametrize("name", ["llava", "llava_next_window", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3"])
@pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches(name, settings):
    skip_static_windows(name, settings)
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"])
    with tr.patched(vlm.model, tr.DivPrune(keep=0.3)):
        want = generate(vlm.model, inputs)
        got = generate(vlm.model, inputs, **settings)
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("rows", [("i",), ("i", "ii")], ids=["alone", "unequal"])
@pytest.mark.parametrize("name", VLMS)
def test_no_mask_and_no_cache(name, rows):
    vlm = VLMS[name]
    text = 7 + len(vlm.image)  # as many tokens in each row
    inputs = prompts(vlm, tuple((text - (len(kinds) - 1) * len(vlm.image), kinds) for kinds in rows))
    assert inputs.pop("attention_mask").all()
    if vlm.types == "prefix":  # and every token sees every other
        del inputs["token_type_ids"]
    with torch.no_grad(), tr.patched(vlm.model, ORIGINAL), tr.record(vlm.model) as trace:
        got = vlm.model(**inputs, use_cache=False).logits
    dropped = dropped_by(trace, inputs)
    with torch.no_grad(), hidden(layers_of(name, vlm.model), dropped, 0):
        want = vlm.model(**inputs, use_cache=False).logits
    place = trace.plans[0].sources()
    for i, gone in enumerate(dropped):
        close(got[i, place[i, ~gone]], want[i, ~gone])


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
@pytest.mark.parametrize("case", ["unequal", "alone"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_other_implementations(name, case, implementation, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    model = copy.deepcopy(vlm.model)
    with tr.patched(model, "divprune:keep=0.6+fastv:layer=2,keep=0.5"):
        want = generate(model, inputs)
        model.model.get_submodule(vlm.text).config._attn_implementation_internal = implementation
        got = generate(model, inputs)
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_rows_of_a_batch_and_threads_do_not_mix(positions):
    vlm = VLMS["llava"]
    asked = [prompts(vlm, rows) for rows in (CASES["unequal"], ((6, "i"), (8, "ii")), ((4, "ii"),))]
    with tr.patched(vlm.model, f"divprune:keep=5,positions={positions}+fastv:layer=1,keep=0.5"):
        want = [generate(vlm.model, p)[1] for p in asked]
        got: dict[int, torch.Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i: got.update({i: generate(vlm.model, asked[i])[1]})) for i in range(3)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for i, pixels in enumerate([slice(0, 1), slice(1, 3)]):
            ids = asked[0]["input_ids"][i][asked[0]["attention_mask"][i].bool()][None]
            alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            alone["pixel_values"] = asked[0]["pixel_values"][pixels]
            close(generate(vlm.model, alone)[1][0], want[0][i])
    assert all(torch.equal(got[i], want[i]) for i in range(3))


def test_copies_are_independent():
    model = copy.deepcopy(VLMS["qwen3_vl"].model)
    inputs = prompts(VLMS["qwen3_vl"], CASES["unequal"])
    tr.patch(model, tr.DivPrune(keep=4))
    want = generate(model, inputs)[1]
    other = copy.deepcopy(model)
    tr.unpatch(model)
    assert torch.equal(generate(other, inputs)[1], want)
    assert torch.equal(generate(tr.unpatch(other), inputs)[1], generate(model, inputs)[1])


def test_every_layer_caches_what_is_left():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((7, "i"), (7, "i")))
    full = inputs["input_ids"].shape[1]
    with torch.no_grad(), tr.patched(vlm.model, "divprune:keep=8+fastv:layer=2,keep=3"):
        out = vlm.model(**inputs, use_cache=True)
    assert [layer.keys.shape[2] for layer in cache_of(out).layers] == [full - 8, full - 8, full - 13, full - 13]


def test_embeddings_instead_of_ids_and_no_image():
    vlm = VLMS["llava_onevision"]
    inputs = prompts(vlm, CASES["video"])
    embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
    text = prompts(vlm, ((6, ""), (4, "")))
    before = generate(vlm.model, text)[1]
    with torch.no_grad(), tr.patched(vlm.model, tr.DivPrune(keep=4)):
        want = vlm.model(**inputs).logits
        assert want.shape[1] < inputs["input_ids"].shape[1]
        got = vlm.model(**{k: v for k, v in inputs.items() if k != "input_ids"}, inputs_embeds=embeds).logits
        assert torch.equal(generate(vlm.model, text)[1], before)
    assert torch.equal(got, want)


# -- the method's view of an image -------------------------------------------------------------------------------------


class Seen(Projector):
    """Keeps the first two tokens of every image, and remembers what it was shown."""

    whole = True

    def __init__(self, newlines="keep"):
        super().__init__(newlines=newlines)
        object.__setattr__(self, "seen", [])

    def plan(self, evidence):
        self.seen.append(evidence)
        return tr.Prune(evidence.n, torch.tensor([[0, 1]]).expand(evidence.batch, -1))

    def spec(self):
        return "seen"


def test_images_are_runs_of_placeholders():
    text = "..vvv.v" + "vv.vvv." + "vvvvvvv" + "......."
    visual = torch.tensor([c == "v" for c in text]).view(4, 7)

    def found(*more):
        return list(runs(visual, *more))

    assert found() == [(0, 2, 3), (0, 6, 1), (1, 0, 2), (1, 3, 3), (2, 0, 7)]
    starts = torch.zeros_like(visual)
    starts[2, 3] = starts[0, 0] = starts[1, 3] = True
    assert found(starts) == [(0, 2, 3), (0, 6, 1), (1, 0, 2), (1, 3, 3), (2, 0, 3), (2, 3, 4)]
    assert not list(runs(visual[3:]))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3"])
def test_a_method_sees_one_image_at_a_time(name):
    vlm, method = VLMS[name], Seen()
    inputs = prompts(vlm, ((5, "i"), (8, "iv")) if vlm.video else CASES["unequal"])
    with torch.no_grad():
        embeds = []
        hook = vlm.model.model.get_submodule(vlm.text).register_forward_pre_hook(
            lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        vlm.model(**inputs)
        hook.remove()
        with tr.patched(vlm.model, method), tr.record(vlm.model) as trace:
            vlm.model(**inputs)
    shown = torch.cat([row for e in method.seen for row in e.x])
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    number = sum(len(e.x) for e in method.seen)
    assert len(shown) == int(visual.sum())
    assert shown.sum(0).allclose(embeds[0][visual].sum(0), atol=1e-3)
    assert int((trace.plans[0].sources() >= 0)[visual].sum()) == 2 * number
    first = next(e for e in method.seen if e.n == 16)
    assert torch.equal(first.x[0], embeds[0][0][visual[0]])


@pytest.mark.parametrize("newlines", ["keep", "rank", "drop"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video"])
def test_row_ends_stay_unless_they_are_ranked(name, newlines):
    """Two crops side by side of 2x2 patches: a base image of 4, and rows of 4 patches and a row end."""
    vlm, method = VLMS[name], Seen(newlines)
    inputs = prompts(vlm, CASES["alone"])
    with torch.no_grad(), tr.patched(vlm.model, method), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    (evidence,) = method.seen
    ends = (evidence.x[0] == vlm.model.model.image_newline).all(-1)
    assert ends.nonzero().flatten().tolist() == ([8, 13] if newlines == "rank" else [])
    assert evidence.n == (14 if newlines == "rank" else 12)
    kept = (trace.plans[0].sources()[0] >= 0)[inputs["input_ids"][0] == IMAGE].nonzero().flatten().tolist()
    assert kept == ([0, 1, 8, 13] if newlines == "keep" else [0, 1])


class Needy(Seen, needs=("attention",)):
    pass


def test_what_cannot_hold_is_refused():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["alone"])
    with pytest.raises(
        ValueError, match=r"needs attention of the vision tower, which the CLIPVisionModel .*Methods that fit"
    ):
        tr.patch(vlm.model, Needy())
    with pytest.raises(ValueError, match="newlines='rank' is for methods that look at embeddings alone"):
        tr.patch(vlm.model, tr.FasterVLM(keep=4, newlines="rank"))
    for name in ("uniform@projector", "aim-merge", "pool"):
        with pytest.raises(ValueError, match="newlines='rank' is for methods that choose among all tokens of an image"):
            tr.patch(VLMS["llava_next"].model, f"{name}:keep=4,newlines=rank")
    with pytest.raises(
        ValueError,
        match=r"needs the class token .* the SiglipVisionModel .*score='received'.*Methods that fit",
    ):
        tr.patch(VLMS["paligemma"].model, tr.FasterVLM(keep=4, score="cls"))
    with pytest.raises(ValueError, match="layer=3: the vision encoder has layers 0 to 2"):
        tr.patch(vlm.model, tr.FasterVLM(keep=4, layer=3))
    with pytest.raises(ValueError, match=r"both act before the language model; choose one"):
        tr.patch(vlm.model, "divprune+divprune:keep=4")
    described = tr.describe(vlm.model)
    assert "divprune" in described.methods("projector")
    assert "projector model: visual tokens of every image" in str(described)
    with tr.patched(vlm.model, tr.DivPrune(keep=4)), torch.no_grad():
        cache = vlm.model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="made for a batch of 1 and is used for 2"):
            vlm.model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


# -- later turns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3"])
def test_steps_without_position_ids(name):
    """A hand-written loop leaves positions to the library, which counts the cache."""
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["alone"])
    inputs.pop("attention_mask")

    def steps():
        with torch.no_grad():
            out = vlm.model(**inputs, use_cache=True)
            logits = []
            for token in (5, 17, 30):
                out = vlm.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
                logits.append(out.logits[:, -1])
        return torch.stack(logits)

    with tr.patched(vlm.model, ORIGINAL), tr.record(vlm.model) as trace:
        got = steps()
    with hidden(layers_of(name, vlm.model), dropped_by(trace, inputs), 0):
        want = steps()
    close(got, want)
    if name == "llava" and encodes_before():
        with tr.patched(vlm.model, tr.DivPrune(keep=0.3)):
            compact = steps()
        ones = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        inputs = shortened(vlm, ones, dropped_by(trace, inputs))
        close(compact, steps())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
def test_generate_again_on_the_cache(name, whole):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["alone"])
    settings = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    more = torch.tensor([[15, 17, 30, 22]])

    def turns(whole):
        first = vlm.model.generate(**inputs, **settings)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.ones_like(ids)
        # generate leaves its last token out of the cache
        given = ids if whole else ids[:, -more.shape[1] - 1 :]
        out = vlm.model.generate(
            input_ids=given, attention_mask=mask, past_key_values=first.past_key_values, **settings
        )
        return torch.stack(out.logits, 1)

    with torch.no_grad():
        with tr.patched(vlm.model, ORIGINAL), tr.record(vlm.model) as trace:
            got = turns(whole)
        with hidden(layers_of(name, vlm.model), dropped_by(trace, inputs), 0):
            want = turns(True)
    close(got, want)


def test_a_cache_can_be_used_by_its_length():
    """It counts what the caller gave, so that new tokens and masks are found as on an unpatched model; a mask of what
    the layers hold is an error."""
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["alone"])
    with torch.no_grad(), tr.patched(vlm.model, tr.DivPrune(keep=4)):
        ids = torch.cat([inputs["input_ids"], torch.tensor([[15, 17]])], 1)
        length = ids.shape[1]
        made = []
        for given in ({}, {"attention_mask": torch.ones_like(ids)}):
            cache = vlm.model(**inputs, use_cache=True).past_key_values
            assert cache.get_seq_length() == length - 2
            assert cache.layers[0].get_seq_length() == length - 2 - 12
            new = ids[:, cache.get_seq_length() :]
            made.append(vlm.model(input_ids=new, past_key_values=cache, **given).logits)
        close(*made)
        short = {"input_ids": ids[:, -1:], "attention_mask": torch.ones(1, length - 12 + 1)}
        with pytest.raises(ValueError, match=f"attention_mask has {length - 11} columns for {length + 1} tokens"):
            vlm.model(**short, past_key_values=cache)


def test_training_passes_gradients_only_through_what_is_left():
    vlm = VLMS["qwen3_vl"]
    inputs = prompts(vlm, CASES["unequal"])
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(vlm.model).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with tr.patched(model, "divprune:keep=0.6+fastv:layer=3,keep=0.4"), tr.record(model) as trace:
            model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        assert len(trace.plans) == 2
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 20
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
