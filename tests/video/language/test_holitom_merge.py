"""HoliTom's merge inside the language model against the card."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, mixed, seen_by
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce import HoliTomMerge


def sequential(e, b, k, plain=False):
    """Step 10 as published, one token after the other: values of the kept tokens by index."""
    visual = [i for i in range(e.n) if e.visual[b, i]]
    last = max(i for i in range(e.n) if e.valid is None or e.valid[b, i])
    scores = seen_by(e, b, last)
    kept = sorted(sorted(visual, key=lambda i: -float(scores[i]))[:k])
    x = e.x[b].double()
    out, members = {i: x[i].clone() for i in kept}, {i: [i] for i in kept}
    for i in visual:
        if i not in kept:
            best = max(kept, key=lambda j: float(torch.cosine_similarity(x[i], x[j], dim=0)))
            out[best] = (out[best] + x[i]) / 2
            members[best].append(i)
    return {i: x[m].mean(0) for i, m in members.items()} if plain else out


@pytest.mark.parametrize("mean", ["halving", "plain"])
@pytest.mark.parametrize("keep", [0.5, 2, 1])
def test_the_published_sequence(mean, keep):
    e = mixed(layer=3)
    plan = HoliTomMerge(keep=keep, mean=mean).plan(e)
    out, there = plan.reduce(e.x), plan.validity()
    for b in range(2):
        n = int(e.visual[b].sum())
        want = sequential(e, b, keep if isinstance(keep, int) else int(keep * n + 0.5), mean == "plain")
        got = {i: out[b, s] for s, i in enumerate(plan.representatives()[b].tolist()) if there is None or there[b, s]}
        assert {i for i in got if e.visual[b, i]} == set(want)
        for i, row in got.items():
            torch.testing.assert_close(row, want[i].float() if i in want else e.x[b, i], rtol=1e-4, atol=1e-5)


def test_the_layer_is_as_deep_as_in_the_paper():
    assert [i for i in range(28) if HoliTomMerge().acts_at(i, 28)] == [18]
    assert [i for i in range(4) if HoliTomMerge().acts_at(i, 4)] == [3]
    assert [i for i in range(6) if HoliTomMerge(layer=2).acts_at(i, 6)] == [2]
    with pytest.raises(ValueError, match="layers 0 to 3"):
        HoliTomMerge(layer=4).acts_at(0, 4)


@pytest.mark.parametrize(("field", "bad"), [("layer", 0), ("keep", 2.0), ("mean", "sum")])
def test_bad_settings(field, bad):
    with pytest.raises(ValueError, match=field):
        HoliTomMerge(**{field: bad})


def test_nothing_to_merge():
    assert HoliTomMerge().plan(mixed(("ttt", "ttt"), layer=3)).is_identity
    assert HoliTomMerge(keep=1.0).plan(mixed(LAYOUTS, layer=3)).is_identity


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision"])
def test_in_models_the_layers_behind_see_the_mixed_states(family):
    """The next layer's input is the plan's mix of what the layer before gave."""
    vlm = VLMS[family]
    inputs = prompts(vlm, ((9, "i"), (5, "i")))
    layers = vlm.model.model.get_submodule(vlm.text).layers
    given = {}

    def keep_output(module, args, output):
        given["out"] = output[0] if isinstance(output, tuple) else output

    def keep_input(module, args, kwargs):
        given["in"] = args[0]

    reducer = HoliTomMerge(layer=2, keep=0.5)
    with torch.no_grad(), tr.patched(vlm.model, reducer), tr.record(vlm.model) as trace:
        hooks = [
            layers[1].register_forward_hook(keep_output),
            layers[2].mlp.register_forward_pre_hook(lambda m, a: None),
        ]
        hooks.append(layers[2].register_forward_pre_hook(keep_input, with_kwargs=True))
        vlm.model(**inputs)
        for hook in hooks:
            hook.remove()
    (plan,) = trace.plans
    torch.testing.assert_close(given["in"], plan.reduce(given["out"]))
    assert given["in"].shape[1] < given["out"].shape[1]
