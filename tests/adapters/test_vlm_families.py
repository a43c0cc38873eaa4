"""Every family of image/video language models against the masking oracle: dropping visual tokens at layer k is hiding
them as keys from layer k on, whatever mask the model makes (windows, prefixes, padding)."""

from __future__ import annotations

import copy

import pytest
import torch
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.vlm import FAMILIES

FILMS = [name for name, vlm in VLMS.items() if vlm.video]
#: name -> (rows of the batch, padded side)
CASES = {
    "unequal": ((9, "i"), (5, "ii")),
    "alone": ((7, "i"),),
    "two images": ((8, "ii"), (6, "ii")),
    "beams": ((6, "ii"), (9, "i")),
    "video": ((5, "v"), (8, "iv")),
}


def layers_of(name, model):
    return model.model.get_submodule(VLMS[name].text).layers


class hidden:  # noqa: N801 - used like open()
    """The unpatched model with ``dropped`` (B,L) hidden as keys from ``layer`` on: its own masks and that."""

    def __init__(self, layers, dropped, layer):
        self.layers, self.dropped, self.layer, self.hooks = layers, dropped, layer, []

    def hide(self, module, args, kwargs):
        attention, cache, stock = module.self_attn, kwargs.get("past_key_values"), kwargs.get("attention_mask")
        q = args[0].shape[1]
        past = 0 if cache is None else int(cache.layers[attention.layer_idx].get_seq_length())
        slots, offset = (q, 0) if cache is None else cache.layers[attention.layer_idx].get_mask_sizes(q)
        column = offset + torch.arange(slots)
        if stock is None:
            stock = (column <= past + torch.arange(q)[:, None]) | torch.tensor(not attention.is_causal)
        elif stock.dtype != torch.bool:
            stock = stock == 0
        gone = torch.cat([self.dropped, torch.zeros(len(self.dropped), offset + slots, dtype=torch.bool)], 1)
        see = stock & ~gone[:, None, None, offset : offset + slots]
        own = column == past + torch.arange(q)[:, None]
        see = see | (own & ~see.any(-1, keepdim=True))
        if attention.config._attn_implementation == "eager":
            see = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = see
        return args, kwargs

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.hide, with_kwargs=True) for m in self.layers[self.layer :]]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def generate(model, inputs, **settings):
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
        )
    return out.sequences, torch.stack(out.logits, 1), trace


def dropped_by(trace, inputs):
    """(rows of the batch and its beams, L) bool of what the one plan of a trace drops; only visual tokens."""
    (plan,) = trace.plans
    dropped = plan.sources() < 0
    visual = (inputs["input_ids"] == 99) | (inputs["input_ids"] == 98)
    assert not (dropped & ~visual.repeat_interleave(len(dropped) // len(visual), 0)).any()
    return dropped


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", VLMS)
def test_generation_is_what_masking_would_give(name, case, layer):
    vlm = VLMS[name]
    if case == "video" and not vlm.video:
        pytest.skip("takes images only")
    inputs = prompts(vlm, CASES[case])
    settings = {"num_beams": 3} if case == "beams" else {}
    with tr.patched(vlm.model, tr.FastV(layer=layer, keep=0.3)):
        sequences, logits, trace = generate(vlm.model, inputs, **settings)
    dropped = dropped_by(trace, inputs)
    left = (inputs["attention_mask"].sum(1) - dropped[:: settings.get("num_beams", 1)].sum(1)).tolist()
    assert case == "alone" or case == "two images" or len(set(dropped.sum(1).tolist())) > 1, left
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
