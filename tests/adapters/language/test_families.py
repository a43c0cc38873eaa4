"""Every family of image/video language models against the masking oracle: dropping visual tokens at layer k is hiding
them as keys from layer k on, whatever mask the model makes (windows, prefixes, padding)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.utils.checkpoint
from toys.build import inner_of
from toys.checks import plain
from vlms import VLMS, encodes_before, prompts, skip_static_windows
from vlms_masked import CASES, FILMS, close, dropped_by, flash, generate, hidden, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.families import FAMILIES, Family
from tokenreduce.adapters.language.find import find


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("name", "case"), [(n, c) for n in VLMS for c in CASES if c != "video" or n in FILMS])
def test_generation_is_what_masking_would_give(name, case, layer):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    settings = {"num_beams": 3} if case == "beams" else {}
    with tr.patched(vlm.model, tr.FastV(layer=layer, keep=0.3)):
        sequences, logits, trace = generate(vlm.model, inputs, **settings)
    dropped = dropped_by(trace, inputs)
    assert case in ("alone", "two images") or len(set(dropped.sum(1).tolist())) > 1
    with hidden(layers_of(name, vlm.model), dropped, layer):
        want_sequences, want, _ = generate(vlm.model, inputs, **settings)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", VLMS)
def test_right_padding_in_a_forward(name, layer):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"], "right")
    with torch.no_grad(), tr.patched(vlm.model, tr.FastV(layer=layer, keep=0.3)), tr.record(vlm.model) as trace:
        got = vlm.model(**inputs).logits
    dropped = dropped_by(trace, inputs)
    with torch.no_grad(), hidden(layers_of(name, vlm.model), dropped, layer):
        want = vlm.model(**inputs).logits
    with torch.no_grad():
        far = vlm.model(**inputs).logits
    place = trace.plans[0].sources()
    for i, real in enumerate(inputs["attention_mask"].sum(1).tolist()):
        kept = (~dropped[i, :real]).nonzero().flatten()
        close(got[i, place[i, kept]], want[i, kept])
        assert float((far[i, real - 1] - want[i, real - 1]).abs().max()) > 0.1, "the reduction changes something"


@pytest.mark.parametrize("name", VLMS)
def test_keep_all_and_unpatch_are_bit_identical(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((5, "v"), (8, "iv")) if vlm.video else CASES["unequal"])
    before = generate(vlm.model, inputs)
    with tr.patched(vlm.model, tr.FastV(layer=1, keep=1.0)):
        same = generate(vlm.model, inputs)
    with tr.patched(vlm.model, tr.FastV(layer=2, keep=3)):
        generate(vlm.model, inputs)
    after = generate(vlm.model, inputs)
    assert torch.equal(same[1], before[1])
    assert torch.equal(after[1], before[1])
    assert torch.equal(same[0], before[0])


def test_every_family_is_here():
    import transformers

    assert {vlm.inner for vlm in VLMS.values()} == set(FAMILIES)
    for name, vlm in VLMS.items():
        assert isinstance(vlm.model.model, getattr(transformers, vlm.inner))
        assert tr.describe(vlm.model).language.layers == tuple(layers_of(name, vlm.model))


@pytest.mark.parametrize("name", VLMS)
def test_scores_are_the_attention_of_the_layer_before(name):
    """Windows and prefixes included: eager attention, which shows its weights, ranks the tokens the same."""
    if name == "paligemma2" and not encodes_before():
        pytest.skip("this transformers leaves the softcap out under sdpa, so eager is another model")
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"])
    for layer in (1, 2):
        with tr.patched(vlm.model, tr.FastV(layer=layer, keep=5)), tr.record(vlm.model) as trace, torch.no_grad():
            vlm.model(**inputs)
        dropped = dropped_by(trace, inputs)
        eager = copy.deepcopy(vlm.model)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            rows = eager(**inputs, output_attentions=True).attentions[layer - 1][:, :, -1].mean(1)
        for i, visual in enumerate(inputs["input_ids"] == 99):
            places = visual.nonzero().flatten().tolist()
            best = sorted(places, key=lambda p: (-float(rows[i, p]), p))[:5]
            assert (visual & ~dropped[i]).nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "llava_next_window", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3"])
def test_two_cuts(name, implementation):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"])
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation(implementation)
    with tr.patched(model, "fastv:layer=1,keep=0.6+fastv:layer=3,keep=0.4"):
        sequences, logits, trace = generate(model, inputs)
    first, both = trace.plans[0].sources() < 0, trace.plans[0].then(trace.plans[1]).sources() < 0
    assert (both & ~first).any()
    layers = layers_of(name, model)
    with hidden(layers, both, 3), hidden(layers[:3], first, 1):
        want_sequences, want, _ = generate(model, inputs)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)


@pytest.mark.parametrize("name", ["llava_next_window", "qwen2_vl", "qwen3_vl", "idefics3", "paligemma", "gemma3"])
def test_static_cache(name):
    vlm = VLMS[name]
    skip_static_windows(name, {"cache_implementation": "static"})
    inputs = prompts(vlm, CASES["unequal"])
    with tr.patched(vlm.model, tr.FastV(layer=1, keep=0.3)):
        want = generate(vlm.model, inputs)
        got = generate(vlm.model, inputs, cache_implementation="static")
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("rows", [("i",), ("i", "ii")], ids=["alone", "unequal"])
@pytest.mark.parametrize("name", VLMS)
def test_no_mask_and_no_cache(name, rows):
    """Without a mask and a cache the library looks for packed sequences in position ids."""
    vlm = VLMS[name]
    text = 7 + len(vlm.image)  # as many tokens in each row
    inputs = prompts(vlm, tuple((text - (len(kinds) - 1) * len(vlm.image), kinds) for kinds in rows))
    assert inputs.pop("attention_mask").all()
    if vlm.types == "prefix":  # and every token sees every other
        del inputs["token_type_ids"]
    with torch.no_grad(), tr.patched(vlm.model, tr.FastV(layer=2, keep=0.3)), tr.record(vlm.model) as trace:
        got = vlm.model(**inputs, use_cache=False).logits
    dropped = dropped_by(trace, inputs)
    with torch.no_grad(), hidden(layers_of(name, vlm.model), dropped, 2):
        want = vlm.model(**inputs, use_cache=False).logits
    place = trace.plans[0].sources()
    for i, gone in enumerate(dropped):
        close(got[i, place[i, ~gone]], want[i, ~gone])


@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize(
    ("spec", "layer", "name"),
    [
        (spec, layer, name)
        for spec, layer in (("fastv:layer=1,keep=0.3", 1), ("divprune:keep=0.3,positions=original", 0))
        for name in ("llava", "llava_next_window", "gemma3", "internvl")
    ],
)
def test_a_second_turn_with_the_cache(spec, layer, name, padded):
    """More than one new token on a cache that is shorter than the prompt: causal and windowed by original columns."""
    vlm, more = VLMS[name], torch.tensor([[15, 17, 30], [14, 20, 44]])
    inputs = prompts(vlm, CASES["unequal"])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more), torch.ones(2, 1, dtype=torch.long)], 1)
    mask[0, -4 : padded - 4 or None] *= padded == 0  # the second turn of row 0 is shorter
    place = (mask.cumsum(1) - 1).clamp(min=0)
    turns = [
        {**inputs, "position_ids": place[:, :-4], "use_cache": True},
        {"input_ids": more, "attention_mask": mask[:, :-1], "position_ids": place[:, -4:-1]},
        {"input_ids": more[:, :1], "attention_mask": mask, "position_ids": place[:, -1:]},
    ]

    def last_turns():
        cache, logits = None, []
        for turn in turns:
            with torch.no_grad():
                out = vlm.model(**turn, past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
        return logits[1:]

    with tr.patched(vlm.model, spec), tr.record(vlm.model) as trace:
        got = last_turns()
    with hidden(layers_of(name, vlm.model), dropped_by(trace, inputs), layer):
        want = last_turns()
    close(got[0][1], want[0][1])
    close(got[0][0, padded:], want[0][0, padded:])
    close(got[1], want[1])


@pytest.fixture
def flash_by_name(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)


@pytest.mark.parametrize("case", ["unequal", "alone"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("spec", ["fastv:layer=2,keep=0.3", "fastv:layer=1,keep=0.6+fastv:layer=2,keep=0.5"])
def test_flash_gets_padding_masks_and_no_position_ids(name, case, spec, flash_by_name):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    model = copy.deepcopy(vlm.model)
    with tr.patched(model, spec):
        want = generate(model, inputs)
        model.model.get_submodule(vlm.text).config._attn_implementation_internal = "flash_attention_2"
        got = generate(model, inputs)
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("hooks", ["outside", "inside"])
def test_checkpointed_training_makes_the_same_choice(hooks, monkeypatch):
    """The library has had a layer's hooks inside the checkpointed call, where they run again, and outside."""
    vlm = VLMS["qwen3_vl"]
    inputs = prompts(vlm, CASES["unequal"])
    calls, grads = [], []

    def count(module, args, kwargs):
        calls.append(kwargs["hidden_states"].shape[1])

    for checkpointing in (False, True):
        model = copy.deepcopy(vlm.model).train()
        layers = layers_of("qwen3_vl", model)
        if checkpointing and hooks == "outside":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        elif checkpointing:
            monkeypatch.setattr(
                type(layers[0]),
                "__call__",
                lambda self, *args, **kwargs: torch.utils.checkpoint.checkpoint(
                    functools.partial(torch.nn.Module.__call__, self, **kwargs), *args, use_reentrant=False
                ),
            )
        layers[2].self_attn.register_forward_pre_hook(count, with_kwargs=True)
        with tr.patched(model, "fastv:layer=1,keep=0.6+fastv:layer=3,keep=0.4"), tr.record(model) as trace:
            model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        assert len(trace.plans) == 2
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(calls) == 3
    assert len(set(calls)) == 1
    assert len(grads[0]) > 20
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_embeddings_instead_of_ids():
    vlm = VLMS["llava_onevision"]
    inputs = prompts(vlm, CASES["video"])
    embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad(), tr.patched(vlm.model, tr.FastV(layer=1, keep=4)):
        want = vlm.model(**inputs).logits
        assert want.shape[1] < inputs["input_ids"].shape[1]
        got = vlm.model(**{k: v for k, v in inputs.items() if k != "input_ids"}, inputs_embeds=embeds).logits
    assert torch.equal(got, want)


