"""What ``tr.describe`` lists for a model is what can be put into it, with settings that fit where defaults do not."""

from __future__ import annotations

import copy

import pytest
from vlms import VLMS, deeper

import tokenreduce as tr

#: What a small model needs in place of defaults: depths, and tables that are measured for a model.
FIT = {
    "diffrate": "keep=0.5", "earlytom": "prune_layers=[0]", "ipcv": "layer=2", "lazyllm": "revive=false",
    "duoattention": "heads=[[0,0]]", "razorattention": "heads=[[0,0]]",
}  # fmt: skip


def listed(model):
    """Every method that is listed goes in, by name or with what :data:`FIT` says."""
    out = []
    found = tr.describe(model)
    for stage in found.stages:
        for name in found.methods(stage):
            method = tr.get_method(f"{name}:{FIT[name]}" if name in FIT else name, stage)
            tr.unpatch(tr.patch(model, method))
            out.append((stage, name))
    return out


@pytest.mark.parametrize("name", ["llava", "llava_next_window", "llava_onevision", "qwen3_vl"])
def test_all_that_is_listed_can_be_attached(name):
    got = listed(VLMS[name].model)
    assert ("projector", "divprune") in got
    assert ("encoder", "resize") not in got  # a prompt has placeholders for all patches
    assert ("encoder", "resize") in [("encoder", n) for n in tr.list_methods(stage="encoder")]
    slides = name == "llava_next_window"
    for one in (("language", "dstp"), ("cache", "dycoke-cache"), ("cache", "minicache")):
        assert (one in got) is not slides
    with pytest.raises(ValueError, match="placeholders for all its patches"):
        tr.patch(VLMS[name].model, "resize@encoder:keep=0.5")


@pytest.mark.parametrize(("feature", "there"), [(1, False), (2, False), (3, True), (-2, True), (-4, False)])
def test_a_method_that_rebuilds_needs_a_block_that_the_language_model_reads(feature, there):
    """``vision_feature_layer`` counts what enters block 0 as 0, so that 3 is what block 2 returns."""
    stock = deeper("llava")
    config = copy.deepcopy(stock.config)
    config.vision_feature_layer = feature
    model = type(stock)(config)
    assert ("ipcv" in tr.describe(model).methods("encoder")) == there
    if there:
        tr.unpatch(tr.patch(model, "ipcv:layer=2"))
    else:
        with pytest.raises(ValueError, match="the language model gets what block"):
            tr.patch(model, "ipcv:layer=2")
