"""Drafts (an assistant, prompt lookup) change how often a model is called, never what it answers."""

from __future__ import annotations

import copy

import pytest
import torch
from vlms import VLMS, prompts
from vlms_masked import close, dropped_by, hidden, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of

ROW = ((9, "i"),)
SPECS = {
    "language": "fastv:layer=2,keep=4",
    "stages": "pyramiddrop",
    "ahead": "sparsevlm:keep=0.3",
    "embeddings": "divprune:keep=5",
    "question": "dart:layer=1,keep=5",
    "tower evidence": "visionzip:keep=6",
    "tower": "tome:r=2",
    "two": "divprune:keep=8+fastv:layer=2,keep=3",
}  #: Methods that choose in decode, too.
AGAIN = ["lazyllm:pruning_layers=[1,2],percentile=50", "dycoke-cache:layer=2,p=0.6,gate=0.5"]


def noisy(model):
    """A copy that mostly agrees."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.02 * p.std())
    return other


def prompt(name):
    """A prompt whose end was there before, so that prompt lookup has a draft in the first round."""
    inputs = prompts(VLMS[name], ROW)
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]
    return inputs


def generate(model, inputs, **settings):
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
        )
    return out.sequences, torch.stack(out.logits, 1)


def same(got, want):
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


class calls:  # noqa: N801 - used like open()
    """How many tokens each call of a model brings."""

    def __init__(self, model):
        self.model, self.sizes = model, []

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(
            lambda m, args, kwargs: self.sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        return self.sizes

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("draft", ["noisy", "patched", "lookup"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_patched_target_answers_as_it_does_alone(name, spec, draft):
    inputs, model = prompt(name), VLMS[name].model
    plain, other = generate(model, inputs), noisy(model)
    settings = dict(prompt_lookup_num_tokens=4) if draft == "lookup" else dict(assistant_model=other)
    if draft == "patched":
        tr.patch(other, spec)
    with tr.patched(model, spec):
        want = generate(model, inputs)
        with calls(model) as sizes:
            got = generate(model, inputs, **settings)
    same(got, want)
    assert sizes[0] == inputs["input_ids"].shape[1], "the prompt comes alone"
    assert draft == "lookup" or max(sizes[1:]) > 1, "drafts were verified"
    assert float((plain[1][:, 0] - want[1][:, 0]).abs().max()) > 1e-2, "the reduction changes something"


@pytest.mark.parametrize("spec", [*SPECS.values(), *AGAIN])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_patched_draft_leaves_the_target_alone(name, spec):
    inputs, model = prompt(name), VLMS[name].model
    want = generate(model, inputs)
    draft = tr.patch(noisy(model), spec)
    if spec.startswith("visionzip"):
        with pytest.raises(ValueError, match=r"patch that one with visionzip:keep=1\.0"):
            generate(model, inputs, assistant_model=draft)
        model = tr.patch(copy.deepcopy(model), "visionzip:keep=1.0")
    with tr.record(draft, flops=False) as trace, calls(model) as sizes:
        same(generate(model, inputs, assistant_model=draft), want)
    assert max(sizes[1:]) > 1, "drafts were verified"
    if not spec.startswith(("tome", "dycoke")):
        assert trace.plans, "the draft saw images, and fewer tokens"


@pytest.mark.parametrize("spec", ["fastv:layer=1,keep=0.3", "divprune:keep=4"])
@pytest.mark.parametrize("name", [n for n in VLMS if n not in ("llava", "qwen2_5_vl")])
def test_every_family(name, spec):
    inputs, model = prompt(name), VLMS[name].model
    draft = noisy(model)
    with tr.patched(model, spec):
        want = generate(model, inputs)
        same(generate(model, inputs, assistant_model=draft), want)
        same(generate(model, inputs, prompt_lookup_num_tokens=4), want)


def test_a_text_model_drafts():
    from transformers import LlamaConfig, LlamaForCausalLM

    model, inputs = VLMS["llava"].model, prompt("llava")
    text = LlamaForCausalLM(LlamaConfig(**model.config.text_config.to_diff_dict())).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    with tr.patched(model, "divprune:keep=5"):
        want = generate(model, inputs)
        same(generate(model, inputs, assistant_model=text), want)


def test_drafts_can_be_sampled_against():
    """Speculative sampling takes the draft's probabilities too, and those of the first round are handed on."""
    model, inputs = VLMS["llava"].model, prompt("llava")
    settings = dict(max_new_tokens=12, do_sample=True, temperature=0.1, assistant_model=noisy(model))
    with tr.patched(model, "divprune:keep=5"), torch.no_grad():
        torch.manual_seed(0)
        out = model.generate(**inputs, **settings)
        torch.manual_seed(0)
        assert torch.equal(out, model.generate(**inputs, **settings))
    assert out.shape[1] == inputs["input_ids"].shape[1] + 12


