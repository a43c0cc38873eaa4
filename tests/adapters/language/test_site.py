"""One site per decoder layer, with its steps in order."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.language import order
from tokenreduce.adapters.language.acting import acting_in
from tokenreduce.adapters.language.find import find
from tokenreduce.adapters.language.site import LayerCall, LayerStep, run_before, sites_in
from tokenreduce.core.undo import Undo

COUNTS: list[tuple[int, int]] = []


@dataclass(frozen=True)
class CountTokens(LayerStep):
    """A step of a file of its own: how many tokens enter every layer in prefill."""

    def before(self, call: LayerCall) -> None:
        if call.prefill:
            COUNTS.append((call.index, call.x.shape[1]))


def test_a_step_is_one_class_and_one_line(monkeypatch):
    stock = order.steps_at

    def steps(found, acting, i):
        yield from stock(found, acting, i)
        yield CountTokens()  # the one line

    monkeypatch.setattr(order, "steps_at", steps)
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"),))
    COUNTS.clear()
    with torch.no_grad(), tr.patched(vlm.model, "fastv:layer=2,keep=4"), tr.record(vlm.model, flops=False) as trace:
        vlm.model(**inputs)
    width = inputs["input_ids"].shape[1]
    left = next(s.tokens for s in trace.steps if s.layer == 2)
    assert COUNTS[:2] == [(0, width), (1, width)]
    assert {n for i, n in COUNTS if i >= 2} == {left}
    assert left < width


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_every_layer_has_one_site_and_one_hook_and_describe_shows_them(name):
    vlm = VLMS[name]
    model = copy.deepcopy(vlm.model)
    layers = find(model).layers
    before = [(len(x._forward_pre_hooks), len(x._forward_hooks)) for x in layers]
    tr.patch(model, "divprune:keep=6+lazyllm")
    hooks = [h for x in layers for h in x._forward_pre_hooks.values()]
    assert (
        sum(getattr(h, "func", None) is run_before for h in hooks)
        == len(layers)
        == len(hooks) - sum(b[0] for b in before)
    )
    assert [s.index for s in sites_in(layers)] == list(range(len(layers)))
    text = str(tr.describe(model, detail=True))
    assert "layer 0: own cache, " in text
    assert "take entry" in text
    assert (
        text.index("choose (lazyllm") < text.index("set aside") < text.index("gather columns", text.index("set aside"))
    )
    assert text.rstrip().endswith("last only")
    assert "steps " not in str(tr.describe(model))
    tr.unpatch(model)
    assert [(len(x._forward_pre_hooks), len(x._forward_hooks)) for x in layers] == before
    assert not sites_in(layers)


def test_order_is_that_of_the_list_whatever_is_registered_when():
    """The prompt is kept behind what takes its entry, and keywords are handed on last."""
    vlm = VLMS["llava"]
    found = find(copy.deepcopy(vlm.model))
    acting = acting_in(found, tr.parse("divprune:keep=6+sparsevlm", stage="projector"))
    names = [str(step).split(" (")[0] for step in order.layer_sites(found, acting)[0].steps]
    assert names.index("take entry") < names.index("gather columns") < names.index("keep prompt")
    assert replace(acting, entry=None).behind == acting.first
    assert isinstance(Undo().actions, list)
