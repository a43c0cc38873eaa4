"""FlashVID's step inside the language model against the card, and the published whole in a model."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by
from vlms import VLMS, llava, prompts

import tokenreduce as tr
from tokenreduce import FlashVIDLLM


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vvvvv", "vvvvv"), ("vtvtvtt",)], ids=str)
@pytest.mark.parametrize("keep", [1, 3, 0.3, 0.5])
def test_the_step_of_the_card(layouts, keep):
    evidence = mixed(layouts)
    plan = FlashVIDLLM(keep=keep).plan(evidence)
    for b, layout in enumerate(layouts):
        places = [i for i, c in enumerate(layout) if c == "v"]
        wanted = min(keep, len(places)) if isinstance(keep, int) else max(1, int(keep * len(places) + 0.5))
        score = seen_by(evidence, b, last_of(layout))
        best = sorted(places, key=lambda i: (-float(score[i]), i))[:wanted]
        assert kept_of(plan, b) == [i for i, c in enumerate(layout) if c != "v" or i in best]
    assert plan.untouched().all()


def test_the_layer_is_as_deep_as_in_the_paper():
    assert [i for i in range(28) if FlashVIDLLM().acts_at(i, 28)] == [20]
    assert [i for i in range(4) if FlashVIDLLM().acts_at(i, 4)] == [3]
    assert [i for i in range(36) if FlashVIDLLM(layer=28, keep=0.1).acts_at(i, 36)] == [28]
    with pytest.raises(ValueError, match="layers 0 to 3"):
        FlashVIDLLM(layer=4).acts_at(0, 4)


@pytest.mark.parametrize(("layers", "first"), [(7, 5), (14, 10)])
def test_the_mean_over_layers_is_the_budget(layers, first):
    """The published whole: of 48 visual tokens 30 enter, 9 go on, 24 in the mean, which is one half."""
    model = llava(layers)
    inputs = prompts(VLMS["llava"], ((9, "iii"),))
    text = inputs["input_ids"].shape[1] - 48
    with torch.no_grad(), tr.patched(model, "flashvid:keep=0.5,expansion=1.25+flashvid-llm"), tr.record(model) as trace:
        model(**inputs)
    before, inside = trace.steps
    assert (before.stage, inside.stage, inside.layer) == ("projector", "language", first)
    assert (before.tokens - text, inside.tokens - text) == (30, 9)
    assert first * 30 + (layers - first) * 9 == layers * 24


@pytest.mark.parametrize(("field", "bad"), [("layer", 0), ("keep", 2.0), ("keep", 0)])
def test_bad_settings(field, bad):
    with pytest.raises(ValueError, match=field):
        FlashVIDLLM(**{field: bad})
