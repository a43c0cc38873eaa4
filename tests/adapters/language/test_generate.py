"""The language stage against the masking oracle: dropping at layer k is masking as a key from layer k on."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from vlms import batch, llava, skip_beams_of_several

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_in, cache_of

UNEQUAL = ((9, 1), (5, 2))


@pytest.fixture(scope="module")
def model():
    return llava()


def oracle(model, inputs, dropped, layer, **settings):
    """The unpatched model with ``dropped`` (B,L) hidden as keys from ``layer`` on, in prefill and in decode."""
    length = dropped.shape[1]
    beams = settings.get("num_beams", 1)
    seen = (~dropped & inputs["attention_mask"].bool()).repeat_interleave(beams, 0)

    def hide(module, args, kwargs):
        index = module.self_attn.layer_idx
        if index < layer:
            return None
        cache, q = cache_in(kwargs), args[0].shape[1]
        past = 0 if cache is None else cache.layers[index].get_seq_length()
        ok = torch.ones(len(seen), past + q, dtype=torch.bool)
        ok[:, :length] = seen
        see = ok[:, None, None, :] & (torch.arange(past + q) <= past + torch.arange(q)[:, None])
        own = torch.arange(past + q) == past + torch.arange(q)[:, None]
        kwargs["attention_mask"] = see | (own & ~see.any(-1, keepdim=True))
        return args, kwargs

    hooks = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in model.model.language_model.layers]
    try:
        return run(model, inputs, **settings)
    finally:
        for h in hooks:
            h.remove()


def run(model, inputs, new_tokens=6, **settings):
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **settings,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def dropped_by(model, inputs):
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        model(**inputs)
    plan = trace.plans[-1]
    return (plan.sources() < 0) & (inputs["input_ids"] == 99), trace


@pytest.mark.parametrize(("layer", "keep"), [(2, 8), (1, 3), (3, 0.7)])
@pytest.mark.parametrize("rows", [((9, 1), (5, 1)), UNEQUAL, ((7, 1),), ((9, 2), (6, 0))])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_is_what_masking_would_give(model, layer, keep, rows, settings):
    if any(images > 1 for _, images in rows):
        skip_beams_of_several(settings)
    inputs = batch("left", rows)
    with tr.patched(model, tr.FastV(layer=layer, keep=keep)):
        dropped, trace = dropped_by(model, inputs)
        sequences, logits = run(model, inputs, **settings)
    assert dropped.any()
    assert trace.tokens == [inputs["input_ids"].shape[1] - int(dropped.sum(1).min())]
    want_sequences, want = oracle(model, inputs, dropped, layer, **settings)
    assert torch.equal(sequences, want_sequences)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    far = run(model, inputs, **settings)[1]
    assert float((far[:, 0] - logits[:, 0]).abs().max()) > 1e-2, "the reduction changes something"


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches(model, settings):
    inputs = batch("left", UNEQUAL)
    with tr.patched(model, tr.FastV(layer=2, keep=4)):
        dropped, _ = dropped_by(model, inputs)
        first = run(model, inputs, 1, **settings)[1]
        ids = run(model, inputs, **settings)[0]
    want_ids, want = oracle(model, inputs, dropped, 2)
    torch.testing.assert_close(first[:, 0], want[:, 0], rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    if "use_cache" not in settings:  # without a cache every step is a prefill that chooses anew
        assert torch.equal(ids, want_ids)


def test_right_padding_in_a_forward(model):
    inputs = batch("right", UNEQUAL)
    with torch.no_grad(), tr.patched(model, tr.FastV(layer=2, keep=4)):
        _, trace = dropped_by(model, inputs)
        got = model(**inputs).logits
    plan = trace.plans[0]
    for i in range(2):
        alone = {k: v[i : i + 1] for k, v in inputs.items() if k != "pixel_values"}
        real = int(alone["attention_mask"].sum())
        alone = {k: v[:, :real] for k, v in alone.items()}
        alone["pixel_values"] = inputs["pixel_values"][slice(0, 1) if i == 0 else slice(1, 3)]
        with torch.no_grad(), tr.patched(model, tr.FastV(layer=2, keep=4)):
            want = model(**alone).logits[0, -1]
        last = int(plan.sources()[i, real - 1])
        torch.testing.assert_close(got[i, last], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_padded_batches_generate_what_single_samples_do(model):
    inputs = batch("left", UNEQUAL)
    with tr.patched(model, tr.FastV(layer=2, keep=0.25)):
        both = run(model, inputs)[0][:, -6:]
        for i, images in enumerate([slice(0, 1), slice(1, 3)]):
            ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()][None]
            alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                     "pixel_values": inputs["pixel_values"][images]}  # fmt: skip
            assert torch.equal(run(model, alone)[0][0, -6:], both[i])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keep_all_and_unpatch_are_bit_identical(implementation):
    model, inputs = llava(), batch("left", UNEQUAL)
    model.set_attn_implementation(implementation)
    ids, logits = run(model, inputs)
    keys = list(model.state_dict())
    with tr.patched(model, tr.FastV(layer=2, keep=1.0)):
        same = run(model, inputs)
        assert "LlamaDecoderLayer[fastv:keep=1.0]" in repr(model)
    with tr.patched(model, tr.FastV(layer=2, keep=3)):
        dropped, _ = dropped_by(model, inputs)
        reduced = run(model, inputs)
    back = run(model, inputs)
    assert torch.equal(same[1], logits)
    assert torch.equal(back[1], logits)
    assert torch.equal(same[0], ids)
    assert list(model.state_dict()) == keys
    assert not [k for m in model.modules() for k in vars(m) if "tokenreduce" in k]
    want = oracle(model, inputs, dropped, 2) if implementation == "sdpa" else None
    if want is not None:
        assert torch.equal(reduced[0], want[0])


def test_interleaved_and_threaded_generations_do_not_mix(model):
    prompts = [batch("left", rows) for rows in (UNEQUAL, ((6, 1), (8, 2)), ((4, 1), (4, 1)))]
    with tr.patched(model, tr.FastV(layer=1, keep=5)):
        want = [run(model, p)[1] for p in prompts]
        got: dict[int, torch.Tensor] = {}
        threads = [threading.Thread(target=lambda i=i: got.update({i: run(model, prompts[i])[1]})) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(got[i], want[i]) for i in range(3))


def test_no_image_is_no_reduction(model):
    inputs = batch("left", ((6, 0), (4, 0)))
    ids, logits = run(model, inputs)
    with tr.patched(model, tr.FastV(layer=2, keep=2)):
        same_ids, same = run(model, inputs)
    assert torch.equal(same, logits)
    assert torch.equal(same_ids, ids)


def test_the_cache_gets_shorter_from_the_layer_on(model):
    inputs = batch("left", ((7, 1), (7, 1)))
    with torch.no_grad(), tr.patched(model, tr.FastV(layer=2, keep=4)):
        out = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    full = inputs["input_ids"].shape[1]
    assert lengths == [full, full, full - 12, full - 12]


def test_a_second_turn_with_the_cache(model):
    inputs = batch("left", ((7, 1),))
    more = torch.tensor([[5, 17, 30]])
    with torch.no_grad(), tr.patched(model, tr.FastV(layer=2, keep=4)):
        dropped, _ = dropped_by(model, inputs)
        first = model(**inputs, use_cache=True)
        got = model(input_ids=more, past_key_values=first.past_key_values).logits
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    hidden = torch.cat([dropped, torch.zeros(1, 3, dtype=torch.bool)], 1)
    _, want = oracle(model, whole, hidden, 2, new_tokens=1)
    torch.testing.assert_close(got[:, -1], want[:, 0], rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_copies_are_independent(model):
    inputs = batch("left", UNEQUAL)
    tr.patch(model, tr.FastV(layer=2, keep=4))
    want = run(model, inputs)[1]
    other = copy.deepcopy(model)
    tr.unpatch(model)
    assert torch.equal(run(other, inputs)[1], want)
    assert torch.equal(run(tr.unpatch(other), inputs)[1], run(model, inputs)[1])


def test_half_precision(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = batch("left", UNEQUAL)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with tr.patched(half, tr.FastV(layer=2, keep=4)):
        assert torch.isfinite(run(half, inputs)[1]).all()


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"layer=99: the language model has layers 0 to 3"):
        tr.patch(model, "fastv:layer=99,keep=0.5")
    with pytest.raises(ValueError, match="layer is an int >= 1"):
        tr.get_method("fastv:layer=0")
    with pytest.raises(ValueError, match="both act before the language model; choose one"):
        tr.patch(model, "divprune+visionzip")
    with pytest.raises(ValueError, match="use resize@projector"):
        tr.patch(model, "resize@encoder:keep=0.5")
    with pytest.raises(ValueError, match="both act before layer 2"):
        tr.patch(model, "fastv+fastv:keep=3")
    assert tr.describe(model).methods() == tr.list_methods(stage="language")
    inputs = batch("left", UNEQUAL)
    inputs["attention_mask"] = inputs["attention_mask"][:, None].bool()
    with tr.patched(model, tr.FastV()), pytest.raises(ValueError, match="takes attention_mask as padding mask"):
        model(**inputs)


@pytest.mark.parametrize("spec", ["fastv:layer=2,keep=4", "visionzip:keep=6+fastv:layer=2,keep=4", "tome:r=2"])
def test_sampling_streaming_and_several_answers(model, spec):
    """What a service does: seeded samples, tokens as they come, more than one answer."""
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.append(value.flatten().tolist())

        def end(self):
            self.tokens.append("end")

    settings = dict(max_new_tokens=5, do_sample=True, temperature=0.8, top_k=20)
    inputs = batch("left", UNEQUAL)
    one = batch("left", ((7, 1),))
    with torch.no_grad(), tr.patched(model, spec):
        torch.manual_seed(3)
        first = model.generate(**inputs, num_return_sequences=2, **settings)
        torch.manual_seed(3)
        again = model.generate(**inputs, num_return_sequences=2, **settings)
        greedy = model.generate(**one, max_new_tokens=5, do_sample=False)
        stream = Collect()
        model.generate(**one, max_new_tokens=5, do_sample=False, streamer=stream)
        slow = model.generate(**one, max_new_tokens=5, do_sample=False, use_cache=False)
    assert first.shape == (4, inputs["input_ids"].shape[1] + 5)
    assert torch.equal(first, again)
    assert [t for t in stream.tokens[1:-1]] == [[t] for t in greedy[0, -5:].tolist()]
    assert stream.tokens[-1] == "end"
    assert torch.equal(slow, greedy)
