"""Later turns, on a cache that holds fewer tokens than were given, with masks that are more than causal.

The oracle is the unpatched model with the dropped tokens hidden as keys, given the same calls.
"""

from __future__ import annotations

import copy

import pytest
import torch
from talks import ROWS, call, conversation, stock_talks, talk
from vlms import VLMS, encodes_before, prompts
from vlms_masked import close, dropped_by, hidden, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of

#: spec -> first layer that sees fewer tokens
SPECS = {"fastv:layer=1,keep=0.3": 1, "fastv:layer=2,keep=0.3": 2, "divprune:keep=5,positions=original": 0}


def compare(name, spec, turns, model=None):
    """What the later turns of a patched model and of the oracle say; and the patched model's first logits."""
    model = VLMS[name].model if model is None else model
    stock_talks(model, turns)
    with tr.patched(model, spec), tr.record(model, flops=False) as trace:
        got = talk(model, turns)
    dropped = dropped_by(trace, turns[0])
    assert dropped.any()
    with hidden(layers_of(name, model), dropped, SPECS[spec]):
        want = talk(model, turns)
    return got[1:], want[1:]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", VLMS)
def test_a_turn_with_a_new_image(name, spec, rows):
    turns = conversation(name, *ROWS[rows])
    got, want = compare(name, spec, turns)
    real = prompts(VLMS[name], ROWS[rows][1])["attention_mask"].bool()
    close(got[0][real], want[0][real])
    close(got[1], want[1])


@pytest.mark.parametrize("spec", SPECS)
def test_tokens_of_a_new_image_see_each_other(spec):
    """The test above has teeth: Gemma 3 without token types is another model."""
    turns = conversation("gemma3", *ROWS["alone"])
    plain = [dict(turn) for turn in turns]
    del plain[1]["token_type_ids"]
    stock_talks(VLMS["gemma3"].model, turns)
    with tr.patched(VLMS["gemma3"].model, spec):
        one, other = talk(VLMS["gemma3"].model, turns), talk(VLMS["gemma3"].model, plain)
    assert float((one[1] - other[1]).abs().max()) > 1e-2


# -- masks of the caller ---------------------------------------------------------------------------------------------
def tree(length, dtype):
    """(1,1,5,length+5): five drafts, two of which are alternatives with a child each, and a hidden old token."""
    parents = [None, 0, 0, 1, 2]
    see = torch.zeros(5, length + 5, dtype=torch.bool)
    see[:, :length] = True
    see[:, length - 1] = False
    for i, parent in enumerate(parents):
        if parent is not None:
            see[i] = see[parent]
        see[i, length + i] = True
    see = see[None, None]
    return see if dtype == torch.bool else torch.zeros(see.shape).masked_fill(~see, torch.finfo(dtype).min)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3_wide", "internvl"])
def test_a_tree_of_drafts(name, spec, implementation):
    vlm = VLMS[name]
    model = vlm.model
    if implementation == "eager":
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
    inputs = prompts(vlm, ROWS["alone"][0])
    length = inputs["input_ids"].shape[1]
    mask = tree(length, torch.bool if implementation == "sdpa" else torch.float32)
    depth = torch.tensor([[0, 1, 1, 2, 2]]) + length
    one = torch.cat([mask[:, :, -1:], mask[:, :, -1:, -1:]], 3)  # and one token, child of the last
    turns = [
        inputs,
        {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": mask, "position_ids": depth},
        {"input_ids": torch.tensor([[10]]), "attention_mask": one, "position_ids": depth[:, -1:] + 1},
        {"input_ids": torch.tensor([[11]]), "position_ids": depth[:, -1:] + 2},  # sees everything again
    ]
    got, want = compare(name, spec, turns, model)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("spec", ["lazyllm:pruning_layers=[1,2],percentile=50", "dycoke-cache:layer=2"])
def test_methods_that_choose_in_decode_honour_masks_of_several_tokens_and_refuse_those_of_one(spec):
    model = VLMS["llava"].model
    inputs = prompts(VLMS["llava"], ROWS["alone"][0])
    length = inputs["input_ids"].shape[1]
    mask = tree(length + 2, torch.bool)
    mask[..., length + 1] = True
    chain = torch.ones(1, 1, 5, length + 7).tril(length + 2).bool()
    step = {"input_ids": torch.tensor([[5]])}
    drafts = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with tr.patched(model, spec):
        plain = talk(model, [inputs, step, step, drafts])[-1]
        close(talk(model, [inputs, step, step, {**drafts, "attention_mask": chain}])[-1], plain)
        branched = talk(model, [inputs, step, step, {**drafts, "attention_mask": mask}])[-1]
        close(branched[:, :2], plain[:, :2])
        assert float((branched - plain)[:, 2:].abs().max()) > 1e-2
        alone = torch.ones(1, 1, 1, length + 1, dtype=torch.bool)
        with pytest.raises(ValueError, match="a method on this model chooses that in every decode step"):
            talk(model, [inputs, {**step, "attention_mask": alone}])


@pytest.mark.parametrize("width", [-3, 4])
def test_masks_of_another_width_are_refused(width):
    model = VLMS["llava"].model
    inputs = prompts(VLMS["llava"], ROWS["alone"][0])
    length = inputs["input_ids"].shape[1] + 2
    wrong = torch.ones(1, 1, 2, length + width, dtype=torch.bool)
    told = f"{length + width} columns for {length} tokens"
    with tr.patched(model, "divprune:keep=4"), pytest.raises(ValueError, match=told):
        talk(model, [inputs, {"input_ids": torch.tensor([[5, 6]]), "attention_mask": wrong}])


# -- other caches ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next_window", "gemma3"])
def test_generate_goes_on_with_a_static_cache(name, spec):
    from transformers import StaticCache

    if not encodes_before():
        pytest.skip("this release's static caches fail with sliding windows")
    model, inputs = VLMS[name].model, prompts(VLMS[name], ROWS["padded"][0])
    more = torch.tensor([[15, 17, 30], [14, 20, 44]])
    settings = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)

    def turns(cache):
        with torch.no_grad():
            out = model.generate(**inputs, **cache, **settings)
            ids = torch.cat([out.sequences, more], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
            mask[0, -3] = 0
            again = cache_as(model, cache_of(out))
            out = model.generate(input_ids=ids, attention_mask=mask, **again, **settings)
        return torch.stack(out.logits, 1)

    with tr.patched(model, spec):
        want = turns({})
        got = turns(cache_as(model, StaticCache(config=model.config.get_text_config(), max_cache_len=80)))
    close(got, want)


def test_copies_and_pickles_of_a_cache_count_for_themselves():
    import io

    model, inputs = VLMS["llava"].model, prompts(VLMS["llava"], ROWS["alone"][0])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), tr.patched(model, "divprune:keep=4"):
        cache = call(model, None, inputs)[0]
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        others = [copy.deepcopy(cache), torch.load(file, weights_only=False)]
        want = talk(model, [{"input_ids": torch.tensor([[5, 6]])}], cache)
        assert cache.get_seq_length() == length + 2
        for other in others:
            assert other.get_seq_length() == length
            assert torch.equal(talk(model, [{"input_ids": torch.tensor([[5, 6]])}], other)[0], want[0])
            other.crop(-2)
            assert other.get_seq_length() == length
        assert cache.get_seq_length() == length + 2