@pytest.mark.parametrize("spec", ["lazyllm:pruning_layers=[1,2]", "dycoke-cache:layer=2"])
def test_methods_that_choose_in_every_step_are_refused(spec):
    model, inputs = VLMS["llava"].model, prompt("llava")
    with tr.patched(model, spec):
        for settings in ({"assistant_model": noisy(model)}, {"prompt_lookup_num_tokens": 4}):
            with pytest.raises(ValueError, match="chooses again in every decode step"):
                generate(model, inputs, **settings)
    assert not [k for k in vars(model) if "candidate" in k or "batch" in k]


# -- cropped caches --------------------------------------------------------------------------------------------------
CROPPED = ["fastv:layer=2,keep=4", "divprune:keep=4", "divprune:keep=8+fastv:layer=1,keep=3", "visionzip:keep=6"]


def steps(model, inputs, cache, calls):
    """Logits of every call of new tokens (B,N) behind a cache, with the mask of all columns."""
    out = []
    for ids in calls:
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 9, dtype=torch.long)], 1)
        past = int(cache.get_seq_length())
        mask = mask[:, : past + ids.shape[1]]
        place = (mask.cumsum(1) - 1)[:, past:]
        made = model(
            input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True, **cache_as(model, cache)
        )  # fmt: skip
        out.append(made.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("rows", [((9, "i"),), ((9, "i"), (5, "ii"))], ids=["alone", "unequal"])
@pytest.mark.parametrize("spec", [*CROPPED, *AGAIN])
def test_what_was_cropped_never_was(spec, rows):
    model, inputs = VLMS["llava"].model, prompts(VLMS["llava"], rows)
    b = len(rows)
    old, new = (torch.arange(4 * b).view(b, 4) + n for n in (20, 40))
    with torch.no_grad(), tr.patched(model, spec):
        first = steps(model, inputs, cache_of(model(**inputs, use_cache=True)), [old[:, :1], new[:, :1], new[:, 1:2]])
        cache = cache_of(model(**inputs, use_cache=True))
        length = inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == length
        steps(model, inputs, cache, [t[:, None] for t in old.unbind(1)])
        assert cache.get_seq_length() == length + 4
        cache.crop(-3)
        assert cache.get_seq_length() == length + 1
        again = steps(model, inputs, cache, [new[:, :1], new[:, 1:2]])
    close(again, first[:, 1:])


@pytest.mark.parametrize("left", [2, 5], ids=["text", "image"])
@pytest.mark.parametrize(("spec", "layer"), [("fastv:layer=2,keep=4", 2), ("divprune:keep=4,positions=original", 0)])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_crops_into_the_prompt(name, spec, layer, left):
    vlm = VLMS[name]
    model, inputs = vlm.model, prompts(vlm, ROW)
    length = inputs["input_ids"].shape[1]
    left = length - left if left == 2 else left + 4  # in the middle of the image

    def cropped():
        cache = cache_of(model(**inputs, use_cache=True))
        steps(model, inputs, cache, [torch.tensor([[15, 17]])])
        cache.crop(left - length - 2)
        assert cache.get_seq_length() == left
        return steps(model, inputs, cache, [torch.tensor([[33, 34, 35]]), torch.tensor([[36]])])

    with torch.no_grad():
        with tr.patched(model, spec), tr.record(model, flops=False) as trace:
            got = cropped()
        dropped = dropped_by(trace, inputs)
        assert dropped[:, :left].any()
        dropped[:, left:] = False
        plain = hidden(layers_of(name, model), dropped, layer)
        with plain:
            plain.dropped = dropped_by(trace, inputs)
            cache = cache_of(model(**inputs, use_cache=True))
            steps(model, inputs, cache, [torch.tensor([[15, 17]])])
            cache.crop(left - length - 2)
            plain.dropped = dropped
            want = steps(model, inputs, cache, [torch.tensor([[33, 34, 35]]), torch.tensor([[36]])])
    close(got, want)


def test_crops_that_rows_do_not_agree_on_are_refused():
    model, inputs = VLMS["llava"].model, prompts(VLMS["llava"], ((9, "i"), (5, "ii")))
    with torch.no_grad(), tr.patched(model, "fastv:layer=2,keep=0.5"):
        cache = cache_of(model(**inputs, use_cache=True))
        with pytest.raises(ValueError, match="another number in every row"):
            cache.crop(-20)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1], "nothing was cropped"


def test_an_emptied_cache_takes_another_prompt():
    from transformers import StaticCache

    vlm = VLMS["llava"]
    model, inputs, text = vlm.model, prompts(vlm, ROW), torch.tensor([[5, 6, 7, 8]])

    def second(cache):
        first = model(input_ids=text, **cache_as(model, cache)).logits
        return torch.cat([first, model(input_ids=text, **cache_as(model, cache)).logits], 1)

    with torch.no_grad():
        want = second(StaticCache(config=model.config.text_config, max_cache_len=64))
        with tr.patched(model, "divprune:keep=4"):
            cache = StaticCache(config=model.config.text_config, max_cache_len=64)
            model(**inputs, **cache_as(model, cache))
            cache.reset()
            assert torch.equal(second(cache), want)
