from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.bench.performance.language_operators import Operators, count
from tokenreduce.bench.performance.shapes import Shape, build, prompt

pytest.importorskip("transformers")

#: 36 visual tokens and 8 of text.
TINY = Shape((16, 3, 2, 32), (32, 4, 4, 48), side=6, text=8, vocabulary=200)


class Double(torch.nn.Module):
    def forward(self, x):
        return (x + x) * 2


def test_a_count_is_that_of_the_operators_and_is_repeatable():
    model, inputs = build(TINY), prompt(TINY)
    stock = count(model, inputs)
    assert count(model, inputs) == stock
    model.lm_head = torch.nn.Sequential(model.lm_head, Double())
    assert count(model, inputs) == Operators(stock.prefill + 2, stock.step + 2)


@pytest.mark.parametrize("spec", ["fastervlm:keep=12", "visionzip:keep=12", "fastv:layer=2,keep=12"])
def test_behind_a_prompt_without_padding_a_step_adds_next_to_nothing(spec):
    """No mask is made for layers behind a cut; positions are counted."""
    model, inputs = build(TINY), prompt(TINY)
    stock = count(model, inputs)
    with tr.patched(model, spec):
        made = count(model, inputs)
    assert made.step - stock.step <= 2
    assert made.prefill > stock.prefill
