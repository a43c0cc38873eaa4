"""VTW: all visual tokens leave, and the model behind is one of text."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, mixed
from vlms import VLMS, prompts
from vlms_masked import close, dropped_by, generate, hidden, layers_of

import tokenreduce as tr


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("tvt", "ttt"), ("vvt", "vtt")], ids=str)
def test_no_visual_token_stays(layouts):
    plan = tr.VTW(layer=2).plan(mixed(layouts))
    for b, layout in enumerate(layouts):
        assert kept_of(plan, b) == [i for i, c in enumerate(layout) if c != "v"]


def test_where_it_acts():
    def acting(method, depth=32):
        return [i for i in range(depth) if method.acts_at(i, depth)]

    assert acting(tr.VTW()) == [15]
    assert acting(tr.VTW(), 28) == [13]
    assert acting(tr.VTW(keep=0.469)) == [15]
    assert acting(tr.VTW(keep=0.001)) == [1]
    assert acting(tr.VTW(keep=1.0)) == acting(tr.VTW(layer=32)) == []
    assert acting(tr.VTW(layer=0)) == [0]
    with pytest.raises(ValueError, match="layers 0 to 3"):
        tr.VTW(layer=5).acts_at(0, 4)
    with pytest.raises(ValueError, match="not both"):
        tr.VTW(layer=2, keep=0.5)


def test_a_count_is_a_mean_for_every_sample():
    """10 and 9 visual tokens in 4 layers: 5 is half of one, 5/9 of the other rounds to 2 layers, too; 8 to 3 and 4."""
    for keep, layers in ((5, (2, 2)), (8, (3, 4)), (1, (1, 1))):
        for b, first in enumerate(layers):
            for layer in (1, 2, 3):
                plan = tr.VTW(keep=keep).plan(mixed(layer=layer))
                assert any(LAYOUTS[b][i] == "v" for i in kept_of(plan, b)) == (layer < first)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_withdrawal_is_hiding(family, layer):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    with tr.patched(model, tr.VTW(layer=layer)):
        got, logits, trace = generate(model, inputs)
    (step,) = [s for s in trace.steps if s.plan is not None]
    assert step.tokens == int((~torch.isin(inputs["input_ids"], torch.tensor([99]))).sum(1).max())
    with hidden(layers_of(family, model), dropped_by(trace, inputs), layer):
        want, stock, _ = generate(model, inputs)
    assert torch.equal(got, want)
    close(logits, stock)
