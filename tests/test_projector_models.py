"""Every registered projector-stage method inside models: with a class token and without, tiles, 2x2 units."""

from __future__ import annotations

import copy

import pytest
import torch
from threads import mixed_up
from vlms import IMAGE, VLMS, prompts
from vlms_masked import close, generate

import tokenreduce as tr
from tokenreduce.core.registry import get_class

#: Temporal methods have a table of their own, with videos.
METHODS = [n for n in tr.list_methods(stage="projector") if not get_class(n, "projector").temporal]
every = pytest.mark.parametrize("name", METHODS)
models = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl"])


def method(name, keep):
    return get_class(name, "projector")(keep=keep)


def model_for(family, name):
    model = VLMS[family].model
    if name not in tr.describe(model).methods("projector"):
        with pytest.raises(ValueError, match="Methods that fit"):
            tr.patch(model, method(name, 4))
        pytest.skip(f"{name} is refused on {family}, with what fits")
    return model


def alone(inputs, b):
    real = inputs["attention_mask"][b].bool()
    out = {}
    for key, value in inputs.items():
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            out[key] = value[b : b + 1, real]
        elif key == "pixel_values" and "image_grid_thw" in inputs:
            out[key] = value.chunk(2)[b]
        else:
            out[key] = value[b : b + 1]
    return out


@every
@models
def test_a_padded_batch_generates_what_its_rows_do(name, family):
    model = model_for(family, name)
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    with tr.patched(model, method(name, 0.4)):
        sequences, logits, _ = generate(model, inputs)
        beams = generate(model, inputs, num_beams=2)[0]
        for b in range(2):
            got = generate(model, alone(inputs, b))
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])
            assert torch.equal(generate(model, alone(inputs, b), num_beams=2)[0][0, -4:], beams[b, -4:])
    far = generate(model, inputs)[1]
    assert float((far - logits).abs().max()) > 0.1, "the reduction changes something"


@every
@models
def test_keep_is_what_enters_the_language_model(name, family):
    model = model_for(family, name)
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    visual = inputs["input_ids"] == IMAGE
    present = int(visual[0].sum())
    ends = 2 if family in ("llava_next", "llava_onevision") else 0
    for keep in (5, 0.5):
        reducer = method(name, keep)
        with torch.no_grad(), tr.patched(model, reducer), tr.record(model) as trace:
            model(**inputs)
        left = (trace.plans[0].sources() >= 0) & visual
        assert (left.sum(1) == reducer.total(present - ends) + ends).all()


@every
@models
def test_keep_everything_is_bit_identical(name, family):
    model = model_for(family, name)
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    want = generate(model, inputs)
    with tr.patched(model, method(name, 1.0)):
        got = generate(model, inputs)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    again = generate(model, inputs)
    assert torch.equal(again[1], want[1]), "unpatched"


@every
def test_no_image_and_several(name):
    model = model_for("llava", name)
    text = prompts(VLMS["llava"], ((6, ""), (4, "")))
    want = generate(model, text)[1]
    with tr.patched(model, method(name, 4)), tr.record(model) as trace:
        assert torch.equal(generate(model, text)[1], want)
        assert not trace.plans
        inputs = prompts(VLMS["llava"], ((6, "ii"), (8, "i")))
        with torch.no_grad():
            model(**inputs)
    left = ((trace.plans[0].sources() >= 0) & (inputs["input_ids"] == IMAGE)).sum(1)
    assert left.tolist() == [8, 4]


@every
def test_threads_do_not_mix(name):
    model = model_for("llava", name)
    asked = [prompts(VLMS["llava"], rows) for rows in (((9, "i"), (5, "ii")), ((6, "i"), (8, "ii")), ((4, "i"),))]
    with tr.patched(model, method(name, 0.3)):
        assert mixed_up(lambda inputs: model(**inputs).logits, asked, 3) == []


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(name, dtype):
    model = copy.deepcopy(model_for("llava", name)).to(dtype)
    inputs = prompts(VLMS["llava"], ((9, "i"), (5, "ii")))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad(), tr.patched(model, method(name, 0.3)):
        out = model(**inputs).logits
    assert out.dtype == dtype
    assert torch.isfinite(out.float()).all()


@every
def test_combined_with_the_encoder_and_the_language_model(name):
    model = model_for("llava", name)
    inputs = prompts(VLMS["llava"], ((9, "i"), (5, "i")))
    reducers = (tr.ToMe(r=2), method(name, 6), tr.FastV(layer=2, keep=3))
    if name == "resize":  # what merging leaves is no grid
        with tr.patched(model, *reducers), pytest.raises(ValueError, match="needs a full grid of tokens"):
            generate(model, inputs)
        return
    with tr.patched(model, *reducers):
        sequences, _, trace = generate(model, inputs)
        for b in range(2):
            assert torch.equal(generate(model, alone(inputs, b))[0][0, -4:], sequences[b, -4:])
    tokens = {s.stage: s.tokens for s in trace.steps if s.plan is not None}
    text = inputs["input_ids"].shape[1] - 16
    assert tokens["language"] == text + 3
    assert tokens["projector"] == text + 6