def test_what_cannot_hold_is_refused(flash_by_name):
    gemma = copy.deepcopy(VLMS["gemma3"].model)
    text = gemma.model.language_model.config
    inputs = prompts(VLMS["gemma3"], CASES["alone"])
    with tr.patched(gemma, tr.FastV(layer=2, keep=4)):
        text._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(ValueError, match="layer 2 has a sliding window, which flash_attention_2 counts"):
            gemma(**{k: v for k, v in inputs.items() if k != "attention_mask"})
    with pytest.raises(ValueError, match="layer 2 has a sliding window"):
        tr.patch(gemma, tr.FastV(layer=3, keep=4))
    text._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention is not supported"):
        tr.patch(gemma, tr.FastV(layer=2, keep=4))
    text._attn_implementation_internal = "sdpa"
    text.layer_types = ["full_attention", "chunked_attention", "full_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer 1 of the language model has chunked_attention"):
        tr.patch(gemma, tr.FastV(layer=2, keep=4))
    deep = copy.deepcopy(VLMS["qwen3_vl"].model)
    deep.config.vision_config.deepstack_visual_indexes = [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4 DeepStack features"):
        tr.patch(deep, tr.FastV(layer=2, keep=4))
    assert not [k for m in (gemma, deep) for p in m.modules() for k in vars(p) if "tokenreduce" in k]


def test_bad_calls():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["alone"])
    length = inputs["input_ids"].shape[1]
    packed = torch.cat([torch.arange(length - 4), torch.arange(4)])[None]
    with tr.patched(vlm.model, tr.FastV(layer=2, keep=4)):
        with pytest.raises(ValueError, match="not packed sequences"):
            vlm.model(**{**inputs, "attention_mask": None, "position_ids": packed})
        with pytest.raises(ValueError, match=f"attention_mask has {length + 3} columns for {length} tokens"):
            vlm.model(**{**inputs, "attention_mask": torch.ones(1, length + 3)})
        with pytest.raises(ValueError, match="prefill_chunk_size=8 is not supported on a patched model"):
            vlm.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
        with torch.no_grad():
            cache = vlm.model(**inputs, use_cache=True).past_key_values
            cache.batch_repeat_interleave(2)
            with pytest.raises(ValueError, match="made for a batch of 1 and is used for 2"):
                vlm.model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    assert "_prefill" not in vars(vlm.model)


@pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")
def test_a_family_that_needs_nothing_special_is_one_line(monkeypatch):
    """The row does what discovery does, to the bit."""
    model, inputs = plain("vipllava")
    inner = type(inner_of(model)).__name__
    assert inner not in FAMILIES
    spec = ("divprune:keep=0.5,positions=original", "fastv:layer=1,keep=2")

    def answer():
        with torch.no_grad(), tr.patched(model, *spec), tr.record(model, flops=False) as trace:
            logits = model(**inputs).logits
            return find(model).how, trace.tokens, logits

    found = answer()
    monkeypatch.setitem(FAMILIES, inner, Family())  # the one line
    known = answer()
    assert (found[0], known[0]) == ("discovered", "table")
    assert found[1] == known[1]
    assert min(known[1]) < inputs["input_ids"].shape[1]
    assert torch.equal(found[2], known[2])