# -- caches that meet another model ---------------------------------------------------------------------------------
NEXT = [torch.tensor([[17]]), torch.tensor([[17, 18, 19]])]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_reduced_cache_is_refused_by_models_that_are_not_patched_as_it_was(name, spec):
    """They would count slots as columns: silently wrong where a window slides."""
    model, inputs = VLMS[name].model, prompts(VLMS[name], ROWS["alone"][0])
    with torch.no_grad():
        with tr.patched(model, spec):
            caches = [call(model, None, inputs)[0] for _ in range(4)]
            want = talk(model, [{"input_ids": NEXT[1]}], copy.deepcopy(caches[0]))
        for ids, cache in zip(NEXT, caches, strict=False):
            with pytest.raises(ValueError, match="is not patched with that"):
                talk(model, [{"input_ids": ids}], cache)
        with tr.patched(model, "fastv:layer=3,keep=0.5"), pytest.raises(ValueError, match="is patched with fastv"):
            talk(model, [{"input_ids": NEXT[0]}], caches[2])
        with tr.patched(model, spec):
            assert torch.equal(talk(model, [{"input_ids": NEXT[1]}], caches[3])[0], want[0])


def test_caches_of_prompts_that_were_not_reduced_go_anywhere():
    model, inputs = VLMS["llava"].model, prompts(VLMS["llava"], ROWS["alone"][0])
    turns = [{"input_ids": ids} for ids in NEXT]
    with torch.no_grad():
        want = talk(model, turns, call(model, None, inputs)[0])
        with tr.patched(model, "fastv:layer=2,keep=1.0"):
            cache = call(model, None, inputs)[0]
        got = talk(model, turns, cache)
        stock = call(model, None, inputs)[0]
        with tr.patched(model, "divprune:keep=4"):
            again = talk(model, turns, stock)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("llava", "divprune:keep=4"), ("gemma3", "divprune:keep=4"), ("internvl", "fastv:layer=2,keep=4")],
)
def test_a_language_model_that_is_called_alone_goes_on(name, spec):
    model, inputs = VLMS[name].model, prompts(VLMS[name], ROWS["alone"][0])
    with torch.no_grad(), tr.patched(model, spec):
        cache = call(model, None, inputs)[0]
        other = copy.deepcopy(cache)
        for ids in NEXT:
            want = call(model, cache, {"input_ids": ids})[1]
            text = model.model.language_model
            close(model.lm_head(text(input_ids=ids, **cache_as(text, other)).last_hidden_state), want)


# -- continuous batching ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", ["fastv:layer=2,keep=4", "visionzip:keep=6"])
def test_continuous_batching_serves_text_and_refuses_images(spec):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = copy.deepcopy(VLMS["llava"].model)
    if not hasattr(model, "generate_batch"):
        pytest.skip("this release has no continuous batching")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    texts = [[5, 6, 7, 8], [9, 10, 11]]
    plain = [model.generate(torch.tensor([t]), generation_config=config)[0, len(t) :].tolist() for t in texts]
    small = ContinuousBatchingConfig(num_blocks=8, block_size=16, max_batch_tokens=32)
    try:
        model.generate_batch(texts, generation_config=config, continuous_batching_config=small)
    except ValueError as error:
        pytest.skip(f"continuous batching of this release takes no model with images: {str(error)[:80]}")
    tr.patch(model, spec)
    out = model.generate_batch(texts, generation_config=config, continuous_batching_config=small)
    assert [o.generated_tokens for o in out.values()] == plain
    with pytest.raises(ValueError, match="continuous batching takes no images"):
        model.generate_batch([texts[0], [5, 99, 99, 6]], generation_config=config)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=small)
    with pytest.raises(ValueError, match="continuous batching takes no images"):
        manager.add_request([5, 99, 6])
    tr.unpatch(model)
    assert not [k for k in vars(model) if "batch" in k]
