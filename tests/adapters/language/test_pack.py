"""Two layers whose caches are stored together, against a stock cache whose entries are replaced by hand."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as
from tokenreduce.adapters.language.paired import PairedLayer
from tokenreduce.measure.generation import layer_bytes
from tokenreduce.vision.cache.minicache import MiniCache

STEPS = 12


def inputs_of(name, pad="left"):
    return prompts(VLMS[name], ((9, "i"), (5, "i")), pad)


def forced(model, given, tokens, cache, after=None):
    """Logits of the prompt's last token and of every forced token."""
    with torch.no_grad():
        out = model(**given, use_cache=True, **cache_as(model, cache))
        logits, mask = [out.logits[:, -1]], given["attention_mask"]
        if after is not None:
            after(cache, 0)
        for i in range(tokens.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = mask.cumsum(1)[:, -1:] - 1
            if (deltas := getattr(model.model, "rope_deltas", None)) is not None:
                positions = (mask.shape[1] - 1 + deltas).expand(3, -1, -1)
            out = model(
                input_ids=tokens[:, i : i + 1],
                attention_mask=mask,
                use_cache=True,
                position_ids=positions,
                **cache_as(model, cache),
            )
            logits.append(out.logits[:, -1])
            if after is not None:
                after(cache, i + 1)
    return torch.stack(logits, 1)


def by_hand(method, depth, mask):
    """What replaces the entries of a stock cache after each call."""

    def replace(cache, step):
        for lower, upper in method.pairs(depth):
            a, b = cache.layers[lower], cache.layers[upper]
            for name in ("keys", "values"):
                x, y = getattr(a, name), getattr(b, name)
                if step == 0:
                    paired = method.encode(x, y, mask.bool(), True)
                    setattr(a, name, paired.restore(0))
                    setattr(b, name, paired.restore(1))
                else:
                    paired = method.encode(x[:, :, -1:], y[:, :, -1:], None, False)
                    x[:, :, -1:], y[:, :, -1:] = paired.restore(0), paired.restore(1)

    return replace


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("method", [MiniCache(), MiniCache(start=0, gamma=0.3), MiniCache(start=1)], ids=str)
def test_decode_is_that_of_replaced_entries(name, method, kind):
    model, given = VLMS[name].model, inputs_of(name)
    if kind == "eager":
        model = copy.deepcopy(model)  # other tests use the same one
        model.set_attn_implementation(kind)
    tokens = torch.randint(10, 90, (2, STEPS), generator=torch.Generator().manual_seed(3))
    want = forced(model, given, tokens, DynamicCache(), by_hand(method, 4, given["attention_mask"]))
    stock = forced(model, given, tokens, DynamicCache())
    with tr.patched(model, method):
        cache = DynamicCache()
        got = forced(model, given, tokens, cache)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock[:, 1:], want[:, 1:], rtol=1e-2), "packing shows"
    packed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, PairedLayer)]
    assert packed == [i for pair in method.pairs(4) for i in pair]
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}


def test_crops_copies_and_rows():
    """What went is gone from both layers, a copy goes on alone, and rows may be chosen."""
    model, given = VLMS["llava"].model, inputs_of("llava")
    tokens = torch.randint(10, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    with tr.patched(model, "minicache:gamma=0.4"):
        short, long = DynamicCache(), DynamicCache()
        forced(model, given, tokens[:, :3], short)
        forced(model, given, tokens, long)
        other = copy.deepcopy(long)
        long.crop(-3)
        for a, b in zip(long.layers, short.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
        assert other.get_seq_length() == long.get_seq_length() + 3
        before = [layer.keys for layer in other.layers]
        other.reorder_cache(torch.tensor([1, 1]))
        for layer, keys in zip(other.layers, before, strict=True):
            assert torch.equal(layer.keys, keys[[1, 1]])


def test_generation_beams_and_bytes():
    model, given = VLMS["llava"].model, inputs_of("llava")
    stock = model.generate(**given, max_new_tokens=6, do_sample=False)
    with tr.patched(model, "minicache"):
        with tr.record(model) as trace:
            assert model.generate(**given, max_new_tokens=6, do_sample=False).shape == stock.shape
        assert [step.layer for step in trace.cache] == [2, 3]
        assert all(step.bytes_held < step.bytes_before for step in trace.cache)
        assert torch.equal(*(step.kept for step in trace.cache))
        with torch.no_grad():
            cache = model(**given, use_cache=True).past_key_values
        held = layer_bytes(cache)
        assert held[2:] == [layer.nbytes for layer in cache.layers[2:]] == [step.bytes_held for step in trace.cache]
        assert held[2] < 0.8 * held[0]
        one = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=3)
        again = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=3)
        assert torch.equal(one, again)
        assert "pack with layer 2 (minicache)" in str(tr.describe(model, detail=True))
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), stock)


def test_behind_a_cut_and_before_one():
    """A pair holds the same tokens: all behind the cut."""
    model, given = VLMS["llava"].model, inputs_of("llava")
    with tr.patched(model, "visionzip:keep=8+fastv:layer=2,keep=0.5+minicache"):
        cache = DynamicCache(config=model.config)
        model.generate(**given, max_new_tokens=4, do_sample=False, **cache_as(model, cache))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 2 + ["PairedLayer"] * 2
    assert cache.layers[3].get_seq_length() < cache.layers[1].get_seq_length()


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("llava", "fastv:layer=3,keep=0.5+minicache", "set start=3"), ("llava", "knorm+minicache", "choose one"),
        ("llava", "minicache:start=3", "pairs no layers"), ("llava", "minicache+minicache:t=0.5", "both pack"),
        ("llava_next_window", "minicache", "sliding window"),
        ("llava", "dycoke-cache:layer=2,keep=3+minicache", "choose one"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired(name, spec, message):
    model = VLMS[name].model
    with pytest.raises(ValueError, match=message):
        tr.patch(model, spec)


def test_static_caches_are_refused():
    model, given = VLMS["llava"].model, inputs_of("llava")
    with tr.patched(model, "minicache"), pytest.raises(ValueError, match="dynamic cache"):
        model.generate(**given, max_new_tokens=4, do_sample=False, cache_implementation="static")
