"""V2Drop against the steps of its card in plain loops, and in models against what the layers really wrote."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, mixed
from vlms import VLMS, batch, llava, prompts

import tokenreduce as tr


def reference(evidence, layouts, b, wanted):
    places = [i for i, c in enumerate(layouts[b]) if c == "v"]
    change = {i: float((evidence.x[b, i].double() - evidence.before[b, i].double()).norm()) for i in places}
    best = sorted(places, key=lambda i: (-change[i], i))[:wanted]
    return [i for i, c in enumerate(layouts[b]) if c != "v" or i in best]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vvvvv", "vvvvv"), ("tvt", "tvt"), ("vtvtvtt",)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_a_list_of_shares_is_rounded_down(layouts, share):
    evidence = mixed(layouts, layer=2)
    plan = tr.V2Drop(layers=(2,), keep=(share,)).plan(evidence)
    for b, layout in enumerate(layouts):
        wanted = max(1, int(layout.count("v") * share))
        assert kept_of(plan, b) == reference(evidence, layouts, b, wanted)


def test_ties_and_keep_all():
    evidence = mixed(("tvvvvt", "vvvvtt"))
    evidence._before = evidence.x.clone()
    plan = tr.V2Drop(layers=(2,), keep=(0.5,)).plan(evidence)
    assert plan.representatives().tolist() == [[0, 1, 2, 5], [0, 1, 4, 5]]
    assert tr.V2Drop(layers=(2,), keep=(1.0,)).plan(evidence).is_identity
    assert not any(tr.V2Drop(keep=1.0).acts_at(i, 32) for i in range(32)), "nothing is recorded"
    with pytest.raises(ValueError, match="before"):
        tr.V2Drop(layers=(2,), keep=(0.5,)).plan(mixed(before=None))


def test_where_it_acts():
    assert [i for i in range(32) if tr.V2Drop().acts_at(i, 32)] == [3, 17, 22]
    assert [i for i in range(28) if tr.V2Drop(layers=(3, 16, 22), keep=(0.25, 0.05, 0)).acts_at(i, 28)] == [3, 16, 22]
    assert [i for i in range(4) if tr.V2Drop().acts_at(i, 4)] == [1, 2, 3]
    with pytest.raises(ValueError, match="4 layers"):
        tr.V2Drop().acts_at(0, 3)
    for bad in ({"layers": (0, 2)}, {"layers": (1, 2)}, {"keep": (0.5, 0.5)}, {"keep": (0.5, 0.5, 1.5)}):
        with pytest.raises(ValueError, match=r"layers|keep"):
            tr.V2Drop(**bad)


@pytest.mark.parametrize("keep", [192, 1 / 3, 0.15, 0.09])
def test_one_number_is_the_mean_over_layers(keep):
    n, left = 576, []
    for layer in range(32):
        if not tr.V2Drop(keep=keep).acts_at(layer, 32):
            left.append(n if not left else left[-1])
            continue
        row = "t" + "v" * (left[-1] if left else n) + "t"
        plan = tr.V2Drop(keep=keep).plan(mixed((row,), layer=layer, depth=32, prompt=("t" + "v" * n + "t",)))
        left.append(plan.k - 2)
    want = 192 if keep == 192 else keep * n
    reachable = (3 * n + 29) / 32
    assert sum(left) / 32 == pytest.approx(max(want, reachable), abs=1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_in_a_model_the_score_is_what_the_layer_wrote(family, pad):
    """The inputs of layers as hooks see them, in a run that drops twice, DeepStack included."""
    model = VLMS[family].model if family != "llava" else llava()
    inputs = batch(pad, ((9, 1), (5, 2))) if family == "llava" else prompts(VLMS[family], ((9, "i"), (5, "i")), pad)
    text = model.model.language_model
    method = tr.V2Drop(layers=(1, 3), keep=(0.6, 0.4))
    seen = []
    norm = [lambda m, a: seen.append(a[0].detach())]
    with torch.no_grad(), tr.patched(model, method), tr.record(model, flops=False) as trace:
        hooks = [layer.input_layernorm.register_forward_pre_hook(norm[0]) for layer in text.layers]
        model(**inputs)
    for hook in hooks:
        hook.remove()
    plans = {s.layer: s.plan for s in trace.steps}
    with torch.no_grad():
        stock = []
        hooks = [layer.register_forward_pre_hook(lambda m, a: stock.append(a[0].detach())) for layer in text.layers]
        model(**inputs)
    for hook in hooks:
        hook.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor([99, 98]))
    change = (stock[1] - stock[0]).norm(dim=-1)
    for b in range(2):
        places = visual[b].nonzero().flatten().tolist()
        wanted = max(1, int(len(places) * 0.6))
        best = sorted(places, key=lambda i: (-float(change[b, i]), i))[:wanted]
        assert [i for i in kept_of(plans[1], b) if visual[b, i]] == sorted(best)
    assert [s.shape[1] for s in seen] == [visual.shape[1], plans[1].k, plans[1].k, plans[3].k]


def test_state_belongs_to_the_generation():
    model = llava()
    one, two = batch("left", ((9, 1), (5, 1))), batch("left", ((6, 1),))
    with torch.no_grad(), tr.patched(model, "v2drop:keep=0.5"):
        first = model(**one).logits
        model(**two)
        assert torch.equal(model(**one).logits, first)
        out = model.generate(**one, max_new_tokens=4, do_sample=False)
        assert out.shape[1] == one["input_ids"].shape[1] + 4
