"""Every method that thins caches, in plain ``generate`` on padded batches; a new method is in by itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_of
from tokenreduce.core.registry import get_class

#: They look at the frames of a stream; see tests/streaming.
STREAMS = {"infinipot-v", "streammem"}
THIN = [
    name for name in tr.list_methods(stage="cache")
    if issubclass(get_class(name, "cache"), tr.CacheReducer) and name not in STREAMS
]  # fmt: skip
every = pytest.mark.parametrize("method", THIN)
ROWS = ((9, "i"), (5, "ii"))


def made(method, **settings):
    fields = get_class(method, "cache").__dataclass_fields__
    small = {"window_size": 4, "base": "snapkv:window_size=4", "heads": ((1, 0), (2, 1))}
    return get_class(method, "cache")(**{k: v for k, v in {**small, **settings}.items() if k in fields})


def said(model, inputs, **settings):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings
        )
    return out.sequences, torch.stack(out.logits, 1), cache_of(out)


@every
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_it_runs_and_leaves_nothing_behind(name, method):
    model, inputs = VLMS[name].model, prompts(VLMS[name], ROWS)
    ids, plain, _ = said(model, inputs)
    with tr.patched(model, made(method, keep=0.5)), tr.record(model, flops=False) as trace:
        _, got, _ = said(model, inputs)
        beams = said(model, inputs, num_beams=2)[0]
    assert torch.isfinite(got).all()
    assert beams.shape[0] == 2
    assert torch.equal(got[:, 0], plain[:, 0])  # the first token comes before anything leaves
    for step in trace.cache:
        assert (step.kept <= step.before).all()
        assert (step.kept > 0).all()
    after_ids, after, _ = said(model, inputs)
    assert torch.equal(after_ids, ids)
    assert torch.equal(after, plain)


def test_heads_that_keep_unequal_numbers_are_held_as_wide_as_the_largest():
    model, inputs = VLMS["llava"].model, prompts(VLMS["llava"], ROWS)
    with tr.patched(model, made("adakv", keep=0.3)), tr.record(model, flops=False) as trace, torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    assert len(trace.cache) == len(cache.layers)
    for step in trace.cache:
        assert step.kept.min() < step.kept.max() < step.before.min()
        keys = cache.layers[step.layer].keys
        assert keys.shape[2] == step.kept.max()
        assert step.bytes_held == 2 * keys.numel() * keys.element_size() < step.bytes_before


@every
def test_keep_everything_is_bit_identical(method):
    if "keep" not in get_class(method, "cache").__dataclass_fields__:
        pytest.skip("it has no setting keep")
    model, inputs = VLMS["llava"].model, prompts(VLMS["llava"], ROWS)
    ids, plain, _ = said(model, inputs)
    with tr.patched(model, made(method, keep=1.0)):
        got_ids, got, _ = said(model, inputs)
    assert torch.equal(got_ids, ids)
    assert torch.equal(got, plain)


@every
def test_rows_of_a_batch_are_as_alone(method):
    """Padding and the other row decide nothing."""
    vlm = VLMS["llava"]
    model = vlm.model
    reducer = made(method, keep=0.5)
    with tr.patched(model, reducer):
        _, both, _ = said(model, prompts(vlm, ROWS))
        inputs = prompts(vlm, ROWS)
        mask = inputs["attention_mask"]
        starts = (mask == 0).sum(1).tolist()
        counts = [(inputs["input_ids"][b] == 99).sum().item() // 16 for b in range(2)]
        pixels = inputs["pixel_values"].split(counts)
        for b in range(2):
            alone = {"input_ids": inputs["input_ids"][b : b + 1, starts[b] :],
                     "attention_mask": mask[b : b + 1, starts[b] :], "pixel_values": pixels[b]}  # fmt: skip
            _, one, _ = said(model, alone)
            torch.testing.assert_close(both[b], one[0], rtol=1e-3, atol=1e-3 * float(one.abs().max()))
