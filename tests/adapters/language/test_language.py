"""Every language-stage method in models: what it drops is hidden as keys from its layer on, what it merges is replaced
there, and nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from vlms import VLMS, prompts, skip_beams_of_several
from vlms_masked import close, generate, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_in, generation_of
from tokenreduce.adapters.language.records import PromptFeatures, Recorded
from tokenreduce.core.plan import Identity
from tokenreduce.core.reducer import Reducer

ROWS = {"unequal": ((9, "i"), (5, "ii")), "alone": ((7, "i"),), "none": ((9, "i"), (5, ""))}
SPECS = (
    "fastv:layer=2,keep=0.4",
    "pyramiddrop",
    "pyramiddrop:layer_list=[1,3],keep=3",
    "dart:keep=0.3",
    "dart:layer=1,max_num_trunction=8",
    "sparsevlm:keep=0.3,recycle=0.0",
    "sparsevlm:keep=0.2",
    "sparsevlm:pruning_loc=[0,2],counts=[0.6,0.2],cluster=0.5",
    "sparsevlm:scale=0.8",
    "mustdrop:keep=0.3",
    "v2drop",
    "v2drop:keep=0.6",
    "vtw:layer=2",
    "d2pruner:keep=0.3",
    "apet-llm:keep=5,basis_token_num=2",
    "pact:keep=0.3",
    "pact:layer=1,cutoff=0.8,keep=0.9",
    "pact:layer=2,keep=4,size_bias=sqrt",
    "pact:keep=5,size_bias=none",
)
MODELS = ("llava", "qwen2_5_vl")


class masked:  # noqa: N801 - used like open()
    """The unpatched model with full-length sequences. From the layer of each step on, columns that its plan drops are
    hidden as keys; in that layer, features of the others are what the plan makes of them, and from it on the logits of
    their keys get ``power`` times the logarithm of how many tokens they stand for."""

    def __init__(self, layers, steps, length, real, power=0.0):
        self.layers, self.hooks, self.at, self.bias = layers, [], {}, {}
        b = len(real)
        sizes = torch.ones(b, length)
        columns, there = torch.arange(length).expand(b, -1), torch.ones(b, length, dtype=torch.bool)
        for step in steps:
            place, valid = step.plan.representatives(), step.plan.validity()
            new = columns.gather(1, place)
            now = there.gather(1, place) if valid is None else there.gather(1, place) & valid
            seen = torch.zeros(b, length, dtype=torch.bool)
            for i in range(b):
                seen[i, new[i, now[i]]] = True
            self.at[step.layer] = (step.plan, columns, new, now, ~seen)
            made = step.plan.reduce_size(sizes.gather(1, columns))
            sizes = torch.ones(b, length)
            for i in range(b):
                sizes[i, new[i, now[i]]] = made[i, now[i]]
            if power:
                self.bias[step.layer] = power * sizes.log()
            # The adapter has columns in ascending order, those that are not there first.
            order = torch.where(now, new, new - length).argsort(dim=1, stable=True)
            columns, there = new.gather(1, order), now.gather(1, order)

    def hide(self, module, args, kwargs):
        index, x = module.self_attn.layer_idx, args[0]
        acted = [i for i in self.at if i <= index]
        if not acted:
            return None
        cache = cache_in(kwargs)
        past = 0 if cache is None else int(cache.layers[index].get_seq_length())
        if index in self.at and past == 0:
            plan, before, columns, valid, _ = self.at[index]
            y = plan.reduce(torch.stack([x[i, before[i]] for i in range(len(x))]))
            x = x.clone()
            for i in range(len(x)):
                x[i, columns[i, valid[i]]] = y[i, valid[i]]
        q, gone = x.shape[1], self.at[acted[-1]][4]
        stock = kwargs.get("attention_mask")
        slots, offset = (q, 0) if cache is None else cache.layers[index].get_mask_sizes(q)
        column = offset + torch.arange(slots)  # sliding caches forget
        if stock is None:
            stock = column <= past + torch.arange(q)[:, None]
        elif stock.dtype != torch.bool:
            stock = stock == 0
        gone = torch.cat([gone, torch.zeros(len(gone), offset + slots, dtype=torch.bool)], 1)[
            :, offset : offset + slots
        ]
        see = stock & ~gone[:, None, None]
        see = see | ((column == past + torch.arange(q)[:, None]) & ~see.any(-1, keepdim=True))
        if self.bias or module.self_attn.config._attn_implementation == "eager":
            see = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        if self.bias:
            bias = torch.nn.functional.pad(self.bias[acted[-1]], (0, offset + slots))[:, offset : offset + slots]
            see = see + bias[:, None, None]
        return (x, *args[1:]), {**kwargs, "attention_mask": see}

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.hide, with_kwargs=True) for m in self.layers]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def acting(trace):
    return [step for step in trace.steps if step.plan is not None]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_what_masking_and_replacing_would_give(name, spec, rows):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS[rows])
    far = generate(vlm.model, inputs)[1]
    with tr.patched(vlm.model, spec):
        sequences, logits, trace = generate(vlm.model, inputs)
    steps = acting(trace)
    assert steps
    if "recycle=0.0" not in spec and "sparse" in spec:
        assert any(isinstance(s.plan, tr.Merge) for s in steps)
    length, power = inputs["input_ids"].shape[1], tr.get_method(spec, "language").size_power
    with masked(layers_of(name, vlm.model), steps, length, inputs["attention_mask"], power):
        want_sequences, want, _ = generate(vlm.model, inputs)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)
    assert float((far[:, 0] - logits[:, 0]).abs().max()) > 1e-2, "the reduction changes something"


@pytest.mark.parametrize("spec", ["pyramiddrop", "dart:keep=0.3", "sparsevlm:keep=0.2", SPECS[7], "pact:keep=0.3"])
@pytest.mark.parametrize("name", [name for name in VLMS if name not in MODELS])
def test_other_families(name, spec):
    """Windows, prefixes that see each other, and DeepStack features behind a merge."""
    test_generation_is_what_masking_and_replacing_would_give(name, spec, "unequal")


@pytest.mark.parametrize("spec", ["pyramiddrop:keep=3", "sparsevlm:keep=0.2", "pact:keep=4", "v2drop"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"cache_implementation": "static"}, {"implementation": "eager"}], ids=str
)
def test_beams_caches_and_eager_attention(spec, settings):
    skip_beams_of_several(settings)
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ROWS["unequal"])
    with tr.patched(vlm.model, spec):
        want = generate(vlm.model, inputs, num_beams=settings.get("num_beams", 1))
    if "num_beams" in settings:
        steps = acting(want[2])
        real = inputs["attention_mask"].repeat_interleave(3, 0)
        power = tr.get_method(spec, "language").size_power
        with masked(layers_of("llava", vlm.model), steps, real.shape[1], real, power):
            got = generate(vlm.model, inputs, **settings)
    elif "implementation" in settings:
        model = copy.deepcopy(vlm.model)
        model.set_attn_implementation("eager")
        with tr.patched(model, spec):
            got = generate(model, inputs)
    else:
        with tr.patched(vlm.model, spec):
            got = generate(vlm.model, inputs, **settings)
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("spec", ["fastv:keep=1.0", "pyramiddrop:keep=1.0", "dart:keep=1.0", "sparsevlm:keep=1.0"])
@pytest.mark.parametrize("name", MODELS)
def test_keep_all_and_unpatch_are_bit_identical(name, spec):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS["unequal"])
    before = generate(vlm.model, inputs)
    with tr.patched(vlm.model, spec):
        same = generate(vlm.model, inputs)
    with tr.patched(vlm.model, spec.replace("1.0", "0.2")):
        assert acting(generate(vlm.model, inputs)[2])
    after = generate(vlm.model, inputs)
    for other in (same, after):
        assert torch.equal(other[0], before[0])
        assert torch.equal(other[1], before[1])
    assert not [k for m in vlm.model.modules() for k in vars(m) if "tokenreduce" in k]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_padded_batches_generate_what_single_samples_do(name, spec):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS["unequal"])
    images = (slice(0, 1), slice(1, 3))
    with tr.patched(vlm.model, spec):
        both = generate(vlm.model, inputs)
        for i, mine in enumerate(images):
            real = inputs["attention_mask"][i].bool()
            alone = {
                k: inputs[k][i][real][None] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in inputs
            }
            if "image_grid_thw" in inputs:
                alone["image_grid_thw"] = inputs["image_grid_thw"][mine]
                mine = slice(mine.start * 64, mine.stop * 64)
            alone["pixel_values"] = inputs["pixel_values"][mine]
            ids, logits, _ = generate(vlm.model, alone)
            assert torch.equal(ids[0, -4:], both[0][i, -4:])
            close(both[1][i], logits[0])


@pytest.mark.parametrize("spec", ["pyramiddrop:keep=3", "dart:keep=0.3", "sparsevlm:keep=0.2"])
def test_right_padding_in_a_forward(spec):
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ROWS["unequal"], "right")
    with torch.no_grad(), tr.patched(vlm.model, spec), tr.record(vlm.model, flops=False) as trace:
        got = vlm.model(**inputs).logits
    steps, length = acting(trace), inputs["input_ids"].shape[1]
    with torch.no_grad(), masked(layers_of("llava", vlm.model), steps, length, inputs["attention_mask"]):
        want = vlm.model(**inputs).logits
    for i, real in enumerate(inputs["attention_mask"].sum(1).tolist()):
        close(got[i, got.shape[1] - length + real - 1], want[i, real - 1])


@pytest.mark.parametrize("spec", ["pyramiddrop:keep=3", "dart:keep=0.3", "sparsevlm:keep=0.2", "mustdrop:keep=3"])
def test_gradients_flow_and_checkpointing_changes_nothing(spec):
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(VLMS["llava"].model).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        inputs = prompts(VLMS["llava"], ROWS["unequal"])
        with tr.patched(model, spec):
            model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is None or torch.isfinite(g).all() for g in grads[0])
    for plain, replayed in zip(*grads, strict=True):
        assert (plain is None) == (replayed is None)
        if plain is not None:
            torch.testing.assert_close(plain, replayed)


def test_copies_are_independent_and_the_prompt_is_not_kept():
    model = copy.deepcopy(VLMS["llava"].model)
    inputs = prompts(VLMS["llava"], ROWS["unequal"])
    stock = generate(model, inputs)[1]
    for spec in ("dart:keep=0.3", "sparsevlm:keep=0.2", "pyramiddrop:keep=3"):
        tr.patch(model, spec)
        want = generate(model, inputs)[1]
        other = copy.deepcopy(model)
        tr.unpatch(model)
        norm = model.model.language_model.norm
        with torch.no_grad():
            saved = norm.weight.clone()
            norm.weight.zero_()  # a copy has a final norm of its own
            assert torch.equal(generate(other, inputs)[1], want)
            norm.weight.copy_(saved)
        assert torch.equal(generate(tr.unpatch(other), inputs)[1], stock)
    with torch.no_grad(), tr.patched(model, "sparsevlm:keep=0.2"):
        cache = model(**inputs, use_cache=True).past_key_values
    state = generation_of(cache).state
    assert state.get(PromptFeatures) is None
    assert not state.layers(Recorded)


# -- the evidence itself ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spy(Reducer, stage="language", needs=("ahead", "attention", "prompt", "norm")):
    """Drops nothing and remembers what it could have looked at."""

    layer: int = 2
    notes: ClassVar[list[tr.Evidence]] = []

    def acts_at(self, layer, depth):
        return layer == self.layer

    def plan(self, evidence):
        self.notes.append(evidence)
        return Identity.like(evidence.x)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", VLMS)
def test_the_attention_ahead_is_that_of_the_layer_itself(name, cut, layer):
    """In every family, windows and prefixes included, also behind an earlier cut; and the prompt is what enters."""
    vlm = VLMS[name]
    if cut:
        layer += 1
    inputs = prompts(vlm, ROWS["unequal"])
    eager = copy.deepcopy(vlm.model)
    eager.set_attn_implementation("eager")
    Spy.notes.clear()
    spies = (Spy(layer=layer), tr.FastV(layer=1, keep=0.5)) if cut else (Spy(layer=layer),)
    with torch.no_grad(), tr.patched(eager, *spies):
        out = eager(**inputs, output_attentions=True, output_hidden_states=True)
    (evidence,) = Spy.notes
    want = out.attentions[layer]
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if evidence.valid is None else evidence.valid
    assert want.shape[-1] == evidence.n
    got = evidence.attention("all")
    for i in range(2):
        close(got[i][:, real[i]], want[i][:, real[i]])
    entered, visual = evidence.prompt.x, (inputs["input_ids"] == 99) | (inputs["input_ids"] == 98)
    assert torch.equal(evidence.prompt.visual, visual)
    assert torch.equal(evidence.visual_entry(), visual.sum(1, keepdim=True))
    mask = inputs["attention_mask"].bool()
    assert torch.equal(mask if evidence.prompt.valid is None else evidence.prompt.valid, mask)
    close(entered, out.hidden_states[0])
    close(evidence.normed, eager.model.get_submodule(vlm.text).norm(evidence.x))


class Plain(Spy, stage="language", needs=("ahead", "plain", "attention")):
    """Where positions have several axes, before the rotation."""


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_plain_keys_ahead_are_those_before_the_rotation_where_positions_have_several_axes(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS["unequal"])
    layer = layers_of(name, vlm.model)[2]
    Spy.notes.clear()
    with torch.no_grad(), tr.patched(vlm.model, Plain(layer=2)):
        vlm.model(**inputs)
        (evidence,) = Spy.notes
        k = layer.self_attn.k_proj(layer.input_layernorm(evidence.x)).unflatten(-1, (-1, layer.self_attn.head_dim))
        k = layer.self_attn.k_norm(k) if hasattr(layer.self_attn, "k_norm") else k
    same = torch.allclose(evidence.keys, k.transpose(1, 2), atol=1e-5)
    assert same == (evidence.attention.rope == "pre") == name.startswith("qwen")


def test_looking_ahead_leaves_the_model_alone():
    """With a cache, with sdpa: the layer's keys are stored once, and the outputs are bit-identical."""
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ROWS["unequal"])
    with torch.no_grad():
        want = vlm.model(**inputs, use_cache=True)
        with tr.patched(vlm.model, Spy()):
            got = vlm.model(**inputs, use_cache=True)
    assert torch.equal(got.logits, want.logits)
    for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_of_pyramiddrop_reads_the_layer_at_its_boundary(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS["unequal"])
    with tr.patched(vlm.model, "pyramiddrop"):
        trace = generate(vlm.model, inputs)[2]
    steps, real = acting(trace), inputs["attention_mask"]
    assert [s.layer for s in steps] == [1, 2, 3]
    eager = copy.deepcopy(vlm.model)
    eager.set_attn_implementation("eager")
    visual = inputs["input_ids"] == 99
    present, first = visual, visual.sum(1).tolist()
    for i, (step, share) in enumerate(zip(steps, (0.5, 0.25, 0.125), strict=True)):
        context = masked(layers_of(name, eager), steps[: i + 1], real.shape[1], real)
        gone = context.at[step.layer][4]
        with torch.no_grad(), masked(layers_of(name, eager), steps[:i], real.shape[1], real):
            rows = eager(**inputs, output_attentions=True).attentions[step.layer][:, :, -1].mean(1)
        for b in range(2):
            places = present[b].nonzero().flatten().tolist()
            best = sorted(places, key=lambda p: (-float(rows[b, p]), p))[: int(share * first[b])]
            assert (visual[b] & ~gone[b]).nonzero().flatten().tolist() == sorted(best)
        present = visual & ~gone


@pytest.mark.parametrize(
    "spec", ["fastv:layer=2,keep=0.3", "pyramiddrop", "dart:layer=1,keep=4", "aim", "mustdrop:keep=0.3"]
)
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_a_prompt_that_ends_in_an_image(name, spec):
    """The last token predicts the next one, so it stays; rows end at other columns."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ((2, "i"), (9, "ii")), "right")
    width = int((inputs["input_ids"][0] == 99).nonzero()[-1]) + 1
    for key in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & set(inputs):
        inputs[key][0, width:] = 0
    assert int(inputs["attention_mask"].sum(1)[0]) == width < inputs["input_ids"].shape[1]
    with torch.no_grad(), tr.patched(vlm.model, spec), tr.record(vlm.model, flops=False) as trace:
        columns, there = tr.kept_columns(vlm.model(**inputs))
    kept = columns[0][there[0]]
    assert width - 1 in kept
    assert len(kept) < inputs["input_ids"].shape[1]
    assert trace.plans
