"""How image/video language models are said to be supported, from classes alone."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from vlms import encodes_before

from tokenreduce.measure.census_language import _row, census_language

pytestmark = pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")


@pytest.mark.parametrize(
    ("name", "how", "stages", "reason"),
    [
        ("LlavaForConditionalGeneration", "table", ("language", "projector", "cache", "encoder"), ""),
        ("Mistral3ForConditionalGeneration", "discovered", ("language", "projector", "cache", "encoder"), ""),
        ("Qwen3_5ForConditionalGeneration", "discovered", ("language", "projector", "cache", "encoder"), ""),
        ("Gemma4ForConditionalGeneration", "discovered", ("projector",), "is given per_layer_input"),
        ("AriaForConditionalGeneration", "discovered", ("language", "projector", "cache"), "attends to all patches"),
        ("ColPaliForRetrieval", "table", ("language", "projector", "encoder"), ""),
        ("Blip2ForConditionalGeneration", "refused", (), "its own generate calls self.language_model.generate"),
        ("MllamaForConditionalGeneration", "refused", (), "no placeholder tokens"),
        ("PI0ForConditionalGeneration", "refused", (), "no method acts"),
        ("Emu3ForConditionalGeneration", "not built", (), "no model from its default config"),
    ],
)
def test_a_row_says_what_describe_does(name, how, stages, reason):
    row = _row(getattr(hf, name))
    assert (row.library, row.name, row.how, row.stages) == ("transformers", name, how, stages)
    assert reason in row.reason
    assert bool(reason) == bool(row.reason)


def test_what_has_no_visual_tokens_has_no_row():
    assert _row(hf.BertForMaskedLM) is None
    assert census_language("timm") == []


def test_nothing_is_left_on_the_meta_device():
    _row(hf.Mistral3ForConditionalGeneration)
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.slow
def test_every_class_has_a_row_and_a_reason_where_none_acts():
    rows = census_language()
    assert len({r.name for r in rows}) == len(rows) > 90
    assert all(r.reason for r in rows if not r.stages)
    assert sum(r.how in ("table", "discovered") for r in rows) > 70
