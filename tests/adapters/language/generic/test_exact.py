"""Every image/video language model of the installed transformers that has a toy: reduced before and inside its language
model, it answers as the stock model does to a prompt that is as short."""

from __future__ import annotations

import pytest
import torch
from toys.build import TABLE, _config, families, inner_of
from toys.checks import (
    FORWARD,
    REFUSED,
    STOCK_FAILS,
    before,
    cached,
    forward,
    inside,
    layers_to_act,
    plain,
    slides_early,
    toy,
)
from toys.oracles import generate, relative
from toys.settings import SETTINGS
from vlms import encodes_before

import tokenreduce as tr
from tokenreduce.adapters.language.generic.towers import has_axes

pytestmark = pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")


#: Families of every kind of mask, positions and layers, which the fast tests run.
FAST = (
    "qwen3_5", "glm4v", "mistral3", "gemma4", "lfm2_vl", "aya_vision", "molmo2", "ernie4_5_vl_moe", "exaone4_5",
    "kimi_k25", "hunyuan_vl", "llama4", "qwen3_vl_moe",
)  # fmt: skip
EVERY = [n for n in families() if n not in (*TABLE, *REFUSED, *FORWARD, *STOCK_FAILS)]
NAMES = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in EVERY]
SPEC = "random@projector:keep=0.4"


@pytest.mark.parametrize("name", NAMES)
def test_keep_all_and_unpatch_are_bit_identical(name):
    here = toy(name)
    model, inputs = here.model, here.inputs
    with tr.patched(model, "divprune:keep=1.0"):
        same = generate(model, inputs)
    with tr.patched(model, SPEC):
        generate(model, inputs, 1)
    for got in (same, generate(model, inputs)):
        assert torch.equal(got[0], here.sequences)
        assert torch.equal(got[1], here.logits)
    assert not [k for m in model.modules() for k in vars(m) if "tokenreduce" in k]


def _places():
    """Both kinds of positions; the fast tests count anew in few families."""
    for name in EVERY:
        yield pytest.param(name, "original", marks=() if name in FAST else pytest.mark.slow)
        yield pytest.param(name, "compact", marks=() if name in FAST[:3] else pytest.mark.slow)


@pytest.mark.parametrize(("name", "positions"), list(_places()))
def test_before_the_language_model_it_is_a_short_prompt(name, positions):
    model = toy(name).model
    spec = f"{SPEC},positions={positions}"
    if positions == "compact" and has_axes(inner_of(model)):
        with pytest.raises(ValueError, match="positions are places in the image"):
            tr.patch(model, spec)
        return
    limit = 5e-5 if name in ("chameleon", "glm5_next") else 1e-5  # 2.4e-5 was seen of their floors
    assert before(name, spec, positions == "compact") < limit


@pytest.mark.parametrize("name", NAMES)
def test_inside_the_language_model_it_is_stock_layers_on_fewer_tokens(name):
    here, layers = toy(name), layers_to_act(name)
    model = here.model
    if slides_early(name):
        pytest.skip("see test_features_per_layer_follow_the_columns")
    if not layers:
        with pytest.raises(ValueError, match=r"fastv acts at stage language|would look at layer"):
            tr.patch(model, "fastv:layer=1,keep=0.3")
        return
    for layer in layers[:1] if name in FAST else layers:
        assert inside(name, layer) < 1e-5
    with tr.patched(model, f"fastv:layer={layers[0]},keep=1.0"):
        got = generate(model, here.inputs)
    assert torch.equal(got[1], here.logits)


@pytest.mark.parametrize(
    "name",
    ["qwen3_5", "glm4v", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lfm2_vl", "mistral3", "kimi_k25"))],
)
def test_both_mechanisms_before_the_language_model_agree(name):
    """With a method inside that keeps all, columns go at the layers instead of at the call."""
    here = toy(name)
    logits = []
    for more in ("", f"+fastv:layer={layers_to_act(name)[0]},keep=1.0"):
        with tr.patched(here.model, f"{SPEC},positions=original{more}"):
            logits.append(generate(here.model, here.inputs)[1])
    assert relative(*logits) < 1e-5
    assert relative(logits[0], here.logits) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_left_the_cache_are_as_if_masked(name):
    far = cached(name)
    assert far is None or far < 1e-5


@pytest.fixture(params=[("gemma4", "num_kv_shared_layers", 0), ("gemma4_unified", "sliding_window", 512)])
def own_keys(request, monkeypatch):
    """Gemma 4 whose layers have keys of their own, as its default config says; and wide windows."""
    name, setting, value = request.param
    monkeypatch.setitem(SETTINGS[name]["text_config"], setting, value)
    for known in (_config, toy):
        known.cache_clear()
    yield name
    for known in (_config, toy):
        known.cache_clear()


def test_features_per_layer_follow_the_columns(own_keys):
    here, logits = toy(own_keys), []
    if own_keys == "gemma4":  # the other makes masks in decode, which stock layers of unequal lengths do not share
        assert [inside(own_keys, k) < 1e-5 for k in layers_to_act(own_keys)] == [True, True]
        assert cached(own_keys) < 1e-5
    for more in ("", "+fastv:layer=2,keep=1.0"):  # columns go at the call, and at the layers
        with tr.patched(here.model, f"{SPEC},positions=original{more}"):
            logits.append(generate(here.model, here.inputs)[1])
    assert relative(*logits) < 1e-5
    assert relative(logits[0], here.logits) > 1e-3
    with tr.patched(here.model, "fastv:layer=2,keep=1.0"):
        assert torch.equal(generate(here.model, here.inputs)[1], here.logits)


@pytest.mark.parametrize(
    ("name", "why"),
    [("gemma4", "no keys of its own"), ("gemma3n", "AltUp"), ("llama4", "has chunked_attention")],
)
def test_layers_that_columns_cannot_leave_are_named(name, why):
    with pytest.raises(ValueError, match=f"fastv acts at stage language, which is not available .*{why}"):
        tr.patch(toy(name).model, "fastv:layer=2,keep=0.3")


@pytest.mark.parametrize("name", [n for n in FORWARD if n in families()])
def test_bidirectional_models_see_what_is_left(name):
    assert forward(name, SPEC) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in families() if n in STOCK_FAILS])
def test_what_is_not_checked_cannot_be_run(name):
    """When one of them runs in a release, it belongs to the others."""
    with pytest.raises(Exception):  # noqa: B017 - each fails in a way of its own
        generate(*plain(name))
