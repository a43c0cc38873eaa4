"""One table that puts every method that hides cached keys in decode through every invariant; a new one is in by itself.

Methods that thin caches have theirs in tests/vision/cache/test_cache_table.py."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from support import PAPER
from threads import mixed_up
from vlms import batch, llava

import tokenreduce as tr
from tokenreduce.core.cache_codec import CacheCodec
from tokenreduce.core.evidence import Earlier, Evidence
from tokenreduce.core.registry import get_class

OTHERS = (tr.CacheReducer, CacheCodec)
METHODS = [name for name in tr.list_methods(stage="cache") if not issubclass(get_class(name, "cache"), OTHERS)]
every = pytest.mark.parametrize("name", METHODS)
LAYOUTS = ("ttvvvvvvvvvvtt", "...vvvvvvvvttt", "ttttttttttvttt", "tttttttttttttt")


def method(name, **settings):
    return get_class(name, "cache")(**settings)


def layer_of(reducer, depth=4):
    return next(i for i in range(depth) if reducer.acts_at(i, depth))


def step(layouts=LAYOUTS, seed=0, earlier=None, dtype=torch.float32):
    """Evidence of a decode step: the new token's attention on cached tokens, itself last."""
    valid, visual = (torch.tensor([[c in letters for c in row] for row in layouts]) for letters in ("tv", "v"))
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(layouts), 2, 1, valid.shape[1], generator=g).masked_fill(~valid[:, None, None], -1e9)
    x = torch.zeros(*valid.shape, 0, dtype=dtype)
    return Evidence(
        x, attention=logits.softmax(-1), visual=visual, valid=valid, layer=3, depth=4, entry=12, cls=False,
        earlier=earlier,
    )  # fmt: skip


def stay(plan):
    return plan.sources() >= 0


@every
def test_text_stays_and_some_visual_tokens_do(name):
    for keep in (1, 3, 0.4, 1.0):
        got = stay(method(name, keep=keep).plan(step()))
        for b, row in enumerate(LAYOUTS):
            assert all(got[b, i] for i, c in enumerate(row) if c == "t")
            left = sum(bool(got[b, i]) for i, c in enumerate(row) if c == "v")
            n = row.count("v")
            assert left == (min(keep, n) if isinstance(keep, int) else min(n, max(1, int(keep * n + 0.5))))


@every
def test_keep_everything_is_the_identity(name):
    for keep in (1.0, 100):
        assert method(name, keep=keep).plan(step()).is_identity


@every
def test_a_sample_is_treated_alone_and_in_a_batch_alike(name):
    g = torch.Generator().manual_seed(5)
    attention, left = torch.rand(4, 14, generator=g), torch.rand(4, 14, generator=g) > 0.5
    both = stay(method(name, keep=3).plan(step(earlier=Earlier(attention, left))))
    whole = step(earlier=Earlier(attention, left))
    for b in range(4):
        one = Evidence(
            whole.x[b : b + 1], attention=whole.attention.given[b : b + 1], visual=whole.visual[b : b + 1],
            valid=whole.valid[b : b + 1], layer=3, depth=4, cls=False,
            earlier=Earlier(attention[b : b + 1], left[b : b + 1]),
        )  # fmt: skip
        assert torch.equal(stay(method(name, keep=3).plan(one))[0], both[b])


@every
def test_text_and_json_round_trips_and_bad_settings(name):
    for reducer in (method(name), method(name, keep=0.25), method(name, keep=7)):
        assert tr.get_method(reducer.spec()) == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
        assert pickle.loads(pickle.dumps(reducer)) == reducer
    for bad in (0, 1.5, -3, 0.0, True):
        with pytest.raises(ValueError, match="keep"):
            method(name, keep=bad)
    with pytest.raises(ValueError, match=r"It takes: .*keep"):
        tr.get_method(f"{name}:no_such_setting=1")
    with pytest.raises(ValueError, match="layers 0 to 1"):
        [method(name).acts_at(i, 2) for i in range(2)]


@every
def test_nan_attention_is_an_error_and_evidence_marks_visual_tokens(name):
    bad = step()
    bad.attention.given[0, :, :, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        method(name, keep=3).plan(bad)
    blank = step()
    blank.visual = None
    with pytest.raises(ValueError, match="marks no visual tokens"):
        method(name, keep=3).plan(blank)


@every
def test_documented(name):
    kind = get_class(name, "cache")
    assert kind.__doc__
    assert kind.title
    assert re.fullmatch(PAPER, kind.paper)
    assert "Raises ``ValueError``" in kind.__doc__


# -- in a model ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    return llava()


def answer(model, inputs):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)


@every
def test_the_prefill_and_prompts_without_images_are_untouched(name, model):
    with torch.no_grad():
        inputs, blind = batch("left", ((9, 1), (5, 2))), batch("left", ((6, 0), (4, 0)))
        want, words = model(**inputs).logits, answer(model, blind)
        with tr.patched(model, method(name, keep=2)):
            assert torch.equal(model(**inputs).logits, want)
            assert torch.equal(answer(model, blind), words)


@every
def test_threads_do_not_mix(name, model):
    inputs = [batch("left", rows) for rows in (((9, 1), (5, 2)), ((6, 1), (8, 2)), ((4, 1),))]
    with tr.patched(model, method(name, keep=2)):
        assert mixed_up(lambda i: answer(model, i), inputs, 3) == []


@every
def test_copies_pickle_and_half_precision(name):
    inputs = batch("left", ((9, 1), (5, 2)))
    patched = tr.patch(llava(), method(name, keep=3))
    twin = pickle.loads(pickle.dumps(patched))
    assert torch.equal(answer(patched, inputs), answer(twin, inputs))
    assert name in repr(patched)
    half = twin.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        out = half.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True
        )
    assert torch.isfinite(torch.stack(out.logits)).all()
